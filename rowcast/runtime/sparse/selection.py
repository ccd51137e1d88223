"""Selectors: from scores to the rows that are read, and to each token's own set of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rowcast.kernels import select
from rowcast.kernels.lowbit import LowBit
from rowcast.runtime.sparse.scorers import FewBits, Proxy, Scored, Scorer

SHARDS = 8
"""Virtual shards that a top-k is taken in, whatever the number of ranks: what a token's set is does not depend on it."""


@dataclass(frozen=True, slots=True)
class Selection:
    """The rows of T tokens. `own` is what the output depends on; `ids` is only what is read for it."""

    ids: Tensor | None
    """[C] int64, ascending: the union over tokens. None: all rows."""
    own: Tensor | None
    """Each token's candidates among the rows that are read: [T, C], or [T, N]; bool. None: a single token, and `ids` are all its."""
    scored: Scored
    overflow: bool = False
    """The union was larger than its buffer, so that all rows are read."""


class Selector:
    """Chooses neurons of one layer by a scorer's scores.

    Each token takes its `keep` best, shard by shard (HiRE's DA-TOP-k, arXiv 2402.09360, section 3.3), or all above `threshold`. With
    `over` > 1 it takes so many times more first, which are computed exactly and ranked again.
    """

    def __init__(
        self,
        scorer: Scorer,
        neurons: int,
        *,
        keep: int,
        threshold: float | None = None,
        over: float = 1.0,
        capacity: int | None = None,
        common: Tensor | None = None,
        group: int = 1,
    ) -> None:
        """`neurons`: N. `keep`: neurons of each token, 0..N; with a threshold, on average. `common` [N] bool: always chosen, within
        `keep` (HiRE's common path). `group`: so many neighbouring rows are chosen together, by their summed scores.
        `capacity`: rows that the buffer of the union holds (N)."""
        self.scorer = scorer
        self.keep = keep
        self.candidates = min(neurons, round(keep * over))
        self.capacity = neurons if capacity is None else capacity
        self._neurons = neurons
        self._threshold = threshold
        self._common = common
        self._group = group

    @property
    def reranks(self) -> bool:
        """Whether candidates are more than are kept."""
        return self._threshold is None and self.candidates > self.keep

    @property
    def plain(self) -> bool:
        """Whether a token's set is its best scores, shard by shard, and nothing else."""
        return self._threshold is None and self._common is None and self._group == 1

    @property
    def in_one_call(self) -> LowBit | None:
        """The proxy's weights where scores, choice and rows of a single token are one call: `lowbit.gated_ffn`."""
        scorer = self.scorer
        if self.reranks or not self.plain or not isinstance(scorer, Proxy) or scorer.ahead is not None or not scorer.gated:
            return None
        return scorer.pre.weight if isinstance(scorer.pre, FewBits) and scorer.pre.bias is None else None

    def __call__(self, x: Tensor, few: bool) -> Selection:
        """x [T, D], the hidden state that the scorer reads. `few`: read the union only; else all rows are."""
        scored = self.scorer(x)
        values = scored.values
        if few and x.shape[0] == 1 and self.plain:
            return Selection(select.top_union(values, self.candidates, SHARDS)[0], None, scored)
        mask = self._own(values)
        if not few:
            return Selection(None, mask, scored)
        ids, own = select.union(mask)
        if len(ids) > self.capacity:
            return Selection(None, mask, scored, overflow=True)
        return Selection(ids, own, scored)

    def rerank(self, exact: Tensor, ids: Tensor | None) -> Tensor:
        """Exact scores [T, C] of the rows `ids` [C] (None: all), -inf where one is not the token's own -> those kept, [T, C] bool."""
        if ids is None:
            return select.top_mask(exact, self.keep, SHARDS)
        full = exact.new_full((exact.shape[0], self._neurons), float("-inf")).index_copy_(1, ids, exact)
        return select.top_mask(full, self.keep, SHARDS).index_select(1, ids)

    def _own(self, values: Tensor) -> Tensor:
        # [T, N] -> [T, N] bool
        if self._common is not None:
            values = values.masked_fill(self._common, float("inf"))
        if self._threshold is not None:
            return select.above(values, self._threshold)
        if self._group == 1:
            return select.top_mask(values, self.candidates, SHARDS)
        padded = F.pad(values, (0, -self._neurons % self._group)).view(len(values), -1, self._group).sum(-1)
        groups = select.top_mask(padded, -(-self.candidates // self._group), SHARDS)
        return torch.repeat_interleave(groups, self._group, 1)[:, : self._neurons]
