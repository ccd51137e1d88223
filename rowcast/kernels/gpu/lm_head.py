"""The certified LM head on a GPU: exact top-k of all logits from a few bits of most rows, without asking the device.

The stages and their bounds are those of `runtime/sparse/lm_head.py`, which makes the proxies, radii and directions and is the
reference. Here each list of rows that may still win lies on the device, with a fixed capacity and a count. Where one overflows the
rows of the list are not read but all rows are, by a product that has nothing to do otherwise: the answer is exact either way.

The order of a list depends on timing, no result does: a row's product does not depend on its place, and the last choice is by value,
then by id. The k-th largest lower bound is that of groups of rows, which is not above that of all rows: a few rows more may be kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
import triton
from torch import Tensor

from rowcast.kernels.gpu import MOST_TOKENS, lowbit, products
from rowcast.kernels.gpu.codes import Tiles
from rowcast.kernels.gpu.lm_head_kernels import (
    bounds_kernel,
    choose_kernel,
    finer_kernel,
    merge_kernel,
    parts_kernel,
    top_kernel,
)
from rowcast.kernels.gpu.scratch import counters
from rowcast.kernels.lowbit import BLOCK, LowBit

MOST_K: Final = 64
MOST_STAGES: Final = 4
_CELLS: Final = 8
_PARTS: Final = 16


@dataclass(frozen=True, slots=True)
class Stage:
    """A proxy of what the stages before have left of the rows."""

    proxy: LowBit
    """[V, E]."""
    correction: LowBit | None
    """[V, m], the first proxy's error along the directions; None: later stages, and heads without directions."""
    radii: Tensor
    """[V, 2] float32, rounded up: lengths of what is left across and along the directions, the latter with room for rounding."""


@dataclass(frozen=True, slots=True)
class Found:
    """The best logits of T tokens."""

    values: Tensor
    """float32 [T, k], descending; rounded to the rows' dtype."""
    ids: Tensor
    """int64 [T, k]; of equal values the lower id is first."""
    rescored: Tensor
    """int64 [T]: rows that the token alone would read in full; all where a list overflowed."""
    fallback: Tensor
    """bool [T]: a list overflowed, so that all rows were read. The same for all tokens of a call."""


@dataclass(frozen=True, slots=True)
class Logits:
    """All logits of T tokens, and what they took."""

    values: Tensor
    """float32 [T, V]: those that may be among a token's k largest exactly, as in `Found`, the others by proxy."""
    counts: Tensor
    """int32 [stages + 1]: rows that each later stage read, then those read in full: of the list, and of all where one overflowed."""


@dataclass(frozen=True, slots=True)
class Capacities:
    """Rows that lists can hold, over all tokens of a call."""

    refined: int
    """That a later stage looks at."""
    exact: int
    """That are read in full."""

    @staticmethod
    def of(rows: int) -> Capacities:
        """Where refining reads half of the second proxy, which the best 64 come near to, and exact rows an eighth of the head."""
        return Capacities(max(rows // 2, 4 * MOST_K), max(rows // 8, 4 * MOST_K))


def top(
    rows: Tensor, stages: Sequence[Stage], directions: Tensor, x: Tensor, k: int = 1, capacities: Capacities | None = None
) -> Found:
    """The `k` largest logits of each token, exactly: rows [V, E], directions float32 [m, E] (m = 0: none), x [T, E] of rows' dtype.

    1 <= k <= min(V, 64), 1 <= T <= 16; the bounds cover float32 sums in any order. Does not modify its arguments; can be captured.
    The first call must not be captured (`scratch.py`).
    """
    search = _search(rows, stages, directions, x, k, capacities)
    new, last, verdict, tokens = search.new, search.listed, search.verdict, len(x)
    values, ids = new.float32(tokens, k), torch.empty(tokens, k, dtype=torch.int64, device=x.device)
    fallback = torch.empty(tokens, dtype=torch.uint8, device=x.device)
    kept = triton.next_power_of_2(k)
    top_kernel[(_PARTS, tokens)](
        search.exact,
        last.ids,
        last.owners,
        search.whole,
        verdict,
        torch.empty(tokens, _PARTS, kept, dtype=torch.int64, device=x.device),
        values,
        ids,
        fallback,
        search.arrivals,
        last.capacity,
        len(rows),
        K=k,
        KEPT=kept,
        CHUNK=max(2 * kept, _block(x.device)),
        PROGRAMS=_PARTS,
    )
    return Found(values, ids, search.rescored, fallback.view(torch.bool))


def logits(
    rows: Tensor, stages: Sequence[Stage], directions: Tensor, x: Tensor, k: int = 1, capacities: Capacities | None = None
) -> Logits:
    """All logits, of which the `k` largest are exact and larger than all that are not: arguments as for `top`.

    What a stage finds of a row it looks at takes the place of what those before found. Each token's logits are its own, but that one
    whose list overflows has the rows of all tokens read.
    """
    capacities = capacities or Capacities.of(len(rows))
    search = _search(rows, stages, directions, x, k, capacities, merged=True)
    last, block, total = search.listed, _block(x.device), len(rows)
    read = search.new.int32(len(stages) + 1)
    merge_kernel[(triton.cdiv(total, block),)](
        search.estimate, search.exact, last.ids, last.owners, search.counts, search.whole, search.verdict, read, len(x),
        last.capacity, total, min(total, capacities.refined), REFINED=len(stages) - 1, BLOCK=block,
    )  # fmt: skip
    return Logits(search.estimate, read)


@dataclass(frozen=True, slots=True)
class _Search:
    """The rows that may be among the best, read in full."""

    new: _New
    estimate: Tensor
    """float32 [T, V], of all rows: by the first stage, and by later ones where they were to be merged."""
    listed: _List
    exact: Tensor
    """[T, capacity]: of the list."""
    whole: Tensor
    """[T, V]: of all rows, if they were read."""
    counts: Tensor
    verdict: Tensor
    """int32 [2]: rows that were read by the list, and of all."""
    rescored: Tensor
    arrivals: Tensor


def _search(
    rows: Tensor,
    stages: Sequence[Stage],
    directions: Tensor,
    x: Tensor,
    k: int,
    capacities: Capacities | None,
    merged: bool = False,
) -> _Search:
    tokens, columns = x.shape
    total = len(rows)
    assert 0 < tokens <= MOST_TOKENS and 0 < k <= min(total, MOST_K) and 0 < len(stages) <= MOST_STAGES
    assert x.dtype == rows.dtype and directions.shape == (len(directions), columns) and directions.is_contiguous()
    assert all(stage.radii.is_contiguous() for stage in stages)
    capacities = capacities or Capacities.of(total)
    relative = 0.0 if rows.dtype == torch.float32 else torch.finfo(rows.dtype).eps
    x = x.contiguous()
    new = _New(x.device)
    arrivals = counters(x.device, tokens)
    counts, rescored = new.int32(_CELLS), torch.empty(tokens, dtype=torch.int64, device=x.device)
    along, lengths, thresholds = new.float32(tokens, len(directions)), new.float32(tokens, 2), new.float32(tokens)

    parts_kernel[(len(directions) + 1, tokens)](
        x,
        directions,
        along,
        torch.empty(tokens, dtype=torch.float64, device=x.device),
        lengths,
        counts,
        rescored,
        arrivals,
        columns,
        CELLS=_CELLS,
        BLOCK=min(1024, triton.next_power_of_2(columns)),
        DIRECTIONS=triton.next_power_of_2(max(1, len(directions))),
    )
    first, *refinements = stages
    correction = first.correction
    fused = correction is not None and correction.bits == 4 and correction.codes.stride(1) == 1
    corrected = None if correction is None or fused else lowbit.product(correction, along)
    estimate = first_estimate = lowbit.product(first.proxy, x, residual=corrected)

    groups, each = (2, 128) if x.is_cuda else (16, 16)  # the interpreter has small heads
    blocks, best = triton.cdiv(total, groups * each), 1 if k == 1 else 2
    bounds_kernel[(blocks, tokens)](
        estimate,
        correction.codes if correction is not None and fused else None,
        correction.scales if correction is not None and fused else None,
        along,
        first.radii,
        lengths,
        new.float32(tokens, blocks * best * groups),
        thresholds,
        arrivals,
        total,
        len(directions),
        correction.codes.stride(0) if correction is not None else 0,
        correction.scales.stride(0) if correction is not None else 0,
        correction.scales.stride(1) if correction is not None else 0,
        K=k,
        RELATIVE=relative,
        BLOCKS=correction.padded // BLOCK if correction is not None else 0,
        GROUP=correction.group // BLOCK if correction is not None else 1,
        GROUPS=groups,
        EACH=each,
        KEPT=best,
        MAXIMA=triton.next_power_of_2(blocks * best * groups),
    )
    listed: _List | None = None
    for number, stage in enumerate(stages):
        if listed is not None:
            chosen = _chosen_rows(stage.proxy, x)
            refinement = lowbit.product(stage.proxy, x, ids=listed.ids, count=listed.count, tiles=chosen)
            finer_kernel[(tokens,)](
                listed.estimate,
                refinement,
                listed.ids,
                listed.owners,
                listed.count,
                stage.radii,
                lengths,
                thresholds,
                listed.capacity,
                K=k,
                RELATIVE=relative,
                SIZE=_finer_size(x.device),
                num_warps=8,
            )
            estimate = refinement
            if merged:
                merge_kernel[(triton.cdiv(listed.capacity, _block(x.device)),)](
                    first_estimate, refinement, listed.ids, listed.owners, listed.count, None, None, None, tokens, listed.capacity,
                    total, 0, REFINED=0, BLOCK=_block(x.device),
                )  # fmt: skip
        last = number == len(refinements)
        capacity = min(total, capacities.exact if last else capacities.refined)
        ids = new.int32(capacity)
        if number and not last:
            ids.zero_()  # Where the list before this one overflows nothing is put here, but the next stage reads as many rows.
        after = _List(ids, new.int32(capacity), None if last else new.float32(tokens, capacity), counts[number:])
        places = estimate.shape[1]
        block = _block(x.device)
        choose_kernel[(triton.cdiv(places, block),)](
            estimate,
            None if listed is None else listed.ids,
            None if listed is None else listed.owners,
            None if listed is None else listed.count,
            stage.radii,
            lengths,
            thresholds,
            after.ids,
            after.owners,
            after.estimate,
            after.count,
            counts[_CELLS - 2 :] if last else None,
            rescored,
            arrivals,
            tokens,
            places,
            capacity,
            total,
            RELATIVE=relative,
            BLOCK=block,
        )
        listed = after
    assert listed is not None

    verdict = counts[_CELLS - 2 :]
    exact = products.rows_in(rows, x, listed.ids, verdict[:1])
    whole = products.rows_in(rows, x, count=verdict[1:])
    return _Search(new, first_estimate, listed, exact, whole, counts, verdict, rescored, arrivals)


@dataclass(frozen=True, slots=True)
class _List:
    """Rows that may still win."""

    ids: Tensor
    owners: Tensor
    estimate: Tensor | None
    count: Tensor

    @property
    def capacity(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class _New:
    """Buffers of a device, not initialised."""

    device: torch.device

    def int32(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=self.device)

    def float32(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)


def _chosen_rows(q: LowBit, x: Tensor) -> Tiles | None:
    """For a later proxy, of which few rows are read: more splits than the capacity would ask for."""
    return Tiles(64, 4, 1, 4) if x.is_cuda else None


def _block(device: torch.device) -> int:
    return 1024 if device.type == "cuda" else 256


def _finer_size(device: torch.device) -> int:
    return 4096 if device.type == "cuda" else 512
