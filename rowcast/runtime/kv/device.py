"""A KV view as a round on the device sees it: entries where they lie, found by tensors that the device itself keeps up to date."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from rowcast.kernels.gpu import decoding, rotate
from rowcast.runtime.kv.listed import ListedKV
from rowcast.runtime.protocols import DeviceKV, Rotation
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.step import SeqStep


@runtime_checkable
class DeviceStore(Protocol):
    """A view whose sequences stand in blocks of entries, at places that are their positions but for a number that is added."""

    spec: ModelSpec
    slopes: Tensor | None
    absolute_bias_scale: float | None
    block_size: int
    shares_entries: bool
    """Whether the committed entries are another view's: then it has nothing to catch up with."""

    @property
    def serves_device(self) -> bool:
        """Whether positions by place will do: where true ones count (windows, ALiBi), chosen entries have others."""
        ...

    def entries(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values, [blocks, block_size, K, d] at any strides but the last."""
        ...

    def reserve(self, step: SeqStep) -> tuple[list[int], int]:
        """Make room for the step's tokens as proposals, as `bind` does, for a pass that finds its places by itself.

        Returns the sequence's blocks, and what is added to a position to find an entry's place in them.
        """
        ...


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a pass's tokens go: B sequences of at most T tokens each."""

    tables: Tensor
    """[B, n] int32."""
    starts: Tensor
    """[B] int32: place of each sequence's first token."""
    counts: Tensor
    """[B] int32: tokens that it really has."""
    slots: Tensor
    """[B * T] int64: block * block_size + offset, -1 for tokens that are none."""
    most_entries: int
    """Bound of all places."""
    recents: Tensor | None = None
    """[B] int32: of a view that lists chunks, the position from which it shows everything."""


class BoundStore(DeviceKV):
    """What `Decoder.forward` needs of a `KVView`, over a store and a placement."""

    def __init__(
        self, store: DeviceStore, at: Placement, queries: Tensor | None = None, late: Tensor | int | None = None
    ) -> None:
        """`queries` [layers, B * T, H, d]: where rotated queries are left. `late`, of a single sequence: entries may be completed by
        later passes. A tensor, int32 [1]: by those of the round, which has at most 16 entries, from this place on; a number, at most
        8: by those of later rounds, whose passes have at most so many tokens. None: entries have to be complete."""
        self._store = store
        self._at = self.at = at
        self.late = late
        self._queries = queries
        self._lists = store.lists(len(at.starts)) if isinstance(store, ListedKV) else None

    def rotate_append(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> Tensor:
        if k.shape[1] == 0:  # written already, by a view that leaves some for later
            assert rotation is None and self._queries is None
            return q
        keys, values = self._store.entries(layer)
        out = None if self._queries is None else self._queries[layer]
        cos, sin = rotation or (None, None)
        return rotate.rotate_append(q, k, v, keys, values, self._at.slots, cos, sin, out=out)

    def entries(self, layer: int) -> tuple[Tensor, Tensor]:
        """The store's."""
        return self._store.entries(layer)

    def attend(self, layer: int, q: Tensor, heads: Tensor | None = None) -> Tensor:  # [B * T, H, d] -> [B * T, C, d]
        keys, values = self._store.entries(layer)
        store, at, chunks, shown = self._store, self._at, None, None
        if isinstance(store, ListedKV):
            assert self._lists is not None and at.recents is not None
            chunks, shown = decoding.Chunks(self._lists[:, layer], store.chunk, store.sinks, at.recents), store.most_shown
        return decoding.decode(
            q,
            keys,
            values,
            at.tables,
            at.starts,
            at.counts,
            scale=store.spec.attention_scale,
            most_entries=at.most_entries,
            most_shown=shown,
            window=store.spec.windows[layer],
            slopes=store.slopes,
            absolute_bias_scale=store.absolute_bias_scale,
            heads=heads,
            chunks=chunks,
        )
