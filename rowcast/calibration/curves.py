"""What choosing costs: the output that the oracle loses by density, and how much of the oracle's set a scorer finds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rowcast.calibration.mlp import Mlp, kept

BLOCK_ELEMENTS = 1 << 22
"""Most scores that are looked at together."""


@dataclass(frozen=True, slots=True)
class Found:
    """How well a scorer finds the best neurons of T tokens, by density [G]. Sets are of the whole layer, not shard by shard."""

    recall: list[float]
    """Mean over tokens of the share of the oracle's set that is in the scorer's."""
    recall_p1: list[float]
    """1st percentile."""
    over: list[float]
    """Candidates over neurons kept with which all but 1% of the tokens reach the recall that was asked for."""


def frequencies(mlp: Mlp, h: Tensor) -> tuple[Tensor, Tensor]:
    """Share of tokens h [T, D] that have each neuron among their best half (ReLU: active), and its mean contribution; [N] each."""
    often, mass = torch.zeros_like(mlp.norms), torch.zeros_like(mlp.norms)
    for rows in blocks(len(h), mlp.neurons):
        scores = mlp.scores(h[rows])
        often += (scores > (0 if mlp.signed else scores.median(1, keepdim=True).values)).sum(0)
        mass += scores.clamp_min(0).sum(0)
    return often / len(h), mass / len(h)


def lost_curve(mlp: Mlp, h: Tensor, grid: Sequence[float]) -> list[float]:
    """Mean over tokens h [T, D] of the share of |output|^2 that is lost where each keeps its best neurons, by density."""
    lost = torch.zeros(len(grid), dtype=torch.float64)
    for rows in blocks(len(h), mlp.neurons):
        hidden, order = mlp.hidden(mlp.pre(h[rows])), mlp.scores(h[rows]).argsort(1, descending=True)
        for i, density in enumerate(grid):
            lost[i] += lost_output(mlp, hidden, order[:, kept(mlp.neurons, density) :]).double().sum().cpu()
    return [float(value) for value in lost / len(h)]


def thresholds(scores: Tensor, grid: Sequence[float]) -> Tensor:
    """The scores that are exceeded by each density of the grid on average over tokens: [T, N] -> [G]; the least one for density 1."""
    ordered = scores.flatten().sort(descending=True).values
    places = [min(len(ordered) - 1, round(density * len(ordered))) for density in grid]
    return ordered[places]


def lost_output(mlp: Mlp, hidden: Tensor, dropped: Tensor) -> Tensor:
    """Share of |output|^2 that tokens lose without the neurons `dropped` [T, n]; activations [T, N] -> [T]."""
    rest = torch.zeros_like(hidden).scatter_(1, dropped, hidden.gather(1, dropped))
    whole = (hidden @ mlp.down).square().sum(1).clamp_min(torch.finfo(torch.float32).tiny)
    return (rest @ mlp.down).square().sum(1) / whole


def found(
    scorers: dict[str, Callable[[Rows], Tensor]], mlp: Mlp, rows: Rows, grid: Sequence[float], recall: float
) -> dict[str, Found]:
    """Each scorer against the oracle, on the same tokens. A scorer gives scores [T, N] for T tokens."""
    recalls: dict[str, list[Tensor]] = {name: [] for name in scorers}
    needed: dict[str, list[Tensor]] = {name: [] for name in scorers}
    for block in blocks(len(rows.mlp), mlp.neurons):
        part = rows[block]
        ranks = mlp.scores(part.mlp).argsort(1, descending=True).argsort(1)
        for name, scorer in scorers.items():
            of_best = ranks.gather(1, scorer(part).argsort(1, descending=True))
            pairs = [_found_at(of_best, kept(mlp.neurons, density), recall) for density in grid]
            recalls[name].append(torch.stack([share for share, _ in pairs]))
            needed[name].append(torch.stack([count for _, count in pairs]))
    return {name: _found(torch.cat(recalls[name], 1), torch.cat(needed[name], 1)) for name in scorers}


@dataclass(frozen=True, slots=True)
class Rows:
    """Hidden states of T tokens in one layer."""

    attention: Tensor
    """[T, D]: the attention's input."""
    mlp: Tensor
    """[T, D]: the MLP's input."""
    heads: Tensor
    """[T, H]: the length of what each head adds to the residual stream."""

    def __getitem__(self, rows: slice) -> Rows:
        return Rows(self.attention[rows], self.mlp[rows], self.heads[rows])


def blocks(tokens: int, neurons: int) -> Iterator[slice]:
    """So many tokens that scores of all neurons fit."""
    size = max(1, BLOCK_ELEMENTS // neurons)
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


def _found_at(ranks: Tensor, keep: int, recall: float) -> tuple[Tensor, Tensor]:
    # ranks [T, N] by the oracle, in the scorer's order -> recall [T], candidates over kept [T]
    hits = ranks < keep
    share = hits[:, :keep].float().mean(1)
    enough = hits.cumsum(1, dtype=torch.int32) >= math.ceil(recall * keep)
    return share, (enough.int().argmax(1) + 1).clamp_min(keep) / keep


def _found(recalls: Tensor, needed: Tensor) -> Found:
    # [G, T] each
    return Found(
        recalls.mean(1).tolist(),
        recalls.quantile(0.01, dim=1).tolist(),
        needed.quantile(0.99, dim=1, interpolation="higher").tolist(),
    )
