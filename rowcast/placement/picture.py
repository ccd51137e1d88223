"""A forecast as a picture: memory by device, time by stage. Torch-free; needs matplotlib, the extra `plot`.

Colours are those of Okabe and Ito, which the colour-blind tell apart ("Color Universal Design", 2008); what is told by colour is also
told by a legend in the order of the bars.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rowcast.errors import UserError
from rowcast.placement.forecast import LINKS, MEMORY_CLASSES, DeviceMemory, Forecast
from rowcast.placement.units import format_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("svg", "png")

GIB = 1 << 30
MOST_BARS = 16
"""Of one panel; more devices than that are drawn once for each run of equal ones."""

_BLUE, _ORANGE, _GREEN, _SKY, _VERMILLION, _PURPLE, _YELLOW, _GREY = (
    "#0072B2", "#E69F00", "#009E73", "#56B4E9", "#D55E00", "#CC79A7", "#F0E442", "#5A5A5A",
)  # fmt: skip
_CLASS_COLOURS = dict(
    zip(MEMORY_CLASSES, (_BLUE, _PURPLE, _YELLOW, _ORANGE, _VERMILLION, _SKY, _GREEN, _GREY, "#FFFFFF"), strict=False)
)
_LINK_COLOURS = dict(zip(LINKS, (_BLUE, _VERMILLION, _ORANGE, _YELLOW, _PURPLE, _GREEN, _GREY, _SKY, "#000000"), strict=False))

_DARK = {_BLUE, _GREEN, _VERMILLION, _GREY}
"""On which text is white."""

_WIDTH_IN, _BAR_IN, _FRAME_IN = 10.0, 0.34, 1.15
_LABELLED = 0.055
"""Of a panel's width, what a part of a bar takes at least to have its number in it."""


@dataclass(frozen=True, slots=True)
class _Bar:
    label: str
    parts: dict[str, float]
    """In the unit of its panel; by class or link."""
    limit: float | None = None
    """Where its budget ends."""
    rung: str | None = None
    """Above the first bar of each rung: whose stages follow."""


def draw(forecast: Forecast, path: str | Path) -> None:
    """Write the picture, SVG or PNG by the file's ending. The same forecast gives the same bytes.

    Raises UserError for another ending, without matplotlib, and where the file cannot be written.
    """
    kind = check_picture(path)
    import matplotlib

    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    # Text stays text in an SVG, ids are made of a fixed salt, and $ is a dollar.
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "rowcast",
        "text.parse_math": False,
        "font.size": 9,
        "hatch.linewidth": 0.5,
    }
    with matplotlib.rc_context(style):
        figure = _figure(forecast)
        try:
            figure.savefig(path, format=kind, dpi=150, metadata=metadata)
        except OSError as error:
            raise UserError(f"cannot write the picture {path}: {error.strerror}") from error


def check_picture(path: str | Path) -> str:
    """The format that the file's ending names. Raises UserError for another ending, and without matplotlib."""
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise UserError(f"picture={path} has to end in .svg or .png, which says what is drawn")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError('a picture takes matplotlib, which is not installed: run pip install "matplotlib>=3.8"') from error
    return kind


def _figure(forecast: Forecast) -> Figure:
    """Devices and hosts on scales of their own, then the stages; all bars equally thick."""
    from matplotlib.figure import Figure

    devices = [_memory_bar(label, memory) for label, memory in merged(forecast.memory) if memory.card != "host"]
    hosts = [_memory_bar(label, memory) for label, memory in merged(forecast.memory) if memory.card == "host"]
    stages = _stage_bars(forecast)
    panels = [bars for bars in (devices, hosts, stages) if bars]
    heights = [_FRAME_IN + _BAR_IN * _rows(bars) for bars in panels]
    title = _title(forecast)
    figure = Figure(figsize=(_WIDTH_IN, sum(heights) + 0.22 * (1 + title.count("\n")) + 0.2), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for each, bars in zip(axes, panels, strict=True):
        if bars is stages:
            _stages(each, bars, forecast)
        else:
            _memory(each, bars, "memory of each device" if bars is devices else "host memory")
    return figure


def _memory(axes: Axes, bars: Sequence[_Bar], title: str) -> None:
    _stacked(axes, bars, _CLASS_COLOURS, number=lambda amount: f"{amount:.1f}")
    for row, bar in enumerate(bars):
        assert bar.limit is not None
        axes.plot([bar.limit, bar.limit], [row - 0.46, row + 0.46], color="black", linewidth=2.2, solid_capstyle="butt")
        axes.annotate(f"{bar.limit:.1f}", (bar.limit, row), xytext=(5, 0), textcoords="offset points", va="center")
    axes.plot([], [], color="black", linewidth=2.2, label="budget")
    axes.set_xlim(0, max(bar.limit or 0 for bar in bars) * _room(f"{bar.limit:.1f}" for bar in bars))
    axes.set_xlabel("GiB")
    _framed(axes, title)


def _stages(axes: Axes, bars: Sequence[_Bar], forecast: Forecast) -> None:
    _stacked(axes, bars, _LINK_COLOURS, number=format_figure, marked=forecast.bottleneck)
    sums = [sum(bar.parts.values()) for bar in bars]
    for row, bar in _placed(bars):
        axes.annotate(
            format_figure(sum(bar.parts.values())),
            (sum(bar.parts.values()), row),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_xlim(0, max(sums) * _room(map(format_figure, sums)) or 1)
    axes.set_xlabel("ms for each committed token, as if nothing overlapped")
    _framed(
        axes,
        f"time by stage; the bottleneck, {forecast.bottleneck}, is {forecast.bottleneck_share:.0%} of {_ms(forecast)} a token",
    )


def _stacked(axes: Axes, bars: Sequence[_Bar], colours: dict[str, str], *, number: object, marked: str | None = None) -> None:
    """Bars from top to bottom, each part in its place; the parts named `marked` with a thick edge."""
    assert callable(number)
    whole = max((bar.limit or sum(bar.parts.values()) for bar in bars), default=0.0) or 1.0
    named: set[str] = set()
    order = [name for name in colours if any(bar.parts.get(name) for bar in bars)]
    for name in order:
        for row, bar in _placed(bars):
            amount = bar.parts.get(name, 0.0)
            if not amount:
                continue
            start = sum(bar.parts.get(before, 0.0) for before in order[: order.index(name)])
            free = name == "margin"
            axes.barh(
                row,
                amount,
                left=start,
                height=0.78,
                color=colours[name],
                edgecolor="black" if name == marked else "#9A9A9A" if free else "white",
                linewidth=1.6 if name == marked else 0.6,
                hatch="///" if free else None,
                zorder=3 if name == marked else 2,
                label=None if name in named else f"{name} (bottleneck)" if name == marked else name,
            )
            named.add(name)
            if amount > _LABELLED * whole and (len(bar.parts) > 1 or bar.limit is not None):  # else its sum stands beside it
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0} if free else None
                ink = "white" if colours[name] in _DARK else "black"
                axes.text(
                    start + amount / 2, row, number(amount), ha="center", va="center", color=ink, fontsize=8, bbox=box, zorder=4
                )
    labels = {row: bar.label for row, bar in _placed(bars)}
    for row, rung in _headings(bars):
        axes.annotate(rung, (0, row), xytext=(4, -1), textcoords="offset points", va="center", style="italic", color="#333333")
    axes.set_yticks(list(labels), labels=list(labels.values()))
    axes.set_ylim(_rows(bars) - 0.4, -0.6)


def _room(labels: Iterable[str]) -> float:
    """The width of an axis over that of its longest bar, with the longest of the labels behind it."""
    return 1.03 + 0.018 * max(map(len, labels))


def _framed(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, borderaxespad=0.2, handlelength=1.4)


def _placed(bars: Sequence[_Bar]) -> list[tuple[int, _Bar]]:
    """With its row, of which headings take some."""
    found, row = [], 0
    for bar in bars:
        row += bar.rung is not None
        found.append((row, bar))
        row += 1
    return found


def _headings(bars: Sequence[_Bar]) -> list[tuple[int, str]]:
    return [(row - 1, bar.rung) for row, bar in _placed(bars) if bar.rung is not None]


def _rows(bars: Sequence[_Bar]) -> int:
    return len(bars) + sum(bar.rung is not None for bar in bars)


def _memory_bar(label: str, memory: DeviceMemory) -> _Bar:
    parts = {name: memory.classes[name] / GIB for name in MEMORY_CLASSES if memory.classes.get(name)}
    card = "" if memory.card in ("host", memory.device) else f"\n{memory.card}"
    return _Bar(label + card, parts, limit=memory.budget_bytes / GIB)


def merged(memory: Sequence[DeviceMemory]) -> list[tuple[str, DeviceMemory]]:
    """Each with its name; where there are many, equal neighbours once: "GPU 0 to GPU 7"."""
    if len(memory) <= MOST_BARS:
        return [(each.device, each) for each in memory]
    found = []
    for _, run in groupby(memory, key=lambda each: (each.card, each.budget_bytes, tuple(sorted(each.classes.items())))):
        first, *others = run
        found.append((f"{first.device} to {others[-1].device}" if others else first.device, first))
    return found


def _stage_bars(forecast: Forecast) -> list[_Bar]:
    found, last = [], None
    for stage in forecast.stages:
        parts = {link: 1e3 * stage.seconds[link] for link in LINKS if stage.seconds.get(link)}
        if parts:
            heading = None if stage.rung == last else textwrap.shorten(stage.rung, 90, placeholder=" ...")
            found.append(_Bar(textwrap.fill(stage.name, 24), parts, rung=heading))
            last = stage.rung
    return found


def _title(forecast: Forecast) -> str:
    low, high = forecast.tokens_per_s_range
    speed = f"{format_figure(forecast.tokens_per_s)} tokens/s ({format_figure(low)} to {format_figure(high)})"
    speed += f", first token in {format_figure(forecast.first_token_s)} s"
    lines = [f"{forecast.model} on {forecast.machine}", f"ladder {forecast.ladder}, context {forecast.context:,}: {speed}"]
    return "\n".join(line for text in lines for line in textwrap.wrap(text, 118))


def _ms(forecast: Forecast) -> str:
    return f"{format_figure(1e3 * forecast.seconds_per_token)} ms"
