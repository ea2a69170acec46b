// What every other part uses: the data, elements, numbers as text, colours. Every name from outside reaches the
// page through `make` (as text) or `safe` (escaped for plotly, which reads a little markup).
const problems = [];
const complain = (text) => {
  problems.push(text);
  document.body.dataset.problems = problems.join(" | ");
};
window.addEventListener("error", (event) => complain(String(event.message)));
window.addEventListener("unhandledrejection", (event) => complain(String(event.reason)));

const data = JSON.parse(document.getElementById("data").textContent);
const { applied, sites, sweeps } = data;
const values = data.concept.values;
const cycle = data.concept.kind === "cycle";
const ordered = cycle || data.concept.kind === "line";

const at = (id) => document.getElementById(id);
const make = (tag, text, name) => {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (name) node.className = name;
  return node;
};
const known = (value) => value !== null && value !== undefined;
const percent = (rate) => (known(rate) ? `${Math.round(100 * rate)}\u00a0%` : "–");
// A probability that is not certain is never told as certain.
const chance = (rate) => {
  if (!known(rate)) return "unknown";
  if (rate > 0 && rate < 0.005) return "under 1\u00a0%";
  if (rate < 1 && rate > 0.995) return "over 99\u00a0%";
  return percent(rate);
};
const fixed = (value, digits) => (known(value) ? value.toFixed(digits).replace("-", "−") : "–");
const figures = (value) => (known(value) ? String(Number(value.toPrecision(3))).replace("-", "−") : "–");
const safe = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const short = (text, length) => (text.length > length ? text.slice(0, length - 1) + "…" : text);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const narrow = () => window.innerWidth < 760;
const palette = () =>
  ["--foreseen", "--seen", "--good", "--second", "--third", "--fourth", "--fifth", "--sixth"].map(colour);

const kindRate = (site, kind, key) => (site.rates[kind] ? site.rates[kind][key] : null);
const rate = (site, kind) => kindRate(site, kind, applied ? "observed" : "predicted");
const best = sites.reduce((a, b) => ((rate(b, data.kinds[0]) ?? -1) >= (rate(a, data.kinds[0]) ?? -1) ? b : a));
const streams = new Set(
  sites.map((site) => site.place.replace(/^(.*?)block -?\d+ /, "")).filter((name) => name !== "embedding"),
);
// The site's name on an axis: its block's number where that says enough.
const tick = (site) => {
  const found = site.place.match(/block (-?\d+) /);
  if (site.place === "embedding") return "emb.";
  return found && streams.size === 1 ? found[1] : short(site.place, 18);
};
const siteAxis = () => (streams.size === 1 ? `block (${safe([...streams][0])})` : "site");
const tokens = [...new Set(sites.map((site) => site.token))];
const tokenTitle = (token) => {
  if (token === "value") return "at the value’s last token";
  return token === "last" ? "at the prompt’s last token" : `at token ${token}`;
};
const points = (share) => `${Math.round(100 * share)}\u00a0${Math.round(100 * share) === 1 ? "pt" : "pts"}`;
const hues = cycle
  ? [[59, 111, 182], [42, 157, 116], [217, 165, 33], [196, 69, 47], [59, 111, 182]]
  : [[59, 111, 182], [42, 157, 116], [217, 140, 33]];
// The colour of a value: its place in the order, round and round for a cycle.
const hue = (number) => {
  if (!ordered) return colour("--foreseen");
  const along = (number / (cycle ? values.length : Math.max(1, values.length - 1))) * (hues.length - 1);
  const low = Math.min(Math.floor(along), hues.length - 2);
  const mixed = hues[low].map((x, i) => Math.round(x + (along - low) * (hues[low + 1][i] - x)));
  return `rgb(${mixed.join(",")})`;
};
