"""A plan as tables, and a run of it beside what was foretold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import IO, TYPE_CHECKING

from rowcast.placement.executable import NOT_YET
from rowcast.placement.units import format_figure

if TYPE_CHECKING:
    from rich.console import Console

    from rowcast.placement.forecast import Forecast, Share
    from rowcast.placement.plan import Plan
    from rowcast.placement.report import Compared, PlanReport

_WIDE = 150
"""Columns where nobody looks at a terminal."""


def print_plan(plan: Plan, file: IO[str]) -> None:
    """Everything that the plan foretells, most important first. Precondition: it has a forecast."""
    forecast = plan.forecast
    assert forecast is not None
    console = _console(file)
    for line in _headline(plan, forecast):
        console.print(line, markup=False, highlight=False)
    _memory(console, forecast)
    _table(console, "what lies where", ("part", "tier", "ranks", "GiB a rank", "share"), _places(forecast), right=(3, 4))
    _times(console, forecast)
    passes = [
        (rung.rung, f"{rung.passes_per_token:.3g}", _ms(rung.pass_s), rung.bound_by, rung.overlap) for rung in forecast.rungs
    ]
    _table(console, "passes", ("rung", "a token", "ms a pass", "waits for", "overlap"), passes, right=(1, 2))
    _table(console, "alternatives", ("what", "ms a token", "why not"), _alternatives(forecast), right=(1,))
    changes = [
        (each.change, _ms(each.seconds_per_token), _times_as_fast(forecast.seconds_per_token, each.seconds_per_token))
        for each in forecast.what_if
    ]
    _table(console, "what if", ("change", "ms a token", "speed"), changes, right=(1, 2))
    order = {"given": 0, "measured": 1, "datasheet": 2, "assumed": 3}
    inputs = sorted(forecast.inputs, key=lambda each: order[each.origin])
    rows = [(each.origin, *_with_unit(each.name, each.value), each.source) for each in inputs]
    _table(console, "inputs, by origin", ("origin", "input", "value", "source"), rows, right=(2,))
    for note in [*(each for each in plan.notes if not each.startswith(NOT_YET)), *forecast.notes]:
        console.print(f"note: {note}", markup=False, highlight=False)


_UNITS = {", bytes/s": (1e9, "GB/s"), ", operations/s": (1e12, "TFLOP/s"), ", bytes": (float(1 << 30), "GiB")}
"""What ends the name of an input, and how people count it."""


def _with_unit(name: str, value: float) -> tuple[str, str]:
    for ending, (scale, unit) in _UNITS.items():
        if name.endswith(ending):
            return name.removesuffix(ending), f"{value / scale:,.4g} {unit}"
    return name, f"{value:.6g}"


def print_report(report: PlanReport, file: IO[str]) -> None:
    """Predicted beside measured."""
    rows = [
        (
            line.what,
            _figure(line, line.predicted),
            _figure(line, line.measured),
            "" if line.error is None else f"{line.error:+.1%}",
            line.note,
        )
        for line in report.lines
    ]
    _table(_console(file), "plan", ("", "predicted", "measured", "error", ""), rows, right=(1, 2, 3))


def _headline(plan: Plan, forecast: Forecast) -> Iterator[str]:
    low, high = forecast.tokens_per_s_range
    yield f"{forecast.model} on {forecast.machine}"
    yield f"{forecast.layout}, {plan.dtype}, ladder {forecast.ladder}, {forecast.tokens_per_round:.3g} tokens a round"
    yield from (note for note in plan.notes if note.startswith(NOT_YET))
    yield (
        f"{format_figure(forecast.tokens_per_s)} tokens/s ({format_figure(low)} to {format_figure(high)}), "
        f"{_ms(forecast.seconds_per_token)} ms a token, with {forecast.context} tokens of context in a batch of {forecast.batch}"
    )
    yield f"first token after {format_figure(forecast.first_token_s)} s, for a prompt of {forecast.prompt} tokens"
    yield f"bottleneck: {forecast.bottleneck}, {forecast.bottleneck_share:.0%} of a token's time"
    greedy = forecast.greedy_seconds_per_token
    told = "finds none" if greedy is None else f"{_ms(greedy)} ms a token"
    yield (
        f"placement of {forecast.groups} groups: within {max(forecast.gap, 0.0):.2%} of the best, solved in {forecast.solver_s:.2f} s; "
        f"greedy {told}"
    )


def _memory(console: Console, forecast: Forecast) -> None:
    from rowcast.placement.forecast import MEMORY_CLASSES
    from rowcast.placement.picture import merged

    used = [name for name in MEMORY_CLASSES if any(device.classes.get(name) for device in forecast.memory)]
    rows = [
        (label, device.card, *(_gib(device.classes.get(name, 0)) for name in used), _gib(device.budget_bytes))
        for label, device in merged(forecast.memory)
    ]
    _table(console, "memory, GiB", ("device", "card", *used, "budget"), rows, right=range(2, len(used) + 3))


def _times(console: Console, forecast: Forecast) -> None:
    """Each stage's milliseconds by link; their sum is more than a token takes where links work at the same time."""
    from rowcast.placement.forecast import LINKS

    used = [link for link in LINKS if any(stage.seconds.get(link) for stage in forecast.stages)]
    rows = [
        (stage.rung, stage.name, *(_ms(stage.seconds.get(link, 0.0)) for link in used), _gb(sum(stage.bytes.values())))
        for stage in forecast.stages
    ]
    names = [f"{link} *" if link == forecast.bottleneck else link for link in used]
    title = "time of a committed token, ms, as if nothing overlapped; *: the bottleneck"
    _table(console, title, ("rung", "stage", *names, "GB moved"), rows, right=range(2, len(used) + 3))


def _places(forecast: Forecast) -> Iterator[Sequence[str]]:
    """By ranks and part: bytes in each tier."""

    def key(share: Share) -> tuple[list[int], str]:
        return share.ranks, share.part

    for (ranks, part), found in groupby(sorted(forecast.shares, key=key), key=key):
        by_tier: dict[str, int] = {}
        for share in found:
            by_tier[share.tier] = by_tier.get(share.tier, 0) + share.bytes
        whole = sum(by_tier.values())
        for tier, held in by_tier.items():
            told = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
            yield part, tier, told, _gib(held), f"{held / whole:.0%}" if whole else ""


def _alternatives(forecast: Forecast) -> Iterator[Sequence[str]]:
    for each in forecast.alternatives:
        yield each.what, _ms(each.seconds_per_token), each.reason


def _table(console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[int]) -> None:
    """Nothing where there are no rows. Texts are texts, not markup."""
    from rich.table import Table
    from rich.text import Text

    found, aligned = list(rows), set(right)
    if not found:
        return
    table = Table(box=None, pad_edge=False)
    for index, name in enumerate(columns):
        table.add_column(Text(name), justify="right" if index in aligned else "left", overflow="fold")
    for row in found:
        table.add_row(*map(Text, row))
    console.print()
    console.print(Text(title, style="bold"))
    console.print(table)


def _console(file: IO[str]) -> Console:
    from rich.console import Console

    console = Console(file=file)
    return console if console.is_terminal else Console(file=file, width=_WIDE)


def _figure(line: Compared, value: float | None) -> str:
    if value is None:
        return ""
    if line.unit == "bytes":
        return f"{_gib(value)} GiB"
    if line.unit == "s":
        return f"{_ms(value)} ms"
    return f"{value:.3g}"


def _gib(count: float) -> str:
    """Two digits behind the point; what is less than that is not nothing."""
    gib = count / (1 << 30)
    return f"{gib:.2f}" if abs(gib) >= 0.005 else "<0.01" if count else ""


def _gb(count: float) -> str:
    return format_figure(count / 1e9) if count else ""


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return "none"
    return format_figure(1e3 * seconds) if seconds else ""


def _times_as_fast(now: float, then: float | None) -> str:
    return "" if not then else f"{now / then:.2f}x"
