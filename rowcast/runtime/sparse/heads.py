"""Head selectors: which query heads of a layer each token uses, before attention by a predictor or after it by what they gave.

A token keeps its `keep` best heads of the whole model's layer, in virtual shards as neurons are, whatever the number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rowcast.kernels import select
from rowcast.runtime.ladder.spec import HeadReads
from rowcast.runtime.shard import Shard
from rowcast.runtime.sparse.artefact import Calibration
from rowcast.runtime.sparse.selection import SHARDS
from rowcast.runtime.spec import ModelSpec

LEAST = 8
"""Heads of a shard: among fewer there is little to choose."""


def top_heads(scores: Tensor, keep: int) -> Tensor:  # [T, H] -> bool [T, H]
    """Each token's best `keep` heads, in up to `SHARDS` equal shards of at least `LEAST` heads."""
    return select.top_mask(scores, keep, head_shards(scores.shape[1]))


def head_shards(heads: int) -> int:
    """Of how many shards each layer's best are chosen."""
    return max(s for s in range(1, gcd(heads, SHARDS) + 1) if heads % s == SHARDS % s == 0 and (s == 1 or heads >= s * LEAST))


def contributions(outputs: Tensor, o: Tensor) -> Tensor:  # [T, H, d], [H d, D] -> [T, H] float32
    """Length of what each head adds to the sub-layer's output, |W_o,h y_h|."""
    parts = zip(outputs.unbind(1), o.view(*outputs.shape[1:], -1), strict=True)
    return torch.stack([torch.linalg.vector_norm(y @ w, dim=-1, dtype=torch.float32) for y, w in parts], 1)


@dataclass(frozen=True, slots=True)
class HeadChoice:
    """The heads of T tokens on one rank. `own` is what the output depends on; `ids` is only what is read for it."""

    ids: Tensor | None
    """[C] int64, ascending: the union over tokens. None: all heads."""
    own: Tensor | None
    """Each token's heads among those that are read, [T, C] bool. None: a single token, and `ids` are all its."""


class HeadSelector:
    """Chooses heads by a linear map of the hidden state (Deja Vu, arXiv 2310.17157, section 4.2), before they are computed."""

    def __init__(self, weight: Tensor, bias: Tensor, *, keep: int, reads: HeadReads = "own", local: slice = slice(None)) -> None:
        """weight [H, D], bias [H] of the whole layer. `keep`: heads of each token, 1..H. `local`: this rank's heads."""
        assert 1 <= keep <= len(weight), f"{keep} heads of {len(weight)}"
        self.reads = reads
        self.weight, self.bias = weight.float(), bias.float()
        self.keep = keep
        self._local = local

    @classmethod
    def calibrated(
        cls, found: Calibration, layer: int, *, keep: int, reads: HeadReads, spec: ModelSpec, shard: Shard, device: torch.device
    ) -> HeadSelector:
        """A calibration's selector; layer 0, which has none before it, reads its own input. Raises UserError where it has none."""
        reads = reads if layer else "own"
        shapes = {"weight": (spec.num_heads, spec.hidden_size), "bias": (spec.num_heads,)}
        weight, bias = (found.tensor(f"layers.{layer}.heads.{reads}.{part}", shape).to(device) for part, shape in shapes.items())
        return cls(weight, bias, keep=keep, reads=reads, local=shard.query_heads(spec))

    @property
    def on_device(self) -> bool:
        """Whether a GPU can choose without the host (`on_device_heads`)."""
        return self.dealt() is not None

    def dealt(self) -> list[tuple[int, int]] | None:
        """This rank's virtual shards: heads of each, and how many of them it keeps; None unless every rank holds whole ones, and keeps
        some. The same on all ranks."""
        heads = len(self.weight)
        ours, shards = range(heads)[self._local], head_shards(heads)
        each, others = divmod(shards * len(ours), heads)
        if others:
            return None
        spans = [(span.stop - span.start, kept) for span, kept in select.shard_spans(heads, self.keep, shards)]
        ranks = [spans[first : first + each] for first in range(0, shards, each)]
        return ranks[ours.start // len(ours)] if all(any(kept for _, kept in rank) for rank in ranks) else None

    @property
    def own(self) -> tuple[Tensor, Tensor]:
        """weight [H_local, D] and bias [H_local] of this rank's heads."""
        return self.weight[self._local], self.bias[self._local]

    @property
    def bytes(self) -> int:
        """Read in one call."""
        return self.weight.nbytes + self.bias.nbytes

    def __call__(self, x: Tensor, few: bool) -> HeadChoice:
        """x [T, D], the hidden state that `reads` names. `few`: read the union only; else all heads are."""
        mask = top_heads(F.linear(x.float(), self.weight, self.bias), self.keep)[:, self._local]
        if not few:
            return HeadChoice(None, mask)
        ids, own = select.union(mask)
        return HeadChoice(ids, own) if len(ids) else HeadChoice(None, mask)


class HeadOracle:
    """Chooses heads by what they gave: the bound of what choosing can do, for evaluation on one rank. It computes all heads."""

    def __init__(self, keep: int, by: Literal["contribution", "output"] = "contribution") -> None:
        """`keep`: heads of each token. `by`: the length of what a head adds to the sub-layer's output, |W_o,h y_h|, or of its own
        output, |y_h|, which is Deja Vu's label."""
        self._keep = keep
        self._by = by

    def __call__(self, outputs: Tensor, o: Tensor) -> Tensor:
        """outputs [T, H, d] of attention, o [H d, D], a head's d rows of the output product -> each token's heads, [T, H] bool."""
        lengths = self._by == "output"
        scores = torch.linalg.vector_norm(outputs, dim=-1, dtype=torch.float32) if lengths else contributions(outputs, o)
        return top_heads(scores, self._keep)
