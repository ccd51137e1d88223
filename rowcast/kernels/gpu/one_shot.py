"""A sum over GPUs in one kernel, alone or with the norm that follows it.

Every rank writes its part into the memory of each peer and adds all parts in the order of ranks. Each element goes as one word that
holds the number of the call beside it, so that a word tells by itself that it has arrived: nobody signals, and nobody waits for a write
to be acknowledged (the idea of NCCL's low-latency protocol). A message is cut into chunks, which know nothing of each other. Two places
take turns, so that nobody waits again at the end: who begins call n + 1 has heard everybody in call n, where call n - 1 has ended, and
its place is free. Numbers of calls are counted on the device: captured in a graph, a call is replayed like any other.

With a norm, a token's chunks tell each other their mean and their sum of squares, once their parts are added: programs begin in order,
and those of a token are on the GPU together. A word is one access of 4 or 8 bytes, for which no order with others is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rowcast.kernels.gpu import MOST_TOKENS
from rowcast.kernels.gpu.late import RING, Ring
from rowcast.kernels.gpu.overlap import overlap

CHUNK: Final = 1024
"""Elements of a chunk."""
MOST_PIECES: Final = 64
"""Chunks of a token that is normed."""
FOREVER: Final = (1 << 31) - 1
"""Looks at what a peer writes before a program gives up, and the sum is wrong: for calls that no peer may miss."""


class Shared:
    """The memory of one rank that all may write, and what the rank alone counts there. For messages of up to `most` elements."""

    def __init__(self, addresses: Sequence[int], rank: int, most: int, dtype: torch.dtype, device: torch.device) -> None:
        """`addresses`: where this rank sees each rank's memory, `size(...)` bytes of it, zero before anybody's first call."""
        self.rank, self.most, self.dtype = rank, most, dtype
        self.chunks = -(-most // CHUNK)
        self.addresses = torch.tensor(list(addresses), dtype=torch.int64, device=device)
        self.calls = torch.zeros(self.chunks, dtype=torch.int64, device=device)
        """Of each chunk."""
        self.arrived = torch.zeros(MOST_PIECES + 1, MOST_TOKENS, dtype=torch.int64, device=device)
        """Chunks of each token that have told their statistics, since ever, by how many a token has."""
        self.stats = torch.zeros(2 * self.chunks, dtype=torch.float32, device=device)
        """Of each chunk: its mean and the sum of squares around it."""

    @staticmethod
    def size(most: int, world: int, dtype: torch.dtype) -> int:
        """Bytes: two places for each peer's words."""
        return 2 * (world - 1) * -(-most // CHUNK) * CHUNK * 2 * dtype.itemsize


def sum_(x: Tensor, shared: Shared, looks: int = FOREVER) -> Tensor:
    """`x`, contiguous, up to `shared.most` elements of its dtype, now the sum over all ranks, added in float32 and rounded once.

    All ranks make the same calls in the same order, on one stream at a time. One launch.
    """
    _launch(x, shared, looks)
    return x


def sum_norm(
    x: Tensor,
    shared: Shared,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    keep: Ring | None = None,
    looks: int = FOREVER,
) -> tuple[Tensor, Tensor]:
    """`sum_` of x [T, D], and the norm of what came of it, [T, D], as `norms.norm` takes it. T <= 16; D a multiple of `CHUNK`, at most
    `MOST_PIECES` of them.

    Mean and variance are put together from those of chunks, in float32 and in order: a token's bits are its own. One launch.
    """
    tokens, size = x.shape
    assert size % CHUNK == 0 and size <= MOST_PIECES * CHUNK and tokens <= MOST_TOKENS
    assert all(each is None or each.shape == (size,) for each in (weight, bias))
    assert keep is None or (keep.rows.shape == (RING, size) and keep.rows.is_contiguous())
    normed = torch.empty_like(x)
    _launch(x, shared, looks, size // CHUNK, weight, bias, eps, rms, normed, keep)
    return x, normed


def _launch(
    x: Tensor,
    shared: Shared,
    looks: int,
    pieces: int = 0,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 0.0,
    rms: bool = False,
    normed: Tensor | None = None,
    keep: Ring | None = None,
) -> None:
    assert x.is_contiguous() and x.dtype == shared.dtype and 0 < x.numel() <= shared.most
    _sum_kernel[(triton.cdiv(x.numel(), CHUNK),)](
        x,
        shared.addresses,
        shared.calls,
        shared.arrived[pieces],
        shared.stats,
        weight,
        bias,
        normed,
        None if keep is None else keep.rows,
        None if keep is None else keep.starts,
        None if keep is None else keep.counts,
        x.numel(),
        looks,
        eps,
        RANK=shared.rank,
        WORLD=len(shared.addresses),
        CHUNKS=shared.chunks,
        CHUNK=CHUNK,
        PIECES=pieces,
        PLACES=triton.next_power_of_2(max(1, pieces)),
        RMS=rms,
        num_warps=8,
        **overlap(x),
    )


@triton.jit
def _word(x, call):
    """Each element's bits above the number of the call: int32 of 16 bits, int64 of 32."""
    if x.dtype == tl.float32:
        return (x.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (call & 0xFFFFFFFF)
    else:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16) | (call & 0xFFFF).to(tl.int32)


@triton.jit
def _missing(words, call):
    """How many of the words are not this call's."""
    low: tl.constexpr = 0xFFFFFFFF if words.dtype == tl.int64 else 0xFFFF
    return tl.sum(((words & low) != (call & low).to(words.dtype)).to(tl.int32), 0)


@triton.jit
def _element(words, dtype: tl.constexpr):
    """float32."""
    if words.dtype == tl.int64:
        return (words >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        return (words >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit(do_not_specialize=["looks"])
def _sum_kernel(
    x_ptr,  # [count]
    addresses_ptr,  # int64 [WORLD]
    calls_ptr,  # int64 [CHUNKS]
    arrived_ptr,  # int64 [tokens]
    stats_ptr,  # float32 [CHUNKS, 2]
    weight_ptr,  # [PIECES CHUNK] or None
    bias_ptr,  # [PIECES CHUNK] or None
    normed_ptr,  # [count]
    ring_ptr,  # [16, PIECES CHUNK] or None
    ring_starts_ptr,  # int32 [1]
    ring_counts_ptr,  # int32 [1]
    count,
    looks,
    eps,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    PIECES: tl.constexpr,  # chunks of a token; 0: no norm
    PLACES: tl.constexpr,  # a power of 2 from PIECES on
    RMS: tl.constexpr,
    OVERLAP: tl.constexpr,  # see overlap.py
):
    chunk = tl.program_id(0)
    offset = tl.arange(0, CHUNK)
    at = chunk * CHUNK + offset
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    word_ptr: tl.constexpr = tl.pointer_type(tl.int64 if dtype == tl.float32 else tl.int32)
    column = at
    weight = at
    bias = at
    if PIECES > 0:
        column = chunk % PIECES * CHUNK + offset
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + column)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + column)
    mine = tl.multiple_of(tl.load(addresses_ptr + RANK).to(word_ptr), 16)
    if OVERLAP:
        gdc_wait()
    call = tl.load(calls_ptr + chunk) + 1
    x = tl.load(x_ptr + at, mask=at < count, other=0.0)
    word = _word(x, call)
    place = call % 2 * (WORLD - 1) * CHUNKS + chunk
    for peer in tl.static_range(WORLD):
        if peer != RANK:
            theirs = tl.multiple_of(tl.load(addresses_ptr + peer).to(word_ptr), 16)
            own = RANK if peer > RANK else RANK - 1  # among the peer's peers
            tl.store(theirs + (place + own * CHUNKS) * CHUNK + offset, word)
    total = tl.zeros([CHUNK], tl.float32)
    for peer in tl.static_range(WORLD):
        if peer == RANK:
            total += x.to(tl.float32)
        else:
            other = peer if peer < RANK else peer - 1
            part = mine + (place + other * CHUNKS) * CHUNK + offset
            words = tl.load(part, volatile=True)
            left = looks
            while (_missing(words, call) > 0) & (left > 0):
                words = tl.load(part, volatile=True)
                left -= 1
            total += _element(words, dtype)
    if OVERLAP:
        gdc_launch_dependents()
    rounded = total.to(dtype)
    tl.store(calls_ptr + chunk, call)
    tl.store(x_ptr + at, rounded, mask=at < count)
    if PIECES > 0:
        token = chunk // PIECES
        y = rounded.to(tl.float32)
        mean = 0.0
        if not RMS:
            mean = tl.sum(y, 0) / CHUNK
        squares = tl.sum((y - mean) * (y - mean), 0)
        if PIECES > 1:
            tl.store(stats_ptr + 2 * chunk, mean)
            tl.store(stats_ptr + 2 * chunk + 1, squares)
            tl.debug_barrier()  # they are there
            before = tl.atomic_add(arrived_ptr + token, 1, sem="acq_rel", scope="gpu")
            all_of_call = (before // PIECES + 1) * PIECES
            left = looks
            while (tl.atomic_add(arrived_ptr + token, 0, sem="acquire", scope="gpu") < all_of_call) & (left > 0):
                left -= 1
            tl.debug_barrier()  # all threads know
            piece = tl.arange(0, PLACES)
            stats_at = stats_ptr + 2 * (token * PIECES + piece)
            means = tl.load(stats_at, mask=piece < PIECES, other=0.0, volatile=True)
            squares = tl.sum(tl.load(stats_at + 1, mask=piece < PIECES, other=0.0, volatile=True), 0)
            if not RMS:
                mean = tl.sum(means, 0) / PIECES
                apart = tl.where(piece < PIECES, means - mean, 0.0)
                squares += CHUNK * tl.sum(apart * apart, 0)
        y = (y - mean) * tl.rsqrt(squares / (PIECES * CHUNK) + eps)
        if weight_ptr is not None:
            y *= weight.to(tl.float32)
        if bias_ptr is not None:
            y += bias.to(tl.float32)
        tl.store(normed_ptr + at, y.to(dtype))
        if ring_ptr is not None:
            row = (tl.load(ring_starts_ptr) + token) % 16
            if token < tl.load(ring_counts_ptr):
                tl.store(ring_ptr + row * PIECES * CHUNK + column, y.to(dtype))
