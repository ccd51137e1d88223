"""What several benchmarks share: figures beside floor, peers and plan, what was claimed of them, a table and a line of JSON."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from rowcast.bench.gpu_timing import copy_bandwidth
from rowcast.bench.kernels import versions
from rowcast.bench.latency import read_bandwidth
from rowcast.errors import UserError
from rowcast.runtime.checkpoint import open_checkpoint
from rowcast.runtime.plan_for import MachineWish, plan_for


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One way to write a token, as it was timed."""

    name: str
    s_per_token: float
    ladder: str = ""
    bytes: float = 0.0
    """Read for a token, or moved: of one rank."""
    floor_s: float = 0.0
    """In which these could be had."""
    planned_s: float | None = None
    """What the planner foretold, for this machine; None: it was not asked, or had no plan."""
    peers: Mapping[str, float] = field(default_factory=dict)
    """Seconds of others for the same."""
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Claim:
    """What a figure is held against."""

    what: str
    value: float
    bound: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        return self.value <= self.bound if self.at_most else self.value >= self.bound


def known_versions() -> dict[str, str]:
    """Of what figures depend on."""
    return {name: each for name, each in versions().items() if each}


class Line:
    """A benchmark's line of JSON. Until it is told, SIGINT and SIGTERM tell what there is, with `cut_off`, and end the process with 130
    or 143, its spawned children before it; forked children tell nothing. Made in the main thread."""

    def __init__(self, report: Callable[[], Mapping[str, Any]]) -> None:
        self._report, self._process = report, os.getpid()
        self._before = {number: signal.signal(number, self._cut_off) for number in (signal.SIGINT, signal.SIGTERM)}

    def tell(self, **more: Any) -> None:
        """Print it, whole: signals are lost meanwhile, and afterwards do what they did before."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)
        print(json.dumps({**self._report(), **more}), flush=True)
        for number, before in self._before.items():
            signal.signal(number, before)

    def _cut_off(self, number: int, _: object) -> None:
        if os.getpid() == self._process:
            self.tell(cut_off=True)
            signal.signal(number, signal.SIG_IGN)  # `timeout` sends it twice
            for child in multiprocessing.active_children():  # the pool that is left waits for its own
                child.terminate()
        sys.exit(128 + number)


class Session:
    """What was found in one run, told as it comes."""

    def __init__(self, benchmark: str, model: str, device: torch.device | str, limit_s: float = 1e6, **more: Any) -> None:
        """`device`: a name where this process had better not touch it. `limit_s`: after which no part is begun. `more`: told beside the
        figures; of it `note` is what a reader of them has to know first: what was simulated, what was not run."""
        name = device if isinstance(device, str) else device_name(device)
        self.head: dict[str, Any] = {"benchmark": benchmark, "model": model, "device": name}
        self.head |= {"versions": known_versions(), **more}
        self.figures: list[Figure] = []
        self.claims: list[Claim] = []
        self.failed: list[str] = []
        self._began, self._limit_s = time.monotonic(), limit_s
        self._line = Line(self._report)

    @property
    def left_s(self) -> float:
        return self._limit_s - (time.monotonic() - self._began)

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._began:5.1f} s] {text}", file=sys.stderr, flush=True)

    def time_for(self, name: str, needs_s: float) -> bool:
        """Whether there is time for this part, which is told where there is none."""
        if self.left_s >= needs_s:
            return True
        self.fail(name, f"{self.left_s:.0f} s were left")
        return False

    def fail(self, name: str, why: object) -> None:
        """`why`: a sentence, or an error, of which the trace is told, too."""
        words = next(iter(str(why).strip().splitlines()), "") or type(why).__name__
        self.failed.append(f"{name}: {words[:200]}")
        self.say(self.failed[-1])
        if isinstance(why, Exception):
            traceback.print_exception(why, limit=-5, file=sys.stderr)

    def add(self, figure: Figure) -> Figure:
        self.figures.append(figure)
        self.say(told(figure))
        return figure

    def claim(self, what: str, value: float, bound: float, *, at_most: bool = False) -> None:
        self.claims.append(Claim(what, value, bound, at_most))
        limit = "at most" if at_most else "at least"
        self.say(f"{what}: {value:.3g}, {limit} {bound:g} wanted: {'met' if self.claims[-1].met else 'MISSED'}")

    def end(self) -> int:
        """The line of JSON, and the exit code: 1 where a part failed; what was claimed and missed is a result."""
        self._line.tell()
        return int(bool(self.failed))

    def _report(self) -> dict[str, Any]:
        report = {**self.head, "figures": [asdict(each) for each in self.figures]}
        return report | {"claims": [{**asdict(each), "met": each.met} for each in self.claims], "failed": self.failed}


def told(figure: Figure) -> str:
    """In one line."""
    parts = [f"{figure.name}: {figure.s_per_token * 1e3:.3f} ms a token"]
    if figure.floor_s:
        parts.append(
            f"{figure.bytes / 1e9:.3f} GB, floor {figure.floor_s * 1e3:.3f} ms ({figure.floor_s / figure.s_per_token:.2f})"
        )
    if figure.planned_s is not None:
        parts.append(f"planned {figure.planned_s * 1e3:.3f} ms ({figure.planned_s / figure.s_per_token - 1:+.0%})")
    parts += [f"{name} {each * 1e3:.2f} ms ({each / figure.s_per_token:.2f}x)" for name, each in figure.peers.items()]
    parts += [f"{name} {each:.4g}" if isinstance(each, float) else f"{name} {each}" for name, each in figure.more.items()]
    return ", ".join(parts)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def bandwidth(device: torch.device) -> float:
    """Bytes a second that floors are taken from."""
    return copy_bandwidth() if device.type == "cuda" else read_bandwidth("cpu")


def release() -> None:
    """Give back what a model held that is no more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def variant(shape: str, folder: Path, name: str, **changes: Any) -> str:
    """A well-known model's config with some fields changed, as a file, which `random:` and `open_shape` take; its path."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**open_checkpoint(f"random:{shape}").config, **changes}))
    return str(path)


def planned(model: str, ladder: str, *, gpus: str | None = None, gpu_memory: int | None = None, **wish: Any) -> float | None:
    """Seconds a token that the planner foretells; None where it has no plan, which is told. `gpus`: None: this machine's."""
    try:
        mode = "exact" if ladder.rstrip().endswith("plain") else "approximate"
        plan = plan_for(model, MachineWish(gpus=gpus, gpu_memory=gpu_memory), ladder=ladder, mode=mode, groups=2000, **wish)
    except UserError as error:
        print(f"no plan of {ladder}: {error}", file=sys.stderr, flush=True)
        return None
    assert plan.forecast is not None
    return plan.forecast.seconds_per_token
