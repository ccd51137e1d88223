"""The packed weight view of a model of which a part lies in host memory: sub-layers, whole, as they are packed, and vocabulary rows.

A plan may have a part of a sub-layer next to the compute; it is streamed whole then, as it is multiplied whole. Each product's codes,
scales and levels of 0 are one piece, which the ring copies ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rowcast.offload.host_store import HostStore
from rowcast.offload.row_cache import RowCounts
from rowcast.offload.streamer import HostPiece, Order, StreamCounts, Streamer
from rowcast.placement.constants import STREAM_BYTES
from rowcast.runtime.loader import Loader, Progress
from rowcast.runtime.offloaded.parts import Ring
from rowcast.runtime.offloaded.tiers import Tiers
from rowcast.runtime.offloaded.vocabulary import PlacedVocabulary
from rowcast.runtime.packed_sizes import PackedForms
from rowcast.runtime.packed_weights import (
    PackedLayer,
    PackedProduct,
    PackedWeights,
    Product,
    SeveralProducts,
    attention_products,
    mlp_products,
)
from rowcast.runtime.protocols import Comm, KVView, Source, Tokens
from rowcast.runtime.shard import Shard
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.weights import Outer

_ALIGNED = 256
_MOST_SLOTS = 4
_CPU = torch.device("cpu")


class StreamedProduct:
    """A product whose weight is in host memory. Implements `Product`."""

    def __init__(self, key: str, product: PackedProduct, streamer: Streamer, store: HostStore) -> None:
        """Takes its weight, on the CPU, over."""
        weight, self._streamer = product.weight, streamer
        self._bytes = product.bytes
        self._places: list[tuple[int, Tensor]] = []
        """Where each tensor begins, and an empty one like it."""
        size = 0
        for part in weight.tensors:
            self._places.append((size, torch.empty_like(part, device="meta")))
            size += -(-part.nbytes // _ALIGNED) * _ALIGNED
        bank = store.bank((size,), torch.uint8)
        for (start, like), part in zip(self._places, weight.tensors, strict=True):
            bank.tensor[start : start + like.nbytes].copy_(part.view(-1).view(torch.uint8))
        self._product = replace(product, weight=weight.with_tensors([like for _, like in self._places]))
        self.piece = HostPiece(key, bank.tensor)

    @property
    def bytes(self) -> int:
        return self._bytes

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        found = self._here()(x, residual)
        self._streamer.release(self.piece)
        return found

    def hidden(self, x: Tensor, activation: str, gated: bool) -> Tensor:
        found = self._here().hidden(x, activation, gated)
        self._streamer.release(self.piece)
        return found

    def _here(self) -> PackedProduct:
        """On the device, until the piece is released."""
        buffer = self._streamer.take(self.piece)
        parts = [buffer[at : at + like.nbytes].view(like.dtype).view(like.shape) for at, like in self._places]
        return replace(self._product, weight=self._product.weight.with_tensors(parts))


class OffloadedPacked(PackedWeights):
    """One rank's share of all weights by a plan's tiers. Implements `WeightView`."""

    on_device = False
    pool = None
    disk = None

    def __init__(
        self,
        spec: ModelSpec,
        source: Source,
        comm: Comm,
        forms: PackedForms,
        tiers: Tiers,
        *,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress | None = None,
    ) -> None:
        """Raises as `OffloadedBanks`. Precondition: all of the layers' matrices are packed and the LM head is not."""
        assert forms.head is None and all(form is not None for layer in forms.layers for form in layer)
        shard = Shard(comm.rank, comm.world)
        shard.check(spec)
        self.store = HostStore(device)
        self._tiers = tiers
        sizes = forms.sizes(spec, dtype.itemsize, comm.world)
        slot = max(forms.largest_bytes(spec, shard) + 4 * _ALIGNED, spec.embed_size * dtype.itemsize)
        budget = 2 * min(sizes.layer_bytes // spec.num_layers, STREAM_BYTES)
        self.streamer = Streamer(device, slots=max(2, min(_MOST_SLOTS, budget // slot)), slot_bytes=slot)
        self._device, self._dtype = device, dtype
        self._streamed: list[list[StreamedProduct]] = []
        """Of each layer, in the order of a pass."""
        super().__init__(spec, source, comm, forms, dtype=dtype, device=device, progress=progress)
        self._order = Order(self._pieces(1))

    def begin(self, tokens: Tokens, kv: KVView) -> None:
        super().begin(tokens, kv)
        self.streamer.begin(self._order)

    def repeat(self, times: int) -> None:
        """A layer's pieces stay in the ring meanwhile, as far as they have room; the LM head is asked once."""
        self.streamer.begin(Order(self._pieces(times)))

    def counts(self) -> tuple[StreamCounts, RowCounts]:
        """What came from host memory since the last call of this. Waits for the device."""
        return self.streamer.counts(), RowCounts()

    def close(self) -> None:
        """Give host memory back, once the device is done with it. Nothing may be asked of the view after that."""
        self.streamer.close()
        self.store.close()

    def _outer(self, load: Loader, comm: Comm, forms: PackedForms) -> Outer:
        ring = Ring(self.streamer, self.store, self._dtype)
        self._vocabulary = PlacedVocabulary(self.spec, load, self._tiers.head, self._tiers.embeddings, ring, self._device)
        return Outer(self.spec, load, comm, vocabulary=self._vocabulary)

    def _layer(self, load: Loader, forms: PackedForms, index: int) -> PackedLayer:
        streamed: list[StreamedProduct] = []

        def placed(here: bool, made: Sequence[Product], names: tuple[str, str]) -> Sequence[Product]:
            if here:
                return made
            return [from_host(f"{name} {index}", product) for name, product in zip(names, made, strict=True)]

        def from_host(key: str, product: Product) -> Product:
            if isinstance(product, SeveralProducts):
                return SeveralProducts([from_host(f"{key} {part}", each) for part, each in enumerate(product.parts)])
            assert isinstance(product, PackedProduct)
            streamed.append(StreamedProduct(key, product, self.streamer, self.store))
            return streamed[-1]

        attention_here = self._tiers.attention[index].all_resident
        mlp_here = self._tiers.neurons[index].all_resident
        attention = attention_products(load, self.spec, forms, index, None if attention_here else _CPU)
        attention_placed = placed(attention_here, attention, ("qkv", "out"))
        mlp = mlp_products(load, self.spec, forms, index, None if mlp_here else _CPU)
        mlp_placed = placed(mlp_here, mlp, ("up", "down"))
        self._streamed.append(streamed)
        return PackedLayer(*attention_placed, *mlp_placed)

    def _pieces(self, times: int) -> list[HostPiece]:
        layers = [piece for layer in self._streamed for piece in [product.piece for product in layer] * times]
        return [*layers, *self._vocabulary.pieces]


def packed_view(
    spec: ModelSpec, source: Source, comm: Comm, forms: PackedForms, tiers: Tiers | None, **how: Any
) -> PackedWeights:
    """All weights of a model as its checkpoint packs them, each where the plan has it. `how`: as `PackedWeights` takes it."""
    if tiers is None or tiers.weights_resident:
        return PackedWeights(spec, source, comm, forms, **how)
    return OffloadedPacked(spec, source, comm, replace(forms, head=None), tiers, **how)
