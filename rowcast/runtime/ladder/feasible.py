"""Which ladders a model, its calibration and a context allow: what presets look at, and what is refused. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import ceil, gcd
from typing import get_args

from rowcast.errors import UserError
from rowcast.runtime.kv.sizes import why_not_streaming
from rowcast.runtime.ladder.memory import DraftModel
from rowcast.runtime.ladder.presets import DENSITY, Calibrated
from rowcast.runtime.ladder.spec import Cut, Ladder, Rung, ScorerName
from rowcast.runtime.sparse.artefact import Calibration
from rowcast.runtime.sparse.checks import check_rung
from rowcast.runtime.spec import ModelSpec

_SCORERS: tuple[ScorerName, ...] = ("q4", "dejavu", "lowrank")
"""Of those that read the MLP's input, what rungs use that name none."""


def offered(calibration: Calibration) -> Calibrated:
    """What presets look at."""
    density = calibration.description.get("density")
    return Calibrated(
        scorers=_ranked(calibration, density or DENSITY),
        density=density,
        heads="layers.0.heads.own.weight" in calibration,
        over=_over(calibration, density or DENSITY),
        levels=tuple(by for by in get_args(ScorerName) if calibration.levels(by) is not None),
        predictors="layers.0.dejavu.a" in calibration,
        least=calibration.densities[0],
    )


def _ranked(calibration: Calibration, density: float) -> tuple[ScorerName, ...]:
    """The scorers that it measured, by acceptance at the judged density nearest to `density`, with levels where it measured that; q4
    alone where it measured none."""
    acceptance: dict[ScorerName, float] = {}
    distance: dict[ScorerName, tuple[float, bool]] = {}
    for text, figures in calibration.description.get("quality", {}).items():
        rung = None if text == "dense" else Ladder.parse(text).rungs[0]
        if rung is None or rung.by not in _SCORERS or rung != Rung(kind="self", mlp=rung.mlp, by=rung.by, cut=rung.cut):
            continue
        assert rung.mlp is not None
        runs: Cut = "top" if calibration.levels(rung.by) is None else "threshold"
        away = abs(rung.mlp - density), rung.cut != runs
        if away < distance.get(rung.by, (1.0, False)):
            distance[rung.by], acceptance[rung.by] = away, figures["acceptance"]
    return tuple(sorted(acceptance, key=lambda by: -acceptance[by])) or ("q4",)


def _over(calibration: Calibration, density: float) -> float | None:
    """Candidates over kept neurons with which q4 reaches the calibration's recall, in hundredths, at the judged density nearest."""
    judged: list[float] = calibration.description.get("judged", [])
    found: dict[str, list[float]] | None = calibration.description.get("scorers", {}).get("q4")
    if found is None:
        return None
    _, over = min(zip(judged, found["over"], strict=True), key=lambda pair: abs(pair[0] - density))
    return ceil(over * 100) / 100


def check_density(density: float | None) -> None:
    if density is None:
        return
    try:
        Rung(kind="self", mlp=density)
    except UserError as error:
        raise UserError(f"density={density!r:.60} is not a share of the neurons: give a number above 0 and up to 1") from error


def check_sparse(ladder: Ladder, spec: ModelSpec, calibration: Calibration | None, optional: bool) -> None:
    """Raises UserError for a rung that the model or the calibration has no scorer for, and for a calibration that nothing reads, unless
    it is `optional`, as under `auto` and where it is the model's own."""
    sparse = [rung for rung in ladder.rungs if rung.sparse]
    for rung in sparse:
        check_rung(rung, spec, calibration)
    if calibration is not None and not sparse and not optional:
        raise UserError(
            f"calibration={calibration.path} has no place in the ladder {str(ladder)!r:.80}, as no rung is sparse: leave it out, or "
            "use auto, dejavu or hire"
        )


def check_kv_budget(kv_budget: int | None) -> None:
    if kv_budget is None:
        return
    if kv_budget < 1:
        raise UserError(f"kv_budget={kv_budget} is not a number of KV entries: give one from 95 to less than the context")
    try:
        Rung(kind="self", kv=kv_budget)
    except UserError as error:
        raise UserError(f"kv_budget={kv_budget}: {error}") from error


def check_views(ladder: Ladder, max_context: int) -> None:
    """Raises UserError for a rung self that sees whatever plain sees."""
    for rung in ladder.lower:
        if rung.kind == "self" and rung.kv is not None and rung.kv >= max_context:
            raise UserError(
                f"kv={rung.kv} of the rung self is not less than the context of {max_context} tokens: use a smaller kv in the ladder, "
                "or a smaller kv_budget=, or a longer context"
            )


def possible(rung: Rung, drafts: Mapping[str, DraftModel], block_size: int, adaptive: bool, notes: list[str]) -> Rung:
    """The rung; under `auto`, as its model and the KV blocks allow it. Raises UserError for a draft that cannot be streamed."""
    if adaptive and rung.retrieves:
        return replace(rung, chunk=gcd(rung.chunk, block_size))
    if rung.model is None or rung.kv is None or (reason := why_not_streaming(drafts[rung.model].spec)) is None:
        return rung
    if not adaptive:
        raise UserError(f"the draft {rung.model} cannot have a streaming cache of kv={rung.kv} entries ({reason}): use kv=full")
    notes.append(f"rung draft with all of its KV: {reason}")
    return Rung(kind="draft", model=rung.model, kv=None)
