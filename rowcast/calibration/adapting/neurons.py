"""A Transformers module whose tokens use a part of their neurons while it is trained, chosen as the engine's oracle chooses.

Between activation and down projection each token keeps its best neurons by what their contribution is worth, as many in each shard or
all above a level; gradients reach those alone. It is a mask over a dense product: what is saved is saved by the engine, not here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rowcast.calibration.learning.judge import hidden_states
from rowcast.errors import UserError
from rowcast.kernels.select import shard_spans
from rowcast.runtime.banks import neuron_order
from rowcast.runtime.shard import Shard
from rowcast.runtime.sparse.selection import shards_for
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.weight_map import names_for

log = logging.getLogger(__name__)

Cut = Literal["top", "threshold"]
"""top: as many neurons for every token of a density. threshold: those above one level for all layers and tokens, as many on average."""

_SAMPLE = 1 << 13
"""Scores of each layer and pass that levels begin with."""
FOLLOWS = 0.1
"""Of a level: the power of used over wanted neurons by which a step moves it."""
_LEAST = 1e-6
"""Of a level, so that it can rise again: where neurons are 0 by themselves, as many as are wanted may not be above any."""
_SEARCH, _SEARCH_FOLLOWS = 12, 0.5
"""Passes that levels are first looked for in, and that power in them."""
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

    def __init__(
        self,
        module: Any,
        spec: ModelSpec,
        cut: Cut = "top",
        *,
        sensitivities: Sequence[Tensor] | None = None,
        densities: Sequence[float] = (),
    ) -> None:
        """`sensitivities`: of each layer's neurons [N] float32 in the checkpoint's order, by which contributions are weighed; None: all
        alike. `densities`: those that have levels where `cut` is threshold."""
        self.module, self.spec, self.cut = module, spec, cut
        self.mlps = mlps_of(module, spec)
        self.counts = False
        """Count what passes use."""
        self.follows = False
        """Levels are to follow what passes use (`follow`)."""
        self.used, self.passes = 0.0, 0
        """Share of neurons that are not 0 behind the mask, summed over layers and passes that were counted."""
        self.at_once = self.mlps[0].down.weight.is_cuda
        """Whether one function finds the best of all densities, compiled; otherwise one selection a density, to the bit."""
        self._densities: tuple[float, ...] = ()
        self._keeps: Tensor | None = None
        self._tables: dict[tuple[float, ...], Tensor] = {}
        self._handles: list[Any] = []
        device = self.mlps[0].down.weight.device
        for layer, mlp in enumerate(self.mlps):
            given = torch.ones(mlp.neurons) if sensitivities is None else sensitivities[layer]
            mlp.down.register_buffer(_SENSITIVITY, given.to(device, copy=True), persistent=False)
        self.wanted = torch.tensor([*sorted(density for density in densities if density < 1), 1.0], device=device)
        """Densities that have levels, ascending, and 1."""
        self.levels = torch.full_like(self.wanted, -1.0)
        """Scores above which they lie, in place; -1 for 1."""
        self._places: Tensor | None = None
        self._seen = torch.zeros_like(self.wanted)
        """Shares of neurons that were used, summed over layers and sequences since the last `follow`."""
        self._gathered: list[Tensor] | None = None

    @property
    def densities(self) -> Sequence[float]:
        """Of the sequences of the next pass, equal ones side by side; empty: all neurons."""
        return self._densities

    @densities.setter
    def densities(self, densities: Sequence[float]) -> None:
        self._densities = tuple(densities)
        self._keeps = self._places = None
        if self._sparse and self.cut == "threshold":
            self._places = self._table(self._of_levels)  # [S]
        elif self._sparse and self.at_once and self.mlps[0].neurons % shards_for(self.mlps[0].neurons) == 0:
            self._keeps = self._table(self._of_shards)  # [S, 1, K, 1]

    def _table(self, make: Callable[[], Tensor]) -> Tensor:
        if self._densities not in self._tables:
            self._tables[self._densities] = make().to(self.levels.device)
        return self._tables[self._densities]

    def _of_levels(self) -> Tensor:
        wanted = self.wanted.tolist()
        return torch.tensor([min(range(len(wanted)), key=lambda i: abs(wanted[i] - density)) for density in self._densities])

    def _of_shards(self) -> Tensor:
        rows = [[keep for _, keep in _spans(self.mlps[0].neurons, density)] for density in self._densities]
        return torch.tensor(rows, dtype=torch.int32)[:, None, :, None]

    @property
    def _sparse(self) -> bool:
        return any(density < 1 for density in self._densities)

    @torch.no_grad()
    def find_levels(self, windows: Tensor, at_once: int) -> None:
        """Begin with levels that fit these windows [W, T], `at_once` of them in a pass, W at least as many as there are levels.
        Precondition: hooked, in order."""
        before, self._densities, self._gathered = self._densities, (), []
        parts = torch.split(windows, at_once)
        for ids in parts:
            hidden_states(self.module, ids)
        gathered, self._gathered = torch.cat(self._gathered), None
        ordered = gathered.sort(descending=True).values
        places = (self.wanted[:-1] * len(ordered)).long().clamp(max=len(ordered) - 1)
        self.levels[:-1] = ordered[places].clamp_min(_LEAST)
        self.follows = True
        wanted = self.wanted.tolist()[:-1]
        for turn in range(_SEARCH):
            first = turn * len(windows)
            for ids in parts:
                self.densities = sorted((wanted[(first + i) % len(wanted)] for i in range(len(ids))), reverse=True)
                hidden_states(self.module, ids)
                self.follow(_SEARCH_FOLLOWS / len(parts))
                first += len(ids)
        self.follows, self._densities = False, before

    @torch.no_grad()
    def follow(self, power: float = FOLLOWS) -> None:
        """Move levels to where the last pass would have used what it was to use. In place, nothing is asked of the device."""
        if self._places is None:
            return
        sequences = torch.zeros_like(self.wanted).index_add_(0, self._places, torch.ones_like(self._places, dtype=torch.float32))
        share = self._seen / (sequences * len(self.mlps)).clamp_min(1)
        moved = self.levels.clamp_min(_LEAST) * (share / self.wanted).clamp_min(1e-3) ** power
        self.levels.copy_(torch.where((sequences > 0) & (self.wanted < 1), moved, self.levels))
        self._seen.zero_()

    def hook(self) -> None:
        def keep(down: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:  # one function, so that layers compile once
            return self._keep(down, inputs[0])

        self._handles += [mlp.down.register_forward_pre_hook(keep) for mlp in self.mlps]

    def unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for mlp in self.mlps:
            delattr(mlp.down, _SENSITIVITY)

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
            if hasattr(mlp.down, _SENSITIVITY):
                found = _sensitivity(mlp.down)
                found.copy_(found[order])

    def _keep(self, down: nn.Module, hidden: Tensor) -> Tensor:
        # hidden [..., N], the sequences' tokens one after the other; OPT's is [B S, N]
        assert isinstance(down, nn.Linear)
        if self._gathered is not None:
            scores = (hidden.detach().abs().float() * _lengths(down)).flatten()
            step = max(1, len(scores) // _SAMPLE)
            while math.gcd(step, hidden.shape[-1]) > 1:  # so that all neurons are among them
                step += 1
            self._gathered.append(scores[::step])
        if self._sparse:
            hidden = hidden * self._mask(hidden.detach(), _lengths(down))
        if self.counts:
            self.used += float((hidden != 0).float().mean())
            self.passes += 1
        return hidden

    def _mask(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        flat = hidden.reshape(len(self._densities), -1, hidden.shape[-1])
        if self._places is not None:
            above = flat.abs().float() * lengths > self.levels[self._places][:, None, None]
            if self.follows:
                self._seen.index_add_(0, self._places, above.float().mean((1, 2)))
            return above.view_as(hidden)
        if self._keeps is not None:
            shards = self._keeps.shape[2]
            found = _selected(flat.view(*flat.shape[:2], shards, -1), lengths.view(shards, -1), self._keeps)
            return found.view_as(hidden)
        mask = torch.ones_like(flat)
        start = 0
        for density, count in runs(self._densities):
            rows = slice(start, start + count)
            start += count
            if density < 1:
                own = top(flat[rows].flatten(0, 1).abs().float().mul_(lengths), density)
                mask[rows] = own.view(count, -1, hidden.shape[-1]).to(mask.dtype)
        return mask.view_as(hidden)


_SENSITIVITY = "sensitivity"


def _sensitivity(down: nn.Linear) -> Tensor:
    found = getattr(down, _SENSITIVITY)
    assert isinstance(found, Tensor)
    return found


@torch.no_grad()
def _lengths(down: nn.Linear) -> Tensor:
    """What a unit of each neuron's activation is worth: [N] float32."""
    lengths: Tensor = torch.linalg.vector_norm(down.weight.detach(), dim=0, dtype=torch.float32)
    return lengths * _sensitivity(down)


def _by_bits(hidden: Tensor, norms: Tensor, keeps: Tensor) -> Tensor:
    """The mask, in the format of hidden [S, T, K, n]: lengths `norms` [K, n] float32, so many of each shard keeps [S, 1, K, 1]."""
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


def runs(densities: Sequence[float]) -> Iterator[tuple[float, int]]:
    """Equal neighbours, counted."""
    start = 0
    for end in range(1, len(densities) + 1):
        if end == len(densities) or densities[end] != densities[start]:
            yield densities[start], end - start
            start = end
