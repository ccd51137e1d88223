"""What a neuron or a head is worth: how much the loss on text changes without it, to the second order, or how much it adds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rowcast.calibration.pruning.blocks import blocks_of, gradients_of_activations
from rowcast.runtime.spec import ModelSpec

By = Literal["taylor", "activation"]


@dataclass(frozen=True, slots=True)
class Importance:
    """Of a model's L layers of N neurons and H query heads; larger is worth more. Sums are of use within one kind of measure."""

    neurons: Tensor
    """[L, N] float64."""
    heads: Tensor
    """[L, H] float64."""


def measure(
    module: Any,
    spec: ModelSpec,
    windows: Tensor,
    by: By,
    *,
    device: torch.device,
    batch_tokens: int = 2048,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Importance:
    """Over windows [W, T] of token ids. `advance` is told of tokens.

    taylor: where m multiplies what a neuron or head adds at one token, E[(dL / dm)^2] over tokens at m = 1, from one backward pass a
    window: by the Fisher matrix's diagonal, twice what the loss grows by without it (Molchanov et al., arXiv 1906.10771; Kwon et al.,
    arXiv 2204.09656). activation: the mean square of what it adds to the residual stream (FLAP, arXiv 2312.11983, about the mean).
    """
    assert windows.shape[1] > 1
    blocks = blocks_of(module, spec)
    neurons = torch.zeros(spec.num_layers, spec.intermediate_size, dtype=torch.float64)
    heads = torch.zeros(spec.num_layers, spec.num_heads, dtype=torch.float64)
    sums = [(neurons[i].to(device), heads[i].to(device)) for i in range(spec.num_layers)]
    grams = [_gram(block.out, spec) for block in blocks] if by == "activation" else []

    def seen(layer: int, kind: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if by == "taylor":
                x.register_hook(lambda grad: add((x.detach() * grad).double().reshape(-1, x.shape[-1])))  # type: ignore[no-untyped-call]
            else:
                add(x.double().reshape(-1, x.shape[-1]))

        def add(rows: Tensor) -> None:  # [T, N] or [T, H d]
            if kind == 0:
                sums[layer][0].add_(rows.square().sum(0))
            elif by == "taylor":
                sums[layer][1].add_(rows.view(len(rows), spec.num_heads, -1).sum(-1).square().sum(0))
            else:
                per_head = rows.view(len(rows), spec.num_heads, -1)
                sums[layer][1].add_(torch.einsum("thd,hde,the->h", per_head, grams[layer], per_head))

        return see

    handles = [
        linear.register_forward_pre_hook(seen(i, kind))
        for i, block in enumerate(blocks)
        for kind, linear in enumerate((block.down, block.out))
    ]
    per_pass = max(1, batch_tokens // windows.shape[1])
    try:
        for ids in torch.split(windows, per_pass):
            _pass(module, ids.to(device), by)
            advance(ids.numel())
    finally:
        for handle in handles:
            handle.remove()
    neurons = torch.stack([pair[0].cpu() for pair in sums]) / windows.numel()
    heads = torch.stack([pair[1].cpu() for pair in sums]) / windows.numel()
    if by == "activation":
        neurons *= torch.stack([block.down.weight.detach().double().square().sum(0).cpu() for block in blocks])
    return Importance(neurons, heads)


def _pass(module: Any, ids: Tensor, by: By) -> None:
    if by == "activation":
        with torch.no_grad():
            module.base_model(input_ids=ids, use_cache=False)
        return
    with gradients_of_activations(module):
        logits = module(input_ids=ids, use_cache=False).logits[:, :-1]
        F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()  # type: ignore[no-untyped-call]


def _gram(out: nn.Linear, spec: ModelSpec) -> Tensor:
    """Of each head's columns of the output product, [H, d, d]."""
    columns = out.weight.detach().double().T.reshape(spec.num_heads, -1, out.weight.shape[0])
    return columns @ columns.transpose(1, 2)
