"""The kernels of `lm_head.py`: bounds, thresholds, lists of rows that may still win, and the last choice."""

from __future__ import annotations

import triton
import triton.language as tl

from rowcast.kernels.gpu.scratch import arrive

_SHORTEST = tl.constexpr(1e-10)
_LOWEST = tl.constexpr(-(2**63))


@triton.jit
def _ordered(values):
    """float32 -> int32 in the same order; -0 is 0, and NaN above all."""
    bits = tl.where(values == 0, 0.0, values).to(tl.int32, bitcast=True)
    return tl.where(values != values, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _unordered(keys):
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _kth(values, K: tl.constexpr):
    """The K-th largest, bit by bit: NaN, which keeps all rows, where that is one of K NaNs."""
    if K == 1:
        found = tl.max(_ordered(values), 0)
    else:
        keys = _ordered(values).to(tl.uint32, bitcast=True) ^ 0x80000000
        best = tl.full([1], 0, tl.uint32)
        bit = tl.full([1], 0x80000000, tl.uint32)
        for _ in range(32):
            best = tl.where(tl.sum((keys >= (best | bit)).to(tl.int32), 0) >= K, best | bit, best)
            bit = bit >> 1
        found = tl.max((best ^ 0x80000000).to(tl.int32, bitcast=True), 0)
    return _unordered(found)


@triton.jit
def _radius(radii, at, mask, lengths, token, estimate, RELATIVE: tl.constexpr):
    """How far `estimate` of the rows `at` may be off."""
    across, whole = tl.load(lengths + 2 * token), tl.load(lengths + 2 * token + 1)
    radius = tl.load(radii + 2 * at, mask=mask, other=0.0) * across + tl.load(radii + 2 * at + 1, mask=mask, other=0.0) * whole
    return radius + RELATIVE * (tl.abs(estimate) + radius)


@triton.jit
def parts_kernel(
    x,  # [T, columns]
    directions,  # float32 [m, columns]
    along,  # float32 [T, m]
    squares,  # float64 [T]
    lengths,  # float32 [T, 2]
    counts,  # int32 [CELLS]
    rescored,  # int64 [T]
    arrivals,  # int32 [T]
    columns,
    CELLS: tl.constexpr,
    BLOCK: tl.constexpr,
    DIRECTIONS: tl.constexpr,
):
    """Coordinates along the directions and lengths across them and in all, each rounded up; program (direction, token).

    The program behind the last direction squares the token. Sums are float64, so that the difference of squares is one.
    DIRECTIONS: a power of two that holds them.
    """
    direction, token = tl.program_id(0), tl.program_id(1)
    many = tl.num_programs(0) - 1
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, columns, BLOCK):
        mask = start + lane < columns
        value = tl.load(x + token * columns + start + lane, mask=mask, other=0.0).to(tl.float64)
        if direction < many:
            other = tl.load(directions + direction * columns + start + lane, mask=mask, other=0.0).to(tl.float64)
        else:
            other = value
        total += value * other
    found = tl.sum(total, 0)
    if direction < many:
        tl.store(along + token * many + direction, found.to(tl.float32))
    else:
        tl.store(squares + token, found)
        tl.store(rescored + token, 0)
        tl.store(counts + tl.arange(0, CELLS), tl.zeros([CELLS], tl.int32), mask=token == 0)
    if arrive(arrivals + token, many + 1):
        span = tl.arange(0, DIRECTIONS)
        part = tl.load(along + token * many + span, mask=span < many, other=0.0, cache_modifier=".cg").to(tl.float64)
        square = tl.load(squares + token, cache_modifier=".cg")
        # The coordinates were rounded to float32, and the directions are orthonormal to that: 2^-21 has room for both.
        across = tl.maximum(square - tl.sum(part * part, 0), 0.0) + square * 5e-7
        whole = tl.sqrt(square) * (1 + 1e-6)
        short = whole < _SHORTEST
        tl.store(lengths + 2 * token, tl.where(short, float("inf"), tl.sqrt(across) * (1 + 1e-6)).to(tl.float32))
        tl.store(lengths + 2 * token + 1, tl.where(short, float("inf"), whole).to(tl.float32))


@triton.jit
def bounds_kernel(
    estimate,  # float32 [T, V]; the correction is added
    codes,  # uint8 [V, 32 BLOCKS]: the correction's, in 4 bits; None: it is in the estimate
    scales,  # float16 [V, groups]
    along,  # float32 [T, m]
    radii,  # float32 [V, 2]
    lengths,
    maxima,  # float32 [T, blocks, KEPT, GROUPS]
    thresholds,  # float32 [T]
    arrivals,  # int32 [T]
    total,  # V
    many,  # m
    code_stride,
    scale_stride,
    scale_step,
    K: tl.constexpr,
    RELATIVE: tl.constexpr,
    BLOCKS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    EACH: tl.constexpr,
    KEPT: tl.constexpr,
    MAXIMA: tl.constexpr,
):
    """A lower bound of the K-th largest logit: the K-th largest of the groups' best lower bounds. Program (block, token).

    A group is EACH rows, a block GROUPS of them, of each of which the KEPT (1 or 2) best count; MAXIMA: a power of two that holds
    them all. The correction has BLOCKS blocks of 64 columns, GROUP of them to a scale.
    """
    block, token = tl.program_id(0), tl.program_id(1)
    blocks = tl.num_programs(0)
    at = block * GROUPS * EACH + tl.arange(0, GROUPS * EACH)
    mask = at < total
    rough = tl.load(estimate + token * total + at, mask=mask, other=0.0)
    if codes is not None:
        j = tl.arange(0, 32)
        for part in tl.static_range(BLOCKS):
            column = part * 64 + j
            low = tl.load(along + token * many + column, mask=column < many, other=0.0)
            high = tl.load(along + token * many + column + 32, mask=column + 32 < many, other=0.0)
            packed = tl.load(codes + at[:, None].to(tl.int64) * code_stride + part * 32 + j[None, :], mask=mask[:, None], other=0)
            scale = tl.load(scales + at * scale_stride + part // GROUP * scale_step, mask=mask, other=0.0).to(tl.float32)
            levels = ((packed & 15).to(tl.float32) - 7.5) * low[None, :] + ((packed >> 4).to(tl.float32) - 7.5) * high[None, :]
            rough += tl.sum(levels, 1) * scale
        tl.store(estimate + token * total + at, rough, mask=mask)
    lower = tl.where(mask, rough - _radius(radii, at, mask, lengths, token, rough, RELATIVE), float("-inf"))
    grouped = tl.reshape(lower, [GROUPS, EACH])
    best = tl.max(grouped, 1)
    to = maxima + (token * blocks + block) * KEPT * GROUPS + tl.arange(0, GROUPS)
    tl.store(to, best)
    if KEPT == 2:
        tl.store(to + GROUPS, tl.max(tl.where(grouped == best[:, None], float("-inf"), grouped), 1))
    if arrive(arrivals + token, blocks):
        span = tl.arange(0, MAXIMA)
        number = blocks * KEPT * GROUPS
        known = tl.load(maxima + token * number + span, mask=span < number, other=float("-inf"), cache_modifier=".cg")
        tl.store(thresholds + token, _kth(known, K))


@triton.jit
def finer_kernel(
    rough,  # float32 [T, capacity]: estimates by the stages before
    refinement,  # float32 [T, capacity]: what the stage adds; becomes their sum
    ids,  # int32 [capacity]
    owners,  # int32 [capacity]
    count,  # int32 [1]
    radii,
    lengths,
    thresholds,  # float32 [T]: rises
    capacity,
    K: tl.constexpr,
    RELATIVE: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Finer estimates of the listed rows and what they make of the lower bound; program (token). Groups are every SIZE-th row."""
    token = tl.program_id(0)
    limit = tl.load(count)
    if limit > capacity:
        return
    lane = tl.arange(0, SIZE)
    best = tl.full([SIZE], float("-inf"), tl.float32)
    for start in range(0, limit, SIZE):
        place = start + lane
        mask = place < limit
        at = token * capacity + place
        own = ((tl.load(owners + place, mask=mask, other=0) >> token) & 1) != 0
        finer = tl.load(rough + at, mask=mask, other=0.0) + tl.load(refinement + at, mask=mask, other=0.0)
        tl.store(refinement + at, finer, mask=mask)
        radius = _radius(radii, tl.load(ids + place, mask=mask, other=0), mask, lengths, token, finer, RELATIVE)
        best = tl.maximum(best, tl.where(own, finer - radius, float("-inf")))
    tl.store(thresholds + token, tl.maximum(tl.load(thresholds + token), _kth(best, K)))


@triton.jit
def choose_kernel(
    estimate,  # float32 [T, stride]
    ids,  # int32 [places] or None: all rows
    owners,  # int32 [places] or None: all tokens'
    count,  # int32 [1] or None
    radii,
    lengths,
    thresholds,
    chosen_ids,  # int32 [capacity]
    chosen_owners,  # int32 [capacity]: bit t, that token t's best may be the row
    chosen_estimate,  # float32 [T, capacity] or None: not wanted
    chosen_count,  # int32 [1]: 0
    verdict,  # int32 [2] or None: rows that are read in full, by the list and of all
    rescored,  # int64 [T]
    arrivals,  # int32 [1]
    tokens,
    places,
    capacity,
    total,  # V
    RELATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Append the rows whose upper bound reaches the threshold of some token to a list, in any order. Program (block).

    What does not fit is counted, not written. With `verdict` the list is the last: where one overflowed, all rows are to be read.
    """
    block = tl.program_id(0)
    limit = places
    if count is not None:
        limit = tl.load(count)
    place = block * BLOCK + tl.arange(0, BLOCK)
    if (block * BLOCK < limit) & (limit <= places):
        mask = place < limit
        at = place
        owned = tl.full([BLOCK], -1, tl.int32)
        if ids is not None:
            at = tl.load(ids + place, mask=mask, other=0)
            owned = tl.load(owners + place, mask=mask, other=0)
        bits = tl.zeros([BLOCK], tl.int32)
        for token in range(tokens):
            rough = tl.load(estimate + token * places + place, mask=mask, other=0.0)
            upper = rough + _radius(radii, at, mask, lengths, token, rough, RELATIVE)
            # "Not below" keeps NaN and what is compared with NaN.
            keep = mask & (((owned >> token) & 1) != 0) & ((upper < tl.load(thresholds + token)) == 0)
            bits |= keep.to(tl.int32) << token
            if verdict is not None:
                tl.atomic_add(rescored + token, tl.sum(keep.to(tl.int64), 0), sem="relaxed")
        kept = bits != 0
        many = tl.sum(kept.to(tl.int32), 0)
        if many > 0:
            first = tl.atomic_add(chosen_count, many, sem="relaxed")
            to = first + tl.cumsum(kept.to(tl.int32), 0) - 1
            fits = kept & (to < capacity)
            tl.store(chosen_ids + to, at, mask=fits)
            tl.store(chosen_owners + to, bits, mask=fits)
            if chosen_estimate is not None:
                for token in range(tokens):
                    rough = tl.load(estimate + token * places + place, mask=mask, other=0.0)
                    tl.store(chosen_estimate + token * capacity + to, rough, mask=fits)
    if arrive(arrivals, tl.num_programs(0)):
        over = limit > places
        if over:
            tl.store(chosen_count, capacity + 1)
        if verdict is not None:
            found = tl.load(chosen_count, cache_modifier=".cg")
            over = over | (found > capacity)
            tl.store(verdict, tl.where(over, 0, found))
            tl.store(verdict + 1, tl.where(over, total, 0))
            for token in range(tokens):
                tl.store(rescored + token, total.to(tl.int64), mask=over)


@triton.jit
def _keys(exact, ids, owners, whole, place, limit, token, capacity, total, over):
    """int64 keys that order by value and then from the lowest id up; the lowest of all where there is no row."""
    there = place < limit
    listed = there & (over == 0)
    value = tl.load(exact + token * capacity + place, mask=listed, other=0.0).to(tl.float32)
    value = tl.where(
        over, tl.load(whole + token.to(tl.int64) * total + place, mask=there & over, other=0.0).to(tl.float32), value
    )
    row = tl.where(over, place, tl.load(ids + place, mask=listed, other=0))
    own = ((tl.load(owners + place, mask=listed, other=0) >> token) & 1) != 0
    key = (_ordered(value).to(tl.int64) << 32) | (0x7FFFFFFF - row).to(tl.int64)
    return tl.where(there & (own | over), key, _LOWEST)


@triton.jit
def _write(keys, rank, values, found_ids, token, K: tl.constexpr):
    tl.store(values + token * K + rank, _unordered((keys >> 32).to(tl.int32)), mask=rank < K)
    tl.store(found_ids + token * K + rank, 0x7FFFFFFF - (keys & 0x7FFFFFFF), mask=rank < K)


@triton.jit
def top_kernel(
    exact,  # [T, capacity]
    ids,  # int32 [capacity]
    owners,  # int32 [capacity]
    whole,  # [T, V]
    verdict,  # int32 [2]
    partial,  # int64 [T, programs, KEPT]
    values,  # float32 [T, K]
    found_ids,  # int64 [T, K]
    fallback,  # uint8 [T]
    arrivals,  # int32 [T]
    capacity,
    total,
    K: tl.constexpr,
    KEPT: tl.constexpr,
    CHUNK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """The K best of the rows read in full, in order. Program (part, token), of which as many work as there are chunks.

    KEPT: a power of two, at least K; so is PROGRAMS.
    """
    part, token = tl.program_id(0), tl.program_id(1)
    over = tl.load(verdict + 1) > 0
    limit = tl.where(over, total, tl.load(verdict))
    chunks = tl.cdiv(limit, CHUNK)
    working = tl.minimum(chunks, PROGRAMS)
    if part >= working:
        return
    lane = tl.arange(0, CHUNK)
    rank = tl.arange(0, KEPT)
    best = tl.full([KEPT], _LOWEST, tl.int64)
    for chunk in range(part, chunks, working):
        keys = _keys(exact, ids, owners, whole, chunk * CHUNK + lane, limit, token, capacity, total, over)
        if K == 1:
            best = tl.maximum(best, tl.max(keys, 0))
        else:
            both = tl.join(best, tl.topk(keys, KEPT))
            best = tl.topk(tl.reshape(both, [2 * KEPT]), KEPT)
    if part == 0:
        tl.store(fallback + token, over.to(tl.uint8))
    if working == 1:
        _write(best, rank, values, found_ids, token, K)
    else:
        tl.store(partial + (token * PROGRAMS + part) * KEPT + rank, best)
        if arrive(arrivals + token, working):
            all_of = tl.arange(0, PROGRAMS * KEPT)
            found = tl.load(
                partial + token * PROGRAMS * KEPT + all_of, mask=all_of < working * KEPT, other=_LOWEST, cache_modifier=".cg"
            )
            if K == 1:
                _write(tl.full([KEPT], 0, tl.int64) + tl.max(found, 0), rank, values, found_ids, token, K)
            else:
                _write(tl.topk(found, KEPT), rank, values, found_ids, token, K)


@triton.jit
def merge_kernel(
    logits,  # float32 [T, V]
    values,  # [T, capacity]: of the listed rows
    ids,  # int32 [capacity]
    owners,  # int32 [capacity]
    counts,  # int32 [1]: of the list; with a verdict of the REFINED lists that later stages read
    whole,  # [T, V], or None with the next two
    verdict,  # int32 [2]: rows that were read by the list, and of all
    read,  # int32 [REFINED + 2]: rows that were read of each of those lists, and the verdict
    tokens,
    capacity,
    total,
    refined,  # places of those lists
    REFINED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Put what is known better of some rows in its place; of all rows, where the verdict is that all were read. Program (block).

    A list that overflowed holds nothing, but as many rows were read as it has places.
    """
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if whole is None:
        limit = tl.load(counts)
    else:
        limit = tl.load(verdict)
        if tl.program_id(0) == 0:
            for stage in tl.static_range(REFINED):
                tl.store(read + stage, tl.minimum(tl.load(counts + stage), refined))
            tl.store(read + REFINED, limit)
            tl.store(read + REFINED + 1, tl.load(verdict + 1))
        if tl.load(verdict + 1) > 0:
            inside = place < total
            for token in range(tokens):
                at = token * total + place
                tl.store(logits + at, tl.load(whole + at, mask=inside, other=0.0).to(tl.float32), mask=inside)
            return
    if (limit > capacity) | (tl.program_id(0) * BLOCK >= limit):
        return
    listed = place < limit
    row = tl.load(ids + place, mask=listed, other=0)
    owned = tl.load(owners + place, mask=listed, other=0)
    for token in range(tokens):
        mine = listed & (((owned >> token) & 1) != 0)
        better = tl.load(values + token * capacity + place, mask=mine, other=0.0).to(tl.float32)
        tl.store(logits + token * total + row, better, mask=mine)
