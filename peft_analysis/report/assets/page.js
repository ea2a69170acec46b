// The words of the page, what answers to a hand, and when everything has been drawn.
function words() {
  at("title").textContent = data.title;
  at("asked").textContent = data.asked;
  at("headline").textContent = data.headline;
  at("lines").append(...data.lines.map((line) => make("li", line)));
  for (const { value, text } of data.tiles) {
    const box = make("div");
    box.append(make("dt", text), make("dd", value));
    at("tiles").append(box);
  }
  at("where-lead").textContent =
    (sized === "relative_norm"
      ? "The norm of each matrix’s difference over the norm of the base’s matrix."
      : "The norm of each matrix’s difference; the base’s weights were not given, so that it is not relative.") +
    " Press a cell or a name to see that matrix below.";
  at("ranks-lead").textContent =
    "The true rank counts the singular values above the noise of rounding, with its interval; it is exact for an adapter’s " +
    "factors. The effective rank tells how many directions carry the update, whatever the noise.";
  at("aligned-lead").textContent =
    "Left: how much of the update’s strongest directions lies among the base’s strongest, over what a random space would " +
    "have. Right: how many of the tuned matrix’s strongest directions resemble none of the base’s.";
  const list = (id, part, lines) => {
    at(part).hidden = !lines.length;
    at(id).append(...lines.map((line) => make("li", line)));
  };
  list("left-out-list", "left-out", data.left_out);
  list("notes", "notes-part", data.notes);
  for (const column of columns.filter((one) => one.group !== "place")) {
    const head = make("dt", column.title);
    head.append(make("code", column.name));
    at("terms").append(head, make("dd", column.meaning));
  }
  for (const entries of [data.settings, data.versions]) {
    for (const [key, value] of Object.entries(entries)) {
      const row = make("tr");
      row.append(make("td", key.replaceAll("_", " ")), make("td", typeof value === "string" ? value : JSON.stringify(value)));
      at("settings").append(row);
    }
  }
}

function everything() {
  drawMap();
  drawRanks();
  drawAligned();
  choose(chosen);
}

words();
if (rows.length) {
  for (const name of new Set(MAPPED.filter(measured))) option(at("map-column"), name, columnOf.get(name).title);
  for (const name of RANKED.filter(measured)) option(at("rank-column"), name, columnOf.get(name).title);
  for (const name of Object.keys(SETS)) option(at("columns"), name, name);
  rows.forEach((row, i) => option(at("matrix"), String(i), row.parameter));
  const size = (row) => (real(row) ? (row[sized] ?? 0) : -1);
  chosen = rows.reduce((best, row, i) => (size(row) > size(rows[best]) ? i : best), 0);
  drawTable();
  drawVectors();
  everything();
} else {
  for (const id of ["where", "ranks", "aligned", "picker", "one", "all"]) at(id).hidden = true;
}
at("map-column").addEventListener("change", () => {
  drawMap();
  choose(chosen);
});
at("rank-column").addEventListener("change", drawRanks);
at("columns").addEventListener("change", drawTable);
at("filter").addEventListener("input", drawTable);
at("matrix").addEventListener("change", () => choose(Number(at("matrix").value)));
at("before").addEventListener("click", () => choose(chosen - 1));
at("after").addEventListener("click", () => choose(chosen + 1));
at("save-csv").addEventListener("click", () => save(`${data.stem}.csv`, "text/csv", csv()));
at("save-json").addEventListener("click", () => save(`${data.stem}.json`, "application/json", json()));
let wide = window.innerWidth;
window.addEventListener("resize", () => {
  if (rows.length && Math.abs(window.innerWidth - wide) > 1) {
    wide = window.innerWidth;
    everything();
  }
});
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => rows.length && everything());
const figuresThere = [...document.querySelectorAll(".figure")].filter((node) => node.getClientRects().length);
document.body.dataset.figuresWanted = String(figuresThere.length);
document.body.dataset.figuresDrawn = String(figuresThere.filter((node) => node.querySelector("svg *, .message")).length);
document.body.dataset.ready = "true";
