"""From chosen heads to the rows of head-major tables, and back: what lies between a selection and its products.

The reference of `head_rows` is `SparseAttention._rows`, that of `spread` is `_among` (`rowcast.runtime.sparse.attention`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from rowcast.kernels.gpu.select import Chosen


@dataclass(frozen=True, slots=True)
class HeadRows:
    """The heads of T tokens, in C places."""

    heads: Tensor
    """int32 [C]; places beyond the count hold the first head again."""
    rows: Tensor
    """int32 [C d]: the heads' rows of a table [H d, D]."""
    count: Tensor | None
    """int32 [1], of `rows`; None: all are valid."""
    own: Tensor | None
    """bool [T, C], false beyond the count. None: a single token, which chose them all."""


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
    )
    return out


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
    tl.store(heads_ptr + place, head)
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
):
    """One head of one token."""
    head, token = tl.program_id(0), tl.program_id(1)
    count = tl.minimum(tl.load(count_ptr), places)
    at = tl.arange(0, PLACES)
    is_it = (tl.load(ids_ptr + at, mask=at < count, other=-1) == head).to(tl.int32)
    place = tl.sum(is_it * at)
    element = tl.arange(0, SIZE)
    inside = (element < size) & (tl.sum(is_it) > 0)
    values = tl.load(some_ptr + token * some_token + place * size + element, mask=inside, other=0.0)
    tl.store(out_ptr + (token * heads + head) * size + element, values, mask=element < size)
