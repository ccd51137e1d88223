"""One layer's neurons over the tiers of a plan.

Neurons have two orders. By number they stand in the bank layout's, the seeded permutation that selectors cut into shards; so which
neurons a token uses does not depend on where they lie. In memory they stand tier by tier, within each from the most frequent one on
(without a calibration, as the checkpoint has them). A neuron's rows (gate,) up and down are neighbours everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from rowcast.offload.cpu_side import CpuSide
from rowcast.offload.host_store import HostBank, HostStore
from rowcast.offload.peer_memory import PeerStore
from rowcast.offload.row_cache import CachedBank, RowPool
from rowcast.offload.streamer import HostPiece
from rowcast.runtime.banks import FfnBank, neuron_order
from rowcast.runtime.loader import Loader
from rowcast.runtime.offloaded.parts import Ring
from rowcast.runtime.offloaded.tiers import CPU, RESIDENT, ROWS, STREAMED, Spans
from rowcast.runtime.row_blocks import BLOCK_BYTES
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.weights import plus

DEALT_BYTES = 8 * BLOCK_BYTES
"""Left free on the device beside tables that are put together there: for blocks, turned, and the rows chosen of them."""


@dataclass(frozen=True, slots=True)
class Rooms:
    """What the layers of a view share."""

    ring: Ring
    device: torch.device
    pool: Pool | None = None
    """Where rows are fetched to; None: no layer has any to fetch."""
    cpu: CpuSide | None = None
    """None: the CPU computes nothing."""
    peers: frozenset[int] = frozenset()
    """Layers whose rows lie in another GPU's memory."""
    peer_store: PeerStore | None = None
    """Of that."""


class Pool:
    """Neurons on the device [P, J, D] of all layers that fetch some: those that are there for good, those that are kept for a time, and
    a buffer; with the biases of those that lie there. So one table has all neurons of a token."""

    def __init__(self, spec: ModelSpec, rows: Tensor, buffer: slice) -> None:
        biases = [rows.new_zeros(len(rows)) for _ in range((1 + spec.gated) * spec.mlp_bias)]
        self.rows = RowPool(rows, buffer, biases)
        self._taken = 0
        self.bank = _bank(rows, spec, *(*biases, None, None)[:2])

    def room(self, rows: int) -> slice:
        """The next so many rows."""
        first = self._taken
        self._taken += rows
        assert self._taken <= self.rows.first
        return slice(first, self._taken)

    def hold(self, rows: slice, biases: Sequence[Tensor]) -> None:
        """These are there for good, with such biases."""
        for held, given in zip(self.rows.values, biases, strict=True):
            held[rows] = given


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
        self.logical = logical.to(device)
        """[N] int64: neurons' numbers in the order of memory."""
        self.place = torch.empty_like(logical).index_copy_(0, logical, torch.arange(count)).to(device)
        """[N] int64: the opposite."""
        self._load(load, index, sizes, self.order[logical])
        self.down_bias = load.part_bias(names.down.format(index)) if spec.mlp_bias else None
        self._resident = self._of(self._table, self._spans[RESIDENT])
        pieces = rooms.ring.pieces
        self._streamed = [] if self._away is None else pieces(f"{index} mlp", self._away, self._spans[STREAMED].start)
        self._fetched = [] if self._rows is None else pieces(f"{index} mlp", self._rows, self._spans[ROWS].start)
        self._there = [] if self._at_cpu is None else pieces(f"{index} mlp", self._at_cpu, self._spans[CPU].start)
        self.cached: CachedBank | None = None
        """Where a pass reaches any of the resident and the fetched ones, in the pool; None: none are fetched."""
        if self._rows is not None and rooms.pool is not None:
            row = self.place - self._spans[ROWS].start
            fetched = (row >= 0) & (row < sizes[ROWS])
            others = torch.where(self.place < sizes[RESIDENT], self.place + self._first, 0)  # 0: those that nobody asks for here
            self.cached = rooms.pool.rows.add(
                self._rows,
                rooms.pool.room(min(cache_rows, sizes[ROWS])),
                rows=row.clamp(0, sizes[ROWS] - 1),
                fixed=torch.where(fetched, -1, others),
                values=[bias[self.place] for bias in self._biases],
            )
        self.streams_all = False
        """In passes over all neurons the CPU's are streamed, too."""
        self._reached: tuple[Tensor, Tensor] | None = None
        """Rows that were just asked for, and where they lie."""

    # What a bank says of itself.

    @property
    def up_down(self) -> Tensor:
        """[n, 2, D] of the resident ones."""
        return self._resident.up_down

    @property
    def gated(self) -> bool:
        return self.spec.gated

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
        return None if self._up_bias is None else self._up_bias[self.place]

    @property
    def gate_bias(self) -> Tensor | None:
        """By number."""
        return None if self._gate_bias is None else self._gate_bias[self.place]

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

    @property
    def at_cpu(self) -> list[HostPiece]:
        """Pieces that passes over many tokens stream, of others the CPU computes."""
        return [piece.held for piece in self._there]

    @property
    def pool(self) -> Pool | None:
        """Where `cached` finds them."""
        return self._rooms.pool

    @property
    def room(self) -> int:
        """Most rows that one call is sure to reach."""
        return 0 if self.cached is None else self.cached.room

    @property
    def on_device(self) -> bool:
        """Whether few tokens' neurons can be reached without the host."""
        return (
            self.cached is not None
            and self._rows is not None
            and not self._rows.asks_host
            and not self._streamed
            and self._cpu is None
        )

    # Products.

    def mlp(self, x: Tensor, residual: Tensor | None = None, own: Tensor | None = None) -> Tensor:
        """All neurons, or each token's `own`, bool [T, N] by number: x [T, D] -> [T, D], plus a residual."""
        own = None if own is None else own.index_select(1, self.logical)
        return self._run(x, lambda: self._all(), residual, own)

    def chosen(self, x: Tensor, ids: Tensor, own: Tensor | None, residual: Tensor | None = None) -> Tensor:
        """The neurons `ids` [C] int64, of which each token has its `own`, bool [T, C] (None: all): x [T, D] -> [T, D]."""
        return self._run(x, lambda: self._some(ids), residual, own)

    def hidden(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        """Activations of the chosen neurons (None: all, by number): x [T, D], ids [C] -> [T, C]."""
        out = x.new_empty(len(x), len(self.order) if ids is None else len(ids))
        sent = x.cpu() if self._cpu is not None and not self.streams_all else x
        for bank, columns, rows, on_cpu in self._all() if ids is None else self._some(ids):
            found = bank.hidden(sent if on_cpu else x, rows).to(out.device)
            if isinstance(columns, slice):
                out[:, columns] = found
            else:
                out.index_copy_(1, columns, found)
        return out if ids is not None else out.index_select(1, self.place)

    def out(self, hidden: Tensor, ids: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """Their part of the output: hidden [T, C] -> [T, D]."""
        given = hidden.index_select(1, self.logical) if ids is None else hidden
        y = residual if self.down_bias is None else plus(self.down_bias.expand(len(hidden), -1).clone(), residual)
        for bank, columns, rows, on_cpu in self._all() if ids is None else self._some(ids):
            some = given[:, columns]
            y = plus(bank.out(some.cpu(), rows).to(hidden.device), y) if on_cpu else bank.out(some, rows, y)
        assert y is not None
        return y

    def score(self, hidden: Tensor, ids: Tensor | None = None, norms: Tensor | None = None) -> Tensor:
        """As `FfnBank.score`."""
        norms = self.norms if norms is None else norms
        return hidden.float().abs().mul_(norms if ids is None else norms[ids])

    def overflows(self, ids: Tensor) -> bool:
        """Whether more of these have to be fetched than there is room for."""
        pool = self._rooms.pool
        if self.cached is None or pool is None or len(ids) <= pool.rows.capacity:
            return False
        span, at = self._spans[ROWS], self.place[ids]
        return int(((at >= span.start) & (at < span.stop)).sum()) > pool.rows.capacity

    def passing(self) -> Iterator[tuple[slice, FfnBank]]:
        """All neurons, where `on_device` is, in the order of memory: those resident, then the others through the pool's buffer, each
        part until the next. Asks the device nothing; what the cache keeps stays. The output's bias is in no part."""
        assert self.pool is not None and self._rows is not None
        if len(self._resident.up_down):
            yield self._spans[RESIDENT], self._resident
        span, buffer = self._spans[ROWS], self.pool.rows.buffer
        for start in range(span.start, span.stop, len(buffer)):
            columns = slice(start, min(start + len(buffer), span.stop))
            ids = torch.arange(columns.start - span.start, columns.stop - span.start, dtype=torch.int32, device=buffer.device)
            number = torch.full((1,), len(ids), dtype=torch.int32, device=buffer.device)
            self._rows.gather(ids, number, buffer[: len(ids)])
            yield columns, self._of(buffer[: len(ids)], columns)

    # Where they lie.

    def _run(self, x: Tensor, visits: Callable[[], Iterator[_Visit]], residual: Tensor | None, own: Tensor | None) -> Tensor:
        """Activations and their part of the output, visit by visit, in the order of memory; the CPU's part is added last."""
        side = self._rooms.cpu if self._cpu is not None and not self.streams_all else None
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
        for piece in (*self._streamed, *self._fetched, *(self._there if self.streams_all else ())):
            with self._rooms.ring.taken(piece) as table:
                yield _Visit(self._of(table, piece.rows), piece.rows)
        if self._cpu is not None and not self.streams_all:
            yield _Visit(self._cpu, self._spans[CPU], on_cpu=True)

    def _some(self, ids: Tensor) -> Iterator[_Visit]:
        at = self.place[ids]

        def inside(*spans: slice) -> Tensor:
            found = torch.zeros_like(at, dtype=torch.bool)
            for span in spans:
                found |= (at >= span.start) & (at < span.stop)
            return found.nonzero()[:, 0]

        if self.cached is None:
            columns = inside(self._spans[RESIDENT])
            if len(columns):
                yield _Visit(self._resident, columns, at[columns])
        else:
            columns = inside(self._spans[RESIDENT], self._spans[ROWS])
            if len(columns):
                yield self._pooled(ids, columns)
        for piece in self._streamed:
            with self._rooms.ring.taken(piece) as table:
                columns = inside(piece.rows)
                if len(columns):
                    yield _Visit(self._of(table, piece.rows), columns, at[columns] - piece.rows.start)
        columns = inside(self._spans[CPU])
        if self._cpu is not None and (len(columns) or self._rooms.device.type == "cpu"):
            yield _Visit(self._cpu, columns, (at[columns] - self._spans[CPU].start).cpu(), on_cpu=True)

    def _pooled(self, ids: Tensor, columns: Tensor) -> _Visit:
        """Those of them that lie in the pool or come there; once for activations and output of the same ids."""
        assert self.cached is not None and self._rooms.pool is not None
        if self._reached is None or self._reached[0] is not ids:
            self._reached = ids, self.cached.reach(ids[columns]).long()
        return _Visit(self._rooms.pool.bank, columns, self._reached[1])

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
        self._first = 0
        """Of the resident ones, in the pool."""
        if rooms.pool is not None and sizes[ROWS]:
            room = rooms.pool.room(sizes[RESIDENT])
            self._first, self._table = room.start, rooms.pool.rows.rows[room]
        else:
            self._table = torch.empty((sizes[RESIDENT], *shape), dtype=ring.dtype, device=device)
        stores: dict[str, HostStore | PeerStore] = dict.fromkeys((STREAMED, ROWS, CPU), ring.store)
        if index in rooms.peers and rooms.peer_store is not None:
            stores[ROWS] = rooms.peer_store
        banks = {tier: store.bank((sizes[tier], *shape), ring.dtype) for tier, store in stores.items() if sizes[tier]}
        self._away: HostBank | None = banks.get(STREAMED)
        self._rows: HostBank | None = banks.get(ROWS)
        self._at_cpu: HostBank | None = banks.get(CPU)
        # What is made on the device is put together there.
        staged = _staged(banks, device) if load.made == device and device.type != "cpu" else {}
        tables = {RESIDENT: self._table} | {tier: staged.get(tier, bank.tensor) for tier, bank in banks.items()}
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
        if rooms.pool is not None and sizes[ROWS]:
            count = sizes[RESIDENT]
            rooms.pool.hold(slice(self._first, self._first + count), [each[:count] for each in self._biases])
        lengths = [torch.linalg.vector_norm(table[:, -1], dim=1, dtype=torch.float32).to(device) for table in tables.values()]
        for tier, table in staged.items():
            banks[tier].tensor.copy_(table)
        norms = torch.empty(len(order), device=device)
        for tier, found in zip(tables, lengths, strict=True):
            norms[self._spans[tier]] = found
        self.norms = norms[self.place]
        """[N] float32, by number: length of each neuron's column of the down projection."""
        self._cpu: FfnBank | None = None
        if CPU in banks:
            there = self._of(banks[CPU].tensor, self._spans[CPU])
            up, gate = (None if each is None else each.cpu() for each in (there.up_bias, there.gate_bias))
            self._cpu = replace(there, up_bias=up, gate_bias=gate)

    @property
    def _biases(self) -> list[Tensor]:
        """In the order of memory, as a pool has them."""
        return [bias for bias in (self._up_bias, self._gate_bias) if bias is not None]

    def _assembled(self, row: int) -> Tensor:
        """One row of each neuron, by number."""
        tables = [self._table[:, row]]
        tables += [bank.tensor[:, row].to(self._rooms.device) for bank in (self._away, self._rows) if bank is not None]
        if self._cpu is not None:
            there = self._cpu.down if row == -1 else self._cpu.up if row == -2 else self._cpu.gate
            assert there is not None
            tables.append(there.to(self._rooms.device))
        return torch.cat(tables)[self.place]


def _staged(banks: Mapping[str, HostBank], device: torch.device) -> dict[str, Tensor]:
    """Tables on the device in which to put these together; none where it has no room for all of them, as for the last layers of a card
    that gets full: they are then filled in host memory."""
    try:
        tables = {tier: torch.empty_like(bank.tensor, device=device) for tier, bank in banks.items()}
        torch.empty(DEALT_BYTES, dtype=torch.uint8, device=device)
        return tables
    except torch.OutOfMemoryError:
        return {}


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
