"""Logits that stay with the ranks that computed them: drawing from them exchanges a few numbers a token, never logits.

DA-TOP-k (HiRE, arXiv 2402.09360, section 4) made exact. A Gumbel-max draw needs each rank's best (value, id). Where top_k is asked for,
the k-th best value of all ranks has to be known first: every rank tells its k' best, k' from the hypergeometric law of where the k best
lie; that is enough unless some rank's k'-th is above the k-th of what was told, which is checked, counted and made good by telling k.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

from rowcast.runtime.protocols import Comm

MISS = 1e-3
"""Chance that k' is too few, if the best were dealt to the ranks at random."""


@dataclass(slots=True)
class Exchanged:
    """What crossed between ranks to draw tokens, over all of them."""

    tokens: int = 0
    bytes: int = 0
    fallbacks: int = 0
    """Draws whose k' were too few."""


@dataclass(frozen=True, slots=True)
class ShardedLogits:
    """Rows of logits of which this rank has the columns of its vocabulary rows. Slicing takes rows."""

    local: Tensor
    """[T, V_local], the same width on every rank; -inf behind the vocabulary's end."""
    comm: Comm
    vocab_size: int

    @property
    def first(self) -> int:
        """Token id of the first column."""
        return self.comm.rank * self.local.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the whole."""
        return len(self.local), self.vocab_size

    def __len__(self) -> int:
        return len(self.local)

    def __getitem__(self, rows: slice) -> ShardedLogits:
        return ShardedLogits(self.local[rows], self.comm, self.vocab_size)

    def whole(self) -> Tensor:
        """[T, V] on every rank: what penalties, top_p and log-probabilities take."""
        return self.comm.exchange(self.local).transpose(0, 1).flatten(1)[:, : self.vocab_size]


Logits: TypeAlias = Tensor | ShardedLogits
"""[T, V]."""


def whole(logits: Logits) -> Tensor:
    """[T, V], gathered where ranks have parts of it."""
    return logits.whole() if isinstance(logits, ShardedLogits) else logits


def best(values: Tensor, first: int, comm: Comm, counts: Exchanged) -> tuple[Tensor, Tensor]:
    """The largest value of each row over all ranks, and its token id: values [T, V_local] of any float -> [T] float64, [T] int64.

    The lowest id wins a tie; a NaN wins over all. Exchanges 16 bytes a rank and row: ids stay exact in float64.
    """
    ids = values.argmax(-1)
    pair = torch.stack([values.gather(-1, ids[:, None])[:, 0].double(), (ids + first).double()], -1)  # [T, 2]
    told = comm.exchange(pair)  # [W, T, 2]
    _count(counts, told)
    winner = told[..., 0].argmax(0, keepdim=True)  # the lowest rank of equals, so the lowest id
    chosen = told.gather(0, winner[..., None].expand(-1, -1, 2))[0]
    return chosen[:, 0], chosen[:, 1].long()


def largest(values: Tensor, comm: Comm, counts: Exchanged) -> Tensor:
    """The largest value of each row over all ranks: [T, V_local] float32 -> [T, 1]. Exchanges 4 bytes a rank and row."""
    told = comm.exchange(values.amax(-1, keepdim=True))
    _count(counts, told, tokens=0)
    return told.amax(0)


def kth_largest(values: Tensor, k: Tensor, most: int, comm: Comm, vocab_size: int, counts: Exchanged) -> Tensor:
    """The k-th largest value of each row over all ranks: values [T, V_local] float32, k [T, 1] int64 in 1..most -> [T, 1].

    `most`: known to the host; it bounds the work. Waits for the device: whether a second round is needed is a question.
    """
    kept = min(kept_each(vocab_size, min(most, vocab_size), comm.world), values.shape[1])
    found, sure = _kth(values, k, kept, comm, counts)
    if kept < min(most, values.shape[1]) and not bool(sure.all()):
        counts.fallbacks += int((~sure).sum())
        found, _ = _kth(values, k, min(most, values.shape[1]), comm, counts)
    return found


@lru_cache(maxsize=64)
def kept_each(total: int, wanted: int, shards: int, miss: float = MISS) -> int:
    """How many each of so many equal shards keeps so that, with the `wanted` best of `total` dealt at random, the chance that any shard
    has more of them is below `miss`: shards P(X > k') < miss, X hypergeometric. At most `wanted`."""
    from scipy.stats import hypergeom

    if shards == 1:
        return wanted
    law = hypergeom(total, wanted, -(-total // shards))
    low, high = 0, wanted
    while low < high:
        middle = (low + high) // 2
        if shards * law.sf(middle) < miss:
            high = middle
        else:
            low = middle + 1
    return max(1, low)


def _kth(values: Tensor, k: Tensor, kept: int, comm: Comm, counts: Exchanged) -> tuple[Tensor, Tensor]:
    """The k-th largest of what every rank tells, and whether nobody can have kept a larger one back: [T, 1], [T, 1]."""
    told = comm.exchange(values.topk(kept, -1).values)  # [W, T, kept], descending
    _count(counts, told, tokens=0)
    pooled = told.transpose(0, 1).flatten(1).sort(-1, descending=True).values
    found = pooled.gather(-1, k - 1)
    return found, told[..., -1].amax(0)[:, None] <= found


def _count(counts: Exchanged, told: Tensor, tokens: int | None = None) -> None:
    counts.tokens += told.shape[1] if tokens is None else tokens
    counts.bytes += told.numel() * told.element_size()
