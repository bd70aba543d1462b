// Let readers sort and filter the tables that ask for it; all rows stay on the page, and on paper.
document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("table.bd-sortable")) {
    new simpleDatatables.DataTable(table, {
      paging: false, searchable: true, searchAnd: true, ignorePunctuation: false,
      labels: { placeholder: "Filter: words that a row must have", noResults: "No row has all of these words",
                info: "{rows} rows", searchTitle: "Filter the rows of this table" },
    });
  }
});
