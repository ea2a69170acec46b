// How far, and what instead: odds against scale at the chosen site, a table of sites; the geometry layer by layer.
const rounded = (scale) => String(Number(scale.toPrecision(2)));
// The scales at which an edit of this kind is expected to succeed: medians over pairs; none where it never is.
const safeScales = (site, kind) => {
  const high = site.geometry.safe_scale?.[kind], low = site.geometry.safe_low?.[kind];
  if (!known(high)) return null;
  if (high <= 0) return { low: 0, high: 0, text: "none" };
  const end = high < data.safe_limit ? rounded(high) : `${rounded(high)} or more`;
  return { low: low ?? 0, high, text: known(low) ? `${rounded(low)} to ${end}` : `up to ${end}` };
};

function drawOdds(site, kind) {
  const mine = sweeps.filter((entry) => entry.site === site.label && entry.edit === kind);
  if (!mine.length) return message("figure-odds", "No edit of this kind was followed over scales here.");
  const shade = colour("--foreseen"), scales = mine[0].scales, traces = [];
  mine.forEach((entry, i) => traces.push({
    x: entry.scales,
    y: entry.probability,
    mode: "lines",
    name: "one pair, foreseen",
    legendgroup: "pair",
    showlegend: i === 0,
    line: { color: shade, width: 1 },
    opacity: 0.4,
    text: entry.scales.map(() => safe(`${entry.source} → ${entry.target_value}`)),
    hovertemplate: "%{text}<br>scale %{x:.3~f}: %{y:.0%}<extra></extra>",
  }));
  const mean = scales.map((_, i) => {
    const found = mine.map((entry) => entry.probability[i]).filter(known);
    return found.length ? found.reduce((a, b) => a + b, 0) / found.length : null;
  });
  traces.push({
    x: scales, y: mean, mode: "lines", name: `mean of ${mine.length}, foreseen`, line: { color: shade, width: 3 },
    hovertemplate: "scale %{x:.3~f}: %{y:.0%} on average<extra></extra>",
  });
  const runs = mine[0].recorded.map((entry) => entry.scale);
  if (runs.length) {
    traces.push({
      x: runs,
      y: runs.map((_, i) => mine.filter((entry) => entry.recorded[i].success).length / mine.length),
      customdata: runs.map((_, i) => mine.filter((entry) => entry.recorded[i].success).length),
      mode: "markers",
      name: `share of the ${mine.length} that succeeded, seen`,
      marker: { color: colour("--seen"), size: 10 },
      hovertemplate: `scale %{x:.3~f}: %{customdata} of ${mine.length} succeeded<extra></extra>`,
    });
  }
  const limits = safeScales(site, kind), layout = {};
  if (limits && limits.high > 0) {
    const shade = colour("--good"), high = Math.min(limits.high, scales.at(-1));
    layout.shapes = [{
      type: "rect", x0: limits.low, x1: high, y0: 0, y1: 1, yref: "y", layer: "below", fillcolor: shade,
      opacity: 0.13, line: { width: 0 },
    }];
    layout.annotations = [soft({
      x: (limits.low + high) / 2, y: 1.02, yref: "y", yanchor: "bottom", font: { size: 13, color: shade },
      text: `safe: ${limits.text}`,
    })];
  }
  return draw("figure-odds", traces, base({
    margin: { l: 52, r: 14, t: narrow() ? 96 : 60, b: 48 },
    legend: { orientation: "h", x: 0, y: 1.12, yanchor: "bottom" },
    xaxis: axis({ title: { text: "scale (1: the whole vector)" } }),
    yaxis: axis({
      range: [-0.04, 1.12], tickvals: [0, 0.25, 0.5, 0.75, 1], tickformat: ".0%", title: { text: "probability" },
    }),
    ...layout,
  }));
}

function adviceTable(kind) {
  const head = make("tr"), body = make("tbody");
  const columns = [["site"], ["advice"], ["safe scales", "number"], ["foreseen", "number"]];
  if (applied) columns.push(["seen", "number"]);
  for (const [name, style] of [...columns, ["why"]]) head.append(make("th", name, style));
  for (const site of sites) {
    const row = make("tr");
    row.append(
      make("td", site.label, "place"),
      make("td", site.geometry.advice ?? "unknown", "advice"),
      make("td", safeScales(site, kind)?.text ?? "unknown", "number"),
      make("td", chance(kindRate(site, kind, "predicted")), "number"),
    );
    if (applied) row.append(make("td", percent(kindRate(site, kind, "observed")), "number"));
    row.append(make("td", site.geometry.advice_reason ?? "", "words"));
    body.append(row);
  }
  tableOf(at("advice-table"), head, body);
}

// What is drawn of each site: its number and interval, why it is unknown where it is, and what to say beside it.
const quantities = [
  {
    title: "curvature (1 / state unit)",
    of: (g) => ({ value: g.reliable === false ? null : g.curvature, reason: g.reason }),
    more: (g) => (known(g.snr) ? `signal to noise ${figures(g.snr)}` : ""),
  },
  {
    title: "dimension",
    of: (g) => ({ ...g.dimension }),
    more: (g) => (g.dimension?.method ? `by ${g.dimension.method}` : ""),
  },
  {
    title: "reach (state units)",
    of: (g) => ({ value: g.reach, reason: g.reason }),
    more: (g) => (known(g.noise) ? `noise ${figures(g.noise)}` : ""),
  },
  {
    title: "functional radius (× the vector)",
    of: (g) => ({ value: g.functional?.radius, reason: g.functional?.reason || g.reason }),
    more: (g) => (known(g.functional?.ratio) ? `second over first order: ${figures(g.functional.ratio)}` : ""),
  },
];

function drawGeometry() {
  const places = [...new Map(sites.map((site) => [site.place, tick(site)])).entries()];
  const x = new Map(places.map(([place], i) => [place, i])), shades = palette(), across = narrow() ? 1 : 2;
  const rows = Math.ceil(quantities.length / across), traces = [], layout = { annotations: [] };
  at("figure-geometry").style.height = `${rows * 270 + 60}px`;
  quantities.forEach((quantity, number) => {
    const suffix = number ? String(number + 1) : "", column = number % across, row = Math.floor(number / across);
    const width = across === 1 ? 1 : 0.455, tall = (1 - 0.13 * (rows - 1)) / rows;
    const low = column * (1 - width), high = 1 - row * (tall + 0.13);
    const got = sites.map((site) => quantity.of(site.geometry).value).filter(known);
    const wide = got.length && Math.max(...got) / Math.max(1e-12, Math.min(...got)) > 50 && Math.min(...got) > 0;
    const strip = String(quantities.length + number + 1), bottom = Math.max(0, high - tall), floor = bottom + 0.16 * tall;
    layout["xaxis" + suffix] = axis({
      anchor: "y" + strip, domain: [low, low + width], range: [-0.6, places.length - 0.4], showgrid: false,
      zeroline: false, tickvals: places.map((_, i) => i), ticktext: places.map(([, text]) => safe(text)),
      title: row === rows - 1 ? { text: siteAxis(), standoff: 8 } : undefined,
    });
    layout["yaxis" + suffix] = axis({
      anchor: "x" + suffix, domain: [floor, high], nticks: 5,
      ...(wide ? { type: "log", dtick: 1 } : { rangemode: "tozero" }),
      ...(got.length ? {} : { range: [0, 1], showticklabels: false }),
    });
    // Unknown is not zero: it has a strip of its own below the panel.
    layout["yaxis" + strip] = axis({
      anchor: "x" + suffix, domain: [bottom, floor - 0.03 * tall], range: [0, 1], showgrid: false, zeroline: false,
      tickvals: [0.5], ticktext: ["unknown"], tickfont: { size: 11, color: colour("--soft") },
    });
    layout.annotations.push(panelHead(suffix, quantity.title));
    if (!got.length)
      layout.annotations.push(soft({
        text: "unknown at every site", x: 0.5, y: 0.5, xref: `x${suffix} domain`, yref: `y${suffix} domain`,
      }));
    tokens.forEach((token, place) => {
      const mine = sites.filter((site) => site.token === token), shade = shades[place % shades.length];
      const away = (place - (tokens.length - 1) / 2) * 0.22;
      const told = mine.map((site) => ({ site, ...quantity.of(site.geometry) }));
      const sure = told.filter((e) => known(e.value)), unsure = told.filter((e) => !known(e.value));
      const common = { xaxis: "x" + suffix, legendgroup: token, name: safe(tokenTitle(token)) };
      traces.push({
        ...common,
        x: sure.map((e) => x.get(e.site.place) + away),
        y: sure.map((e) => e.value),
        yaxis: "y" + suffix,
        mode: "markers",
        showlegend: number === 0,
        marker: { color: shade, size: 9, symbol: place ? "square" : "circle" },
        error_y: {
          type: "data", symmetric: false, width: 3, thickness: 1.5, color: shade,
          visible: sure.some((e) => known(e.low)),
          array: sure.map((e) => (known(e.high) ? e.high - e.value : 0)),
          arrayminus: sure.map((e) => (known(e.low) ? e.value - e.low : 0)),
        },
        text: sure.map((e) => {
          const interval = known(e.low) ? ` (${figures(e.low)} to ${figures(e.high)})` : "";
          return safe(`${e.site.label}: ${figures(e.value)}${interval}`) + more(quantity, e.site);
        }),
        hovertemplate: "%{text}<extra></extra>",
      });
      traces.push({
        ...common,
        // Without a point, seen or not, plotly drops the strip, and with it the axis below it.
        x: [...unsure.map((e) => x.get(e.site.place) + away), null],
        y: [...unsure.map(() => 0.5), null],
        yaxis: "y" + strip,
        mode: "markers",
        showlegend: false,
        marker: { color: shade, size: 8, symbol: "x-thin", line: { color: shade, width: 1.6 } },
        text: unsure.map((e) => safe(`${e.site.label}: unknown`) + wrapped(e.reason) + more(quantity, e.site)),
        hovertemplate: "%{text}<extra></extra>",
      });
    });
  });
  const legend = { orientation: "h", x: 0, y: 1.06, yanchor: "bottom" };
  const margin = { l: 62, r: 12, t: narrow() ? 96 : 70, b: 50 };
  return draw("figure-geometry", traces, base({ margin, legend, ...layout }));
}
// A long reason in lines that a hover label can hold.
const wrapped = (reason) => (reason ? `<br>${safe(reason).replace(/(.{40,60}) /g, "$1<br>")}` : "");
const more = (quantity, site) => {
  const text = quantity.more(site.geometry);
  return text ? `<br>${safe(text)}` : "";
};
