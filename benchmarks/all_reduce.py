"""Sums over the GPUs of one host inside a captured graph: our one-shot kernel, torch's, NCCL; and NCCL's gather of what ranks draw by.

    python benchmarks/all_reduce.py

Needs two GPUs or more, of which each is a process. A figure is the median of graphs of 40 calls, microseconds a call. The last line is
JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from _figures import known_versions
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from rowcast.kernels.gpu.all_reduce import FastAllReduce

CALLS, REPLAYS = 40, 30
MOST = 1 << 20
"""Elements."""
KIB = (4, 8, 14, 18, 64, 168, 392, 1024, 2048)


def main() -> int:
    ranks = torch.cuda.device_count()
    if ranks < 2:
        print("needs two GPUs", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (ranks, f"file://{Path(folder) / 'store'}"), nprocs=ranks)  # type: ignore[no-untyped-call]
    return 0


def _rank(rank: int, ranks: int, store: str) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", init_method=store, rank=rank, world_size=ranks)
    group = dist.group.WORLD
    assert group is not None
    fast, theirs = FastAllReduce(group, MOST, torch.bfloat16, device), _torchs(group, device)
    name, rows = torch.cuda.get_device_name(device), []
    if rank == 0:
        print(f"{ranks} x {name}: {fast.reason}")
    for kib in KIB:
        x = torch.zeros(kib * 512, dtype=torch.bfloat16, device=device)
        row: dict[str, Any] = {"kib": kib, "ours": _us(partial(fast, x)), "nccl": _us(partial(dist.all_reduce, x))}
        row["torch"] = None if theirs is None else _us(partial(theirs, x))
        rows.append(row)
        if rank == 0:
            print(f"{kib:5d} KiB: " + ", ".join(f"{who} {row[who]:.2f} us" for who in ("ours", "torch", "nccl") if row[who]))
    pair = torch.zeros(2, dtype=torch.float64, device=device)
    found = torch.zeros(2 * ranks, dtype=torch.float64, device=device)
    gather = _us(lambda: dist.all_gather_into_tensor(found, pair))
    if rank == 0:
        print(f"16 bytes of each rank gathered by NCCL: {gather:.2f} us")
        print(
            json.dumps(
                {
                    "benchmark": "all_reduce",
                    "device": name,
                    "versions": known_versions(),
                    "ranks": ranks,
                    "us": rows,
                    "gather_us": gather,
                }
            )
        )
    dist.destroy_process_group()


def _torchs(group: dist.ProcessGroup, device: torch.device) -> Callable[[Tensor], object] | None:
    """torch's one-shot sum over its symmetric memory; None where it cannot be had."""
    try:
        from torch.distributed import _symmetric_memory as symmetric

        buffer = symmetric.empty(MOST, dtype=torch.bfloat16, device=device)
        symmetric.rendezvous(buffer, group)
    except (ImportError, RuntimeError) as error:
        print(f"torch's one shot is left out: {error}", file=sys.stderr)
        return None
    return lambda x: torch.ops.symm_mem.one_shot_all_reduce_copy_out(buffer[: x.numel()], x, "sum", group.group_name, x)


def _us(call: Callable[[], object]) -> float:
    """Microseconds of a call in a graph, on all ranks at the same time."""
    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(CALLS):
            call()
    for _ in range(3):
        graph.replay()
    taken = []
    for _ in range(REPLAYS):
        torch.cuda.synchronize()
        dist.barrier()
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        graph.replay()  # In this one ranks meet.
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) * 1e3 / CALLS)
    return float(median(taken))


if __name__ == "__main__":
    sys.exit(main())
