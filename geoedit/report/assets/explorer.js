// The explorable figure: an edit at one scale after another. Its state moves along a straight path away from the
// learned manifold; what is predicted there was computed beforehand, what the model answered stands only at the
// scales that were run.
const explorer = (() => {
  const camera = new Camera();
  const picture = at("space");
  const still = shape("g", {}), moving = shape("g", {});
  const trail = shape("line", { class: "trail" }), drop = shape("line", { class: "drop" });
  const foot = shape("circle", { class: "foot", r: 4 });
  const along = shape("path", { class: "along", d: "M0 -7 L7 0 L0 7 L-7 0 Z" });
  const handle = shape("g", {
    id: "handle", class: "handle", tabindex: 0, role: "slider", "aria-label": "Scale of the edit, in the picture",
  });
  handle.append(shape("circle", { r: 24, class: "grip" }), shape("circle", { r: 9, class: "knob" }));
  moving.append(trail, drop, foot, along, handle);
  picture.append(still, moving);

  let site = sites[0], followed = [], sweep = null, index = 0;

  const nearest = (list, wanted) =>
    list.reduce((found, x, i) => (Math.abs(x - wanted) < Math.abs(list[found] - wanted) - 1e-9 ? i : found), 0);
  const number = (scale) => String(Number(scale.toFixed(4))).replace("-", "−");
  const position = (i) => {
    const span = sweep.scales.at(-1) - sweep.scales[0];
    return between(sweep.path[0], sweep.path[1], span ? (sweep.scales[i] - sweep.scales[0]) / span : 0);
  };
  const geodesicAt = (scale) => {
    const path = sweep.geodesic;
    const step = Math.min(1, Math.max(0, scale)) * (path.position.length - 1), low = Math.floor(step);
    return between(path.position[low], path.position[Math.min(low + 1, path.position.length - 1)], step - low);
  };

  // ---- the picture -------------------------------------------------------------------------------------------
  function drawPicture() {
    const width = picture.clientWidth, height = picture.clientHeight;
    if (!width) return;
    picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const means = site.coordinates.map(padded), geometry = site.geometry, { lines, dots } = strands(geometry);
    const ends = sweep ? [...sweep.path, sweep.target, ...(sweep.geodesic?.position ?? [])] : [];
    camera.fit([...means, ...lines.flat(), ...dots, ...ends], width, height, [58, 44]);
    still.replaceChildren();
    const labels = new Labels(width, height);
    drawAxes(labels, height);
    for (const line of lines) drawLine(line, "learned");
    if (!lines.length && ordered) drawLine(cycle ? [...means, means[0]] : means, "joined");
    for (const dot of dots) {
      const [x, y, depth] = camera.place(dot);
      still.append(shape("circle", { cx: x, cy: y, r: 2, class: "dot", opacity: 1 - 0.6 * depth }));
    }
    if (sweep) drawPaths(labels);
    drawMeans(means, labels);
    if (sweep) move();
    moving.style.display = sweep ? "" : "none";
  }

  function drawLine(line, name) {
    const seen = line.map((point) => camera.place(point));
    for (let i = 1; i < seen.length; i++) {
      const [a, b] = [seen[i - 1], seen[i]], depth = (a[2] + b[2]) / 2;
      const ends = { x1: a[0], y1: a[1], x2: b[0], y2: b[1] };
      still.append(shape("line", { ...ends, class: name, opacity: (1 - 0.6 * depth).toFixed(3) }));
    }
  }

  function drawPaths(labels) {
    const [a, b] = sweep.path.map((point) => camera.place(point));
    still.append(shape("line", { x1: a[0], y1: a[1], x2: b[0], y2: b[1], class: "straight" }));
    if (sweep.geodesic) {
      const d = sweep.geodesic.position.map((p) => camera.place(p).slice(0, 2).map((x) => x.toFixed(1)).join(" "));
      still.append(shape("path", { d: `M${d.join("L")}`, class: "geodesic" }));
    }
    for (const entry of sweep.recorded) {
      const [x, y] = camera.place(position(nearest(sweep.scales, entry.scale)));
      still.append(mark(x, y, entry.success));
      labels.avoid(x, y, 4);
    }
    const [x, y] = camera.place(sweep.target);
    still.append(shape("circle", { cx: x, cy: y, r: 9, class: "goal" }));
  }

  function drawMeans(means, labels) {
    const placed = means.map((point, i) => [...camera.place(point), i]).sort((a, b) => b[2] - a[2]);
    for (const [x, y, depth, i] of placed) {
      const radius = (values.length > 40 ? 3 : 5.5) * (1.15 - 0.35 * depth);
      still.append(shape("circle", { cx: x, cy: y, r: radius, fill: hue(i), class: "mean", "data-value": i }));
      labels.avoid(x, y, radius);
    }
    const first = sweep ? [sweep.source, sweep.target_value] : [];
    const order = [...placed].reverse().sort((a, b) => first.includes(values[b[3]]) - first.includes(values[a[3]]));
    for (const [x, y, , i] of order) {
      const named = first.includes(values[i]);
      labels.put(still, short(values[i], 22), [x, y], { bold: named, must: named });
    }
  }

  // Directions of the three axes with their shares of the spread, and a rule that says how long a unit is.
  function drawAxes(labels, height) {
    const corner = [44, height - 46], group = shape("g", { class: "axes" });
    [[1, 0, 0], [0, 1, 0], [0, 0, 1]].forEach((direction, i) => {
      const [x, y] = camera.look(direction), share = site.explained[i];
      const tip = [corner[0] + 26 * x, corner[1] + 26 * y];
      group.append(shape("line", { x1: corner[0], y1: corner[1], x2: tip[0], y2: tip[1] }));
      if (Math.hypot(x, y) > 0.25 && known(share)) {
        const text = { x: corner[0] + 35 * x, y: corner[1] + 35 * y + 4, "text-anchor": "middle", "font-size": 11 };
        group.append(shape("text", text, String(i + 1)));
      }
    });
    labels.taken.push([0, height - 92, 88, height]);
    const wanted = 80 / camera.unit, power = 10 ** Math.floor(Math.log10(wanted));
    const length = [5, 2, 1].find((x) => x * power <= wanted) * power, pixels = length * camera.unit;
    const left = 100, y = height - 14;
    const d = `M${left} ${y - 4}v8M${left} ${y}h${pixels}M${left + pixels} ${y - 4}v8`;
    group.append(shape("path", { d, class: "rule" }));
    const words = `${figures(length)} units of the state`;
    group.append(shape("text", { x: left + pixels + 8, y: y + 4, "font-size": 11 }, words));
    labels.taken.push([left - 4, y - 10, left + pixels + 8 + words.length * 6, height]);
    still.append(group);
  }

  const mark = (x, y, success) =>
    success
      ? shape("circle", { cx: x, cy: y, r: 4.5, class: "hit" })
      : shape("path", { d: `M${x - 4} ${y - 4}l8 8M${x - 4} ${y + 4}l8 -8`, class: "miss" });

  function move() {
    const here = camera.place(position(index)), start = camera.place(position(nearest(sweep.scales, 0)));
    set(handle, { transform: `translate(${here[0].toFixed(2)} ${here[1].toFixed(2)})` });
    set(trail, { x1: start[0], y1: start[1], x2: here[0], y2: here[1] });
    const below = sweep.foot?.[index];
    drop.style.display = foot.style.display = below ? "" : "none";
    if (below) {
      const [x, y] = camera.place(below);
      set(drop, { x1: x, y1: y, x2: here[0], y2: here[1] });
      set(foot, { cx: x, cy: y });
    }
    along.style.display = sweep.geodesic ? "" : "none";
    if (sweep.geodesic) {
      const [x, y] = camera.place(geodesicAt(sweep.scales[index]));
      set(along, { transform: `translate(${x.toFixed(2)} ${y.toFixed(2)})` });
    }
  }

  // ---- the charts --------------------------------------------------------------------------------------------
  const margin = { left: 48, right: 16, top: 10, bottom: 26 };
  function drawChart(id, top, tickText, ticks, series, marks) {
    const chart = at(id), width = chart.clientWidth, height = chart.clientHeight, scales = sweep.scales;
    if (!width) return;
    const span = scales.at(-1) - scales[0] || 1;
    const x = (s) => margin.left + ((s - scales[0]) / span) * (width - margin.left - margin.right);
    const y = (v) => height - margin.bottom - (Math.min(v, top) / top) * (height - margin.top - margin.bottom);
    chart.setAttribute("viewBox", `0 0 ${width} ${height}`);
    chart.replaceChildren();
    for (const value of ticks) {
      const ends = { x1: margin.left, x2: width - margin.right, y1: y(value), y2: y(value) };
      chart.append(shape("line", { ...ends, class: "grid" }));
      const place = { x: margin.left - 8, y: y(value) + 4, "text-anchor": "end", class: "tick" };
      chart.append(shape("text", place, tickText(value)));
    }
    const step = [0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 50, 100].find((s) => (s / span) * width > 54) ?? span;
    for (let s = Math.ceil(scales[0] / step) * step; s <= scales.at(-1) + 1e-9; s += step)
      chart.append(shape("text", { x: x(s), y: height - 8, "text-anchor": "middle", class: "tick" }, number(s)));
    chart.append(shape("text", { x: 0, y: height - 8, class: "tick" }, "scale"));
    if (sweep.safe) {
      const [low, high] = sweep.safe.map(x), tall = height - margin.top - margin.bottom;
      chart.prepend(shape("rect", { x: low, width: high - low, y: margin.top, height: tall, class: "safe" }));
    }
    for (const { xs, ys, name } of series) {
      const runs = [];
      ys.forEach((value, i) => {
        if (!known(value)) return;
        if (i === 0 || !known(ys[i - 1])) runs.push([]);
        runs.at(-1).push(`${x(xs[i]).toFixed(1)} ${y(value).toFixed(1)}`);
      });
      for (const run of runs) chart.append(shape("path", { d: `M${run.join("L")}`, class: `curve ${name}` }));
    }
    for (const [s, value, success] of marks) chart.append(mark(x(s), y(value), success));
    const cursor = shape("line", { y1: margin.top, y2: height - margin.bottom, class: "cursor" });
    const point = shape("circle", { r: 5, class: `point ${series[0].name}` });
    chart.append(cursor, point);
    chart.follow = () => {
      const value = series[0].ys[index], here = x(scales[index]);
      set(cursor, { x1: here, x2: here });
      set(point, { cx: here, cy: y(value ?? 0) });
      point.style.display = known(value) ? "" : "none";
    };
    chart.read = (pixel) => scales[0] + ((pixel - margin.left) / (width - margin.left - margin.right)) * span;
    chart.follow();
  }

  function drawCharts() {
    if (!sweep) return;
    const odds = [{ xs: sweep.scales, ys: sweep.probability, name: "odds" }];
    const marks = sweep.recorded.map((entry) => [entry.scale, entry.success ? 1 : 0, entry.success]);
    drawChart("chart-odds", 1, (v) => `${Math.round(100 * v)} %`, [0, 0.5, 1], odds, marks);
    const path = sweep.geodesic, away = [...sweep.off, ...(path?.off ?? [])].filter(known);
    at("off-figure").hidden = !away.length;
    if (!away.length) return;
    const most = Math.max(1, ...away), power = 10 ** Math.floor(Math.log10(most));
    const step = [0.2, 0.5, 1, 2, 5].map((x) => x * power).find((x) => most / x <= 4) ?? most;
    const top = step * Math.ceil(most / step);
    const ticks = Array.from({ length: Math.round(top / step) + 1 }, (_, i) => i * step);
    const series = [{ xs: sweep.scales, ys: sweep.off, name: "straight" }];
    if (path) series.push({ xs: path.fractions, ys: path.off, name: "geodesic" });
    drawChart("chart-off", top, (v) => `${figures(v)} ×`, ticks, series, []);
  }

  // ---- the words ---------------------------------------------------------------------------------------------
  const said = (entry) => `“${entry.answer}”` + (entry.success ? ", as wanted" : "");
  function tell() {
    const scale = sweep.scales[index], odds = sweep.probability[index], off = sweep.off[index];
    const far = known(off) ? `${figures(off)} × noise` : "unknown";
    at("at-scale").textContent = number(scale);
    at("at-odds").textContent = chance(odds);
    at("at-off").textContent = far;
    const run = sweep.recorded, spoken = `scale ${number(scale)}: ${chance(odds)} predicted, ${far} off the manifold`;
    for (const node of [handle, at("scale")]) node.setAttribute("aria-valuetext", spoken);
    set(handle, { "aria-valuemin": sweep.scales[0], "aria-valuemax": sweep.scales.at(-1), "aria-valuenow": scale });
    at("scale").value = String(scale);
    const near = run.length ? nearest(run.map((entry) => entry.scale), scale) : -1;
    if (near < 0) {
      at("at-answer").textContent = "not run";
      at("at-note").textContent = "No edit was run: these are predictions.";
    } else if (Math.abs(run[near].scale - scale) < 1e-9) {
      at("at-answer").textContent = said(run[near]);
      at("at-note").textContent = run[near].success ? "" : `Wanted: “${sweep.wanted}”.`;
    } else {
      at("at-answer").textContent = "not run here";
      at("at-note").textContent = `Nearest that was run, scale ${number(run[near].scale)}: ${said(run[near])}.`;
    }
    at("explorer").dataset.scale = String(scale);
    for (const chip of at("recorded").querySelectorAll("button")) {
      const current = chip.dataset.run ? Number(chip.dataset.run) === near : Number(chip.dataset.share) === scale;
      chip.setAttribute("aria-current", String(current));
    }
  }

  function drawRecorded() {
    const row = (title, entries, text, straight) => {
      const line = make("div", undefined, "chips");
      line.append(make("span", title));
      entries.forEach((entry, i) => {
        const chip = make("button", undefined, entry.success ? "chip hit" : "chip miss");
        chip.type = "button";
        const sign = entry.success ? "✓" : "✗";
        chip.append(make("b", text(entry.scale)), document.createTextNode(` ${sign} ${entry.answer}`));
        if (straight) chip.dataset.run = String(i);
        else chip.dataset.share = String(entry.scale);
        chip.addEventListener("click", () => go(nearest(sweep.scales, entry.scale)));
        line.append(chip);
      });
      return line;
    };
    const lines = [];
    if (sweep.recorded.length) lines.push(row("Straight, at scale", sweep.recorded, number, true));
    if (sweep.geodesic?.recorded.length)
      lines.push(row("Along the manifold, share of the way", sweep.geodesic.recorded, percent, false));
    at("recorded").replaceChildren(...lines);
    at("sentence").textContent = `“${sweep.text}” is to be read as if it said ${sweep.target_value}` +
      (sweep.wanted ? `: the answer wanted is “${sweep.wanted}”.` : ".");
    at("why-not").textContent = sweep.geodesic ? "" : `No path along the manifold: ${sweep.reason ?? "none is known"}.`;
    at("safe-note").textContent = sweep.safe
      ? `Expected to succeed (50 % or more) at scales from ${rounded(sweep.safe[0])} to ${rounded(sweep.safe[1])}` +
        `${sweep.safe[1] < sweep.scales.at(-1) ? "" : ", the last looked at"}: the band in the charts.`
      : "Not expected to succeed at any scale here.";
  }

  // ---- moving ------------------------------------------------------------------------------------------------
  function go(wanted) {
    index = Math.min(sweep.scales.length - 1, Math.max(0, wanted));
    tell();
    move();
    for (const id of ["chart-odds", "chart-off"]) at(id).follow?.();
  }

  const keys = {
    ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 4, PageDown: -4, Home: -1e6, End: 1e6,
  };
  const onKey = (event) => {
    if (!sweep || !(event.key in keys) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation();
    go(index + keys[event.key]);
  };
  for (const node of [handle, at("scale")]) node.addEventListener("keydown", onKey);
  at("scale").addEventListener("input", () => go(nearest(sweep.scales, Number(at("scale").value))));

  // Where the pointer is in the node's own pixels.
  const pointer = (event, node) => {
    const box = node.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  function onDrag(node, begin) {
    node.addEventListener("pointerdown", (event) => {
      if (event.button || !event.isPrimary) return;
      const follow = begin(event);
      if (!follow) return;
      event.stopPropagation();
      node.setPointerCapture(event.pointerId);
      const stop = () => {
        node.removeEventListener("pointermove", follow);
        node.classList.remove("held");
      };
      node.classList.add("held");
      node.addEventListener("pointermove", follow);
      node.addEventListener("pointerup", stop, { once: true });
      node.addEventListener("pointercancel", stop, { once: true });
    });
  }
  // A finger on the handle drags it; the page must not take the same finger for scrolling.
  handle.addEventListener("touchstart", (event) => event.preventDefault(), { passive: false });
  onDrag(handle, (event) => {
    if (!sweep) return null;
    const [a, b] = sweep.path.map((point) => camera.place(point)), low = sweep.scales[0];
    const span = sweep.scales.at(-1) - low, started = sweep.scales[index], from = pointer(event, picture);
    let [dx, dy] = [b[0] - a[0], b[1] - a[1]];
    // Seen from its end the path has no length on the screen: then sideways is along.
    if (Math.hypot(dx, dy) < 24) [dx, dy] = [200, 0];
    const size = dx * dx + dy * dy;
    return (moved) => {
      const [x, y] = pointer(moved, picture);
      go(nearest(sweep.scales, started + (((x - from[0]) * dx + (y - from[1]) * dy) / size) * span));
    };
  });
  onDrag(picture, (event) => {
    let [x, y] = pointer(event, picture);
    return (moved) => {
      const [left, top] = pointer(moved, picture);
      camera.turn((left - x) * 0.009, event.pointerType === "touch" ? 0 : (top - y) * 0.009);
      [x, y] = [left, top];
      drawPicture();
    };
  });
  picture.addEventListener("keydown", (event) => {
    const turns = { ArrowLeft: [-0.12, 0], ArrowRight: [0.12, 0], ArrowUp: [0, -0.1], ArrowDown: [0, 0.1] };
    if (event.target !== picture || !(event.key in turns)) return;
    event.preventDefault();
    camera.turn(...turns[event.key]);
    drawPicture();
  });
  for (const id of ["chart-odds", "chart-off"]) {
    onDrag(at(id), (event) => {
      const seek = (moved) => go(nearest(sweep.scales, at(id).read(pointer(moved, at(id))[0])));
      seek(event);
      return seek;
    });
  }

  // ---- choosing ----------------------------------------------------------------------------------------------
  function choose(wanted) {
    sweep = followed[wanted] ?? null;
    at("board").hidden = !sweep;
    at("no-sweep").hidden = Boolean(sweep);
    if (sweep) {
      index = nearest(sweep.scales, 1);
      const span = sweep.scales.at(-1) - sweep.scales[0];
      set(at("scale"), { min: sweep.scales[0], max: sweep.scales.at(-1), step: span / 1000 });
      drawRecorded();
      drawCharts();
      tell();
    }
    drawPicture();
  }

  function show(chosen, kind) {
    const before = sweep;
    site = chosen;
    followed = sweeps.filter((entry) => entry.site === site.label && entry.edit === kind);
    at("sweep").replaceChildren(...followed.map((entry, i) => {
      const option = make("option", `${entry.source} → ${entry.target_value}, “${short(entry.text, 60)}”`);
      option.value = String(i);
      return option;
    }));
    const same = (entry) => before && entry.text === before.text && entry.target_value === before.target_value;
    const kept = Math.max(0, followed.findIndex(same));
    if (followed.length) at("sweep").value = String(kept);
    choose(kept);
    note();
  }

  function note() {
    const flat = site.coordinates.every((point) => point.every((x) => Math.abs(x ?? 0) < 1e-9));
    const shares = site.explained.slice(0, 3).map((share) => share ?? 0);
    const total = Math.round(100 * shares.reduce((a, b) => a + b, 0)), geometry = site.geometry;
    const each = shares.map((share, i) => `axis ${i + 1}: ${Math.round(100 * share)} %`).join(", ");
    let learned = `No manifold could be learned here${geometry.reason ? `: ${geometry.reason}` : ""}. `;
    if ((geometry.path || []).length) {
      learned = known(geometry.closed) ? `The learned curve is ${geometry.closed ? "closed" : "open"}. ` : "";
      if (geometry.note) learned += `${geometry.note}. `;
    }
    at("shape-note").textContent = flat
      ? "All values have the same mean here: this site does not hold the concept."
      : `${learned}The axes hold ${total} % of the spread of the means (${each}); distances are counted on all axes, ` +
        "so that they can be longer than they look.";
  }
  at("sweep").addEventListener("change", () => choose(Number(at("sweep").value)));
  const redraw = () => {
    drawPicture();
    drawCharts();
  };
  new ResizeObserver(redraw).observe(picture);
  return { show, redraw };
})();
