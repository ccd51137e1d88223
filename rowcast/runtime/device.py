"""What this machine offers one rank: the device, the number format, the memory. Choices come back with their reason."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from rowcast.errors import UserError
from rowcast.placement.units import format_bytes
from rowcast.runtime import gpu_ceiling

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

GPU_SHARE = 0.9
"""Of a GPU's free memory that is used when no budget is given."""

HOST_SHARE = 0.8
"""Likewise of the host's available memory."""


def choose_device(asked: str, name: str = "device") -> tuple[torch.device, str]:
    """`asked` is auto, cpu, cuda or cuda:N -> (device, reason). `name`: of the argument. Raises UserError when it is not there."""
    if asked == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device()), "device cuda: a GPU is visible"
        return torch.device("cpu"), "device cpu: no GPU is visible"
    try:
        device = torch.device(asked)
    except RuntimeError:
        device = torch.device("meta")
    if device.type == "cpu":
        return torch.device("cpu"), "device cpu: asked for"
    if device.type != "cuda":
        raise UserError(f"{name}={asked!r:.60} is not known: use auto, cpu or cuda")
    visible = torch.cuda.device_count()
    index = device.index or 0
    if index >= visible:
        raise UserError(f"{name}={asked!r} is not there: {visible} GPUs are visible, use cpu or auto")
    return torch.device("cuda", index), f"device {device}: asked for"


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes it the thread's current device meanwhile, on which kernels are launched and streams are looked up."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def choose_dtype(asked: str, stored: str, device: torch.device) -> tuple[str, str]:
    """`asked` is auto or a name of DTYPES, `stored` the checkpoint's own format -> (name, reason)."""
    if asked != "auto":
        if asked not in DTYPES:
            raise UserError(f"dtype={asked!r} is not known: use auto, {', '.join(DTYPES)}")
        return asked, f"dtype {asked}: asked for"
    if device.type == "cpu":
        return "float32", "dtype float32: every CPU computes in it at full speed"
    if stored in ("bfloat16", "float16"):
        return stored, f"dtype {stored}: the checkpoint's own"
    return "bfloat16", f"dtype bfloat16: half the bytes of the checkpoint's {stored}"


def available_bytes(device: torch.device) -> int:
    """Memory that could be taken now: the GPU's free memory, or the host's, within its control group's limit."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    return max(0, min([*found, *_control_group_bytes(Path("/sys/fs/cgroup"))]))


def total_bytes(device: torch.device) -> int:
    """Memory of a GPU."""
    return int(torch.cuda.get_device_properties(device).total_memory)


def _control_group_bytes(root: Path) -> list[int]:
    """What this process's control group (version 2, or 1) still allows; empty without a limit. Cached file pages count as free."""
    for folder, limit, used, inactive in (
        (root, "memory.max", "memory.current", "inactive_file"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            bound, taken = (folder / limit).read_text().strip(), int((folder / used).read_text())
            pages = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if bound.isdigit():
            return [int(bound) - taken + int(pages.get(inactive, 0))]
    return []


def budget_bytes(device: torch.device, asked: int | None, limit: str, world: int = 1) -> tuple[int, str]:
    """(bytes of tensors that one of `world` ranks may take, reason). `limit`: gpu_memory or host_memory, which was asked for.

    What is asked of a GPU is a ceiling on all that a process takes of it: what lies beside tensors is taken off.
    """
    available = available_bytes(device)
    if asked is None:
        share = GPU_SHARE if device.type == "cuda" else HOST_SHARE
        budget, reason = int(available * share), f"budget: {share:.0%} of the memory that is free"
    else:
        budget, reason = asked, "budget: asked for"
        if device.type == "cuda":
            outside = gpu_ceiling.outside_bytes(device, world)
            budget, reason = asked - outside, f"{reason}, without {format_bytes(outside)} for the GPU's context and libraries"
            if budget <= 0:
                beside = f"the {format_bytes(outside)} that the GPU's context and libraries take"
                raise UserError(f"{limit}={format_bytes(asked)} is not more than {beside}: ask for more")
        if budget > available:
            free = f"the {format_bytes(available)} that are free on {device}"
            raise UserError(f"{limit}={format_bytes(asked)} is more than {free}: ask for less")
    return budget, reason
