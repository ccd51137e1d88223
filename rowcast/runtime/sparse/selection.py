"""Selectors: from scores to the rows that are read, and to each token's own set of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rowcast.kernels import select
from rowcast.kernels.lowbit import LowBit
from rowcast.runtime.shard import Shard
from rowcast.runtime.sparse.scorers import FewBits, LowRank, Proxy, Scored, Scorer

SHARDS = 8
"""Virtual shards of a layer that a top-k is taken in. Ranks hold whole ones where their number divides it: then what a token's set is
does not depend on it. Other numbers of ranks have as many shards as come nearest below."""
_GOOD_SHARD = 2048
"""Neurons of a shard at most, where it takes more shards: a GPU's selection takes longer with every thousand of the largest."""
_MOST_OF_SHARD = 1 << 14
"""Neurons that `kernels.gpu.select` takes in one shard."""


def shards_for(neurons: int) -> int:
    """Virtual shards of a layer: a multiple of `SHARDS`."""
    return SHARDS * max(1, -(-neurons // (SHARDS * _GOOD_SHARD)))


@dataclass(frozen=True, slots=True)
class Selection:
    """The rows of T tokens. `own` is what the output depends on; `ids` is only what is read for it."""

    ids: Tensor | None
    """[C] int64, ascending: the union over tokens. None: all rows."""
    own: Tensor | None
    """Each token's candidates among the rows that are read: [T, C], or [T, N]; bool. None: a single token, and `ids` are all its."""
    scored: Scored


@dataclass(frozen=True, slots=True)
class Places:
    """How many of its items each of one rank's shards keeps."""

    sizes: list[int]
    """Items of each shard, which are neighbours."""
    kept: list[int]
    total: int
    even: bool
    """Whether `select.top_mask` deals them out alike, in one call."""

    @classmethod
    def of(cls, sizes: list[int], kept: list[int]) -> Places:
        spans = select.shard_spans(sum(sizes), sum(kept), len(sizes))
        even = [(span.stop - span.start, count) for span, count in spans] == list(zip(sizes, kept, strict=True))
        return cls(sizes, kept, sum(kept), even)

    def top(self, values: Tensor) -> Tensor:
        """Scores [T, N] -> the best of each shard, [T, N] bool; of equal scores the lower index wins."""
        if self.even:
            return select.top_mask(values, self.total, len(self.sizes))
        parts = zip(values.split_with_sizes(self.sizes, 1), self.kept, strict=True)
        return torch.cat([select.top_mask(part, count, 1) for part, count in parts], 1)


@dataclass(frozen=True, slots=True)
class _Layer:
    """The shards of a layer, as sizes or counts, and those that are a rank's."""

    sizes: list[int]
    ours: slice

    @classmethod
    def of(cls, neurons: int, shard: Shard) -> _Layer:
        each = max(1, shards_for(neurons) // shard.world)
        count = each * shard.world
        bounds = [neurons * s // count for s in range(count + 1)]
        return cls(_differences(bounds), slice(shard.rank * each, (shard.rank + 1) * each))

    def deal(self, keep: int) -> list[int]:
        """`keep` of the layer's items, to each shard in proportion to its size."""
        bounds, total = [0], 0
        for size in self.sizes:
            total += size
            bounds.append(total)
        return _differences([bound * keep // max(total, 1) for bound in bounds])

    def places(self, kept: Sequence[int]) -> Places:
        return Places.of(self.sizes[self.ours], list(kept[self.ours]))


def _differences(bounds: list[int]) -> list[int]:
    return [after - before for before, after in pairwise(bounds)]


class _Cut(Protocol):
    """Makes each token's set."""

    @property
    def keep(self) -> int:
        """Neurons of this rank that a token keeps; with a threshold, on average."""
        ...

    @property
    def taken(self) -> int:
        """Candidates of this rank that a token has."""
        ...

    def candidates(self, values: Tensor) -> Tensor:
        """Scores [T, N] -> [T, N] bool."""
        ...


class Selector:
    """Chooses neurons of one layer by a scorer's scores.

    Each token takes its `keep` best, shard by shard (HiRE's DA-TOP-k, arXiv 2402.09360, section 3.3), or all above `threshold`. With
    `over` > 1 it takes so many times more first, in no shard fewer than are kept of it, which are computed exactly and ranked again.
    """

    def __init__(
        self,
        scorer: Scorer,
        neurons: int,
        *,
        keep: int,
        threshold: float | None = None,
        over: float = 1.0,
        common: int = 0,
        frequency: Tensor | None = None,
        group: int = 1,
        shard: Shard | None = None,
        device: torch.device | None = None,
        norms: Tensor | None = None,
    ) -> None:
        """`neurons`, `keep` (0..N), `common` and `group` are of the whole layer, `shard` says which part of it is this rank's.

        `keep`: neurons of each token; with a threshold, on average. `common`: so many of them are always the shards' most frequent
        ones by `frequency`, of this rank's neurons (HiRE's common path). `group`: so many neighbours within a shard are chosen
        together, by their mean score, and `keep` is rounded to whole groups. `device`: of the scores. `norms`: what columns count for
        where candidates are ranked again; None: their lengths.
        Precondition: a threshold, `group` > 1, and `over` > 1 or `common` exclude each other.
        """
        assert 0 <= common <= keep <= neurons, f"{common} common, {keep} kept of {neurons}"
        assert (threshold is not None) + (group > 1) + (over > 1 or common > 0) <= 1
        self.scorer, self.norms = scorer, norms
        layer = _Layer.of(neurons, shard or Shard())
        candidates = min(neurons, round(keep * over))
        self.shards, self._neurons = len(layer.sizes[layer.ours]), sum(layer.sizes[layer.ours])
        """Of this rank."""
        self._threshold = threshold
        self._cut: _Cut
        if threshold is not None:
            self._cut = _Threshold(threshold, sum(layer.deal(keep)[layer.ours]))
        elif group > 1:
            self._cut = _Groups.of(layer, keep, group, device)
        elif common:
            assert frequency is not None and len(frequency) == self._neurons
            self._cut = _Common.of(layer, keep, candidates, common, frequency)
        else:
            self._cut = _Top.of(layer, keep, candidates)
        self.keep, self.candidates = self._cut.keep, self._cut.taken
        one_call = isinstance(self._cut, _Top) and self._cut.first.even
        self._one_union = self.candidates if one_call else None
        """Where a single token's choice is one call, its size."""

    @property
    def reranks(self) -> bool:
        """Whether candidates are more than are kept."""
        return self.candidates > self.keep

    @property
    def in_one_call(self) -> LowBit | None:
        """The proxy's weights where scores, choice and rows of a single token are one call, `lowbit.gated_ffn`, in `shards`."""
        scorer = self.scorer
        if self.reranks or self._one_union is None:
            return None
        if not isinstance(scorer, Proxy) or scorer.ahead is not None or not scorer.gated:
            return None
        return scorer.pre.weight if isinstance(scorer.pre, FewBits) and scorer.pre.bias is None else None

    @property
    def threshold(self) -> float | None:
        """That scores have to exceed; None for other cuts."""
        return self._threshold

    @property
    def top(self) -> tuple[Places, Places] | None:
        """What is kept of each shard, and what is taken of it first, where these are its best scores; None for other cuts."""
        return (self._cut.places, self._cut.first) if isinstance(self._cut, _Top) else None

    @property
    def on_device(self) -> bool:
        """Whether a GPU can choose without the host (`on_device`): the cuts above, by a proxy."""
        if not isinstance(self.scorer, Proxy) or not isinstance(self.scorer.pre, (FewBits, LowRank)):
            return False
        return self._threshold is not None or (
            self.top is not None and self.keep > 0 and max(self.top[0].sizes) <= _MOST_OF_SHARD
        )

    def __call__(self, x: Tensor, few: bool) -> Selection:
        """x [T, D], the hidden state that the scorer reads. `few`: read the union only; else all rows are."""
        scored = self.scorer(x)
        if few and x.shape[0] == 1 and self._one_union is not None:
            return Selection(select.top_union(scored.values, self._one_union, self.shards)[0], None, scored)
        mask = self._cut.candidates(scored.values)
        if not few:
            return Selection(None, mask, scored)
        return Selection(*select.union(mask), scored)

    def rerank(self, exact: Tensor, ids: Tensor | None) -> Tensor:
        """Exact scores [T, C] of the rows `ids` [C] (None: all), -inf where one is not the token's own -> those kept, [T, C] bool."""
        assert isinstance(self._cut, (_Top, _Common))
        if ids is None:
            return self._cut.kept(exact)
        full = exact.new_full((exact.shape[0], self._neurons), float("-inf")).index_copy_(1, ids, exact)
        return self._cut.kept(full).index_select(1, ids)


@dataclass(frozen=True, slots=True)
class _Top:
    """The best scores of each shard."""

    places: Places
    first: Places

    @classmethod
    def of(cls, layer: _Layer, keep: int, candidates: int) -> _Top:
        kept = layer.deal(keep)
        return cls(layer.places(kept), layer.places(list(map(max, kept, layer.deal(candidates)))))

    @property
    def keep(self) -> int:
        return self.places.total

    @property
    def taken(self) -> int:
        return self.first.total

    def candidates(self, values: Tensor) -> Tensor:
        return self.first.top(values)

    def kept(self, values: Tensor) -> Tensor:
        return self.places.top(values)


@dataclass(frozen=True, slots=True)
class _Threshold:
    """All above a threshold."""

    least: float
    keep: int

    @property
    def taken(self) -> int:
        return self.keep

    def candidates(self, values: Tensor) -> Tensor:
        return select.above(values, self.least)


@dataclass(frozen=True, slots=True)
class _Common:
    """Some neurons always, and the best of the others of each shard."""

    always: Tensor
    """[N] bool."""
    others: Tensor
    """[N - common] int64, ascending."""
    best: _Top
    """Of the others."""

    @classmethod
    def of(cls, layer: _Layer, keep: int, candidates: int, common: int, frequency: Tensor) -> _Common:
        taken = layer.deal(common)
        always = layer.places(taken).top(frequency.float()[None])[0]
        left = [size - count for size, count in zip(layer.sizes, taken, strict=True)]
        rest = _Layer(left, layer.ours)
        return cls(always, (~always).nonzero()[:, 0], _Top.of(rest, keep - common, candidates - common))

    @property
    def keep(self) -> int:
        return len(self.always) - len(self.others) + self.best.keep

    @property
    def taken(self) -> int:
        return len(self.always) - len(self.others) + self.best.taken

    def candidates(self, values: Tensor) -> Tensor:
        return self._beside(self.best.candidates(values[:, self.others]))

    def kept(self, values: Tensor) -> Tensor:
        return self._beside(self.best.kept(values[:, self.others]))

    def _beside(self, chosen: Tensor) -> Tensor:
        return self.always.expand(len(chosen), -1).index_copy(1, self.others, chosen)


@dataclass(frozen=True, slots=True)
class _Groups:
    """The groups of neighbours with the best mean scores of each shard, whose last group may be smaller."""

    members: Tensor
    """[G, g] int64: neurons of each group; N where it has fewer."""
    group_of: Tensor
    """[N] int64."""
    counts: Tensor
    """[G] float32."""
    places: Places

    @classmethod
    def of(cls, layer: _Layer, keep: int, group: int, device: torch.device | None) -> _Groups:
        inside = sum(layer.sizes)
        groups = _Layer([-(-size // group) for size in layer.sizes], layer.ours)
        total = sum(groups.sizes)
        places = groups.places(groups.deal(total if keep == inside else max(1, min(total, round(keep / group)))))
        of, start = [], 0
        for size, count in zip(layer.sizes[layer.ours], places.sizes, strict=True):
            of.append(start + torch.arange(size) // group)
            start += count
        group_of = torch.cat(of)
        counts = torch.bincount(group_of, minlength=start)
        first = counts.cumsum(0) - counts
        members = first[:, None] + torch.arange(group)
        members[torch.arange(group) >= counts[:, None]] = len(group_of)
        return cls(members.to(device), group_of.to(device), counts.float().to(device), places)

    @property
    def keep(self) -> int:
        """But for smaller groups."""
        return min(len(self.group_of), self.places.total * self.members.shape[1])

    @property
    def taken(self) -> int:
        return self.keep

    def candidates(self, values: Tensor) -> Tensor:
        means = F.pad(values, (0, 1))[:, self.members].sum(-1) / self.counts
        return self.places.top(means)[:, self.group_of]
