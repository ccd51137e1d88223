"""The weight view of a model of which a part lies in host memory: the bank layout, each row where the plan has it.

A pass over all rows streams each piece of the streamed tiers once, whatever its number of tokens, in the order of layers; the ring
goes on with the next pass's first pieces. Device memory holds what is resident, the ring and the pool of fetched rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto
from typing import Any, cast

import torch
from torch import Tensor

from rowcast.offload.cpu_side import CpuSide
from rowcast.offload.disk import DiskPiece, DiskReader
from rowcast.offload.host_store import HostStore
from rowcast.offload.peer_memory import PeerStore
from rowcast.offload.row_cache import RowCounts
from rowcast.offload.streamer import Order, Piece, StreamCounts, Streamer
from rowcast.runtime.banks import FEW_TOKENS, AttentionBank, BankWeights, FfnBank, attention_bank, ffn_bank
from rowcast.runtime.loader import Loader, Progress
from rowcast.runtime.offloaded.attention import PlacedAttention
from rowcast.runtime.offloaded.disk import DiskAttention, DiskFfn, DiskSource
from rowcast.runtime.offloaded.ffn import PlacedFfn, Pool, Rooms
from rowcast.runtime.offloaded.parts import Ring
from rowcast.runtime.offloaded.sizes import Buffers
from rowcast.runtime.offloaded.tiers import CPU, RESIDENT, ROWS, Spans, Tiers
from rowcast.runtime.offloaded.vocabulary import PlacedVocabulary
from rowcast.runtime.protocols import Comm, KVView, Source, Tokens
from rowcast.runtime.shard import Shard
from rowcast.runtime.sparse.artefact import Calibration
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.weights import HeadSplit, Outer

SLOTS = 4
"""Buffers of the ring."""

CPU_TOKENS = FEW_TOKENS
"""Most tokens of a pass for which the CPU computes its neurons: so many read a row once. With more its arithmetic takes longer than the
bus takes to bring the rows, which are pinned as all others are, so that passes over more tokens stream them."""


class _Pieces(Enum):
    """What a pass streams."""

    ALL = auto()
    """All that lies in host memory."""
    DEVICE = auto()
    """But what the CPU computes."""
    LIGHT = auto()
    """Nor of what rows are fetched."""


class OffloadedBanks(BankWeights):
    """One rank's share of all weights by a plan's tiers; runs all rows. Implements `WeightView`."""

    on_device = False
    """Copies are started by the host, piece by piece, so that no pass can be captured."""

    def __init__(
        self,
        spec: ModelSpec,
        source: Source,
        comm: Comm,
        tiers: Tiers,
        buffers: Buffers,
        *,
        dtype: torch.dtype,
        device: torch.device,
        calibration: Calibration | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> None:
        """`calibration`: how often neurons are needed; it has to be the plan's. `seed`: of the order of neurons. Raises UserError as
        `DenseWeights` does, OutOfMemoryError where host memory is short."""
        self.spec = spec
        self.shard = shard = Shard(comm.rank, comm.world)
        shard.check(spec)
        self.store = HostStore(device)
        load = Loader(spec, source, shard, dtype, device, progress)
        width = dtype.itemsize
        row_bytes = max(3 * spec.hidden_size, spec.embed_size, spec.intermediate_size * tiers.on_disk) * width
        slot_bytes = max(buffers.ring_bytes // SLOTS, row_bytes)
        self.streamer = Streamer(device, slots=SLOTS, slot_bytes=slot_bytes)
        self._streams = buffers.ring_bytes > 0
        """Whether the plan has buffers for it."""
        self._ring = ring = Ring(self.streamer, self.store, dtype)
        self.disk = DiskReader(self.store, self.streamer.slot_bytes) if tiers.on_disk else None
        """What reads the layers that are there; None: none is."""
        disk = None if self.disk is None else DiskSource(source, load, self.disk, ring)
        vocabulary = PlacedVocabulary(spec, load, tiers.head, tiers.embeddings, ring, device)
        self.outer = Outer(spec, load, comm, vocabulary=vocabulary)
        inside = load.elements
        self.split = HeadSplit(spec, load)
        layers = range(spec.num_layers)
        placed = [layer for layer in layers if ROWS in tiers.neurons[layer].tiers]
        resident = sum(_rows(tiers.neurons[layer], RESIDENT, spec, shard) for layer in placed)
        self.pool = self._pool(buffers, len(placed), resident, device, dtype) if placed else None
        side = None
        if any(CPU in tiers.neurons[layer].tiers for layer in layers):
            side = CpuSide(self.store, CPU_TOKENS, spec.hidden_size, dtype)
        peer_store = PeerStore(device) if tiers.peers else None
        self._rooms = rooms = Rooms(ring, device, self.pool, side, tiers.peers, peer_store)
        each = 0 if self.pool is None else (self.pool.rows.first - resident) // len(placed)
        # Where nothing of a layer lies elsewhere its banks are those of any other model.
        self.attention = cast(list[AttentionBank], [])
        self.ffn = cast(list[FfnBank], [])
        for i in layers:
            spans = tiers.attention[i]
            attention: Any = attention_bank(load, spec, i, self.split) if spans.all_resident else None
            if attention is None and spans.on_disk:
                assert disk is not None
                attention = DiskAttention(load, spec, i, disk)
                load.elements += attention.nbytes // width
            if attention is None:
                attention = PlacedAttention(load, spec, i, self.split, spans, ring, device)
                load.elements += attention.nbytes // width
            self.attention.append(attention)
            neurons = tiers.neurons[i]
            ffn: Any = ffn_bank(load, spec, i, seed, device, dtype) if neurons.all_resident else None
            if ffn is None and neurons.on_disk:
                assert disk is not None
                ffn = DiskFfn(load, spec, i, disk)
                load.elements += ffn.nbytes // width
            if ffn is None:
                ffn = PlacedFfn(load, spec, i, seed, neurons, _frequency(spec, calibration, i), rooms, each)
            self.ffn.append(ffn)
        self._placed = [bank for bank in cast(list[Any], self.ffn) if isinstance(bank, PlacedFfn)]
        self._orders = {which: Order(self._pieces(which)) for which in _Pieces}
        if self.disk is not None:
            self.disk.begin(piece for piece in self._pieces(_Pieces.ALL) if isinstance(piece, DiskPiece))
        self.outer_bytes = self.outer.elements * width
        self.bytes = self.outer_bytes + (load.elements - inside) * width
        self._passes = 0
        self._which = _Pieces.DEVICE
        """Of the pass that runs."""
        self.embed, self.norm_of, self.head = self.outer.embed, self.outer.norm_of, self.outer.head

    def begin(self, tokens: Tokens, kv: KVView) -> None:
        super().begin(tokens, kv)
        self.stream(len(tokens.ids))

    def stream(self, tokens: int, *, rows: bool = False) -> None:
        """A pass over so many tokens starts; with `rows`, one that fetches rows where the plan has them fetched."""
        many = tokens > CPU_TOKENS and self._streams
        for bank in self._placed:
            bank.streams_all = many
        self._which = _Pieces.LIGHT if rows else _Pieces.ALL if many else _Pieces.DEVICE
        self.streamer.begin(self._orders[self._which])

    def repeat(self, times: int) -> None:
        """A layer's pieces stay in the ring meanwhile, as far as they have room; the LM head is asked once."""
        found = [piece for layer in range(self.spec.num_layers) for piece in self._layer(layer, self._which) * times]
        self.streamer.begin(Order(found + self._head_pieces()))

    def counts(self) -> tuple[StreamCounts, RowCounts]:
        """What came from host memory since the last call of this: pieces, rows. Waits for the device."""
        return self.streamer.counts(), RowCounts() if self.pool is None else self.pool.rows.counts()

    def qkv(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [T, D] -> [T, H, d], [T, K, d], [T, K, d]
        bank: Any = self.attention[layer]
        if isinstance(bank, PlacedAttention | DiskAttention):
            return self.split.apart(layer, bank.qkv(x))
        return super().qkv(layer, x)

    def mlp(self, layer: int, x: Tensor, residual: Tensor | None = None) -> Tensor:  # [T, D] -> [T, D]
        bank: Any = self.ffn[layer]
        if isinstance(bank, PlacedFfn | DiskFfn):
            return bank.mlp(x, residual)
        return super().mlp(layer, x, residual)

    @property
    def streams_outer(self) -> bool:
        """Whether a pass has the host bring rows of the LM head or of the embedding."""
        vocabulary = self.outer.vocabulary
        assert isinstance(vocabulary, PlacedVocabulary)
        return bool(vocabulary.pieces) or vocabulary.asks_host

    def close(self) -> None:
        """Give host memory back, once the device is done with it. Nothing may be asked of the view after that."""
        if self.disk is not None:
            self.disk.close()
        self.streamer.close()
        self.store.close()

    def _pieces(self, which: _Pieces) -> Sequence[Piece]:
        """In the order of a pass."""
        return [piece for layer in range(self.spec.num_layers) for piece in self._layer(layer, which)] + self._head_pieces()

    def _layer(self, layer: int, which: _Pieces) -> list[Piece]:
        attention: Any = self.attention[layer]
        ffn: Any = self.ffn[layer]
        found: list[Piece] = [*attention.pieces] if isinstance(attention, PlacedAttention | DiskAttention) else []
        if isinstance(ffn, DiskFfn):
            return [*found, *ffn.pieces]
        if isinstance(ffn, PlacedFfn):
            found += ffn.streamed
            found += ffn.fetched if which is not _Pieces.LIGHT else []
            found += ffn.at_cpu if which is _Pieces.ALL else []
        return found

    def _head_pieces(self) -> list[Piece]:
        vocabulary = self.outer.vocabulary
        assert isinstance(vocabulary, PlacedVocabulary)
        return [*vocabulary.pieces]

    def _pool(self, buffers: Buffers, layers: int, resident: int, device: torch.device, dtype: torch.dtype) -> Pool:
        spec, count = self.spec, 3 if self.spec.gated else 2
        row = count * spec.hidden_size * dtype.itemsize
        neurons = spec.intermediate_size // self.shard.world + 1
        buffer = min(neurons, max(1, buffers.rows_bytes // row))
        kept = min(neurons, buffers.cache_bytes // row // layers) * layers
        first = resident + kept
        rows = torch.empty(first + buffer, count, spec.hidden_size, dtype=dtype, device=device)
        return Pool(spec, rows, slice(first, first + buffer))


def _rows(spans: Spans, tier: str, spec: ModelSpec, shard: Shard) -> int:
    """Of this rank's neurons of a layer."""
    span = shard.span(spec.intermediate_size)
    return sum(rows.stop - rows.start for rows in spans.rows(tier, span.stop - span.start))


def _frequency(spec: ModelSpec, calibration: Calibration | None, layer: int) -> Tensor | None:
    name = f"layers.{layer}.frequency"
    if calibration is None or name not in calibration:
        return None
    return calibration.tensor(name, (spec.intermediate_size,)).float()
