"""What a plan's notes tell of its ladder: what becomes of shares and of bits, and what is known of its output's quality."""

from __future__ import annotations

from dataclasses import replace
from shlex import quote

from rowcast.placement.plan import Plan
from rowcast.runtime.ladder.presets import Circumstances
from rowcast.runtime.ladder.spec import Ladder, Rung
from rowcast.runtime.lowbit_sizes import HEAD_BITS
from rowcast.runtime.sparse.artefact import Calibration
from rowcast.runtime.spec import ModelSpec

OWN_CALIBRATION = "calibration: the model's own"
"""How a plan's note of it begins."""
_REACHED = 0.01
"""Shares that are missed by more, as there are no parts of heads and neurons, are told."""


def with_own(plan: Plan, own: Calibration | None) -> Plan:
    """The plan, with a note where it reads a calibration that nobody gave: `own`, the model's."""
    if own is None or not plan.calibration:
        return plan
    return replace(plan, notes=[*plan.notes, f"{OWN_CALIBRATION} ({own.path})"])


def quality(rung: Rung, calibration: Calibration | None, model: str) -> str:
    """What the calibration measured of this rung, or that it did not and how to."""
    known = {} if calibration is None else calibration.description.get("quality", {})
    found, dense = known.get(str(rung)), known.get("dense")
    if found is None or dense is None:
        reads = "" if calibration is None else f" --calibration {quote(str(calibration.path))}"
        run = f"rowcast eval {quote(model)} --text FILE --ladder {quote(str(rung))}{reads}"
        return f"mode approximate: the quality of {rung} was not measured: run {run}"
    return (
        f"mode approximate: with {rung} the calibration measured perplexity {found['perplexity']:.2f}, with all weights "
        f"{dense['perplexity']:.2f}, and acceptance {found['acceptance']:.3f}"
    )


def reached_shares(ladder: Ladder, spec: ModelSpec) -> list[str]:
    """What becomes of shares that are no whole number of heads or neurons."""
    told = []
    for rung in ladder.rungs:
        for key, share, total in (("heads", rung.heads, spec.num_heads), ("mlp", rung.mlp, spec.intermediate_size)):
            kept = 0 if share is None else max(1, round(share * total))
            if share is not None and abs(kept / total - share) > _REACHED:
                told.append(f"rung {rung}: {key}={share} of {total} is {kept}, a share of {kept / total:.3g}")
    return told


def rounded(ladder: Ladder, here: Circumstances) -> list[str]:
    """What becomes of the weights of low-bit rungs."""
    told, whole = [], here.pass_bytes(Rung(kind="plain"))
    for rung in dict.fromkeys(rung.weights for rung in ladder.rungs if rung.bits is not None):
        assert rung is not None and rung.bits is not None
        told.append(
            f"rung {rung}: weights are rounded to {rung.bits} bits while they are loaded, those of the LM head to "
            f"{HEAD_BITS[rung.bits]}; a pass reads {here.pass_bytes(rung) / whole:.2f} of what a plain one does"
        )
    return told
