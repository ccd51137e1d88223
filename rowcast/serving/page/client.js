// What the page asks of its server. Addresses are relative, so that a server may stand behind a prefix.

/** An answer that is none: OpenAI's error object, or what the connection said. */
export class ApiError extends Error {
  /** `status`: HTTP's; 0 where there was no answer at all. `retryAfterS`: when to ask again, where the server said so. */
  constructor(message, { status = 0, code = "", retryAfterS = null } = {}) {
    super(message);
    this.name = "ApiError";
    this.status = status;
    this.code = code;
    this.retryAfterS = retryAfterS;
  }
}

const KEY = "rowcast.key";

/** The API key, for this tab only. */
export const key = {
  get() {
    try {
      return sessionStorage.getItem(KEY) ?? "";
    } catch {
      return "";
    }
  },
  set(value) {
    try {
      if (value) sessionStorage.setItem(KEY, value);
      else sessionStorage.removeItem(KEY);
    } catch {
      // Storage may be turned off; then the key is asked for again.
    }
  },
};

/** fetch with the key. Throws ApiError for every status but 2xx, and where the server cannot be reached; AbortError as it is. */
export async function ask(path, { body, signal } = {}) {
  const headers = { Accept: "text/event-stream, application/json" };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.");
  }
  if (response.ok) return response;
  let found = {};
  try {
    found = (await response.json()).error ?? {};
  } catch {
    // Not JSON: a proxy's page, for example.
  }
  const after = Number(response.headers.get("Retry-After"));
  throw new ApiError(found.message || `The server answered ${response.status}.`, {
    status: response.status,
    code: String(found.code ?? ""),
    retryAfterS: after > 0 ? after : null,
  });
}

/** The parsed data of a response's server-sent events, up to `[DONE]` or its end. `beat` is called whenever bytes come. */
export async function* events(response, beat = () => {}) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      beat();
      const parts = (rest + value).split(/\r?\n\r?\n/);
      rest = parts.pop();
      for (const part of parts) {
        const lines = part.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (!lines.length) continue; // a comment
        const data = lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
        if (data === "[DONE]") return;
        yield JSON.parse(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
