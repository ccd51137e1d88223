"""What passes between the passes of rounds that a device runs by itself: noted as they run, or kernel by kernel in a profile."""

from __future__ import annotations

import json
import tempfile
import time
from bisect import bisect
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from rowcast.runtime.device_round.rounds import DeviceRounds

_PASS = "pass of a round"


@dataclass(slots=True)
class _Round:
    """Marks of the device are events on a GPU, seconds elsewhere."""

    passes: list[Any] = field(default_factory=list)
    """Start and end of each, in order."""
    chosen: Any = None
    """When chunks were chosen behind the last one; None: nothing was."""
    launched_s: float = 0.0
    answered_s: float = 0.0
    """When the host began to launch it, and when it had the result."""


class Timeline:
    """Notes rounds from now on. Precondition: rungs below the last one draft in them, so that none is launched ahead."""

    def __init__(self, rounds: DeviceRounds) -> None:
        self._rounds: list[_Round] = []
        noted: Any = rounds
        run, clock, state, refresh = noted.run, noted._clock, noted._state, noted._refresh

        def noting_run(*args: Any, **options: Any) -> Any:
            self._rounds.append(_Round())
            return run(*args, **options)

        def noting_clock() -> Any:
            now = self._rounds[-1]
            now.launched_s = now.launched_s or time.perf_counter()
            now.passes.append(clock())
            return now.passes[-1]

        def noting_state(batch: int, most: int) -> Any:
            found = state(batch, most)
            if "read" not in vars(found):
                read = found.read

                def noting_read() -> Any:
                    result = read()
                    self._rounds[-1].answered_s = time.perf_counter()
                    return result

                found.read = noting_read
            return found

        noted.run, noted._clock, noted._state = noting_run, noting_clock, noting_state
        if refresh is not None:
            choose = refresh.run

            def noting_choose(*args: Any) -> None:
                choose(*args)
                self._rounds[-1].chosen = clock()

            refresh.run = noting_choose

    def clear(self) -> None:
        """Forget what was noted."""
        self._rounds.clear()

    def seconds(self) -> dict[str, float]:
        """Of a round, on average: the device from one of its passes to the next (`gaps`), behind its last pass (`chunks`), waiting for
        the next round (`waits`); and the host from a round's result to the launch of the next one (`host`). Empty before two rounds.
        Waits for the device."""
        if len(self._rounds) < 2:
            return {}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found: dict[str, list[float]] = defaultdict(list)
        for this, following in pairwise(self._rounds):
            ends, starts = this.passes[1::2], this.passes[2::2]
            last = ends[-1] if this.chosen is None else this.chosen
            found["gaps"].append(sum(_from(end, start) for end, start in zip(ends, starts, strict=False)))
            found["chunks"].append(_from(ends[-1], last))
            found["waits"].append(_from(last, following.passes[0]))
            found["host"].append(following.launched_s - this.answered_s)
        return {name: fmean(each) for name, each in found.items()}


def _from(start: Any, end: Any) -> float:
    return float(end - start) if isinstance(start, float) else float(start.elapsed_time(end)) * 1e-3


@dataclass(frozen=True, slots=True)
class Kernel:
    """One that ran outside of passes, copies and fills included."""

    name: str
    calls: float
    """Of a round, as are `seconds`."""
    seconds: float


def profiled(rounds: DeviceRounds, step: Callable[[], object], times: int) -> list[Kernel]:
    """What a GPU runs outside of passes in so many steps, the longest first."""
    noted: Any = rounds
    run = noted._run

    def marked(*args: Any) -> Any:
        with torch.profiler.record_function(_PASS):
            return run(*args)

    noted._run = marked
    try:
        with torch.profiler.profile() as profile:
            for _ in range(times):
                step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
    finally:
        noted._run = run
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return outside(json.loads(path.read_text())["traceEvents"], times)


def outside(events: Iterable[Mapping[str, Any]], times: int) -> list[Kernel]:
    """Of a profile's events: the device's that no call in a marked pass launched, as each of `times` rounds has them."""
    events = list(events)
    spans = sorted(
        (each["ts"], each["ts"] + each["dur"])
        for each in events
        if each.get("name") == _PASS and each["cat"] == "user_annotation"
    )
    starts = [start for start, _ in spans]
    launched = {
        each["args"]["correlation"]: each["ts"]
        for each in events
        if each.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in each.get("args", {})
    }

    def in_a_pass(correlation: int) -> bool:
        at = launched.get(correlation)
        if at is None:
            return False
        place = bisect(starts, at) - 1
        return place >= 0 and at <= spans[place][1]

    found: dict[str, list[float]] = defaultdict(list)
    for each in events:
        if each.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") and not in_a_pass(each["args"]["correlation"]):
            found[each["name"]].append(each["dur"] * 1e-6)
    kernels = [Kernel(name, len(each) / times, sum(each) / times) for name, each in found.items()]
    return sorted(kernels, key=lambda kernel: -kernel.seconds)
