"""For `report.py`: results with figures and claims (`_figures.py`), and what was foretold beside what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

Result = dict[str, Any]
Row = tuple[str, ...]

NONE = "—"
"""In a cell for which there is no number."""
PLANNED_HEAD = ("result", "what", "planned, ms a token", "measured", "planned over measured")


def has_figures(result: Result) -> bool:
    return isinstance(result["report"].get("figures"), list)


def figures(result: Result) -> Iterator[Row]:
    """Rows of a table, its head first. A peer's ratio is its time over ours."""
    yield "", "ms a token", "GB", "floor, ms", "share", "planned, ms", "beside"
    for one in result["report"]["figures"]:
        took, floor, plan = one["s_per_token"], one["floor_s"], one["planned_s"]
        peers = ", ".join(f"{name} {each * 1e3:.2f} ms ({each / took:.2f}x)" for name, each in one["peers"].items())
        yield (
            one["name"],
            f"{took * 1e3:.3f}",
            f"{one['bytes'] / 1e9:.3f}" if one["bytes"] else "",
            f"{floor * 1e3:.3f}" if floor else "",
            f"{floor / took:.2f}" if floor else "",
            "" if plan is None else f"{plan * 1e3:.3f}",
            peers,
        )


def claims(result: Result) -> Iterator[str]:
    """A line each, and what was not measured. Of real text, first how much faster than our own plain decoding each ladder is."""
    for name, more in _ladders(result):
        later = f"; {more['later_speed_up']:.2f} in the second half of the tokens" if "later_speed_up" in more else ""
        yield f"- {name} over our plain decoding: {more['speed_up']:.2f}{later}"
    for one in result["report"].get("claims", []):
        limit = "at most" if one["at_most"] else "at least"
        yield f"- {one['what']}: {one['value']:.3g}, {limit} {one['bound']:g} wanted: {'met' if one['met'] else 'missed'}"
    for why in result["report"].get("failed", []):
        yield f"- not measured: {why}"


def verdict(result: Result) -> Iterator[str]:
    """Of real text: which ladders beat our own plain decoding in that run, and which do not. A line, or none."""
    found = list(_ladders(result))
    if not found:
        return
    faster, slower = ([f"`{name}`" for name, more in found if (more["speed_up"] > 1) is wins] for wins in (True, False))
    idle = [f"`{name}`" for name, more in found if not more.get("acceptance") and more.get("tokens_per_round") == 1]
    parts = [
        f"faster than our own plain decoding: {', '.join(faster) or 'none'}; not faster: {', '.join(slower) or 'none'}",
        *([f"no token was proposed by {', '.join(idle)}"] if idle else []),
    ]
    yield f"**In this run {'; '.join(parts)}.**"


def _ladders(result: Result) -> Iterator[tuple[str, dict[str, Any]]]:
    """Ladders that ran in turn with our own plain decoding, and what they say of themselves."""
    for one in result["report"].get("figures", []):
        if one["ladder"] != "plain" and "speed_up" in one["more"]:
            yield one["name"], one["more"]


def details(result: Result) -> Iterator[str]:
    """What else a figure says of itself, a line each."""
    for one in result["report"]["figures"]:
        shown = ", ".join(f"{name.replace('_', ' ')} {told(each)}" for name, each in one["more"].items() if is_plain(each))
        if shown:
            ladder = f" (`{one['ladder']}`)" if one["ladder"] not in ("", "plain", one["name"]) else ""
            yield f"- {one['name']}{ladder}: {shown}"


def is_plain(value: object) -> bool:
    return value is not None and value != {} and value != []


def told(value: object) -> str:
    """A value of the JSON as a cell or in a sentence; of a dict's shares two places."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_share(each)}" for name, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(told, value))
    return f"{value:.4g}" if isinstance(value, float) else f"{value}"


def _share(value: object) -> str:
    return f"{value:.2f}".removeprefix("0") if isinstance(value, float) and 0 <= value <= 1 else told(value)


def draw(result: Result) -> Any:
    """A figure of matplotlib: each way's time, with its floor and what was foretold. None where there is nothing to compare."""
    from matplotlib.figure import Figure

    ways = [one for one in result["report"]["figures"] if one["s_per_token"] > 0]
    if len(ways) < 2:
        return None
    figure = Figure(figsize=(9, 0.42 * len(ways) + 1.2), layout="constrained")
    axes = figure.subplots()
    for place, one in enumerate(reversed(ways)):
        axes.barh(place, one["s_per_token"] * 1e3, 0.6, color="#0072B2", label=None if place else "measured")
        for key, colour in (("floor_s", "#D55E00"), ("planned_s", "#009E73")):
            if one[key]:
                axes.plot([one[key] * 1e3] * 2, [place - 0.4, place + 0.4], color=colour, linewidth=2)
    for colour, label in (("#D55E00", "floor"), ("#009E73", "planned")):
        axes.plot([], [], color=colour, linewidth=2, label=label)
    axes.set_yticks(range(len(ways)), [one["name"] for one in reversed(ways)], fontsize=7)
    axes.set_xlabel("milliseconds a token")
    axes.set_title(f"{result['report'].get('device', '')}", fontsize=9)
    axes.legend(fontsize=7)
    return figure


def foretold(results: Sequence[Result]) -> Iterator[Row]:
    """All that has a prediction, over all results: rows of `PLANNED_HEAD`."""
    for result in results:
        report, title = result["report"], result["title"]
        for what, plan, measured in _pairs(report):
            yield title, what, f"{plan * 1e3:.3f}", f"{measured * 1e3:.3f}", f"{plan / measured:.2f}"


def _pairs(report: dict[str, Any]) -> Iterator[tuple[str, float, float]]:
    """What, planned and measured seconds a token."""
    for one in report.get("figures", []):
        if isinstance(one, dict) and one.get("planned_s") is not None:
            yield one["name"], one["planned_s"], one["s_per_token"]
    for name, each in report.items():
        if name.startswith("plan_") and isinstance(each, dict):  # of opt_175b.py
            kind = name.removeprefix("plan_")
            ran = next(
                (run for key, run in report.items() if key == kind or (kind == "sparse" and key.startswith("sparse"))), None
            )
            if ran:
                yield ran["ladder"], each["ms_per_token"] / 1e3, ran["ms_per_token"] / 1e3
    for name, case in report.get("cases", {}).items() if isinstance(report.get("cases"), dict) else ():
        each = case.get("figures", {}).get("seconds per token") if isinstance(case, dict) else None
        if each and each.get("predicted") and each.get("measured"):  # of plan_against_measured.py
            yield name, each["predicted"], each["measured"]
