"""How far predictions were off on this machine, by model, number format and rung: kept in its cache for the next plan. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping

from rowcast.placement import cache
from rowcast.placement.forecast import Forecast
from rowcast.placement.plan import Plan

_CREDIBLE = (0.25, 4.0)
"""A ratio beyond these tells of another machine, or of one that did something else, such as other work on the same cores."""


def remembered(spec: str, dtype: str, device: str, origin: str) -> dict[str, float]:
    """By a rung's text, measured seconds of its passes over predicted ones: the median of this machine's latest runs.

    `spec`: digest of the model's shape. `device`: cpu or cuda. `origin`: of the memory rate that predictions rest on, since a ratio to
    a datasheet's figure is not one to a measured figure.
    """
    start = _kind(spec, dtype, device, origin, "")
    return {kind.removeprefix(start): ratio for kind, ratio in cache.corrections().items() if kind.startswith(start)}


def remember(plan: Plan, ratios: Mapping[str, float]) -> None:
    """Keep a run's ratios; those that cannot be believed are left out. Precondition: the plan has a forecast, for this machine."""
    assert plan.forecast is not None
    low, high = _CREDIBLE
    for rung, ratio in ratios.items():
        if low <= ratio <= high:
            kind = _kind(plan.spec, plan.dtype, plan.device.partition(":")[0], rate_origin(plan.forecast), rung)
            cache.add_correction(kind, predicted=1.0, measured=ratio)


def rate_origin(forecast: Forecast) -> str:
    """Of the memory rate that the first rank is predicted by."""
    return next((each.origin for each in forecast.inputs if each.name.endswith(MEMORY_RATE)), "assumed")


MEMORY_RATE = ": memory rate, bytes/s"
"""Ends the name of the input that is a card's memory rate."""


def _kind(*parts: str) -> str:
    return " ".join(parts)
