"""The cut: which rows go, by importance, and a smaller module with the rows that stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rowcast.calibration.learning.module import make_module, stored_tensors
from rowcast.calibration.pruning.blocks import blocks_of
from rowcast.calibration.pruning.importance import Importance
from rowcast.calibration.pruning.sizes import HEADS_FREE, NEURONS_KEY, Sizes
from rowcast.runtime.config import ADAPTED, spec_from_config
from rowcast.runtime.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Kept:
    """What stays of each of L layers, ascending."""

    sizes: Sizes
    neurons: Tensor
    """[L, neurons] int64."""
    heads: Tensor
    """[L, kv_heads * group] int64: query heads, whole groups together."""
    kv_heads: Tensor
    """[L, kv_heads] int64."""
    lost: float
    """Importance of all that goes, over that of all there is."""


def choose(spec: ModelSpec, importance: Importance, candidates: Sequence[Sizes]) -> Kept:
    """Of the candidates the one that loses least, and the most important neurons and heads for it."""
    return min((kept_by(spec, importance, sizes) for sizes in candidates), key=lambda kept: kept.lost)


def kept_by(spec: ModelSpec, importance: Importance, sizes: Sizes) -> Kept:
    """The most important that these sizes have room for: within a group the best heads, of groups those whose best are worth most."""
    neurons = importance.neurons.topk(sizes.neurons, 1).indices.sort(1).values
    grouped = importance.heads.view(spec.num_layers, spec.num_kv_heads, spec.group_size)
    best = grouped.topk(sizes.group, 2)
    kv_heads = best.values.sum(2).topk(sizes.kv_heads, 1).indices.sort(1).values
    inside = best.indices.sort(2).values.gather(1, kv_heads[..., None].expand(-1, -1, sizes.group))
    heads = (kv_heads[..., None] * spec.group_size + inside).flatten(1)
    whole = importance.neurons.sum() + importance.heads.sum()
    left = importance.neurons.gather(1, neurons).sum() + importance.heads.gather(1, heads).sum()
    return Kept(sizes, neurons, heads, kv_heads, float(1 - left / whole))


def smaller_config(config: dict[str, Any], spec: ModelSpec, sizes: Sizes) -> dict[str, Any]:
    """config.json of a model of this spec, cut to `sizes`; without what `adapt` said of it, which was measured with all neurons."""
    changed: dict[str, Any] = {NEURONS_KEY[spec.family]: sizes.neurons}
    if spec.family in HEADS_FREE:
        changed |= {"num_attention_heads": sizes.heads, "num_key_value_heads": sizes.kv_heads, "head_dim": spec.head_dim}
    return {key: value for key, value in config.items() if key != ADAPTED} | changed


@torch.no_grad()
def cut(module: Any, config: dict[str, Any], spec: ModelSpec, kept: Kept, dtype: torch.dtype) -> Any:
    """A smaller copy of a Transformers model with this config and spec, in the same place."""
    weight = module.get_input_embeddings().weight
    changed = smaller_config(config, spec, kept.sizes)
    smaller = make_module(changed, dtype, weight.device)
    theirs = dict(stored_tensors(module))
    for name, tensor in stored_tensors(smaller):
        if tensor.shape == theirs[name].shape:
            tensor.copy_(theirs[name])
    for i, (old, new) in enumerate(zip(blocks_of(module, spec), blocks_of(smaller, spec_from_config(changed)), strict=True)):
        neurons = kept.neurons[i].to(weight.device)
        for one, other in zip(old.inner, new.inner, strict=True):
            _rows(one, other, neurons)
        _columns(old.down, new.down, neurons)
        if spec.family in HEADS_FREE:
            queries, keys = (_dimensions(ids[i].to(weight.device), spec.head_dim) for ids in (kept.heads, kept.kv_heads))
            for one, other, rows in zip(old.qkv, new.qkv, (queries, keys, keys), strict=True):
                _rows(one, other, rows)
            _columns(old.out, new.out, queries)
    return smaller


def _rows(old: nn.Linear, new: nn.Linear, rows: Tensor) -> None:
    new.weight.copy_(old.weight[rows])
    if old.bias is not None:
        new.bias.copy_(old.bias[rows])


def _columns(old: nn.Linear, new: nn.Linear, columns: Tensor) -> None:
    """The same product of fewer inputs; its bias stays."""
    new.weight.copy_(old.weight[:, columns])
    if old.bias is not None:
        new.bias.copy_(old.bias)


def _dimensions(heads: Tensor, size: int) -> Tensor:
    """Rows of the heads' dimensions: [H] -> [H d]."""
    return (heads[:, None] * size + torch.arange(size, device=heads.device)).flatten()
