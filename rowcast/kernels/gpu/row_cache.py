"""Where the rows of a list lie in a cache on the device, and which of its places those that are missing take: one launch, no question.

A row that is missing takes the place of one that was not used for the longest time and is not in the list; where there are none left it
goes to a buffer. `offload.row_cache` has the reference, and fetches what this says.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

OLDEST = 255
"""Calls without use that count as such; places that were not used for longer are alike, the lower number goes first."""
_BLOCK = 4096


class Found(NamedTuple):
    """Of a list of C rows."""

    at: Tensor
    """int32 [C]: where each lies, once what is missing was fetched; 0 beyond the count."""
    rows: Tensor
    """int32 [C]: of the bank, those that are missing, in the list's order."""
    places: Tensor
    """int32 [C]: where each of these goes."""
    number: Tensor
    """int32 [1]: of these."""


class Kept(NamedTuple):
    """A cache's state, all on the device."""

    directory: Tensor
    """int32 [N]: by id, where it lies; -1: nowhere."""
    rows: Tensor
    """int32 [N]: by id, its row in the bank."""
    owners: Tensor
    """int32 [held]: by place in the cache, whose content it is."""
    used: Tensor
    """int32 [held]: the call that used it last."""
    call: Tensor
    """int32 [1]: the newest."""


def reach(
    kept: Kept,
    ids: Tensor,
    count: Tensor | None,
    *,
    first: int,
    buffer: int,
    sums: Tensor,
    where: Tensor,
    values: tuple[tuple[Tensor, Tensor], ...] = (),
) -> Found:
    """Look up `ids` [C], each named once, of which the first `count` int32 [1] count (None: all), and give places to those missing.

    `first`: of the cache's places, `buffer`: of the buffer's, among all. sums int64 [2]: how many are wanted that the cache may hold,
    and how many were missing, are added. where int32 [>= N]: gets each id's place, too. `values`: pairs of a tensor by id and one by
    place, at most two: those of rows that come are copied.
    """
    capacity, held = ids.shape[0], kept.owners.shape[0]
    assert capacity > 0 and len(values) <= 2
    out = torch.empty(5, capacity, dtype=torch.int32, device=ids.device)
    number = torch.empty(1, dtype=torch.int32, device=ids.device)
    (value_a, held_a), (value_b, held_b) = (*values, (None, None), (None, None))[:2]
    _reach[(1,)](
        ids,
        count,
        *kept,
        sums,
        where,
        out,
        number,
        value_a,
        held_a,
        value_b,
        held_b,
        capacity,
        held,
        first,
        buffer,
        OLD=OLDEST,
        BLOCK=min(_BLOCK, triton.next_power_of_2(capacity)),
        SLOTS=min(_BLOCK, triton.next_power_of_2(max(1, held))),
        num_warps=16,
    )
    return Found(out[0], out[1], out[2], number)


@triton.jit(do_not_specialize=["held", "first", "buffer"])
def _reach(
    ids,
    count,
    directory,
    rows,
    owners,
    used,
    call,
    sums,
    where,
    out,  # [5, capacity]: at, rows, places; places in the list of those missing; places in the cache that they take
    number,
    value_a,
    held_a,
    value_b,
    held_b,
    capacity,
    held,
    first,
    buffer,
    OLD: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """One program: what it writes it reads again behind a barrier."""
    now = tl.load(call) + 1
    total = capacity
    if count is not None:
        total = tl.minimum(tl.load(count), capacity)
    lacking, victims = out + 3 * capacity, out + 4 * capacity
    missing = 0
    wanted = 0
    for start in range(0, capacity, BLOCK):
        place = start + tl.arange(0, BLOCK)
        valid = place < total
        each = tl.load(ids + place, mask=valid, other=0)
        at = tl.load(directory + each, mask=valid, other=0)
        lacks = valid & (at < 0)
        cached = valid & (at >= first) & (at < first + held)
        tl.store(used + at - first, now, mask=cached)
        order = missing + tl.cumsum(lacks.to(tl.int32), 0) - 1
        tl.store(lacking + order, place, mask=lacks)
        tl.store(out + place, at, mask=(place < capacity) & (at >= 0))
        tl.store(where + each, at, mask=valid & (at >= 0))
        missing += tl.sum(lacks.to(tl.int32))
        wanted += tl.sum(cached.to(tl.int32))
    tl.debug_barrier()

    # How many of the cache's places were not used for how many calls; 0: in this one.
    bins = tl.arange(0, OLD + 1)
    ages = tl.zeros([OLD + 1], tl.int32)
    for start in range(0, held, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        ages += tl.histogram(tl.minimum(now - tl.load(used + slot, mask=slot < held, other=now), OLD), OLD + 1)
    ages = tl.where(bins == 0, 0, ages)
    evicted = tl.minimum(missing, tl.sum(ages))
    as_old = tl.sum(ages) - tl.cumsum(ages, 0) + ages
    least = tl.max(tl.where((bins > 0) & (as_old >= evicted), bins, 0))
    spare = evicted - tl.sum(tl.where(bins > least, ages, 0))
    taken = 0
    alike = 0
    for start in range(0, held, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        age = tl.minimum(now - tl.load(used + slot, mask=slot < held, other=now), OLD)
        same = (age == least).to(tl.int32)
        takes = (age > least) | ((age == least) & (alike + tl.cumsum(same, 0) <= spare))
        takes = takes & (slot < held)
        order = taken + tl.cumsum(takes.to(tl.int32), 0) - 1
        tl.store(victims + order, slot, mask=takes)
        taken += tl.sum(takes.to(tl.int32))
        alike += tl.sum(same)
    tl.debug_barrier()

    start = 0
    while start < missing:
        order = start + tl.arange(0, BLOCK)
        start += BLOCK
        valid = order < missing
        place = tl.load(lacking + order, mask=valid, other=0)
        each = tl.load(ids + place, mask=valid, other=0)
        stays = order < evicted
        slot = tl.load(victims + order, mask=stays, other=0)
        before = tl.load(owners + slot, mask=stays, other=0)
        tl.store(directory + before, -1, mask=stays)
        at = tl.where(stays, first + slot, buffer + order - evicted)
        tl.store(directory + each, at, mask=stays)
        tl.store(owners + slot, each.to(tl.int32), mask=stays)
        tl.store(used + slot, now, mask=stays)
        tl.store(where + each, at, mask=valid)
        tl.store(out + place, at, mask=valid)
        tl.store(out + capacity + order, tl.load(rows + each, mask=valid, other=0), mask=valid)
        tl.store(out + 2 * capacity + order, at, mask=valid)
        if value_a is not None:
            tl.store(held_a + at, tl.load(value_a + each, mask=valid, other=0), mask=valid)
        if value_b is not None:
            tl.store(held_b + at, tl.load(value_b + each, mask=valid, other=0), mask=valid)
    tl.store(number, missing)
    tl.store(call, now)
    tl.store(sums, tl.load(sums) + wanted + missing)
    tl.store(sums + 1, tl.load(sums + 1) + missing)
