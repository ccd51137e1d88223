"""What of a plan no engine can do yet, by name. Torch-free."""

from __future__ import annotations

import re

from rowcast.placement.forecast import Forecast
from rowcast.placement.layout import divides
from rowcast.placement.plan import Plan
from rowcast.runtime.spec import ModelSpec

NOT_YET = "no engine executes this plan yet"
"""Begins the note of a plan that is such."""

_TIERS = {
    "streamed": "streamed from host memory",
    "rows": "fetched by rows from host memory",
    "cpu": "computed on the CPU",
    "peer": "held by another GPU",
    "host": "in host memory",
    "disk": "read from disk",
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
    for part, tier in _away(forecast):
        told = f"{part} {_TIERS[tier]}"
        if tier not in (_DONE_PACKED if plan.weights == "packed" else _DONE).get(part, ()):
            found.append(told)
        elif tier in ("disk", "peer") and world > 1:
            found.append(f"{told} by {world} ranks")
        elif why := _why_not(part, tier, plan.ladder):
            found.append(f"{told} under a rung that {why}")
    held = [
        {share.layer for share in forecast.shares if share.tier == tier and share.part == "neurons"} for tier in ("rows", "peer")
    ]
    if held[0] & held[1]:
        found.append("rows of one layer both in host memory and held by another GPU")
    parts = sorted({share.part for share in forecast.shares if share.tier == "disk" and share.count < share.of})
    return found + [f"a layer's {part} in part read from disk" for part in parts]


def instead(plan: Plan, spec: ModelSpec) -> str:
    """What to plan for where `not_yet` found something, in the words of the command line. `spec`: of the plan's model."""
    forecast = plan.forecast
    if forecast is None or forecast.pipeline_stages == 1:
        return "plan for one GPU that holds it all"
    gpus = forecast.tensor_parallel * forecast.pipeline_stages
    width = max(n for n in range(1, gpus + 1) if divides(spec, n))
    return f"plan for {'these' if width == gpus else width} GPUs with --tp {width}" if width > 1 else "plan for one GPU"


_DONE = {
    "attention": ("streamed", "disk"),
    "neurons": ("streamed", "rows", "cpu", "peer", "disk"),
    "LM head": ("streamed",),
    "embeddings": ("streamed", "host"),
    "KV": ("streamed",),
}
"""Where parts may lie beside the memory next to the compute."""
_DONE_PACKED = {part: tuple(tier for tier in tiers if tier in ("streamed", "host")) for part, tiers in _DONE.items()}
"""Likewise, of weights that are packed."""

_NEEDS = {
    "attention": (r"\bheads=", "chooses heads"),
    "neurons": (r"\bby=gate\b", "reads the gate exactly"),
    "LM head": (r"\blm=hire\b", "chooses rows of the LM head"),
    "KV": (r"\bheads=", "chooses heads"),
}
"""What some rungs want of a part that lies there: settings of such rungs, and what these do."""


def _why_not(part: str, tier: str, ladder: list[str]) -> str | None:
    """Why the ladder cannot run with this part away; None: it can."""
    setting, does = (r"\b(mlp|heads|lm)=", "chooses rows") if tier == "disk" else _NEEDS.get(part, ("$^", ""))
    if any(re.search(setting, rung) for rung in ladder):
        return does
    if part not in ("KV", "embeddings") and not any(_reads_whole(rung) for rung in ladder):
        return "reads low-bit weights, the only ones that there are"
    return None


def _reads_whole(rung: str) -> bool:
    """Whether it reads the target's weights in their own format."""
    return rung.startswith(("plain", "self")) and "bits=" not in rung


def _away(forecast: Forecast) -> list[tuple[str, str]]:
    """Parts that do not lie next to the compute, each with its tier, in the forecast's order."""
    seen = ((share.part, share.tier) for share in forecast.shares if share.tier != "resident" and share.count)
    return list(dict.fromkeys(seen))
