"""Chunk summaries, their scores and the choice of chunks, for the retrieval cache: nothing of it asks the device anything.

The fast path of `runtime.kv.summaries.Summaries` and `runtime.kv.selection.Retrieval` (TriForce, arXiv 2404.11912, section 4.1; Quest,
arXiv 2406.10774, section 3.2). Lengths, bounds and numbers of tokens are device tensors.
"""

from __future__ import annotations

import math
from typing import Final, Literal

import torch
import triton
from torch import Tensor

from rowcast.kernels.gpu import retrieval_kernels as kernels
from rowcast.kernels.retrieval_sizes import SPLIT, layer_bytes, tile_rows

WORK_BYTES: Final = 64 << 20
"""Work space of `chunk_scores` beside its scores, unless a single layer needs more."""

_CHUNKS: Final = 64
"""Chunks of a tile."""
_SPLIT: Final = SPLIT
_MOST_HELD: Final = 16_384
"""Scores that a program of `choose_chunks` keeps in registers; more are read again and again."""


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
    kernels.summarise[(programs, layers * head_groups, tables.shape[0])](
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
    work: Tensor | None = None,
) -> Tensor:
    """How much of their attention tokens would give each chunk, were its summary a key: [B, layers, K, most_chunks] float32.

    queries [layers, B, n, H, d] after RoPE, any strides but the last, which is 1; kept [parts, layers, K, blocks, per_block, d], a
    layer's contiguous, of which two parts are bounds of q . k and one is a key; tables [B, blocks] int32. Softmax over the chunks
    first[b]..last[b] - 1 (int32 [B], last <= most_chunks), mean over the first counts[b] tokens (int32 [B]; all n by default) and
    over the query heads of a group. Other chunks' scores are not written.

    `slopes` [H] and `absolute_bias_scale` as in `attend`; `windows` int32 [layers], 0: none, for which `lengths` [B] int32 tell how
    many entries there are up to and including the last counted token. A chunk stands at its last position.

    `work` [n] float32: the scores lie at its beginning, what is computed for them behind; None: memory is allocated for both.
    Precondition: it holds the scores and one layer's `layer_bytes` of all sequences.
    """
    layers, sequences, tokens, query_heads, size = queries.shape
    parts, _, kv_heads, _, per_block, _ = kept.shape
    share = query_heads // kv_heads
    assert kept[0, 0].is_contiguous() and queries.stride(4) == 1 and tables.stride(1) == 1
    assert windows is None or lengths is not None
    rows = tile_rows(tokens * share, queries.itemsize)
    row_tiles, splits = triton.cdiv(tokens * share, rows), max(1, triton.cdiv(most_chunks, _SPLIT))
    shape = sequences, layers, kv_heads, most_chunks
    each = sequences * kv_heads * row_tiles * rows
    per_layer = sequences * layer_bytes(kv_heads, tokens * share, most_chunks, queries.itemsize, _SPLIT) // 4
    at_a_time = max(1, min(layers, WORK_BYTES // (4 * per_layer)))
    if work is None:
        work = queries.new_empty(math.prod(shape) + at_a_time * per_layer, dtype=torch.float32)
    scores, rest = work[: math.prod(shape)].view(shape), work[math.prod(shape) :]
    at_a_time = min(at_a_time, len(rest) // per_layer)
    assert at_a_time > 0 and work.dtype == torch.float32, f"{len(work)} numbers of work space do for no layer"
    raw, stats = rest[: at_a_time * each * most_chunks], rest[at_a_time * each * most_chunks :]
    for layer in range(0, layers, at_a_time):
        some = min(at_a_time, layers - layer)
        of_layers = (queries[layer:], kept[:, layer:], None if windows is None else windows[layer:])
        kernels.score[(splits * row_tiles, some * kv_heads, sequences)](
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
        kernels.normalise[(triton.cdiv(most_chunks, 2 * _CHUNKS), some * kv_heads, sequences)](
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


def choose_chunks(
    scores: Tensor, count: int, first: Tensor, last: Tensor, out: Tensor | None = None, slots: Tensor | None = None
) -> Tensor:
    """The `count` best of the chunks first[b]..last[b] - 1, ascending, of equal ones the lower: [B, layers, K, count] int32.

    scores [B, layers, K, chunks] float32 without NaN, contiguous; first, last [B] int32. Where there are fewer, -1 stands at the end;
    where last[b] < first[b], nothing is written. `slots` [B] int32: the rows of `out` [slots, layers, K, count] that are written;
    None: each its own.
    """
    sequences, layers, kv_heads, chunks = scores.shape
    assert scores.is_contiguous() and scores.dtype == torch.float32
    assert slots is None or out is not None
    out = scores.new_empty((sequences, layers, kv_heads, count), dtype=torch.int32) if out is None else out
    assert out.is_contiguous() and out.shape[1:] == (layers, kv_heads, count) and (slots is not None or len(out) == sequences)
    if count == 0 or chunks == 0:
        assert slots is None
        return out.fill_(-1)
    held = min(_MOST_HELD, max(128, triton.next_power_of_2(chunks)))
    kernels.choose[(layers * kv_heads, sequences)](
        scores,
        first,
        last,
        slots,
        out,
        count,
        chunks,
        held,
        chunks <= held,
        triton.next_power_of_2(count),
        num_warps=16 if held > 4096 else 4,
    )
    return out
