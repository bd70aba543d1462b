// Let readers sort and filter the tables that ask for it; all rows stay on the page, and on paper.
document.addEventListener("DOMContentLoaded", () => {
  if (!window.simpleDatatables) return;  // it could not be fetched: the table stays plain
  for (const table of document.querySelectorAll("table.bd-sortable")) {
    new simpleDatatables.DataTable(table, {
      paging: false, fixedColumns: false, searchAnd: true,
      labels: {
        placeholder: "Filter by words",
        searchTitle: "Keep the rows that have all these words",
        noRows: "No rows", noResults: "No row has all these words", info: "",
      },
    });
  }
});
