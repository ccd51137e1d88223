"""Chunk summaries, their scores and the choice of chunks, for the retrieval cache: nothing of it asks the device anything.

The fast path of `runtime.kv.summaries.Summaries` and `runtime.kv.selection.Retrieval` (TriForce, arXiv 2404.11912, section 4.1; Quest,
arXiv 2406.10774, section 3.2). Lengths, bounds and numbers of tokens are device tensors.
"""

from __future__ import annotations

from typing import Final, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

WORK_BYTES: Final = 64 << 20
"""Work space of `chunk_scores`, unless a single layer needs more."""

_CHUNKS: Final = 64
"""Chunks of a tile."""
_SPLIT: Final = 512
"""Chunks that a program scores."""
_MOST_ROWS: Final = 32
_MOST_HELD: Final = 16_384
"""Scores that a program of `choose_chunks` keeps in registers; more are read again and again."""

_LOG2E: Final = tl.constexpr(1.4426950408889634)
_LOWEST: Final = tl.constexpr(-1e30)


def summarise(
    keys: Tensor,
    tables: Tensor,
    old: Tensor,
    new: Tensor,
    kept: Tensor,
    *,
    chunk: int,
    score: Literal["bounds", "mean"] = "bounds",
    programs: int = 4,
) -> None:
    """Write the summaries of the chunks of `chunk` positions that were completed while sequences grew from `old` to `new` entries.

    keys [layers, blocks, block_size, K, d], any strides but the last, which is 1, `chunk` dividing block_size; tables [B, n] int32;
    old, new [B] int32; kept [parts, layers, K, blocks, block_size / chunk, d] contiguous: the smallest and the largest of each
    channel, or the mean. `programs` work on one sequence and layer at a time: more of them for whole prompts.
    """
    layers, blocks, block_size, kv_heads, size = keys.shape
    parts = 1 if score == "mean" else 2
    assert block_size % chunk == 0 and kept.is_contiguous() and keys.stride(4) == 1 and tables.stride(1) == 1
    assert kept.shape == (parts, layers, kv_heads, blocks, block_size // chunk, size)
    padded = triton.next_power_of_2(size)
    together = max(1, min(triton.next_power_of_2(kv_heads), 8192 // (padded * triton.next_power_of_2(chunk))))
    head_groups = triton.cdiv(kv_heads, together)
    _summarise[(programs, layers * head_groups, tables.shape[0])](
        keys,
        tables,
        old,
        new,
        kept,
        tables.stride(0),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        keys.stride(3),
        blocks,
        layers,
        kv_heads,
        size,
        padded,
        chunk,
        triton.next_power_of_2(chunk),
        block_size // chunk,
        together,
        head_groups,
        parts == 1,
        num_warps=4,
    )


def chunk_scores(
    queries: Tensor,
    kept: Tensor,
    tables: Tensor,
    first: Tensor,
    last: Tensor,
    *,
    scale: float,
    chunk: int,
    most_chunks: int,
    counts: Tensor | None = None,
    lengths: Tensor | None = None,
    slopes: Tensor | None = None,
    absolute_bias_scale: float | None = None,
    windows: Tensor | None = None,
) -> Tensor:
    """How much of their attention tokens would give each chunk, were its summary a key: [B, layers, K, most_chunks] float32.

    queries [layers, B, n, H, d] after RoPE, any strides but the last, which is 1; kept [parts, layers, K, blocks, per_block, d]
    contiguous, of which two parts are bounds of q . k and one is a key; tables [B, blocks] int32. Softmax over the chunks
    first[b]..last[b] - 1 (int32 [B], last <= most_chunks), mean over the first counts[b] tokens (int32 [B]; all n by default) and
    over the query heads of a group. Other chunks' scores are not written.

    `slopes` [H] and `absolute_bias_scale` as in `attend`; `windows` int32 [layers], 0: none, for which `lengths` [B] int32 tell how
    many entries there are up to and including the last counted token. A chunk stands at its last position.
    """
    layers, sequences, tokens, query_heads, size = queries.shape
    parts, _, kv_heads, _, per_block, _ = kept.shape
    share = query_heads // kv_heads
    assert kept.is_contiguous() and queries.stride(4) == 1 and tables.stride(1) == 1
    assert windows is None or lengths is not None
    rows = 16 if queries.dtype == torch.float32 else min(_MOST_ROWS, max(16, triton.next_power_of_2(tokens * share)))
    row_tiles, splits = triton.cdiv(tokens * share, rows), max(1, triton.cdiv(most_chunks, _SPLIT))
    scores = queries.new_empty((sequences, layers, kv_heads, most_chunks), dtype=torch.float32)
    each = sequences * kv_heads * row_tiles * rows
    at_a_time = max(1, min(layers, WORK_BYTES // max(1, 4 * each * most_chunks)))
    raw = queries.new_empty(at_a_time * each * most_chunks, dtype=torch.float32)
    stats = queries.new_empty(2 * at_a_time * each * splits, dtype=torch.float32)
    for layer in range(0, layers, at_a_time):
        some = min(at_a_time, layers - layer)
        of_layers = (queries[layer:], kept[:, layer:], None if windows is None else windows[layer:])
        _score[(splits * row_tiles, some * kv_heads, sequences)](
            of_layers[0],
            of_layers[1],
            tables,
            first,
            last,
            counts,
            lengths,
            slopes,
            of_layers[2],
            raw,
            stats,
            scale,
            1.0 if absolute_bias_scale is None else absolute_bias_scale,
            tokens,
            splits,
            most_chunks,
            tables.stride(0),
            *queries.stride()[:4],
            kept.stride(0),
            kept.stride(1),
            kept.stride(2),
            kv_heads,
            share,
            size,
            max(16, triton.next_power_of_2(size)),  # the matrix units take no less
            per_block,
            chunk,
            parts == 1,
            rows,
            row_tiles,
            32 if queries.dtype == torch.float32 else _CHUNKS,
            _SPLIT,
            num_warps=4,
            num_stages=2 if queries.dtype == torch.float32 or size > 128 else 3,
        )
        _normalise[(triton.cdiv(most_chunks, 2 * _CHUNKS), some * kv_heads, sequences)](
            raw,
            stats,
            first,
            last,
            counts,
            scores[:, layer:],
            scores.stride(0),
            tokens,
            splits,
            most_chunks,
            share,
            rows,
            row_tiles,
            2 * _CHUNKS,
            _SPLIT,
            num_warps=4,
        )
    return scores


def choose_chunks(scores: Tensor, count: int, first: Tensor, last: Tensor, out: Tensor | None = None) -> Tensor:
    """The `count` best of the chunks first[b]..last[b] - 1, ascending, of equal ones the lower: [B, layers, K, count] int32.

    scores [B, layers, K, chunks] float32 without NaN, contiguous; first, last [B] int32. Where there are fewer, -1 stands at the end.
    """
    sequences, layers, kv_heads, chunks = scores.shape
    assert scores.is_contiguous() and scores.dtype == torch.float32
    out = scores.new_empty((sequences, layers, kv_heads, count), dtype=torch.int32) if out is None else out
    assert out.is_contiguous() and out.shape == (sequences, layers, kv_heads, count)
    if count == 0 or chunks == 0:
        return out.fill_(-1)
    held = min(_MOST_HELD, max(128, triton.next_power_of_2(chunks)))
    _choose[(layers * kv_heads, sequences)](
        scores,
        first,
        last,
        out,
        count,
        chunks,
        held,
        chunks <= held,
        triton.next_power_of_2(count),
        num_warps=16 if held > 4096 else 4,
    )
    return out


@triton.jit
def _summarise(
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
def _score(
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
def _normalise(
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
    """Softmax of N chunks' scores, and the mean over rows (arguments as for `_score`)."""
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
def _choose(
    scores_ptr,
    first_ptr,
    last_ptr,
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
    line = (sequence * tl.num_programs(0) + head).to(tl.int64)
    scores = scores_ptr + line * chunks
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
