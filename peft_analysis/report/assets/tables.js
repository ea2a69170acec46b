// The table of every matrix: sorted, filtered, saved.
const LIMIT = 1000;
const SETS = {
  "the main ones": [
    sized, "rank", "effective_rank_above", "intruders_left", "intruders_right", "overlap_left", "overlap_right",
    "verdict", "p_value",
  ],
  size: ["rows", "columns", "origin", "norm", "relative_norm", "spectral", "relative_spectral", "nuclear"],
  rank: [
    "rank", "rank_low", "rank_high", "noise_edge", "effective_rank_above", "effective_rank", "stable_rank", "participation_ratio", "energy_rank_90",
    "energy_rank_99", "entropy", "alpha", "alpha_ks", "mp_spikes",
  ],
  "beside the base": columns.filter((column) => ["base", "direction"].includes(column.group)).map((column) => column.name),
  all: columns.map((column) => column.name).filter((name) => !["parameter", "module", "stack"].includes(name)),
};
let sort = { name: sized, up: false };

// A filter is words that must all be in the name, and comparisons of columns: "q_proj rank <= 8", "change > 1 %".
const COMPARISON = /([^<>=]*?)\s*(<=|>=|<|>|=)\s*(-?[\d.]+(?:e[-+]?\d+)?)\s*[%°]?/gu;
function filter(text) {
  const found = [];
  const rest = text.replace(COMPARISON, (all, before, sign, number) => {
    // A column's title may have several words: the longest end of what stands before the sign that is one.
    const words = before.trim().split(/\s+/);
    for (let first = 0; first < words.length; first += 1) {
      const wanted = words.slice(first).join(" ").toLowerCase();
      const column = columns.find((one) => [one.name, one.title.toLowerCase()].includes(wanted) && one.form !== "text");
      if (!column) continue;
      const scale = { share: 0.01, degrees: Math.PI / 180 }[column.form] ?? 1;
      found.push((row) => known(row[column.name]) && compare(row[column.name], sign, Number(number) * scale));
      return ` ${words.slice(0, first).join(" ")} `;
    }
    return all;
  });
  const words = rest.toLowerCase().split(/\s+/).filter(Boolean);
  const named = (row) => `${row.parameter} ${row.kind} ${row.origin} ${row.verdict ?? ""} ${label(row)}`.toLowerCase();
  return (row) => found.every((test) => test(row)) && words.every((word) => named(row).includes(word));
}
const compare = (a, sign, b) => ({ "<": a < b, ">": a > b, "<=": a <= b, ">=": a >= b, "=": a === b })[sign];

function listed() {
  const keep = filter(at("filter").value), { name, up } = sort;
  const order = rows.map((_, i) => i).filter((i) => keep(rows[i]));
  const key = (i) => (name === "parameter" ? i : rows[i][name]);
  return order.sort((a, b) => {
    const [x, y] = [key(a), key(b)];
    if (!known(x) || !known(y)) return Number(!known(x)) - Number(!known(y));
    return (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1);
  });
}

function drawTable() {
  const names = ["parameter", ...new Set(SETS[at("columns").value].filter((name) => name === "rank" || measured(name)))];
  const order = listed(), head = make("tr"), body = make("tbody");
  for (const name of names) {
    const column = columnOf.get(name), cell = make("th", undefined, column.form === "text" ? "" : "number");
    const button = make("button", name === "parameter" ? "matrix" : column.title);
    cell.title = column.meaning;
    button.dataset.column = name;
    if (sort.name === name) cell.setAttribute("aria-sort", sort.up ? "ascending" : "descending");
    button.addEventListener("click", () => {
      sort = { name, up: sort.name === name ? !sort.up : column.form === "text" };
      drawTable();
      at("table").querySelector(`[data-column="${name}"]`).focus();
    });
    cell.append(button);
    head.append(cell);
  }
  for (const i of order.slice(0, LIMIT)) {
    const row = make("tr");
    row.dataset.row = String(i);
    row.setAttribute("aria-selected", String(i === chosen));
    for (const name of names) row.append(cellOf(i, name));
    body.append(row);
  }
  const top = make("thead");
  top.append(head);
  at("table").replaceChildren(top, body);
  const cut = order.length > LIMIT ? `, the first ${LIMIT} shown` : "";
  at("table-note").textContent = `${order.length} of ${rows.length} matrices${cut}.`;
}

function cellOf(i, name) {
  const { form } = columnOf.get(name), row = rows[i];
  if (name !== "parameter") return make("td", name === "rank" ? rankOf(row) : tell(row, name), form === "text" ? "" : "number");
  const cell = make("td"), button = make("button", label(row));
  button.title = row.parameter;
  button.addEventListener("click", () => {
    choose(i);
    at("picker").scrollIntoView({ block: "start" });
  });
  cell.append(button);
  return cell;
}

function save(name, type, text) {
  const link = make("a"), address = URL.createObjectURL(new Blob([text], { type }));
  link.href = address;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}
const quoted = (value) => {
  const text = known(value) ? String(value) : "";
  return /[",\n\r]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text;
};
const csv = () => {
  const names = columns.map((column) => column.name);
  return [names, ...listed().map((i) => names.map((name) => rows[i][name]))].map((line) => line.map(quoted).join(",") + "\r\n").join("");
};
const json = () => JSON.stringify(listed().map((i) => rows[i]));

function drawVectors() {
  const { vectors } = data;
  at("vectors").hidden = !vectors.length;
  at("vectors").querySelector("summary").textContent = `${vectors.length} changed parameters that are no matrices`;
  const head = make("tr"), body = make("tbody");
  for (const name of ["parameter", "norm", "change"]) head.append(make("th", name, name === "parameter" ? "" : "number"));
  for (const one of vectors.slice(0, LIMIT)) {
    const row = make("tr");
    row.append(make("td", one.parameter), make("td", figures(one.norm), "number"), make("td", percent(one.relative_norm), "number"));
    body.append(row);
  }
  at("vector-table").append(head, body);
}
