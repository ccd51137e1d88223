"""Predicted beside measured: what a run of a plan took, and how far its forecast was off. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from rowcast.placement.corrections import kind_of
from rowcast.placement.forecast import Forecast, RungTime
from rowcast.placement.plan import Plan
from rowcast.placement.process_memory import OwnBytes
from rowcast.placement.units import format_bytes

SLOW_ROUND = 4.0
"""Rounds that took more than so many times the median are left out: kernels are compiled and graphs captured in them."""

ENOUGH_ROUNDS = 8
"""Fewer say little about the machine."""

_COMPARABLE = 0.25
"""A prompt that is longer or shorter by no more than this share has its first token compared."""


@dataclass(frozen=True, slots=True)
class Round:
    """One step in which all running sequences decoded."""

    seconds: float
    sequences: int
    tokens: int
    """Committed, of all sequences."""
    context: float
    """Mean length of the sequences."""
    drafted: bool
    """Any rung below the last ran."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a process has seen of its plan."""

    rounds: tuple[Round, ...] = ()
    """The latest ones."""
    first_tokens: tuple[tuple[int, float], ...] = ()
    """The latest requests' prompt tokens and seconds to the first token."""
    acceptance: Mapping[str, float]
    """By rung."""
    allocated_bytes: int | None = None
    """The most that torch held on the GPU at once; None on a CPU."""
    reserved_bytes: int | None = None
    """The most that its allocator took for that."""
    driver: OwnBytes | None = None
    """The most that the process took of the GPU, by the driver's count."""

    @property
    def steady(self) -> tuple[Round, ...]:
        """Rounds without those in which something was compiled or captured."""
        bound = SLOW_ROUND * median(each.seconds for each in self.rounds) if self.rounds else 0.0
        return tuple(each for each in self.rounds if each.seconds <= bound)


@dataclass(frozen=True, slots=True)
class Compared:
    """One figure, twice."""

    what: str
    unit: str
    """s, bytes, tokens, or empty for shares."""
    predicted: float | None
    measured: float | None
    note: str = ""
    """In what the two differ beside the figure."""
    comparable: bool = True

    @property
    def error(self) -> float | None:
        """(predicted - measured) / measured; None where that says nothing."""
        if not self.comparable or self.predicted is None or not self.measured:
            return None
        return (self.predicted - self.measured) / self.measured


@dataclass(frozen=True, slots=True)
class PlanReport:
    """What `compare` found."""

    lines: tuple[Compared, ...]
    ratios: Mapping[str, float]
    """By kind (`corrections.kind_of`), measured seconds of passes over predicted ones before any correction; where enough rounds told
    them."""

    def to_json(self) -> dict[str, Any]:
        """By figure: predicted, measured, error and what they differ in."""
        found = {}
        for line in self.lines:
            told = {key: value for key, value in asdict(line).items() if key not in ("what", "comparable") and value != ""}
            found[line.what] = told | {"error": line.error}
        return found


def compare(plan: Plan, measured: Measured) -> PlanReport | None:
    """None for a plan that foretells neither time nor, as it was made for a ceiling, memory, and before anything was generated.

    Seconds are of one sequence. A predicted second per token is the forecast's, less the KV that the measured contexts lacked.
    """
    forecast = plan.forecast
    if not measured.first_tokens or (forecast is None and not (plan.ceiling_bytes and measured.driver)):
        return None
    if forecast is None:
        return PlanReport(tuple(_memory(plan, measured)), {})
    lines = []
    if measured.steady:
        lines.append(_decode(forecast, measured.steady))
    lines.append(_first_token(forecast, measured))
    lines += _memory(plan, measured)
    if len(forecast.rungs) > 1 and measured.steady:
        lines.append(Compared("tokens a round", "tokens", forecast.tokens_per_round, _tokens_per_round(measured.steady)))
        lines += [
            Compared(f"acceptance of {rung}", "", _predicted_acceptance(forecast, rung), share)
            for rung, share in measured.acceptance.items()
        ]
    return PlanReport(tuple(lines), _ratios(plan, forecast, measured))


def _decode(forecast: Forecast, rounds: tuple[Round, ...]) -> Compared:
    seconds, context, batch = _seconds_per_token(rounds), _context(rounds), _batch(rounds)
    notes = [f"at a context of {context:.0f} tokens, the plan is for {forecast.context}"] * (context < 0.9 * forecast.context)
    alike = abs(batch - forecast.batch) < 0.5
    notes += [] if alike else [f"in a batch of {batch:.3g}, the plan is for {forecast.batch}"]
    predicted = forecast.seconds_per_token - _lacking_kv_s(forecast, context)
    return Compared("seconds per token", "s", predicted, seconds, "; ".join(notes), alike)


def _memory(plan: Plan, measured: Measured) -> list[Compared]:
    """Of tensors, and all that the process takes of its GPU."""
    held, lines = plan.budget_bytes - plan.margin_bytes, []
    if measured.allocated_bytes is not None:
        lines.append(Compared("GPU memory held", "bytes", held, measured.allocated_bytes, "predicted for the largest step"))
        lines.append(Compared("GPU memory reserved", "bytes", None, measured.reserved_bytes, "with what the allocator rounds up"))
    if measured.driver is not None:
        bound, predicted = plan.ceiling_bytes, held + plan.ceiling_bytes - plan.budget_bytes
        if plan.forecast is not None:
            gpus = [each for each in plan.forecast.memory if each.card != "host"]
            bound = max((each.budget_bytes for each in gpus), default=0)
            predicted = max((sum(each.classes.values()) - each.classes["margin"] for each in gpus), default=0)
        note = f"context, libraries and graphs included; at most {format_bytes(bound)}"
        if measured.driver.whole_card:
            note += "; the driver tells no processes apart, so that others' count"
        lines.append(Compared("GPU memory by the driver", "bytes", predicted, measured.driver.bytes, note))
    return lines


def _first_token(forecast: Forecast, measured: Measured) -> Compared:
    """Of the request whose prompt is nearest in length to the forecast's; of equal ones the fastest, which compiled nothing."""
    prompt, seconds = min(measured.first_tokens, key=lambda seen: (abs(seen[0] - forecast.prompt), seen[1]))
    alike = abs(prompt - forecast.prompt) <= _COMPARABLE * forecast.prompt
    note = "" if alike else f"of a prompt of {prompt} tokens, the plan is for {forecast.prompt}"
    return Compared("seconds to the first token", "s", forecast.first_token_s, seconds, note, alike)


def _ratios(plan: Plan, forecast: Forecast, measured: Measured) -> dict[str, float]:
    """The last rung's, where it ran alone often enough; else, where the ladder is pinned, one for all rungs by whole rounds."""
    steady, last = measured.steady, forecast.rungs[-1]
    alone = [each for each in steady if not each.drafted and each.sequences == forecast.batch]
    if len(alone) >= ENOUGH_ROUNDS:
        context = _context(tuple(alone))
        lacking = _lacking_kv_s(forecast, context) / last.passes_per_token if last.passes_per_token else 0.0
        predicted = last.pass_s - lacking
        seconds = median(each.seconds for each in alone) - _outside_s(forecast)
        return _corrected(forecast, [last], seconds / predicted, last.rung) if min(seconds, predicted) > 0 else {}
    together = tuple(each for each in steady if each.drafted and each.sequences == forecast.batch)
    if plan.adaptive or len(together) < ENOUGH_ROUNDS:
        return {}
    predicted = forecast.seconds_per_token - _lacking_kv_s(forecast, _context(together))
    predicted *= forecast.tokens_per_round
    seconds = sum(each.seconds for each in together) / len(together)
    rungs = [rung for rung in forecast.rungs if rung.pass_s > 0]
    return _corrected(forecast, rungs, seconds / predicted, forecast.ladder) if predicted > 0 else {}


def _outside_s(forecast: Forecast) -> float:
    """Seconds of a round that no rung's passes take."""
    passes = sum(rung.passes_per_token * rung.pass_s for rung in forecast.rungs)
    return max(0.0, forecast.seconds_per_token - passes) * forecast.tokens_per_round


def _corrected(forecast: Forecast, rungs: list[RungTime], ratio: float, ladder: str) -> dict[str, float]:
    """The ratio to what would have been predicted without corrections: those that the forecast holds are taken out. `ladder`: that
    ran, a rung alone or all."""
    applied = {each.name: each.value for each in forecast.inputs if each.name.endswith(CORRECTION)}
    return {kind_of(rung.rung, ladder): ratio * applied.get(rung.rung + CORRECTION, 1.0) for rung in rungs}


CORRECTION = ": measured over predicted"
"""Ends the name of an input that is a correction; before it the rung."""


def _lacking_kv_s(forecast: Forecast, context: float) -> float:
    """Seconds per token that the last rung waits for KV of the forecast's context and not of this one."""
    last = forecast.rungs[-1]
    kv = sum(stage.seconds.get(last.bound_by, 0.0) for stage in forecast.stages if (stage.rung, stage.name) == (last.rung, "KV"))
    return kv * max(0.0, 1 - context / forecast.context)


def _predicted_acceptance(forecast: Forecast, rung: str) -> float | None:
    """`rung`: its kind or, where there are several of that kind, its text without gamma."""
    return next((each.value for each in forecast.inputs if each.name.startswith(f"acceptance of {rung}")), None)


def _seconds_per_token(rounds: tuple[Round, ...]) -> float:
    tokens = sum(each.tokens for each in rounds)
    return sum(each.seconds * each.sequences for each in rounds) / tokens


def _tokens_per_round(rounds: tuple[Round, ...]) -> float:
    return sum(each.tokens for each in rounds) / sum(each.sequences for each in rounds)


def _context(rounds: tuple[Round, ...]) -> float:
    return sum(each.context for each in rounds) / len(rounds)


def _batch(rounds: tuple[Round, ...]) -> float:
    return sum(each.sequences for each in rounds) / len(rounds)
