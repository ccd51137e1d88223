"""The Triton kernels of `decoding`: one split's part of the attention, and all parts together."""

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl
from triton.language.extra import cuda

_LOG2E: Final = tl.constexpr(1.4426950408889634)
_STATS: Final = tl.constexpr(256)  # splits whose maxima are read at a time
_STEP: Final = tl.constexpr(128)  # parts that are combined at a time

# Numbers that vary from call to call: compiled code, and so bits, must not depend on them.
_VARIABLE: Final = ["tokens", "splits", "listed", "columns", "table_size", "table_stride", "chunk_stride", "window"]


@triton.jit
def _to_bfloat16(x):
    """Positive float32 numbers rounded to bfloat16, to nearest even, and back. Triton's interpreter cuts bits off instead."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _span_of(split, fine: tl.constexpr, knee: tl.constexpr, levels: tl.constexpr):
    """The first entry of a split, and how many it has (`Tiles`)."""
    first, size, before = split * fine, split * 0 + fine, knee // fine
    for level in tl.static_range(levels):
        here = split >= before
        first = tl.where(here, (knee << level) + (split - before) * (fine << level + 1), first)
        size = tl.where(here, fine << level + 1, size)
        before += (knee << level) // (fine << level + 1)
    return first, size


@triton.jit
def _split_of(entry, fine: tl.constexpr, knee: tl.constexpr, levels: tl.constexpr):
    """The split of an entry: the inverse of `_span_of`."""
    split, before = entry // fine, knee // fine
    for level in tl.static_range(levels):
        split = tl.where(entry >= knee << level, before + (entry - (knee << level)) // (fine << level + 1), split)
        before += (knee << level) // (fine << level + 1)
    return split


@triton.jit
def _oldest_seen(at, window, has_window: tl.constexpr):
    """The oldest entry that a token at `at` sees."""
    return tl.maximum(at + 1 - window, 0) if has_window else at * 0


@triton.jit
def _chunk_ids(ids, low, stop, listed, chunk: tl.constexpr, sinks: tl.constexpr, N: tl.constexpr):
    """The listed chunk of each of N entries from `low` on, 0 for others. Without a list: nothing of use."""
    if ids is None:
        return low
    else:
        entry = low + tl.arange(0, N)
        return tl.load(ids + (entry - sinks) // chunk, mask=(entry >= sinks) & (entry < tl.minimum(listed, stop)), other=0)


@triton.jit
def _positions(ids, coming, low, stop, listed, behind, chunk: tl.constexpr, sinks: tl.constexpr, N: tl.constexpr):
    """Positions of N entries from `low` on, of which `coming` are the `_chunk_ids`; -1 for those that are not to be read."""
    entry = low + tl.arange(0, N)
    position = entry
    if ids is not None:
        position = tl.where(entry < sinks, entry, entry + behind)
        position = tl.where((entry >= sinks) & (entry < listed), coming * chunk + (entry - sinks) % chunk, position)
    return tl.where(entry < stop, position, -1)


@triton.jit
def _blocks(table, position, table_size, block_size: tl.constexpr, one_block: tl.constexpr):
    """Where positions lie: [N, 1] int64, or one block of the whole sequence."""
    if one_block:
        return tl.load(table).to(tl.int64)
    else:
        which = position // block_size
        return tl.load(table + which, mask=(position >= 0) & (which < table_size), other=0).to(tl.int64)[:, None]


@triton.jit(do_not_specialize=_VARIABLE)
def partial(
    q_ptr,  # [B * T, H, d]
    keys_ptr,
    values_ptr,  # [blocks, block_size, K, d]
    tables_ptr,  # [B, n]
    starts_ptr,
    counts_ptr,  # [B]
    slopes_ptr,  # [H]
    heads_ptr,  # [C]
    head_count_ptr,
    chunks_ptr,  # [B, K, n]
    recent_ptr,  # [B]
    stats_ptr,  # float32 [2, B * T * H, splits]: the maximum, in powers of two, and the sum
    sums_ptr,  # float32 [B * T * H, splits, d]
    tokens,
    splits,
    listed,
    columns,
    window,
    scale,
    bias_scale,
    q_token,
    q_head,
    k_block,
    k_entry,
    k_head,
    v_block,
    v_entry,
    v_head,
    table_size,
    table_stride,
    chunk_stride,
    H: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    d: tl.constexpr,
    D: tl.constexpr,
    block_size: tl.constexpr,
    one_block: tl.constexpr,
    has_window: tl.constexpr,
    absolute: tl.constexpr,
    chunk: tl.constexpr,
    sinks: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    row_tiles: tl.constexpr,
    N: tl.constexpr,
    fine: tl.constexpr,
    knee: tl.constexpr,
    levels: tl.constexpr,
    overlap: tl.constexpr,
):
    """One split of one sequence, one KV head and one tile of query rows. Entries are counted as the sequence shows them."""
    if overlap:
        cuda.gdc_launch_dependents()
    # Neighbours run at a time: row tiles and KV heads of the same entries. The short splits come last and even out the end.
    pid = tl.program_id(0)
    tile = pid % row_tiles
    head = pid // row_tiles % K
    split = splits - 1 - pid // (row_tiles * K)
    sequence = tl.program_id(1)
    first, size = _span_of(split, fine, knee, levels)
    last = first + size
    start = tl.load(starts_ptr + sequence)
    real = tokens if counts_ptr is None else tl.minimum(tl.load(counts_ptr + sequence), tokens)
    behind = 0  # of an entry: how far its position lies behind its number, among the recent ones
    ids = chunks_ptr
    if chunks_ptr is not None:
        behind = tl.load(recent_ptr + sequence) - listed
        start -= behind
        ids += sequence.to(tl.int64) * chunk_stride + head * ((listed - sinks) // chunk)
    elif has_window:
        first = tl.maximum(first, _oldest_seen(start, window, has_window) // N * N)

    # What tells where entries lie is loaded a tile ahead of them, and what tells that another one ahead. The first of these loads wait
    # for nothing, not even for lengths. (Values carried over two rounds of the loop would keep it from being pipelined.)
    table = tables_ptr + sequence.to(tl.int64) * table_stride
    coming = _chunk_ids(ids, first, last, listed, chunk, sinks, N)
    position = _positions(ids, coming, first, last, listed, behind, chunk, sinks, N)
    coming = _chunk_ids(ids, first + N, last, listed, chunk, sinks, N)
    block = _blocks(table, position, table_size, block_size, one_block)

    end = start + real
    stop = tl.minimum(last, end)
    row = tile * R + tl.arange(0, R)
    token, query_head = row // G, head * G + row % G
    dim = tl.arange(0, D)
    limit = columns
    if head_count_ptr is not None:
        limit = tl.minimum(columns, tl.load(head_count_ptr))
    mine = True
    if heads_ptr is not None:
        column = tl.arange(0, C)
        wanted = tl.load(heads_ptr + column, mask=column < limit, other=-1).to(tl.int32)
        mine = tl.max(tl.where((wanted >= 0) & (wanted // G == head), 1, 0), 0) > 0
    if overlap:  # where entries lie, and whose, was known before they were written
        cuda.gdc_wait()
    if (real <= 0) | (first >= stop) | (tile * R >= real * G) | (not mine):
        return

    is_real = row < real * G
    at = start + token  # the entry that is the row's own
    q_at = q_ptr + (sequence * tokens + token).to(tl.int64)[:, None] * q_token + query_head[:, None] * q_head + dim[None, :]
    q = tl.trans(tl.load(q_at, mask=is_real[:, None] & (dim[None, :] < d), other=0.0))  # [D, R]
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + query_head, mask=is_real, other=0.0).to(tl.float32)
        if absolute:
            slope = _to_bfloat16(slope)
    k_base = keys_ptr + head.to(tl.int64) * k_head
    v_base = values_ptr + head.to(tl.int64) * v_head
    highest = tl.full([R], float("-inf"), tl.float32)
    total = tl.zeros([R], tl.float32)
    acc = tl.zeros([D, R], tl.float32)
    for low in tl.range(first, stop, N):
        entry = low + tl.arange(0, N)
        if ids is None:
            position = entry
        readable = (position >= 0) & (entry < stop)
        if ids is not None:  # Of a sequence that has not as many entries there are places among the sinks, too.
            readable &= position < end + behind
        inside = (position if one_block else position % block_size).to(tl.int64)[:, None]
        k_at = k_base + block * k_block + inside * k_entry + dim[None, :]
        v_at = v_base + block * v_block + inside * v_entry + dim[None, :]
        next_position = _positions(ids, coming, low + N, stop, listed, behind, chunk, sinks, N)
        coming = _chunk_ids(ids, low + 2 * N, stop, listed, chunk, sinks, N)
        next_block = _blocks(table, next_position, table_size, block_size, one_block)
        loaded = readable[:, None] & (dim[None, :] < d)
        k = tl.load(k_at, mask=loaded, other=0.0)
        scores = tl.dot(k, q, input_precision="ieee") * scale  # [N, R]
        if slopes_ptr is not None:
            if absolute:
                scores += _to_bfloat16(slope[None, :] * _to_bfloat16(position.to(tl.float32))[:, None]) * bias_scale
            else:
                scores += slope[None, :] * (position[:, None] - (at + behind)[None, :]).to(tl.float32)
        seen = (position[:, None] <= (at + behind)[None, :]) & readable[:, None]
        if has_window:
            seen &= position[:, None] > (at + behind)[None, :] - window
        scores = tl.where(seen, scores * _LOG2E, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 0))
        origin = tl.where(higher == float("-inf"), 0.0, higher)
        fade = tl.exp2(highest - origin)
        weights = tl.exp2(scores - origin[None, :])
        total = total * fade + tl.sum(weights, 0)
        highest = higher
        v = tl.load(v_at, mask=loaded, other=0.0)
        acc = tl.dot(tl.trans(v), weights.to(v.dtype), acc * fade[None, :], input_precision="ieee")
        position, block = next_position, next_block

    line = ((sequence * tokens + token) * H + query_head).to(tl.int64) * splits + split
    sums = tl.num_programs(1).to(tl.int64) * tokens * H * splits  # from a line's maximum to its sum
    tl.store(stats_ptr + line, highest, mask=is_real)
    tl.store(stats_ptr + sums + line, total, mask=is_real)
    tl.store(sums_ptr + line[None, :] * d + dim[:, None], acc, mask=is_real[None, :] & (dim[:, None] < d))


@triton.jit(do_not_specialize=_VARIABLE)
def combine(
    stats_ptr,
    sums_ptr,
    starts_ptr,
    counts_ptr,
    heads_ptr,
    head_count_ptr,
    recent_ptr,
    out_ptr,  # [B * T, C, d]
    tokens,
    splits,
    listed,
    window,
    out_token,
    out_head,
    H: tl.constexpr,
    d: tl.constexpr,
    D: tl.constexpr,
    has_window: tl.constexpr,
    chunked: tl.constexpr,
    fine: tl.constexpr,
    knee: tl.constexpr,
    levels: tl.constexpr,
    overlap: tl.constexpr,
):
    """D elements of one head of one token, from the parts of its splits: what `partial` left (arguments as there)."""
    row, column = tl.program_id(0), tl.program_id(1)
    sequence, token = row // tokens, row % tokens
    dim = tl.program_id(2) * D + tl.arange(0, D)
    out_at = out_ptr + row.to(tl.int64) * out_token + column * out_head + dim
    head, is_real = column, token < tokens
    if heads_ptr is not None:
        head = tl.load(heads_ptr + column).to(tl.int32)
        is_real &= head >= 0
        if head_count_ptr is not None:
            is_real &= column < tl.load(head_count_ptr)
    if counts_ptr is not None:
        is_real &= token < tl.load(counts_ptr + sequence)
    at = tl.load(starts_ptr + sequence) + token
    oldest = _oldest_seen(at, window, has_window)
    if chunked:
        at += listed - tl.load(recent_ptr + sequence)
        oldest = at * 0
    low, high = _split_of(oldest, fine, knee, levels), _split_of(at, fine, knee, levels) + 1
    line = (row * H + head).to(tl.int64) * splits
    lines = tl.num_programs(0).to(tl.int64) * H * splits
    if overlap:  # Also where there is nothing to do: what follows knows by this kernel's end that `partial` has ended.
        cuda.gdc_wait()
    if not is_real:
        tl.store(out_at, tl.zeros([D], tl.float32).to(out_ptr.dtype.element_ty), mask=dim < d)
        return
    some = tl.arange(0, _STATS)
    highest = tl.full([_STATS], float("-inf"), tl.float32)
    for base in tl.range(low, high, _STATS):
        highest = tl.maximum(highest, tl.load(stats_ptr + line + base + some, mask=base + some < high, other=float("-inf")))
    origin = tl.max(highest, 0)
    total = 0.0
    acc = tl.zeros([D], tl.float32)
    for base in tl.range(low, high, _STEP):
        split = base + tl.arange(0, _STEP)
        mine = split < high
        weights = tl.exp2(tl.load(stats_ptr + line + split, mask=mine, other=float("-inf")) - origin)
        total += tl.sum(weights * tl.load(stats_ptr + lines + line + split, mask=mine, other=0.0), 0)
        sums_at = sums_ptr + (line + split)[:, None] * d + dim[None, :]
        acc += tl.sum(weights[:, None] * tl.load(sums_at, mask=mine[:, None] & (dim[None, :] < d), other=0.0), 0)
    if overlap:
        cuda.gdc_launch_dependents()
    tl.store(out_at, (acc / total).to(out_ptr.dtype.element_ty), mask=dim < d)
