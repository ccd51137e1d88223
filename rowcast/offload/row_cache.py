"""Rows of host memory that a pass needs, brought into one pool of device rows, where those of earlier passes may still lie.

The pool holds, beside whatever its owner keeps in it, a buffer that every call fills anew and, for each bank, some rows of a cache,
which begins with the bank's first rows (the most frequent ones, if it is in that order) and from then on keeps the most recently
used. Everything has its size from the start, and where a row lies is written on the device: a call asks the device nothing, where the
bank's `gather` does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rowcast.offload.host_store import HostBank


@dataclass(frozen=True, slots=True)
class RowCounts:
    """Sums over calls."""

    wanted: int = 0
    hit: int = 0
    moved: int = 0


class RowPool:
    """Device rows [P, ...], contiguous."""

    def __init__(self, rows: Tensor, buffer: slice) -> None:
        """`buffer`: those that calls fill."""
        self.rows = rows
        self._buffer = buffer
        self._sums = torch.zeros(2, dtype=torch.int64, device=rows.device)
        self._banks: list[CachedBank] = []

    @property
    def capacity(self) -> int:
        """Rows that may be missing in one call."""
        return int(self._buffer.stop - self._buffer.start)

    def add(self, bank: HostBank, slots: slice) -> CachedBank:
        """A bank of such rows whose cache is the pool's rows `slots`."""
        self._banks.append(CachedBank(self, bank, slots, self._sums))
        return self._banks[-1]

    def counts(self) -> RowCounts:
        """Since the last call of this. Waits for the device."""
        wanted, moved = self._sums.tolist()
        self._sums.zero_()
        return RowCounts(wanted, wanted - moved, moved)

    @property
    def buffer(self) -> Tensor:
        return self.rows[self._buffer]

    @property
    def first(self) -> int:
        """The buffer's first row."""
        return int(self._buffer.start)

    def check(self) -> None:
        """Directories and owners tell the same, and cached rows are their banks'. For tests and idle moments."""
        for bank in self._banks:
            bank.check()


class CachedBank:
    """One bank's rows in the pool; made by `RowPool.add`."""

    def __init__(self, pool: RowPool, bank: HostBank, slots: slice, sums: Tensor) -> None:
        device, rows = pool.rows.device, len(bank.tensor)
        held = min(slots.stop - slots.start, rows)
        self._pool, self._bank, self._first, self._held, self._sums = pool, bank, slots.start, held, sums
        # The last entry of each is written to where there is nothing to write.
        self._directory = torch.full((rows + 1,), -1, dtype=torch.int64, device=device)
        """By the bank's rows: where each lies in the pool, -1: nowhere."""
        self._directory[:held] = torch.arange(slots.start, slots.start + held, device=device)
        self._owners = torch.arange(held + 1, device=device)
        """By the cache's rows: whose content it is."""
        self._used = torch.zeros(held + 1, dtype=torch.int64, device=device)
        """Likewise: the call that used it last."""
        self._call = torch.zeros((), dtype=torch.int64, device=device)
        if held:
            pool.rows[slots.start : slots.start + held].view(held, -1).copy_(bank.tensor[:held].view(held, -1))

    def reach(self, ids: Tensor, count: Tensor | None = None) -> Tensor:
        """Where the rows `ids` [C] int64 of the bank lie in the pool, [C] int64, valid until the pool's next call.

        Each is named once, in any order; `count` [1] int32: only so many of them are wanted (None: all), the others may be anything
        from 0 to the last row. C is at most the pool's capacity. The caller's current stream does it all.
        """
        capacity, pool = len(ids), self._pool
        assert capacity <= pool.capacity, f"{capacity} rows do not go into a buffer of {pool.capacity}"
        if not capacity:
            return ids
        places = torch.arange(capacity, device=ids.device)
        wanted = torch.ones_like(places, dtype=torch.bool) if count is None else places < count
        at = self._directory[ids]
        missing = wanted & (at < 0)
        order = missing.cumsum(0) - 1
        lacking = ids.new_zeros(capacity + 1).scatter_(0, torch.where(missing, order, capacity), ids)[:capacity]
        number = missing.sum(dtype=torch.int32)[None]
        self._bank.gather(lacking.int(), number, pool.buffer[:capacity])
        self._sums += torch.stack((wanted.sum(), number[0].long()))
        if self._held:
            self._keep(at, wanted & (at >= 0), lacking, number)
        return torch.where(missing, order + pool.first, at.clamp(min=0))

    def check(self) -> None:
        for slot, owner in enumerate(self._owners[: self._held].tolist()):
            assert int(self._directory[owner]) == self._first + slot, f"cache row {slot} is {owner}'s, which lies elsewhere"
            row = self._pool.rows[self._first + slot].cpu().view(-1)
            assert torch.equal(row, self._bank.tensor[owner].view(-1)), f"cache row {slot} is not the bank's row {owner}"
        assert int((self._directory[:-1] >= 0).sum()) == self._held

    def _keep(self, at: Tensor, hit: Tensor, lacking: Tensor, number: Tensor) -> None:
        """What was just fetched takes the place of what was not used for the longest time, and not in this call."""
        held, pool, directory, owners, used = self._held, self._pool, self._directory, self._owners, self._used
        self._call += 1
        used.scatter_(0, torch.where(hit, at - self._first, held), self._call.expand(len(at)))
        most = min(held, len(lacking))
        victims = used[:held].argsort(stable=True)[:most]
        taken = (torch.arange(most, device=at.device) < number) & (used[victims] < self._call)
        slots = torch.where(taken, victims, held)
        directory.index_fill_(0, torch.where(taken, owners[victims], len(directory) - 1), -1)
        owners.scatter_(0, slots, lacking[:most])
        directory.scatter_(0, torch.where(taken, lacking[:most], len(directory) - 1), victims + self._first)
        used.scatter_(0, slots, self._call.expand(most))
        rows = pool.rows[self._first : self._first + held].view(held, -1)
        fetched = pool.buffer[:most].view(most, -1)
        rows.index_copy_(0, victims, torch.where(taken[:, None], fetched, rows[victims]))
