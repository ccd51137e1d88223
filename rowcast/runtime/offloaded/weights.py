"""The weight view of a model of which a part lies in host memory: the bank layout, each row where the plan has it.

A pass over all rows streams each piece of the streamed tiers once, whatever its number of tokens, in the order of layers; the ring
goes on with the next pass's first pieces. Device memory holds what is resident, the ring and the pool of fetched rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from rowcast.offload.cpu_side import CpuSide
from rowcast.offload.host_store import HostStore
from rowcast.offload.row_cache import RowCounts
from rowcast.offload.streamer import HostPiece, Order, StreamCounts, Streamer
from rowcast.runtime.banks import AttentionBank, BankWeights, FfnBank, attention_bank, ffn_bank
from rowcast.runtime.loader import Loader, Progress
from rowcast.runtime.offloaded.attention import PlacedAttention
from rowcast.runtime.offloaded.ffn import PlacedFfn, Pool, Rooms
from rowcast.runtime.offloaded.parts import Ring
from rowcast.runtime.offloaded.sizes import Buffers
from rowcast.runtime.offloaded.tiers import CPU, ROWS, Tiers
from rowcast.runtime.offloaded.vocabulary import PlacedVocabulary
from rowcast.runtime.protocols import Comm, KVView, Source, Tokens
from rowcast.runtime.shard import Shard
from rowcast.runtime.sparse.artefact import Calibration
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.weights import HeadSplit, Outer

SLOTS = 4
"""Buffers of the ring."""

CPU_TOKENS = 64
"""Tokens whose way to the CPU hides under computing."""


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
        slot_bytes = max(buffers.ring_bytes // SLOTS, spec.hidden_size * 3 * width, spec.embed_size * width)
        self.streamer = Streamer(device, slots=SLOTS, slot_bytes=slot_bytes)
        self._ring = ring = Ring(self.streamer, self.store, dtype)
        vocabulary = PlacedVocabulary(spec, load, tiers.head, tiers.embeddings, ring, device)
        self.outer = Outer(spec, load, comm, vocabulary=vocabulary)
        inside = load.elements
        self.split = HeadSplit(spec, load)
        layers = range(spec.num_layers)
        placed = [layer for layer in layers if ROWS in tiers.neurons[layer].tiers]
        self.pool = self._pool(buffers, len(placed), device, dtype) if placed else None
        side = None
        if any(CPU in tiers.neurons[layer].tiers for layer in layers):
            side = CpuSide(self.store, CPU_TOKENS, spec.hidden_size, dtype)
        self._rooms = rooms = Rooms(ring, device, self.pool, side)
        each = 0 if self.pool is None else self.pool.rows.first // len(placed)
        # Where nothing of a layer lies elsewhere its banks are those of any other model.
        self.attention = cast(list[AttentionBank], [])
        self.ffn = cast(list[FfnBank], [])
        for i in layers:
            spans = tiers.attention[i]
            attention: Any = attention_bank(load, spec, i, self.split) if spans.all_resident else None
            if attention is None:
                attention = PlacedAttention(load, spec, i, self.split, spans, ring, device)
                load.elements += attention.nbytes // width
            self.attention.append(attention)
            neurons = tiers.neurons[i]
            ffn: Any = ffn_bank(load, spec, i, seed, device, dtype) if neurons.all_resident else None
            if ffn is None:
                ffn = PlacedFfn(load, spec, i, seed, neurons, _frequency(spec, calibration, i), rooms, each)
            self.ffn.append(ffn)
        self._all = Order(self._pieces(fetched=True))
        self._light = Order(self._pieces(fetched=False))
        self.outer_bytes = self.outer.elements * width
        self.bytes = self.outer_bytes + (load.elements - inside) * width
        self._passes = 0
        self.embed, self.norm, self.head = self.outer.embed, self.outer.norm, self.outer.head

    def begin(self, tokens: Tokens, kv: KVView) -> None:
        super().begin(tokens, kv)
        self.stream()

    def stream(self, *, rows: bool = False) -> None:
        """A pass starts; with `rows`, one that fetches rows where the plan has them fetched."""
        self.streamer.begin(self._light if rows else self._all)

    def repeat(self, times: int) -> None:
        """A layer's pieces stay in the ring meanwhile, as far as they have room; the LM head is asked once."""
        found = [piece for layer in range(self.spec.num_layers) for piece in self._layer(layer, fetched=True) * times]
        self.streamer.begin(Order(found + self._head_pieces()))

    def counts(self) -> tuple[StreamCounts, RowCounts]:
        """What came from host memory since the last call of this: pieces, rows. Waits for the device."""
        return self.streamer.counts(), RowCounts() if self.pool is None else self.pool.rows.counts()

    def qkv(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [T, D] -> [T, H, d], [T, K, d], [T, K, d]
        bank: Any = self.attention[layer]
        if isinstance(bank, PlacedAttention):
            return self.split.apart(layer, bank.qkv(x))
        return super().qkv(layer, x)

    def mlp(self, layer: int, x: Tensor, residual: Tensor | None = None) -> Tensor:  # [T, D] -> [T, D]
        bank: Any = self.ffn[layer]
        if isinstance(bank, PlacedFfn):
            return bank.mlp(x, residual)
        return super().mlp(layer, x, residual)

    def close(self) -> None:
        """Give host memory back, once the device is done with it. Nothing may be asked of the view after that."""
        self.streamer.close()
        self.store.close()

    def _pieces(self, *, fetched: bool) -> Sequence[HostPiece]:
        """In the order of a pass; `fetched`: with those of which other passes fetch rows."""
        found = [piece for layer in range(self.spec.num_layers) for piece in self._layer(layer, fetched=fetched)]
        return found + self._head_pieces()

    def _layer(self, layer: int, *, fetched: bool) -> list[HostPiece]:
        attention: Any = self.attention[layer]
        ffn: Any = self.ffn[layer]
        found = attention.pieces if isinstance(attention, PlacedAttention) else []
        if isinstance(ffn, PlacedFfn):
            found = found + ffn.streamed + (ffn.fetched if fetched else [])
        return found

    def _head_pieces(self) -> list[HostPiece]:
        vocabulary = self.outer.vocabulary
        assert isinstance(vocabulary, PlacedVocabulary)
        return vocabulary.pieces

    def _pool(self, buffers: Buffers, layers: int, device: torch.device, dtype: torch.dtype) -> Pool:
        spec, count = self.spec, 3 if self.spec.gated else 2
        row = count * spec.hidden_size * dtype.itemsize
        neurons = spec.intermediate_size // self.shard.world + 1
        buffer = min(neurons, max(1, buffers.rows_bytes // row))
        kept = min(neurons, buffers.cache_bytes // row // layers) * layers
        rows = torch.empty(kept + buffer, count, spec.hidden_size, dtype=dtype, device=device)
        return Pool(spec, rows, slice(kept, kept + buffer))


def _frequency(spec: ModelSpec, calibration: Calibration | None, layer: int) -> Tensor | None:
    name = f"layers.{layer}.frequency"
    if calibration is None or name not in calibration:
        return None
    return calibration.tensor(name, (spec.intermediate_size,)).float()
