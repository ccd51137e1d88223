// The conversation: what was said, the request for the next answer, and its stream.

import { ApiError, ask, events } from "./client.js";
import { Turn } from "./turn.js";

const SAY_EVERY_MS = 2500; // a reader is given whole sentences, not tokens

export class Chat {
  /** `settings`: settings.js's. `say(text)`: for those who hear the page. `copy(text, button)`. `model()`: the served name. */
  constructor({ settings, say, copy, model }) {
    Object.assign(this, { settings, say, copy, model });
    this.turns = [];
    this.running = null; // AbortController of the answer that is being streamed
    const find = (id) => document.getElementById(id);
    this.list = find("turns");
    this.scroller = find("messages");
    this.prompt = find("prompt");
    this.sendButton = find("send");
    this.stopButton = find("stop");
    this.latest = find("latest");
    this.welcome = find("welcome");

    find("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    this.prompt.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.send();
    });
    this.prompt.addEventListener("input", () => this.fit());
    this.stopButton.addEventListener("click", () => this.stop());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.running) {
        event.preventDefault();
        this.stop();
      }
    });
    this.latest.addEventListener("click", () => this.toEnd());
    this.scroller.addEventListener("scroll", () => this.scrolled(), { passive: true });
    for (const example of document.querySelectorAll(".example")) {
      example.addEventListener("click", () => {
        this.prompt.value = example.textContent;
        this.send();
      });
    }
    find("new-chat").addEventListener("click", () => this.clear());
    this.pinned = true;
  }

  /** The message field, as high as its text. */
  fit() {
    this.prompt.style.height = "auto";
    this.prompt.style.height = `${Math.min(this.prompt.scrollHeight, 200)}px`;
  }

  clear() {
    this.stop();
    this.turns = [];
    this.list.replaceChildren();
    this.welcome.hidden = false;
    this.prompt.focus();
    this.say("New chat");
  }

  send() {
    const text = this.prompt.value.trim();
    if (!text || this.running) return;
    const request = this.request();
    if (!request) return;
    this.prompt.value = "";
    this.fit();
    this.welcome.hidden = true;
    const turn = new Turn("user", "You", { copy: this.copy });
    turn.append(text);
    turn.draw();
    this.add(turn);
    this.answer(request);
    this.prompt.focus();
  }

  /** The last answer anew, from the same conversation. */
  again() {
    if (this.running) return;
    const request = this.request();
    if (!request) return;
    if (this.turns.at(-1)?.role === "assistant") this.turns.pop().element.remove();
    this.answer(request);
    this.prompt.focus();
  }

  /** The request's fields but for the messages; null, with the field in focus, where one is out of bounds. */
  request() {
    try {
      return this.settings.request();
    } catch (field) {
      if (!(field instanceof HTMLElement)) throw field;
      this.settings.show(field.id);
      field.reportValidity();
      return null;
    }
  }

  add(turn) {
    this.turns.at(-1)?.settle();
    this.turns.push(turn);
    this.list.append(turn.element);
    this.toEnd();
  }

  /** What was said. A message without an answer is joined with the next one: many templates want turns to alternate. */
  messages() {
    const said = [];
    for (const { role, text } of this.turns.filter((turn) => turn.text)) {
      const last = said.at(-1);
      if (last?.role === role) last.content += `\n\n${text}`;
      else said.push({ role, content: text });
    }
    return this.settings.system ? [{ role: "system", content: this.settings.system }, ...said] : said;
  }

  async answer(fields) {
    const messages = this.messages();
    const turn = new Turn("assistant", this.model() || "Answer", { copy: this.copy, again: () => this.again() });
    turn.busy = true;
    turn.onDraw = () => this.pinned && this.toEnd();
    this.add(turn);
    const controller = new AbortController();
    this.running = controller;
    this.showRunning();
    const speech = new Speech(this.say);
    const end = { usage: null };
    const started = performance.now();
    let reason = null;
    try {
      const response = await ask("v1/chat/completions", {
        body: { model: this.model() || undefined, messages, ...fields, stream: true, stream_options: { include_usage: true } },
        signal: controller.signal,
      });
      for await (const event of events(response)) {
        if (event.error) throw new ApiError(event.error.message, { status: response.status, code: event.error.code });
        if (event.usage) end.usage = { ...event.usage, rowcast: event.usage.rowcast ?? event.rowcast };
        const choice = event.choices?.[0];
        if (choice?.delta?.content) {
          turn.append(choice.delta.content);
          speech.add(choice.delta.content);
        }
        reason = choice?.finish_reason ?? reason;
      }
      if (reason === null) end.wrong = "The connection ended before the answer did.";
      if (reason === "length") end.note = "Ended at the most tokens that were asked for, or at the end of the context: New chat begins anew.";
    } catch (error) {
      if (controller.signal.aborted) end.note = "Stopped.";
      else this.failed(error, end);
    }
    end.tookS = (performance.now() - started) / 1000;
    if (this.running === controller) this.running = null;
    this.showRunning();
    turn.finish(end);
    if (this.pinned) this.toEnd();
    speech.end(end.wrong || end.note || "");
  }

  failed(error, end) {
    if (!(error instanceof ApiError)) {
      end.wrong = "The connection was lost before the answer ended.";
      return;
    }
    const after = error.retryAfterS === null ? "" : ` Try again in ${Math.ceil(error.retryAfterS)} s.`;
    const sentence = error.message.replace(/^[a-z]/, (first) => first.toUpperCase()).replace(/([^.!?])$/, "$1.");
    end.wrong = sentence + (/try again/i.test(error.message) ? "" : after);
    if (error.status === 401) this.settings.show("key");
  }

  stop() {
    if (!this.running) return;
    this.running.abort();
    this.prompt.focus();
  }

  showRunning() {
    const running = this.running !== null;
    this.sendButton.hidden = running;
    this.stopButton.hidden = !running;
  }

  scrolled() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    this.pinned = scrollHeight - scrollTop - clientHeight < 48;
    this.latest.hidden = this.pinned;
  }

  toEnd() {
    this.scroller.scrollTop = this.scroller.scrollHeight;
    this.pinned = true;
    this.latest.hidden = true;
  }
}

/** Gives a reader of the screen what has been written, in whole sentences and not too often. */
class Speech {
  constructor(say) {
    this.say = say;
    this.waiting = "";
    this.lastMs = performance.now();
  }

  add(text) {
    this.waiting += text;
    const end = Math.max(...[". ", "! ", "? ", "\n"].map((mark) => this.waiting.lastIndexOf(mark)));
    if (end < 0 || performance.now() - this.lastMs < SAY_EVERY_MS) return;
    this.say(this.waiting.slice(0, end + 1));
    this.waiting = this.waiting.slice(end + 1);
    this.lastMs = performance.now();
  }

  end(note) {
    this.say(`${this.waiting} ${note}`.trim() || "The answer is empty.");
  }
}
