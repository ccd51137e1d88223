"""Scores of heads; from chosen heads to the rows of head-major tables, and back: what lies around a selection and its products.

The reference of `head_scores` is `F.linear`, that of `choose_heads` is what it does in one launch, that of `head_rows` is
`SparseAttention._rows`, that of `spread` is `_among` (`rowcast.runtime.sparse.attention`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rowcast.kernels.gpu.late import RING, Fused, LateHeads, Ring
from rowcast.kernels.gpu.overlap import overlap
from rowcast.kernels.gpu.select import Chosen


@dataclass(frozen=True, slots=True)
class HeadRows:
    """The heads of T tokens, in C places."""

    heads: Tensor
    """int32 [C]; -1 beyond the count: attention would write the same head again and again."""
    rows: Tensor
    """int32 [C d]: the heads' rows of a table [H d, D]."""
    count: Tensor | None
    """int32 [1], of `rows`; None: all are valid."""
    own: Tensor | None
    """bool [T, C], false beyond the count. None: a single token, which chose them all."""


def head_scores(x: Tensor, weight: Tensor, bias: Tensor, keep: Ring | None = None) -> Tensor:
    """x [T, D] in any format times weight float32 [H, D], plus bias float32 [H] -> float32 [T, H]. A token's bits are its own.

    `keep`: where x is kept, too, of a single sequence, T <= 16.
    """
    (tokens, size), heads = x.shape, len(weight)
    assert weight.dtype == bias.dtype == torch.float32 and weight.is_contiguous() and x.stride(1) == 1
    assert keep is None or (tokens <= RING and keep.rows.shape == (RING, size) and keep.rows.is_contiguous())
    out = torch.empty(tokens, heads, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(size)
    _head_scores[(heads, tokens)](
        x,
        weight,
        bias,
        out,
        None if keep is None else keep.rows,
        None if keep is None else keep.starts,
        None if keep is None else keep.counts,
        x.stride(0),
        size,
        BLOCK=block,
        num_warps=max(1, min(16, block // 512)),
        **overlap(x),
    )
    return out


def choose_heads(
    scores: Tensor, shards: Tensor, keep: int, size: int, late: bool, everything: Tensor | None = None
) -> tuple[Chosen, HeadRows, LateHeads | None]:
    """One token's heads in one launch: `select.top_ids`, `head_rows`, and `late_heads` if `late`, of heads of `size` elements.

    scores float32 [1, H]; shards int32 [2, H]: each head's shard, and how many of its heads that keeps; `keep` in all. The late heads
    have `fused` rows, of a table [3 H d, D] of queries above keys above values: the chosen heads' queries come first.
    """
    heads, device = scores.shape[1], scores.device
    assert len(scores) == 1 and scores.dtype == torch.float32 and scores.is_contiguous() and shards.shape == (2, heads)
    places = heads if everything is not None else keep
    # Rows first, as products read them by wide loads.
    rows, ids, count = torch.empty(keep * (size + 1) + 1, dtype=torch.int32, device=device).split([keep * size, keep, 1])
    fused, late_ids, late_count, fused_count = torch.empty(
        keep * size + places * (2 * size + 1) + 2, dtype=torch.int32, device=device
    ).split([(keep + 2 * places) * size, places, 1, 1])
    _choose_heads[(heads,)](
        scores,
        shards,
        ids,
        rows,
        count,
        everything,
        late_ids,
        fused,
        late_count,
        fused_count,
        heads,
        keep,
        size,
        LATE=late,
        HEADS=triton.next_power_of_2(heads),
        SIZE=triton.next_power_of_2(size),
        num_warps=4,
        **overlap(scores),
    )
    found = None
    if late:
        known = None if everything is not None else late_count
        found = LateHeads(late_ids, None, late_count, Fused(fused, fused_count if known is None else None))
    return Chosen(ids, count, None), HeadRows(ids, rows, None, None), found


def head_rows(chosen: Chosen, size: int) -> HeadRows:
    """`chosen` among heads of `size` elements. Precondition: its count is not 0; it is C where `own` is None."""
    places, device = len(chosen.ids), chosen.ids.device
    heads = torch.empty_like(chosen.ids)
    rows = torch.empty(places * size, dtype=torch.int32, device=device)
    count, own = (None, None) if chosen.own is None else (torch.empty_like(chosen.count), torch.empty_like(chosen.own))
    _head_rows[(places,)](
        chosen.ids,
        chosen.count,
        None if chosen.own is None else chosen.own.view(torch.uint8),
        heads,
        rows,
        count,
        None if own is None else own.view(torch.uint8),
        0 if own is None else len(own),
        places,
        size,
        SIZE=triton.next_power_of_2(size),
        num_warps=1,
    )
    return HeadRows(heads, rows, count, own)


def spread(some: Tensor, chosen: Chosen, heads: int) -> Tensor:
    """some [T, C, d], the heads `chosen` -> [T, heads, d], the others 0."""
    tokens, places, size = some.shape
    assert places == len(chosen.ids) and some.stride()[1:] == (size, 1)
    out = some.new_empty(tokens, heads, size)
    _spread[(heads, tokens)](
        some,
        chosen.ids,
        chosen.count,
        out,
        some.stride(0),
        heads,
        places,
        size,
        PLACES=triton.next_power_of_2(places),
        SIZE=triton.next_power_of_2(size),
        num_warps=1,
        **overlap(some),
    )
    return out


@triton.jit
def _head_scores(
    x_ptr,  # [tokens, size]
    weight_ptr,  # [heads, size]
    bias_ptr,  # [heads]
    out_ptr,  # [tokens, heads]
    ring_ptr,  # [16, size] or None
    starts_ptr,  # int32 [1]
    counts_ptr,  # int32 [1]
    x_token,
    size,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,  # see overlap.py
):
    """One head of one token."""
    head, token = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    inside = column < size
    weight = tl.load(weight_ptr + head.to(tl.int64) * size + column, mask=inside, other=0.0)
    bias = tl.load(bias_ptr + head)
    if OVERLAP:
        gdc_wait()
    x = tl.load(x_ptr + token.to(tl.int64) * x_token + column, mask=inside, other=0.0)
    if OVERLAP:
        gdc_launch_dependents()
    tl.store(out_ptr + token * tl.num_programs(0) + head, tl.sum(weight * x.to(tl.float32), 0) + bias)
    if ring_ptr is not None:
        row = (tl.load(starts_ptr) + token) % 16
        tl.store(ring_ptr + row * size + column, x, mask=inside & (head == 0) & (token < tl.load(counts_ptr)))


@triton.jit
def _choose_heads(
    scores_ptr,  # [heads]
    shards_ptr,  # int32 [2, heads]
    ids_ptr,  # int32 [keep]
    rows_ptr,  # int32 [keep * size]
    count_ptr,
    everything_ptr,  # int32 [1] or None
    late_ids_ptr,  # int32 [places]
    fused_ptr,  # int32 [(keep + 2 * places) * size]
    late_count_ptr,  # int32 [1], of rows of late heads
    fused_count_ptr,  # int32 [1], with those of queries
    heads,
    keep,
    size,
    LATE: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    OVERLAP: tl.constexpr,  # see overlap.py
):
    """One head; what the others are each program finds for itself."""
    head = tl.program_id(0)
    at = tl.arange(0, HEADS)
    there = at < heads
    shard = tl.load(shards_ptr + at, mask=there, other=-1)
    kept = tl.load(shards_ptr + heads + at, mask=there, other=0)
    if OVERLAP:
        gdc_wait()
    score = tl.load(scores_ptr + at, mask=there, other=float("-inf"))
    score = tl.where(
        score != score, float("-inf"), score
    )  # No more than `keep` are chosen of scores that are no numbers, either.
    other, one = score[None, :], score[:, None]
    better = (other > one) | ((other == one) & (at[None, :] < at[:, None]))
    better = better & (shard[None, :] == shard[:, None])
    chosen = (tl.sum(better.to(tl.int32), 1) < kept) & there
    place = tl.sum((chosen & (at < head)).to(tl.int32), 0)
    inside = tl.sum((chosen & (at == head)).to(tl.int32), 0) > 0
    element = tl.arange(0, SIZE)
    row = head * size + element
    mask = (element < size) & inside
    tl.store(ids_ptr + place, head, mask=inside)
    tl.store(rows_ptr + place * size + element, row, mask=mask)
    tl.store(count_ptr, keep, mask=head == 0)
    if LATE:
        tl.store(fused_ptr + place * size + element, row, mask=mask)
        total = keep
        if everything_ptr is not None:
            everything = tl.load(everything_ptr) != 0
            total = tl.where(everything, heads, keep)
            place = tl.where(everything, head, place)
            inside = inside | everything
            mask = (element < size) & inside
        keys = fused_ptr + (keep + place) * size + element
        tl.store(late_ids_ptr + place, head, mask=inside)
        tl.store(keys, heads * size + row, mask=mask)
        tl.store(keys + total * size, 2 * heads * size + row, mask=mask)
        tl.store(late_count_ptr, 2 * total * size, mask=head == 0)
        tl.store(fused_count_ptr, (keep + 2 * total) * size, mask=head == 0)


@triton.jit(do_not_specialize=["tokens"])
def _head_rows(
    ids_ptr,  # int32 [places]
    count_ptr,  # int32 [1]
    own_ptr,  # uint8 [tokens, places] or None
    heads_ptr,  # int32 [places]
    rows_ptr,  # int32 [places * size]
    row_count_ptr,  # int32 [1] or None
    kept_ptr,  # uint8 [tokens, places] or None
    tokens,
    places,
    size,
    SIZE: tl.constexpr,
):
    place = tl.program_id(0)
    count = tl.minimum(tl.load(count_ptr), places)
    inside = place < count
    head = tl.load(ids_ptr + tl.where(inside, place, 0))
    tl.store(heads_ptr + place, tl.where(inside, head, -1))
    element = tl.arange(0, SIZE)
    tl.store(rows_ptr + place * size + element, head * size + element, mask=element < size)
    if own_ptr is not None:
        for token in tl.range(0, tokens):
            own = tl.load(own_ptr + token * places + place)
            tl.store(kept_ptr + token * places + place, tl.where(inside, own, 0).to(tl.uint8))
        if place == 0:
            tl.store(row_count_ptr, count * size)


@triton.jit
def _spread(
    some_ptr,  # [tokens, places, size]
    ids_ptr,  # int32 [places]
    count_ptr,  # int32 [1]
    out_ptr,  # [tokens, heads, size]
    some_token,
    heads,
    places,
    size,
    PLACES: tl.constexpr,
    SIZE: tl.constexpr,
    OVERLAP: tl.constexpr,  # see overlap.py
):
    """One head of one token."""
    head, token = tl.program_id(0), tl.program_id(1)
    count = tl.minimum(tl.load(count_ptr), places)
    at = tl.arange(0, PLACES)
    is_it = (tl.load(ids_ptr + at, mask=at < count, other=-1) == head).to(tl.int32)
    place = tl.sum(is_it * at)
    element = tl.arange(0, SIZE)
    inside = (element < size) & (tl.sum(is_it) > 0)
    if OVERLAP:
        gdc_wait()
    values = tl.load(some_ptr + token * some_token + place * size + element, mask=inside, other=0.0)
    if OVERLAP:
        gdc_launch_dependents()
    tl.store(out_ptr + (token * heads + head) * size + element, values, mask=element < size)
