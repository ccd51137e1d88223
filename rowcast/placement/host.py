"""What the operating system says of this machine's CPU side. Torch-free. Linux; elsewhere what Python knows.

A container's limit counts as the machine's memory and cores: nothing more can be had.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rowcast.placement.hardware import GIB, PINNABLE_SHARE

WSL_PINNABLE_BYTES = GIB
"""Assumed on WSL 2, whose driver limits pinned memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """One host at the time of asking."""

    cpu: str
    cores: int
    """Logical ones that this process may use."""
    numa_nodes: int
    memory_bytes: int
    available_bytes: int
    """What may be taken without swapping."""
    memlock_bytes: int | None
    """The limit on locked memory (`ulimit -l`); None: there is none. NVIDIA's driver on Linux pins beyond it."""
    wsl: bool

    @property
    def pinnable_bytes(self) -> int:
        """What may be pinned for GPUs, where no attempt has said less."""
        free = min(int(self.memory_bytes * PINNABLE_SHARE), self.available_bytes)
        return min(free, WSL_PINNABLE_BYTES) if self.wsl else free


def read(root: Path = Path("/")) -> HostFacts:
    """`root`: where /proc and /sys lie."""
    memory = _meminfo(root)
    total = memory.get("MemTotal") or _sysconf("SC_PHYS_PAGES")
    available = memory.get("MemAvailable") or _sysconf("SC_AVPHYS_PAGES")
    limit, used = _group_memory(root)
    if limit is not None and limit < total:
        total, available = limit, min(available, max(limit - used, 0))
    return HostFacts(
        cpu=cpu_model(root),
        cores=_cores(root),
        numa_nodes=max(1, len(list((root / "sys/devices/system/node").glob("node[0-9]*")))),
        memory_bytes=total,
        available_bytes=available,
        memlock_bytes=_memlock(),
        wsl="microsoft" in _text(root / "proc/sys/kernel/osrelease").lower(),
    )


def cpu_model(root: Path = Path("/")) -> str:
    """As the kernel names it."""
    for line in _text(root / "proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores(root: Path) -> int:
    """Of the affinity mask, and no more than the container's quota."""
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota, _, period = _text(root / "sys/fs/cgroup/cpu.max").strip().partition(" ")
    if quota.isdigit() and period.isdigit() and int(period):
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def _group_memory(root: Path) -> tuple[int | None, int]:
    """The container's limit, None without one, and what it uses beside what the kernel would give back."""
    for folder, limit, used, total in (
        ("sys/fs/cgroup", "memory.max", "memory.current", ""),
        ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        most, now = (_text(root / folder / name).strip() for name in (limit, used))
        if most.isdigit() and now.isdigit():
            stat = dict(line.split(" ", 1) for line in _text(root / folder / "memory.stat").splitlines() if " " in line)
            cached = (stat.get(f"{total}{pages}_file", "0") for pages in ("inactive", "active"))
            return int(most), max(0, int(now) - sum(int(count) for count in cached if count.isdigit()))
    return None, 0


def _meminfo(root: Path) -> dict[str, int]:
    """Bytes by name."""
    found = {}
    for line in _text(root / "proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdigit():
            found[name] = int(words[0]) * (1024 if words[1:] == ["kB"] else 1)
    return found


def _memlock() -> int | None:
    try:
        import resource
    except ImportError:  # Not on every system.
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def _sysconf(pages: str) -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf(pages)


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
