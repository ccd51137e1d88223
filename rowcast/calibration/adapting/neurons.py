"""A Transformers module whose tokens use a part of their neurons while it is trained, chosen as the engine's oracle chooses.

Between activation and down projection each token keeps its best neurons by size of contribution, shard by shard; gradients reach those
alone. It is a mask over a dense product: what is saved is saved by the engine, not here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rowcast.errors import UserError
from rowcast.kernels.select import shard_spans
from rowcast.runtime.banks import neuron_order
from rowcast.runtime.shard import Shard
from rowcast.runtime.sparse.selection import shards_for
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.weight_map import names_for

log = logging.getLogger(__name__)

Cut = Literal["top", "threshold"]
"""top: as many neurons for every token of a density. threshold: those whose contribution is above the token's mean plus so many
standard deviations (statistical top-k; Spark Transformer, arXiv 2506.06644), as many on average."""

_SAMPLE = 1 << 18
"""Scores that a threshold is found on."""
_MANTISSA = 12


@dataclass(frozen=True, slots=True)
class Mlp:
    """One layer's products in the module."""

    inner: tuple[nn.Linear, ...]
    """[N, D] each: gate and up, or up alone."""
    down: nn.Linear
    """[D, N]."""

    @property
    def neurons(self) -> int:
        return self.down.in_features


def mlps_of(module: Any, spec: ModelSpec) -> list[Mlp]:
    """Of a causal language model as Transformers builds it from the same config. Raises UserError where it keeps them elsewhere."""
    names = names_for(spec)
    stems = [stem for stem in (names.gate, names.up) if stem]

    def linear(stem: str) -> nn.Linear:
        found = module.get_submodule(names.prefixes[0] + stem)
        if not isinstance(found, nn.Linear):
            raise UserError(f"{stem} of this {spec.family} is a {type(found).__name__}, not a linear layer: use another model")
        return found

    return [
        Mlp(tuple(linear(stem.format(layer)) for stem in stems), linear(names.down.format(layer)))
        for layer in range(spec.num_layers)
    ]


class Neurons:
    """Masks on the MLPs of `module`, whose neurons stand in the engine's order once they are permuted, shard by shard."""

    def __init__(self, module: Any, spec: ModelSpec, cut: Cut = "top") -> None:
        self.module, self.spec, self.cut = module, spec, cut
        self.mlps = mlps_of(module, spec)
        self.counts = False
        """Count what passes use."""
        self.used, self.passes = 0.0, 0
        """Share of neurons that are not 0 behind the mask, summed over layers and passes that were counted."""
        self.at_once = self.mlps[0].down.weight.is_cuda
        """Whether one function finds the best of all densities, compiled; otherwise one selection a density, to the bit."""
        self._densities: tuple[float, ...] = ()
        self._keeps: Tensor | None = None
        self._tables: dict[tuple[float, ...], Tensor] = {}
        self._handles: list[Any] = []

    @property
    def densities(self) -> Sequence[float]:
        """Of the sequences of the next pass, equal ones side by side; empty: all neurons."""
        return self._densities

    @densities.setter
    def densities(self, densities: Sequence[float]) -> None:
        self._densities = tuple(densities)
        self._keeps = None
        neurons = self.mlps[0].neurons
        if self.at_once and self.cut == "top" and self._sparse and neurons % shards_for(neurons) == 0:
            if self._densities not in self._tables:
                rows = [[keep for _, keep in _spans(neurons, density)] for density in self._densities]
                table = torch.tensor(rows, dtype=torch.int32)[:, None, :, None]
                self._tables[self._densities] = table.to(self.mlps[0].down.weight.device)
            self._keeps = self._tables[self._densities]  # [S, 1, K, 1]

    @property
    def _sparse(self) -> bool:
        return any(density < 1 for density in self._densities)

    def hook(self) -> None:
        def keep(down: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:  # one function, so that layers compile once
            return self._keep(down, inputs[0])

        self._handles += [mlp.down.register_forward_pre_hook(keep) for mlp in self.mlps]

    def unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def permute(self, *, back: bool = False) -> None:
        """Put neurons into the engine's order, in place, or `back`; no output changes by it."""
        for layer, mlp in enumerate(self.mlps):
            order = neuron_order(self.spec, Shard(), layer, seed=0).to(mlp.down.weight.device)
            order = order.argsort() if back else order
            for linear in mlp.inner:
                linear.weight.copy_(linear.weight[order])
                if linear.bias is not None:
                    linear.bias.copy_(linear.bias[order])
            mlp.down.weight.copy_(mlp.down.weight[:, order])

    def _keep(self, down: nn.Module, hidden: Tensor) -> Tensor:
        # hidden [..., N], the sequences' tokens one after the other; OPT's is [B S, N]
        assert isinstance(down, nn.Linear)
        if self._sparse:
            mask = self._mask(hidden.detach(), down.weight.detach())
            hidden = hidden * mask
        if self.counts:
            self.used += float((hidden != 0).float().mean())
            self.passes += 1
        return hidden

    def _mask(self, hidden: Tensor, weight: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(weight, dim=0, dtype=torch.float32)
        flat = hidden.reshape(len(self._densities), -1, hidden.shape[-1])
        if self._keeps is not None:
            shards = self._keeps.shape[2]
            found = _selected(flat.view(*flat.shape[:2], shards, -1), norms.view(shards, -1), self._keeps)
            return found.view_as(hidden)
        mask = torch.ones_like(flat)
        start = 0
        for density, count in runs(self._densities):
            rows = slice(start, start + count)
            start += count
            if density < 1:
                scores = flat[rows].flatten(0, 1).abs().float().mul_(norms)
                own = top(scores, density) if self.cut == "top" else above(scores, density)
                mask[rows] = own.view(count, -1, hidden.shape[-1]).to(mask.dtype)
        return mask.view_as(hidden)


def _by_bits(hidden: Tensor, norms: Tensor, keeps: Tensor) -> Tensor:
    """The mask, in the format of hidden [S, T, K, n]: norms [K, n] float32, so many of each shard keeps [S, 1, K, 1]."""
    return _best_by_bits(hidden.abs().float() * norms, keeps).to(hidden.dtype)


_compiled: list[Any] = []


def _selected(hidden: Tensor, norms: Tensor, keeps: Tensor) -> Tensor:
    """`_by_bits`, as one kernel where it is compiled."""
    if torch.compiler.is_compiling() or not hidden.is_cuda:
        return _by_bits(hidden, norms, keeps)
    if not _compiled:
        _compiled.append(torch.compile(_by_bits, dynamic=False))
    try:
        found: Tensor = _compiled[0](hidden, norms, keeps)
    except Exception as error:  # of the compiler, its code generators and drivers
        log.warning("torch.compile fails (%s): neurons are selected in many small steps", type(error).__name__)
        _compiled[0] = _by_bits
        found = _by_bits(hidden, norms, keeps)
    return found


def _spans(neurons: int, density: float) -> list[tuple[slice, int]]:
    """Shards, and how many of each are kept."""
    return shard_spans(neurons, min(neurons, max(1, round(density * neurons))), shards_for(neurons))


def top(scores: Tensor, density: float) -> Tensor:
    """Each token's best of each shard, as the engine keeps them: scores [T, N], neurons in its order -> bool [T, N].

    Of equal scores at the border all are kept.
    """
    neurons = scores.shape[1]
    count, spans = shards_for(neurons), _spans(neurons, density)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    if neurons % count:
        for span, keep in spans:
            mask[:, span] = _best(scores[:, span], keep)
        return mask
    parts, kept = scores.view(len(scores), count, -1), mask.view(len(scores), count, -1)
    for keep in {keep for _, keep in spans}:
        shards = [i for i, (_, other) in enumerate(spans) if other == keep]
        kept[:, shards] = _best(parts[:, shards], keep)
    return mask


def _best(scores: Tensor, keep: int) -> Tensor:
    size = scores.shape[-1]
    if keep == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if torch.compiler.is_compiling():
        return _best_by_bits(scores, keep)
    return scores >= scores.kthvalue(size - keep + 1, dim=-1, keepdim=True).values


def _best_by_bits(scores: Tensor, keep: int | Tensor) -> Tensor:
    """The same of float32 scores of at least 0, as reductions over one row that a compiler makes one kernel of.

    As whole numbers the bits of such floats are in the same order: the greatest value that `keep` of a row reach is found bit by bit.
    Scores that agree in exponent and the first `_MANTISSA` bits count as equal.
    """
    bits = scores.view(torch.int32) >> 23 - _MANTISSA
    least = torch.zeros_like(bits[..., :1])
    for place in range(7 + _MANTISSA, -1, -1):
        higher = least + (1 << place)
        enough = (bits >= higher).sum(-1, keepdim=True, dtype=torch.int32) >= keep
        least = torch.where(enough, higher, least)
    return bits >= least


def above(scores: Tensor, density: float) -> Tensor:
    """Scores above their token's mean plus z standard deviations: [T, N] -> bool [T, N].

    z, one for all tokens, is the one with which `density` of all scores are kept, found on `_SAMPLE` of them that are evenly spread.
    """
    deviations = (scores - scores.mean(1, keepdim=True)).div_(scores.std(1, keepdim=True).clamp_min(1e-12))
    step = max(1, deviations.numel() // _SAMPLE)
    while math.gcd(step, scores.shape[1]) > 1:  # so that all neurons are among them
        step += 1
    ordered = deviations.flatten()[::step].sort(descending=True).values
    return deviations > ordered[min(len(ordered) - 1, round(density * len(ordered)))]


def runs(densities: Sequence[float]) -> Iterator[tuple[float, int]]:
    """Equal neighbours, counted."""
    start = 0
    for end in range(1, len(densities) + 1):
        if end == len(densities) or densities[end] != densities[start]:
            yield densities[start], end - start
            start = end
