"""What scorers there are, and which sparse rungs a model and a calibration allow. Torch-free."""

from __future__ import annotations

from typing import get_args

from rowcast.errors import UserError
from rowcast.runtime.ladder.spec import Rung, ScorerName
from rowcast.runtime.sparse.artefact import Calibration
from rowcast.runtime.spec import ModelSpec

DIRECTIONS = "head.directions"
"""Of the LM head, in a calibration."""

AHEAD = "-ahead"
"""Ending of the names of scorers that read the attention's input."""

BITS = {"q2": 2, "q3": 3, "q4": 4, "q8": 8}
FITTED = ("lowrank", "dejavu")
"""Scorers whose factors a calibration holds."""

HEAD_BITS = (4, 3)
"""Of the LM head's first proxy and its refinement: fewest bytes on SmolLM2 for k of 1 to 64 (benchmarks/certified_head.py)."""
UNDIRECTED_HEAD_BITS = (8,)
"""Where no directions are known: 4 and 3 bits then read twice as much, as their bounds hardly bite."""


def needs_calibration(by: str) -> bool:
    """Whether a scorer of that name cannot be made from the weights alone."""
    return by.removesuffix(AHEAD) in FITTED or by.endswith(AHEAD)


def check_scorer(by: str, spec: ModelSpec, calibration: Calibration | None) -> None:
    """Raise UserError where a model has no scorer of that name, or its calibration is missing or lacks it."""
    if by not in get_args(ScorerName):
        raise UserError(f"by={by!r:.60} is not a scorer; choose one of {', '.join(get_args(ScorerName))}")
    if by == "gate" and not spec.gated:
        raise UserError(f"by=gate needs a gated MLP, and {spec.family} has none; use by=q4")
    if not needs_calibration(by):
        return
    if calibration is None:
        raise UserError(f"by={by} needs a calibration; make one with rowcast calibrate and give --calibration DIR, or use by=q4")
    tensor = f"layers.0.{by}.a" if by.removesuffix(AHEAD) in FITTED else "layers.0.ahead.matrix"
    if tensor not in calibration:
        raise UserError(f"the calibration {calibration.path} has no scorer {by}; run rowcast calibrate again, or use by=q4")


def check_rung(rung: Rung, spec: ModelSpec, calibration: Calibration | None) -> None:
    """Raise UserError where a sparse rung cannot be had of this model, or lacks its calibration."""
    if rung.mlp is not None:
        check_scorer(rung.by or "q4", spec, calibration)
        _check_cut(rung, calibration)
    if rung.heads is None:
        return
    if calibration is None:
        raise UserError(f"heads={rung.heads} needs a calibration; make one with rowcast calibrate and give --calibration DIR")
    if "layers.0.heads.own.weight" not in calibration:
        raise UserError(
            f"the calibration {calibration.path} does not tell heads apart; run rowcast calibrate again, or leave heads out"
        )
    if rung.heads_by == "ahead" and spec.num_layers > 1 and "layers.1.heads.ahead.weight" not in calibration:
        raise UserError(
            f"the calibration {calibration.path} does not tell heads apart by the layer before; run rowcast calibrate again, or use "
            "heads_by=own"
        )


def _check_cut(rung: Rung, calibration: Calibration | None) -> None:
    given = "cut=threshold" if rung.cut == "threshold" else f"common={rung.common}" if rung.common else None
    if given is None:
        return
    if calibration is None:
        raise UserError(
            f"{given} needs a calibration; make one with rowcast calibrate and give --calibration DIR, or leave it out"
        )
    by = rung.by or "q4"
    if rung.cut == "threshold" and f"layers.0.{by}.thresholds" not in calibration and calibration.levels(by) is None:
        raise UserError(
            f"the calibration {calibration.path} has no thresholds of {by}; run rowcast calibrate again, or use cut=top"
        )
    if "layers.0.frequency" not in calibration and rung.common:
        raise UserError(
            f"the calibration {calibration.path} has no frequencies; run rowcast calibrate again, or leave common out"
        )
    assert rung.mlp is not None
    if rung.cut == "threshold" and rung.mlp < calibration.densities[0]:
        raise UserError(
            f"mlp={rung.mlp} is below {calibration.densities[0]}, the least density that the calibration {calibration.path} has "
            "thresholds for; raise mlp to that or more, or use cut=top"
        )


def head_bits(calibration: Calibration | None) -> tuple[int, ...]:
    """Of the LM head's proxies."""
    return HEAD_BITS if calibration is not None and DIRECTIONS in calibration else UNDIRECTED_HEAD_BITS
