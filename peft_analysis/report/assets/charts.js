// Charts of points and lines in plain SVG: axes, ticks, a legend, a tip on what is nearest to the pointer.
// A window that is not laid out yet has no width.
const widthOf = (node) => Math.max(280, node.clientWidth);
const lerp = (a, b, share) => a + share * (b - a);
const logTicks = (low, high) => {
  const found = [], first = Math.floor(low), last = Math.ceil(high), step = Math.max(1, Math.ceil((last - first) / 6));
  for (let power = first; power <= last; power += step) {
    found.push(10 ** power);
    if (last - first <= 2) found.push(2 * 10 ** power, 5 * 10 ** power);
  }
  return found.filter((value) => Math.log10(value) >= low - 1e-9 && Math.log10(value) <= high + 1e-9);
};
const ticks = (low, high, wanted = 5) => {
  const rough = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k += 1) found.push(k * step);
  return found;
};

// An axis: from a value to a share of its length, and its ticks.
function axis({ log, low, high, marks, whole }) {
  if (log) {
    let a = Math.log10(low), b = Math.log10(high);
    if (b - a < 0.3) [a, b] = [a - 0.2, b + 0.2];
    return { place: (value) => (Math.log10(value) - a) / (b - a), marks: logTicks(a, b), fits: (value) => value > 0 };
  }
  if (high - low < 1e-12) [low, high] = [low - 0.5, high + 0.5];
  const found = marks ?? ticks(low, high).filter((value) => !whole || Number.isInteger(value));
  return { place: (value) => (value - low) / (high - low), marks: found, fits: () => true };
}

const pathOf = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");

function legend(node, series) {
  const named = series.filter((one) => one.name);
  if (named.length < 2) return;
  const box = make("div", undefined, "legend");
  for (const one of named) {
    const entry = make("span"), mark = make("i", undefined, one.line && !one.dots ? "line" : one.hollow ? "hollow" : "");
    mark.style.color = one.colour;
    if (one.dash) mark.style.borderStyle = "dashed";
    entry.append(mark, make("span", one.name));
    box.append(entry);
  }
  node.append(box);
}

// spec: x and y {label, log, low, high, marks, name}, series [{name, colour, points: [{x, y, low, high, tip, row}],
// line, dots, hollow, dash}], rules [{y or x, text}], bands [{from, to}], height.
function chart(id, spec) {
  const node = at(id);
  node.replaceChildren();
  legend(node, spec.series);
  const width = widthOf(node), height = spec.height ?? 300;
  const range = (axisSpec, pick) => {
    const all = spec.series.flatMap((one) => one.points.flatMap(pick)).filter((v) => known(v) && (!axisSpec.log || v > 0));
    return axis({ ...axisSpec, low: axisSpec.low ?? Math.min(...all), high: axisSpec.high ?? Math.max(...all) });
  };
  const x = range(spec.x, (p) => [p.x]), y = range(spec.y, (p) => [p.y, p.low, p.high]);
  const name = spec.y.name ?? ((value) => figures(value));
  const left = 14 + 7 * Math.max(...y.marks.map((mark) => name(mark).length), 1), top = spec.y.label ? 26 : 12, right = 14;
  const bottom = 42 + (spec.x.tilt ? 34 : 0);
  const toX = (value) => lerp(left, width - right, x.place(value));
  const toY = (value) => lerp(height - bottom, top, y.place(value));
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, height });
  for (const mark of y.marks) {
    svg.append(draw("line", { class: "grid", x1: left, x2: width - right, y1: toY(mark), y2: toY(mark) }));
    svg.append(draw("text", { x: left - 7, y: toY(mark) + 4, "text-anchor": "end" }, name(mark)));
  }
  drawNames(svg, x.marks, toX, spec.x, height - bottom, width);
  svg.append(draw("text", { class: "axis-title", x: left, y: height - 4 }, spec.x.label));
  if (spec.y.label) svg.append(draw("text", { class: "axis-title", x: 0, y: 11 }, spec.y.label));
  for (const { from, to } of spec.bands ?? []) {
    const a = Math.max(left, toX(from)), b = Math.min(width - right, toX(to));
    svg.append(draw("rect", { class: "band", x: a, width: Math.max(1, b - a), y: top, height: height - bottom - top }));
  }
  const targets = [];
  for (const one of spec.series) drawSeries(svg, one, x, y, toX, toY, targets);
  for (const rule of spec.rules ?? []) {
    const flat = known(rule.y);
    const ends = flat
      ? { x1: left, x2: width - right, y1: toY(rule.y), y2: toY(rule.y) }
      : { x1: toX(rule.x), x2: toX(rule.x), y1: top, y2: height - bottom };
    svg.append(draw("line", { class: "rule", ...ends }));
    const where = flat
      ? { x: width - right, y: toY(rule.y) - 6, "text-anchor": "end" }
      : { x: ends.x1 + (ends.x1 > width / 2 ? -6 : 6), y: top + 10, "text-anchor": ends.x1 > width / 2 ? "end" : "start" };
    svg.append(draw("text", { class: "ink halo", ...where }, rule.text));
  }
  node.append(svg);
  follow(svg, targets, width);
}

function drawNames(svg, marks, toX, spec, y, width) {
  const name = spec.name ?? ((value) => figures(value));
  let free = -Infinity;
  for (const mark of marks) {
    const text = name(mark), size = 6.4 * text.length, place = toX(mark);
    if (place < free || place > width + 2) continue;
    free = place + (spec.tilt ? 16 : size + 10);
    const turned = spec.tilt ? `rotate(-40 ${place} ${y + 14})` : undefined;
    const anchor = spec.tilt ? "end" : "middle";
    svg.append(draw("text", { x: place, y: y + 17, "text-anchor": anchor, transform: turned }, text));
  }
}

function drawSeries(svg, one, x, y, toX, toY, targets) {
  const points = one.points.filter((p) => known(p.y) && x.fits(p.x) && y.fits(p.y));
  const places = points.map((p) => [toX(p.x), toY(p.y)]);
  const style = { fill: "none", stroke: one.colour, "stroke-width": one.width ?? 2.2, "stroke-dasharray": one.dash };
  if (one.line) svg.append(draw("path", { class: "curve", d: pathOf(places), "stroke-linejoin": "round", ...style }));
  points.forEach((p, i) => {
    const [px, py] = places[i];
    if (known(p.low) && known(p.high) && p.low !== p.high && y.fits(p.low)) {
      const ends = { x1: px, x2: px, y1: toY(p.low), y2: toY(p.high) };
      svg.append(draw("line", { class: "interval", stroke: one.colour, "stroke-width": 1.6, opacity: 0.6, ...ends }));
    }
    if (one.dots || !one.line) {
      const fill = one.hollow ? "var(--paper)" : one.colour;
      svg.append(draw("circle", { class: "point", cx: px, cy: py, r: one.size ?? 4, fill, stroke: one.colour, "stroke-width": 1.6 }));
    }
    if (p.tip) targets.push({ x: px, y: py, ...p });
  });
}

function follow(svg, targets, width) {
  const nearest = (event) => {
    const box = svg.getBoundingClientRect(), ratio = width / box.width;
    const [px, py] = [(event.clientX - box.left) * ratio, (event.clientY - box.top) * ratio];
    let best = null, least = 28 ** 2;
    for (const target of targets) {
      const distance = (target.x - px) ** 2 + (target.y - py) ** 2;
      if (distance < least) [best, least] = [target, distance];
    }
    return best;
  };
  svg.addEventListener("pointermove", (event) => {
    const found = nearest(event);
    svg.style.cursor = known(found?.row) ? "pointer" : "";
    if (found) showTip(event, found.tip);
    else hideTip();
  });
  svg.addEventListener("pointerleave", hideTip);
  svg.addEventListener("click", (event) => {
    const found = nearest(event);
    if (known(found?.row)) choose(found.row);
  });
}
