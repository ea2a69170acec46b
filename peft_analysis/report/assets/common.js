// What every other part uses: the data, elements, numbers as text, the tip. Every name from outside reaches the
// page as text, never as markup.
const problems = [];
const complain = (text) => {
  problems.push(text);
  document.body.dataset.problems = problems.join(" | ");
};
window.addEventListener("error", (event) => complain(String(event.message)));
window.addEventListener("unhandledrejection", (event) => complain(String(event.reason)));

const data = JSON.parse(document.getElementById("data").textContent);
const { rows, columns } = data;
const columnOf = new Map(columns.map((column) => [column.name, column]));

const at = (id) => document.getElementById(id);
const make = (tag, text, name) => {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (name) node.className = name;
  return node;
};
const draw = (tag, attributes, text) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null) node.setAttribute(name, value);
  }
  if (text !== undefined) node.textContent = text;
  return node;
};
const option = (select, value, text) => {
  const node = make("option", text);
  node.value = value;
  select.append(node);
};
const known = (value) => value !== null && value !== undefined;
const minus = (text) => text.replace(/-/g, "−");
const superscript = (power) => minus(String(power)).replace(/./g, (c) => ({ "−": "⁻" })[c] ?? "⁰¹²³⁴⁵⁶⁷⁸⁹"[c]);
const figures = (value, digits = 3) => {
  if (!known(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) {
    let [head, power] = value.toExponential(Math.min(2, digits - 1)).split("e");
    head = String(Number(head));
    return minus(head === "1" ? "" : `${head}·`) + `10${superscript(Number(power))}`;
  }
  return minus(String(Number(value.toPrecision(digits))));
};
const percent = (share) => (known(share) ? `${figures(100 * share)}\u00a0%` : "–");
const degrees = (angle) => (known(angle) ? `${figures((180 * angle) / Math.PI)}°` : "–");
const told = (value, form) => {
  if (!known(value)) return "–";
  if (form === "text") return String(value);
  if (form === "count") return minus(value.toLocaleString("en"));
  if (form === "share") return percent(value);
  if (form === "degrees") return degrees(value);
  if (form === "chance") return value < 1e-4 ? `< ${figures(1e-4)}` : figures(value, 2);
  return figures(value);
};
const tell = (row, name) => told(row[name], columnOf.get(name).form);
const rankOf = (row) => {
  if (!known(row.rank)) return "–";
  const exact = row.rank_low === row.rank && row.rank_high === row.rank;
  return known(row.rank_low) && !exact ? `${row.rank} (${row.rank_low}–${row.rank_high})` : String(row.rank);
};
// Rounding alone is no change.
const real = (row) => row.verdict !== "none";
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const narrow = () => window.innerWidth < 760;
const measured = (name) => rows.some((row) => known(row[name]));
const short = (text, length) => (text.length > length ? `…${text.slice(text.length - length + 1)}` : text);
const stacks = [...new Set(rows.map((row) => row.stack))];
const deep = stacks.filter(Boolean);
const stackName = (stack) => (deep.length > 1 ? `${stack.split(".").slice(-1)[0]} ` : "");
// The matrix's name where there is little room: its block and kind.
const label = (row) => (known(row.block) ? `${stackName(row.stack)}${row.block} · ${row.kind}` : row.kind);

const message = (id, text) => at(id).replaceChildren(make("div", text, "message"));
const tip = at("tip");
const hideTip = () => {
  tip.hidden = true;
};
const showTip = (event, text) => {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect(), edge = 8;
  const left = Math.min(event.clientX + 14, window.innerWidth - box.width - edge);
  const above = event.clientY - box.height - 14;
  tip.style.left = `${Math.max(edge, left)}px`;
  tip.style.top = `${above > edge ? above : event.clientY + 18}px`;
};
window.addEventListener("scroll", hideTip, { passive: true });
