"""Quantisation-aware training: passes see weights as the engine's rung `self:bits=` rounds them, gradients are as if they were not.

Matrices of layers are rounded along their inputs in groups of 64, neurons in the engine's order (`Neurons.permute`), with the engine's
own search of scales; embeddings, norms and biases are not. The LM head, which is not trained, is rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rowcast.calibration.adapting.neurons import Mlp, mlps_of
from rowcast.errors import UserError
from rowcast.kernels import lowbit
from rowcast.runtime.lowbit_sizes import HEAD_BITS
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.weight_map import names_for


class _Rounded(nn.Module):
    """A parametrization of a weight [R, D]."""

    def __init__(self, bits: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.bits, self.dtype, self.on = bits, dtype, False

    def forward(self, weight: Tensor) -> Tensor:
        if not self.on:
            return weight
        return weight + (rounded(weight.detach().to(self.dtype), self.bits).to(weight.dtype) - weight).detach()


def rounded(weight: Tensor, bits: int) -> Tensor:
    """What a matrix [R, D] is in the engine's low bits, float32."""
    return lowbit.dequantise(lowbit.quantise(weight, bits))


class Rounding:
    """All matrices of a module's layers as parametrizations that are off but inside `on`."""

    def __init__(self, module: Any, spec: ModelSpec, bits: int, dtype: torch.dtype) -> None:
        """`dtype`: that weights are stored in, before the engine rounds them."""
        if bits not in HEAD_BITS:
            raise UserError(f"--bits {bits} is no rung's: use {' or '.join(map(str, sorted(HEAD_BITS)))}")
        self._linears = [*_attention(module, spec), *(linear for mlp in mlps_of(module, spec) for linear in _linears(mlp))]
        self._rounded = []
        for linear in self._linears:
            one = _Rounded(bits, dtype)
            parametrize.register_parametrization(linear, "weight", one, unsafe=True)
            self._rounded.append(one)
        head = module.get_output_embeddings().weight
        self.head = rounded(head.detach().to(dtype), HEAD_BITS[bits]).to(head.dtype)
        """[V, D]."""

    @contextmanager
    def on(self) -> Iterator[None]:
        """Passes see rounded weights, each weight rounded once."""
        for one in self._rounded:
            one.on = True
        try:
            with parametrize.cached():
                yield
        finally:
            for one in self._rounded:
                one.on = False

    def remove(self) -> None:
        """Leave the weights as they are, not rounded."""
        for linear in self._linears:
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)


def _linears(mlp: Mlp) -> tuple[nn.Linear, ...]:
    return (*mlp.inner, mlp.down)


def _attention(module: Any, spec: ModelSpec) -> Iterator[nn.Linear]:
    names = names_for(spec)
    for layer in range(spec.num_layers):
        for stem in (*names.qkv, names.out):
            linear = module.get_submodule(names.prefixes[0] + stem.format(layer))
            assert isinstance(linear, nn.Linear)
            yield linear
