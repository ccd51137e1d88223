"""Rates of GPUs, measured: within a card, over the bus, between cards, and of rows that a kernel reads from host memory.

Each function takes some hundred milliseconds, is a median of several runs, and frees what it took. A rate is bytes/s in one direction
unless it says otherwise. Of the bus, transfers by DMA from memory that was pinned in place are meant, as weights lie there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor

from rowcast.kernels.gpu.host_rows import gather
from rowcast.offload.host_memory import HostTensor
from rowcast.placement import nvml
from rowcast.placement.measured import RowRate

ROW_BYTES = tuple(kib << 10 for kib in (4, 8, 16, 32, 64, 128, 256))
"""From one neuron of a small model to more than one of OPT-175B."""

_MOVED_BYTES = 64 << 20
"""By one call that gathers rows."""

_PRODUCT = 8192
"""Rows and columns of the matrices of the product."""

_UNDER_LOAD = 12
"""Transfers that are under way while the link is asked."""


def seconds(call: Callable[[], object], device: torch.device, repeat: int) -> float:
    """Median seconds of a call on the device's current stream, between events; one call before warms up."""
    with torch.cuda.device(device):
        call()
        taken: list[float] = []
        for _ in range(repeat):
            start, end = _events()
            start.record()
            call()
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end) * 1e-3)
    return median(taken)


def memory_rate(device: torch.device, size_bytes: int, repeat: int) -> float:
    """Bytes read and written by a copy within the card."""
    source = torch.zeros(size_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size_bytes / seconds(lambda: target.copy_(source), device, repeat)


def product_rate(device: torch.device, repeat: int) -> float:
    """Operations/s of a product of square matrices in float16; sums are kept in float32."""
    a = torch.full((_PRODUCT, _PRODUCT), 0.01, dtype=torch.float16, device=device)
    out = torch.empty_like(a)
    return 2 * _PRODUCT**3 / seconds(lambda: torch.mm(a, a, out=out), device, repeat)


def bus_rates(bank: HostTensor, size_bytes: int, repeat: int) -> tuple[float, float]:
    """To the card and from it. `bank` [B] uint8, at least `size_bytes`; its content stays."""
    parts, buffer = _parts(bank, size_bytes), torch.empty(size_bytes, dtype=torch.uint8, device=bank.device)
    turn = iter(range(1 << 30))
    there = seconds(lambda: buffer.copy_(parts[next(turn) % len(parts)], non_blocking=True), bank.device, repeat)
    buffer.copy_(parts[0])
    back = seconds(lambda: parts[0].copy_(buffer, non_blocking=True), bank.device, repeat)
    return size_bytes / there, size_bytes / back


def link_under_load(bank: HostTensor, size_bytes: int, uuid: str) -> nvml.PcieLink | None:
    """What the PCIe link runs at while transfers go over it; None where the driver does not tell."""
    part, buffer = _parts(bank, size_bytes)[0], torch.empty(size_bytes, dtype=torch.uint8, device=bank.device)
    with torch.cuda.device(bank.device), nvml.kept_open():
        buffer.copy_(part, non_blocking=True)
        torch.cuda.synchronize()
        for _ in range(_UNDER_LOAD):
            buffer.copy_(part, non_blocking=True)
        link = nvml.pcie_link(uuid)
        torch.cuda.synchronize()
    return link


def bus_rates_together(bank: HostTensor, devices: Sequence[torch.device], size_bytes: int, repeat: int) -> list[float]:
    """To each card, while all receive at once. The bank is pinned for every card."""
    parts = _parts(bank, size_bytes)
    buffers = [torch.empty(size_bytes, dtype=torch.uint8, device=device) for device in devices]
    events = []
    for device in devices:
        torch.cuda.synchronize(device)
    for device in devices:
        with torch.cuda.device(device):
            events.append(_events())
            events[-1][0].record()
    for turn in range(repeat):  # In turn, so that all cards start at once.
        for place, buffer in enumerate(buffers):
            with torch.cuda.device(buffer.device):
                buffer.copy_(parts[(turn + place) % len(parts)], non_blocking=True)
    for device, (_, end) in zip(devices, events, strict=True):
        with torch.cuda.device(device):
            end.record()
    for device in devices:
        torch.cuda.synchronize(device)
    return [repeat * size_bytes / (start.elapsed_time(end) * 1e-3) for start, end in events]


def peer_rate(source: torch.device, target: torch.device, size_bytes: int, repeat: int) -> float:
    """From one card to another, by whatever way the driver takes."""
    held = torch.zeros(size_bytes, dtype=torch.uint8, device=source)
    buffer = torch.empty(size_bytes, dtype=torch.uint8, device=target)
    return size_bytes / seconds(lambda: buffer.copy_(held, non_blocking=True), source, repeat)


def row_rate(bank: HostTensor, row_bytes: int, repeat: int) -> RowRate:
    """Scattered rows of the bank [B] uint8, read by the kernel that streams weights. Compiles it for this size: a second or two."""
    rows = bank.tensor.nbytes // row_bytes
    count = min(_MOVED_BYTES // row_bytes, rows)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(row_bytes))
    calls = [ids.int().to(bank.device) for ids in order[: rows // count * count].view(-1, count)]
    out = torch.empty(count, row_bytes, dtype=torch.uint8, device=bank.device)
    wanted = torch.full((1,), count, dtype=torch.int32, device=bank.device)
    turn = iter(range(1 << 30))
    call = lambda: gather(bank.address, row_bytes, calls[next(turn) % len(calls)], wanted, out)  # noqa: E731
    return RowRate(row_bytes, count * row_bytes / seconds(call, bank.device, repeat))


def _parts(bank: HostTensor, size_bytes: int) -> list[Tensor]:
    data = bank.tensor
    return [data[start : start + size_bytes] for start in range(0, len(data) - size_bytes + 1, size_bytes)]


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    first, second = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    return first, second
