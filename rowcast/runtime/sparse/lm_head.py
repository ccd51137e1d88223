"""The LM head with a certificate: top-k and argmax of all logits, exact, from a few bits of most rows.

HiRE's softmax layer (arXiv 2402.09360, section 3) takes the rows that a proxy ranks high, computes them and hopes. Here each logit has
a bound, and whatever may still be among the best is computed, so nothing is hoped for. The plain bound |w - proxy| |h| is vacuous at
few bits. Two things make it bite:

- Hidden states lie mostly along a few directions Q [m, E], so the proxy's error along them is stored, C = (w - proxy) Q^T, and what
  remains, R = w - proxy - C Q, meets only the small part of h across them: |R h| <= |R across Q| |h across Q| + |R along Q| |Q h|.
- Rows that pass the first bound are not computed at once but refined: a second proxy of a few bits holds what the first one left, and
  a third what both left. Only rows that pass all bounds are read in full, and hardly a token needs the whole head.

Every bound has room for the rounding of both sides, the dense product's included, in whatever order its terms are added, as long as
they are added in float32: TF32 is not covered, nor are reduced-precision reductions in 16 bits (on GPUs torch allows them unless
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction, or its fp16 twin, is set to False).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rowcast.kernels import lowbit, select
from rowcast.kernels.lowbit import LowBit
from rowcast.kernels.rows import rows_in
from rowcast.runtime.protocols import Reads
from rowcast.runtime.sparse.checks import HEAD_BITS

TOP = 64
"""Logits that `CertifiedHead.logits` makes exact."""
CAPACITY = 1 / 8
"""Share of the rows that may be read in full before all of them are."""

_SHORTEST = 1e-10
"""Hidden states of less length get no bound: squares and 16-bit fixed point of much smaller ones are out of float32's range."""
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class Top:
    """The best logits of T tokens, and what it took to know them."""

    values: Tensor
    """[T, k], descending."""
    ids: Tensor
    """[T, k] int64, of this rank's rows; of equal values the lower id is first."""
    rescored: Tensor
    """[T] int64: rows that the token alone would read in full."""
    fallback: Tensor
    """[T] bool: they were more than the capacity, so that all rows were read."""
    bytes: Tensor
    """[T] int64: what the token alone would read."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A setting of the head and what it costs."""

    bits: tuple[int, ...]
    directions: int
    share: float
    """Bytes read for a token, as a share of all rows'."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A proxy of what the stages before have left of the rows."""

    proxy: LowBit
    """[V, E]."""
    correction: LowBit | None
    """[V, m], the first proxy's error along the directions. None: later stages, and heads without directions."""
    radii: Tensor
    """[V, 2] float32, rounded up: lengths of what is left across and along the directions, the latter with room for rounding."""

    @property
    def bytes(self) -> int:
        return self.proxy.bytes + self.radii.nbytes + (0 if self.correction is None else self.correction.bytes)

    @property
    def row_bytes(self) -> int:
        return self.bytes // len(self.radii)


class CertifiedHead:
    """A rank's rows of the LM head, [V, E], and few-bit proxies of them with a bound."""

    def __init__(
        self,
        rows: Tensor,
        *,
        bits: Sequence[int] = HEAD_BITS,
        directions: Tensor | None = None,
        group: int = lowbit.BLOCK,
        capacity: float = CAPACITY,
    ) -> None:
        """`bits`: of the proxies, each of what those before it leave. `directions` [m, E]: orthonormal rows, None for none; m is best
        a multiple of `group`, to which the correction is padded. `capacity`: share of the rows that may be read in full, at
        least twice as many as are wanted; 0: always all of them.

        The rows are kept, not copied. Raises UserError for bits or a group that `lowbit.quantise` refuses.
        """
        self._rows = rows
        self._directions = (
            rows.new_empty((0, rows.shape[1]), dtype=torch.float32) if directions is None else directions.to(rows.device).float()
        )
        starts = range(0, len(rows), _ROWS_AT_ONCE)
        blocks = [_stages(rows[start : start + _ROWS_AT_ONCE], bits, group, self._directions) for start in starts]
        self._stages = [_stacked(same) for same in zip(*blocks, strict=True)]
        self._capacity = int(capacity * len(rows))
        self._relative = 0.0 if rows.dtype == torch.float32 else torch.finfo(rows.dtype).eps
        """Room for the rounding of each logit to 16 bits."""
        self._reads = Reads()

    @property
    def bytes(self) -> int:
        """Read in every call, before any row is read again."""
        return self._stages[0].bytes + self._directions.nbytes

    @property
    def rows(self) -> Tensor:
        """[V, E]."""
        return self._rows

    @property
    def directions(self) -> Tensor:
        """float32 [m, E]."""
        return self._directions

    @property
    def stages(self) -> Sequence[Stage]:
        return self._stages

    def reads(self) -> Reads:
        """Bytes, and tokens that the whole head was read for, since the last call of this."""
        reads, self._reads = self._reads, Reads()
        return reads

    def bounds(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Estimates of all logits and how far off they may be, by the first stage: h [T, E] -> [T, V] and [T, V], float32."""
        along, lengths = self._parts(h.float())
        estimate = self._estimate(h.float(), along)
        return estimate, self._radius(self._stages[0].radii, lengths, estimate)

    def top(self, h: Tensor, k: int = 1) -> Top:
        """The `k` largest logits (1 <= k <= V) of each token, exactly: h [T, E]."""
        found = self._search(h, k)
        best, order = found.exact.sort(dim=1, descending=True, stable=True)
        return Top(best[:, :k], found.ids[order[:, :k]], found.rescored, found.fallback, found.bytes)

    def logits(self, h: Tensor, k: int = TOP) -> Tensor:
        """All logits, [T, E] -> [T, V] in h's dtype: those that may be among the token's `k` largest exactly, the others by proxy.

        Each token's are its own: they do not depend on the others in the call.
        """
        found = self._search(h, min(k, len(self._rows)))
        estimate, ids = found.estimate, found.ids
        known = torch.where(found.own, found.exact, estimate.index_select(1, ids))
        return estimate.index_copy_(1, ids, known).to(h.dtype)

    def _search(self, h: Tensor, k: int) -> _Found:
        # h [T, E]; C falls from stage to stage
        first, *refinements = self._stages
        x = h.float()
        along, lengths = self._parts(x)
        estimate = self._estimate(x, along)
        ids, own = _union(_may_win(estimate, self._radius(first.radii, lengths, estimate), k))
        read, alone = self.bytes, torch.full((len(h),), self.bytes, device=h.device)
        for stage in refinements:
            read, alone = read + len(ids) * stage.row_bytes, alone + own.sum(1) * stage.row_bytes
            rough = estimate.index_select(1, ids)
            finer = rough + lowbit.product(_take(stage.proxy, ids), x)
            estimate.index_copy_(1, ids, torch.where(own, finer, rough))
            radius = self._radius(stage.radii.index_select(0, ids), lengths, finer)
            kept, own = _union(own & _may_win(finer.masked_fill_(~own, float("-inf")), radius, k))
            ids = ids.index_select(0, kept)
        fallback = own.sum(1) > (max(self._capacity, 2 * k) if self._capacity else 0)
        fallbacks = int(fallback.sum())
        if fallbacks:
            own = own.new_zeros(estimate.shape).index_copy_(1, ids, own) | fallback[:, None]
            ids = torch.arange(len(self._rows), device=h.device)
        exact = rows_in(self._rows, h, None if fallbacks else ids).float()
        row_bytes, rescored = self._rows[0].nbytes, own.sum(1)
        self._reads.bytes += read + len(ids) * row_bytes
        self._reads.fallbacks += fallbacks
        return _Found(estimate, ids, own, exact, rescored, fallback, alone + rescored * row_bytes)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates along the directions, [T, m], and lengths across them and in all, [T, 2]: x [T, E]."""
        along = x @ self._directions.T
        across = torch.addmm(x, along, self._directions, alpha=-1)
        return along, torch.stack([_lengths(across), _lengths(x)], 1)

    def _estimate(self, x: Tensor, along: Tensor) -> Tensor:  # [T, E], [T, m] -> [T, V]
        first = self._stages[0]
        estimate = lowbit.product(first.proxy, x)
        return estimate if first.correction is None else estimate.add_(lowbit.product(first.correction, along))

    def _radius(self, radii: Tensor, lengths: Tensor, estimate: Tensor) -> Tensor:  # [C, 2], [T, 2], [T, C] -> [T, C]
        radius = F.linear(lengths, radii).masked_fill_(lengths[:, 1:] < _SHORTEST, float("inf"))
        return radius.add_(estimate.abs() + radius, alpha=self._relative) if self._relative else radius


@dataclass(frozen=True, slots=True)
class _Found:
    """What `CertifiedHead._search` knows of T tokens; C rows were read in full."""

    estimate: Tensor
    """[T, V]."""
    ids: Tensor
    """[C] int64, ascending: the union over tokens."""
    own: Tensor
    """[T, C] bool: rows that may be among the token's best."""
    exact: Tensor
    """[T, C] float32."""
    rescored: Tensor
    fallback: Tensor
    bytes: Tensor
    """As in `Top`."""


def directions(second_moment: Tensor, mean: Tensor, count: int) -> Tensor:
    """Orthonormal rows that hidden states lie along: their mean's direction, then the principal ones across it.

    second_moment [E, E] is E[h h^T], not centred; mean [E] -> [count, E] float32. Precondition: 1 <= count <= E and mean is not 0.
    """
    moment, first = second_moment.double(), F.normalize(mean.double(), dim=0)
    across = torch.eye(len(first), dtype=torch.float64, device=first.device) - torch.outer(first, first)
    principal = torch.linalg.eigh(across @ moment @ across).eigenvectors.flip(1)[:, : count - 1]
    basis: Tensor = torch.linalg.qr(torch.cat([first[:, None], principal], 1)).Q
    return basis.T.float().contiguous()


def choose(
    rows: Tensor,
    hidden: Tensor,
    directions: Tensor,
    *,
    k: int = 1,
    bits: Sequence[Sequence[int]] = ((4, 3), (4, 4), (3, 4), (8,)),
    counts: Sequence[int] = (0, 64, 128),
) -> Choice:
    """The bits and the number of leading `directions` [m, E] that read fewest bytes for a token's top `k`, by a sample `hidden` [S, E].

    Makes a `CertifiedHead` for each pair and holds some [S, V] float32, so S is best below a hundred. Counts above m become m.
    """
    tried = []
    for widths in bits:
        for count in sorted({min(count, len(directions)) for count in counts}):
            head = CertifiedHead(rows, bits=widths, directions=directions[:count])
            share = float(head.top(hidden, k).bytes.double().mean()) / rows.nbytes
            tried.append(Choice(tuple(widths), count, share))
    return min(tried, key=lambda choice: choice.share)


def _stages(rows: Tensor, bits: Sequence[int], group: int, directions: Tensor) -> list[Stage]:
    """The stages of a block of rows, [R, E].

    Rounding, with u = 2^-24 and n the terms of a sum, is at most n u times the terms' sizes, in any order (Higham, Accuracy and
    Stability of Numerical Algorithms, section 3.1); sizes are bounded by products of lengths (Cauchy-Schwarz).
    """
    basis, left = directions.double(), rows.double()
    many, columns = basis.shape
    unit = (columns + 64) * 2.0**-24
    off = unit * (math.sqrt(many) + 1)
    """Of the coordinates along the directions, as a share of |h|."""
    rounding = unit * _lengths(left)
    stages = []
    for stage, width in enumerate(bits):
        proxy = lowbit.quantise(left.float(), width, group)
        part = lowbit.dequantise(proxy).double()
        rounding = rounding + unit * _reach(proxy) + lowbit.INPUT_ROUNDING * _lengths(part)
        left = left - part
        correction = None
        if stage == 0 and many:
            correction = lowbit.quantise((left @ basis.T).float(), width, group)
            part = lowbit.dequantise(correction).double()
            left = left - part @ basis
            rounding = rounding + off * (_reach(correction) + _lengths(left))
            rounding = rounding + lowbit.INPUT_ROUNDING * _lengths(part)
        along = left @ basis.T
        across = _lengths(left - along @ basis)
        radii = torch.stack([across, _lengths(along) + rounding], 1)
        stages.append(Stage(proxy, correction, (radii * (1 + 2 * off)).float()))
    return stages


def _reach(q: LowBit) -> Tensor:
    """[rows] float64: length of a row whose every code is the largest. Products add codes before they take the middle level off."""
    return float(2**q.bits - 1) * math.sqrt(q.group) * _lengths(q.scales.double())


def _lengths(x: Tensor) -> Tensor:  # [R, D] -> [R]
    lengths: Tensor = torch.linalg.vector_norm(x, dim=1)
    return lengths


def _may_win(estimate: Tensor, radius: Tensor, k: int) -> Tensor:  # [T, C], [T, C] -> bool [T, C]
    """Which rows' upper bounds reach the k-th largest lower bound. NaN and infinite bounds do: such tokens end in the full product."""
    kth = (estimate - radius).topk(k, dim=1).values[:, -1:]
    return ~(estimate + radius < kth)


def _union(mask: Tensor) -> tuple[Tensor, Tensor]:  # bool [T, N] -> int64 [C], bool [T, C]
    ids, own = select.union(mask)
    return ids, own if own is not None else mask.new_ones((1, len(ids)))


def _take(q: LowBit, ids: Tensor) -> LowBit:  # int64 [C]
    return LowBit(q.codes.index_select(0, ids), q.scales.index_select(0, ids), q.bits, q.group, q.columns)


def _stacked(blocks: Sequence[Stage]) -> Stage:
    """One below the other."""

    def joined(parts: Iterable[LowBit]) -> LowBit:
        found = list(parts)
        one = found[0]
        return LowBit(torch.cat([q.codes for q in found]), torch.cat([q.scales for q in found]), one.bits, one.group, one.columns)

    corrections = [block.correction for block in blocks if block.correction is not None]
    radii = torch.cat([block.radii for block in blocks])
    return Stage(joined(block.proxy for block in blocks), joined(corrections) if corrections else None, radii)
