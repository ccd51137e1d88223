"""A calibration as one HTML page that needs nothing else: tables, and plots as inline SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rowcast.calibration.targets import DENSE
from rowcast.runtime.ladder.spec import Rung

WIDTH, HEIGHT, MARGIN = 560, 300, 48
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#7f7f7f")
"""Okabe and Ito's, told apart by nearly everyone."""

Line = tuple[Sequence[float], Sequence[float]]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse } td, th { padding: .2em .8em; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left } svg { max-width: 100%; height: auto } svg text { font: 12px system-ui, sans-serif }
"""


def report(description: Mapping[str, Any]) -> str:
    """The page for a calibration's description (`runtime.sparse.artefact`)."""
    model, density = description["model"], description["density"]
    title = f"Calibration of {model['name']}"
    texts = ", ".join(text["name"] for text in description["texts"])
    judged, wanted = _judged(description), description["settings"]["recall"]
    origin = f"{description['tokens']:,} tokens of {texts}; weights {description['fingerprint']}. Default density {density:.2f}."
    scorers = (
        f"At density {judged}: mean recall over layers, the 1st percentile of tokens in the worst layer, and how many times more "
        f"candidates than are kept that layer needs for a recall of {wanted} at that percentile."
    )
    filled, alike = description["layerwise"]["filled"], description["layerwise"]["alike"]
    layers = (
        "The share of the neurons that each layer keeps, by the mean. Where all layers lose equally much of their output by keeping a "
        f"little less, the oracle's acceptance at {density:.2f} is {filled:.3f}; where all keep the same share it is {alike:.3f}. "
        "The better of both is used."
    )
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(origin)}</p>",
        f"<p>{escape(_scores(description))}</p>",
        "<h2>Perplexity and acceptance on held-out text</h2>",
        _quality_plot(description["quality"]),
        _quality_table(description["quality"]),
        "<h2>Density by layer</h2>",
        f"<p>{escape(layers)}</p>",
        _density_plot(description),
        "<h2>Recall by layer</h2>",
        f"<p>Mean share of the oracle's neurons that a scorer finds, at density {judged}.</p>",
        _recall_plot(description),
        "<h2>Recall and over-selection</h2>",
        f"<p>{escape(scorers)}</p>",
        _scorer_table(description),
        "<h2>Hot and cold neurons</h2>",
        "<p>Share of all contributions that come from the most frequent neurons. The straight line: all used alike.</p>",
        _hot_plot(description["layers"]),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _judged(description: Mapping[str, Any]) -> float:
    """The density with recall figures that is closest to the default one."""
    return float(min(description["judged"], key=lambda value: abs(value - description["density"])))


def _scores(description: Mapping[str, Any]) -> str:
    found = description["sensitivity"]
    if found["tokens"]:
        return (
            "A neuron's score is the length of what it adds times its sensitivity, how much the law of the next token changes by it, "
            f"found on {found['tokens']:,} tokens. cut=threshold uses the neurons above one score in all layers."
        )
    why = f": {found['missing']}" if "missing" in found else ""
    return f"A neuron's score is the length of what it adds; sensitivities were not found{why}."


def _quality_plot(quality: Mapping[str, Mapping[str, float]]) -> str:
    """A line for each scorer and cut alone, without sparse heads or LM head."""
    points: dict[str, list[tuple[float, float]]] = {}
    for text, figures in quality.items():
        if text != DENSE and (rung := Rung.parse(text)) == Rung(kind="self", mlp=rung.mlp, by=rung.by, cut=rung.cut):
            name = f"{rung.by} {rung.cut}" if rung.cut != "top" else str(rung.by)
            points.setdefault(name, []).append((figures["bytes"], figures["perplexity"]))
    lines: dict[str, Line] = {by: ([x for x, _ in sorted(line)], [y for _, y in sorted(line)]) for by, line in points.items()}
    shares, dense = [figures["bytes"] for figures in quality.values()], quality[DENSE]["perplexity"]
    lines[DENSE] = [min(shares), max(shares)], [dense, dense]
    return plot(lines, "bytes read, share of dense", "perplexity")


def _quality_table(quality: Mapping[str, Mapping[str, float]]) -> str:
    rows = [
        [
            text,
            f"{figures['perplexity']:.2f}",
            f"{figures['acceptance']:.3f}",
            f"{figures['draft_acceptance']:.3f}" if "draft_acceptance" in figures else "",
            f"{figures['bytes']:.2f}",
        ]
        for text, figures in quality.items()
    ]
    return table(["rung", "perplexity", "acceptance", "as a draft", "bytes"], rows)


def _density_plot(description: Mapping[str, Any]) -> str:
    layers = description["layers"]
    lines: dict[str, Line] = {}
    for mean, densities in zip(description["densities"], description["layer_densities"], strict=True):
        if mean in (0.1, 0.25, 0.5, 0.7):
            lines[f"mean {mean}"] = range(len(layers)), densities
    return plot(lines, "layer", "density")


def _recall_plot(description: Mapping[str, Any]) -> str:
    layers, index = description["layers"], description["judged"].index(_judged(description))
    names = ("q2", "q4", "lowrank", "dejavu", "q4-ahead", "lowrank-ahead", "dejavu-ahead")
    return plot(
        {name: (range(len(layers)), [layer["scorers"][name]["recall"][index] for layer in layers]) for name in names},
        "layer",
        "recall",
    )


def _scorer_table(description: Mapping[str, Any]) -> str:
    index = description["judged"].index(_judged(description))
    rows = [
        [name, f"{found['recall'][index]:.3f}", f"{found['recall_p1'][index]:.3f}", f"{found['over'][index]:.2f}"]
        for name, found in description["scorers"].items()
    ]
    return table(["scorer", "recall", "1st percentile", "over-selection"], rows)


def _hot_plot(layers: Sequence[Mapping[str, Any]]) -> str:
    chosen = sorted({0, len(layers) // 3, 2 * len(layers) // 3, len(layers) - 1})
    lines: dict[str, Line] = {f"layer {i}": (_steps(len(layers[i]["hot"])), layers[i]["hot"]) for i in chosen}
    lines["alike"] = [0, 1], [0, 1]
    return plot(lines, "share of the neurons, most frequent first", "share of contributions")


def _steps(count: int) -> list[float]:
    return [i / (count - 1) for i in range(count)]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table of text."""
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def plot(lines: Mapping[str, Line], x_name: str, y_name: str) -> str:
    """Lines by their names, on linear axes that hold all points."""
    xs = [x for line, _ in lines.values() for x in line]
    ys = [y for _, line in lines.values() for y in line]
    (x0, x1), (y0, y1) = _bounds(xs), _bounds(ys)

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)
        return MARGIN + across * (WIDTH - 2 * MARGIN), HEIGHT - MARGIN - up * (HEIGHT - 2 * MARGIN)

    parts = [
        f'<rect x="{MARGIN}" y="{MARGIN}" width="{WIDTH - 2 * MARGIN}" height="{HEIGHT - 2 * MARGIN}" fill="none" stroke="#999"/>'
    ]
    for share in (0, 0.25, 0.5, 0.75, 1):
        x, y = place(x0 + share * (x1 - x0), y0 + share * (y1 - y0))
        parts.append(_text(x, HEIGHT - MARGIN + 16, f"{x0 + share * (x1 - x0):.3g}", "middle"))
        parts.append(_text(MARGIN - 6, y + 4, f"{y0 + share * (y1 - y0):.3g}", "end"))
    parts.append(_text(WIDTH / 2, HEIGHT - 10, x_name, "middle"))
    parts.append(_text(MARGIN, MARGIN - 12, y_name, "start"))
    for i, (name, (x_values, y_values)) in enumerate(lines.items()):
        colour = COLOURS[i % len(COLOURS)]
        points = [place(x, y) for x, y in zip(x_values, y_values, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2" fill="{colour}"/>' for x, y in points]
        parts.append(f'<rect x="{WIDTH - MARGIN + 10}" y="{MARGIN + 18 * i}" width="12" height="3" fill="{colour}"/>')
        parts.append(_text(WIDTH - MARGIN + 26, MARGIN + 18 * i + 6, name, "start"))
    return f'<svg viewBox="0 0 {WIDTH + 90} {HEIGHT}" width="{WIDTH + 90}" role="img">{"".join(parts)}</svg>'


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
