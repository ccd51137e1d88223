"""Running one layer at a time over many windows, and seeing what its products read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rowcast.kernels.attention import attend_seen
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


class RunsKV(PagedKV):
    """A store for one window of at most `window` tokens: as a whole (`whole`), and cut into runs of `length` tokens that each see the
    whole window's entries before them and, of their own pass, their own alone (`runs`): all in one attention."""

    def __init__(self, spec: ModelSpec, window: int, length: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self._most = -(-window // length)
        super().__init__(spec, Shard(), num_blocks=2 * self._most, block_size=length, dtype=dtype, device=device)

    def whole(self, tokens: Sequence[int]) -> SeqStep:
        """The window, its first token as a prompt. Freed, its entries stay for `runs`."""
        return SeqStep(seq_id=0, tokens=list(tokens), start=0, blocks=list(range(self._most)), prompt_length=1, sample=False)

    def runs(self, tokens: Sequence[int]) -> list[SeqStep]:
        """The same window behind its own entries, a sequence each run. Precondition: `whole` has run, and nothing else is bound."""
        size, steps = self.block_size, []
        for i, start in enumerate(range(0, len(tokens), size)):
            blocks = [*range(i), self._most + i]
            steps.append(SeqStep(i, list(tokens[start : start + size]), start, blocks, prompt_length=1, sample=False))
            if i:
                self.adopt(i, start, blocks)
        positions = torch.arange(len(tokens), device=self.device)
        first = positions // size * size
        stand = positions < first[:, None]
        own = (positions >= first[:, None]) & (positions <= positions[:, None])
        self._seen, self._positions = torch.cat([stand, own], 1), positions
        return steps

    def attend(self, layer: int, q: Tensor, heads: Tensor | None = None) -> Tensor:  # [T, H, d] -> [T, C, d]
        if len(self._bound) == 1:
            return super().attend(layer, q, heads)
        keys, values = (table.flatten(0, 1) for table in self.entries(layer))
        tokens, own = len(q), self._most * self.block_size
        k, v = (torch.cat([table[:tokens], table[own : own + tokens]]) for table in (keys, values))
        return attend_seen(
            q, k, v, self._seen, scale=self.spec.attention_scale, key_positions=self._positions.repeat(2),
            query_positions=self._positions, window=self.spec.windows[layer], slopes=self.slopes,
            absolute_bias_scale=self.absolute_bias_scale, heads=heads,
        )  # fmt: skip


def window_steps(windows: Tensor, prompt_length: int) -> Sequence[SeqStep]:
    """Windows [W, window] as sequences of their own, a block of an `OneLayerKV` each; new ids in each call would do as well."""
    return [
        SeqStep(seq_id=i, tokens=ids, start=0, blocks=[i], prompt_length=prompt_length, sample=False)
        for i, ids in enumerate(windows.tolist())
    ]
