"""The low-bit weight view: all weights of a model, rounded to nearest in 8 or 4 bits when it is loaded, groups of 64 with one scale.

Matrices are rounded as the bank layout has them, neurons in its order: the view is the same whether it is made of banks or of a
checkpoint. The output and down projections are turned first, so that their products, too, run along a row: groups of the down
projection are 64 neurons. A rank rounds its own share; where that cuts a group of inputs, it rounds and holds the whole group, and
inputs that are another's count as 0, so that the weights are the same on any number of ranks. Embeddings, norms and biases stay in the
model's own format.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rowcast.kernels import lowbit
from rowcast.kernels.lowbit import BLOCK, LowBit
from rowcast.runtime.banks import AttentionBank, BankWeights, FfnBank, attention_bank, ffn_bank, neuron_order
from rowcast.runtime.loader import Loader, Progress
from rowcast.runtime.lowbit_sizes import HEAD_BITS
from rowcast.runtime.protocols import ALL_HEADS, Comm, Heads, KVView, Reads, Source, Tokens
from rowcast.runtime.shard import Shard
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.weights import HeadSplit, Outer


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's share of the products. N neurons of this rank, H and K heads of d elements."""

    qkv: LowBit
    """[(H + 2 K) d, D]."""
    qkv_bias: Tensor | None
    out: LowBit
    """[D, H d]."""
    out_bias: Tensor | None
    up: LowBit
    """[N, D]; where the MLP is gated [2 N, D], rows [gate; up]."""
    up_bias: Tensor | None
    down: LowBit
    """[D, N]."""
    down_bias: Tensor | None
    out_edges: tuple[int, int] = (0, 0)
    """Columns of `out` before and behind this rank's own."""
    down_edges: tuple[int, int] = (0, 0)

    @property
    def bytes(self) -> int:
        biases = (self.qkv_bias, self.out_bias, self.up_bias, self.down_bias)
        weights = self.qkv.bytes + self.out.bytes + self.up.bytes + self.down.bytes
        return weights + sum(bias.nbytes for bias in biases if bias is not None)


class LowBitWeights:
    """One rank's share of all weights in few bits. Implements `WeightView`; made by `of_banks` or `load`."""

    on_device = True

    def __init__(self, outer: Outer, split: HeadSplit, layers: list[_Layer], head: LowBit, width: int) -> None:
        """`width`: bytes of an element of `outer`."""
        self.spec = spec = outer.spec
        self.outer = outer
        self._split, self._layers, self._head = split, layers, head
        others = outer.elements - outer.head_elements
        if spec.qk_norm == "head":
            others += 2 * spec.num_layers * spec.head_dim
        self.bytes = others * width + head.bytes + sum(layer.bytes for layer in layers)
        """Bytes of weights that a pass reads."""
        self._passes = 0
        self.embed, self.norm_of = outer.embed, outer.norm_of

    @classmethod
    def of_banks(cls, banks: BankWeights, bits: int) -> LowBitWeights:
        """Of a model in the bank layout, beside it: embeddings, norms and biases are the same tensors.

        Precondition: its LM head is held in rows.
        """
        rows = banks.outer.head_rows
        assert rows is not None
        layers = [
            _Layer(*_attention(attention, bits), *_mlp(ffn, bits))
            for attention, ffn in zip(banks.attention, banks.ffn, strict=True)
        ]
        return cls(banks.outer, banks.split, layers, lowbit.quantise(rows, HEAD_BITS[bits]), rows.itemsize)

    @classmethod
    def beside(
        cls,
        banks: BankWeights,
        source: Source,
        comm: Comm,
        bits: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress | None = None,
    ) -> LowBitWeights:
        """`of_banks`; where a library holds their LM head in a layout of its own, or a rank's share cuts groups, `load` of their
        checkpoint."""
        if banks.outer.head_rows is not None and not any(_edges(banks.spec, banks.shard, which) for which in ("out", "down")):
            return cls.of_banks(banks, bits)
        return cls.load(banks.spec, source, comm, bits, dtype=dtype, device=device, outer=banks.outer, progress=progress)

    @classmethod
    def load(
        cls,
        spec: ModelSpec,
        source: Source,
        comm: Comm,
        bits: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        outer: Outer | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> LowBitWeights:
        """Of a checkpoint; no more than one sub-layer is held in `dtype` at a time.

        `outer`: what another view of the same model has already loaded; None: all but the LM head's own rows, which nobody else then
        needs. `seed`: of the order of neurons. Raises UserError as `DenseWeights` does.
        """
        shard = Shard(comm.rank, comm.world)
        shard.check(spec)
        load = Loader(spec, source, shard, dtype, device, progress)
        outer = outer or Outer(spec, load, comm, head=False)
        rows = outer.head_rows
        if rows is None:
            rows = load.vocabulary_rows(load.names.head, prefixed=False)
        head = lowbit.quantise(rows, HEAD_BITS[bits])
        del rows
        split, layers = HeadSplit(spec, load), []
        for i in range(spec.num_layers):
            attention = _attention(attention_bank(load, spec, i, split), bits)
            layer = _Layer(*attention, *_mlp(ffn_bank(load, spec, i, seed, device, dtype), bits))
            layers.append(_with_whole_groups(layer, load, spec, i, bits, seed))
        return cls(outer, split, layers, head, dtype.itemsize)

    def begin(self, tokens: Tokens, kv: KVView) -> None:
        self._passes += 1

    def reads(self) -> Reads:
        passes, self._passes = self._passes, 0
        return Reads(bytes=passes * self.bytes)

    def qkv(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [T, D] -> [T, H, d], [T, K, d], [T, K, d]
        weights = self._layers[layer]
        return self._split.apart(layer, lowbit.product(weights.qkv, x, weights.qkv_bias, dtype=x.dtype))

    def heads(self, layer: int) -> Heads:
        return ALL_HEADS

    def out(self, layer: int, heads: Tensor, residual: Tensor | None = None) -> Tensor:  # [T, H, d] -> [T, D]
        weights = self._layers[layer]
        x = heads.flatten(1)
        if any(weights.out_edges):
            x = F.pad(x, weights.out_edges)
        return lowbit.product(weights.out, x, weights.out_bias, residual, heads.dtype)

    def mlp(self, layer: int, x: Tensor, residual: Tensor | None = None) -> Tensor:  # [T, D] -> [T, D]
        weights, spec = self._layers[layer], self.spec
        hidden = lowbit.ffn_hidden(weights.up, weights.up_bias, x, spec.activation, spec.gated)
        if any(weights.down_edges):
            hidden = F.pad(hidden, weights.down_edges)
        return lowbit.product(weights.down, hidden, weights.down_bias, residual, x.dtype)

    def head(self, x: Tensor) -> Tensor:  # [T, D] -> [T, V_local]
        return self.outer.pad(lowbit.product(self._head, self.outer.head_input(x), dtype=x.dtype))


def _attention(bank: AttentionBank, bits: int) -> tuple[LowBit, Tensor | None, LowBit, Tensor | None]:
    return lowbit.quantise(bank.qkv, bits), bank.qkv_bias, lowbit.quantise(bank.o.T, bits), bank.o_bias


def _mlp(bank: FfnBank, bits: int) -> tuple[LowBit, Tensor | None, LowBit, Tensor | None]:
    up = lowbit.stacked([lowbit.quantise(table, bits) for table in (bank.gate, bank.up) if table is not None])
    biases = [bias for bias in (bank.gate_bias, bank.up_bias) if bias is not None]
    bias = torch.cat(biases) if len(biases) > 1 else bank.up_bias
    return up, bias, lowbit.quantise(bank.down.T, bits), bank.down_bias


def _edges(spec: ModelSpec, shard: Shard, which: Literal["out", "down"]) -> tuple[int, int] | None:
    """Inputs before and behind a rank's own that are in a group with them; None: there are none."""
    span, total = shard.span(spec.intermediate_size), spec.intermediate_size
    if which == "out":
        heads = shard.query_heads(spec)
        span, total = slice(heads.start * spec.head_dim, heads.stop * spec.head_dim), spec.num_heads * spec.head_dim
    before, behind = span.start % BLOCK, min(total, -(-span.stop // BLOCK) * BLOCK) - span.stop
    return (before, behind) if before or behind else None


def _with_whole_groups(layer: _Layer, load: Loader, spec: ModelSpec, index: int, bits: int, seed: int) -> _Layer:
    """The layer with whole groups of inputs, where the rank's share cuts some."""
    shard, hidden = load.shard, spec.hidden_size
    if edges := _edges(spec, shard, "out"):
        heads = shard.query_heads(spec)
        columns = torch.arange(heads.start * spec.head_dim - edges[0], heads.stop * spec.head_dim + edges[1])
        stem, whole = load.names.out.format(index), (hidden, spec.num_heads * spec.head_dim)
        layer = replace(layer, out=lowbit.quantise(load.columns(stem, columns, whole), bits), out_edges=edges)
    if edges := _edges(spec, shard, "down"):
        span = shard.span(spec.intermediate_size)
        order = neuron_order(spec, Shard(), index, seed)[span.start - edges[0] : span.stop + edges[1]]
        stem, whole = load.names.down.format(index), (hidden, spec.intermediate_size)
        layer = replace(layer, down=lowbit.quantise(load.columns(stem, order, whole), bits), down_edges=edges)
    return layer
