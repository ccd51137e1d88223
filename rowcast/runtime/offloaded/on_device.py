"""Passes over a model that fetches rows, in rounds that the device runs by itself: what a token needs and the device lacks is fetched
by kernels, into buffers of a fixed capacity. Nothing is asked of the device, so that a pass can be captured in a graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from rowcast.kernels import gpu
from rowcast.kernels.gpu import products, select
from rowcast.runtime.banks import FfnBank
from rowcast.runtime.offloaded.ffn import PlacedFfn
from rowcast.runtime.protocols import Reads
from rowcast.runtime.sparse.device_counts import DeviceCounts
from rowcast.runtime.sparse.on_device import Choice, DeviceNeurons, DevicePasses, count_rows
from rowcast.runtime.sparse.on_device_heads import top_mask
from rowcast.runtime.sparse.selection import Selector


class OffloadedPasses(DevicePasses):
    """As `DevicePasses`, over layers whose neurons are resident or fetched. What is chosen ahead is fetched while attention runs."""

    def _of_layer(self, layer: int, bank: Any, selector: Selector, sparse_tokens: int) -> DeviceNeurons:
        if isinstance(bank, PlacedFfn):
            return PlacedNeurons(layer, bank, selector, self._counts)
        return super()._of_layer(layer, bank, selector, sparse_tokens)


class DirectPasses:
    """The layers' MLPs in passes that the host drives: it does not wait for what the device finds."""

    def __init__(self, layers: Sequence[tuple[PlacedFfn, Selector] | None]) -> None:
        """None: a layer that is not asked."""
        [device, *_] = {each[0].up_down.device for each in layers if each is not None}
        self._counts = DeviceCounts(device, len(layers))
        self._neurons = [None if each is None else PlacedNeurons(layer, *each, self._counts) for layer, each in enumerate(layers)]
        self._last = max(layer for layer, each in enumerate(layers) if each is not None)
        self._ahead: Choice | None = None
        self._unread: Any = None
        """Event after the last pass that `reads` has not told."""

    def begin(self) -> None:
        self._counts.begin()

    def look_ahead(self, layer: int, x: Tensor) -> None:
        """What the layer will read, by the attention's input [T, D]."""
        self._ahead = self._of(layer).choose(x)

    def mlp(self, layer: int, x: Tensor, residual: Tensor | None) -> Tensor:
        """x [T, D] -> [T, D], plus a residual."""
        neurons, choice = self._of(layer), self._ahead
        self._ahead = None
        if not neurons.reads_ahead:
            choice = neurons.choose(x)
        assert choice is not None
        y = neurons.mlp(x, choice, residual)
        if layer == self._last:
            self._counts.end()
            self._counts.send()
            self._unread = torch.cuda.current_stream(x.device).record_event() if x.is_cuda else True
        return y

    def reads(self) -> Reads:
        """Since the last call of this; waits for the passes."""
        if self._unread is None:
            return Reads()
        if self._unread is not True:
            self._unread.synchronize()
        self._unread = None
        return self._counts.read()

    def _of(self, layer: int) -> PlacedNeurons:
        found = self._neurons[layer]
        assert found is not None
        return found


@dataclass(frozen=True, slots=True)
class _Part:
    """Some of the chosen rows, in the pool."""

    columns: slice
    """Of the list of those chosen."""
    at: Tensor
    """int32 [n]."""
    count: Tensor | None
    """How many of them are chosen, int32 [1]; None, or more than n: all."""


class PlacedNeurons(DeviceNeurons):
    """One layer's MLP by its selector. Up to 16 tokens the union of their rows is fetched, with more all of them pass through."""

    fetches = True

    def __init__(self, layer: int, bank: PlacedFfn, selector: Selector, counts: DeviceCounts) -> None:
        """Precondition: `bank.on_device`."""
        assert bank.on_device and bank.cached is not None and bank.pool is not None
        super().__init__(layer, cast(FfnBank, bank), selector, gpu.MOST_TOKENS, counts)
        self._placed, self._cached, self._pool = bank, bank.cached, bank.pool
        self._found: _Part | None = None
        """The first of those chosen, as long as they lie in the pool."""

    def choose(self, x: Tensor) -> Choice:
        choice = super().choose(x)
        self._found = None if isinstance(choice, Tensor) else self._part(choice, 0)
        return choice

    def mlp(self, x: Tensor, choice: Choice, residual: Tensor | None) -> Tensor:
        placed, neurons = self._placed, len(self._placed.order)
        if isinstance(choice, Tensor):
            count_rows(self._counts.pass_reads, self._bank, neurons, neurons)
            return self._all(x, choice, residual)
        count, own, table = self._count(choice), choice.own, self._pool.bank
        if count is None:
            count_rows(self._counts.pass_reads, self._bank, len(choice.ids), self._selector.keep)
        else:
            count_rows(self._counts.pass_reads, self._bank, 0, 0)
            self._counts.add("bytes", count, placed.in_row_bytes + placed.out_row_bytes)

        def hidden(part: _Part, own: Tensor | None) -> Tensor:
            own = None if own is None else own[:, part.columns]
            biases = table.gate_bias, table.up_bias
            return products.ffn_hidden(table.gate, table.up, *biases, x, part.at, part.count, table.activation, own)

        if not self._selector.reranks:
            y, bias = residual, placed.down_bias
            for part in self._parts(choice):
                y = products.rows_out(table.down, hidden(part, own), part.at, part.count, bias, y)
                bias = None
            assert y is not None
            return y
        found = [hidden(part, None) for part in self._parts(choice)]
        whole = found[0] if len(found) == 1 else torch.cat(found, 1)
        assert self._kept is not None
        if own is None:
            assert len(found) == 1, "a single token's candidates do not go into the buffer"
            ids, _, whole = select.rerank_one(whole, choice, self._kept, self._norms)
            return products.rows_out(table.down, whole, self._pool.rows.where[ids], None, placed.down_bias, residual)
        whole = whole * select.rerank(whole, choice, self._kept, self._norms)
        y, bias = residual, placed.down_bias
        for part in self._parts(choice):  # where they are several they are fetched again
            y = products.rows_out(table.down, whole[:, part.columns], part.at, part.count, bias, y)
            bias = None
        assert y is not None
        return y

    def _count(self, choice: select.Chosen) -> Tensor | None:
        """None: as many as there are places, as a single token's best are."""
        return None if choice.own is None and self._first is not None else choice.count

    def _parts(self, choice: select.Chosen) -> Iterator[_Part]:
        """All of the chosen, each part until the next."""
        first = self._part(choice, 0) if self._found is None else self._found
        yield first
        for start in range(first.columns.stop, len(choice.ids), self._cached.room):
            self._found = None
            yield self._part(choice, start)

    def _part(self, choice: select.Chosen, start: int) -> _Part:
        """From that place of the list on, as many as are sure to have room. There may be fewer, or none: the count tells."""
        columns, count = slice(start, min(start + self._cached.room, len(choice.ids))), self._count(choice)
        if count is not None and start:
            count = (count - start).clamp(min=0)
        return _Part(columns, self._cached.reach(choice.ids[columns], count), count)

    def _all(self, x: Tensor, own: Tensor, residual: Tensor | None) -> Tensor:
        """Each token's `own` [T, N] of all neurons."""
        placed = self._placed
        if self._selector.reranks:
            hidden = torch.cat([bank.hidden(x) for _, bank in placed.passing()], 1).index_select(1, placed.place)
            assert self._kept is not None
            score = placed.score(hidden, norms=self._norms).masked_fill_(~own, float("-inf"))
            own = top_mask(score, self._kept)
        own, y, bias = own.index_select(1, placed.logical), residual, placed.down_bias
        for columns, bank in placed.passing():
            with_bias: FfnBank = replace(bank, down_bias=bias)
            y, bias = with_bias.out(bank.hidden(x) * own[:, columns], residual=y), None
        assert y is not None
        return y
