// Drawings: a line, bars, a heat map. Colours come from the style sheet, so that they follow the theme.

import { percent } from "./format.js";

const SVG = "http://www.w3.org/2000/svg";

/** `element(tag, {class, text, ...attributes}, ...children)`. Text goes in as text. */
export function element(tag, { text, ...attributes } = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  made.append(...children);
  return made;
}

/** A line in place of what is not there yet. */
export const empty = (text) => element("p", { class: "fine", text });

export const swatch = (colour) => element("span", { class: `swatch ${colour}`, "aria-hidden": "true" });

/** [[name, colour]] */
export const legend = (entries) => element("ul", { class: "legend" }, ...entries.map(([name, colour]) => element("li", {}, swatch(colour), name)));

/** A line with its area over the last `spanS` seconds. */
export class Sparkline {
  constructor(host, spanS) {
    this.spanS = spanS;
    this.svg = document.createElementNS(SVG, "svg");
    this.svg.setAttribute("preserveAspectRatio", "none");
    this.svg.setAttribute("viewBox", "0 0 100 100");
    this.svg.setAttribute("aria-hidden", "true");
    [this.area, this.line] = ["area", "line"].map((name) => {
      const path = document.createElementNS(SVG, "path");
      path.setAttribute("class", name);
      this.svg.append(path);
      return path;
    });
    this.most = element("span", { class: "spark-most", "aria-hidden": "true" });
    host.append(this.svg, this.most);
  }

  /** `points`: [[seconds, value]], oldest first; `nowS`: the right edge. `label(most)`: what its top stands for. */
  draw(points, nowS, label) {
    const most = Math.max(1e-9, ...points.map(([, value]) => value));
    const placed = points.map(([at, value]) => [100 * (1 - (nowS - at) / this.spanS), 96 - 88 * (value / most)]);
    const path = placed.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(2)} ${y.toFixed(2)}`).join("");
    this.line.setAttribute("d", path);
    this.area.setAttribute("d", placed.length ? `${path}L${placed.at(-1)[0].toFixed(2)} 100L${placed[0][0].toFixed(2)} 100Z` : "");
    this.most.textContent = label(points.length ? most : 0);
  }
}

/** A horizontal bar of parts: [{name, share, colour}], shares of its whole width; `title` says it in words. */
export function stackedBar(parts, title, { mark = null } = {}) {
  const bar = element("div", { class: "bar", role: "img", "aria-label": title });
  let at = 0;
  for (const { name, share, colour, hatched } of parts) {
    const part = element("span", { class: hatched ? "part hatched" : "part", title: name });
    part.style.left = `${100 * at}%`;
    part.style.width = `${100 * Math.min(share, Math.max(0, 1 - at))}%`;
    if (!hatched) part.style.background = `var(--${colour})`;
    bar.append(part);
    at += share;
  }
  if (mark !== null) {
    const line = element("span", { class: "mark" });
    line.style.left = `${100 * Math.min(1, mark)}%`;
    bar.append(line);
  }
  return bar;
}

/** Upright bars of shares 0..1, one a position; null where nothing was judged. */
export function positionBars(shares, colour, title) {
  const bars = element("div", { class: "positions", role: "img", "aria-label": title });
  for (const share of shares) {
    const slot = element("span", { class: share === null ? "slot none" : "slot" });
    const fill = element("span", { class: "fill" });
    fill.style.height = `${100 * (share ?? 0)}%`;
    fill.style.background = `var(--${colour})`;
    slot.append(fill);
    bars.append(slot);
  }
  return bars;
}

/** A legend's gradient as a function of a share: its colours are those of the theme that holds. */
function ramp(legend) {
  const stops = getComputedStyle(legend).backgroundImage.match(/rgb\([^)]*\)/g) ?? [];
  const parsed = stops.map((stop) => stop.match(/[\d.]+/g).slice(0, 3).map(Number));
  return (share) => {
    const at = Math.max(0, Math.min(1, share)) * (parsed.length - 1);
    const low = Math.min(Math.floor(at), parsed.length - 2);
    return parsed[low].map((value, i) => Math.round(value + (parsed[low + 1][i] - value) * (at - low)));
  };
}

const [COLUMN, GAP, MEANS] = [4, 6, 44]; // pixels: a column, the room after the last one, the widest mean

/** Columns of shares by layer, the newest at the right; beside it each layer's mean. */
export class HeatMap {
  /** `legend`: an element whose background is the gradient from 0 to 1. */
  constructor(canvas, legend) {
    this.canvas = canvas;
    this.legend = legend;
    this.columns = []; // each a share for each layer, or null for a stretch in which the rung did not run
    this.cells = document.createElement("canvas");
    this.place = { count: 0, cell: 1 }; // columns that there is room for, pixels of a layer
    canvas.addEventListener("pointermove", (event) => this.point(event));
    new ResizeObserver(() => this.draw()).observe(canvas.parentElement);
  }

  /** What lies under the pointer, as the canvas's title. */
  point({ offsetX, offsetY }) {
    const { count, cell } = this.place;
    const layer = Math.floor(offsetY / cell);
    const column = this.columns[this.columns.length - count + Math.floor(offsetX / COLUMN)];
    this.canvas.title = column?.[layer] === undefined ? "" : `layer ${layer}: ${percent(column[layer])}`;
  }

  draw() {
    const { canvas } = this;
    const layers = this.columns.findLast((column) => column !== null)?.length ?? 0;
    const width = canvas.parentElement.clientWidth;
    if (!layers || !width) return; // or not in sight
    const colour = ramp(this.legend);
    const scale = window.devicePixelRatio || 1;
    const cell = layers === 1 ? 150 : Math.max(2, Math.min(14, Math.round(156 / layers)));
    const height = cell * layers;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    canvas.style.height = `${height}px`;
    const context = canvas.getContext("2d");
    context.scale(scale, scale);
    context.imageSmoothingEnabled = false;

    const count = Math.floor((width - MEANS - GAP) / COLUMN);
    const shown = this.columns.slice(-count);
    this.place = { count, cell };
    this.cells.width = count;
    this.cells.height = layers;
    const picture = new ImageData(count, layers);
    shown.forEach((column, i) => {
      if (column === null) return;
      for (let layer = 0; layer < layers; layer += 1) {
        const at = 4 * (layer * count + count - shown.length + i);
        picture.data.set(colour(column[layer] ?? 0), at);
        picture.data[at + 3] = 255;
      }
    });
    this.cells.getContext("2d").putImageData(picture, 0, 0);
    context.drawImage(this.cells, 0, 0, count, layers, 0, 0, count * COLUMN, height);
    context.strokeStyle = getComputedStyle(canvas).color;
    context.strokeRect(0.5, 0.5, count * COLUMN - 1, height - 1);

    const ran = shown.filter((column) => column !== null);
    for (let layer = 0; layer < layers && ran.length; layer += 1) {
      const mean = ran.reduce((sum, column) => sum + (column[layer] ?? 0), 0) / ran.length;
      context.fillStyle = `rgb(${colour(mean).join(" ")})`;
      context.fillRect(count * COLUMN + GAP, layer * cell, Math.max(1, MEANS * mean), cell - (cell > 3 ? 1 : 0));
    }
  }
}
