"""A plan's forecast beside what its engine measured."""

from __future__ import annotations

import torch

from rowcast.placement import corrections
from rowcast.placement.here import is_here
from rowcast.placement.report import PlanReport, compare
from rowcast.runtime import device as devices
from rowcast.runtime import gpu_ceiling
from rowcast.runtime.engine import Engine


def plan_report(engine: Engine, *, remember: bool) -> PlanReport | None:
    """None for a plan with neither a forecast nor a ceiling, and before anything was generated.

    `remember`: where the plan was made for this machine, what it was off by goes into the machine's cache.
    """
    plan = engine.plan
    if plan.forecast is None and not plan.ceiling_bytes:
        return None
    device, _ = devices.choose_device(plan.device)
    allocated = reserved = driver = None
    if device.type == "cuda" and plan.world == 1:  # else ranks hold it, and not this process
        driver = gpu_ceiling.peak_bytes(device)
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    report = compare(plan, engine.pace.measured(allocated, reserved, driver))
    disk = "disk" in plan.places()  # what that is off by is none of the planner's business
    if report is not None and remember and report.ratios and plan.forecast and is_here(plan.forecast.gpus) and not disk:
        corrections.remember(plan, report.ratios)
    return report
