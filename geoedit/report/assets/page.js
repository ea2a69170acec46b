// The words of the page, the choice of site and edit, and when everything has been drawn.
document.body.classList.toggle("predicted-only", !applied);
const predictor = data.predictors[0];

function words() {
  at("title").textContent = `Can a straight edit move ${data.concept.name}?`;
  at("asked").textContent =
    `${data.model}: ${values.length} values (${data.concept.kind}) in ${data.concept.templates.length} templates, ` +
    `${sites.length} sites, ${data.settings.edits_per_site ?? "?"} edits a site` +
    (applied ? ", predicted first and then run." : ", predicted only.");
  at("headline").textContent = data.verdict.headline;
  for (const line of data.verdict.lines) at("lines").append(make("li", line));
  const tile = (value, text) => {
    const box = make("div");
    box.append(make("dt", text), make("dd", value));
    at("tiles").append(box);
  };
  for (const kind of data.kinds) {
    const name = kind === "reused vector" ? "reused vectors" : `${kind}s`;
    tile(percent(rate(best, kind)), `of ${name} ${applied ? "succeed" : "expected to succeed"} at ${best.label}`);
  }
  const limits = safeScales(best, data.kinds[0]);
  if (limits) tile(limits.text, `safe scales of a ${data.kinds[0]} there (medians over pairs)`);
  const auroc = data.overall[predictor.column][0], inside = data.within[predictor.column];
  if (applied) {
    const within = known(inside) && sites.length > 1 ? `, ${fixed(inside, 2)} within a site` : "";
    tile(fixed(auroc, 2), `AUROC of the prediction over all sites${within}`);
    tile(points(data.calibration.error), "mean gap between foreseen and seen rates");
    at("foresight-lead").textContent =
      `No edit was run for the prediction. Over all sites, ${percent(auroc)} of (success, failure) pairs are put in ` +
      `the right order by ${predictor.label}.`;
  }
  at("heat-lead").textContent =
    "Rows: from; columns: to. Pale is 0 %, full green 100 %. " +
    (applied ? "Foreseen on the left, what happened on the right. " : "") +
    "Pairs left blank were not drawn, or share an answer.";
  const paragraphs = [
    "For every site the states of all values in all templates are collected, and each value's mean. A mean " +
      "difference adds (mean of target − mean of source) to the state; a reused vector adds the difference of two " +
      "other values that lie the same way from each other.",
    "The edited state is then placed among the states that the values themselves leave in the same sentence, " +
      "without running the network on it: how near it lies to the target and to every other value, and what the " +
      "outputs and gradients there say of it. Trees learned on the edits of the built-in models turn these numbers " +
      "into odds.",
    "The manifold of the concept is learned from the states at each site, what each sentence adds to all of its " +
      "states taken out: a curve or a sheet through the means where the values have an order, else a cloud of all " +
      "states. How far an edited state is off it is told in units of its noise, the root mean square distance of the " +
      "states it was learned from.",
    "An edit along the manifold moves the state by what the geodesic from its foot to the foot of the target's mean " +
      "moves; what the state holds besides the concept stays.",
    applied
      ? "Then each edit was run through the network. It counts as a success when the most likely next token, out of " +
        "the whole vocabulary, is the first token of the target's answer."
      : "No edit was run.",
  ];
  for (const text of paragraphs) at("method").append(make("p", text));
  for (const entry of data.predictors) at("terms").append(make("dt", entry.label), make("dd", entry.description));
  for (const note of data.notes) at("notes").append(make("li", note));
  for (const text of data.concept.templates) at("templates").append(make("li", text));
  for (const entries of [data.settings, data.versions]) {
    for (const [key, value] of Object.entries(entries)) {
      const row = make("tr"), text = typeof value === "string" ? value : JSON.stringify(value);
      row.append(make("td", key.replaceAll("_", " ")), make("td", text));
      at("settings").append(row);
    }
  }
}

const choices = (id, names) =>
  names.forEach((name, i) => {
    const option = make("option", name);
    option.value = String(i);
    at(id).append(option);
  });
const chosen = () => [sites[Number(at("site").value)], data.kinds[Number(at("kind").value)]];
function choose() {
  const [site, kind] = chosen();
  explorer.show(site, kind);
  adviceTable(kind);
  pairTable(site, kind);
  return Promise.all([drawOdds(site, kind), drawHeat(site, kind)]);
}
function everything() {
  const drawn = [drawRates(), choose()];
  if (measured) drawn.push(drawGeometry());
  if (applied) drawn.push(drawCalibration(), drawRoc(), drawAuroc());
  return Promise.all(drawn);
}

const measured = sites.some((site) => Object.keys(site.geometry).length);
at("geometry").hidden = !measured;
words();
choices("site", sites.map((site) => site.label));
choices("kind", data.kinds);
at("site").value = String(sites.indexOf(best));
at("site").addEventListener("change", choose);
at("kind").addEventListener("change", choose);
at("filter").addEventListener("input", () => pairTable(...chosen()));
let small = narrow();
window.addEventListener("resize", () => {
  if (narrow() !== small) {
    small = narrow();
    everything();
  }
});
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", everything);
if (applied) aurocTable();
everything().then(() => {
  const wanted = [...document.querySelectorAll(".figure")].filter((node) => node.getClientRects().length);
  const marks = ".trace, .scatterlayer .points path, .heatmaplayer image, .message, .mean";
  const drawn = wanted.filter((node) => node.querySelector(marks));
  document.body.dataset.figuresWanted = String(wanted.length);
  document.body.dataset.figuresDrawn = String(drawn.length);
  document.body.dataset.ready = "true";
});
