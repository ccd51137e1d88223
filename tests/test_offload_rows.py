"""Rows fetched from host memory and kept in a pool of device rows: always the bank's, the most recent ones without fetching."""

from __future__ import annotations

import random

import pytest
import torch

from rowcast.offload.host_store import HostBank, HostStore
from rowcast.offload.row_cache import CachedBank, RowPool

BOTH = [pytest.param(torch.device("cpu"), id="cpu"), pytest.param(torch.device("cuda"), id="cuda", marks=pytest.mark.gpu)]


def make(device: torch.device, banks: list[int], slots: int, capacity: int) -> tuple[RowPool, list[CachedBank], list[HostBank]]:
    """A pool of one row of somebody else's, the banks' caches and the buffer."""
    store, generator = HostStore(device), torch.Generator().manual_seed(1)
    rows = torch.zeros(1 + slots * len(banks) + capacity, 3, 8, device=device)
    pool = RowPool(rows, slice(1 + slots * len(banks), len(rows)))
    held = [store.bank((count, 3, 8), torch.float32) for count in banks]
    for bank in held:
        bank.tensor.copy_(torch.randn(bank.tensor.shape, generator=generator))
    cached = [pool.add(bank, slice(1 + slots * i, 1 + slots * (i + 1))) for i, bank in enumerate(held)]
    return pool, cached, held


@pytest.mark.parametrize("device", BOTH)
@pytest.mark.parametrize("slots", [0, 1, 5, 12, 40])
def test_any_calls_find_the_banks_rows(device: torch.device, slots: int) -> None:
    """Two banks in turn and out of turn, whole counts and partial ones."""
    rng, (pool, cached, banks) = random.Random(slots), make(device, [30, 17], slots, 16)
    for _ in range(80):
        which = rng.randrange(2)
        count = len(banks[which].tensor)
        chosen = rng.sample(range(count), rng.randrange(min(count, cached[which].room) + 1))
        wants = rng.choice([None, rng.randrange(len(chosen) + 1)])
        given = None if wants is None else torch.tensor([wants], dtype=torch.int32, device=device)
        at = cached[which].reach(torch.tensor(chosen, dtype=torch.int64, device=device), given)
        wanted = chosen if wants is None else chosen[:wants]
        assert torch.equal(pool.rows[at[: len(wanted)].long()].cpu(), banks[which].tensor[wanted])
        assert not pool.rows[0].any()
        pool.check()


def test_the_first_rows_are_held_from_the_start_then_the_most_recent() -> None:
    pool, [cached], _ = make(torch.device("cpu"), [20], 4, 8)

    def moved(*ids: int) -> int:
        cached.reach(torch.tensor(ids))
        counts = pool.counts()
        assert counts.wanted == len(ids) == counts.hit + counts.moved
        return counts.moved

    assert moved(0, 1, 2, 3) == 0
    assert moved(7, 2, 8) == 2  # in the place of 0 and 1, as 2 was used now and 3 as long ago as they
    assert moved(7, 8, 2, 3) == 0
    assert moved(0, 1) == 2
    assert moved(*range(10, 16)) == 6  # more than it holds: of those it keeps four
    assert moved(10, 11, 12, 13) == 0
    assert moved() == 0


def test_more_rows_than_the_buffer_has() -> None:
    """Those that are kept make room."""
    pool, [cached], [bank] = make(torch.device("cpu"), [20], 4, 8)
    assert cached.room == 12
    for ids in (torch.arange(2, 14), torch.arange(8, 20)):
        assert torch.equal(pool.rows[cached.reach(ids).long()], bank.tensor[ids])
    with pytest.raises(AssertionError, match="13 rows do not go into 12"):
        cached.reach(torch.arange(13))


@pytest.mark.gpu
def test_calls_can_be_captured_and_replayed() -> None:
    device = torch.device("cuda")
    pool, [cached], [bank] = make(device, [64], 8, 16)
    ids, count = torch.arange(16, device=device), torch.tensor([16], dtype=torch.int32, device=device)
    cached.reach(ids, count)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        at = cached.reach(ids, count)
    rng = random.Random(2)
    for _ in range(30):
        chosen, number = rng.sample(range(64), 16), rng.randrange(17)
        ids.copy_(torch.tensor(chosen))
        count.fill_(number)
        graph.replay()
        assert torch.equal(pool.rows[at[:number].long()].cpu(), bank.tensor[chosen[:number]])
    pool.check()
