// Small charts drawn as SVG. Everything that comes from the service is set as text or as a number.

const SVG = "http://www.w3.org/2000/svg";
const WINDOW_SECONDS = 300;
const SHORTEST_WINDOW_SECONDS = 60; // the width of a chart that has just begun
const GAP_SECONDS = 12; // no line is drawn over a time in which nothing was heard
const WIDTH = 300;
const HEIGHT = 40;

export function svg(name, attributes = {}) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

// Values over the service's clock, of the last few minutes.
export class History {
  constructor() {
    this.points = [];
  }

  add(clock, value) {
    if (this.points.length && clock < this.points.at(-1).clock) this.points = [];
    this.points.push({ clock, value });
    while (this.points[0].clock < clock - WINDOW_SECONDS) this.points.shift();
  }

  get highest() {
    return Math.max(0, ...this.points.map((point) => point.value ?? 0));
  }
}

// A line chart of one History; `draw` shows it up to its last point.
export class LineChart {
  constructor(title) {
    this.title = title;
    this.area = svg("path", { class: "area" });
    this.line = svg("path", { class: "line" });
    this.element = svg("svg", {
      class: "chart",
      viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
      preserveAspectRatio: "none",
      role: "img",
      "aria-label": title,
    });
    this.element.append(this.area, this.line);
  }

  draw(history, top, text) {
    const known = history.points.filter((point) => point.value !== null);
    const end = history.points.length ? history.points.at(-1).clock : 0;
    const span = Math.max(SHORTEST_WINDOW_SECONDS, end - (known[0]?.clock ?? end));
    const highest = top ?? Math.max(1e-9, ...known.map((point) => point.value));
    const x = (point) => WIDTH * (1 - (end - point.clock) / span);
    const y = (point) => HEIGHT - 1 - (HEIGHT - 3) * Math.min(1, point.value / highest);
    let line = "";
    let area = "";
    for (const run of runs(known)) {
      const steps = run.map((point) => `${x(point).toFixed(1)} ${y(point).toFixed(1)}`);
      line += `M${steps.join("L")}`;
      area += `M${x(run[0]).toFixed(1)} ${HEIGHT}L${steps.join("L")}L${x(run.at(-1)).toFixed(1)} ${HEIGHT}Z`;
    }
    this.line.setAttribute("d", line);
    this.area.setAttribute("d", area);
    this.element.setAttribute("aria-label", `${this.title}: ${text} now; drawn over ${Math.round(span)} seconds`);
  }
}

function runs(points) {
  const found = [];
  points.forEach((point, index) => {
    if (!index || point.clock - points[index - 1].clock > GAP_SECONDS) found.push([]);
    found.at(-1).push(point);
  });
  return found;
}

// A strip of cells, each a run of shards and how much of it is committed.
export class HeatStrip {
  constructor() {
    this.element = svg("svg", { class: "heat", preserveAspectRatio: "none", role: "img" });
    this.cells = [];
  }

  draw(fractions, numShards, label) {
    if (this.cells.length !== fractions.length) this.lay(fractions.length, numShards);
    this.element.setAttribute("aria-label", label);
    fractions.forEach((fraction, index) => {
      const cell = this.cells[index];
      if (cell.fraction === fraction) return;
      cell.fraction = fraction;
      // A started run must be told from an empty one however small it is.
      const opacity = fraction === 0 ? 0 : fraction === 1 ? 1 : 0.2 + 0.6 * fraction;
      cell.fill.setAttribute("fill-opacity", opacity.toFixed(3));
      cell.fill.dataset.fraction = fraction;
      cell.title.textContent = `${cell.shards}: ${percent(fraction)} committed`;
    });
  }

  lay(count, numShards) {
    this.element.setAttribute("viewBox", `0 0 ${Math.max(count, 1)} 1`);
    this.element.replaceChildren();
    const gap = count > 100 ? 0 : 0.06;
    this.cells = Array.from({ length: count }, (_, index) => {
      const from = Math.floor((index * numShards) / count);
      const to = Math.floor(((index + 1) * numShards) / count) - 1;
      // The last cell ends where the strip does.
      const place = { x: index, y: 0, width: index === count - 1 ? 1 : 1 - gap, height: 1 };
      const fill = svg("rect", { ...place, class: "cell" });
      const title = svg("title");
      fill.append(title);
      this.element.append(svg("rect", { ...place, class: "track" }), fill);
      return { fill, title, fraction: null, shards: from === to ? `shard ${from}` : `shards ${from} to ${to}` };
    });
  }
}

export function percent(fraction) {
  if (fraction === null) return "–";
  const value = 100 * fraction;
  // Never "100%" for what is not complete, never "0%" for what has begun.
  if (value > 0 && value < 0.1) return "<0.1%";
  if (value < 100 && value > 99.9) return ">99.9%";
  return `${value === 0 || value === 100 ? value : value.toFixed(1)}%`;
}

export function compact(value) {
  if (value === null || value === undefined) return "–";
  for (const [unit, size] of [["G", 1e9], ["M", 1e6], ["k", 1e4]]) {
    if (Math.abs(value) >= size) {
      const scaled = value / (unit === "k" ? 1e3 : size);
      return `${scaled.toFixed(scaled < 10 ? 2 : scaled < 100 ? 1 : 0)}${unit}`;
    }
  }
  return Math.abs(value) < 10 && value % 1 ? value.toFixed(1) : value.toFixed(0);
}
