"""What a server's processes are and take, by Linux's /proc."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")

RANK = "rowcast.cluster.rank"


def descendants(pid: int) -> list[int]:
    """Of a process, itself first."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found = [pid]
    for each in found:
        found.extend(children.get(each, ()))
    return found


def ranks(pid: int) -> list[int]:
    """Of a server, those of its processes that run the model."""
    found = []
    for each in descendants(pid):
        if RANK in _read(each, "cmdline"):
            found.append(each)
    return found


def resident_mib(pid: int) -> dict[str, float]:
    """Of a server's processes, by what they are. Pages that they share count in each."""
    found = {}
    for name, each in _named(pid).items():
        for line in _read(each, "status").splitlines():
            if line.startswith("VmRSS:"):
                found[name] = round(int(line.split()[1]) / 1024, 1)
    return found


def cpu_s(pid: int) -> dict[str, float]:
    """Processor time of a server's processes so far, by what they are."""
    found = {}
    for name, each in _named(pid).items():
        if fields := _read(each, "stat").rpartition(")")[2].split():
            found[name] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


def _named(pid: int) -> dict[str, int]:
    of_ranks = ranks(pid)
    return {
        "server" if each == pid else f"rank {of_ranks.index(each)}" if each in of_ranks else f"other {each}": each
        for each in descendants(pid)
    }


def _read(pid: int, name: str) -> str:
    """Empty for a process that has just ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except OSError:
        return ""


class Watch(Generic[T]):
    """Calls a function every so often, in a thread, and keeps what it returns with the time."""

    def __init__(self, look: Callable[[], T], every_s: float) -> None:
        self.seen: list[tuple[float, T]] = []
        self._look = look
        self._every_s = every_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch[T]:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.is_set():
            self.seen.append((time.perf_counter(), self._look()))
            self._over.wait(self._every_s)
