"""Calls that are made again and again, as CUDA graphs: made one by one at first, which compiles their kernels, then captured.

It does not know what the calls do. Of several ranks all ask for the same calls in the same order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Any

import torch

MOST_GRAPHS = 256


class Graphs:
    """Of calls by key; those that nobody has asked for longest go first."""

    def __init__(self, capture: bool) -> None:
        """`capture`: whether there are graphs at all; else every call is made one by one."""
        self._capture = capture
        self._graphs: dict[Hashable, Any] = {}
        """None: called once."""
        self._pool: Any = None
        self.captured = 0
        """Graphs that were captured so far."""
        self.first_calls = 0
        """Keys that were new so far."""
        self.on_capture: Callable[[float], None] | None = None
        """Told of the seconds that each capture took, right after it."""

    def find(self, key: Hashable, calls: Callable[[], object]) -> Any:
        """The graph of these calls, to be replayed; captured now where they were made before. None: they have to be made, and `made`
        told of it."""
        if key not in self._graphs:
            return None
        graph = self._graphs.pop(key)
        if graph is None and self._capture:
            started = time.perf_counter()
            graph = self._record(calls)
            self.captured += 1
            if self.on_capture is not None:
                self.on_capture(time.perf_counter() - started)
        self._graphs[key] = graph  # the least recently used goes first
        return graph

    def made(self, key: Hashable) -> None:
        """These calls were made one by one."""
        if key in self._graphs:
            return
        self.first_calls += 1
        if len(self._graphs) >= MOST_GRAPHS:
            self._graphs.pop(next(iter(self._graphs)))
        self._graphs[key] = None

    def run(self, key: Hashable, calls: Callable[[], object]) -> None:
        """`find`, and replay or make the calls."""
        graph = self.find(key, calls)
        if graph is not None:
            graph.replay()
            return
        calls()
        self.made(key)

    def clear(self) -> None:
        """What the calls do has changed."""
        self._graphs.clear()

    def _record(self, calls: Callable[[], object]) -> Any:
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        # Of several ranks all capture the same calls now. What else their threads ask of the device is none of its business.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            calls()
        return graph
