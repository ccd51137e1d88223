"""How far a sparse model is from the dense one: in its laws of the next token, and in what it chose. Sums that grow by passes."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True)
class Laws:
    """Of a model's laws q of the next token beside the dense model's p, over real text."""

    tokens: int = 0
    nll: float = 0.0
    divergence: float = 0.0
    overlap: float = 0.0
    agreed: int = 0

    def add(self, log_p: Tensor, log_q: Tensor, targets: Tensor) -> None:
        """log_p, log_q [T, V] float32; targets [T]: the tokens that came."""
        p, q = log_p.exp(), log_q.exp()
        self.tokens += len(targets)
        self.nll -= float(log_q.gather(1, targets[:, None]).double().sum())
        self.divergence += float((log_p - log_q).mul_(p).sum(-1).double().sum())
        self.overlap += float(torch.minimum(p, q, out=q).sum(-1).double().sum())
        self.agreed += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll / self.tokens)

    @property
    def kl(self) -> float:
        """KL(p || q) in nats."""
        return self.divergence / self.tokens

    @property
    def acceptance(self) -> float:
        """sum(min(p, q)) = 1 - total variation: a draft's acceptance at temperature 1 under rejection sampling (arXiv 2211.17192)."""
        return self.overlap / self.tokens

    @property
    def greedy(self) -> float:
        """Share of the tokens after which both find the same one most likely."""
        return self.agreed / self.tokens


@dataclass(frozen=True, slots=True)
class Choice:
    """Of chosen sets of neurons or heads, over tokens (and layers)."""

    recall: float
    """Share of the exact best, with a threshold of as many as are in the set, that is in it: the mean, ..."""
    recall_p1: float
    """... its first percentile, ..."""
    recall_min: float
    """... and the worst."""
    mass: float
    """Share of the sum of all contributions that the set holds: of |activation| * |column of the down projection|, or of the lengths of
    what heads add."""
    density: float
    """Share of all that the set is."""

    def to_json(self) -> dict[str, float]:
        return asdict(self)


@dataclass(slots=True)
class _Seen:
    """Of one layer; [T] float32 for each pass."""

    recall: list[Tensor] = field(default_factory=list)
    mass: list[Tensor] = field(default_factory=list)
    density: list[Tensor] = field(default_factory=list)

    def __iadd__(self, other: _Seen) -> _Seen:
        self.recall += other.recall
        self.mass += other.mass
        self.density += other.density
        return self

    def choice(self) -> Choice:
        recall = torch.cat(self.recall)
        first = recall.kthvalue(max(1, math.ceil(len(recall) / 100))).values
        mass, density = torch.cat(self.mass), torch.cat(self.density)
        return Choice(float(recall.mean()), float(first), float(recall.min()), float(mass.mean()), float(density.mean()))


class Sets:
    """The sets of neurons, or of heads, that the tokens of a model used, by layer."""

    def __init__(self) -> None:
        self._layers: dict[int, _Seen] = {}

    def add(self, layer: int, own: Tensor, best: Tensor, score: Tensor) -> None:
        """own [T, N] bool: what each token used; best [T, N] bool: the exact best; score [T, N]: the
        exact contributions that it is best by."""
        seen = self._layers.setdefault(layer, _Seen())
        seen.recall.append(recall(own, best))
        seen.mass.append(((score * own).sum(-1) / score.sum(-1).clamp_min(torch.finfo(score.dtype).tiny)).cpu())
        seen.density.append(own.float().mean(-1).cpu())

    def overall(self) -> Choice:
        """Over all layers that choose. Precondition: there is one."""
        together = _Seen()
        for seen in self._layers.values():
            together += seen
        return together.choice()

    def layers(self) -> list[int]:
        """Those that choose."""
        return sorted(self._layers)

    def by_layer(self) -> list[dict[str, Any]]:
        return [{"layer": layer, **self._layers[layer].choice().to_json()} for layer in self.layers()]


def recall(own: Tensor, best: Tensor) -> Tensor:
    """Share of each token's best that is in its own set: bool [T, N] both -> [T] float32, 1 where there is no best."""
    wanted = best.sum(-1)
    return torch.where(wanted > 0, (own & best).sum(-1) / wanted.clamp_min(1), 1.0).float().cpu()
