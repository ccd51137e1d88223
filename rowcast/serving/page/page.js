// Puts the page together: the chat, the live side, and the few things that both need.

import { ApiError, ask } from "./client.js";
import { Chat } from "./chat.js";
import { Live } from "./live.js";
import { Panel } from "./panel.js";
import { Settings } from "./settings.js";

const $ = (id) => document.getElementById(id);
const SAID = {
  ready: "The server is ready.",
  starting: "The server is starting.",
  recovering: "The server has lost its engine and starts it again.",
  draining: "The server takes no more requests.",
  stopped: "The server has stopped.",
  unreachable: "The server cannot be reached; trying again.",
  locked: "The server asks for an API key.",
  unwatched: "The server does not show its figures to this page.",
};

/** For those who hear the page; an equal text is said again. */
function say(text) {
  $("said").textContent = $("said").textContent === text ? `${text} ` : text;
}

async function copy(text, button) {
  const shown = button.textContent;
  button.textContent = (await copied(text)) ? "Copied" : "Not copied";
  say(button.textContent);
  setTimeout(() => (button.textContent = shown), 1600);
}

/** The clipboard needs https or this machine's own address; elsewhere a selection is copied. */
async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const field = document.createElement("textarea");
    field.value = text;
    field.className = "hidden";
    document.body.append(field);
    const focused = document.activeElement;
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    focused?.focus();
    return done;
  }
}

let state = "connecting";

/** Shown always, said when it changes. */
function showState(now, reason = "") {
  $("state").dataset.state = now;
  $("state-text").textContent = { locked: "key needed", unwatched: "not watched" }[now] ?? now;
  $("state").title = reason;
  const notice = now === "ready" || now === "connecting" ? "" : `${SAID[now]}${reason ? ` (${reason})` : ""}`;
  $("notice").hidden = !notice;
  $("notice").textContent = notice;
  if (now !== state && !(state === "connecting" && now === "ready")) say(SAID[now] ?? now);
  state = now;
}

let model = "";

function named(name) {
  if (!name || name === model) return;
  model = name;
  $("model").textContent = name;
  document.title = `${name} · Rowcast`;
}

const settings = new Settings({
  onKey() {
    live.again();
    reach();
  },
});
const chat = new Chat({ settings, say, copy, model: () => model });
const panel = new Panel();
const live = new Live({
  seen(snapshot) {
    named(snapshot.model?.name);
    if (snapshot.ladder) settings.offer(snapshot.ladder, snapshot.mode);
    showState(snapshot.state, snapshot.reason);
    panel.seen(snapshot);
  },
  lost(error) {
    panel.lost();
    const status = error instanceof ApiError ? error.status : 0;
    if (status === 0) showState("unreachable");
    else if (status === 401) showState("locked");
    else showState("unwatched", error.message);
  },
});

/** The served model's name, also where the live side is turned off. */
async function reach() {
  try {
    const found = await (await ask("v1/models")).json();
    named(found.data?.[0]?.id);
  } catch (error) {
    if (error.status === 401) settings.show("key");
  }
}

const NEXT = { auto: "light", light: "dark", dark: "auto" };
let theme = document.documentElement.dataset.theme ?? "auto";

function showTheme() {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  $("theme").textContent = `Theme: ${theme}`;
  panel.density.redraw();
}

$("theme").addEventListener("click", () => {
  theme = NEXT[theme];
  try {
    localStorage.setItem("rowcast.theme", theme);
  } catch {
    // Storage may be turned off.
  }
  showTheme();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => panel.density.redraw());

$("show-live").addEventListener("click", () => {
  const shown = document.body.classList.toggle("live-shown");
  $("show-live").setAttribute("aria-expanded", String(shown));
  $("show-live").firstChild.data = shown ? "Chat" : "Live";
  $("pace-brief").hidden = shown;
  panel.density.redraw();
});

showTheme();
reach();
$("prompt").focus();
