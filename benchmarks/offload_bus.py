"""What `offload.py` measures of the machine first: the rates of the buses to GPUs, and what a rank takes of its GPU beside tensors."""

from __future__ import annotations

import time

import torch

from rowcast.cluster.distributed_comm import DistributedComm, synchronise
from rowcast.offload.host_store import HostStore
from rowcast.placement.constants import Constants
from rowcast.runtime.gpu_ceiling import LATER_BYTES, peak_bytes


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


def outside_bytes(device: torch.device, comm: DistributedComm | None) -> int | None:
    """What the fullest rank takes beside tensors and graphs: what is there when collectives have run, and kernels that come later. None
    where the driver does not tell, and on CPUs."""
    if device.type != "cuda":
        return None
    if comm is not None:
        comm.all_reduce(torch.ones(1 << 22, dtype=torch.bfloat16, device=device))  # more than goes in one shot
        torch.cuda.synchronize(device)
    counted = peak_bytes(device)
    found = -1 if counted is None else counted.bytes - torch.cuda.max_memory_reserved(device)
    if comm is not None:
        every = comm.exchange(torch.tensor([found], dtype=torch.int64)).flatten().tolist()
        found = -1 if min(every) < 0 else max(every)
    return None if found < 0 else found + LATER_BYTES - Constants().graphs_bytes
