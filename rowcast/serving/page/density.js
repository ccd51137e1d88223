// Which share of each layer the rungs read, as tokens come.

import { HeatMap, element, empty } from "./charts.js";
import { percent, short } from "./format.js";

const MOST_COLUMNS = 400;
const ALL = "all weights"; // stands for rungs that leave none out, where no other has run

export class Density {
  constructor() {
    this.host = document.getElementById("density");
    this.tabs = document.getElementById("density-rungs");
    this.columns = new Map(); // by rung, oldest first: a share for each layer, or null where it did not run
    this.chosen = null; // the rung that is shown; null: the first that has run
    this.before = {}; // by rung, tokens that had run through it
    this.heat = null;
  }

  /** A snapshot; `came`: tokens did since the last one, which makes a column. */
  seen(snapshot, came) {
    this.snapshot = snapshot;
    const shares = snapshot.layers ?? {};
    const tokens = Object.fromEntries((snapshot.rungs ?? []).map((rung) => [rung.name, rung.total.tokens]));
    for (const rung of Object.keys(shares)) if (!this.columns.has(rung)) this.columns.set(rung, []);
    if (came) {
      if (!this.columns.size) this.columns.set(ALL, []);
      if (this.columns.size > 1) this.columns.delete(ALL);
      for (const [rung, columns] of this.columns) {
        if (rung === ALL) columns.push(new Array(snapshot.model?.layers ?? 1).fill(1));
        else columns.push(tokens[rung] > (this.before[rung] ?? 0) ? shares[rung] ?? null : null);
        if (columns.length > MOST_COLUMNS) columns.splice(0, MOST_COLUMNS / 4);
      }
    }
    this.before = tokens;
  }

  /** The server's counters began anew. */
  restarted() {
    this.before = {};
  }

  show() {
    const ran = [...this.columns.keys()].filter((rung) => this.columns.get(rung).some((column) => column !== null));
    if (!ran.length) {
      if (!this.heat) this.host.replaceChildren(empty("Drawn as tokens come."));
      return;
    }
    const rung = ran.includes(this.chosen) ? this.chosen : ran[0];
    this.showTabs(ran, rung);
    if (!this.heat) this.build();
    this.heat.columns = this.columns.get(rung);
    this.heat.draw();
    const column = this.heat.columns.findLast((each) => each !== null);
    const words = this.words(rung, column);
    if (this.text.textContent !== words) this.text.textContent = words;
    this.heat.canvas.setAttribute("aria-label", `Share of each layer's neurons that was read, over time. ${words}`);
    this.first.textContent = column.length > 1 ? "0" : "";
    this.last.textContent = column.length > 1 ? String(column.length - 1) : "";
  }

  /** After the theme or the width changed. */
  redraw() {
    this.heat?.draw();
  }

  words(rung, column) {
    if (rung === ALL) return `${short(this.snapshot.rung_names?.at(-1) ?? "plain")} reads all of every layer.`;
    const mean = column.reduce((sum, share) => sum + share, 0) / column.length;
    const [low, high] = [Math.min(...column), Math.max(...column)];
    return `${short(rung)} used ${percent(mean)} of the neurons${high - low > 0.01 ? `, ${percent(low)} to ${percent(high)} by layer` : " in every layer"}.`;
  }

  build() {
    const canvas = element("canvas", { role: "img" });
    this.first = element("span", { "aria-hidden": "true" });
    this.last = element("span", { class: "heat-last", "aria-hidden": "true" });
    this.text = element("p", { class: "fine" });
    const ramp = element("span", { class: "ramp-bar" });
    const foot = ["earlier", "now", "mean"].map((text) => element("span", { text }));
    this.host.replaceChildren(
      element("div", { class: "heat" },
        this.first, this.last,
        element("div", { class: "heat-canvas" }, canvas),
        element("div", { class: "heat-foot", "aria-hidden": "true" }, ...foot)),
      element("div", { class: "ramp", "aria-hidden": "true" },
        element("span", { text: "none" }), ramp, element("span", { text: "all read" })),
      this.text);
    this.heat = new HeatMap(canvas, ramp);
  }

  /** Buttons, where several rungs leave neurons out. */
  showTabs(rungs, shown) {
    const wanted = rungs.length > 1 ? rungs : [];
    if (wanted.join("\n") !== this.tabs.dataset.rungs) {
      this.tabs.dataset.rungs = wanted.join("\n");
      this.tabs.replaceChildren(...wanted.map((rung) => {
        const button = element("button", { type: "button", class: "quiet small", text: rung });
        button.addEventListener("click", () => {
          this.chosen = rung;
          this.show();
        });
        return button;
      }));
    }
    [...this.tabs.children].forEach((button, i) => button.setAttribute("aria-pressed", String(wanted[i] === shown)));
  }
}
