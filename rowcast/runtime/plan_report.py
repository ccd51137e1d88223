"""A plan's forecast beside what its engine measured."""

from __future__ import annotations

import torch

from rowcast.placement import corrections
from rowcast.placement.here import is_here
from rowcast.placement.report import PlanReport, compare
from rowcast.runtime import device as devices
from rowcast.runtime.engine import Engine


def plan_report(engine: Engine, *, remember: bool) -> PlanReport | None:
    """None for a plan without a forecast, and before anything was generated.

    `remember`: where the plan was made for this machine, what it was off by goes into the machine's cache.
    """
    plan = engine.plan
    if plan.forecast is None:
        return None
    device, _ = devices.choose_device(plan.device)
    allocated = reserved = None
    if device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    report = compare(plan, engine.pace.measured(allocated, reserved))
    if report is not None and remember and report.ratios and is_here(plan.forecast.gpus):
        corrections.remember(plan, report.ratios)
    return report
