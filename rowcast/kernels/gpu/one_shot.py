"""A sum over GPUs in one kernel: every rank puts its part where the others can read it, and adds all parts in the order of ranks.

A message is cut into chunks, which know nothing of each other. For a chunk, a program copies the own part into the memory that is
shared, tells each peer the number of the call, waits until all peers have told it theirs, and reads their parts. Two places take turns,
so that nobody waits again at the end: who is in call n + 1 has seen everybody begin it, and so end call n - 1. Numbers of calls are
counted on the device: captured in a graph, a call is replayed like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rowcast.kernels.gpu.overlap import overlap

CHUNK: Final = 1024
"""Elements of a chunk."""
FOREVER: Final = 1 << 60
"""Looks at a peer's number before a program gives up, and the sum is wrong: for calls that no peer may miss."""


class Shared:
    """The memory of one rank that all may read, and what the rank alone counts there. For messages of up to `most` elements."""

    def __init__(self, addresses: Sequence[int], rank: int, most: int, dtype: torch.dtype, device: torch.device) -> None:
        """`addresses`: where this rank sees each rank's memory, `size(...)` bytes of it, zero before anybody's first call."""
        self.rank, self.most, self.dtype = rank, most, dtype
        self.chunks = -(-most // CHUNK)
        self.addresses = torch.tensor(list(addresses), dtype=torch.int64, device=device)
        self.calls = torch.zeros(self.chunks, dtype=torch.int64, device=device)
        """Of each chunk."""

    @staticmethod
    def size(most: int, world: int, dtype: torch.dtype) -> int:
        """Bytes: two places for each chunk, then each rank's number of each chunk's call."""
        chunks = -(-most // CHUNK)
        return 2 * chunks * CHUNK * dtype.itemsize + 8 * world * chunks


def sum_(x: Tensor, shared: Shared, looks: int = FOREVER) -> Tensor:
    """`x`, contiguous, up to `shared.most` elements of its dtype, now the sum over all ranks, added in float32 and rounded once.

    All ranks make the same calls in the same order, on one stream at a time. One launch.
    """
    count = x.numel()
    assert x.is_contiguous() and x.dtype == shared.dtype and 0 < count <= shared.most
    _sum_kernel[(triton.cdiv(count, CHUNK),)](
        x,
        shared.addresses,
        shared.calls,
        count,
        looks,
        RANK=shared.rank,
        WORLD=len(shared.addresses),
        CHUNKS=shared.chunks,
        CHUNK=CHUNK,
        WIDTH=x.element_size(),
        num_warps=4,
        **overlap(x),
    )
    return x


@triton.jit(do_not_specialize=["looks"])
def _sum_kernel(
    x_ptr,  # [count]
    addresses_ptr,  # int64 [WORLD]
    calls_ptr,  # int64 [CHUNKS]
    count,
    looks,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,  # bytes of an element
    OVERLAP: tl.constexpr,  # see overlap.py
):
    chunk = tl.program_id(0)
    offset = tl.arange(0, CHUNK)
    at = chunk * CHUNK + offset
    if OVERLAP:
        gdc_wait()
    call = tl.load(calls_ptr + chunk) + 1
    place = ((call % 2) * CHUNKS + chunk) * (CHUNK * WIDTH)
    numbers = 2 * CHUNKS * CHUNK * WIDTH
    x = tl.load(x_ptr + at, mask=at < count, other=0.0)
    mine = tl.load(addresses_ptr + RANK)
    tl.store(tl.multiple_of((mine + place).to(tl.pointer_type(x.dtype)), 16) + offset, x)
    tl.debug_barrier()  # all of the chunk is there
    for peer in tl.static_range(WORLD):
        if peer != RANK:
            theirs = (tl.load(addresses_ptr + peer) + numbers).to(tl.pointer_type(tl.int64))
            tl.atomic_xchg(theirs + RANK * CHUNKS + chunk, call, sem="release", scope="sys")
    own = (mine + numbers).to(tl.pointer_type(tl.int64))
    for peer in tl.static_range(WORLD):
        if peer != RANK:
            number = own + peer * CHUNKS + chunk
            left = looks
            while (tl.atomic_add(number, 0, sem="acquire", scope="sys") < call) & (left > 0):
                left -= 1
    tl.debug_barrier()  # all threads know
    total = tl.zeros([CHUNK], tl.float32)
    for peer in tl.static_range(WORLD):
        if peer == RANK:
            total += x.to(tl.float32)
        else:
            part = tl.multiple_of((tl.load(addresses_ptr + peer) + place).to(tl.pointer_type(x.dtype)), 16)
            total += tl.load(part + offset, volatile=True).to(tl.float32)
    if OVERLAP:
        gdc_launch_dependents()
    tl.store(calls_ptr + chunk, call)
    tl.store(x_ptr + at, total.to(x.dtype), mask=at < count)
