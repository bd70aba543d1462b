// Let readers sort and filter the tables that ask for it; all rows stay on the page, and on paper.
document.addEventListener("DOMContentLoaded", () => {
  if (!window.simpleDatatables) return;  // it could not be fetched: the table stays plain
  for (const table of document.querySelectorAll("table.bd-sortable")) {
    const columns = [...table.querySelectorAll("th")].flatMap((head, column) =>
      "filter" in head.dataset ? [{column, name: head.textContent, values: new Set(
        [...table.tBodies[0].rows].map(row => row.cells[column].textContent))}] : []);
    const sorted = new simpleDatatables.DataTable(table, {
      paging: false, fixedColumns: false, searchAnd: true, ignorePunctuation: false,
      labels: {
        placeholder: "Filter by words",
        searchTitle: "Keep the rows that have all these words",
        noRows: "No rows", noResults: "No row has all these words", info: "",
      },
    });
    const top = sorted.wrapperDOM.querySelector(".datatable-top");
    for (const {column, name, values} of columns) {
      const label = top.appendChild(document.createElement("label"));
      const choice = document.createElement("select");
      choice.append(new Option("all", ""), ...[...values].sort().map(value => new Option(value)));
      // The library reads all inputs of this class; this one is for one column.
      const term = document.createElement("input");
      Object.assign(term, {type: "hidden", className: "datatable-input"});
      term.dataset.columns = JSON.stringify([column]);
      choice.addEventListener("change", () => {
        term.value = choice.value;
        term.dispatchEvent(new Event("input", {bubbles: true}));
      });
      label.append(name + " ", choice, term);
    }
  }
});
