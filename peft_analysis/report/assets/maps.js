// Places and kinds: the heat map of one number over blocks and kinds, and what lies in each cell.
const places = [];
const placeOf = new Map();
const kinds = [];
const cells = new Map();
const placed = new Set(rows.filter((row) => known(row.block)).map((row) => row.kind));
rows.forEach((row, index) => {
  const key = known(row.block) ? `${row.stack}.${row.block}` : "";
  if (!placeOf.has(key)) {
    placeOf.set(key, { key, stack: row.stack, block: row.block });
    places.push(placeOf.get(key));
  }
  if (!kinds.includes(row.kind)) kinds.push(row.kind);
  const cell = JSON.stringify([key, row.kind]);
  if (!cells.has(cell)) cells.set(cell, { key, kind: row.kind, members: [] });
  cells.get(cell).members.push(index);
});
// Kinds in the order of their names in the update, what stands in no block last.
kinds.sort((a, b) => Number(!placed.has(a)) - Number(!placed.has(b)));
// Blocks in order within their stack, stacks as they come; what stands in no block is last.
places.sort((a, b) => {
  if (!a.key || !b.key) return Number(!a.key) - Number(!b.key);
  return stacks.indexOf(a.stack) - stacks.indexOf(b.stack) || a.block - b.block;
});
places.forEach((place, order) => {
  place.order = order;
});
const placeIndex = (row) => placeOf.get(known(row.block) ? `${row.stack}.${row.block}` : "").order;
const placeName = (place) => (place.key ? `${stackName(place.stack)}${place.block}` : "–");
const depthTitle = () => (deep.length === 1 ? `block (${deep[0]})` : deep.length ? "block" : "");

const mixed = (share) => `color-mix(in oklab, var(--high) ${(100 * share).toFixed(1)}%, var(--low))`;

// One cell a block and kind; where a kind has several matrices in a block, the largest value.
function heat(id, value, form, name) {
  const node = at(id), found = [];
  node.replaceChildren();
  for (const cell of cells.values()) {
    const numbers = cell.members.map((i) => [real(rows[i]) ? value(rows[i]) : null, i]).filter(([number]) => known(number));
    const [number, row] = numbers.sort((a, b) => b[0] - a[0])[0] ?? [null, cell.members[0]];
    found.push({ ...cell, number, row });
  }
  const all = found.map((cell) => cell.number).filter(known);
  const high = Math.max(...all), low = Math.min(...all);
  const wide = form !== "count" && low > 0 && high / low > 20;
  const start = wide ? low : Math.min(0, low);
  const share = (number) => {
    if (high === start) return number ? 1 : 0;
    return wide ? Math.log(number / low) / Math.log(high / low) : (number - start) / (high - start);
  };
  const width = widthOf(node), letters = narrow() ? 17 : 26;
  const left = 10 + 6.4 * Math.min(letters, Math.max(...kinds.map((kind) => kind.length)));
  const size = Math.min(84, (width - left) / places.length), tall = Math.max(17, Math.min(30, size, 420 / kinds.length));
  const height = kinds.length * tall + 40;
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, height });
  kinds.forEach((kind, i) => {
    svg.append(draw("text", { x: left - 8, y: (i + 0.5) * tall + 4, "text-anchor": "end" }, short(kind, letters)));
  });
  const middle = (order) => left + (order + 0.5) * size;
  drawNames(svg, places.map((place) => place.order), middle, { name: (order) => placeName(places[order]) }, kinds.length * tall, width);
  svg.append(draw("text", { class: "axis-title", x: left, y: height - 4 }, depthTitle()));
  for (const cell of found) {
    const box = { x: left + placeOf.get(cell.key).order * size, y: kinds.indexOf(cell.kind) * tall, width: size, height: tall };
    const rect = draw("rect", { class: known(cell.number) ? "cell" : "cell none", rx: 3, "data-row": cell.row, ...box });
    if (known(cell.number)) rect.style.fill = mixed(share(cell.number));
    const more = cell.members.length > 1 ? `\nthe largest of ${cell.members.length} matrices` : "";
    const what = real(rows[cell.row]) ? told(cell.number, form) : "nothing but rounding";
    const words = `${label(rows[cell.row])}\n${name}: ${what}${more}`;
    rect.addEventListener("pointermove", (event) => showTip(event, words));
    rect.addEventListener("pointerleave", hideTip);
    rect.addEventListener("click", () => choose(cell.row));
    svg.append(rect);
    if (known(cell.number) && form === "count" && size > 20) {
      const inside = { x: box.x + size / 2, y: box.y + tall / 2 + 4, "text-anchor": "middle", "pointer-events": "none" };
      const text = draw("text", inside, told(cell.number, form));
      text.style.fill = share(cell.number) > 0.55 ? "var(--paper)" : "var(--ink)";
      svg.append(text);
    }
  }
  node.append(svg);
  const scale = make("div", undefined, "scale");
  scale.append(make("span", told(start, form)), make("i"), make("span", told(high, form)));
  if (wide) scale.append(make("span", "(logarithmic)"));
  node.append(scale);
  mark(node);
}

// A frame around the chosen matrix's cell.
function mark(node) {
  node.querySelector(".chosen")?.remove();
  const svg = node.querySelector("svg"), row = rows[chosen];
  if (!svg || !row) return;
  const { members } = cells.get(JSON.stringify([places[placeIndex(row)].key, row.kind]));
  const cell = [...svg.querySelectorAll(".cell")].find((one) => members.includes(Number(one.dataset.row)));
  const frame = { class: "chosen", rx: 3 };
  for (const name of ["x", "y", "width", "height"]) frame[name] = cell.getAttribute(name);
  svg.append(draw("rect", frame));
}
