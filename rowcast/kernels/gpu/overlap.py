"""Launches that overlap (programmatic dependent launch): a kernel starts while the one before it on its stream ends.

A kernel compiled with OVERLAP calls `gdc_wait` before it reads what kernels before it wrote, and every program of it does, since its
own end tells the next kernel that these have ended, too. It calls `gdc_launch_dependents` when its loads are done: earlier, programs of
the next kernel would take shared memory away from its own. One of few or short programs, a selection or a norm, does so at once. A
low-bit product whose programs fill the GPU does so once it has waited: then the next one's take the places of those that end, and read
weights.
Kernels that know nothing of this may stand before and behind it.

Before the wait a kernel reads weights, and ids, counts and tables only where another kernel, which waited before it let the next one
start, stands between the one that wrote them and this one. So a kernel that writes weights must not call `gdc_launch_dependents`.
"""

from __future__ import annotations

from functools import cache
from typing import Final

import torch
from torch import Tensor

from rowcast.settings import settings

_FIRST_CAPABILITY: Final = (9, 0)


@cache
def overlaps(device: torch.device) -> bool:
    """Whether launches on this device overlap: where it can, unless ROWCAST_GPU_OVERLAP is 0. Asked once a device."""
    return device.type == "cuda" and settings().gpu_overlap and torch.cuda.get_device_capability(device) >= _FIRST_CAPABILITY


def overlap(x: Tensor) -> dict[str, bool]:
    """Arguments of a launch for tensors on x's device: the constant OVERLAP, and the launch's attribute."""
    return {"OVERLAP": True, "launch_pdl": True} if overlaps(x.device) else {"OVERLAP": False}
