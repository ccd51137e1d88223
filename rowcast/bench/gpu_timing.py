"""Timing on a GPU: medians of graph replays over rotating inputs, and the bandwidth that floors are taken from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import torch

Call = Callable[[], object]
REPLAYS = 30
"""Timed replays of a graph; the median counts."""
_WARM_UP = 3
_COPIED_BYTES = 2 << 30


def graph_seconds(calls: Sequence[Call], *, replays: int = REPLAYS) -> float:
    """Seconds of one call: all `calls`, each with inputs of its own, are captured into one CUDA graph, which is replayed.

    Inputs should exceed several times the L2 together. Each call is run once before, outside the graph, so that kernels are compiled.
    """
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return event_seconds(graph.replay, repeat=replays) / len(calls)


def event_seconds(call: Call, *, repeat: int = REPLAYS) -> float:
    """Median seconds of a call between events of the current stream, warm."""
    for _ in range(_WARM_UP):
        call()
    taken: list[float] = []
    for _ in range(repeat):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) * 1e-3)
    return median(taken)


def copy_bandwidth() -> float:
    """Bytes read and written a second by a large device-to-device copy: the bandwidth that floors are taken from."""
    source = torch.empty(_COPIED_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / event_seconds(lambda: target.copy_(source), repeat=20)
