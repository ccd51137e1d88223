"""The rates of the buses to GPUs, for `offload.py`."""

from __future__ import annotations

import time

import torch

from rowcast.cluster.distributed_comm import DistributedComm, synchronise
from rowcast.offload.host_store import HostStore


def bus_rate(device: torch.device) -> float:
    """Bytes a second of one large copy from pinned memory; on a CPU, which has no bus, of one within its memory."""
    store = HostStore(device)
    source, out = store.bank((1 << 28,), torch.uint8).tensor, torch.empty(1 << 28, dtype=torch.uint8, device=device)
    times = []
    for _ in range(8):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        out.copy_(source, non_blocking=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    store.close()
    return source.nbytes / min(times)


def all_rates(device: torch.device, comm: DistributedComm | None) -> list[float]:
    """Of all ranks, which copy at the same time."""
    if comm is None:
        return [bus_rate(device)]
    synchronise()
    return [float(rate) for rate in comm.exchange(torch.tensor([bus_rate(device)], dtype=torch.float64)).flatten().tolist()]
