"""The cases of `offload.py` in which weights lie elsewhere, as one rank runs them: streamed, filled, rows, peer, low bits."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _figures import device_name, release
from _simulated import SimulatedLLM
from offload_bus import all_rates, outside_bytes
from offload_places import Budget, placed, planned_bytes
from offload_profile import Varied

from rowcast import SamplingParams
from rowcast.bench.shapes import open_shape
from rowcast.cluster.distributed_comm import DistributedComm
from rowcast.placement.plan import Plan
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.gpu_ceiling import peak_bytes
from rowcast.runtime.llm import LLM
from rowcast.runtime.sparse.artefact import Calibration

TEMPERATURE = 100.0
"""Tokens are drawn as if all were alike: those of a shape mean nothing."""
STEP = 256
"""Most tokens of a pass: the room that larger ones take is left to weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What to run."""

    case: str
    model: str
    ranks: int
    cap_bytes: int
    """Of each GPU, by the driver's count."""
    cache: float
    """Share of the room for neurons that keeps fetched ones."""
    ladder: str
    calibration: str | None
    prompt: int
    tokens: int
    rates: tuple[float, ...]
    """Of low bits: simulated acceptances, one after the other."""
    gamma: int
    eager: bool
    profile: bool
    outside: int | None = None
    """As `Budget`'s."""

    @property
    def context(self) -> int:
        """Tokens of the longest sequence."""
        return self.prompt + max(4 * self.tokens, 8 * (self.gamma + 1))

    def placed(self, device: torch.device) -> tuple[Plan, Budget]:
        """What lies where, on GPUs or CPUs, within what budget."""
        spec = spec_from_config(open_shape(self.model).config)
        budget = Budget(self.cap_bytes, self.cache, self.context, device.type, STEP, self.ranks, self.outside)
        calibration = None if self.calibration is None else Calibration.open(self.calibration, None)
        return placed(self.case, spec, budget, self.ladder, calibration), budget


def run(wish: Wish, device: torch.device, comm: DistributedComm | None) -> dict[str, Any]:
    """Load, warm up, time; on all ranks alike."""
    rates = all_rates(device, comm)
    checkpoint = open_shape(wish.model, device=device)
    spec = spec_from_config(checkpoint.config)
    checkpoint = replace(checkpoint, source=Varied(spec, 0, device))
    wish = replace(wish, outside=outside_bytes(device, comm))
    plan, budget = wish.placed(device)
    plan = replace(plan, device=str(device), ceiling_bytes=wish.cap_bytes if device.type == "cuda" else 0)
    given: dict[str, Any] = {} if wish.calibration is None else {"calibration": Path(wish.calibration)}
    started = time.perf_counter()
    llm = SimulatedLLM(
        checkpoint,
        comm,
        plan=plan,
        tensor_parallel_size=wish.ranks,
        prefix_cache=False,
        progress=False,
        eager=wish.eager,
        **given,
    )
    found = {
        "model": wish.model,
        "gpu": device_name(device),
        "ranks": wish.ranks,
        "bus_rates": rates,
        "outside_bytes": wish.outside,
        "load_s": time.perf_counter() - started,
        "cap_bytes": wish.cap_bytes,
        "planned_bytes": planned_bytes(plan, spec, budget),
        "loading_bytes": loaded(device),
        "ladder": plan.ladder_text,
        "places": places(plan),
    }
    return found | (drafted(llm, wish) if wish.case == "lowbit" else timed(llm, wish)) | memory(llm, device)


def places(plan: Plan) -> dict[str, float]:
    """GB of a rank by tier."""
    found: dict[str, float] = {}
    assert plan.forecast is not None
    for share in plan.forecast.shares:
        found[share.tier] = found.get(share.tier, 0.0) + share.bytes / 1e9
    return found


def loaded(device: torch.device) -> int:
    """The most of its GPU that this rank took so far, by the driver's count; from here on what running takes is counted."""
    found = peak_bytes(device) if device.type == "cuda" else None
    release()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return 0 if found is None else found.bytes


def memory(llm: LLM, device: torch.device) -> dict[str, float]:
    """What this rank took since `loaded`."""
    on_gpu = device.type == "cuda"
    driver = peak_bytes(device) if on_gpu else None
    return {
        "gpu_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else 0,
        "driver_bytes": 0 if driver is None else driver.bytes,
        "host_bytes": llm.engine._executor.elsewhere.host_bytes,  # type: ignore[attr-defined]
    }


def timed(llm: LLM, wish: Wish) -> dict[str, Any]:
    """After two requests, so that graphs are captured and caches are warm."""
    elsewhere, vocabulary = llm.engine._executor.elsewhere, llm.spec.vocab_size  # type: ignore[attr-defined]

    def ask(seed: int, tokens: int) -> tuple[Any, Any]:
        ids = random.Random(seed).choices(range(vocabulary), k=wish.prompt)
        params = SamplingParams(temperature=TEMPERATURE, seed=seed, max_tokens=tokens, ignore_eos=True, detokenize=False)
        elsewhere.counts()
        [output] = llm.generate(ids, params)
        return output.metrics, elsewhere.counts()

    started = time.perf_counter()
    chooses = elsewhere.weights.pool is not None
    ask(0, 4 if chooses else 2)  # a pass that streams all has nothing more to warm
    if chooses:
        ask(1, 4)
    warm_s = time.perf_counter() - started
    first, prefill = ask(2, 1)
    metrics, counts = ask(3, 1 + wish.tokens)
    if wish.profile:
        profile(lambda: ask(4, 6))
    pool, tokens = elsewhere.weights.pool, wish.tokens
    row_bytes = 0 if pool is None else pool.rows.rows[0].nbytes
    assert metrics.tokens_per_s is not None
    return {
        "warm_s": warm_s,
        "s_per_token": 1 / metrics.tokens_per_s,
        "first_token_s": first.ttft_s,
        "streamed_bytes": (counts.weights.bytes - prefill.weights.bytes) / tokens,
        "rows_wanted": counts.rows.wanted / tokens,
        "rows_hit": counts.rows.hit / max(1, counts.rows.wanted),
        "row_bytes": counts.rows.moved * row_bytes / tokens,
        "stalled_s": (counts.weights.stalled_s - prefill.weights.stalled_s) / tokens,
    }


def drafted(llm: SimulatedLLM, wish: Wish) -> dict[str, Any]:
    """Plain decoding, then rounds of a draft that the last rung judges, at each simulated acceptance; over the same banks."""
    found: dict[str, Any] = {"warm_s": 0.0}
    ids = random.Random(3).choices(range(llm.spec.vocab_size), k=wish.prompt)
    for rate in (None, *wish.rates):
        if rate is not None:
            llm.rates(rate, rate)
        steps = rounds(llm, ids, None if rate else "plain", wish.tokens if rate else min(4, wish.tokens))
        mean = sum((rate or 0.0) ** place for place in range(wish.gamma + 1)) if rate else 1.0
        found["plain" if rate is None else f"{rate}"] = {
            "s_per_round": median(steps),
            "tokens_per_round": mean,
            "s_per_token": median(steps) / mean,
            "rounds": len(steps),
        }
    found["s_per_token"] = found["plain"]["s_per_token"]
    return found


def rounds(llm: SimulatedLLM, ids: list[int], ladder: str | None, count: int) -> list[float]:
    """Seconds of so many rounds, after three in which kernels are compiled and graphs captured."""
    params = SamplingParams(temperature=0.8, seed=1, max_tokens=1000, ignore_eos=True, detokenize=False)
    room = llm.plan.max_context - len(ids)
    request = llm._add(ids, replace(params, max_tokens=room), ladder=ladder)
    steps = []
    while not request.stats.generated_tokens:
        llm.engine.step()
    for _ in range((1 if ladder else 3) + count):
        started = time.perf_counter()
        llm.engine.step()
        steps.append(time.perf_counter() - started)
        if request.finished:
            break
    llm.engine.abort(request)
    return steps[1 if ladder else 3 :] or steps[-1:]


def profile(ask: Callable[[], object]) -> None:
    """Where a token's time goes, on standard error."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profiler(activities=activities) as found:
        ask()
    for order in ("self_cuda_time_total", "self_cpu_time_total"):
        print(found.key_averages().table(sort_by=order, row_limit=18, max_name_column_width=60), file=sys.stderr)
