// The live side: what each snapshot says, in numbers and drawings. The snapshot's keys are those of docs/serving.md.

import { Sparkline, element, empty, legend, positionBars, stackedBar, swatch } from "./charts.js";
import { Density } from "./density.js";
import { bytes, memory, percent, seconds, short, three, whole } from "./format.js";

const SPAN_S = 60; // of the line
const PACE_S = 2; // that the large number looks back
const COLOURS = ["data-1", "data-2", "data-3", "data-4", "data-5", "data-6", "data-7"];

const $ = (id) => document.getElementById(id);

export class Panel {
  constructor() {
    this.history = []; // [time, tokens in all]
    this.paused = false;
    this.spark = new Sparkline($("spark"), SPAN_S);
    this.density = new Density();
    $("pause").addEventListener("click", () => {
      this.paused = !this.paused;
      $("pause").setAttribute("aria-pressed", String(this.paused));
      if (!this.paused && this.last) this.show(this.last);
    });
  }

  /** A snapshot has come. */
  seen(snapshot) {
    const now = performance.now() / 1000;
    const before = this.history.at(-1);
    if (before && snapshot.tokens < before[1]) this.restarted();
    const came = before ? snapshot.tokens - (this.history.at(-1)?.[1] ?? snapshot.tokens) : 0;
    this.history.push([now, snapshot.tokens]);
    while (this.history.length > 2 && this.history[1][0] < now - SPAN_S - PACE_S) this.history.shift();
    this.density.seen(snapshot, came > 0);
    this.last = snapshot;
    if (!this.paused) this.show(snapshot);
  }

  /** The counters began anew. */
  restarted() {
    this.history = [];
    this.density.restarted();
  }

  /** No stream: what is shown is no longer so. */
  lost() {
    $("live").classList.add("stale");
    $("live-title").textContent = this.last ? "Last figures" : "Live";
  }

  /** Tokens a second at each snapshot, over the stretch before it. */
  paces() {
    const found = [];
    let from = 0;
    for (let i = 1; i < this.history.length; i += 1) {
      while (this.history[from + 1][0] <= this.history[i][0] - PACE_S && from + 1 < i) from += 1;
      const [startS, start] = this.history[from];
      const [endS, end] = this.history[i];
      found.push([endS, (end - start) / Math.max(endS - startS, 0.2)]);
    }
    return found;
  }

  show(snapshot) {
    $("live").classList.remove("stale");
    $("live-title").textContent = "Live";
    this.showPace(snapshot);
    if (!snapshot.model) return; // it is being loaded
    this.showBytes(snapshot);
    this.showAcceptance(snapshot);
    this.density.show(snapshot);
    this.showKv(snapshot);
    this.showMemory(snapshot);
  }

  showPace(snapshot) {
    const paces = this.paces();
    const pace = paces.at(-1)?.[1] ?? 0;
    $("pace").textContent = pace ? three(pace) : "0";
    $("pace-brief").textContent = pace ? ` ${three(pace)}/s` : "";
    this.spark.draw(paces, performance.now() / 1000, (most) => (most >= 0.05 ? `peak ${three(most)}` : ""));
    const { requests, ttft_s: first, tpot_s: each } = snapshot;
    const counts = [
      ["running", whole(requests.running)],
      ["waiting", whole(requests.waiting)],
      ["first token", seconds(first?.p50 ?? NaN), first?.p99 != null ? `p99 ${seconds(first.p99)}` : ""],
      ["each token", seconds(each?.p50 ?? NaN), each?.p99 != null ? `p99 ${seconds(each.p99)}` : ""],
    ];
    $("counts").replaceChildren(...counts.map(([what, value, more]) => element("div", {},
      element("dt", { text: what }), element("dd", { text: value }), more ? element("dd", { class: "more", text: more }) : "")));
  }

  showBytes(snapshot) {
    const host = $("bytes");
    const recent = snapshot.bytes.read > 0;
    const found = recent ? snapshot.bytes : snapshot.bytes.total;
    if (!found.read) return host.replaceChildren(empty("Nothing was read yet."));
    if (!found.dense) return host.replaceChildren(empty(`${bytes(found.read)} read${recent ? " in the last 10 s" : " since the start"}.`));
    const ratio = found.read / found.dense;
    const full = Math.max(ratio, 1);
    const parts = [];
    const crossed = Object.entries(found.by_link ?? {});
    const rungs = snapshot.rungs.map((rung) => [rung.name, (recent ? rung.recent : rung.total).bytes_read]);
    const sum = rungs.reduce((all, [, size]) => all + size, 0);
    const beside = Math.max(0, found.read - sum);
    const named = [...rungs, ["prompts", beside]].filter(([, size]) => size > 0.002 * found.read);
    named.forEach(([name, size]) => parts.push({ name: `${short(name)}: ${bytes(size)}`, label: short(name), share: size / found.dense / full, colour: this.colour(name) }));
    host.replaceChildren(
      element("p", { class: "lead" }, element("strong", { text: percent(ratio) }), ` of what plain decoding would read${recent ? "" : ", since the start"}`),
      stackedBar(parts, `${percent(ratio)} of what plain decoding would read`, { mark: 1 / full }),
      legend(parts.map((part) => [part.label, part.colour])),
      element("p", { class: "fine", text: `${bytes(found.read)} read, ${bytes(found.dense)} dense${
        crossed.length ? `; over links: ${crossed.map(([link, size]) => `${link} ${bytes(size)}`).join(", ")}` : ""}${
        snapshot.stalled_s ? `; waited ${seconds(snapshot.stalled_s)}` : ""}` }),
    );
  }

  showAcceptance(snapshot) {
    const drafts = snapshot.rungs.slice(0, -1);
    const host = $("acceptance");
    if (!drafts.length) return host.replaceChildren(empty(`No drafts: ${short(snapshot.rung_names.at(-1) ?? "the model")} decides alone.`));
    const rows = drafts.map((rung) => {
      const recent = rung.recent.acceptance !== null;
      const found = recent ? rung.recent : rung.total;
      const shares = (found.acceptance_by_position ?? []).slice(0, 16);
      const words = shares.map((share, i) => `${i + 1}: ${share === null ? "none" : percent(share)}`).join(", ");
      return element("div", { class: "rung" },
        element("p", { class: "rung-name" }, swatch(this.colour(rung.name)), element("code", { text: rung.name })),
        element("p", { class: "rung-share", text: found.acceptance === null ? "–" : percent(found.acceptance) }),
        shares.length
          ? positionBars(shares, this.colour(rung.name), `${rung.name}, share that stood by position in the proposal: ${words}`)
          : element("p", { class: "fine", text: "not used yet" }),
        shares.length && !recent ? element("p", { class: "fine rung-when", text: "since the start" }) : "");
    });
    const used = drafts.some((rung) => rung.total.acceptance !== null);
    host.replaceChildren(...rows, used ? element("p", { class: "fine", text: "By position in the proposal, over the last 10 s." }) : "");
  }

  showKv(snapshot) {
    const { kv, prefix_cache: prefix } = snapshot;
    const [used, cached] = [kv.used_blocks / kv.total_blocks, kv.cached_blocks / kv.total_blocks];
    const tokens = (blocks) => whole(blocks * kv.block_tokens);
    const bar = (share, colour, words) => stackedBar([{ name: words, share, colour }], words);
    $("kv").replaceChildren(
      element("div", { class: "thin" },
        bar(used, "data-1", `${percent(used)} of the KV cache in use`),
        bar(cached, "data-4", `${percent(cached)} of it kept for prompts that begin alike`)),
      legend([[`in use, ${tokens(kv.used_blocks)} of ${tokens(kv.total_blocks)} tokens`, "data-1"], [`kept for prompts that begin alike, ${tokens(kv.cached_blocks)}`, "data-4"]]),
      element("p", { class: "fine", text: prefix.asked_tokens
        ? `${percent(prefix.hit_tokens / prefix.asked_tokens)} of ${whole(prefix.asked_tokens)} prompt tokens were there already.`
        : "No prompts yet." }),
    );
  }

  showMemory(snapshot) {
    const devices = snapshot.memory ?? [];
    const drawn = JSON.stringify([devices, snapshot.places]);
    if (drawn === this.drawnMemory) return;
    this.drawnMemory = drawn;
    const host = $("memory");
    if (!devices.length) return host.replaceChildren(empty("The plan has no budget."));
    const classes = [...new Set(devices.flatMap((device) => Object.keys(device.classes).filter((name) => device.classes[name] > 0)))];
    const colours = new Map(classes.filter((name) => name !== "margin").map((name, at) => [name, COLOURS[at % COLOURS.length]]));
    const rows = devices.map((device) => {
      const whole_ = Math.max(device.budget_bytes, 1);
      const parts = classes.filter((name) => device.classes[name] > 0).map((name) => ({
        name: `${name}: ${memory(device.classes[name])}`, share: device.classes[name] / whole_, colour: colours.get(name), hatched: name === "margin",
      }));
      return element("div", { class: "device" },
        element("p", {}, element("span", { text: device.device }), device.card && device.card !== device.device ? element("span", { class: "fine", text: ` ${device.card}` }) : "",
          element("span", { class: "size", text: memory(device.budget_bytes) })),
        stackedBar(parts, `${device.device}: ${parts.map((part) => part.name).join(", ")}`));
    });
    const sizes = new Map(classes.map((name) => [name, devices.reduce((sum, device) => sum + (device.classes[name] ?? 0), 0)]));
    host.replaceChildren(...rows, legend(classes.map((name) => [`${name} ${memory(sizes.get(name))}`, colours.get(name) ?? "hatched"])));
  }

  /** The same for a rung wherever it is drawn. */
  colour(rung) {
    const names = this.last?.rung_names ?? [];
    const at = names.indexOf(rung);
    return at < 0 ? "data-7" : at === names.length - 1 ? "data-1" : COLOURS[1 + (at % 4)];
  }
}
