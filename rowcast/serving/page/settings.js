// What the user chose, kept for this tab: sampling, system prompt, rungs. The key is client.js's.

import { key } from "./client.js";

const KEPT = "rowcast.settings";
const FIELDS = ["system", "temperature", "max-tokens", "seed", "mode"];

export class Settings {
  /** `onKey`: called after the key was changed. */
  constructor({ onKey }) {
    this.details = document.getElementById("settings");
    this.field = Object.fromEntries([...FIELDS, "key"].map((id) => [id, document.getElementById(id)]));
    this.rungs = [];
    this.mode = "";
    this.left = new Set(); // names of rungs that were unticked
    this.restore();
    for (const id of FIELDS) this.field[id].addEventListener("change", () => this.keep());
    this.field.key.value = key.get();
    this.field.key.addEventListener("change", () => {
      key.set(this.field.key.value.trim());
      onKey();
    });
    document.getElementById("fields").addEventListener("submit", (event) => event.preventDefault());
    document.getElementById("fields").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && event.target.tagName === "INPUT") event.target.dispatchEvent(new Event("change"));
    });
  }

  restore() {
    try {
      const kept = JSON.parse(sessionStorage.getItem(KEPT) ?? "{}");
      for (const id of FIELDS) if (typeof kept[id] === "string") this.field[id].value = kept[id];
      for (const name of kept.left ?? []) this.left.add(name);
    } catch {
      // Storage may be turned off, or hold something else.
    }
  }

  keep() {
    const kept = Object.fromEntries(FIELDS.map((id) => [id, this.field[id].value]));
    try {
      sessionStorage.setItem(KEPT, JSON.stringify({ ...kept, left: [...this.left] }));
    } catch {
      // As above.
    }
  }

  /** Offer the server's rungs: all but the last may be left out. A model's name may have slashes, without spaces around them. */
  offer(ladder, mode) {
    this.mode = mode;
    const rungs = ladder.split(ladder.includes("model") ? " / " : "/").map((rung) => rung.trim());
    if (rungs.join(" / ") === this.rungs.join(" / ")) return;
    this.rungs = rungs;
    const choices = rungs.slice(0, -1).map((rung, at) => {
      const label = document.createElement("label");
      const box = document.createElement("input");
      box.type = "checkbox";
      box.id = `rung-${at}`;
      box.checked = !this.left.has(rung);
      box.addEventListener("change", () => {
        if (box.checked) this.left.delete(rung);
        else this.left.add(rung);
        this.keep();
      });
      const name = document.createElement("code");
      name.textContent = rung;
      label.append(box, name);
      return label;
    });
    const last = document.createElement("span");
    last.append("then ", Object.assign(document.createElement("code"), { textContent: rungs.at(-1) ?? "" }), " decides");
    document.getElementById("rung-choices").replaceChildren(...choices, last);
    document.getElementById("rungs").hidden = choices.length === 0;
  }

  /** The fields of a request that are set; an empty one is left to the server. Throws the first field that is not in its bounds. */
  request() {
    const found = {};
    for (const [id, name] of [["temperature", "temperature"], ["max-tokens", "max_tokens"], ["seed", "seed"]]) {
      const field = this.field[id];
      if (!field.checkValidity()) throw field;
      if (field.value !== "") found[name] = Number(field.value);
    }
    const mode = this.field.mode.value;
    if (mode) found.mode = mode;
    if (mode && mode !== this.mode) return found; // another rung decides then, and the choice below is not its
    const chosen = this.rungs.slice(0, -1).filter((rung) => !this.left.has(rung));
    if (chosen.length < this.rungs.length - 1) found.ladder = [...chosen, this.rungs.at(-1)].join(" / ");
    return found;
  }

  get system() {
    return this.field.system.value.trim();
  }

  /** Open, with a field in focus. */
  show(id) {
    this.details.open = true;
    this.field[id].focus();
  }
}
