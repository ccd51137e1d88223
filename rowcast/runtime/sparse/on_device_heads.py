"""Chosen query heads in passes of the device's own rounds: see `on_device`.

K and V are those of all heads, unless entries may be late (`on_device_late`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rowcast.kernels import gpu
from rowcast.kernels.gpu import products, select
from rowcast.kernels.gpu.heads import HeadRows, choose_heads, head_rows, head_scores, spread
from rowcast.kernels.gpu.late import LateHeads
from rowcast.runtime.banks import BankWeights, product
from rowcast.runtime.protocols import ALL_HEADS, Heads
from rowcast.runtime.sparse.device_counts import DeviceCounts
from rowcast.runtime.sparse.heads import HeadSelector
from rowcast.runtime.sparse.on_device_late import DeviceLate, kv_rows


@dataclass(frozen=True, slots=True)
class HeadsFound:
    """The heads of a pass's tokens in one layer."""

    rows: HeadRows | None
    """None: all heads are computed, and `own` says which are each token's."""
    own: Tensor | None = None
    """bool [T, H]."""
    chosen: select.Chosen | None = None
    """Those of `rows`."""
    late: LateHeads | None = None
    """Of a single token's, those whose K/V are written with them."""


class DeviceHeads:
    """One layer's attention products by its selector, as `SparseAttention` for generated tokens."""

    def __init__(self, banks: BankWeights, layer: int, selector: HeadSelector, sparse_tokens: int, counts: DeviceCounts) -> None:
        self._banks, self._layer, self._counts = banks, layer, counts
        self._sparse_tokens = min(sparse_tokens, gpu.MOST_TOKENS)
        dealt = selector.dealt()
        assert dealt is not None
        self._places = select.Places(*zip(*dealt, strict=True))
        self._shards = torch.tensor(
            [[shard, kept] for shard, (heads, kept) in enumerate(dealt) for _ in range(heads)],
            dtype=torch.int32,
            device=banks.attention[layer].qkv.device,
        ).T.contiguous()
        self._weight, self._bias = selector.own
        self._kv, self._kv_bias = kv_rows(banks, layer)
        self.reads_ahead = selector.reads == "ahead"
        """Whether `choose` takes the MLP's input of the layer before, not the attention's."""
        self._found: HeadsFound | None = None
        """Of the pass that runs."""

    def choose(self, x: Tensor, late: DeviceLate | None) -> HeadsFound:
        """x [T, D], the hidden state that the selector reads; the attention's input is kept for `late`."""
        tokens, size, places = x.shape[0], self._banks.spec.head_dim, self._places
        ring = None if late is None or self.reads_ahead else late.ring(self._layer)
        scores = head_scores(x, self._weight, self._bias, ring)
        self._counts.pass_reads.use("heads", tokens * places.keep, self._layer)
        self._counts.pass_reads.bytes += self._weight.nbytes + self._bias.nbytes
        if tokens > self._sparse_tokens:
            return HeadsFound(None, top_mask(scores, places))
        if tokens == 1:
            everything = None if late is None else late.everything
            chosen, rows, lates = choose_heads(scores, self._shards, places.keep, size, late is not None, everything)
            return HeadsFound(rows, None, chosen, lates)
        chosen = select.top_ids(scores, places)
        return HeadsFound(head_rows(chosen, size), None, chosen)

    def qkv(self, x: Tensor, found: HeadsFound, late: DeviceLate | None) -> tuple[Tensor, Tensor, Tensor]:
        """[T, D] -> q [T, H, d], k [T, K, d], v [T, K, d]; query heads that are not computed are 0. `late`: writes K/V, those
        that are used; then k and v have no heads, and of a single token the query heads that are not computed are undefined."""
        banks, layer, reads = self._banks, self._layer, self._counts.pass_reads
        bank, split = banks.attention[layer], banks.split
        self._found, rows, chosen = found, found.rows, found.chosen
        if rows is None:
            reads.bytes += bank.q.nbytes + bank.o.nbytes
            if late is None:
                reads.bytes += self._kv.nbytes
                return banks.qkv(layer, x)
            q = split.queries(layer, product(bank.q, x, bank.q_bias))
        else:
            each = bank.q[0].nbytes + bank.o[0].nbytes
            if rows.count is None:
                reads.bytes += len(rows.rows) * each
            else:
                self._counts.add("bytes", rows.count, each)
            if late is not None and found.late is not None:
                q = late.queries(layer, found.late, rows.heads)
                return q, q[:, :0], q[:, :0]
            assert chosen is not None
            some = split.queries(layer, products.rows_in(bank.q, x, rows.rows, rows.count, bank.q_bias))
            q = spread(some, chosen, split.heads)
        if late is not None:
            late.write(layer, chosen)
            return q, q[:, :0], q[:, :0]
        reads.bytes += self._kv.nbytes
        k, v = products.rows_in(self._kv, x, bias=self._kv_bias).split(bank.sizes[1:], 1)  # type: ignore[no-untyped-call]
        return q, split.keys(layer, k), split.values(v)

    @property
    def heads(self) -> Heads:
        return ALL_HEADS if self._found is None or self._found.rows is None else Heads(self._found.rows.heads)

    def out(self, heads: Tensor, residual: Tensor | None) -> Tensor:
        """Of the chosen heads, each token by its own: [T, C, d] -> [T, D]."""
        bank, found = self._banks.attention[self._layer], self._found
        assert found is not None
        self._found, rows = None, found.rows
        own = found.own if rows is None else rows.own
        heads = heads if own is None else heads * own[:, :, None]
        if rows is None:
            return self._banks.out(self._layer, heads, residual)
        return products.rows_out(bank.o, heads.flatten(1), rows.rows, rows.count, bank.o_bias, residual)


def top_mask(scores: Tensor, places: select.Places) -> Tensor:
    """Each token's best of each shard, for any number of tokens: float32 [T, N] -> bool [T, N]."""
    found = [select.top_mask(part, places) for part in torch.tensor_split(scores, -(-len(scores) // gpu.MOST_TOKENS))]
    return found[0] if len(found) == 1 else torch.cat(found)
