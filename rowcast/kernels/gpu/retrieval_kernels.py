"""The Triton kernels of `retrieval`."""

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl

_LOG2E: Final = tl.constexpr(1.4426950408889634)
_LOWEST: Final = tl.constexpr(-1e30)


@triton.jit(do_not_specialize=["layers"])
def summarise(
    keys_ptr,  # [layers, blocks, block_size, K, d]
    tables_ptr,  # [B, n]
    old_ptr,
    new_ptr,  # [B]
    kept_ptr,  # [parts, layers, K, blocks, per_block, d]
    table_stride,
    keys_layer,
    keys_block,
    keys_entry,
    keys_head,
    blocks,
    layers,
    K: tl.constexpr,
    d: tl.constexpr,
    D: tl.constexpr,
    chunk: tl.constexpr,
    M: tl.constexpr,
    per_block: tl.constexpr,
    R: tl.constexpr,
    head_groups: tl.constexpr,
    mean: tl.constexpr,
):
    """Every so many-th of the new chunks, of R heads of one layer."""
    sequence, layer = tl.program_id(2).to(tl.int64), (tl.program_id(1) // head_groups).to(tl.int64)
    head = (tl.program_id(1) % head_groups * R + tl.arange(0, R)).to(tl.int64)[:, None]  # [R, 1]
    dim = tl.arange(0, D)[None, :]
    here = (head < K) & (dim < d)
    inside = tl.arange(0, M)[None, :, None]
    source = keys_ptr + layer * keys_layer + (head * keys_head + dim)[:, None, :] + inside * keys_entry  # [R, M, D]
    mask = here[:, None, :] & (inside < chunk)
    target = kept_ptr + (layer * K + head) * blocks * per_block * d + dim
    part = layers.to(tl.int64) * K * blocks * per_block * d
    done = tl.load(new_ptr + sequence) // chunk
    for which in tl.range(tl.load(old_ptr + sequence) // chunk + tl.program_id(0), done, tl.num_programs(0)):
        block = tl.load(tables_ptr + sequence * table_stride + which // per_block).to(tl.int64)
        at = block * keys_block + which % per_block * chunk * keys_entry
        x = tl.load(source + at, mask=mask, other=0.0).to(tl.float32)
        summary = target + (block * per_block + which % per_block) * d
        if mean:
            tl.store(summary, (tl.sum(x, 1) / chunk).to(kept_ptr.dtype.element_ty), mask=here)
        else:
            tl.store(summary, tl.min(tl.where(mask, x, float("inf")), 1).to(kept_ptr.dtype.element_ty), mask=here)
            tl.store(summary + part, tl.max(tl.where(mask, x, float("-inf")), 1).to(kept_ptr.dtype.element_ty), mask=here)


@triton.jit
def _places(table, low, stop, per_block: tl.constexpr, N: tl.constexpr):
    """Which of a head's summaries belong to N chunks from `low` on: [N, 1] int64."""
    which = low + tl.arange(0, N)
    block = tl.load(table + which // per_block, mask=which < stop, other=0).to(tl.int64)
    return (block * per_block + which % per_block)[:, None]


@triton.jit
def score(
    queries_ptr,  # [layers, B, n, H, d]
    kept_ptr,  # [parts, layers, K, blocks, per_block, d]
    tables_ptr,
    first_ptr,
    last_ptr,
    counts_ptr,
    lengths_ptr,
    slopes_ptr,  # [H]
    windows_ptr,  # [layers]
    raw_ptr,  # float32 [B, layers K, row tiles, chunks, R]: scores, in powers of two
    stats_ptr,  # float32 [2, B, layers K, row tiles, splits, R]: the largest of a split, and the sum
    scale,
    bias_scale,
    tokens,
    splits,
    chunks,
    table_stride,
    q_layer,
    q_sequence,
    q_token,
    q_head,
    kept_part,
    kept_layer,
    kept_head,
    K: tl.constexpr,
    G: tl.constexpr,
    d: tl.constexpr,
    D: tl.constexpr,
    per_block: tl.constexpr,
    chunk: tl.constexpr,
    mean: tl.constexpr,
    R: tl.constexpr,
    row_tiles: tl.constexpr,
    N: tl.constexpr,
    S: tl.constexpr,
):
    """One split of the chunks for one tile of the rows of one KV head."""
    tile, split = tl.program_id(0) % row_tiles, tl.program_id(0) // row_tiles
    sequence = tl.program_id(2).to(tl.int64)
    layer, head = (tl.program_id(1) // K).to(tl.int64), tl.program_id(1) % K
    begin, stop = tl.load(first_ptr + sequence), tl.load(last_ptr + sequence)
    begin, stop = tl.maximum(begin, split * S), tl.minimum(stop, split * S + S)
    count = tokens if counts_ptr is None else tl.minimum(tl.load(counts_ptr + sequence), tokens)
    if (begin >= stop) | (tile * R >= count * G):
        return
    row = tile * R + tl.arange(0, R)
    token, query_head = row // G, head * G + row % G
    is_real = row < count * G
    dim = tl.arange(0, D)
    q_at = queries_ptr + layer * q_layer + sequence * q_sequence + token.to(tl.int64)[:, None] * q_token
    q = tl.load(q_at + query_head[:, None] * q_head + dim[None, :], mask=is_real[:, None] & (dim[None, :] < d), other=0.0)
    q = tl.trans(q)  # [D, R]
    falling, rising = tl.minimum(q, 0.0).to(q.dtype), tl.maximum(q, 0.0).to(q.dtype)
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + query_head, mask=is_real, other=0.0).to(tl.float32) * bias_scale
    if windows_ptr is not None:
        window = tl.load(windows_ptr + layer)
        oldest = tl.where(window > 0, tl.load(lengths_ptr + sequence) - count + token - window, -1)
    base = kept_ptr + layer * kept_layer + head.to(tl.int64) * kept_head + dim[None, :]
    table = tables_ptr + sequence * table_stride
    line = ((sequence * tl.num_programs(1) + tl.program_id(1)) * row_tiles + tile).to(tl.int64)
    raw_at = raw_ptr + line * chunks * R
    highest = tl.full([R], float("-inf"), tl.float32)
    total = tl.zeros([R], tl.float32)
    start = begin // N * N
    place = _places(table, start, stop, per_block, N)
    for low in tl.range(start, stop, N):
        which = low + tl.arange(0, N)
        inside = (which >= begin) & (which < stop)
        at = base + place * d
        place = _places(table, low + N, stop, per_block, N)  # a tile ahead
        mask = inside[:, None] & (dim[None, :] < d)
        if mean:
            scores = tl.dot(tl.load(at, mask=mask, other=0.0), q, input_precision="ieee")
        else:
            scores = tl.dot(tl.load(at, mask=mask, other=0.0), falling, input_precision="ieee")
            scores = tl.dot(tl.load(at + kept_part, mask=mask, other=0.0), rising, scores, input_precision="ieee")
        scores *= scale
        ends = which * chunk + chunk - 1
        if slopes_ptr is not None:
            scores += slope[None, :] * ends.to(tl.float32)[:, None]
        scores *= _LOG2E
        if windows_ptr is not None:
            scores = tl.where(ends[:, None] <= oldest[None, :], _LOWEST, scores)
        tl.store(raw_at + which[:, None] * R + tl.arange(0, R)[None, :], scores, mask=inside[:, None] & is_real[None, :])
        scores = tl.where(inside[:, None], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 0))
        total = total * tl.exp2(highest - higher) + tl.sum(tl.exp2(scores - higher[None, :]), 0)
        highest = higher
    lines = tl.num_programs(2).to(tl.int64) * tl.num_programs(1) * row_tiles * splits * R
    stats_at = stats_ptr + (line * splits + split) * R + tl.arange(0, R)
    tl.store(stats_at, highest)
    tl.store(stats_at + lines, total)


@triton.jit
def normalise(
    raw_ptr,
    stats_ptr,
    first_ptr,
    last_ptr,
    counts_ptr,
    scores_ptr,  # [B, layers K, chunks]
    scores_sequence,
    tokens,
    splits,
    chunks,
    G: tl.constexpr,
    R: tl.constexpr,
    row_tiles: tl.constexpr,
    N: tl.constexpr,
    S: tl.constexpr,
):
    """Softmax of N chunks' scores, and the mean over rows (arguments as for `score`)."""
    sequence = tl.program_id(2).to(tl.int64)
    begin, stop = tl.load(first_ptr + sequence), tl.load(last_ptr + sequence)
    count = tokens if counts_ptr is None else tl.minimum(tl.load(counts_ptr + sequence), tokens)
    which = tl.program_id(0) * N + tl.arange(0, N)
    if (tl.program_id(0) * N >= stop) | (tl.program_id(0) * N + N <= begin):
        return
    inside = (which >= begin) & (which < stop)
    column = tl.arange(0, R)
    lines = tl.num_programs(2).to(tl.int64) * tl.num_programs(1) * row_tiles * splits * R
    mean = tl.zeros([N], tl.float32)
    for tile in tl.range(0, tl.minimum(row_tiles, (count * G + R - 1) // R)):
        line = ((sequence * tl.num_programs(1) + tl.program_id(1)) * row_tiles + tile).to(tl.int64)
        highest = tl.full([R], float("-inf"), tl.float32)
        total = tl.zeros([R], tl.float32)
        for split in tl.range(begin // S, (stop + S - 1) // S):
            stats_at = stats_ptr + (line * splits + split) * R + column
            of_split = tl.load(stats_at)
            higher = tl.maximum(highest, of_split)
            total = total * tl.exp2(highest - higher) + tl.load(stats_at + lines) * tl.exp2(of_split - higher)
            highest = higher
        is_real = tile * R + column < count * G
        raw_at = raw_ptr + (line * chunks + which)[:, None] * R + column[None, :]
        raw = tl.load(raw_at, mask=inside[:, None] & is_real[None, :], other=float("-inf"))
        mean += tl.sum(tl.exp2(raw - highest[None, :]) / total[None, :], 1)
    scores_at = scores_ptr + sequence * scores_sequence + tl.program_id(1).to(tl.int64) * chunks + which
    tl.store(scores_at, mean / tl.maximum(count * G, 1), mask=inside)


@triton.jit
def _ordered(scores, base, begin, stop, held: tl.constexpr):
    """int32 that are ordered as the scores from `base` on are; the least one outside begin..stop - 1."""
    which = base + tl.arange(0, held)
    inside = (which >= begin) & (which < stop)
    x = tl.load(scores + which, mask=inside, other=0.0)
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # -0 is 0
    return tl.where(inside, bits ^ (bits >> 31 & 0x7FFFFFFF), -2147483648)


@triton.jit
def _reached(scores, keys, edge, begin, stop, held: tl.constexpr):
    """How many of the ordered scores, `keys` if they are held, are at least `edge`."""
    if keys is not None:
        return tl.sum((keys >= edge).to(tl.int32), 0)
    else:
        count = begin * 0
        for base in tl.range(begin // held * held, stop, held):
            count += tl.sum((_ordered(scores, base, begin, stop, held) >= edge).to(tl.int32), 0)
        return count


@triton.jit
def choose(
    scores_ptr,
    first_ptr,
    last_ptr,
    slots_ptr,  # [B]
    out_ptr,
    count,
    chunks,
    held: tl.constexpr,
    one_tile: tl.constexpr,
    C: tl.constexpr,
):
    """One head's choice: the count-th largest score, bit by bit, then all above it and the first of those that equal it."""
    head, sequence = tl.program_id(0), tl.program_id(1)
    begin, stop = tl.load(first_ptr + sequence), tl.minimum(tl.load(last_ptr + sequence), chunks)
    if stop < begin:  # its list stays as it is
        return
    scores = scores_ptr + (sequence * tl.num_programs(0) + head).to(tl.int64) * chunks
    slot = sequence if slots_ptr is None else tl.load(slots_ptr + sequence)
    line = (slot * tl.num_programs(0) + head).to(tl.int64)
    keys = _ordered(scores, 0, begin, stop, held) if one_tile else None
    wanted = tl.minimum(count, tl.maximum(stop - begin, 0))
    reached = _reached(scores, keys, 0, begin, stop, held)
    edge = tl.where(reached >= wanted, 0, -2147483648)
    bit = begin * 0 + 30
    while (bit >= 0) & (reached != wanted):
        higher = edge + (1 << bit)
        reached = _reached(scores, keys, higher, begin, stop, held)
        edge = tl.where(reached >= wanted, higher, edge)
        bit -= 1
    above = tl.where(edge == 2147483647, 0, _reached(scores, keys, edge + 1, begin, stop, held))
    equal = wanted - above  # so many of those at the edge
    done, met = 0, 0
    for base in tl.range(0 if one_tile else begin // held * held, held if one_tile else stop, held):
        these = keys if one_tile else _ordered(scores, base, begin, stop, held)
        which = base + tl.arange(0, held)
        at_edge = (these == edge) & (which >= begin) & (which < stop)
        # Both counts in one scan: neither exceeds the number of scores held.
        seen = tl.cumsum((these > edge).to(tl.int32) + (at_edge.to(tl.int32) << 16), 0)
        ahead, tied = seen & 0xFFFF, met + (seen >> 16)
        chosen = (these > edge) | (at_edge & (tied <= equal))
        place = done + ahead + tl.minimum(tied, equal) - tl.minimum(met, equal) - 1
        tl.store(out_ptr + line * count + place, which, mask=chosen)
        done_here = tl.sum(chosen.to(tl.int32), 0)
        met += tl.sum(at_edge.to(tl.int32), 0)
        done += done_here
    empty = tl.arange(0, C)
    tl.store(out_ptr + line * count + empty, -1, mask=(empty >= wanted) & (empty < count))
