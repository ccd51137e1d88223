// A message's text as nodes: fenced code apart, all else as it stands. Only text nodes are made of what a model or a user wrote.

const FENCE = /^ {0,3}```+ *([^\s`]{0,64})[^`]*$/;

/** [{kind: "text" | "code", text, language}], in order; an open fence is code up to the end. */
export function blocks(text) {
  const found = [];
  let lines = [];
  let code = null;
  const close = () => {
    const joined = lines.join("\n");
    if (code !== null) found.push({ kind: "code", text: joined, language: code });
    else if (joined.trim()) found.push({ kind: "text", text: joined.replace(/^\n+|\n+$/g, ""), language: "" });
    lines = [];
  };
  for (const line of text.split("\n")) {
    const fence = FENCE.exec(line);
    if (fence && (code === null || !fence[1])) {
      close();
      code = code === null ? fence[1] : null;
    } else {
      lines.push(line);
    }
  }
  close();
  return found;
}

/** Keeps an element's children equal to a text's blocks, touching only those that changed. */
export class Text {
  constructor(element, { onCopy = null } = {}) {
    this.element = element;
    this.onCopy = onCopy;
    this.shown = [];
  }

  set(text) {
    const wanted = blocks(text);
    while (this.shown.length > wanted.length) this.shown.pop().node.remove();
    wanted.forEach((block, at) => {
      const old = this.shown[at];
      if (old && old.kind === block.kind && old.language === block.language) {
        if (old.text !== block.text) fill(old.inner, block);
        old.text = block.text;
        return;
      }
      const made = { ...block, ...this.make(block) };
      fill(made.inner, block);
      if (old) old.node.replaceWith(made.node);
      else this.element.append(made.node);
      this.shown[at] = made;
    });
  }

  make(block) {
    if (block.kind === "text") {
      const node = document.createElement("p");
      return { node, inner: node };
    }
    const node = document.createElement("div");
    node.className = "code";
    const top = document.createElement("div");
    top.className = "code-top";
    const name = document.createElement("span");
    name.textContent = block.language || "code";
    top.append(name);
    const inner = document.createElement("code");
    if (this.onCopy) {
      const copy = document.createElement("button");
      copy.type = "button";
      copy.className = "quiet small";
      copy.textContent = "Copy";
      copy.setAttribute("aria-label", `Copy the ${block.language || "code"}`);
      copy.addEventListener("click", () => this.onCopy(inner.textContent, copy));
      top.append(copy);
    }
    const pre = document.createElement("pre");
    pre.tabIndex = 0; // wide code is scrolled with the arrow keys
    pre.setAttribute("aria-label", block.language ? `Code, ${block.language}` : "Code");
    pre.append(inner);
    node.append(top, pre);
    return { node, inner };
  }
}

/** Text nodes, and `code` between single backquotes where they close on the same line. */
function fill(element, { kind, text }) {
  if (kind === "code") {
    element.textContent = text;
    return;
  }
  const nodes = text.split(/(`[^`\n]+`)/).map((part) => {
    if (!/^`[^`\n]+`$/.test(part)) return document.createTextNode(part);
    const code = document.createElement("code");
    code.textContent = part.slice(1, -1);
    return code;
  });
  element.replaceChildren(...nodes);
}
