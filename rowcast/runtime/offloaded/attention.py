"""One layer's attention products, some of whose rows are streamed."""

from __future__ import annotations

import torch
from torch import Tensor

from rowcast.kernels import rows
from rowcast.kernels.linear import linear
from rowcast.offload.streamer import HostPiece
from rowcast.runtime.banks import FEW_TOKENS, product
from rowcast.runtime.loader import Loader
from rowcast.runtime.offloaded.parts import Ring, Table, order_of
from rowcast.runtime.offloaded.tiers import Spans
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.weights import HeadSplit, plus


class PlacedAttention:
    """As `AttentionBank`, whose tables it has in parts. Group g of a placement is the g-th part of both tables."""

    def __init__(
        self, load: Loader, spec: ModelSpec, index: int, split: HeadSplit, spans: Spans, ring: Ring, device: torch.device
    ) -> None:
        self.sizes = split.heads * spec.head_dim, split.kv_heads * spec.head_dim, split.kv_heads * spec.head_dim
        self._ring = ring
        self._qkv = Table(f"{index} qkv", spans, sum(self.sizes), spec.hidden_size, ring, device)
        self.qkv_bias = load.qkv_spans(index, self._qkv.outs)
        self._o = Table(f"{index} o", spans, self.sizes[0], spec.hidden_size, ring, device)
        stem, first = load.names.out.format(index), load.shard.query_heads(spec).start * spec.head_dim
        dealt = [(out, order_of(span, first)) for span, out in self._o.outs]
        load.deal(stem, dealt, (spec.hidden_size, spec.num_heads * spec.head_dim), columns=True)
        self.o_bias = load.part_bias(stem) if spec.out_bias else None

    @property
    def pieces(self) -> list[HostPiece]:
        """In the order of their use."""
        return [*self._qkv.pieces, *self._o.pieces]

    @property
    def q_bias(self) -> Tensor | None:
        return None if self.qkv_bias is None else self.qkv_bias[: self.sizes[0]]

    @property
    def k_bias(self) -> Tensor | None:
        return None if self.qkv_bias is None else self.qkv_bias[self.sizes[0] : -self.sizes[2]]

    @property
    def v_bias(self) -> Tensor | None:
        return None if self.qkv_bias is None else self.qkv_bias[-self.sizes[2] :]

    @property
    def nbytes(self) -> int:
        """Of the weights."""
        return self._qkv.nbytes + self._o.nbytes

    def qkv(self, x: Tensor) -> Tensor:  # [T, D] -> [T, (H + 2 K) d]
        bias = self.qkv_bias
        return torch.cat(
            [product(table, x, None if bias is None else bias[span]) for span, table in self._qkv.visit(self._ring)], 1
        )

    def out(self, heads: Tensor, residual: Tensor | None = None) -> Tensor:
        """heads [T, H d], plus a residual [T, D] -> [T, D]: parts are added in the order of rows."""
        bias, y = self.o_bias, residual
        for span, table in self._o.visit(self._ring):
            some = heads[:, span]
            few = len(heads) <= FEW_TOKENS
            y = rows.rows_out(table, some, None, bias, y) if few else plus(linear(some, table.T, bias), y)
            bias = None
        assert y is not None
        return y
