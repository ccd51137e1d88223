"""Selection on a GPU: ids in buffers of a fixed capacity, and their count on the device. The reference is `rowcast.kernels.select`.

The best of each of a fixed number of virtual shards, or what exceeds a threshold; then the union over 1 to 16 tokens. Scores are
float32 and hold no NaN. Everything can be captured in a CUDA graph; scratch: `scratch.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import torch
import triton
from torch import Tensor

from rowcast.kernels import select
from rowcast.kernels.gpu import MOST_TOKENS
from rowcast.kernels.gpu.overlap import overlap
from rowcast.kernels.gpu.scratch import counters as zeroed_counters
from rowcast.kernels.gpu.select_kernels import (
    above_ids_kernel,
    above_mask_kernel,
    rerank_kernel,
    top_ids_kernel,
    top_mask_kernel,
    union_kernel,
)

MOST_OF_SHARD = 1 << 14
"""Items of the largest shard: one CTA holds them all."""
_CHUNK = 512
_ABOVE_CHUNK, _ABOVE_BEFORE = 1024, 4096
_INT32 = 1 << 31


@dataclass(frozen=True, slots=True)
class Places:
    """How many of its items each shard keeps. Shards are neighbours, at most `MOST_OF_SHARD` items each."""

    sizes: tuple[int, ...]
    kept: tuple[int, ...]

    @classmethod
    def of(cls, total: int, keep: int, shards: int = 8) -> Places:
        """As `select.shard_spans` cuts and deals. Raises UserError as it does."""
        spans = select.shard_spans(total, keep, shards)
        return cls(tuple(span.stop - span.start for span, _ in spans), tuple(count for _, count in spans))

    @property
    def total(self) -> int:
        return sum(self.sizes)

    @property
    def keep(self) -> int:
        return sum(self.kept)


@dataclass(frozen=True, slots=True)
class Chosen:
    """The rows of T tokens, in buffers of a fixed number of places C."""

    ids: Tensor
    """int32 [C]; the first `count` are valid and ascending."""
    count: Tensor
    """int32 [1], on the device."""
    own: Tensor | None
    """bool [T, C]: which of them each token chose; beyond the count undefined. None: a single token, which chose them all."""
    starts: Tensor | None = None
    """int32 [shards + 1]: where each shard's ids begin, and the count."""
    places: Places | None = None
    """How many ids each shard has, where that is known beforehand."""


def top_ids(scores: Tensor, places: Places) -> Chosen:
    """Each token's best scores of each shard, of equal ones the lower index, and their union: scores float32 [T, N].

    With one token C is what is kept, with several min(N, T keep).
    """
    tokens, total = scores.shape
    assert 0 < tokens <= MOST_TOKENS and scores.dtype == torch.float32 and total == places.total
    scores, shards = scores.contiguous(), len(places.sizes)
    device = scores.device
    if tokens == 1:
        ids, starts, count = _ints(places.keep, device), _ints(shards + 1, device), _ints(1, device)
        block, warps = _block(max(places.sizes))
        top_ids_kernel[(shards,)](
            scores,
            _table(places, device),
            ids,
            starts,
            count,
            total,
            places.keep,
            shards,
            EVEN=_even(places),
            ALIGNED=_aligned(places),
            BLOCK=block,
            num_warps=warps,
            **overlap(scores),
        )
        return Chosen(ids, count, None, starts, places=places)
    mask, sizes, chunk = _top_mask(scores, places)
    return _union(mask, places, sizes, min(total, tokens * places.keep), chunk)


def top_mask(scores: Tensor, places: Places) -> Tensor:
    """The same without the union: scores float32 [T, N] -> each token's, bool [T, N]."""
    tokens, total = scores.shape
    assert 0 < tokens <= MOST_TOKENS and scores.dtype == torch.float32 and total == places.total
    return _top_mask(scores.contiguous(), places)[0]


def _top_mask(scores: Tensor, places: Places) -> tuple[Tensor, Tensor, int]:
    """[T, N] bool, and how many any token chose of each chunk of a shard, int32 [shards chunks], with the chunks' size."""
    (tokens, total), shards, device = scores.shape, len(places.sizes), scores.device
    block, warps = _block(max(places.sizes))
    mask = torch.empty(tokens, total, dtype=torch.bool, device=device)
    chunk = min(_CHUNK, block)
    sizes = _ints(shards * (block // chunk), device)
    top_mask_kernel[(shards, tokens)](
        scores,
        _table(places, device),
        _bytes(mask),
        sizes,
        zeroed_counters(device, shards),
        total,
        places.keep,
        shards,
        tokens,
        EVEN=_even(places),
        ALIGNED=_aligned(places),
        BLOCK=block,
        CHUNK=chunk,
        num_warps=warps,
        **overlap(scores),
    )
    return mask, sizes, chunk


def above_ids(scores: Tensor, threshold: Tensor | float) -> Chosen:
    """All scores above their threshold, float32 [N] or one number, and the union over tokens: scores float32 [T, N] -> C = N.

    `starts` is not of shards.
    """
    tokens, total = scores.shape
    assert 0 < tokens <= MOST_TOKENS and scores.dtype == torch.float32
    scores, device = scores.contiguous(), scores.device
    thresholds, number = (threshold, 0.0) if isinstance(threshold, Tensor) else (None, float(threshold))
    assert thresholds is None or (thresholds.shape == (total,) and thresholds.dtype == torch.float32)
    if tokens == 1:
        ids, count = _ints(total, device), _ints(1, device)
        above_ids_kernel[(triton.cdiv(total, _ABOVE_CHUNK),)](
            scores,
            thresholds,
            number,
            ids,
            count,
            total,
            CHUNK=_ABOVE_CHUNK,
            BEFORE=_ABOVE_BEFORE,
            num_warps=8,
            **overlap(scores),
        )
        return Chosen(ids, count, None)
    mask = torch.empty(tokens, total, dtype=torch.bool, device=device)
    chunks = triton.cdiv(total, _CHUNK)
    sizes = _ints(chunks, device)
    above_mask_kernel[(chunks,)](
        scores, thresholds, number, _bytes(mask), sizes, total, tokens, BLOCK=_CHUNK, num_warps=4, **overlap(scores)
    )
    return _union(mask, None, sizes, total, _CHUNK)


def rerank(exact: Tensor, chosen: Chosen, places: Places, norms: Tensor | None = None) -> Tensor:
    """Each token's best of each shard among its candidates, of equal ones the lower index: exact [T, C] -> bool [T, C], false
    beyond the count.

    exact: scores; with norms float32 [N] hidden values, whose scores are |hidden| * norms. `chosen` is `top_ids`'.
    """
    kept = torch.zeros(exact.shape, dtype=torch.bool, device=exact.device)
    _rerank(exact, chosen, places, norms, kept, None, None, None)
    return kept


def rerank_one(hidden: Tensor, chosen: Chosen, places: Places, norms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`rerank` for one token, with what is kept moved together: ids int32 [K], count int32 [1], hidden [1, K] for K kept.

    Precondition: each shard has as many candidates as are kept of it.
    """
    assert hidden.shape[0] == 1 and chosen.own is None
    ids, count = _ints(places.keep, hidden.device), _ints(1, hidden.device)
    kept = hidden.new_empty(1, places.keep)
    _rerank(hidden, chosen, places, norms, None, ids, kept, count)
    return ids, count, kept


def _rerank(
    exact: Tensor,
    chosen: Chosen,
    places: Places,
    norms: Tensor | None,
    mask: Tensor | None,
    ids: Tensor | None,
    hidden: Tensor | None,
    count: Tensor | None,
) -> None:
    tokens, columns = exact.shape
    assert chosen.starts is not None and len(chosen.starts) == len(places.sizes) + 1 and columns == len(chosen.ids)
    exact = exact.contiguous()
    block, warps = _block(min(columns, max(places.sizes)))
    rerank_kernel[(len(places.sizes), tokens)](
        exact,
        chosen.ids,
        None if chosen.own is None else _bytes(chosen.own),
        chosen.starts,
        norms,
        _table(places, exact.device),
        None if mask is None else _bytes(mask),
        ids,
        hidden,
        count,
        places.total,
        places.keep,
        len(places.sizes),
        columns,
        tokens,
        0 if chosen.places is None else chosen.places.keep,
        EVEN=_even(places),
        STATIC=chosen.places is not None and _even(chosen.places) and chosen.places.sizes == places.sizes,
        ALIGNED=_aligned(places),
        BLOCK=block,
        num_warps=warps,
        **overlap(exact),
    )


def _union(mask: Tensor, places: Places | None, sizes: Tensor, most: int, chunk: int) -> Chosen:
    """places: the shards, or None: chunks are. sizes: of the chunks' unions. most: rows that the union may have."""
    tokens, total = mask.shape
    shards = len(sizes) if places is None else len(places.sizes)
    ids, starts, count = (_ints(n, mask.device) for n in (most, shards + 1, 1))
    own = torch.empty(tokens, most, dtype=torch.bool, device=mask.device)
    union_kernel[(shards, len(sizes) // shards)](
        _bytes(mask),
        None if places is None else _table(places, mask.device),
        sizes,
        ids,
        _bytes(own),
        starts,
        count,
        total,
        0 if places is None else places.keep,
        shards,
        tokens,
        most,
        EVEN=places is not None and _even(places),
        ALIGNED=places is not None and _aligned(places),
        EQUAL=places is None,
        CHUNK=chunk,
        CHUNKS=len(sizes) // shards,
        SIZES=triton.next_power_of_2(len(sizes)),
        TOKENS=MOST_TOKENS,
        num_warps=4,
        **overlap(mask),
    )
    return Chosen(ids, count, own, None if places is None else starts)


def _block(most: int) -> tuple[int, int]:
    """Items that a CTA takes, and its warps."""
    assert most <= MOST_OF_SHARD, f"a shard of {most} items, at most {MOST_OF_SHARD} are possible"
    block = max(128, triton.next_power_of_2(most))
    return block, max(4, min(8, block // 256))


def _even(places: Places) -> bool:
    """Whether the kernels find the shards' bounds themselves."""
    total, keep = places.total, places.keep
    return total * max(keep, len(places.sizes)) < _INT32 and total > 0 and places == Places.of(total, keep, len(places.sizes))


def _aligned(places: Places) -> bool:
    return places.total % (16 * len(places.sizes)) == 0


@cache
def _table(places: Places, device: torch.device) -> Tensor:
    """int32 [2, shards + 1]: where each shard begins among the items, and among those that are kept."""
    rows: list[Sequence[int]] = [[0, *accumulate(places.sizes)], [0, *accumulate(places.kept)]]
    return torch.tensor(rows, dtype=torch.int32, device=device)


def _ints(count: int, device: torch.device) -> Tensor:
    return torch.empty(count, dtype=torch.int32, device=device)


def _bytes(mask: Tensor) -> Tensor:
    return mask.view(torch.uint8)
