"""How far predictions were off on this machine, by model, number format, ladder and rung: kept for the next plan. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Mapping

from rowcast.placement import cache
from rowcast.placement.forecast import Forecast
from rowcast.placement.plan import Plan

_CREDIBLE = (0.25, 4.0)
"""A ratio beyond these tells of another machine, or of one that did something else, such as other work on the same cores."""


def kind_of(rung: str, ladder: str) -> str:
    """What a correction is of: a rung alone, or one of a ladder, with any gammas. A last rung that judges several tokens at once is off
    by another ratio than one that decodes."""
    alone = _GAMMA.sub("", rung)
    return alone if rung == ladder else f"{alone} in {_GAMMA.sub('', ladder)}"


def factor(corrections: Mapping[str, float] | None, rung: str, ladder: str) -> float | None:
    """That of a rung of a ladder; of one that was never run there, its own alone; None where there is none."""
    known = corrections or {}
    return known.get(kind_of(rung, ladder), known.get(kind_of(rung, rung)))


_GAMMA = re.compile(r":gamma=\d+(?=[ /]|$)|(?<=:)gamma=\d+,|,gamma=\d+")


def remembered(spec: str, dtype: str, device: str, origin: str) -> dict[str, float]:
    """By kind (`kind_of`), measured seconds of its passes over predicted ones: the median of this machine's latest runs.

    `spec`: digest of the model's shape. `device`: cpu or cuda. `origin`: of the memory rate that predictions rest on, since a ratio to
    a datasheet's figure is not one to a measured figure.
    """
    start = _kind(spec, dtype, device, origin, "")
    return {kind.removeprefix(start): ratio for kind, ratio in cache.corrections().items() if kind.startswith(start)}


def remember(plan: Plan, ratios: Mapping[str, float]) -> None:
    """Keep a run's ratios; those that cannot be believed are left out. Precondition: the plan has a forecast, for this machine."""
    assert plan.forecast is not None
    low, high = _CREDIBLE
    for what, ratio in ratios.items():
        if low <= ratio <= high:
            kind = _kind(plan.spec, plan.dtype, plan.device.partition(":")[0], rate_origin(plan.forecast), what)
            cache.add_correction(kind, predicted=1.0, measured=ratio)


def rate_origin(forecast: Forecast) -> str:
    """Of the memory rate that the first rank is predicted by."""
    return next((each.origin for each in forecast.inputs if each.name.endswith(MEMORY_RATE)), "assumed")


MEMORY_RATE = ": memory rate, bytes/s"
"""Ends the name of the input that is a card's memory rate."""


def _kind(*parts: str) -> str:
    return " ".join(parts)
