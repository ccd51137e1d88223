"""The cache of rows: the kernel keeps what the reference keeps, and says where everything lies."""

from __future__ import annotations

import pytest
import torch
from triton_interpreting import take_arrays_as_bounds

from rowcast.kernels import gpu
from rowcast.offload.host_store import HostBank, HostStore
from rowcast.offload.row_cache import CachedBank, RowPool

take_arrays_as_bounds()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FIXED, BUFFER = 5, 16


def _made(
    rows: int, slots: int, order: torch.Tensor, numbers: torch.Tensor, device: torch.device
) -> tuple[RowPool, CachedBank, HostBank]:
    """Ids are rows of the bank in another order; the first ones are in the pool for good. A number beside each row."""
    bank = HostStore(device).bank((rows, 4), torch.float32)
    bank.tensor.copy_(torch.arange(rows * 4).view(rows, 4))
    values = torch.zeros(FIXED + slots + BUFFER, device=device)
    pool = RowPool(torch.zeros(len(values), 4, device=device), slice(FIXED + slots, len(values)), [values])
    fixed = torch.where(order < FIXED, order, -1)
    at = (order - FIXED).clamp(min=0)
    return pool, pool.add(bank, slice(FIXED, FIXED + slots), rows=at, fixed=fixed, values=[numbers.to(device)]), bank


@pytest.mark.parametrize(("rows", "slots"), [(40, 0), (40, 7), (20, 7), (1500, 1100)])
def test_the_kernel_keeps_what_the_reference_keeps(monkeypatch: pytest.MonkeyPatch, rows: int, slots: int) -> None:
    generator = torch.Generator().manual_seed(slots)
    order = torch.randperm(rows + FIXED, generator=generator)
    numbers = torch.randn(rows + FIXED, generator=generator)
    sides = [_made(rows, slots, order, numbers, device) for device in (torch.device("cpu"), DEVICE)]
    for call in range(12 if slots > 100 else 40):
        room = rows + FIXED if rows <= slots + BUFFER else slots + BUFFER
        chosen = torch.randperm(rows + FIXED, generator=generator)[: room if call % 2 else 12]
        count = torch.randint(len(chosen) + 1, (1,), generator=generator, dtype=torch.int32)
        for kernel, (pool, cached, bank) in enumerate(sides):
            monkeypatch.setattr(gpu, "interpreted", bool(kernel))
            device = pool.rows.device
            assert cached.room == room
            at = cached.reach(chosen.int().to(device) if call % 3 else chosen.to(device), count.to(device))
            for each, place in zip(chosen.tolist()[: int(count)], at.tolist(), strict=False):
                row = int(order[each]) - FIXED
                assert int(pool.where[each]) == place
                assert place == row + FIXED if row < 0 else torch.equal(pool.rows[place].cpu(), bank.tensor[row])
                assert row < 0 or float(pool.values[0][place]) == float(numbers[each])
            pool.check()
        one, other = (pool.counts() for pool, *_ in sides)
        assert one == other
        one_held, other_held = (set(cached._owners[:slots].tolist()) for _, cached, _ in sides)
        assert one_held == other_held
