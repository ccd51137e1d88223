"""Running one layer at a time over many windows, and seeing what its products read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rowcast.runtime.banks import BankWeights
from rowcast.runtime.kv import PagedKV
from rowcast.runtime.shard import Shard
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.step import SeqStep


class RecordingWeights(BankWeights):
    """All rows of a model; what the last layer's products were given can be read afterwards."""

    attention_input: Tensor
    """[T, D]."""
    head_outputs: Tensor
    """[T, H, d]."""
    mlp_input: Tensor
    """[T, D]."""

    def qkv(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [T, D] -> [T, H, d], [T, K, d], [T, K, d]
        self.attention_input = x
        return super().qkv(layer, x)

    def out(self, layer: int, heads: Tensor, residual: Tensor | None = None) -> Tensor:  # [T, H, d] -> [T, D]
        self.head_outputs = heads
        return super().out(layer, heads, residual)

    def mlp(self, layer: int, x: Tensor, residual: Tensor | None = None) -> Tensor:  # [T, D] -> [T, D]
        self.mlp_input = x
        return super().mlp(layer, x, residual)


class OneLayerKV(PagedKV):
    """A store for windows that run whole, layer after layer: all layers take turns in the place of one."""

    def __init__(self, spec: ModelSpec, windows: int, window: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(replace(spec, num_layers=1), Shard(), num_blocks=windows, block_size=window, dtype=dtype, device=device)
        self.spec = spec
        self._keys = self._keys.expand(spec.num_layers, -1, -1, -1, -1)
        self._values = self._values.expand(spec.num_layers, -1, -1, -1, -1)


def window_steps(windows: Tensor, prompt_length: int) -> Sequence[SeqStep]:
    """Windows [W, window] as sequences of their own, a block of an `OneLayerKV` each; new ids in each call would do as well."""
    return [
        SeqStep(seq_id=i, tokens=ids, start=0, blocks=[i], prompt_length=prompt_length, sample=False)
        for i, ids in enumerate(windows.tolist())
    ]
