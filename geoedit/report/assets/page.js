"use strict";
(() => {
  const problems = [];
  window.addEventListener("error", (event) => { problems.push(String(event.message)); document.body.dataset.problems = problems.join(" | "); });
  window.addEventListener("unhandledrejection", (event) => { problems.push(String(event.reason)); document.body.dataset.problems = problems.join(" | "); });

  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const make = (tag, text, name) => { const node = document.createElement(tag); if (text !== undefined) node.textContent = text; if (name) node.className = name; return node; };
  const percent = (rate) => rate === null || rate === undefined ? "–" : `${Math.round(100 * rate)}\u00a0%`;
  const fixed = (value, digits) => value === null || value === undefined ? "–" : value.toFixed(digits).replace("-", "−");
  const safe = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const short = (text, length) => text.length > length ? text.slice(0, length - 1) + "…" : text;
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const narrow = () => window.innerWidth < 760;
  const palette = () => ["--foreseen", "--seen", "--good", "--second", "--third", "--fourth", "--fifth", "--sixth"].map(colour);
  const webgl = (() => { try { const canvas = document.createElement("canvas"); return !!(canvas.getContext("webgl2") || canvas.getContext("webgl")); } catch { return false; } })();
  const applied = data.applied, values = data.concept.values, sites = data.sites, main = data.predictors[0];
  const cycle = data.concept.kind === "cycle", ordered = cycle || data.concept.kind === "line";
  document.body.classList.toggle("predicted-only", !applied);
  document.body.dataset.webgl = String(webgl);

  // ---- words -------------------------------------------------------------------------------------------------
  at("title").textContent = `Can a straight edit move ${data.concept.name}?`;
  at("asked").textContent = `${data.model}: ${values.length} values (${data.concept.kind}) in ${data.concept.templates.length} templates, ${sites.length} sites, ${data.settings.edits_per_site ?? "?"} edits a site` + (applied ? ", predicted first and then run." : ", predicted only.");
  at("headline").textContent = data.verdict.headline;
  for (const line of data.verdict.lines) at("lines").append(make("li", line));

  const kindRate = (site, kind, key) => site.rates[kind] ? site.rates[kind][key] : null;
  const rate = (site, kind) => kindRate(site, kind, applied ? "observed" : "predicted");
  const best = sites.reduce((a, b) => (rate(b, data.kinds[0]) ?? -1) >= (rate(a, data.kinds[0]) ?? -1) ? b : a);
  const tile = (value, text) => { const box = make("div"); box.append(make("dt", text), make("dd", value)); at("tiles").append(box); };
  for (const kind of data.kinds) tile(percent(rate(best, kind)), `of ${kind === "reused vector" ? "reused vectors" : kind + "s"} ${applied ? "succeed" : "expected to succeed"} at ${best.label}`);
  if (applied) {
    tile(fixed(data.overall[main.column][0], 2), "AUROC of the prediction over all sites" + (data.within[main.column] === null || sites.length < 2 ? "" : `, ${fixed(data.within[main.column], 2)} within a site`));
    tile(`${Math.round(100 * data.calibration.error)}\u00a0pts`, "mean gap between foreseen and seen rates");
  }
  at("shape-lead").textContent = `Mean state of each value, on the first three principal axes of the means.` + (ordered ? ` The line follows the order of the values${cycle ? " and closes" : ""}.` : "");
  at("heat-lead").textContent = "Rows: from; columns: to. Pale is 0 %, full green 100 %. " + (applied ? "Foreseen on the left, what happened on the right. " : "") + "Pairs left blank were not drawn, or share an answer.";
  if (applied) at("foresight-lead").textContent = `Nothing was fitted on this concept. Over all sites, ${percent(data.overall[main.column][0] === null ? null : data.overall[main.column][0])} of (success, failure) pairs are put in the right order by the ${main.label} margin.`;
  const paragraphs = [
    `For every site the states of all values in all templates are collected, and each value's mean. A mean difference adds (mean of target − mean of source) to the state; a reused vector adds the difference of two other values that lie the same way from each other.`,
    `The edited state is then placed among the states that the values themselves leave in the same sentence, without running the network on it. It is predicted to succeed when it lies nearer to the target than to any other value, measured by what the rest of the network makes of the difference.`,
    applied ? `Then each edit was run through the network. It counts as a success when the most likely next token, out of the whole vocabulary, is the first token of the target's answer.` : `No edit was run.`,
  ];
  for (const text of paragraphs) at("method").append(make("p", text));
  for (const predictor of data.predictors) at("terms").append(make("dt", predictor.label), make("dd", predictor.description));
  for (const note of data.notes) at("notes").append(make("li", note));
  for (const text of data.concept.templates) at("templates").append(make("li", text));
  const settings = at("settings");
  for (const [group, entries] of [["", data.settings], ["", data.versions]]) for (const [key, value] of Object.entries(entries)) {
    const row = make("tr"); row.append(make("td", group + key.replaceAll("_", " ")), make("td", typeof value === "string" ? value : JSON.stringify(value))); settings.append(row);
  }

  // ---- figures -----------------------------------------------------------------------------------------------
  const config = { displaylogo: false, displayModeBar: false, scrollZoom: false };
  // A figure drawn before its column has its final width must follow it, whatever changed the width.
  const widths = new WeakMap();
  const observer = new ResizeObserver((entries) => { for (const { target, contentRect } of entries) { if (Math.abs((widths.get(target) ?? 0) - contentRect.width) > 1 && target.classList.contains("drawn") && contentRect.width) { widths.set(target, contentRect.width); Plotly.Plots.resize(target); } } });
  const base = (extra) => Object.assign({
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 48, r: 12, t: 28, b: 46 },
    font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: colour("--ink") },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", bgcolor: "rgba(0,0,0,0)" },
    hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--ink") } },
    hovermode: "closest", dragmode: false,
  }, extra);
  const axis = (extra) => Object.assign({ gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--line"), fixedrange: true, automargin: true }, extra);
  const draw = (id, traces, layout) => { at(id).replaceChildren(); at(id).classList.add("drawn"); observer.observe(at(id)); return Plotly.newPlot(at(id), traces, layout, config); };
  const message = (id, text) => { const node = at(id); if (node.classList.contains("drawn")) { Plotly.purge(node); node.classList.remove("drawn"); } node.replaceChildren(make("div", text, "message")); };

  const streams = new Set(sites.map((site) => site.place.replace(/^(.*?)block -?\d+ /, "")).filter((name) => name !== "embedding"));
  const tick = (site) => { const found = site.place.match(/block (-?\d+) /); return site.place === "embedding" ? "emb." : found && streams.size === 1 ? found[1] : short(site.place, 18); };
  const tokens = [...new Set(sites.map((site) => site.token))];
  const tokenTitle = (token) => token === "value" ? "at the value’s last token" : token === "last" ? "at the prompt’s last token" : `at token ${token}`;
  const panels = () => {
    const stacked = narrow(), count = tokens.length, layout = { annotations: [] };
    tokens.forEach((token, number) => {
      const suffix = number ? String(number + 1) : "", gap = stacked ? 0.2 : 0.08, size = (1 - gap * (count - 1)) / count, low = number * (size + gap);
      const domain = stacked ? [1 - low - size, 1 - low] : [low, low + size];
      const mine = sites.filter((site) => site.token === token);
      layout["xaxis" + suffix] = axis({ anchor: "y" + suffix, domain: stacked ? [0, 1] : domain, tickvals: mine.map((_, i) => i), ticktext: mine.map((site) => safe(tick(site))), range: [-0.5, mine.length - 0.5], showgrid: false, title: !stacked || number === count - 1 ? { text: streams.size === 1 ? `block (${safe([...streams][0])})` : "site", standoff: 8 } : undefined });
      layout["yaxis" + suffix] = axis({ anchor: "x" + suffix, domain: stacked ? domain : [0, 1] });
      if (count > 1) layout.annotations.push({ text: safe(tokenTitle(token)), showarrow: false, xref: `x${suffix} domain`, yref: `y${suffix} domain`, x: 0, y: 1.01, xanchor: "left", yanchor: "bottom", font: { size: 13, color: colour("--soft") } });
    });
    return layout;
  };
  const each = (call) => tokens.forEach((token, number) => call(sites.filter((site) => site.token === token), number ? String(number + 1) : "", number === 0));
  const stretch = (id, layout) => { if (narrow() && tokens.length > 1) at(id).style.height = `${240 * tokens.length + 90}px`; else at(id).style.height = ""; return layout; };

  function drawRates() {
    const traces = [], shades = palette(), layout = panels();
    each((mine, suffix, first) => data.kinds.forEach((kind, number) => {
      for (const key of applied ? ["observed", "predicted"] : ["predicted"]) traces.push({
        x: mine.map((_, i) => i), y: mine.map((site) => kindRate(site, kind, key)), xaxis: "x" + suffix, yaxis: "y" + suffix, mode: "lines+markers",
        name: applied ? `${kind}, ${key === "observed" ? "seen" : "foreseen"}` : kind, legendgroup: kind + key, showlegend: first,
        line: { color: shades[number], dash: key === "observed" ? "solid" : "dot", width: key === "observed" ? 2.5 : 1.5 },
        marker: { size: 8, color: key === "observed" ? shades[number] : colour("--paper"), line: { color: shades[number], width: 2 } },
        text: mine.map((site) => safe(site.label)), hovertemplate: `%{text}<br>${safe(kind)}, ${key}: %{y:.1%}<extra></extra>`,
      });
      layout["yaxis" + suffix] = Object.assign(layout["yaxis" + suffix], { range: [-0.03, 1.05], tickformat: ".0%", nticks: 6 });
    }));
    return draw("figure-rates", traces, stretch("figure-rates", base(Object.assign({ margin: { l: 48, r: 12, t: 64, b: 50 }, legend: { orientation: "h", x: 0, y: 1.08, yanchor: "bottom" } }, layout))));
  }

  function drawAuroc() {
    const traces = [], shades = palette(), layout = panels(), count = data.predictors.length;
    if (!sites.some((site) => data.predictors.some((predictor) => site.auroc[predictor.column][0] !== null))) return message("figure-auroc", "At each site all edits ended alike, so that no predictor can be ranked within a site.");
    each((mine, suffix, first) => {
      data.predictors.forEach((predictor, number) => {
        const got = mine.map((site) => site.auroc[predictor.column]);
        traces.push({
          x: mine.map((_, i) => i + (number - (count - 1) / 2) * 0.72 / count), y: got.map((entry) => entry[0]), xaxis: "x" + suffix, yaxis: "y" + suffix, mode: "markers",
          name: safe(predictor.label), legendgroup: predictor.column, showlegend: first, marker: { color: shades[number % shades.length], size: number ? 6 : 10, symbol: number ? "circle" : "diamond" },
          error_y: { type: "data", symmetric: false, array: got.map((e) => e[2] === null ? 0 : e[2] - e[0]), arrayminus: got.map((e) => e[1] === null ? 0 : e[0] - e[1]), width: 0, thickness: 1.5, color: shades[number % shades.length] },
          text: mine.map((site) => safe(site.label)), hovertemplate: `%{text}<br>${safe(predictor.label)}: %{y:.3f}<extra></extra>`,
        });
      });
      Object.assign(layout["yaxis" + suffix], { range: [0, 1.03], nticks: 6 });
      (layout.shapes ??= []).push({ type: "line", xref: `x${suffix} domain`, yref: "y" + suffix, x0: 0, x1: 1, y0: 0.5, y1: 0.5, line: { color: colour("--soft"), width: 1, dash: "dash" } });
    });
    return draw("figure-auroc", traces, stretch("figure-auroc", base(Object.assign({ margin: { l: 44, r: 12, t: narrow() ? 130 : 88, b: 50 }, legend: { orientation: "h", x: 0, y: 1.1, yanchor: "bottom" } }, layout))));
  }

  function drawShape(site) {
    const points = site.coordinates.map((point) => [...point, 0, 0, 0].slice(0, 3)), shares = site.explained.map((share) => share ?? 0);
    const loop = cycle ? [...points, points[0]] : points, labels = values.map((value) => safe(short(value, 22))), dense = values.length > 40;
    const hue = values.map((_, i) => i), scale = cycle ? [[0, "#3b6fb6"], [0.25, "#2a9d74"], [0.5, "#d9a521"], [0.75, "#c4452f"], [1, "#3b6fb6"]] : [[0, "#3b6fb6"], [0.5, "#2a9d74"], [1, "#d98c21"]];
    const marker = { size: webgl ? (dense ? 4 : 6) : 9, color: ordered ? hue : colour("--foreseen"), colorscale: scale, cmin: 0, cmax: cycle ? values.length : Math.max(1, values.length - 1) };
    const hover = points.map((_, i) => `${labels[i]}`), shown = dense ? labels.map((label, i) => i % 10 === 0 ? label : "") : labels;
    const title = (i) => `axis ${i + 1} (${Math.round(100 * (shares[i] ?? 0))} %)`, total = Math.round(100 * shares.slice(0, 3).reduce((a, b) => a + b, 0));
    const flat = points.every((point) => point.every((x) => Math.abs(x) < 1e-9));
    at("shape-note").textContent = flat ? "All values have the same mean here: this site does not hold the concept." : `These axes hold ${total} % of the spread of the means. ` + (webgl ? "Drag to turn, pinch or scroll to zoom." : "This browser has no WebGL, so that only two of the axes are drawn.");
    if (!webgl) {
      const traces = [];
      if (ordered) traces.push({ x: loop.map((p) => p[0]), y: loop.map((p) => p[1]), mode: "lines", line: { color: colour("--line"), width: 2 }, hoverinfo: "skip" });
      traces.push({ x: points.map((p) => p[0]), y: points.map((p) => p[1]), mode: "markers+text", text: shown, hovertext: hover, hoverinfo: "text", textposition: "top center", marker });
      return draw("figure-shape", traces, base({ showlegend: false, margin: { l: 44, r: 10, t: 10, b: 44 }, xaxis: axis({ title: { text: title(0) } }), yaxis: axis({ title: { text: title(1) }, scaleanchor: "x" }) }));
    }
    const side = (i) => ({ title: { text: title(i) }, showbackground: false, gridcolor: colour("--line"), zerolinecolor: colour("--line"), color: colour("--soft"), showspikes: false, nticks: 4, tickfont: { size: 10 } });
    const traces = [];
    if (ordered) traces.push({ type: "scatter3d", mode: "lines", x: loop.map((p) => p[0]), y: loop.map((p) => p[1]), z: loop.map((p) => p[2]), line: { color: colour("--soft"), width: 3 }, hoverinfo: "skip" });
    traces.push({ type: "scatter3d", mode: "markers+text", x: points.map((p) => p[0]), y: points.map((p) => p[1]), z: points.map((p) => p[2]), text: shown, hovertext: hover, hoverinfo: "text", textposition: "top center", textfont: { color: colour("--ink"), size: 12 }, marker });
    const old = at("figure-shape")._fullLayout?.scene?._scene?.getCamera?.();
    return draw("figure-shape", traces, base({ showlegend: false, dragmode: "turntable", margin: { l: 0, r: 0, t: 0, b: 0 }, scene: { xaxis: side(0), yaxis: side(1), zaxis: side(2), aspectmode: "data", camera: old ?? { eye: { x: 1.7, y: 1.5, z: 0.95 } } } }));
  }

  const pairsAt = (site, kind) => (data.pairs[site.label] || {})[kind] || [];
  function drawHeat(site, kind) {
    const place = new Map(values.map((value, i) => [value, i]));
    const grid = (column) => { const rows = values.map(() => values.map(() => null)); for (const pair of pairsAt(site, kind)) rows[place.get(pair[0])][place.get(pair[1])] = pair[column]; return rows; };
    const names = values.map((value) => safe(value)), ticks = values.map((value) => safe(short(value, 12))), dense = values.length > 40, step = Math.ceil(values.length / (dense ? 8 : narrow() ? 12 : 30));
    const shown = values.map((_, i) => i).filter((i) => i % step === 0), both = applied;
    const tilt = narrow() ? -90 : -50;
    const trace = (column, name, suffix) => ({ type: "heatmap", z: grid(column), x: values.map((_, i) => i), y: values.map((_, i) => i), xaxis: "x" + suffix, yaxis: "y" + suffix, zmin: 0, zmax: 1, colorscale: [[0, colour("--low")], [1, colour("--high")]], showscale: false, customdata: names.map((source) => names.map((target) => `${source} → ${target}`)), hovertemplate: `%{customdata}<br>${name}: %{z:.0%}<extra></extra>`, hoverongaps: false, xgap: dense ? 0 : 1, ygap: dense ? 0 : 1 });
    const head = (suffix, text) => ({ text, showarrow: false, xref: `x${suffix} domain`, yref: `y${suffix} domain`, x: 0, y: 1.02, xanchor: "left", yanchor: "bottom", font: { size: 13, color: colour("--soft") } });
    const labels = { tickvals: shown, ticktext: shown.map((i) => ticks[i]), showgrid: false, zeroline: false };
    const layout = { margin: { l: 40, r: 10, t: 26, b: 40 }, annotations: [head("", "foreseen")], xaxis: axis({ ...labels, domain: [0, 1], anchor: "y", tickangle: tilt }), yaxis: axis({ ...labels, autorange: "reversed", anchor: "x" }) };
    const traces = [trace(3, "foreseen", "")];
    if (both) {
      Object.assign(layout.xaxis, { domain: [0, 0.47] });
      layout.xaxis2 = axis({ ...labels, domain: [0.53, 1], anchor: "y2", tickangle: tilt });
      layout.yaxis2 = axis({ ...labels, autorange: "reversed", anchor: "x2", showticklabels: false });
      layout.annotations.push(head("2", "seen"));
      traces.push(trace(6, "seen", "2"));
    }
    return draw("figure-heat", traces, base(layout));
  }

  function drawCalibration() {
    if (!data.calibration) return;
    const bins = data.calibration.bins, most = Math.max(...bins.map((bin) => bin[2]));
    const line = { x: [0, 1], y: [0, 1], mode: "lines", line: { color: colour("--soft"), width: 1, dash: "dash" }, hoverinfo: "skip" };
    const dots = { x: bins.map((bin) => bin[0]), y: bins.map((bin) => bin[1]), customdata: bins.map((bin) => bin[2]), mode: "lines+markers", line: { color: colour("--foreseen"), width: 1.5 }, marker: { color: colour("--foreseen"), size: bins.map((bin) => 7 + 17 * Math.sqrt(bin[2] / most)), opacity: 0.85 }, hovertemplate: "foreseen %{x:.0%}, seen %{y:.0%}<br>%{customdata} edits<extra></extra>" };
    return draw("figure-calibration", [line, dots], base({ showlegend: false, margin: { l: 52, r: 14, t: 10, b: 48 }, xaxis: axis({ range: [-0.04, 1.04], tickformat: ".0%", title: { text: "foreseen probability" } }), yaxis: axis({ range: [-0.04, 1.04], tickformat: ".0%", title: { text: "share that succeeded" } }) }));
  }

  function drawRoc() {
    const shades = palette(), traces = [{ x: [0, 1], y: [0, 1], mode: "lines", line: { color: colour("--soft"), width: 1, dash: "dash" }, hoverinfo: "skip", showlegend: false }];
    data.predictors.forEach((predictor, number) => {
      const curve = data.roc[predictor.column] || [];
      if (curve.length) traces.push({ x: curve.map((p) => p[0]), y: curve.map((p) => p[1]), mode: "lines", name: `${safe(predictor.label)} ${fixed(data.overall[predictor.column][0], 2)}`, line: { color: shades[number % shades.length], width: number ? 1.6 : 3 }, hovertemplate: `${safe(predictor.label)}<br>%{y:.0%} of successes above, %{x:.0%} of failures above<extra></extra>` });
    });
    if (traces.length === 1) return message("figure-roc", "All edits ended alike, so that there is nothing to rank.");
    return draw("figure-roc", traces, base({ margin: { l: 52, r: 14, t: 10, b: 48 }, legend: { x: 0.98, xanchor: "right", y: 0.04, yanchor: "bottom", font: { size: 12 }, bgcolor: "rgba(0,0,0,0)" }, xaxis: axis({ range: [-0.02, 1.02], tickformat: ".0%", title: { text: "failures above the threshold" } }), yaxis: axis({ range: [-0.02, 1.02], tickformat: ".0%", title: { text: "successes above it" } }) }));
  }

  // ---- tables ------------------------------------------------------------------------------------------------
  function aurocTable() {
    const table = at("auroc-table"), head = make("tr");
    head.append(make("th", "site")); data.predictors.forEach((predictor) => head.append(make("th", predictor.label, "number")));
    const body = make("tbody"), line = (label, auroc) => { const row = make("tr"); row.append(make("td", label)); data.predictors.forEach((p) => { const e = auroc[p.column]; row.append(make("td", e[0] === null ? "–" : `${fixed(e[0], 2)} (${fixed(e[1], 2)} to ${fixed(e[2], 2)})`, "number")); }); body.append(row); };
    if (sites.length > 1) {
      line("all sites", data.overall);
      const row = make("tr"); row.append(make("td", "within a site, mean")); data.predictors.forEach((p) => row.append(make("td", fixed(data.within[p.column], 2), "number"))); body.append(row);
    }
    sites.forEach((site) => line(site.label, site.auroc));
    const top = make("thead"); top.append(head); table.replaceChildren(top, body);
  }

  const columns = [["from", 0], ["to", 1], ["sentences", 2, "number"], ["foreseen", 3, "bar"], ["margin", 4, "number"], ["nearest rival", 5]].concat(applied ? [["seen", 6, "bar"], ["change in log-odds", 7, "number"]] : []);
  let sort = { column: applied ? 6 : 3, up: true };
  function pairTable(site, kind) {
    const wanted = at("filter").value.trim().toLowerCase(), all = pairsAt(site, kind);
    const rows = all.filter((pair) => !wanted || pair[0].toLowerCase().includes(wanted) || pair[1].toLowerCase().includes(wanted));
    const place = new Map(values.map((value, i) => [value, i])), key = (pair) => sort.column < 2 ? place.get(pair[sort.column]) : pair[sort.column];
    rows.sort((a, b) => { const x = key(a), y = key(b); if (x === y) return 0; if (x === null) return 1; if (y === null) return -1; return (x < y ? -1 : 1) * (sort.up ? 1 : -1); });
    const head = make("tr"), body = make("tbody"), limit = 1500;
    for (const [name, column, style] of columns) {
      const cell = make("th", undefined, style === "number" ? "number" : ""), button = make("button", name);
      if (column === sort.column) button.setAttribute("aria-sort", sort.up ? "ascending" : "descending");
      button.addEventListener("click", () => { sort = { column, up: column === sort.column ? !sort.up : true }; pairTable(site, kind); });
      cell.append(button); head.append(cell);
    }
    for (const pair of rows.slice(0, limit)) {
      const row = make("tr");
      for (const [, column, style] of columns) {
        const value = pair[column];
        if (style === "bar") { const cell = make("td"), bar = make("span", undefined, column === 6 ? "bar seen" : "bar"), fill = make("i"); fill.style.width = `${100 * (value ?? 0)}%`; bar.append(fill); cell.append(bar, document.createTextNode(percent(value))); row.append(cell); }
        else row.append(make("td", typeof value === "string" ? value : column === 2 ? String(value) : fixed(value, 2), style === "number" ? "number" : ""));
      }
      body.append(row);
    }
    const top = make("thead"); top.append(head); at("pairs").replaceChildren(top, body);
    at("pairs-note").textContent = all.length ? `${rows.length} of ${all.length} pairs` + (rows.length > limit ? `, the first ${limit} shown.` : ".") : "There is no such edit of this concept: its values have no steps that repeat.";
  }

  // ---- choosing ----------------------------------------------------------------------------------------------
  sites.forEach((site, i) => { const option = make("option", site.label); option.value = String(i); at("site").append(option); });
  data.kinds.forEach((kind, i) => { const option = make("option", kind); option.value = String(i); at("kind").append(option); });
  at("site").value = String(sites.indexOf(best));
  const chosen = () => [sites[Number(at("site").value)], data.kinds[Number(at("kind").value)]];
  const choose = () => { const [site, kind] = chosen(); pairTable(site, kind); return Promise.all([drawShape(site), drawHeat(site, kind)]); };
  at("site").addEventListener("change", choose);
  at("kind").addEventListener("change", choose);
  at("filter").addEventListener("input", () => pairTable(...chosen()));

  const everything = () => Promise.all([drawRates(), choose(), ...(applied ? [drawCalibration(), drawRoc(), drawAuroc()] : [])]);
  let shape = narrow();
  window.addEventListener("resize", () => { if (narrow() !== shape) { shape = narrow(); everything(); } });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", everything);
  if (applied) aurocTable();
  everything().then(() => {
    const wanted = [...document.querySelectorAll(".figure")].filter((node) => node.offsetParent !== null);
    const drawn = wanted.filter((node) => node.querySelector(".trace, .scatterlayer .points path, .heatmaplayer image, .gl-container canvas, .message"));
    document.body.dataset.figuresWanted = String(wanted.length);
    document.body.dataset.figuresDrawn = String(drawn.length);
    document.body.dataset.ready = "true";
  });
})();
