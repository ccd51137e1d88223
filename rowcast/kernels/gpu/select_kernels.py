"""The kernels of `select.py`: the best scores of each shard, thresholds, unions over tokens, re-ranking."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rowcast.kernels.gpu.scratch import arrive

_LEAST = tl.constexpr(-(2**31))
_VALUE_STEPS = tl.constexpr(12)
_ALL = tl.constexpr(1 << 16)


_NO_SIGN = tl.constexpr(0x7FFFFFFF)
"""bits ^ (bits >> 31 & _NO_SIGN), of the int32 bits of a float32 number, is an integer of the same order, and the other way round."""


@triton.jit
def _largest_and_least(a_high, a_low, b_high, b_low):
    return tl.maximum(a_high, b_high), tl.minimum(a_low, b_low)


@triton.jit
def _best(values, valid, keep):
    """Which of the valid values [N] are the `keep` best, of equal ones the first, and how many of the best stand before each.

    The cut is found by trisection, first between values, where scores lie evenly, then between their bits, until the count is right.
    Precondition: at least `keep` are valid. N < 2^15.
    """
    bits = tl.where(values == 0, 0.0, values).to(tl.int32, bitcast=True)  # -0 equals 0.
    key = tl.where(valid, bits ^ (bits >> 31 & _NO_SIGN), _LEAST)
    high, low = tl.reduce((key, tl.where(valid, key, 2147483647)), 0, _largest_and_least)
    low = tl.minimum(low, high)
    room = keep  # Less how many are above `high`: what is left for those that equal the cut.
    step = 0
    while low < high:
        # At least `keep` reach low, fewer exceed high.
        first = (low | high) - ((low ^ high) >> 1)
        second = (first | high) - ((first ^ high) >> 1)
        if step < _VALUE_STEPS:
            least = (low ^ (low >> 31 & _NO_SIGN)).to(tl.float32, bitcast=True) * 0.33333334
            most = (high ^ (high >> 31 & _NO_SIGN)).to(tl.float32, bitcast=True) * 0.33333334
            first = (2 * least + most).to(tl.int32, bitcast=True)
            second = (least + 2 * most).to(tl.int32, bitcast=True)
            first = tl.minimum(tl.maximum(first ^ (first >> 31 & _NO_SIGN), low + 1), high)
            second = tl.minimum(tl.maximum(second ^ (second >> 31 & _NO_SIGN), first), high)
        reach = tl.sum((key >= first).to(tl.int32) + (key >= second).to(tl.int32) * 65536)
        reach_second, reach_first = reach >> 16, reach & 65535
        if reach_first == keep:
            low, high, room = first, first, _ALL
        elif reach_second == keep:
            low, high, room = second, second, _ALL
        elif reach_second > keep:
            low = second
        elif reach_first > keep:
            low, high, room = first, second - 1, keep - reach_second
        else:
            high, room = first - 1, keep - reach_first
        step += 1
    over = valid & (key > low)
    tied = valid & (key == low)
    counts = over.to(tl.int32) * 65536 + tied.to(tl.int32)
    before = tl.cumsum(counts, 0) - counts
    tied_before = before & 65535
    chosen = over | (tied & (tied_before < room))
    return chosen, (before >> 16) + tl.minimum(tied_before, room)


@triton.jit
def _bounds(table_ptr, shard, shards, total, keep, EVEN: tl.constexpr, ALIGNED: tl.constexpr):
    """A shard's first and last + 1 item, and how many are kept before it and up to it. ALIGNED: all begin at a multiple of 16."""
    if EVEN:
        first, stop = total * shard // shards, total * (shard + 1) // shards
        kept, kept_stop = first * keep // total, stop * keep // total
        if ALIGNED:
            first = tl.multiple_of(first, 16)
    else:
        first, stop = tl.load(table_ptr + shard), tl.load(table_ptr + shard + 1)
        kept, kept_stop = tl.load(table_ptr + shards + 1 + shard), tl.load(table_ptr + shards + 2 + shard)
    return first, stop, kept, kept_stop


@triton.jit
def top_ids_kernel(
    scores_ptr,  # float32 [total]
    table_ptr,  # int32 [2, shards + 1] or unused
    ids_ptr,  # int32 [kept]
    starts_ptr,  # int32 [shards + 1]
    count_ptr,  # int32 [1]
    total,
    keep,
    shards: tl.constexpr,
    EVEN: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One token's best, one CTA a shard."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    shard = tl.program_id(0)
    first, stop, kept, kept_stop = _bounds(table_ptr, shard, shards, total, keep, EVEN, ALIGNED)
    at = first + tl.arange(0, BLOCK)
    valid = at < stop
    chosen, before = _best(tl.load(scores_ptr + at, mask=valid, other=0.0), valid, kept_stop - kept)
    tl.store(ids_ptr + kept + before, at, mask=chosen)
    tl.store(starts_ptr + shard, kept)
    if shard == shards - 1:
        tl.store(starts_ptr + shards, kept_stop)
        tl.store(count_ptr, kept_stop)


@triton.jit(do_not_specialize=["tokens"])
def top_mask_kernel(
    scores_ptr,  # float32 [tokens, total]
    table_ptr,
    mask_ptr,  # uint8 [tokens, total]
    sizes_ptr,  # int32 [shards, BLOCK / CHUNK]: of the unions of each shard's chunks
    counter_ptr,  # int32 [shards]: zeros
    total,
    keep,
    shards,
    tokens,
    EVEN: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Several tokens' best, one CTA a shard and token; a shard's last one counts the union."""
    if OVERLAP:
        gdc_wait()
    shard, token = tl.program_id(0), tl.program_id(1)
    first, stop, kept, kept_stop = _bounds(table_ptr, shard, shards, total, keep, EVEN, ALIGNED)
    at = first + tl.arange(0, BLOCK)
    valid = at < stop
    row = token * total
    chosen, _ = _best(tl.load(scores_ptr + row + at, mask=valid, other=0.0), valid, kept_stop - kept)
    tl.store(mask_ptr + row + at, chosen.to(tl.uint8), mask=valid)
    if arrive(counter_ptr + shard, tokens):
        any_of = tl.zeros([BLOCK], tl.uint8)
        for t in tl.range(0, tokens, loop_unroll_factor=8):
            any_of = any_of | tl.load(mask_ptr + t * total + at, mask=valid, other=0, cache_modifier=".cg")
        sizes = tl.sum(tl.reshape(any_of.to(tl.int32), [BLOCK // CHUNK, CHUNK]), 1)
        tl.store(sizes_ptr + shard * (BLOCK // CHUNK) + tl.arange(0, BLOCK // CHUNK), sizes)


@triton.jit(do_not_specialize=["tokens"])
def above_mask_kernel(
    scores_ptr,  # float32 [tokens, total]
    thresholds_ptr,  # float32 [total] or None
    threshold,
    mask_ptr,  # uint8 [tokens, total]
    sizes_ptr,  # int32 [chunks]
    total,
    tokens,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Several tokens' scores above their thresholds, one CTA a chunk, which counts the chunk's union."""
    if OVERLAP:
        gdc_wait()
    chunk = tl.program_id(0)
    at = chunk * BLOCK + tl.arange(0, BLOCK)
    valid = at < total
    least = threshold
    if thresholds_ptr is not None:
        least = tl.load(thresholds_ptr + at, mask=valid, other=0.0)
    any_of = tl.zeros([BLOCK], tl.int32)
    for t in tl.range(0, tokens, loop_unroll_factor=8):
        chosen = valid & (tl.load(scores_ptr + t * total + at, mask=valid, other=0.0) > least)
        tl.store(mask_ptr + t * total + at, chosen.to(tl.uint8), mask=valid)
        any_of = any_of | chosen.to(tl.int32)
    tl.store(sizes_ptr + chunk, tl.sum(any_of))


@triton.jit(do_not_specialize=["tokens"])
def union_kernel(
    mask_ptr,  # uint8 [tokens, total]
    table_ptr,
    sizes_ptr,  # int32 [shards, chunks]
    ids_ptr,  # int32 [places]
    own_ptr,  # uint8 [tokens, places]
    starts_ptr,  # int32 [shards + 1]
    count_ptr,  # int32 [1]
    total,
    keep,
    shards,
    tokens,
    places,
    EVEN: tl.constexpr,
    ALIGNED: tl.constexpr,
    EQUAL: tl.constexpr,  # shards are single chunks, one after the other
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,  # of a shard
    SIZES: tl.constexpr,
    TOKENS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The ids that any token chose, ascending, and which token chose which. One CTA a chunk of a shard."""
    shard, chunk = tl.program_id(0), tl.program_id(1)
    if OVERLAP:
        gdc_wait()
    if EQUAL:
        first, stop = shard * CHUNK, total
    else:
        first, stop, _, _ = _bounds(table_ptr, shard, shards, total, keep, EVEN, ALIGNED)
    others = tl.arange(0, SIZES)
    sizes = tl.load(sizes_ptr + others, mask=others < shards * CHUNKS, other=0)
    count = tl.sum(sizes)
    start = tl.sum(tl.where(others < shard * CHUNKS + chunk, sizes, 0))
    token = tl.arange(0, TOKENS)[:, None]
    at = first + chunk * CHUNK + tl.arange(0, CHUNK)
    valid = at < tl.minimum(stop, first + (chunk + 1) * CHUNK)
    own = tl.load(mask_ptr + token * total + at[None, :], mask=valid[None, :] & (token < tokens), other=0)
    chosen = tl.max(own.to(tl.int32), 0)
    place = start + tl.cumsum(chosen, 0) - chosen
    taken = (chosen != 0) & (place < places)
    tl.store(ids_ptr + place, at, mask=taken)
    tl.store(own_ptr + token * places + place[None, :], own, mask=taken[None, :] & (token < tokens))
    if chunk == 0:
        tl.store(starts_ptr + shard, start)
        if shard == shards - 1:
            tl.store(starts_ptr + shards, count)
            tl.store(count_ptr, count)


@triton.jit
def above_ids_kernel(
    scores_ptr,  # float32 [total]
    thresholds_ptr,  # float32 [total] or None
    threshold,
    ids_ptr,  # int32 [total]
    count_ptr,  # int32 [1]
    total,
    CHUNK: tl.constexpr,
    BEFORE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One token's scores above their thresholds. Each CTA counts those before its chunk itself: faster than a second launch."""
    if OVERLAP:
        gdc_wait()
    begin = tl.program_id(0) * CHUNK
    found = tl.zeros([BEFORE], tl.int32)
    for first in tl.range(0, begin, BEFORE, loop_unroll_factor=4):
        at = first + tl.arange(0, BEFORE)
        least = threshold
        if thresholds_ptr is not None:
            least = tl.load(thresholds_ptr + at, mask=at < begin, other=0.0)
        found += ((at < begin) & (tl.load(scores_ptr + at, mask=at < begin, other=0.0) > least)).to(tl.int32)
    at = begin + tl.arange(0, CHUNK)
    valid = at < total
    least = threshold
    if thresholds_ptr is not None:
        least = tl.load(thresholds_ptr + at, mask=valid, other=0.0)
    chosen = (valid & (tl.load(scores_ptr + at, mask=valid, other=0.0) > least)).to(tl.int32)
    place = tl.sum(found) + tl.cumsum(chosen, 0) - chosen
    tl.store(ids_ptr + place, at, mask=chosen != 0)
    if begin + CHUNK >= total:
        tl.store(count_ptr, tl.sum(found) + tl.sum(chosen))


@triton.jit(do_not_specialize=["tokens"])
def rerank_kernel(
    exact_ptr,  # [tokens, places]
    ids_ptr,  # int32 [places]
    own_ptr,  # uint8 [tokens, places] or None
    starts_ptr,  # int32 [shards + 1]
    norms_ptr,  # float32 [total] or None
    table_ptr,  # int32 [2, shards + 1] or unused
    kept_ptr,  # uint8 [tokens, places], or None with the next ones
    kept_ids_ptr,  # int32 [keep]
    kept_hidden_ptr,  # [keep]
    count_ptr,  # int32 [1]
    total,
    keep,
    shards,
    places,
    tokens,
    candidates,  # of a token, where STATIC
    EVEN: tl.constexpr,
    STATIC: tl.constexpr,  # shards' candidates begin where `_bounds` says
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Each token's best among the candidates of a shard, one CTA a shard and token."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    shard, token = tl.program_id(0), tl.program_id(1)
    _, _, kept, kept_stop = _bounds(table_ptr, shard, shards, total, keep, EVEN, ALIGNED)
    if STATIC:  # Nothing to wait for.
        _, _, start, end = _bounds(None, shard, shards, total, candidates, True, ALIGNED)
    else:
        start, end = tl.load(starts_ptr + shard), tl.load(starts_ptr + shard + 1)
    at = start + tl.arange(0, BLOCK)
    inside = at < tl.minimum(end, places)
    row = token * places
    hidden = tl.load(exact_ptr + row + at, mask=inside, other=0.0)
    ids = tl.load(ids_ptr + at, mask=inside, other=0)
    values = hidden.to(tl.float32)
    if norms_ptr is not None:
        values = tl.abs(values) * tl.load(norms_ptr + ids, mask=inside, other=0.0)
    valid = inside
    if own_ptr is not None:
        valid = inside & (tl.load(own_ptr + row + at, mask=inside, other=0) != 0)
    chosen, before = _best(values, valid, tl.minimum(kept_stop - kept, tl.sum(valid.to(tl.int32))))
    if kept_ptr is not None:
        tl.store(kept_ptr + row + at, chosen.to(tl.uint8), mask=inside)
    else:
        tl.store(kept_ids_ptr + kept + before, ids, mask=chosen)
        tl.store(kept_hidden_ptr + kept + before, hidden, mask=chosen)
        if shard == shards - 1:
            tl.store(count_ptr, kept_stop)
