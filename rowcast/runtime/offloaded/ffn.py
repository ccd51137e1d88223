"""One layer's neurons over the tiers of a plan.

Neurons have two orders. By number they stand in the bank layout's, the seeded permutation that selectors cut into shards; so which
neurons a token uses does not depend on where they lie. In memory they stand tier by tier, within each from the most frequent one on
(without a calibration, as the checkpoint has them). A neuron's rows (gate,) up and down are neighbours everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from rowcast.offload.cpu_side import CpuSide
from rowcast.offload.host_store import HostBank
from rowcast.offload.row_cache import CachedBank, RowPool
from rowcast.offload.streamer import HostPiece
from rowcast.runtime.banks import FfnBank, neuron_order
from rowcast.runtime.loader import Loader
from rowcast.runtime.offloaded.parts import Ring
from rowcast.runtime.offloaded.tiers import CPU, RESIDENT, ROWS, STREAMED, Spans
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.weights import plus


@dataclass(frozen=True, slots=True)
class Rooms:
    """What the layers of a view share."""

    ring: Ring
    device: torch.device
    pool: Pool | None = None
    """Where rows are fetched to; None: no layer has any to fetch."""
    cpu: CpuSide | None = None
    """None: the CPU computes nothing."""


class Pool:
    """A pool of neurons [P, J, D], which several layers fetch theirs into, with the biases of those that lie there."""

    def __init__(self, spec: ModelSpec, rows: Tensor, buffer: slice) -> None:
        self.rows = RowPool(rows, buffer)
        biases = torch.zeros(2, len(rows), dtype=rows.dtype, device=rows.device) if spec.mlp_bias else None
        self._up_bias = None if biases is None else biases[0]
        self._gate_bias = biases[1] if biases is not None and spec.gated else None
        self.taken = 0
        """Rows that banks' caches have."""
        self.bank = _bank(rows, spec, self._up_bias, self._gate_bias)

    def room(self, rows: int) -> slice:
        """The next so many rows, for a bank's cache."""
        first = self.taken
        self.taken += rows
        assert self.taken <= self.rows.first
        return slice(first, self.taken)

    def biases(self, at: Tensor, up: Tensor | None, gate: Tensor | None) -> None:
        """The rows `at` have these now."""
        for held, given in ((self._up_bias, up), (self._gate_bias, gate)):
            if held is not None and given is not None:
                held.index_copy_(0, at, given)


class _Visit(NamedTuple):
    """Some of a layer's neurons, on the device or the CPU as long as they are visited."""

    bank: FfnBank
    columns: slice | Tensor
    """Of activations [T, C]: of the chosen neurons, or of all in the order of memory."""
    rows: Tensor | None = None
    """Of the bank, one for each column; None: all."""
    on_cpu: bool = False


class PlacedFfn:
    """As `FfnBank` by neurons' numbers; reads each piece once in a call."""

    def __init__(
        self,
        load: Loader,
        spec: ModelSpec,
        index: int,
        seed: int,
        spans: Spans,
        frequency: Tensor | None,
        rooms: Rooms,
        cache_rows: int = 0,
    ) -> None:
        """`frequency` [I]: how often each of the checkpoint's neurons is needed. `cache_rows`: of those fetched, how many are kept."""
        self.spec, self.activation = spec, spec.activation
        self._rooms, self._index, device = rooms, index, rooms.device
        self.order = neuron_order(spec, load.shard, index, seed)
        count, names = len(self.order), load.names
        logical = _by_frequency(self.order, frequency)
        tiers = [(tier, span) for tier in (RESIDENT, STREAMED, ROWS, CPU) for span in spans.rows(tier, count)]
        logical = torch.cat([logical[span] for _, span in tiers])
        assert len(logical) == count, f"layer {index}: neurons lie nowhere"
        sizes = {tier: sum(s.stop - s.start for t, s in tiers if t == tier) for tier in (RESIDENT, STREAMED, ROWS, CPU)}
        ends = torch.tensor([0, *sizes.values()]).cumsum(0).tolist()
        self._spans = {tier: slice(ends[i], ends[i + 1]) for i, tier in enumerate(sizes)}
        self._logical = logical.to(device)
        self._place = torch.empty_like(logical).index_copy_(0, logical, torch.arange(count)).to(device)
        self._load(load, index, sizes, self.order[logical])
        self.down_bias = load.part_bias(names.down.format(index)) if spec.mlp_bias else None
        self._resident = self._of(self._table, self._spans[RESIDENT])
        pieces = rooms.ring.pieces
        self._streamed = [] if self._away is None else pieces(f"{index} mlp", self._away, self._spans[STREAMED].start)
        self._fetched = [] if self._rows is None else pieces(f"{index} mlp", self._rows, self._spans[ROWS].start)
        self._cached: CachedBank | None = None
        if self._rows is not None and rooms.pool is not None:
            self._cached = rooms.pool.rows.add(self._rows, rooms.pool.room(min(cache_rows, sizes[ROWS])))
        self._reached: tuple[Tensor, Tensor] | None = None
        """Rows that were just asked for, and where they lie."""

    # What a bank says of itself.

    @property
    def up_down(self) -> Tensor:
        """[n, 2, D] of the resident ones."""
        return self._resident.up_down

    @property
    def gate(self) -> Tensor | None:
        """All rows by number, [N, D], put together on the device."""
        return self._assembled(0) if self.spec.gated else None

    @property
    def up(self) -> Tensor:
        """Likewise."""
        return self._assembled(-2)

    @property
    def up_bias(self) -> Tensor | None:
        """By number."""
        return None if self._up_bias is None else self._up_bias[self._place]

    @property
    def gate_bias(self) -> Tensor | None:
        """By number."""
        return None if self._gate_bias is None else self._gate_bias[self._place]

    @property
    def in_row_bytes(self) -> int:
        biases = self.spec.mlp_bias * (2 if self.spec.gated else 1)
        return ((self._table.shape[1] - 1) * self._table.shape[2] + biases) * self._table.itemsize

    @property
    def out_row_bytes(self) -> int:
        return self._table.shape[2] * self._table.itemsize

    @property
    def streamed(self) -> list[HostPiece]:
        """Pieces that every pass streams."""
        return [piece.held for piece in self._streamed]

    @property
    def fetched(self) -> list[HostPiece]:
        """Pieces that passes over all neurons stream, of which others fetch rows."""
        return [piece.held for piece in self._fetched]

    # Products.

    def mlp(self, x: Tensor, residual: Tensor | None = None, own: Tensor | None = None) -> Tensor:
        """All neurons, or each token's `own`, bool [T, N] by number: x [T, D] -> [T, D], plus a residual."""
        own = None if own is None else own.index_select(1, self._logical)
        return self._run(x, lambda: self._all(), residual, own)

    def chosen(self, x: Tensor, ids: Tensor, own: Tensor | None, residual: Tensor | None = None) -> Tensor:
        """The neurons `ids` [C] int64, of which each token has its `own`, bool [T, C] (None: all): x [T, D] -> [T, D]."""
        return self._run(x, lambda: self._some(ids), residual, own)

    def hidden(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        """Activations of the chosen neurons (None: all, by number): x [T, D], ids [C] -> [T, C]."""
        out = x.new_empty(len(x), len(self.order) if ids is None else len(ids))
        sent = x.cpu() if self._cpu is not None else x
        for bank, columns, rows, on_cpu in self._all() if ids is None else self._some(ids):
            found = bank.hidden(sent if on_cpu else x, rows).to(out.device)
            if isinstance(columns, slice):
                out[:, columns] = found
            else:
                out.index_copy_(1, columns, found)
        return out if ids is not None else out.index_select(1, self._place)

    def out(self, hidden: Tensor, ids: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """Their part of the output: hidden [T, C] -> [T, D]."""
        given = hidden.index_select(1, self._logical) if ids is None else hidden
        y = residual if self.down_bias is None else plus(self.down_bias.expand(len(hidden), -1).clone(), residual)
        for bank, columns, rows, on_cpu in self._all() if ids is None else self._some(ids):
            some = given[:, columns]
            y = plus(bank.out(some.cpu(), rows).to(hidden.device), y) if on_cpu else bank.out(some, rows, y)
        assert y is not None
        return y

    def score(self, hidden: Tensor, ids: Tensor | None = None) -> Tensor:
        """As `FfnBank.score`."""
        return hidden.float().abs().mul_(self.norms if ids is None else self.norms[ids])

    def overflows(self, ids: Tensor) -> bool:
        """Whether more of these have to be fetched than there is room for."""
        pool = self._rooms.pool
        if self._cached is None or pool is None or len(ids) <= pool.rows.capacity:
            return False
        span, at = self._spans[ROWS], self._place[ids]
        return int(((at >= span.start) & (at < span.stop)).sum()) > pool.rows.capacity

    # Where they lie.

    def _run(self, x: Tensor, visits: Callable[[], Iterator[_Visit]], residual: Tensor | None, own: Tensor | None) -> Tensor:
        """Activations and their part of the output, visit by visit, in the order of memory; the CPU's part is added last."""
        side = self._rooms.cpu if self._cpu is not None else None
        if side is not None:
            side.send(x)
        y = residual if self.down_bias is None else plus(self.down_bias.expand(len(x), -1).clone(), residual)
        for bank, columns, rows, on_cpu in visits():
            given = x
            if on_cpu:
                assert side is not None
                given = side.received()
            hidden = bank.hidden(given, rows)
            if own is not None:
                hidden = hidden * own[:, columns].to(hidden.device)
            if on_cpu:
                assert side is not None
                y = plus(side.returned(bank.out(hidden, rows)), y)
            else:
                y = bank.out(hidden, rows, y)
        return x.new_zeros(x.shape) if y is None else y

    def _all(self) -> Iterator[_Visit]:
        if len(self._resident.up_down):
            yield _Visit(self._resident, self._spans[RESIDENT])
        for piece in (*self._streamed, *self._fetched):
            with self._rooms.ring.taken(piece) as table:
                yield _Visit(self._of(table, piece.rows), piece.rows)
        if self._cpu is not None:
            yield _Visit(self._cpu, self._spans[CPU], on_cpu=True)

    def _some(self, ids: Tensor) -> Iterator[_Visit]:
        at = self._place[ids]

        def inside(span: slice) -> tuple[Tensor, Tensor]:
            columns = ((at >= span.start) & (at < span.stop)).nonzero()[:, 0]
            return columns, at[columns] - span.start

        columns, rows = inside(self._spans[RESIDENT])
        if len(rows):
            yield _Visit(self._resident, columns, rows)
        for piece in self._streamed:
            with self._rooms.ring.taken(piece) as table:
                columns, rows = inside(piece.rows)
                if len(rows):
                    yield _Visit(self._of(table, piece.rows), columns, rows)
        columns, rows = inside(self._spans[ROWS])
        if len(rows):
            pool = self._rooms.pool
            assert pool is not None
            yield _Visit(pool.bank, columns, self._reach(ids, rows, pool))
        columns, rows = inside(self._spans[CPU])
        if self._cpu is not None and (len(rows) or self._rooms.device.type == "cpu"):
            yield _Visit(self._cpu, columns, rows.cpu(), on_cpu=True)

    def _reach(self, ids: Tensor, rows: Tensor, pool: Pool) -> Tensor:
        """Where fetched rows lie; those of the same ids are fetched once for activations and output."""
        if self._reached is not None and self._reached[0] is ids:
            return self._reached[1]
        assert self._cached is not None
        at, start = self._cached.reach(rows), self._spans[ROWS].start
        for bias in (self._up_bias, self._gate_bias):
            assert bias is None or len(bias) == len(self.order)
        pool.biases(
            at,
            None if self._up_bias is None else self._up_bias[start + rows],
            None if self._gate_bias is None else self._gate_bias[start + rows],
        )
        self._reached = ids, at
        return at

    def done(self) -> None:
        """The layer's call is over: what was fetched may be overwritten."""
        self._reached = None

    def _of(self, table: Tensor, rows: slice) -> FfnBank:
        """Neurons [n, J, D] that are so many of memory's order. The output's bias is not theirs."""
        up, gate = (None if bias is None else bias[rows] for bias in (self._up_bias, self._gate_bias))
        return _bank(table, self.spec, up, gate)

    def _load(self, load: Loader, index: int, sizes: dict[str, int], order: Tensor) -> None:
        """Fill the tables, each with its part of `order`, the checkpoint's neurons as memory has them."""
        spec, names, rooms = self.spec, load.names, self._rooms
        ring, device = rooms.ring, rooms.device
        shape = (3 if spec.gated else 2), spec.hidden_size
        self._table = torch.empty((sizes[RESIDENT], *shape), dtype=ring.dtype, device=device)
        banks = {tier: ring.store.bank((sizes[tier], *shape), ring.dtype) for tier in (STREAMED, ROWS, CPU) if sizes[tier]}
        self._away: HostBank | None = banks.get(STREAMED)
        self._rows: HostBank | None = banks.get(ROWS)
        tables = {RESIDENT: self._table} | {tier: bank.tensor for tier, bank in banks.items()}
        inner, hidden = spec.intermediate_size, spec.hidden_size
        stems = [*([names.gate] if spec.gated else []), names.up, names.down]
        for row, stem in enumerate(stems):
            outs = [(table[:, row], order[self._spans[tier]]) for tier, table in tables.items()]
            down = stem == names.down
            load.deal(stem.format(index), outs, (hidden, inner) if down else (inner, hidden), columns=down)
        load.elements += len(order) * shape[0] * hidden

        def bias(stem: str) -> Tensor:
            return load.vector(f"{stem.format(index)}.bias", inner)[order.to(device)]

        self._up_bias = bias(names.up) if spec.mlp_bias else None
        self._gate_bias = bias(names.gate) if spec.mlp_bias and spec.gated else None
        lengths = [torch.linalg.vector_norm(table[:, -1], dim=1, dtype=torch.float32).to(device) for table in tables.values()]
        norms = torch.empty(len(order), device=device)
        for tier, found in zip(tables, lengths, strict=True):
            norms[self._spans[tier]] = found
        self.norms = norms[self._place]
        """[N] float32, by number: length of each neuron's column of the down projection."""
        self._cpu: FfnBank | None = None
        if CPU in banks:
            there = self._of(banks[CPU].tensor, self._spans[CPU])
            up, gate = (None if each is None else each.cpu() for each in (there.up_bias, there.gate_bias))
            self._cpu = replace(there, up_bias=up, gate_bias=gate)

    def _assembled(self, row: int) -> Tensor:
        """One row of each neuron, by number."""
        tables = [self._table[:, row]]
        tables += [bank.tensor[:, row].to(self._rooms.device) for bank in (self._away, self._rows) if bank is not None]
        if self._cpu is not None:
            there = self._cpu.down if row == -1 else self._cpu.up if row == -2 else self._cpu.gate
            assert there is not None
            tables.append(there.to(self._rooms.device))
        return torch.cat(tables)[self._place]


def _bank(table: Tensor, spec: ModelSpec, up_bias: Tensor | None, gate_bias: Tensor | None) -> FfnBank:
    """Neurons [n, J, D] without what a whole layer's bank has beside them."""
    nothing = torch.empty(0)
    gate = table[:, 0] if spec.gated else None
    return FfnBank(spec.activation, gate, table[:, -2:], gate_bias, up_bias, None, nothing, nothing)


def _by_frequency(order: Tensor, frequency: Tensor | None) -> Tensor:
    """Numbers of this rank's neurons, the most frequent first, of equal ones as the checkpoint has them."""
    ascending = order.argsort()
    if frequency is None:
        return ascending
    return ascending[frequency[order[ascending]].argsort(descending=True, stable=True)]
