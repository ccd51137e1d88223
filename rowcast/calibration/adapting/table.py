"""What adapting brought: the engine's own sparse passes of both models, before the original's dense ones, by density."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from rowcast.calibration.evaluate import drafts_of, laws_of
from rowcast.calibration.metrics import Laws
from rowcast.runtime.banks import BankWeights
from rowcast.runtime.checkpoint import Checkpoint
from rowcast.runtime.comm import SoloComm
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.ladder.spec import Rung, ScorerName
from rowcast.runtime.lowbit_weights import LowBitWeights
from rowcast.runtime.protocols import WeightView
from rowcast.runtime.sparse.artefact import Calibration
from rowcast.runtime.sparse.build import build_view
from rowcast.runtime.sparse.checks import check_rung

BY: tuple[ScorerName, ...] = ("oracle", "q4")
"""Exact choice, and what a rung uses where no calibration says otherwise."""


@dataclass(frozen=True, slots=True)
class Row:
    """One way to run one of the models."""

    model: str
    """original or adapted."""
    rung: str
    density: float
    by: str
    """What chooses; "": nothing does."""
    perplexity: float
    acceptance: float
    """sum(min(p, q)) with the original's dense law, by itself: all K/V are its own."""
    draft: float
    """The same with the model's own dense law, behind K/V of its dense passes (`drafts_of`): what its rung is worth."""
    used: float = math.nan
    """Mean share of the neurons that these tokens used."""


def measure(
    original: Checkpoint,
    adapted: Checkpoint,
    densities: Sequence[float],
    windows: Sequence[Sequence[int]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    bits: int | None = None,
    calibration: Calibration | None = None,
    advance: Callable[[], None] = lambda: None,
) -> list[Row]:
    """Both models with all neurons and with each of the densities below 1, by `BY`; with `bits` also in these.

    `windows`: token ids, at least 3 each, every token behind the second is predicted. `calibration`: the adapted model's, whose tokens
    then use neurons above its levels; the original's always use as many each. `advance` is called after each pass. Raises UserError
    for a density that the calibration has no levels for.
    """
    rungs = [Rung(kind="self", mlp=density, by=by) for by in BY for density in densities if density < 1]
    if calibration is not None:
        for rung in rungs:
            check_rung(replace(rung, cut="threshold"), spec_from_config(adapted.config), calibration)
    banks = {
        name: BankWeights(spec_from_config(one.config), one.source, SoloComm(), dtype=dtype, device=device)
        for name, one in (("original", original), ("adapted", adapted))
    }
    settings: dict[str, Any] = {"dtype": dtype, "device": device, "advance": advance}
    rows = []
    for name, bank in banks.items():
        views: dict[str, WeightView] = {"plain": bank}
        for rung in rungs:
            above = calibration is not None and name == "adapted"
            rung = replace(rung, cut="threshold") if above else rung
            views[str(rung)] = build_view(bank, rung, calibration if above else None)
        if bits is not None:
            source = (original if name == "original" else adapted).source
            rounded = LowBitWeights.beside(bank, source, SoloComm(), bits, dtype=dtype, device=device)
            views[str(Rung(kind="self", bits=bits))] = rounded  # type: ignore[arg-type]
        _, alone = laws_of(banks["original"], views, windows, **settings)
        used = {text: _used(view) for text, view in views.items()}
        drafts = drafts_of(bank, views, windows, **settings)
        rows += [_row(name, text, alone[text], drafts[text], used[text]) for text in views]
    return rows


def passes(densities: Sequence[float], windows: int, bits: int | None) -> int:
    """Of `measure`."""
    views = 1 + len(BY) * sum(density < 1 for density in densities) + (bits is not None)
    return 4 * (views + 1) * windows


def quality(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Of the adapted model's sparse rungs, as a calibration has it."""
    return {
        row.rung: {"perplexity": row.perplexity, "acceptance": row.acceptance, "draft_acceptance": row.draft}
        for row in rows
        if row.model == "adapted" and row.by
    }


def _used(view: WeightView) -> float:
    reads = view.reads()
    return reads.neurons / reads.neurons_of if reads.neurons_of else 1.0


def _row(model: str, text: str, alone: Laws, drafts: Laws, used: float) -> Row:
    rung = Rung.parse(text)
    return Row(model, text, rung.mlp or 1.0, rung.by or "", alone.perplexity, alone.acceptance, drafts.acceptance, used)


def lines(rows: Sequence[Row]) -> list[str]:
    """A table by density."""
    told = [f"{'model':9} {'rung':38} {'used':>6} {'perplexity':>10} {'acceptance':>10} {'as a draft':>10}"]
    told += [
        f"{row.model:9} {row.rung:38} {row.used:6.3f} {row.perplexity:10.2f} {row.acceptance:10.3f} {row.draft:10.3f}"
        for row in rows
    ]
    return told


def to_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def from_json(rows: Sequence[dict[str, Any]]) -> list[Row]:
    """What `to_json` made. Older versions told `own` in place of `draft`: by itself, before the model's own law."""
    known = {each.name for each in fields(Row)}
    return [Row(**{"draft": math.nan, **{key: value for key, value in row.items() if key in known}}) for row in rows]
