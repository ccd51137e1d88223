"""Rows of host memory that a pass needs, brought into one pool of device rows, where those of earlier passes may still lie.

The pool holds, beside whatever its owner keeps in it, for each bank some rows of a cache, which begins with the bank's first rows (the
most frequent ones, if it is in that order) and from then on keeps the most recently used, and a buffer for what the caches have no
place for. Everything has its size from the start, and where a row lies is written on the device: a call asks the device nothing, where
the bank's `gather` does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rowcast.kernels import gpu
from rowcast.offload.host_store import HostBank

OLDEST = 255
"""Calls without use that count as such, as `kernels.gpu.row_cache` counts them."""


@dataclass(frozen=True, slots=True)
class RowCounts:
    """Sums over calls."""

    wanted: int = 0
    """Of the banks' rows."""
    hit: int = 0
    moved: int = 0


class RowPool:
    """Device rows [P, ...], contiguous."""

    def __init__(self, rows: Tensor, buffer: slice, values: Sequence[Tensor] = ()) -> None:
        """`buffer`: those that calls fill with what caches have no place for. `values`: numbers of each row, [P] each, at most two."""
        self.rows = rows
        self.values = tuple(values)
        self._buffer = buffer
        self._sums = torch.zeros(2, dtype=torch.int64, device=rows.device)
        self._on_host = torch.zeros(2, dtype=torch.int64, pin_memory=rows.is_cuda)
        self._seen = [0, 0]
        self.where = torch.zeros(1, dtype=torch.int32, device=rows.device)
        """By the ids of the bank that was called last: where those of its list lie."""
        self._banks: list[CachedBank] = []
        self._unread = RowCounts()
        self.called = False
        """Since sums were read last; what graphs replay is no call."""

    @property
    def capacity(self) -> int:
        """Rows of the buffer."""
        return int(self._buffer.stop - self._buffer.start)

    def add(
        self,
        bank: HostBank,
        slots: slice,
        *,
        rows: Tensor | None = None,
        fixed: Tensor | None = None,
        values: Sequence[Tensor] = (),
    ) -> CachedBank:
        """A bank of such rows whose cache is the pool's rows `slots`.

        `rows` [N]: by id, its row of the bank; None: the same. `fixed` [N]: where ids lie that are in the pool for good, -1: the
        others. `values`: by id, [N] each, what goes where the row does.
        """
        self._banks.append(CachedBank(self, bank, slots, self._sums, rows, fixed, tuple(values)))
        if self._banks[-1].ids > len(self.where):
            self.where = torch.zeros(self._banks[-1].ids, dtype=torch.int32, device=self.rows.device)
        return self._banks[-1]

    def counts(self) -> RowCounts:
        """Since the last call of this. Waits for the device, but not for replays of captured calls, whose sums `read` has to get."""
        if self.called:
            self.send()
            if self.rows.is_cuda:
                torch.cuda.current_stream(self.rows.device).synchronize()
            self.read()
        found, self._unread = self._unread, RowCounts()
        return found

    def send(self) -> None:
        """Copy the sums so far to the host, for `read`, behind what was launched."""
        self._on_host.copy_(self._sums, non_blocking=True)

    def read(self) -> None:
        """Take over the sums that `send` has copied. Precondition: that copy is over."""
        sums = self._on_host.tolist()
        wanted, moved = (now - before for now, before in zip(sums, self._seen, strict=True))
        self._seen = sums
        before, self.called = self._unread, False
        self._unread = RowCounts(before.wanted + wanted, before.hit + wanted - moved, before.moved + moved)

    def repair(self) -> None:
        """A pass was broken off: what a bank's call may have left half done is begun anew. Not within a captured graph."""
        for bank in self._banks:
            if bank.reaching:
                bank.restart()

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

    def __init__(
        self,
        pool: RowPool,
        bank: HostBank,
        slots: slice,
        sums: Tensor,
        rows: Tensor | None,
        fixed: Tensor | None,
        values: tuple[Tensor, ...],
    ) -> None:
        device, count = pool.rows.device, len(bank.tensor)
        held = min(slots.stop - slots.start, count)
        rows = torch.arange(count) if rows is None else rows.cpu()
        self._pool, self._bank, self._first, self._held, self._sums = pool, bank, slots.start, held, sums
        self.ids = len(rows)
        """N."""
        fixed = torch.full_like(rows, -1) if fixed is None else fixed.cpu()
        self.fixed = int((fixed >= 0).sum())
        """Ids that are in the pool for good."""
        others = (fixed < 0).nonzero()[:, 0]
        owners = torch.full((count,), -1).index_copy_(0, rows[others], others)[:held]
        directory = fixed.index_copy(0, owners, torch.arange(slots.start, slots.start + held))

        def ended(numbers: Tensor) -> Tensor:
            # The last entry is written to where there is nothing to write.
            return torch.cat([numbers, numbers.new_zeros(1)]).int().to(device)

        self._directory, self._owners, self._rows = ended(directory), ended(owners), ended(rows)
        """By id: where each lies in the pool, -1: nowhere. By the cache's rows: whose content it is. By id: its row of the bank."""
        self._used = torch.zeros(held + 1, dtype=torch.int32, device=device)
        """By the cache's rows: the call that used it last."""
        self._call = torch.zeros(1, dtype=torch.int32, device=device)
        self._values = tuple(zip(values, pool.values, strict=True))
        self._start = self._directory.clone(), self._owners.clone()
        self.reaching = False
        """A call is under way; after one that was broken off, until `restart`."""
        self._fill()

    @property
    def room(self) -> int:
        """Ids that one call is sure to reach, whichever they are: rows of the cache that it does not use make room as well."""
        sure = self._pool.capacity + self._held
        return self.ids if self.ids - self.fixed <= sure else sure

    def restart(self) -> None:
        """Keep what was kept at the start, whatever a call that was broken off has left."""
        for held, start in zip((self._directory, self._owners), self._start, strict=True):
            held.copy_(start)
        for held in (self._used, self._call):
            held.zero_()
        self._fill()
        self.reaching = False

    def _fill(self) -> None:
        """The cache's rows, as its owners say at the start."""
        held, first = self._held, self._first
        if held:
            self._pool.rows[first : first + held].view(held, -1).copy_(self._bank.tensor[:held].view(held, -1))
            for given, there in self._values:
                there[first : first + held] = given[self._owners[:held].long()]

    def reach(self, ids: Tensor, count: Tensor | None = None) -> Tensor:
        """Where the rows `ids` [C] lie in the pool, [C] int32, valid until the pool's next call, and until then in its `where`, too.

        Each is named once, in any order; `count` [1] int32: only so many of them are wanted (None: all), the others may be anything
        from 0 to the last id. Of ids that are not `fixed` at most as many as the buffer and the bank's cache have rows. The caller's
        current stream does it all.
        """
        pool = self._pool
        most = pool.capacity + self._held + self.fixed
        assert len(ids) <= most, f"{len(ids)} rows do not go into {most}"
        if not len(ids):
            return ids.int()
        pool.called = self.reaching = True
        if gpu.serves(ids.device):
            from rowcast.kernels.gpu import row_cache

            kept = row_cache.Kept(
                self._directory[:-1], self._rows[:-1], self._owners[: self._held], self._used[: self._held], self._call
            )
            found = row_cache.reach(
                kept,
                ids,
                count,
                first=self._first,
                buffer=pool.first,
                sums=self._sums,
                where=pool.where,
                values=self._values,
            )
            at, rows, places, number = found
        else:
            at, rows, places, number = self._reach(ids.long(), count)
        self._bank.gather(rows, number, pool.rows, places)
        self.reaching = False
        return at

    def check(self) -> None:
        for slot, owner in enumerate(self._owners[: self._held].tolist()):
            assert int(self._directory[owner]) == self._first + slot, f"cache row {slot} is {owner}'s, which lies elsewhere"
            row = self._pool.rows[self._first + slot].cpu().view(-1)
            there = self._bank.tensor[int(self._rows[owner])].view(-1)
            assert torch.equal(row, there), f"cache row {slot} is not the bank's row of {owner}"
            for given, held in self._values:
                assert given[owner] == held[self._first + slot]
        assert int((self._directory[:-1] >= 0).sum()) == self._held + self.fixed

    def _reach(self, ids: Tensor, count: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `kernels.gpu.row_cache.reach`, ids int64."""
        held, capacity, device = self._held, len(ids), ids.device
        directory, owners, used = self._directory, self._owners, self._used
        listed = torch.arange(capacity, device=device)
        wanted = torch.ones_like(listed, dtype=torch.bool) if count is None else listed < count
        at = directory[ids]
        missing = wanted & (at < 0)
        cached = wanted & (at >= self._first) & (at < self._first + held)
        order = missing.cumsum(0) - 1
        lacking = ids.new_zeros(capacity + 1).scatter_(0, torch.where(missing, order, capacity), ids)[:capacity]
        number = missing.sum(dtype=torch.int32)[None]
        self._sums += torch.stack((cached.sum() + number[0], number[0].long()))
        self._call += 1
        used.scatter_(0, torch.where(cached, at - self._first, held).long(), self._call.expand(capacity))
        ages = (self._call - used[:held]).clamp(max=OLDEST)
        victims = ages.argsort(descending=True, stable=True)
        number_held = torch.minimum(number, (ages > 0).sum(dtype=torch.int32))
        most = min(held, capacity)
        stays = listed < number_held
        slots = torch.full_like(listed, held)
        slots[:most] = victims[:most]
        slots = torch.where(stays, slots, held).sort().values
        dump = len(directory) - 1
        directory.index_fill_(0, torch.where(stays, owners[slots].long(), dump), -1)
        places = torch.where(stays, slots + self._first, self._pool.first + listed - number_held).int()
        directory.scatter_(0, torch.where(stays, lacking, dump), places)
        owners.scatter_(0, slots, lacking.int())
        used.scatter_(0, slots, self._call.expand(capacity))
        at = torch.where(missing, places[order.clamp(min=0)], at.clamp(min=0))
        self._pool.where.index_copy_(0, ids[wanted], at[wanted])
        new = listed < number
        for given, there in self._values:
            there.index_copy_(0, places[new].long(), given[lacking[new]])
        return at, self._rows[lacking], places, number
