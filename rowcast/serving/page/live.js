// The server's snapshots, as long as the page is open: a stream that is opened again whenever it ends or falls silent.

import { ask, events } from "./client.js";

const SILENT_MS = 15_000; // a server says something every few seconds, if only a comment
const FIRST_WAIT_MS = 500;
const MOST_WAIT_MS = 5_000;

/** Calls `seen(snapshot)` for each, `lost(error)` when there is no stream, and goes on. */
export class Live {
  constructor({ seen, lost }) {
    this.seen = seen;
    this.lost = lost;
    this.waitMs = FIRST_WAIT_MS;
    this.anew = false;
    this.wake = () => {};
    this.run();
  }

  /** Anew, now: the key was changed, or the network is back. */
  again() {
    this.waitMs = FIRST_WAIT_MS;
    this.anew = true;
    this.controller?.abort();
    this.wake();
  }

  async run() {
    window.addEventListener("online", () => this.again());
    for (;;) {
      try {
        await this.follow(); // a server that drains ends it; whether it is gone the next attempt tells
      } catch (error) {
        if (!this.anew) this.lost(error);
      }
      this.anew = false;
      await new Promise((resolve) => {
        const timer = setTimeout(resolve, this.waitMs);
        this.wake = () => {
          clearTimeout(timer);
          resolve();
        };
      });
      this.waitMs = Math.min(2 * this.waitMs, MOST_WAIT_MS);
    }
  }

  async follow() {
    this.controller = new AbortController();
    const controller = this.controller;
    let silence = setTimeout(() => controller.abort(), SILENT_MS);
    const beat = () => {
      clearTimeout(silence);
      silence = setTimeout(() => controller.abort(), SILENT_MS);
    };
    try {
      for await (const snapshot of events(await ask("live/stream", { signal: controller.signal }), beat)) {
        this.waitMs = FIRST_WAIT_MS;
        this.seen(snapshot);
      }
    } finally {
      clearTimeout(silence);
    }
  }
}
