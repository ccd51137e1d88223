"""What a test asks of a page, as functions for `evaluate`: contrast, names, focus, pictures."""

PICTURE = """canvas => {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const seen = new Set();
  for (let at = 0; at < data.length; at += 4) if (data[at + 3] === 255) seen.add(`${data[at]},${data[at + 1]},${data[at + 2]}`);
  return [canvas.width, seen.size];
}"""
"""(width, opaque colours) of a canvas."""
PALE = """() => {
  const parsed = (text) => { const found = text.match(/[\\d.]+/g).map(Number); return [...found.slice(0, 3), found[3] ?? 1]; };
  const over = (top, below) => below.map((value, i) => top[i] * top[3] + value * (1 - top[3]));
  const linear = (value) => (value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4);
  const light = (rgb) => 0.2126 * linear(rgb[0]) + 0.7152 * linear(rgb[1]) + 0.0722 * linear(rgb[2]);
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const element = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || element.closest(".hidden, [hidden], noscript, .skip") || !element.checkVisibility()) continue;
    const chain = [];
    let opacity = 1;
    for (let at = element; at; at = at.parentElement) {
      chain.unshift(parsed(getComputedStyle(at).backgroundColor));
      opacity *= Number(getComputedStyle(at).opacity);
    }
    const back = chain.reduce((below, top) => over(top, below), [255, 255, 255]);
    const ink = parsed(getComputedStyle(element).color);
    const [high, low] = [light(over([...ink.slice(0, 3), ink[3] * opacity], back)), light(back)].sort((a, b) => b - a);
    if ((high + 0.05) / (low + 0.05) < 4.5) found.push(walk.currentNode.data.trim());
  }
  return found;
}"""
"""Texts whose contrast is less than 4.5 (WCAG 2.2, 1.4.3)."""
NAMELESS = """() => [...document.querySelectorAll(
  "a, button, input, select, textarea, summary, canvas, [role=img], [role=region], aside, main",
)].filter((element) => element.checkVisibility())
  .filter((element) => {
    const labels = [...(element.labels ?? [])].map((label) => label.textContent.trim()).join("");
    const legible = ["A", "BUTTON", "SUMMARY"].includes(element.tagName) ? element.textContent.trim() : "";
    return !labels && !legible && !element.getAttribute("aria-label");
  }).map((element) => element.outerHTML.slice(0, 80))"""
"""Controls, pictures and landmarks without a name."""
REACHABLE = """() => [...document.querySelectorAll("a[href], button, input, select, textarea, summary, [tabindex='0']")]
  .filter((element) => element.checkVisibility({ visibilityProperty: true })).length"""
FOCUSED = """() => {
  const element = document.activeElement;
  window.reached ??= new Set();
  window.reached.add(element);
  const style = getComputedStyle(element);
  const around = element.closest(".composer") ? getComputedStyle(element.closest(".composer")) : style;
  return [element === document.body, style.outlineStyle !== "none" || around.boxShadow !== "none", window.reached.size];
}"""
"""(nothing has the focus, it can be seen, elements that had it so far)."""
