// A picture in three dimensions, drawn as SVG: it turns without WebGL, and what lies in it can be reached by
// keyboard and screen reader. Seen without perspective, so that a straight path stays evenly spaced on the screen.
const SVG = "http://www.w3.org/2000/svg";
const shape = (tag, attributes, text) => {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
};
const set = (node, attributes) => {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
};
const padded = (point) => [...point.map((x) => x ?? 0), 0, 0, 0].slice(0, 3);
const between = (a, b, share) => a.map((x, i) => x + share * (b[i] - x));

// Where points stand on the screen, for a direction of view that fits `points` into width × height.
class Camera {
  constructor() {
    this.yaw = -0.5;
    this.pitch = 0.85;
  }

  turn(yaw, pitch) {
    this.yaw += yaw;
    this.pitch = Math.min(Math.PI / 2, Math.max(-Math.PI / 2, this.pitch + pitch));
  }

  look([x, y, z]) {
    const across = x * Math.cos(this.yaw) - y * Math.sin(this.yaw);
    const away = x * Math.sin(this.yaw) + y * Math.cos(this.yaw);
    return [
      across,
      -(z * Math.cos(this.pitch) + away * Math.sin(this.pitch)),
      away * Math.cos(this.pitch) - z * Math.sin(this.pitch),
    ];
  }

  fit(points, width, height, margin) {
    const seen = points.map((point) => this.look(point));
    const low = [0, 1, 2].map((i) => Math.min(...seen.map((p) => p[i])));
    const high = [0, 1, 2].map((i) => Math.max(...seen.map((p) => p[i])));
    const room = [width - 2 * margin[0], height - 2 * margin[1]];
    const wanted = [0, 1].map((i) => room[i] / Math.max(high[i] - low[i], 1e-9));
    this.unit = Math.min(...wanted);
    if (!(this.unit < 1e8)) this.unit = 1;
    this.shift = [0, 1].map((i) => [width, height][i] / 2 - (this.unit * (low[i] + high[i])) / 2);
    this.depth = [low[2], Math.max(high[2] - low[2], 1e-9)];
  }

  // Pixels across and down, and how far away: 0 near, 1 far.
  place(point) {
    const [x, y, away] = this.look(point);
    return [
      this.shift[0] + this.unit * x,
      this.shift[1] + this.unit * y,
      Math.min(1, Math.max(0, (away - this.depth[0]) / this.depth[1])),
    ];
  }
}

const ruler = document.createElement("canvas").getContext("2d");
const textWidth = (text, size, bold) => {
  ruler.font = `${bold ? "700 " : ""}${size}px ${getComputedStyle(document.body).fontFamily}`;
  return ruler.measureText(text).width;
};
const crossing = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];
// Puts a label beside its point where it covers no other and stays inside; none where there is no room.
class Labels {
  constructor(width, height) {
    this.taken = [];
    this.size = [width, height];
  }

  avoid(x, y, radius) {
    this.taken.push([x - radius, y - radius, x + radius, y + radius]);
  }

  put(group, text, [x, y], { bold = false, must = false, gap = 9 } = {}) {
    const size = bold ? 13 : 12, width = textWidth(text, size, bold), half = size / 2;
    const sides = [
      [0, -gap - half, "middle"], [gap, 0, "start"], [-gap, 0, "end"], [0, gap + half, "middle"],
      [gap, -gap, "start"], [-gap, -gap, "end"], [gap, gap, "start"], [-gap, gap, "end"],
    ];
    const boxes = sides.map(([dx, dy, anchor]) => {
      const left = x + dx - (anchor === "middle" ? width / 2 : anchor === "end" ? width : 0);
      return [left, y + dy - half - 1, left + width, y + dy + half + 1];
    });
    const inside = (box) => box[0] >= 0 && box[1] >= 0 && box[2] <= this.size[0] && box[3] <= this.size[1];
    const free = (box) => inside(box) && !this.taken.some((other) => crossing(box, other));
    let chosen = boxes.findIndex(free);
    if (chosen < 0 && must) chosen = Math.max(0, boxes.findIndex(inside));
    if (chosen < 0) return;
    this.taken.push(boxes[chosen]);
    const [dx, dy, anchor] = sides[chosen];
    const place = { x: x + dx, y: y + dy + size * 0.35, "text-anchor": anchor, "font-size": size };
    group.append(shape("text", { ...place, class: bold ? "label bold" : "label" }, text));
  }
}

// The lines of the learned manifold: a curve, or the two families of lines of a sheet; a cloud has none, but dots.
function strands(geometry) {
  const points = (geometry.path || []).map(padded);
  if (!points.length) return { lines: [], dots: [] };
  const rows = geometry.path_shape;
  if (rows && rows.length === 2 && rows[0] * rows[1] === points.length) {
    const row = (i) => points.slice(i * rows[1], (i + 1) * rows[1]);
    const along = Array.from({ length: rows[0] }, (_, i) => row(i));
    const across = Array.from({ length: rows[1] }, (_, j) => along.map((line) => line[j]));
    return { lines: [...along, ...across], dots: [] };
  }
  if (geometry.kind === "path-cloud") return { lines: [geometry.closed ? [...points, points[0]] : points], dots: [] };
  return { lines: [], dots: points };
}
