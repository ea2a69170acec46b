// Tables: AUROC of each predictor, and every pair of values at the chosen site.
const tableOf = (table, head, body) => {
  const top = make("thead");
  top.append(head);
  table.replaceChildren(top, body);
};

function aurocTable() {
  const head = make("tr"), body = make("tbody");
  head.append(make("th", "site"));
  for (const predictor of data.predictors) head.append(make("th", predictor.label, "number"));
  const line = (label, cells) => {
    const row = make("tr");
    row.append(make("td", label), ...cells.map((text) => make("td", text, "number")));
    body.append(row);
  };
  const told = (e) => (known(e?.[0]) ? `${fixed(e[0], 2)} (${fixed(e[1], 2)} to ${fixed(e[2], 2)})` : "–");
  if (sites.length > 1) {
    line("all sites", data.predictors.map((p) => told(data.overall[p.column])));
    line("within a site, mean", data.predictors.map((p) => fixed(data.within[p.column], 2)));
  }
  for (const site of sites) line(site.label, data.predictors.map((p) => told(site.auroc[p.column])));
  tableOf(at("auroc-table"), head, body);
}

const columns = [
  ["from", 0], ["to", 1], ["sentences", 2, "number"], ["foreseen", 3, "bar"],
  [`${data.predictors[0].label} margin`, 4, "number"], ["nearest rival", 5],
  ...(applied ? [["seen", 6, "bar"], ["log-odds gained (nats)", 7, "number"]] : []),
];
let sort = { column: applied ? 6 : 3, up: true };

function pairTable(site, kind) {
  const wanted = at("filter").value.trim().toLowerCase(), all = pairsAt(site, kind), limit = 1500;
  const rows = all.filter((pair) => !wanted || [pair[0], pair[1]].some((name) => name.toLowerCase().includes(wanted)));
  const place = new Map(values.map((value, i) => [value, i]));
  const key = (pair) => (sort.column < 2 ? place.get(pair[sort.column]) : pair[sort.column]);
  rows.sort((a, b) => {
    const x = key(a), y = key(b);
    if (x === y) return 0;
    if (x === null) return 1;
    if (y === null) return -1;
    return (x < y ? -1 : 1) * (sort.up ? 1 : -1);
  });
  const head = make("tr"), body = make("tbody");
  for (const [name, column, style] of columns) {
    const cell = make("th", undefined, style === "number" ? "number" : ""), button = make("button", name);
    if (column === sort.column) cell.setAttribute("aria-sort", sort.up ? "ascending" : "descending");
    button.dataset.column = String(column);
    button.addEventListener("click", () => {
      sort = { column, up: column === sort.column ? !sort.up : true };
      pairTable(site, kind);
      at("pairs").querySelector(`[data-column="${column}"]`).focus();
    });
    cell.append(button);
    head.append(cell);
  }
  for (const pair of rows.slice(0, limit)) {
    const row = make("tr");
    for (const [, column, style] of columns) row.append(pairCell(pair[column], column, style));
    body.append(row);
  }
  tableOf(at("pairs"), head, body);
  at("pairs-note").textContent = all.length
    ? `${rows.length} of ${all.length} pairs` + (rows.length > limit ? `, the first ${limit} shown.` : ".")
    : "There is no such edit of this concept: its values have no steps that repeat.";
}

function pairCell(value, column, style) {
  if (style !== "bar") {
    const text = typeof value === "string" ? value : column === 2 ? String(value) : fixed(value, 2);
    return make("td", text, style === "number" ? "number" : "");
  }
  const cell = make("td"), bar = make("span", undefined, column === 6 ? "bar seen" : "bar"), fill = make("i");
  fill.style.width = `${100 * (value ?? 0)}%`;
  bar.append(fill);
  cell.append(bar, document.createTextNode(percent(value)));
  return cell;
}
