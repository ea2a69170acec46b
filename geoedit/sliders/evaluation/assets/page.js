// The parts of the page: strips, curves, matrix, safe ranges, sums, the table.
const labels = data.sliders.map((one) => one.label);
let chosen = 0;

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
  at("notes").append(...data.notes.map((line) => make("li", line)));
  for (const [name, meaning] of Object.entries(data.columns)) at("terms").append(make("dt", name.replaceAll("_", " ")), make("dd", meaning));
  for (const [key, value] of Object.entries(data.settings)) {
    const row = make("tr");
    row.append(make("td", key.replaceAll("_", " ")), make("td", typeof value === "string" ? value : JSON.stringify(value)));
    at("settings").append(row);
  }
}

function drawStrips() {
  const one = data.sliders[chosen], found = data.pictures.filter((picture) => picture.slider === one.label);
  at("strip-lead").textContent =
    `Each row is one prompt and one noise; only the slider “${one.label}” moves, from scale ${figures(one.scales[0])} to ${figures(one.scales.at(-1))}.` +
    (found.length > 1 ? " Below it what asking in words gives." : "");
  const boxes = found.flatMap((picture) =>
    picture.rows.slice(0, picture.method === "slider" ? 4 : 2).map((row) => {
      const box = make("div", undefined, "strip"), film = make("div", undefined, "film");
      box.append(make("h3", `${picture.method === "slider" ? "" : "in words: "}${row.prompt || "(no words)"} · seed ${row.seed}`), film);
      row.images.forEach((image, i) => {
        const frame = make("figure", undefined, picture.scales[i] === 0 ? "zero" : ""), node = make("img");
        node.src = `data:image/png;base64,${image}`;
        node.alt = `${row.prompt}, scale ${figures(picture.scales[i])}`;
        frame.append(node, make("figcaption", figures(picture.scales[i])));
        film.append(frame);
      });
      return box;
    }),
  );
  at("strips").replaceChildren(...boxes);
  const row = data.rows.find((each) => each.slider === one.label && each.method === "slider" && each.seed === "all");
  const beside = data.rows.find((each) => each.slider === one.label && each.method === "prompting" && each.seed === "all");
  at("readout").replaceChildren(
    ...["spearman", "range_sd", "both_ends_right", "interference", "interference_signed", "violations", "class_kept", "distance"]
      .filter((name) => known(row[name]))
      .map((name) => {
        const box = make("div"), words = known(beside?.[name]) ? `${name.replaceAll("_", " ")} (words: ${told(beside[name])})` : name.replaceAll("_", " ");
        box.append(make("dt", words), make("dd", told(row[name])));
        return box;
      }),
  );
}

const shades = () => [0, 1, 2, 3, 4, 5, 6, 7].map((i) => colour(`--c${i}`));

function drawCurves() {
  const one = data.sliders[chosen], shade = shades(), wanted = at("seed").value;
  const images = one.images.filter((image) => wanted === "all" || String(image.seed) === wanted);
  const direction = one.sign < 0 ? "lowers" : "raises";
  at("curves-lead").textContent =
    `Scale ${direction} ${one.attribute}. Thin lines are images, each followed from its own value at scale 0; the thick line is their mean. ` +
    "Heights are natural standard deviations: what is common among images nobody steered.";
  at("own-title").textContent = `Change of ${one.attribute}`;
  const points = (values, told) => one.scales.map((x, i) => ({ x, y: values[i], tip: `scale ${figures(x)}: ${figures(values[i])} sd\n${told}` }));
  const mean = (attribute) =>
    one.scales.map((_, i) => {
      const there = images.map((image) => image.change[attribute][i]).filter(known);
      return there.length ? there.reduce((a, b) => a + b, 0) / there.length : null;
    });
  const thin = images.slice(0, 60).map((image) => ({
    colour: shade[7], line: true, width: 0.8, points: points(image.change[one.attribute], `${image.prompt} · seed ${image.seed}`),
  }));
  const rules = [{ x: 0, text: "" }];
  const bands = known(one.predicted?.low) && known(one.predicted?.high) ? [{ from: one.predicted.low, to: one.predicted.high }] : [];
  const x = { label: bands.length ? "scale (shaded: predicted safe range)" : "scale", low: one.scales[0], high: one.scales.at(-1) };
  chart("figure-own", { x, y: { label: "natural sd" }, rules, bands, height: 340,
    series: [...thin, { colour: shade[0], line: true, dots: true, width: 3, points: points(mean(one.attribute), "mean") }] });
  const others = data.attributes.filter((name) => name !== one.attribute);
  chart("figure-others", { x: { ...x, label: "scale" }, y: { label: "natural sd" }, rules, height: 340,
    series: others.map((name, i) => ({ name, colour: shade[(i + 1) % 8], line: true, dots: true, size: 3, points: points(mean(name), name) })) });
}

function drawMatrix() {
  const kind = at("matrix-kind").value, cells = data.interference[kind];
  at("matrix-lead").textContent =
    kind === "absolute"
      ? "Mean size of each attribute’s change from the lowest scale to the highest, over the slider’s own range: direction and identity drift together."
      : "The mean change with its sign over the slider’s own range: what moves along in one direction.";
  const table = at("matrix-table"), head = make("tr"), body = make("tbody"), top = make("thead");
  head.append(make("th", "slider"), ...data.attributes.map((name) => make("th", name, "number")));
  top.append(head);
  for (const { name, label, own, values } of cells) {
    const row = make("tr");
    if (label === labels[chosen]) row.setAttribute("aria-selected", "true");
    row.append(make("td", name));
    data.attributes.forEach((attribute) => {
      const value = values[attribute], cell = make("td", figures(value, 2), attribute === own ? "cell own" : "cell");
      const share = Math.min(1, Math.abs(value ?? 0));
      if (attribute !== own && known(value)) cell.style.background = `color-mix(in oklab, var(--off) ${(55 * share).toFixed(0)}%, transparent)`;
      row.append(cell);
    });
    body.append(row);
  }
  table.replaceChildren(top, body);
}

function drawSafe() {
  const with_ranges = data.sliders.filter((one) => one.predicted || one.observed);
  at("safe").hidden = !with_ranges.length;
  if (!with_ranges.length) return;
  const shade = shades();
  const series = (which, name, tint, hollow) => ({ name, colour: tint, hollow, size: 6,
    points: with_ranges.flatMap((one, i) => ["low", "high"].filter((end) => known(one[which]?.[end])).map((end) => {
      const bounds = one[which].interval?.[end === "low" ? 0 : 1] ?? [];
      return { x: i + (hollow ? 0.1 : -0.1), y: one[which][end], low: bounds[0], high: bounds[1], tip: `${one.label}: ${name} ${figures(one[which][end])}` };
    })) });
  const found = [series("predicted", "predicted", shade[0], false), series("observed", "observed", shade[1], true)];
  if (found.every((one) => !one.points.length)) message("figure-safe", "No end of a safe range is known; the reasons stand below.");
  else chart("figure-safe", { x: { label: "", low: -0.5, high: with_ranges.length - 0.5, marks: with_ranges.map((_, i) => i), name: (i) => with_ranges[i]?.label ?? "", tilt: with_ranges.length > 6 }, y: { label: "scale" }, rules: [{ y: 0, text: "" }], series: found, height: 320 });
  at("safe-reasons").replaceChildren(...with_ranges.flatMap((one) => ["predicted", "observed"].filter((which) => one[which]?.reason).map((which) => make("li", `${one.label}, ${which}: ${one[which].reason}`))));
}

function table(node, columns, rows, press) {
  const top = make("thead"), head = make("tr"), body = make("tbody");
  let sorted = null, falling = false;
  const numeric = (name) => rows.some((row) => typeof row[name] === "number");
  const fill = () => {
    const order = [...rows];
    if (sorted) order.sort((a, b) => {
      const [x, y] = [a[sorted], b[sorted]];
      if (!known(x) || !known(y)) return Number(!known(x)) - Number(!known(y));
      return (x < y ? -1 : x > y ? 1 : 0) * (falling ? -1 : 1);
    });
    body.replaceChildren(...order.map((row) => {
      const line = make("tr");
      line.append(...columns.map((name, i) => {
        const cell = make("td", undefined, numeric(name) ? "number" : "");
        if (i === 0 && press) {
          const button = make("button", told(row[name]));
          button.type = "button";
          button.addEventListener("click", () => press(row));
          cell.append(button);
        } else cell.textContent = told(row[name]);
        return cell;
      }));
      return line;
    }));
  };
  for (const name of columns) {
    const cell = make("th", undefined, numeric(name) ? "number" : ""), button = make("button", name.replaceAll("_", " "));
    button.type = "button";
    button.addEventListener("click", () => {
      falling = sorted === name ? !falling : numeric(name);
      sorted = name;
      for (const other of head.children) other.removeAttribute("aria-sort");
      cell.setAttribute("aria-sort", falling ? "descending" : "ascending");
      fill();
    });
    cell.append(button);
    head.append(cell);
  }
  top.append(head);
  fill();
  node.replaceChildren(top, body);
}

const shown = () => data.rows.filter((row) => at("which").value === "each" || row.seed === "all");
function drawTable() {
  table(at("table"), Object.keys(data.columns).filter((name) => data.rows.some((row) => known(row[name]))), shown(), (row) => choose(labels.indexOf(row.slider)));
}

function csv() {
  const names = Object.keys(data.columns), quote = (value) => (known(value) ? `"${String(value).replaceAll('"', '""')}"` : "");
  return [names.join(","), ...shown().map((row) => names.map((name) => quote(row[name])).join(","))].join("\n") + "\n";
}

function choose(index) {
  chosen = (index + labels.length) % labels.length;
  at("slider").value = String(chosen);
  drawStrips();
  drawCurves();
  drawMatrix();
}

words();
labels.forEach((label, i) => option(at("slider"), String(i), label));
option(at("seed"), "all", "all seeds");
for (const seed of data.seeds) option(at("seed"), String(seed), `seed ${seed}`);
option(at("matrix-kind"), "absolute", "mean |change| / range");
option(at("matrix-kind"), "signed", "mean change / range");
option(at("which"), "all", "over all seeds");
option(at("which"), "each", "and each seed");
at("sums").hidden = !data.compositions.length;
if (data.compositions.length) table(at("sum-table"), Object.keys(data.compositions[0]), data.compositions);
choose(0);
drawSafe();
drawTable();
at("slider").addEventListener("change", () => choose(Number(at("slider").value)));
at("before").addEventListener("click", () => choose(chosen - 1));
at("after").addEventListener("click", () => choose(chosen + 1));
at("seed").addEventListener("change", drawCurves);
at("matrix-kind").addEventListener("change", drawMatrix);
at("which").addEventListener("change", drawTable);
at("save-csv").addEventListener("click", () => {
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
  link.download = "sliders.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});
let wide = window.innerWidth;
const again = () => {
  drawCurves();
  drawSafe();
};
window.addEventListener("resize", () => {
  if (Math.abs(window.innerWidth - wide) > 1) {
    wide = window.innerWidth;
    again();
  }
});
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
document.body.dataset.ready = "true";
