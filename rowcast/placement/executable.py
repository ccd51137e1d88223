"""What of a plan no engine can do yet, by name. Torch-free."""

from __future__ import annotations

from rowcast.placement.forecast import Forecast
from rowcast.placement.plan import Plan

_TIERS = {
    "streamed": "streamed from host memory",
    "rows": "fetched by rows from host memory",
    "cpu": "computed on the CPU",
    "peer": "held by another GPU",
    "host": "in host memory",
}
"""All but resident."""


def not_yet(plan: Plan, world: int = 1) -> list[str]:
    """Parts of a sentence, such as "tensor parallelism over 4 GPUs"; empty: `world` ranks can execute it."""
    forecast = plan.forecast
    if forecast is None:
        return []
    found = []
    if forecast.tensor_parallel not in (1, world):
        found.append(f"tensor parallelism over {forecast.tensor_parallel} GPUs")
    if forecast.pipeline_stages > 1:
        found.append(f"a pipeline of {forecast.pipeline_stages} stages")
    return found + [f"{part} {_TIERS[tier]}" for part, tier in _away(forecast)]


def _away(forecast: Forecast) -> list[tuple[str, str]]:
    """Parts that do not lie next to the compute, each with its tier, in the forecast's order."""
    seen = ((share.part, share.tier) for share in forecast.shares if share.tier != "resident" and share.count)
    return list(dict.fromkeys(seen))
