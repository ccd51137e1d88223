"""Lazy K/V in rounds that the device runs by itself: see `lazy`. One sequence of a view at a time; others have theirs complete.

A ring keeps the inputs of the newest tokens, and whoever uses a head writes its entries of all of them: they are columns of one tile.
Where later rounds go on with the sequence, a pass writes those of all heads before the ring would overflow.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import ref

import torch
from torch import Tensor

from rowcast.kernels.gpu import products
from rowcast.kernels.gpu.late import RING, LateHeads, Ring, begin_late, every_head, late_heads, write_late
from rowcast.kernels.gpu.select import Chosen
from rowcast.runtime.banks import BankWeights
from rowcast.runtime.kv.device import BoundStore
from rowcast.runtime.kv.paged import PagedKV
from rowcast.runtime.protocols import KVView
from rowcast.runtime.sparse.device_counts import DeviceCounts
from rowcast.runtime.sparse.sizes import LATE_TOKENS
from rowcast.runtime.step import SeqStep

assert LATE_TOKENS <= RING


class DeviceLate:
    """The rings of all layers. Precondition: each query head has a KV head of its own, positions are not rotated, heads not normed."""

    def __init__(self, banks: BankWeights, counts: DeviceCounts) -> None:
        self._banks, self._counts = banks, counts
        spec, like = banks.spec, banks.attention[0].qkv
        self._rings = like.new_zeros(spec.num_layers, RING, spec.hidden_size)
        self._every = every_head(banks.split.heads, spec.head_dim, like.device)
        self._until = torch.zeros(1, dtype=torch.int32, device=like.device)
        """Of the sequence that is late: the place that its entries are complete up to."""
        self._owner: tuple[ref[KVView], int] | None = None
        """This sequence, where rounds leave entries for later ones."""
        self._kv: BoundStore | None = None
        self._first = self._until
        self._everything: Tensor | None = None

    def begin_round(self, view: KVView, seq_ids: Sequence[int], late: bool) -> None:
        """Passes over these sequences follow. `late`: they leave entries of the only one for later rounds; else all are complete."""
        mine = self._owner is not None and self._owner[0]() is view
        if late and mine and self._owner is not None and self._owner[1] == seq_ids[0]:
            return
        self._complete()
        if late:
            self._owner = ref(view), seq_ids[0]
            self._until.fill_(view.end(seq_ids[0]))

    def host_pass(self, view: KVView, steps: Sequence[SeqStep]) -> None:
        """The host drives a pass over these steps."""
        if self._owner is None or self._owner[0]() is not view:
            return
        for step in steps:
            if step.seq_id == self._owner[1]:
                if step.start == 0:  # from the beginning
                    self._owner = None
                else:
                    self._complete()
                return

    def begin(self, kv: BoundStore) -> None:
        """A pass over `kv`, which may leave entries, starts."""
        self._kv = kv
        if isinstance(kv.late, int):
            self._first, self._everything = begin_late(self._until, kv.at.starts, kv.at.counts, kv.late)
        else:
            assert kv.late is not None
            self._first, self._everything = kv.late, None

    @property
    def everything(self) -> Tensor | None:
        """int32 [1]: whether all heads have to write; None: only those that are chosen."""
        return self._everything

    def ring(self, layer: int) -> Ring:
        """Where the layer's inputs of this pass go, before `write`."""
        assert self._kv is not None
        return Ring(self._rings[layer], self._kv.at.starts, self._kv.at.counts)

    def write(self, layer: int, chosen: Chosen | None) -> None:
        """Entries for the chosen heads (None: all) of the pass's tokens and of those before that lack them."""
        split, size = self._banks.split, self._banks.spec.head_dim
        late = self._every if chosen is None else late_heads(chosen, split.heads, size, self._everything)
        known = late.rows is None or (self._everything is None and chosen is not None and chosen.own is None)
        self._write(layer, self._products(layer, late, known), late)

    def queries(self, layer: int, late: LateHeads, chosen: Tensor) -> Tensor:
        """`write` of heads with fused rows: in one product the queries of the pass's token, too, of the heads `chosen` [C], as
        [1, H, d]; those of others are undefined."""
        banks, fused = self._banks, late.fused
        assert fused is not None
        bank, width = banks.attention[layer], len(chosen) * banks.spec.head_dim
        if fused.count is None:
            self._counts.pass_reads.bytes += (len(fused.rows) - width) * bank.qkv[0].nbytes
        else:
            self._counts.add("bytes", late.count, bank.qkv[0].nbytes)
        found = products.rows_in(bank.qkv, self._rings[layer], fused.rows, fused.count, bank.qkv_bias)
        queries = self._write(layer, banks.split.values(found).flatten(1), late, chosen)
        assert queries is not None
        return queries

    def _write(self, layer: int, products: Tensor, late: LateHeads, chosen: Tensor | None = None) -> Tensor | None:
        kv = self._kv
        assert kv is not None
        at = kv.at
        return write_late(products, late, *kv.entries(layer), at.tables[0], self._first, at.starts, at.counts, chosen)

    def _products(self, layer: int, late: LateHeads, known: bool) -> Tensor:
        """[16, 2 C d]. `known`: all places are valid."""
        bank, split = self._banks.attention[layer], self._banks.split
        table, bias = kv_rows(self._banks, layer)
        if known:
            rows = table if late.rows is None else late.rows
            self._counts.pass_reads.bytes += len(rows) * table[0].nbytes
        else:
            self._counts.add("bytes", late.count, table[0].nbytes)
        assert bank.sizes[1] == bank.sizes[2]
        return split.values(products.rows_in(table, self._rings[layer], late.rows, None if known else late.count, bias)).flatten(
            1
        )

    def _complete(self) -> None:
        """Write what the sequence lacks, if it still has entries. Waits for the device."""
        owner, self._owner = self._owner, None
        view = None if owner is None else owner[0]()
        if owner is None or view is None or owner[1] not in view.seq_ids:
            return
        assert isinstance(view, PagedKV)
        slots = view.table(owner[1])
        # A pass that was run in vain has placed an entry that the view does not have, and the next one writes again.
        lacking = torch.arange(min(int(self._until), len(slots)), len(slots), device=slots.device)
        for layer in range(self._banks.spec.num_layers if len(lacking) else 0):
            found = self._products(layer, self._every, True)[lacking % RING].view(len(lacking), 2, self._banks.split.heads, -1)
            for store, entries in zip(view.entries(layer), found.unbind(1), strict=True):
                store.view(-1, *store.shape[2:]).index_copy_(0, slots[lacking], entries)


def kv_rows(banks: BankWeights, layer: int) -> tuple[Tensor, Tensor | None]:
    """The rows of keys above those of values, [2 K d, D], and their biases."""
    bank = banks.attention[layer]
    return bank.qkv[bank.sizes[0] :], None if bank.qkv_bias is None else bank.qkv_bias[bank.sizes[0] :]
