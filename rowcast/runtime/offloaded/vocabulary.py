"""Embedding and LM head in host memory: rows of the one are looked up there, those of the other are streamed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rowcast.kernels.linear import Linear
from rowcast.offload.host_store import HostBank
from rowcast.offload.streamer import HostPiece
from rowcast.runtime.loader import Loader
from rowcast.runtime.offloaded.parts import Ring, Table, fill_rows
from rowcast.runtime.offloaded.tiers import RESIDENT, STREAMED, Spans
from rowcast.runtime.spec import ModelSpec


class PlacedVocabulary:
    """Implements `VocabularyRows`. A tied table is placed once, as the LM head."""

    def __init__(self, spec: ModelSpec, load: Loader, head: Spans, embeddings: Spans, ring: Ring, device: torch.device) -> None:
        self._ring, self._device = ring, device
        span, whole = load.shard.vocabulary(spec), (spec.vocab_size, spec.embed_size)
        count = span.stop - span.start
        self._head = Table("head", head, count, spec.embed_size, ring, device)
        stem = f"{load.names.embed if spec.tied_embeddings else load.names.head}.weight"
        fill_rows(load, stem, self._head.outs, whole, span.start, prefixed=spec.tied_embeddings)
        self._lookup = _Lookup(self._head, device)
        if not spec.tied_embeddings:
            # Nothing is computed with them, so that there is nothing to stream: they are looked up wherever they lie.
            tier = RESIDENT if embeddings.all_resident else STREAMED
            table = Table("embedding", Spans(((tier, 0, 1, 1),)), count, spec.embed_size, ring, device)
            fill_rows(load, f"{load.names.embed}.weight", table.outs, whole, span.start)
            self._lookup = _Lookup(table, device)
        self.head_elements = count * spec.embed_size
        self.looked_up = 0 if spec.tied_embeddings else self.head_elements
        load.elements += self.head_elements + self.looked_up
        parts = self._head.parts
        self.rows: Tensor | None = parts[0][1] if len(parts) == 1 and isinstance(parts[0][1], Tensor) else None

    @property
    def pieces(self) -> list[HostPiece]:
        return self._head.pieces

    @property
    def asks_host(self) -> bool:
        """Whether looking rows up waits for the device."""
        return self._lookup.asks_host

    def lookup(self, ids: Tensor) -> Tensor:  # [T] -> [T, E]
        return self._lookup(ids)

    def product(self, x: Tensor) -> Tensor:  # [T, E] -> [T, V_local]
        return torch.cat([Linear(table, None)(x) for _, table in self._head.visit(self._ring)], 1)


class _Lookup:
    """Rows by number, of a table in parts."""

    def __init__(self, table: Table, device: torch.device) -> None:
        self._parts, self._device = table.held, device
        self.asks_host = any(isinstance(part, HostBank) and part.asks_host for _, part in self._parts)

    def __call__(self, ids: Tensor) -> Tensor:  # [T] -> [T, E]
        out: Tensor | None = None
        for span, part in self._parts:
            local = (ids - span.start).clamp_(0, span.stop - span.start - 1)
            found = self._fetch(part, local) if isinstance(part, HostBank) else F.embedding(local, part)
            ours = (ids >= span.start) & (ids < span.stop)
            out = found if out is None else torch.where(ours[:, None], found, out)
        assert out is not None
        return out

    def _fetch(self, bank: HostBank, ids: Tensor) -> Tensor:
        out = torch.empty((len(ids), bank.tensor.shape[1]), dtype=bank.tensor.dtype, device=self._device)
        bank.gather(ids.int(), torch.full((1,), len(ids), dtype=torch.int32, device=self._device), out)
        return out
