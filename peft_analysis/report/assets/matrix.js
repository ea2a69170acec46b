// One matrix: its numbers, its spectrum beside the base's, its angles to the base's top directions.
let chosen = 0;

function readout(row) {
  const box = (value, text) => {
    const node = make("div");
    node.append(make("dt", text), make("dd", value));
    return node;
  };
  const entries = [box(`${row.rows} × ${row.columns}`, "outputs × inputs"), box(row.origin, "made by")];
  entries.push(known(row.relative_norm) ? box(percent(row.relative_norm), "of the base’s norm") : box(figures(row.norm), "norm"));
  entries.push(box(rankOf(row), known(row.rank_low) && row.rank_low !== row.rank_high ? "true rank (interval)" : "true rank"));
  entries.push(box(figures(row.effective_rank_above ?? row.effective_rank), known(row.effective_rank_above) ? "effective rank above noise" : "effective rank"));
  if (known(row.intruders_left)) {
    entries.push(box(`${row.intruders_left} + ${row.intruders_right}`, "intruders, outputs + inputs"));
  }
  if (known(row.overlap_left)) {
    entries.push(box(`${percent(row.overlap_left)} / ${percent(row.overlap_right)}`, "overlap, outputs / inputs"));
  }
  if (known(row.verdict)) {
    entries.push(box(row.verdict, known(row.p_value) ? `verdict, p ${told(row.p_value, "chance").replace(/^(?!<)/, "= ")}` : "verdict"));
  }
  at("readout").replaceChildren(...entries);
}

function drawSpectrum(row) {
  const { singular, base } = row.curves ?? {};
  if (!singular?.value.some((value) => value > 0)) return message("figure-spectrum", "The difference is zero.");
  const shade = shades();
  const points = (curve, what) =>
    curve.index.map((x, i) => ({ x, y: curve.value[i], tip: `${what}, σ${x === 1 ? "₁" : ` no. ${x}`}: ${figures(curve.value[i])}` }));
  const series = [{ name: "update ΔW", colour: shade[1], line: true, dots: singular.index.length < 40, size: 3, points: points(singular, "update") }];
  if (base) series.push({ name: "base W", colour: shade[0], line: true, points: points(base, "base") });
  const edge = row.noise_edge > 0 ? row.noise_edge : null;
  const all = series.flatMap((one) => one.points.map((p) => p.y)).filter((value) => value > 0);
  const high = Math.max(...all, edge ?? 0), least = Math.min(...all, edge ?? Infinity);
  const y = { log: true, low: Math.max(least * 0.8, high * 1e-9), high: high * 1.4, label: "singular value" };
  const last = Math.max(...series.flatMap((one) => one.points.map((p) => p.x)));
  const x = { log: last > 1, low: last > 1 ? 1 : 0.5, high: last > 1 ? last : 1.5, label: "number, from the largest" };
  const rules = edge ? [{ y: edge, text: "noise edge" }] : [];
  const bands = known(row.rank_low) && row.rank_high > row.rank_low ? [{ from: Math.max(1, row.rank_low), to: row.rank_high }] : [];
  if (row.rank > 0 && row.rank < last) rules.push({ x: row.rank, text: `rank ${row.rank}` });
  chart("figure-spectrum", { x, y, series, rules, bands, height: 300 });
}

function why(row) {
  if (!real(row)) return "Nothing changed here but for rounding.";
  if (!known(row.left_out) && !row.rank) return "No direction of the update stands above the noise of rounding.";
  return `Not computed: ${Object.values(row.left_out ?? {}).join("; ") || data.why_no_base}.`;
}

function drawAngles(row) {
  const { angles } = row.curves ?? {};
  if (!angles) return message("figure-angles", why(row));
  const shade = shades();
  const series = [["left", "output side", shade[0]], ["right", "input side", shade[1]]].map(([side, name, hue]) => ({
    name,
    colour: hue,
    line: true,
    dots: true,
    hollow: side === "right",
    points: angles[side].map((angle, i) => ({ x: i + 1, y: (180 * angle) / Math.PI, tip: `${name}, angle ${i + 1}: ${degrees(angle)}` })),
  }));
  const count = Math.max(...series.map((one) => one.points.length), 2);
  const step = Math.ceil(count / 10), marks = Array.from({ length: count }, (_, i) => i + 1).filter((i) => i === 1 || i % step === 0);
  const x = { low: 0.5, high: count + 0.5, marks, label: "number, from the smallest" };
  const y = { low: 0, high: 92, marks: [0, 30, 60, 90], name: (value) => `${value}°`, label: "angle" };
  return chart("figure-angles", { x, y, series, height: 300 });
}

function notes(row) {
  const lines = [...(row.notes ?? [])];
  for (const [side, name] of [["left", "output"], ["right", "input"]]) {
    const found = row.curves?.intruders?.[side] ?? [];
    if (!found.length) continue;
    const told = found.map((one) => `no. ${one.index + 1} (closest base direction: cosine ${figures(one.similarity)})`);
    lines.push(`Intruders among the tuned matrix’s ${name} directions: ${told.join("; ")}.`);
  }
  at("one-notes").replaceChildren(...lines.map((line) => make("p", line)));
}

function drawOne() {
  const row = rows[chosen];
  at("one-lead").textContent = row.parameter;
  readout(row);
  drawSpectrum(row);
  drawAngles(row);
  notes(row);
}

function choose(index) {
  chosen = index;
  at("matrix").value = String(index);
  at("before").disabled = index === 0;
  at("after").disabled = index === rows.length - 1;
  drawOne();
  for (const id of ["figure-map", "figure-intruders"]) mark(at(id));
  for (const node of document.querySelectorAll(".ranking button")) {
    node.setAttribute("aria-current", String(Number(node.dataset.row) === index));
  }
  for (const node of document.querySelectorAll("#table tbody tr")) {
    node.setAttribute("aria-selected", String(Number(node.dataset.row) === index));
  }
}
