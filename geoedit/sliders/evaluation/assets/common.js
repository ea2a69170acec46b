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
const figures = (value, digits = 3) => {
  if (!known(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-4) return minus(value.toExponential(digits - 1));
  return minus(String(Number(value.toPrecision(digits))));
};
const percent = (share) => (known(share) ? `${figures(100 * share)}\u00a0%` : "–");
const told = (value) => {
  if (value === true) return "yes";
  if (value === false) return "no";
  return typeof value === "number" ? figures(value) : known(value) ? String(value) : "–";
};
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
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
