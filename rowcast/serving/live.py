"""What the page shows: the engine's last seconds and all that went before, as one JSON object. Torch-free.

`docs/serving.md` names its keys. The engine's thread notes steps, the event loop takes snapshots.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from statistics import quantiles
from typing import Any

from rowcast.placement.plan import Plan
from rowcast.runtime.densities import Densities
from rowcast.runtime.engine import Engine
from rowcast.runtime.ladder.spec import Ladder
from rowcast.runtime.step import PREFILL, Moved, RungCounts, SeqResult
from rowcast.serving.backend import ModelCard

WINDOW_S = 10
"""What "recent" means."""

_LATENCIES = 1024
_LAYERS_S = 0.1
"""Between two looks at the densities."""
_CLASSES = ("weights", "rung weights", "KV", "rung KV", "work", "margin")


@dataclass(slots=True)
class Tally:
    """What happened in a stretch of time. Adds up."""

    tokens: int = 0
    prompt_tokens: int = 0
    steps: int = 0
    rungs: dict[str, RungCounts] = field(default_factory=dict)
    moved: Moved | None = None
    dense_bytes: int = 0
    """What plain decoding would have read."""

    def step(self, results: Sequence[SeqResult], emitted: int, dense_bytes: int) -> None:
        """One step of the engine."""
        self.dense_bytes += dense_bytes
        self.tokens += emitted
        self.steps += 1
        for result in results:
            for name, counts in result.rungs.items():
                self.rungs.setdefault(name, RungCounts()).add(counts)
                if name == PREFILL:
                    self.prompt_tokens += counts.tokens
            if result.moved is not None:
                self.moved = self.moved or Moved()
                self.moved.add(result.moved)

    def add(self, other: Tally) -> None:
        """Add `other` to this, in place."""
        self.tokens += other.tokens
        self.prompt_tokens += other.prompt_tokens
        self.steps += other.steps
        self.dense_bytes += other.dense_bytes
        for name, counts in other.rungs.items():
            self.rungs.setdefault(name, RungCounts()).add(counts)
        if other.moved is not None:
            self.moved = self.moved or Moved()
            self.moved.add(other.moved)


class Window:
    """Steps of the last `WINDOW_S` seconds, and of all time. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._all = Tally()
        self._seconds: deque[tuple[int, Tally]] = deque()
        self._first_tokens: deque[tuple[float, float]] = deque(maxlen=_LATENCIES)
        self._per_token: deque[tuple[float, float]] = deque(maxlen=_LATENCIES)
        self._started_s = clock()
        self._layers: dict[str, list[float]] = {}
        self._layers_s = self._started_s

    @property
    def layers(self) -> dict[str, list[float]]:
        """By rung that leaves neurons out: what share of each layer's it used of late."""
        return self._layers

    def step(self, results: Sequence[SeqResult], emitted: int, dense_bytes: int, densities: Densities) -> None:
        """Note one step."""
        clock = self._clock()
        now = int(clock)
        if clock - self._layers_s > _LAYERS_S:
            self._layers, self._layers_s = densities.neurons, clock
        tally = Tally()
        tally.step(results, emitted, dense_bytes)
        with self._lock:
            if not self._seconds or self._seconds[-1][0] != now:
                self._seconds.append((now, Tally()))
                while self._seconds[0][0] < now - WINDOW_S:
                    self._seconds.popleft()
            self._seconds[-1][1].add(tally)
            self._all.add(tally)

    def first_token(self, seconds: float) -> None:
        """A request's, from its arrival."""
        with self._lock:
            self._first_tokens.append((self._clock(), seconds))

    def finished(self, seconds_per_token: float | None) -> None:
        """A request's, after its first tokens."""
        if seconds_per_token is not None:
            with self._lock:
                self._per_token.append((self._clock(), seconds_per_token))

    def snapshot(self) -> tuple[Tally, float, Tally, dict[str, Any]]:
        """(the last seconds, how many they are, all, latencies)."""
        now = self._clock()
        recent, total = Tally(), Tally()
        with self._lock:
            for second, tally in self._seconds:
                if second > now - WINDOW_S - 1:
                    recent.add(tally)
            total.add(self._all)
            latencies = {
                "ttft_s": _percentiles([value for at, value in self._first_tokens if at > now - 6 * WINDOW_S]),
                "tpot_s": _percentiles([value for at, value in self._per_token if at > now - 6 * WINDOW_S]),
            }
        return recent, min(max(now - self._started_s, 1.0), float(WINDOW_S)), total, latencies


def rungs_json(ladder: Sequence[str], recent: Tally, total: Tally) -> list[dict[str, Any]]:
    """The ladder's rungs, cheapest first, each with the last seconds and all."""
    return [{"name": name, "recent": _rung(recent.rungs.get(name)), "total": _rung(total.rungs.get(name))} for name in ladder]


def links_json(moved: Moved | None) -> dict[str, int]:
    """Bytes by link, of those that anything crossed."""
    return {} if moved is None else {link: size for link, size in moved.by_link.items() if size}


def memory_json(plan: Plan) -> list[dict[str, Any]]:
    """By device, the plan's bytes by class; they add up to the budget."""
    if plan.forecast is not None and plan.forecast.memory:
        return [
            {"device": each.device, "card": each.card, "budget_bytes": each.budget_bytes, "classes": dict(each.classes)}
            for each in plan.forecast.memory
        ]
    sizes = (plan.weight_bytes, plan.rung_weight_bytes, plan.kv_bytes, plan.rung_kv_bytes, plan.work_bytes, plan.margin_bytes)
    classes = dict(zip(_CLASSES, sizes, strict=True))
    names = [plan.device] if plan.world == 1 else [f"{plan.device}, rank {rank}" for rank in range(plan.world)]
    return [{"device": name, "card": "", "budget_bytes": plan.budget_bytes, "classes": dict(classes)} for name in names]


def places_json(plan: Plan) -> list[dict[str, dict[str, int]]]:
    """By rank: bytes of the model's parts by tier, where any lies elsewhere than next to the compute."""
    return [found for rank in range(plan.world) if (found := plan.places(rank))]


def model_json(engine: Engine, card: ModelCard, window: Window, recent: Tally, total: Tally) -> dict[str, Any]:
    """The part of the snapshot that needs a model."""
    plan, pool, cache = engine.plan, engine.scheduler.pool, engine.scheduler.cache
    ladder = Ladder.parse(plan.ladder_text).names
    return {
        "model": {
            "name": card.name,
            "max_context": card.max_context,
            "vocab_size": card.vocab_size,
            "dtype": plan.dtype,
            "device": plan.device,
            "ranks": plan.world,
        },
        "ladder": plan.ladder_text,
        "rung_names": list(ladder),
        "mode": plan.mode,
        "verification": plan.verification,
        "kv": {
            "total_blocks": pool.total,
            "used_blocks": pool.total - pool.free_blocks,
            "cached_blocks": pool.cached_blocks,
            "block_tokens": plan.block_size,
            "token_bytes": plan.kv_token_bytes,
        },
        "prefix_cache": {
            "hit_tokens": 0 if cache is None else cache.hit_tokens,
            "asked_tokens": 0 if cache is None else cache.asked_tokens,
        },
        "rungs": rungs_json(ladder, recent, total),
        "layers": window.layers,
        "bytes": {**_bytes(recent), "total": _bytes(total)},
        "stalled_s": None if total.moved is None else 0.0 if recent.moved is None else recent.moved.stalled_s,
        "memory": memory_json(plan),
        "places": places_json(plan),
    }


def _bytes(tally: Tally) -> dict[str, Any]:
    return {"read": read_bytes(tally.rungs), "dense": tally.dense_bytes, "by_link": links_json(tally.moved)}


def _rung(counts: RungCounts | None) -> dict[str, Any]:
    counts = counts or RungCounts()
    return {
        "acceptance": counts.acceptance,
        "proposed": list(counts.proposed),
        "judged": list(counts.judged),
        "accepted": list(counts.accepted),
        "acceptance_by_position": [
            stood / judged if judged else None for stood, judged in zip_longest(counts.accepted, counts.judged, fillvalue=0)
        ],
        "tokens": counts.tokens,
        "density": counts.neurons / counts.neurons_of if counts.neurons_of else None,
        "head_density": counts.heads / counts.heads_of if counts.heads_of else None,
        "seconds": counts.seconds,
        "bytes_read": counts.bytes_read,
    }


def read_bytes(rungs: Mapping[str, RungCounts]) -> int:
    """By all rungs, prefills included."""
    return sum(counts.bytes_read for counts in rungs.values())


def _percentiles(values: Sequence[float]) -> dict[str, float | int | None]:
    if not values:
        return {"count": 0, "p50": None, "p90": None, "p99": None}
    if len(values) == 1:
        return {"count": 1, "p50": values[0], "p90": values[0], "p99": values[0]}
    cuts = quantiles(values, n=100, method="inclusive")
    return {"count": len(values), "p50": cuts[49], "p90": cuts[89], "p99": cuts[98]}
