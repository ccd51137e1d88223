// One turn of the conversation, as it is shown: a name, the text, what it cost, and what can be done with it.

import { percent, seconds, short, three, whole } from "./format.js";
import { Text } from "./text.js";

export class Turn {
  /** `role`: user or assistant. `actions`: {copy(text, button), again()}. */
  constructor(role, name, actions) {
    this.role = role;
    this.text = "";
    this.actions = actions;
    this.element = document.createElement("li");
    this.element.className = `turn ${role}`;
    const title = document.createElement("h2");
    title.className = "who";
    title.textContent = name;
    this.body = document.createElement("div");
    this.body.className = "body";
    this.below = document.createElement("div");
    this.below.className = "below";
    this.element.append(title, this.body, this.below);
    this.view = new Text(this.body, { onCopy: actions.copy });
    this.drawing = 0;
  }

  /** Add text; it is drawn with the next frame. */
  append(text) {
    this.text += text;
    this.drawing ||= requestAnimationFrame(() => this.draw());
  }

  draw() {
    cancelAnimationFrame(this.drawing);
    this.drawing = 0;
    this.view.set(this.text);
    this.onDraw?.();
  }

  set busy(busy) {
    this.element.classList.toggle("busy", busy);
    this.element.setAttribute("aria-busy", String(busy));
  }

  /** After the answer: its cost, why it ended where that is not its own end, and buttons. */
  finish({ usage = null, note = "", wrong = "", tookS = null }) {
    this.draw();
    this.busy = false;
    this.below.replaceChildren();
    if (note || wrong) {
      const line = document.createElement("p");
      line.className = wrong ? "note wrong" : "note";
      line.textContent = wrong || note;
      this.below.append(line);
    }
    const row = document.createElement("div");
    row.className = "row";
    const figures = usage ? costs(usage, tookS) : [];
    if (figures.length) {
      const list = document.createElement("dl");
      list.className = "costs";
      for (const [what, value] of figures) {
        const pair = document.createElement("div");
        const term = document.createElement("dt");
        const data = document.createElement("dd");
        term.textContent = what;
        data.textContent = value;
        pair.append(term, data);
        list.append(pair);
      }
      this.below.append(list);
    }
    if (this.text) row.append(this.button("Copy", (button) => this.actions.copy(this.text, button), "Copy the answer"));
    row.append(this.button(wrong ? "Try again" : "Regenerate", () => this.actions.again(), wrong ? "" : "Regenerate the answer"));
    this.below.append(row);
  }

  button(text, act, label) {
    const made = document.createElement("button");
    made.type = "button";
    made.className = "quiet small";
    made.textContent = text;
    if (label) made.setAttribute("aria-label", label);
    made.addEventListener("click", () => act(made));
    return made;
  }

  /** Only the last answer can be made again. */
  settle() {
    for (const button of this.below.querySelectorAll("button")) if (button.textContent !== "Copy") button.remove();
  }
}

/** [[what, value]] of an answer, from the usage block and the statistics beside it. */
function costs(usage, tookS) {
  const stats = usage.rowcast ?? usage.stats ?? {};
  const tokens = usage.completion_tokens ?? stats.generated_tokens ?? 0;
  const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
  const found = [["tokens", whole(tokens)]];
  const pace = stats.tokens_per_s ?? (tookS > 0 ? tokens / tookS : null);
  if (pace) found.push(["tokens/s", three(pace)]);
  if (stats.ttft_s != null) found.push(["first token", seconds(stats.ttft_s)]);
  if (stats.rounds) found.push(["tokens a round", three(stats.tokens_per_round)]);
  for (const [rung, share] of Object.entries(stats.acceptance ?? {})) found.push([`of drafts by ${short(rung)} stood`, percent(share)]);
  for (const [rung, share] of Object.entries(stats.density ?? {})) {
    if (share < 0.9995) found.push([`of neurons read by ${short(rung)}`, percent(share)]);
  }
  const read = Object.values(stats.bytes_read ?? {}).reduce((sum, size) => sum + size, 0);
  if (read && stats.dense_bytes) found.push(["of dense bytes read", percent(read / stats.dense_bytes)]);
  if (usage.prompt_tokens) found.push(["in the prompt", whole(usage.prompt_tokens)]);
  if (cached) found.push(["of it cached", whole(cached)]);
  return found;
}
