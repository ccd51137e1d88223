"""What an engine tells of itself while it runs: one table of metrics, and one interface for whoever passes them on. Torch-free.

Without an exporter nothing is counted.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from rowcast.runtime.densities import Densities
from rowcast.runtime.request import Request
from rowcast.runtime.scheduler import Scheduler
from rowcast.runtime.step import PREFILL, RungCounts, SeqResult

Kind = Literal["counter", "gauge", "histogram"]

_FAST_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_SLOW_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table."""

    name: str
    """Without the `_total` that Prometheus gives to counters."""
    kind: Kind
    doc: str
    labels: tuple[str, ...] = ()
    """Beside `REPLICA`, which all have."""
    bounds: tuple[float, ...] = ()
    """Of a histogram's buckets."""


REPLICA = "replica"
"""The label that tells several engines of one process from each other."""

TABLE = (
    Metric("rowcast_requests_running", "gauge", "Sequences that are being generated."),
    Metric("rowcast_requests_waiting", "gauge", "Sequences that wait for memory or a place."),
    Metric("rowcast_kv_usage", "gauge", "Share of the KV blocks in use."),
    Metric("rowcast_requests", "counter", "Requests that ended, by the reason: stop, length or abort.", ("reason",)),
    Metric("rowcast_prompt_tokens", "counter", "Prompt tokens of requests that ended."),
    Metric("rowcast_generated_tokens", "counter", "Tokens generated."),
    Metric("rowcast_time_to_first_token_seconds", "histogram", "From a request's arrival to its first token.", (), _SLOW_S),
    Metric("rowcast_time_per_output_token_seconds", "histogram", "Of a request, after its first tokens.", (), _FAST_S),
    Metric("rowcast_request_seconds", "histogram", "From a request's arrival to its end.", (), _SLOW_S),
    Metric("rowcast_preemptions", "counter", "Sequences that gave way to others and were computed again."),
    Metric("rowcast_drafts_proposed", "counter", "Drafts judged, by rung and position in the proposal.", ("rung", "position")),
    Metric("rowcast_drafts_accepted", "counter", "Those that stood.", ("rung", "position")),
    Metric("rowcast_neurons_used", "counter", "Neurons that generated tokens used, by rung that leaves any out.", ("rung",)),
    Metric("rowcast_neurons_dense", "counter", "Those that all weights would have used: the density is the ratio.", ("rung",)),
    Metric("rowcast_read_bytes", "counter", "Weights and KV read, by memory.", ("memory",)),
    Metric("rowcast_dense_bytes", "counter", "What plain decoding would have read for the same tokens.", ("memory",)),
    Metric("rowcast_moved_bytes", "counter", "Brought to the compute from elsewhere, and taken there, by link.", ("link",)),
    Metric("rowcast_stalled_seconds", "counter", "That computing waited for it."),
    Metric("rowcast_layer_density", "gauge", "Share of a layer's neurons that a rung used of late.", ("rung", "layer")),
    Metric("rowcast_prefix_cache_queries", "counter", "Tokens that the prefix cache was asked for."),
    Metric("rowcast_prefix_cache_hits", "counter", "Those of them whose K/V were there."),
    Metric("rowcast_prefix_cache_blocks", "gauge", "KV blocks that can be found by their content, in use or free."),
    Metric("rowcast_steps", "counter", "Steps of the engine."),
    Metric("rowcast_lost_steps", "counter", "Steps that came to nothing, and were made again."),
    Metric("rowcast_rank_failures", "counter", "Times that ranks failed and were started anew."),
)


_DENSITY_STEPS = 16
"""Steps between two looks at the densities."""


class Exporter(Protocol):
    """Passes on what is in `TABLE`. Thread-safe; none of it may block or raise."""

    def add(self, name: str, amount: float, labels: Mapping[str, str]) -> None:
        """To a counter; `amount` > 0."""
        ...

    def set(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        """A gauge."""
        ...

    def observe(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        """In a histogram."""
        ...


class EngineMetrics:
    """One engine's events, as the table's metrics."""

    def __init__(self, exporter: Exporter, *, memory: str, replica: str = "0") -> None:
        """`memory`: where weights and KV are read from, gpu or host."""
        self._exporter = exporter
        self._memory = memory
        self._steps = 0
        self._asked_tokens = self._hit_tokens = 0
        """Of the prefix cache, as told last."""
        self._labels = {REPLICA: replica}

    def step(
        self,
        scheduler: Scheduler,
        results: Sequence[SeqResult],
        emitted: int,
        preempted: int,
        dense_bytes: int,
        densities: Densities,
    ) -> None:
        """After each step. `dense_bytes`: what plain decoding would have read."""
        pool = scheduler.pool
        self._set("requests_running", len(scheduler.running))
        self._set("requests_waiting", len(scheduler.waiting))
        self._set("kv_usage", 1 - pool.free_blocks / pool.total)
        if scheduler.cache is not None:
            asked, hit = scheduler.cache.asked_tokens, scheduler.cache.hit_tokens
            self._add("prefix_cache_queries", asked - self._asked_tokens)
            self._add("prefix_cache_hits", hit - self._hit_tokens)
            self._asked_tokens, self._hit_tokens = asked, hit
            self._set("prefix_cache_blocks", pool.cached_blocks)
        self._add("steps", 1)
        self._add("generated_tokens", emitted)
        self._add("preemptions", preempted)
        by_rung: dict[str, RungCounts] = {}
        for result in results:
            for name, counts in result.rungs.items():
                by_rung.setdefault(name, RungCounts()).add(counts)
        for name, counts in by_rung.items():
            for position, judged in enumerate(counts.judged):
                self._add("drafts_proposed", judged, rung=name, position=str(position))
            for position, accepted in enumerate(counts.accepted):
                self._add("drafts_accepted", accepted, rung=name, position=str(position))
            if name != PREFILL:
                self._add("neurons_used", counts.neurons, rung=name)
                self._add("neurons_dense", counts.neurons_of, rung=name)
        self._add("read_bytes", sum(counts.bytes_read for counts in by_rung.values()), memory=self._memory)
        self._add("dense_bytes", dense_bytes, memory=self._memory)
        for moved in (result.moved for result in results if result.moved is not None):
            for link, count in moved.by_link.items():
                self._add("moved_bytes", count, link=link)
            self._add("stalled_seconds", moved.stalled_s)
        if self._steps % _DENSITY_STEPS == 0:
            for rung, shares in densities.neurons.items():
                for layer, share in enumerate(shares):
                    self._set("layer_density", share, rung=rung, layer=f"{layer}")
        self._steps += 1

    def ended(self, request: Request, *, aborted: bool = False) -> None:
        """Once for each request. The reason is that of its first sample, unless it was `aborted`."""
        stats = request.stats
        self._add("requests", 1, reason="abort" if aborted else request.sequences[0].finish_reason or "abort")
        self._add("prompt_tokens", stats.prompt_tokens)
        self._observe("request_seconds", time.perf_counter() - request.arrived_s)
        if stats.ttft_s is not None:
            self._observe("time_to_first_token_seconds", stats.ttft_s)
        if stats.tokens_per_s:
            self._observe("time_per_output_token_seconds", 1 / stats.tokens_per_s)

    def lost_step(self) -> None:
        """A step that came to nothing."""
        self._add("lost_steps", 1)

    def rank_failure(self) -> None:
        """A gang that ended before its time."""
        self._add("rank_failures", 1)

    def _add(self, name: str, amount: float, **labels: str) -> None:
        if amount > 0:
            self._exporter.add(f"rowcast_{name}", amount, self._labels | labels)

    def _set(self, name: str, value: float, **labels: str) -> None:
        self._exporter.set(f"rowcast_{name}", value, self._labels | labels)

    def _observe(self, name: str, value: float) -> None:
        self._exporter.observe(f"rowcast_{name}", value, self._labels)
