// The figures of the whole update: what changed most, ranks by depth, overlap and intruders.
const sized = measured("relative_norm") ? "relative_norm" : "norm";
const MAPPED = [
  sized, "norm", "relative_spectral", "rank", "effective_rank_above", "effective_rank", "stable_rank", "entropy", "alpha", "intruders_left",
  "intruders_right", "overlap_left", "overlap_right", "delta_magnitude", "delta_direction",
];
const RANKED = ["rank", "effective_rank_above", "effective_rank", "stable_rank", "participation_ratio", "energy_rank_90", "energy_rank_99"];

function drawMap() {
  const name = at("map-column").value, { form, title } = columnOf.get(name);
  heat("figure-map", (row) => row[name], form, title);
  const order = rows.map((_, i) => i).filter((i) => real(rows[i]) && known(rows[i][name])).sort((a, b) => rows[b][name] - rows[a][name]);
  const shown = order.slice(0, narrow() ? 8 : 12), most = Math.max(...shown.map((i) => rows[i][name]));
  at("ranking-title").textContent = `The largest by ${title}`;
  at("ranking").replaceChildren(
    ...shown.map((i) => {
      const item = make("li"), button = make("button"), bar = make("span", undefined, "bar"), fill = make("i");
      fill.style.width = `${most > 0 ? Math.max(0, (100 * rows[i][name]) / most) : 0}%`;
      bar.append(fill);
      button.type = "button";
      button.dataset.row = String(i);
      button.title = rows[i].parameter;
      button.append(make("span", label(rows[i]), "name"), make("span", tell(rows[i], name), "value"), bar);
      button.addEventListener("click", () => choose(i));
      item.append(button);
      return item;
    }),
  );
}

const shades = () => [0, 1, 2, 3, 4, 5, 6, 7].map((i) => colour(`--c${i}`));
const depthAxis = () => ({
  label: depthTitle(),
  low: -0.6,
  high: places.length - 0.4,
  marks: places.map((place) => place.order),
  name: (order) => placeName(places[order]),
});
// Seven kinds have a colour of their own, the kinds with the largest updates; the others share grey.
const weight = new Map(kinds.map((kind) => [kind, 0]));
for (const row of rows.filter(real)) weight.set(row.kind, weight.get(row.kind) + row.norm ** 2);
const moved = kinds.filter((kind) => weight.get(kind));
const leading = [...moved].sort((a, b) => weight.get(b) - weight.get(a)).slice(0, moved.length > 8 ? 7 : 8);
const coloured = moved.filter((kind) => leading.includes(kind));

function drawRanks() {
  const name = at("rank-column").value, { title } = columnOf.get(name);
  const shade = shades(), groups = [...coloured, ...(coloured.length < moved.length ? [null] : [])];
  const spread = Math.min(0.7, 0.1 * groups.length);
  const series = groups.map((kind, number) => ({
    name: kind ?? "other matrices",
    colour: kind === null ? shade[7] : shade[number],
    size: rows.length > 400 ? 2.6 : 4,
    points: rows
      .map((row, i) => [row, i])
      .filter(([row]) => real(row) && known(row[name]) && (kind === null ? !coloured.includes(row.kind) : row.kind === kind))
      .map(([row, i]) => ({
        x: placeIndex(row) + (groups.length > 1 ? spread * (number / (groups.length - 1) - 0.5) : 0),
        y: row[name],
        low: name === "rank" ? row.rank_low : undefined,
        high: name === "rank" ? row.rank_high : undefined,
        tip: `${label(row)}\n${title}: ${name === "rank" ? rankOf(row) : tell(row, name)} of at most ${Math.min(row.rows, row.columns)}`,
        row: i,
      })),
  }));
  const all = series.flatMap((one) => one.points.flatMap((p) => [p.y, p.high])).filter(known);
  const some = all.filter((value) => value > 0);
  const log = some.length && some.length === all.length && Math.max(...all) / Math.min(...some) > 40;
  const y = log ? { log } : { low: 0, high: Math.max(1, ...all) * 1.06, whole: name === "rank" };
  chart("figure-ranks", { x: depthAxis(), y: { ...y, label: title }, series, height: 330 });
}

function drawAligned() {
  const why = data.why_no_base;
  if (!measured("overlap_left") && !measured("intruders_left")) {
    at("aligned-figures").hidden = true;
    at("aligned-lead").textContent = why;
    return;
  }
  const shade = shades();
  const points = (side) =>
    rows
      .map((row, i) => [row, i])
      .filter(([row]) => row[`overlap_${side}`] > 0)
      .map(([row, i]) => ({
        x: placeIndex(row) + (side === "left" ? -0.14 : 0.14),
        y: row[`overlap_${side}`] / row[`chance_${side}`],
        tip: `${label(row)}\n${columnOf.get(`overlap_${side}`).title}: ${tell(row, `overlap_${side}`)}, by chance ${tell(row, `chance_${side}`)}`,
        row: i,
      }));
  const series = [
    { name: "output side", colour: shade[0], points: points("left") },
    { name: "input side", colour: shade[1], points: points("right"), hollow: true },
  ];
  const all = series.flatMap((one) => one.points.map((p) => p.y));
  const top = [2, 5, 10, 20, 50, 100, 1000].find((value) => value >= Math.max(...all)) ?? Math.max(...all);
  const y = { log: true, low: Math.min(0.5, ...all), high: top, name: (value) => (value === 1 ? "chance" : `${figures(value)} ×`), label: "overlap, times chance" };
  chart("figure-overlap", { x: depthAxis(), y, series, rules: [{ y: 1, text: "" }], height: 330 });
  if (!measured("intruders_left")) return message("figure-intruders", why);
  const both = (row) => (known(row.intruders_left) ? row.intruders_left + row.intruders_right : null);
  return heat("figure-intruders", both, "count", "intruders, both sides");
}
