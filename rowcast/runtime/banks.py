"""The bank layout: a neuron's weights and a head's weights are rows, so that a few of them can be read alone.

Neurons stand in an order of their own, a seeded permutation, which changes no output (DESIGN section 4 of DA-TOP-k: shards are then
alike). `BankWeights` runs all rows; sparse views choose some.

Few tokens go through the row kernels, many through library products, for which a table that is not contiguous is copied
(`sparse/sizes.py`). In 16 bits the two round differently: scores that nearly tie may change their order with the number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rowcast.kernels import gpu, rows
from rowcast.kernels.linear import linear
from rowcast.kernels.rows import ACTIVATIONS
from rowcast.runtime.loader import Loader, Progress
from rowcast.runtime.protocols import ALL_HEADS, Comm, Heads, KVView, Reads, Source, Tokens
from rowcast.runtime.shard import Shard
from rowcast.runtime.spec import Activation, ModelSpec
from rowcast.runtime.weights import HeadSplit, Outer, plus

FEW_TOKENS = 16
"""Up to so many tokens the row kernels run all rows, too; above, library products do."""


def product(table: Tensor, x: Tensor, bias: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
    """x [T, D] times the rows `ids` [C] (None: all) of table [R, D], plus their bias [R] -> [T, C]."""
    if ids is None and x.shape[0] > FEW_TOKENS:
        return linear(x, table, bias)
    return rows.rows_in(table, x, ids, bias)


@dataclass(frozen=True, slots=True)
class FfnBank:
    """One layer's MLP, one row or bundle of rows a neuron. N neurons of this rank."""

    activation: Activation
    gate: Tensor | None
    """[N, D]; None where the MLP is not gated."""
    up_down: Tensor
    """[N, 2, D]: a neuron's row of the up projection, then its column of the down projection."""
    gate_bias: Tensor | None
    """[N]."""
    up_bias: Tensor | None
    """[N]."""
    down_bias: Tensor | None
    """[D]; on one rank only."""
    order: Tensor
    """[N] int64: the neuron of the checkpoint that each row is. On the CPU."""
    norms: Tensor
    """[N] float32: length of each neuron's column of the down projection."""

    @property
    def gated(self) -> bool:
        return self.gate is not None

    @property
    def up(self) -> Tensor:
        """[N, D], rows 2 D apart."""
        return self.up_down[:, 0]

    @property
    def down(self) -> Tensor:
        """[N, D], rows 2 D apart."""
        return self.up_down[:, 1]

    @property
    def in_row_bytes(self) -> int:
        """Read to find one neuron's activation, with its biases."""
        tables = (self.up, self.gate, self.up_bias, self.gate_bias)
        return sum(table[0].nbytes for table in tables if table is not None)

    @property
    def out_row_bytes(self) -> int:
        """Read to add one neuron's output."""
        return self.down[0].nbytes

    def hidden(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        """Activations of the chosen neurons (None: all): x [T, D], ids [C] -> [T, C]."""
        if (x.shape[0] <= FEW_TOKENS or ids is not None) and self.gate_bias is None:
            return rows.ffn_hidden(self.gate, self.up, self.up_bias, x, ids, self.activation)
        act = ACTIVATIONS[self.activation]
        up = product(self.up, x, self.up_bias, ids)
        return act(up) if self.gate is None else act(product(self.gate, x, self.gate_bias, ids)) * up

    def score(self, hidden: Tensor, ids: Tensor | None = None, norms: Tensor | None = None) -> Tensor:
        """Length of what each activation [T, C] adds to the output, [T, C] float32. `norms` [N]: what columns count for; None: their
        lengths."""
        norms = self.norms if norms is None else norms
        return hidden.float().abs().mul_(norms if ids is None else norms[ids])

    def out(self, hidden: Tensor, ids: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """Their part of the output, plus a residual [T, D]: hidden [T, C] -> [T, D].

        Rows that no token has a use for (all 0) need not be read.
        """
        if hidden.shape[0] <= FEW_TOKENS or ids is not None:
            return rows.rows_out(self.down, hidden, ids, self.down_bias, residual)
        return plus(linear(hidden, self.down.T, self.down_bias), residual)

    def ffn(self, x: Tensor, ids: Tensor | None, residual: Tensor | None = None) -> Tensor:
        """`hidden` and `out` in one: x [T, D] -> [T, D]."""
        if self.gate_bias is not None or gpu.takes(x):
            return self.out(self.hidden(x, ids), ids, residual)
        y = rows.ffn(self.gate, self.up, self.up_bias, self.down, x, ids, None, self.activation)
        return plus(y if self.down_bias is None else y.add_(self.down_bias), residual)


@dataclass(frozen=True, slots=True)
class AttentionBank:
    """One layer's attention products, head-major: head h's rows are h d, h d + 1, ... of each table."""

    qkv: Tensor
    """[(H + 2 K) d, D]: the rows of `q`, `k` and `v`, one below the other."""
    qkv_bias: Tensor | None
    sizes: tuple[int, int, int]
    """Rows of each."""
    o: Tensor
    """[H d, D]: row h d + i is the output projection's column for element i of head h."""
    o_bias: Tensor | None
    """[D]; on one rank only."""

    @property
    def q(self) -> Tensor:
        """[H d, D]."""
        return self._part(self.qkv, 0)

    @property
    def k(self) -> Tensor:
        """[K d, D]."""
        return self._part(self.qkv, 1)

    @property
    def v(self) -> Tensor:
        """[K d, D]."""
        return self._part(self.qkv, 2)

    @property
    def q_bias(self) -> Tensor | None:
        return None if self.qkv_bias is None else self._part(self.qkv_bias, 0)

    @property
    def k_bias(self) -> Tensor | None:
        return None if self.qkv_bias is None else self._part(self.qkv_bias, 1)

    @property
    def v_bias(self) -> Tensor | None:
        return None if self.qkv_bias is None else self._part(self.qkv_bias, 2)

    def _part(self, fused: Tensor, which: int) -> Tensor:
        return fused.narrow(0, sum(self.sizes[:which]), self.sizes[which])

    def out(self, heads: Tensor, ids: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """heads [T, C], as rows `ids` [C] (None: all) of `o`, plus a residual [T, D] -> [T, D]."""
        if heads.shape[0] <= FEW_TOKENS or ids is not None:
            return rows.rows_out(self.o, heads, ids, self.o_bias, residual)
        return plus(linear(heads, self.o.T, self.o_bias), residual)


class BankWeights:
    """One rank's share of all weights in the bank layout; runs all rows. Implements `WeightView`."""

    on_device = True

    def __init__(
        self,
        spec: ModelSpec,
        source: Source,
        comm: Comm,
        *,
        dtype: torch.dtype,
        device: torch.device,
        outer: Outer | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> None:
        """`outer`: what another view of the same model has already loaded. `seed`: of the order of neurons. Raises UserError as
        `DenseWeights` does."""
        self.spec = spec
        self.shard = shard = Shard(comm.rank, comm.world)
        shard.check(spec)
        load = Loader(spec, source, shard, dtype, device, progress)
        self.outer = outer or Outer(spec, load, comm)
        inside = load.elements
        self.split = HeadSplit(spec, load)
        self.attention = [attention_bank(load, spec, i, self.split) for i in range(spec.num_layers)]
        self.ffn = [ffn_bank(load, spec, i, seed, device, dtype) for i in range(spec.num_layers)]
        self.outer_bytes = self.outer.elements * dtype.itemsize
        """Read by a pass beside the layers' products."""
        self.bytes = self.outer_bytes + (load.elements - inside) * dtype.itemsize
        """Bytes of weights that a pass over all rows reads."""
        self._passes = 0
        self.embed, self.norm_of, self.head = self.outer.embed, self.outer.norm_of, self.outer.head

    def begin(self, tokens: Tokens, kv: KVView) -> None:
        self._passes += 1

    def repeat(self, times: int) -> None:
        """Nothing: all rows lie where they are read."""

    def reads(self) -> Reads:
        passes, self._passes = self._passes, 0
        return Reads(bytes=passes * self.bytes)

    def qkv(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [T, D] -> [T, H, d], [T, K, d], [T, K, d]
        bank = self.attention[layer]
        return self.split.apart(layer, product(bank.qkv, x, bank.qkv_bias))

    def heads(self, layer: int) -> Heads:
        return ALL_HEADS

    def out(self, layer: int, heads: Tensor, residual: Tensor | None = None) -> Tensor:  # [T, H, d] -> [T, D]
        return self.attention[layer].out(heads.flatten(1), residual=residual)

    def mlp(self, layer: int, x: Tensor, residual: Tensor | None = None) -> Tensor:  # [T, D] -> [T, D]
        bank = self.ffn[layer]
        return bank.out(bank.hidden(x), residual=residual)


def attention_bank(load: Loader, spec: ModelSpec, index: int, split: HeadSplit) -> AttentionBank:
    weight, bias = load.qkv(index)
    sizes = split.heads * spec.head_dim, split.kv_heads * spec.head_dim, split.kv_heads * spec.head_dim
    heads = load.shard.query_heads(spec)
    columns = torch.arange(heads.start * spec.head_dim, heads.stop * spec.head_dim)
    stem = load.names.out.format(index)
    out = weight.new_empty((len(columns), spec.hidden_size))
    load.rows(stem, out, columns, (spec.hidden_size, spec.num_heads * spec.head_dim), columns=True)
    return AttentionBank(weight, bias, sizes, out, load.part_bias(stem) if spec.out_bias else None)


def neuron_order(spec: ModelSpec, shard: Shard, layer: int, seed: int) -> Tensor:
    """[N] int64: the neurons that are this rank's rows, in their order. The same for a layer and seed on every machine."""
    generator = torch.Generator().manual_seed((seed << 20) + layer)
    return torch.randperm(spec.intermediate_size, generator=generator)[shard.span(spec.intermediate_size)]


def ffn_bank(load: Loader, spec: ModelSpec, index: int, seed: int, device: torch.device, dtype: torch.dtype) -> FfnBank:
    names, order = load.names, neuron_order(spec, load.shard, index, seed)
    inner, hidden = spec.intermediate_size, spec.hidden_size
    gate = None
    if spec.gated:
        gate = torch.empty((len(order), hidden), dtype=dtype, device=device)
        load.rows(names.gate.format(index), gate, order, (inner, hidden))
    up_down = torch.empty((len(order), 2, hidden), dtype=dtype, device=device)
    load.rows(names.up.format(index), up_down[:, 0], order, (inner, hidden))
    load.rows(names.down.format(index), up_down[:, 1], order, (hidden, inner), columns=True)
    gate_bias = load.vector(f"{names.gate.format(index)}.bias", inner)[order.to(device)] if spec.mlp_bias and spec.gated else None
    up_bias = load.vector(f"{names.up.format(index)}.bias", inner)[order.to(device)] if spec.mlp_bias else None
    down_bias = load.part_bias(names.down.format(index)) if spec.mlp_bias else None
    norms = torch.linalg.vector_norm(up_down[:, 1], dim=1, dtype=torch.float32)
    return FfnBank(spec.activation, gate, up_down, gate_bias, up_bias, down_bias, order, norms)
