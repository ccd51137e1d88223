"""Attention of a few new tokens over long contexts: flash-decoding, split along the context (Dao et al., 2023, after arXiv 2205.14135).

The fast path of `kernels.attention.attend` and `attend_entries` for many sequences at once, over keys and values where they lie:
blocks found by a table, or one block a sequence. Two steps: each split of the context gives a partial maximum, sum and weighted sum of
values for each query row, then a second kernel combines partials in the order of positions. The query heads of a group and a
sequence's tokens are rows of one tile, so K and V are read once for all of them.

Bits: splits and tiles have absolute boundaries that depend on positions and on the store's shape alone, and what a token must not see
adds exact zeros. So a token's result is the same whatever the number of tokens, the other sequences, or the bound on the context.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import torch
import triton
from torch import Tensor

from rowcast.kernels.gpu.decoding_kernels import combine, partial
from rowcast.kernels.gpu.overlap import overlaps

MOST_ROWS: Final = 64
"""Query rows of a tile: tokens times query heads of a group; more of them are several tiles."""

_LISTED_PROGRAMS: Final = 256
"""That share the entries of a list and of all KV heads: two a multiprocessor, which run at once."""

_COMBINED: Final = 32
"""Elements of a head that a program of the second step makes."""


class Chunks(NamedTuple):
    """Which entries each KV head shows of a sequence: the first `sinks`, the listed chunks, and all from `recent` on."""

    ids: Tensor
    """int32 [B, K, n]: chunk i holds the positions from i * size on. Each lies behind the sinks and below `recent`; -1: none."""
    size: int
    """Positions to a chunk."""
    sinks: int
    """At most `recent`."""
    recent: Tensor
    """int32 [B]."""


class Tiles(NamedTuple):
    """How the work is cut. The result's bits depend on all of it but `stages`.

    Splits have `fine` entries up to the `knee`, then twice as many up to twice the knee, four times as many up to four times the knee,
    and so on `levels` times; the last size goes on. So short contexts have enough of them, and long ones not too many.
    """

    entries: int
    """Entries of the cache in a tile; divides `fine`."""
    fine: int
    knee: int
    """A multiple of 2 * fine."""
    levels: int
    stages: int
    warps: int


def tiles_for(kv_heads: int, head_dim: int, dtype: torch.dtype) -> Tiles:
    """The cut for `kv_heads` heads of `head_dim`."""
    if dtype == torch.float32:  # exact products are made outside the matrix units
        return Tiles(32, 128, 4096, 2, 2, 4)
    return Tiles(64, 64, 2048, 5, 3, 4) if kv_heads < 24 else Tiles(64, 128, 4096, 3, 3, 4)


def tiles_for_list(kv_heads: int, head_dim: int, dtype: torch.dtype, listed: int) -> Tiles:
    """The cut for lists of so many entries a head. They are few, so that all programs run at once: each waits once for where its
    entries lie, and then reads as many as it can."""
    cut = tiles_for(kv_heads, head_dim, dtype)
    if dtype == torch.float32:
        return cut
    most = min(1024, max(cut.entries, 1 << round(math.log2(max(1, listed * kv_heads / _LISTED_PROGRAMS)))))
    fine = max(cut.entries, most // 4)  # shorter ones first, for sequences that fill no list
    levels = (most // fine).bit_length() - 1
    return cut._replace(fine=fine, knee=4 * fine if levels else 1 << 20, levels=max(1, levels))


def splits_for(tiles: Tiles, entries: int) -> int:
    """Splits that a context of `entries` has, at least 1."""
    fine, knee = tiles.fine, tiles.knee
    splits, done, size = -(-min(entries, knee) // fine), knee, fine
    for level in range(tiles.levels):
        size = fine << level + 1
        end = knee << level + 1 if level < tiles.levels - 1 else entries
        splits += max(0, -(-(min(entries, end) - done) // size))
        done = end
    return max(1, splits)


def decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    starts: Tensor,
    counts: Tensor | None = None,
    *,
    scale: float,
    most_entries: int,
    most_shown: int | None = None,
    window: int | None = None,
    slopes: Tensor | None = None,
    absolute_bias_scale: float | None = None,
    heads: Tensor | None = None,
    head_count: Tensor | None = None,
    chunks: Chunks | None = None,
    out: Tensor | None = None,
    tiles: Tiles | None = None,
    overlap: bool | None = None,
) -> Tensor:
    """Softmax attention of T new tokens of each of B sequences over the entries of a paged store.

    q [B * T, H, d], a sequence's tokens one after the other; keys, values [blocks, block_size, K, d], K dividing H, any strides but
    the last, which is 1; tables [B, n] int32: where each block_size positions of a sequence lie. Token i of sequence b stands at
    position starts[b] + i (int32 [B]) and sees the entries up to and including its own, which are in the store. `counts` [B] int32:
    only the first counts[b] tokens are real; the others' output is 0. Returns [B * T, H, d], in `out` if given.

    `most_entries`: no sequence has more entries than this, starts[b] + T; the result does not depend on it. `window`, `slopes` [H] and
    `absolute_bias_scale` as in `attend`; biases are float32 here, where torch rounds them to the dtype of q.

    `heads` [C] int32 or int64, in any order, some perhaps twice, -1: none: only these query heads are wanted, the first `head_count`
    [1] (int32) of them; returns [B * T, C, d], 0 beyond the count and for none. KV heads that none of them reads are not read.

    `chunks`: only these entries are seen, and read. `most_shown`: with them, no sequence shows more entries than this, places in its
    list, used or not, and its tokens' own included; tighter than what follows from `most_entries`, it saves empty programs.

    `tiles`: another cut than that of `tiles_for`, or of `tiles_for_list` with `chunks`. `overlap`: launch each step before what comes
    before it has ended, where it waits (programmatic dependent launch); by default on a GPU. Precondition of it: a kernel that waited
    stands between this call and what wrote tables, starts, counts, heads and chunks, which are read before the wait (see overlap.py).
    """
    rows, query_heads, size = q.shape
    kv_heads, block_size = keys.shape[2], keys.shape[1]
    sequences, table_size = tables.shape
    tokens, share = rows // sequences, query_heads // kv_heads
    assert rows == sequences * tokens and query_heads == kv_heads * share and keys.shape == values.shape
    assert q.stride(2) == 1 and keys.stride(3) == 1 and values.stride(3) == 1 and tables.stride(1) == 1
    listed = 0
    if chunks is not None:
        count = chunks.ids.shape[2]
        listed = chunks.sinks + count * chunks.size
        assert chunks.ids.shape[:2] == (sequences, kv_heads) and chunks.ids.stride()[1:] == (count, 1)
    cut = tiles or (tiles_for_list(kv_heads, size, q.dtype, listed) if listed else tiles_for(kv_heads, size, q.dtype))
    assert cut.fine % cut.entries == 0 and cut.knee % (2 * cut.fine) == 0 and cut.levels >= 1
    columns = query_heads if heads is None else heads.shape[0]
    out = q.new_empty(rows, columns, size) if out is None else out
    if rows == 0 or columns == 0:
        return out
    # Sums outside the matrix units, those of float32, are only the same bits in tiles of the same shape.
    most = 16 if q.dtype == torch.float32 else MOST_ROWS if size <= 128 else MOST_ROWS // 2
    tile = min(most, max(16, triton.next_power_of_2(tokens * share)))
    row_tiles = triton.cdiv(tokens * share, tile)
    most_seen = listed + most_entries if most_shown is None or chunks is None else most_shown
    splits = splits_for(cut, most_seen)
    stats = q.new_empty(2, rows * query_heads, splits, dtype=torch.float32)
    sums = q.new_empty(rows * query_heads, splits, size, dtype=torch.float32)
    recent = starts if chunks is None else chunks.recent
    overlap = overlaps(q.device) if overlap is None else overlap
    early = {"launch_pdl": True} if overlap else {}
    partial[(splits * kv_heads * row_tiles, sequences)](
        q,
        keys,
        values,
        tables,
        starts,
        counts,
        slopes,
        heads,
        head_count,
        None if chunks is None else chunks.ids,
        recent,
        stats,
        sums,
        tokens,
        splits,
        listed,
        columns,
        0 if window is None else window,
        scale,
        1.0 if absolute_bias_scale is None else absolute_bias_scale,
        q.stride(0),
        q.stride(1),
        *keys.stride()[:3],
        *values.stride()[:3],
        table_size,
        tables.stride(0),
        0 if chunks is None else chunks.ids.stride(0),
        query_heads,
        kv_heads,
        share,
        size,
        max(16, triton.next_power_of_2(size)),  # the matrix units take no less
        1 if table_size == 1 else block_size,
        table_size == 1,
        window is not None,
        absolute_bias_scale is not None,
        1 if chunks is None else chunks.size,
        0 if chunks is None else chunks.sinks,
        triton.next_power_of_2(columns),
        tile,
        row_tiles,
        cut.entries,
        cut.fine,
        cut.knee,
        cut.levels,
        overlap,
        num_stages=cut.stages if tile < 64 else min(cut.stages, 2),  # two programs have to fit a multiprocessor
        num_warps=cut.warps,
        **early,
    )
    combine[(rows, columns, triton.cdiv(size, _COMBINED))](
        stats,
        sums,
        starts,
        counts,
        heads,
        head_count,
        recent,
        out,
        tokens,
        splits,
        listed,
        0 if window is None else window,
        out.stride(0),
        out.stride(1),
        query_heads,
        size,
        _COMBINED,
        window is not None,
        chunks is not None,
        cut.fine,
        cut.knee,
        cut.levels,
        overlap,
        num_warps=4,
        **early,
    )
    return out
