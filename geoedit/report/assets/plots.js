// The plotly figures of the whole result: rates by site, pairs, calibration, ROC, AUROC.
const config = { displaylogo: false, displayModeBar: false, scrollZoom: false };
// A figure drawn before its column has its final width must follow it, whatever changed the width.
const widths = new WeakMap();
const observer = new ResizeObserver((entries) => {
  for (const { target, contentRect } of entries) {
    const moved = Math.abs((widths.get(target) ?? 0) - contentRect.width) > 1;
    if (moved && target.classList.contains("drawn") && contentRect.width) {
      widths.set(target, contentRect.width);
      Plotly.Plots.resize(target);
    }
  }
});
const base = (extra) => ({
  paper_bgcolor: "rgba(0,0,0,0)",
  plot_bgcolor: "rgba(0,0,0,0)",
  margin: { l: 48, r: 12, t: 28, b: 46 },
  font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: colour("--ink") },
  legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", bgcolor: "rgba(0,0,0,0)" },
  hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--ink") } },
  hovermode: "closest",
  dragmode: false,
  ...extra,
});
const axis = (extra) => ({
  gridcolor: colour("--line"),
  zerolinecolor: colour("--line"),
  linecolor: colour("--line"),
  fixedrange: true,
  automargin: true,
  ...extra,
});
const draw = (id, traces, layout) => {
  at(id).replaceChildren();
  at(id).classList.add("drawn");
  observer.observe(at(id));
  return Plotly.newPlot(at(id), traces, layout, config);
};
const message = (id, text) => {
  const node = at(id);
  if (node.classList.contains("drawn")) {
    Plotly.purge(node);
    node.classList.remove("drawn");
  }
  node.replaceChildren(make("div", text, "message"));
};
const soft = (extra) => ({ showarrow: false, font: { size: 13, color: colour("--soft") }, ...extra });
const panelHead = (suffix, text) =>
  soft({
    text, x: 0, y: 1.02, xref: `x${suffix} domain`, yref: `y${suffix} domain`, xanchor: "left", yanchor: "bottom",
  });

// One panel for each token, side by side, or one above the other on a phone.
const panels = () => {
  const stacked = narrow(), count = tokens.length, layout = { annotations: [] };
  const gap = stacked ? 0.2 : 0.08, size = (1 - gap * (count - 1)) / count;
  tokens.forEach((token, number) => {
    const suffix = number ? String(number + 1) : "", low = number * (size + gap);
    const domain = stacked ? [1 - low - size, 1 - low] : [low, low + size];
    const mine = sites.filter((site) => site.token === token);
    layout["xaxis" + suffix] = axis({
      anchor: "y" + suffix,
      domain: stacked ? [0, 1] : domain,
      tickvals: mine.map((_, i) => i),
      ticktext: mine.map((site) => safe(tick(site))),
      range: [-0.5, mine.length - 0.5],
      showgrid: false,
      zeroline: false,
      title: !stacked || number === count - 1 ? { text: siteAxis(), standoff: 8 } : undefined,
    });
    layout["yaxis" + suffix] = axis({ anchor: "x" + suffix, domain: stacked ? domain : [0, 1] });
    if (count > 1) layout.annotations.push(panelHead(suffix, safe(tokenTitle(token))));
  });
  return layout;
};
const eachPanel = (call) =>
  tokens.forEach((token, number) =>
    call(sites.filter((site) => site.token === token), number ? String(number + 1) : "", number === 0),
  );
const stretch = (id) => {
  at(id).style.height = narrow() && tokens.length > 1 ? `${240 * tokens.length + 90}px` : "";
};

function drawRates() {
  const traces = [], shades = palette(), layout = panels();
  eachPanel((mine, suffix, first) => {
    data.kinds.forEach((kind, number) => {
      for (const key of applied ? ["observed", "predicted"] : ["predicted"]) {
        const seen = key === "observed";
        traces.push({
          x: mine.map((_, i) => i),
          y: mine.map((site) => kindRate(site, kind, key)),
          xaxis: "x" + suffix,
          yaxis: "y" + suffix,
          mode: "lines+markers",
          name: applied ? `${safe(kind)}, ${seen ? "seen" : "foreseen"}` : safe(kind),
          legendgroup: kind + key,
          showlegend: first,
          line: { color: shades[number], dash: seen ? "solid" : "dot", width: seen ? 2.5 : 1.5 },
          marker: {
            size: 8, color: seen ? shades[number] : colour("--paper"), line: { color: shades[number], width: 2 },
          },
          text: mine.map((site) => safe(site.label)),
          hovertemplate: `%{text}<br>${safe(kind)}, ${seen ? "seen" : "foreseen"}: %{y:.1%}<extra></extra>`,
        });
      }
    });
    Object.assign(layout["yaxis" + suffix], { range: [-0.03, 1.05], tickformat: ".0%", nticks: 6 });
  });
  stretch("figure-rates");
  const legend = { orientation: "h", x: 0, y: 1.08, yanchor: "bottom" };
  const margin = { l: 48, r: 12, t: narrow() ? 104 : 64, b: 50 };
  return draw("figure-rates", traces, base({ margin, legend, ...layout }));
}

const pairsAt = (site, kind) => (data.pairs[site.label] || {})[kind] || [];

function drawHeat(site, kind) {
  const place = new Map(values.map((value, i) => [value, i]));
  const grid = (column) => {
    const rows = values.map(() => values.map(() => null));
    for (const pair of pairsAt(site, kind)) rows[place.get(pair[0])][place.get(pair[1])] = pair[column];
    return rows;
  };
  const names = values.map(safe), dense = values.length > 40;
  const step = Math.ceil(values.length / (dense ? 8 : narrow() ? (applied ? 6 : 12) : 30));
  const shown = values.map((_, i) => i).filter((i) => i % step === 0);
  const numbers = values.map((_, i) => i);
  const trace = (column, name, suffix) => ({
    type: "heatmap",
    z: grid(column),
    x: numbers,
    y: numbers,
    xaxis: "x" + suffix,
    yaxis: "y" + suffix,
    zmin: 0,
    zmax: 1,
    colorscale: [[0, colour("--low")], [1, colour("--high")]],
    showscale: false,
    customdata: names.map((source) => names.map((target) => `${source} → ${target}`)),
    hovertemplate: `%{customdata}<br>${name}: %{z:.0%}<extra></extra>`,
    hoverongaps: false,
    xgap: dense ? 0 : 1,
    ygap: dense ? 0 : 1,
  });
  const labels = {
    tickvals: shown, ticktext: shown.map((i) => safe(short(values[i], 12))), showgrid: false, zeroline: false,
  };
  const tilted = { ...labels, tickangle: narrow() ? -90 : -50 };
  const layout = {
    margin: { l: 40, r: 10, t: 26, b: 40 },
    annotations: [panelHead("", "foreseen")],
    xaxis: axis({ ...tilted, domain: applied ? [0, 0.47] : [0, 1], anchor: "y" }),
    yaxis: axis({ ...labels, autorange: "reversed", anchor: "x" }),
  };
  const traces = [trace(3, "foreseen", "")];
  if (applied) {
    layout.xaxis2 = axis({ ...tilted, domain: [0.53, 1], anchor: "y2" });
    layout.yaxis2 = axis({ ...labels, autorange: "reversed", anchor: "x2", showticklabels: false });
    layout.annotations.push(panelHead("2", "seen"));
    traces.push(trace(6, "seen", "2"));
  }
  return draw("figure-heat", traces, base(layout));
}

const diagonal = () => ({
  x: [0, 1], y: [0, 1], mode: "lines", hoverinfo: "skip", showlegend: false,
  line: { color: colour("--soft"), width: 1, dash: "dash" },
});

function drawCalibration() {
  const bins = data.calibration.bins, most = Math.max(...bins.map((bin) => bin[2]));
  const dots = {
    x: bins.map((bin) => bin[0]),
    y: bins.map((bin) => bin[1]),
    customdata: bins.map((bin) => bin[2]),
    name: "edits of like odds",
    mode: "lines+markers",
    line: { color: colour("--foreseen"), width: 1.5 },
    marker: {
      color: colour("--foreseen"), size: bins.map((bin) => 7 + 17 * Math.sqrt(bin[2] / most)), opacity: 0.85,
    },
    hovertemplate: "foreseen %{x:.0%}, seen %{y:.0%}<br>%{customdata} edits<extra></extra>",
  };
  const told = sites.flatMap((site) => data.kinds.filter((kind) => site.rates[kind]).map((kind) => [site, kind]));
  const bySite = {
    x: told.map(([site, kind]) => kindRate(site, kind, "predicted")),
    y: told.map(([site, kind]) => kindRate(site, kind, "observed")),
    text: told.map(([site, kind]) => safe(`${site.label}, ${kind}`)),
    name: "one site, one kind of edit",
    mode: "markers",
    marker: { color: "rgba(0,0,0,0)", size: 9, symbol: "diamond", line: { color: colour("--seen"), width: 1.6 } },
    hovertemplate: "%{text}<br>foreseen %{x:.0%}, seen %{y:.0%}<extra></extra>",
  };
  return draw("figure-calibration", [diagonal(), dots, bySite], base({
    margin: { l: 52, r: 14, t: 10, b: 48 },
    legend: { x: 0.99, xanchor: "right", y: 0.03, yanchor: "bottom", bgcolor: "rgba(0,0,0,0)" },
    xaxis: axis({ range: [-0.04, 1.04], tickformat: ".0%", title: { text: "foreseen probability" } }),
    yaxis: axis({ range: [-0.04, 1.04], tickformat: ".0%", title: { text: "share that succeeded" } }),
  }));
}

function drawRoc() {
  const shades = palette(), traces = [diagonal()];
  data.predictors.forEach((predictor, number) => {
    const curve = data.roc[predictor.column] || [], name = safe(predictor.label);
    if (!curve.length) return;
    traces.push({
      x: curve.map((p) => p[0]),
      y: curve.map((p) => p[1]),
      mode: "lines",
      name: `${name} ${fixed(data.overall[predictor.column][0], 2)}`,
      line: { color: shades[number % shades.length], width: number ? 1.6 : 3 },
      hovertemplate: `${name}<br>%{y:.0%} of successes above, %{x:.0%} of failures above<extra></extra>`,
    });
  });
  if (traces.length === 1) return message("figure-roc", "All edits ended alike, so that there is nothing to rank.");
  const below = narrow() || data.predictors.length > 9;
  at("figure-roc").style.height = below ? "520px" : "";
  return draw("figure-roc", traces, base({
    margin: { l: 52, r: 14, t: 10, b: 48 },
    legend: below
      ? { orientation: "h", x: 0, y: -0.24, yanchor: "top", font: { size: 12 } }
      : { x: 0.98, xanchor: "right", y: 0.04, yanchor: "bottom", font: { size: 12 }, bgcolor: "rgba(0,0,0,0)" },
    xaxis: axis({ range: [-0.02, 1.02], tickformat: ".0%", title: { text: "failures above the threshold" } }),
    yaxis: axis({ range: [-0.02, 1.02], tickformat: ".0%", title: { text: "successes above it" } }),
  }));
}

function drawAuroc() {
  const traces = [], shades = palette(), layout = panels(), count = data.predictors.length;
  const ranked = (site) => data.predictors.some((predictor) => known(site.auroc[predictor.column]?.[0]));
  if (!sites.some(ranked)) {
    const why = "At each site all edits ended alike, so that no predictor can be ranked within a site.";
    return message("figure-auroc", why);
  }
  eachPanel((mine, suffix, first) => {
    data.predictors.forEach((predictor, number) => {
      const got = mine.map((site) => site.auroc[predictor.column]), shade = shades[number % shades.length];
      traces.push({
        x: mine.map((_, i) => i + (number - (count - 1) / 2) * (0.72 / count)),
        y: got.map((entry) => entry[0]),
        xaxis: "x" + suffix,
        yaxis: "y" + suffix,
        mode: "markers",
        name: safe(predictor.label),
        legendgroup: predictor.column,
        showlegend: first,
        marker: { color: shade, size: number ? 6 : 10, symbol: number ? "circle" : "diamond" },
        error_y: {
          type: "data", symmetric: false, width: 0, thickness: 1.5, color: shade,
          array: got.map((e) => (known(e[2]) ? e[2] - e[0] : 0)),
          arrayminus: got.map((e) => (known(e[1]) ? e[0] - e[1] : 0)),
        },
        text: mine.map((site) => safe(site.label)),
        hovertemplate: `%{text}<br>${safe(predictor.label)}: %{y:.3f}<extra></extra>`,
      });
    });
    Object.assign(layout["yaxis" + suffix], { range: [0, 1.03], nticks: 6 });
    (layout.shapes ??= []).push({
      type: "line", xref: `x${suffix} domain`, yref: "y" + suffix, x0: 0, x1: 1, y0: 0.5, y1: 0.5,
      line: { color: colour("--soft"), width: 1, dash: "dash" },
    });
  });
  // The legend stands above the panels, which keep their height however many predictors it names.
  const rows = Math.ceil((count * (narrow() ? 200 : 150)) / Math.max(280, at("figure-auroc").clientWidth));
  const tall = narrow() ? 240 * tokens.length : 280, top = 66 + 24 * rows;
  at("figure-auroc").style.height = `${tall + top + 50}px`;
  const legend = { orientation: "h", x: 0, y: 1 + 34 / tall, yanchor: "bottom" };
  return draw("figure-auroc", traces, base({ margin: { l: 44, r: 12, t: top, b: 50 }, legend, ...layout }));
}
