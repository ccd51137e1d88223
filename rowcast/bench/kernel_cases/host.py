"""Rows of host memory over the bus, beside one DMA transfer of as many bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rowcast.bench.kernel_cases.case import Case
from rowcast.kernels.gpu.host_rows import gather
from rowcast.offload.host_memory import HostTensor, pinned_bank

_BANK_BYTES = 2 << 30
_MOVED_BYTES = 64 << 20
_CALLS = 4
_NOTE = "the bus is the floor: the ratio to dma is the share of it"


def cases(device_name: str) -> Iterator[Case]:
    """Scattered rows, 64 MiB a call, each row once."""
    device = torch.device("cuda")
    with pinned_bank((_BANK_BYTES // 8,), torch.int64, device) as bank:
        torch.arange(_BANK_BYTES // 8, out=bank.tensor)
        for kib in (4, 8, 24, 144):
            yield _case(bank, kib << 10, device)


def _case(bank: HostTensor, row: int, device: torch.device) -> Case:
    count = _MOVED_BYTES // row
    rows = bank.tensor.view(torch.uint8)[: _BANK_BYTES // row * row].view(-1, row)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(row))[: _CALLS * count].int().to(device)
    wanted = torch.full((1,), count, dtype=torch.int32, device=device)
    out = torch.empty(count, row, dtype=torch.uint8, device=device)

    def fetch(ids: Tensor) -> Callable[[], object]:
        return lambda: gather(bank.address, row, ids, wanted, out)

    def transfer(first: int) -> Callable[[], object]:
        return lambda: out.copy_(rows[first : first + count], non_blocking=True)

    return Case(
        "host rows",
        f"{count} rows of {row >> 10} KiB",
        2 * count * row,
        [fetch(ids) for ids in order.view(_CALLS, count)],
        {"dma": [transfer(i * count) for i in range(_CALLS)]},
        _NOTE,
    )
