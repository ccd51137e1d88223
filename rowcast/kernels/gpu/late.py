"""Lazy K/V: the newest tokens' inputs in a ring, and entries made from them for the heads that are used.

The reference is `rowcast.runtime.sparse.lazy`. One sequence; place p of its entries has row p % `RING` of the ring.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rowcast.kernels.gpu.overlap import overlap
from rowcast.kernels.gpu.select import Chosen

RING: Final = 16
"""Rows: the columns of a product's tile."""


@dataclass(frozen=True, slots=True)
class Ring:
    """Where a pass's inputs are kept: by `heads.head_scores` or, where it reads others, by `norms.norm`."""

    rows: Tensor
    """[16, D]."""
    starts: Tensor
    """int32 [1]: the place of the pass's first token."""
    counts: Tensor
    """int32 [1]: its real tokens."""


@dataclass(frozen=True, slots=True)
class Fused:
    """Rows of a table [3 H d, D]: queries of C heads, keys of late ones, values of these."""

    rows: Tensor
    """int32."""
    count: Tensor | None
    """int32 [1]; None: all are valid."""


@dataclass(frozen=True, slots=True)
class LateHeads:
    """The heads whose entries a pass makes."""

    heads: Tensor
    """int32 [C]; as many are valid as were chosen."""
    rows: Tensor | None
    """int32 [2 C d]: their rows of a table [2 H d, D], keys above values: those of their keys, behind them those of their values. None:
    all."""
    count: Tensor
    """int32 [1], of `rows`."""
    fused: Fused | None = None
    """In place of `rows`, with the rows of the chosen heads' queries."""


def begin_late(until: Tensor, starts: Tensor, counts: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """A pass over a sequence whose entries are complete up to the place until[0] begins, at starts[0]; int32 [1] all.

    Returns from where its heads write their entries, and whether all heads have to, as the ring may not hold the next pass, of at most
    `most` tokens, otherwise. Moves `until`: of the pass's own tokens only the first is sure to stay. Precondition: 2 most <= 16.
    """
    assert 2 * most <= RING
    first, everything = torch.empty_like(until), torch.empty_like(until)
    _begin_late[(1,)](until, starts, counts, first, everything, most, num_warps=1)
    return first, everything


def late_heads(chosen: Chosen, heads: int, size: int, everything: Tensor | None = None) -> LateHeads:
    """`chosen` of `heads` heads of `size` elements; or all of them where everything[0] (int32) is not 0, which has room for them."""
    places, device = len(chosen.ids) if everything is None else heads, chosen.ids.device
    ids, rows = (torch.empty(n, dtype=torch.int32, device=device) for n in (places, 2 * places * size))
    count = torch.empty_like(chosen.count)
    _late_heads[(places,)](
        chosen.ids,
        chosen.count,
        everything,
        ids,
        rows,
        count,
        len(chosen.ids),
        heads,
        size,
        SIZE=triton.next_power_of_2(size),
        num_warps=1,
    )
    return LateHeads(ids, rows, count)


def every_head(heads: int, size: int, device: torch.device) -> LateHeads:
    """All of them; rows are all of the table."""
    count = torch.tensor([2 * heads * size], dtype=torch.int32, device=device)
    return LateHeads(torch.arange(heads, dtype=torch.int32, device=device), None, count)


def write_late(
    products: Tensor,
    late: LateHeads,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    first: Tensor,
    starts: Tensor,
    counts: Tensor,
    chosen: Tensor | None = None,
) -> Tensor | None:
    """Write entries of the places first[0] <= p < starts[0] + counts[0], at most 16, for the heads of `late`.

    products [16, 2 C d]: those of the ring's rows with `late.rows`; keys, values [blocks, block_size, H, d]; table int32 [n], the
    blocks of the places; first, starts, counts int32 [1].

    With `chosen` int32 [Q] products [16, (Q + 2 C) d] are those with `late.fused`. Then it returns the queries of the token at
    starts[0], [1, H, d], those of other heads undefined.
    """
    places, size, kept = len(late.heads), keys.shape[3], 0 if chosen is None else len(chosen)
    assert products.shape == (RING, (kept + 2 * places) * size)
    assert products.stride(1) == keys.stride(3) == values.stride(3) == 1
    queries = None if chosen is None else products.new_empty(1, keys.shape[2], size)
    _write_late[(max(kept, places), RING)](
        products,
        late.heads,
        late.count,
        keys,
        values,
        table,
        first,
        starts,
        counts,
        chosen,
        queries,
        kept,
        places,
        products.stride(0),
        *keys.stride()[:3],
        *values.stride()[:3],
        keys.shape[1],
        size,
        SIZE=triton.next_power_of_2(size),
        num_warps=1,
        **overlap(products),
    )
    return queries


@triton.jit
def _begin_late(until_ptr, starts_ptr, counts_ptr, first_ptr, everything_ptr, most):
    start = tl.load(starts_ptr)
    first = tl.minimum(tl.load(until_ptr), start)
    everything = start + tl.load(counts_ptr) + most - first > 16
    tl.store(first_ptr, first)
    tl.store(everything_ptr, everything.to(tl.int32))
    tl.store(until_ptr, tl.where(everything, start + 1, first))


@triton.jit
def _late_heads(
    ids_ptr,  # int32 [places]
    count_ptr,
    everything_ptr,  # int32 [1] or None
    heads_ptr,  # int32 [programs]
    rows_ptr,  # int32 [2 programs size]
    row_count_ptr,
    places,
    heads,
    size,
    SIZE: tl.constexpr,
):
    place = tl.program_id(0)
    count = tl.minimum(tl.load(count_ptr), places)
    head = tl.load(ids_ptr + place, mask=place < count, other=0)
    if everything_ptr is not None:
        everything = tl.load(everything_ptr) != 0
        count = tl.where(everything, heads, count)
        head = tl.where(everything, place, head)
    inside = place < count
    element = tl.arange(0, SIZE)
    mask = (element < size) & inside
    tl.store(heads_ptr + place, head, mask=inside)
    tl.store(rows_ptr + place * size + element, head * size + element, mask=mask)
    tl.store(rows_ptr + (count + place) * size + element, (heads + head) * size + element, mask=mask)
    if place == 0:
        tl.store(row_count_ptr, 2 * count * size)


@triton.jit
def _write_late(
    products_ptr,  # [16, (kept + 2 places) size]
    heads_ptr,
    row_count_ptr,
    keys_ptr,
    values_ptr,
    table_ptr,
    first_ptr,
    starts_ptr,
    counts_ptr,
    chosen_ptr,  # int32 [kept] or None
    queries_ptr,  # [heads, size]
    kept,
    places,
    products_row,
    keys_block,
    keys_entry,
    keys_head,
    values_block,
    values_entry,
    values_head,
    block_size,
    size,
    SIZE: tl.constexpr,
    OVERLAP: tl.constexpr,  # see overlap.py
):
    """One head of one row of the ring."""
    if OVERLAP:
        gdc_launch_dependents()
    place, row = tl.program_id(0), tl.program_id(1)
    count = tl.load(row_count_ptr) // (2 * size)
    first, start = tl.load(first_ptr), tl.load(starts_ptr)
    entry = first + (row + 16 - first % 16) % 16
    inside = (place < tl.minimum(count, places)) & (entry < start + tl.load(counts_ptr))
    head = tl.load(heads_ptr + place, mask=inside, other=0)
    block = tl.load(table_ptr + entry // block_size, mask=inside, other=0).to(tl.int64)
    element = tl.arange(0, SIZE)
    mask = (element < size) & inside
    own = products_ptr + row * products_row + element
    wanted = (element < size) & (place < kept) & (row == start % 16)
    query_head = 0
    if chosen_ptr is not None:
        query_head = tl.load(chosen_ptr + place, mask=place < kept, other=0)
    if OVERLAP:  # where entries go was known before their products
        gdc_wait()
    if chosen_ptr is not None:
        query = tl.load(own + place * size, mask=wanted, other=0.0)
        tl.store(queries_ptr + query_head * size + element, query, mask=wanted)
    source = own + (kept + place) * size
    key, value = tl.load(source, mask=mask, other=0.0), tl.load(source + count * size, mask=mask, other=0.0)
    offset = entry % block_size
    tl.store(keys_ptr + block * keys_block + offset * keys_entry + head * keys_head + element, key, mask=mask)
    tl.store(values_ptr + block * values_block + offset * values_entry + head * values_head + element, value, mask=mask)
