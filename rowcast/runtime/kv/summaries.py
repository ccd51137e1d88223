"""What is kept of each chunk of keys, so that chunks can be scored without reading them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rowcast.runtime.kv.places import take
from rowcast.runtime.kv.sizes import Summary

Fetch = Callable[[Tensor, slice, int], Tensor]
"""Keys of other memory: entries [n] of a layer, a slice of KV heads counted through all layers, entries to a chunk, of which these are
whole ones -> [heads, n, d], on the device."""

FETCHED_BYTES = 64 << 20
"""Of keys, at once."""


class Summaries:
    """Summaries of the full chunks of a paged store of keys, paged like it: [parts, layers, K, blocks, block_size / chunk, d].

    They exist for committed chunks only, so rollback needs no work: a chunk is summarised again when it is completed again.
    """

    def __init__(
        self, kind: Summary, stores: Sequence[tuple[slice, Tensor]], device: torch.device, fetch: Fetch | None = None
    ) -> None:
        """`stores`: keys [n, blocks, block_size, K, d] of neighbouring layers, of all in turn, blocks' entries being neighbours; some
        may lie in other memory. `fetch` brings chunks from there; None: they are summarised where they are. Raises UserError where
        chunks do not fill blocks."""
        blocks, size, heads, width = stores[0][1].shape[1:]
        self.kind = kind
        self.per_block = kind.per_block(size)
        self._stores = [(layers, self._chunked(keys)) for layers, keys in stores]
        self._fetch = fetch
        shape = (kind.parts, sum(len(keys) for _, keys in stores), heads, blocks, self.per_block, width)
        self.kept = torch.empty(shape, dtype=stores[0][1].dtype, device=device)

    def _chunked(self, keys: Tensor) -> Tensor:
        # [n, blocks, block_size, K, d] -> [n, chunks, chunk, K, d], in place
        layers, blocks, _, *rest = keys.shape
        return keys.view(layers, blocks * self.per_block, self.kind.chunk, *rest)

    @property
    def bytes(self) -> int:
        """Bytes of all summaries."""
        return self.kept.numel() * self.kept.element_size()

    def update(self, blocks: list[int], old: int, new: int) -> None:
        """A sequence with this block table has grown from `old` to `new` committed tokens: summarise the chunks completed by that."""
        each = self.per_block
        full = range(old // self.kind.chunk, new // self.kind.chunk)
        if not full:
            return
        ids = torch.tensor([blocks[c // each] * each + c % each for c in full])
        at = ids.to(self.kept.device)
        for layers, store in self._stores:
            if self._fetch is None or store.device == self.kept.device:
                self._summarise(layers, at, store[:, ids.to(store.device)])
                continue
            heads, size = store.shape[3], store[0, 0].nbytes
            step = max(1, FETCHED_BYTES // (size * len(full)))
            for first in range(layers.start, layers.stop, step):
                some = slice(first, min(first + step, layers.stop))
                for part in torch.split(at, max(1, FETCHED_BYTES // size)):
                    entries = part[:, None] * self.kind.chunk + torch.arange(self.kind.chunk, device=at.device)
                    found = self._fetch(entries.flatten(), slice(some.start * heads, some.stop * heads), self.kind.chunk)
                    found = found.view(some.stop - some.start, heads, len(part), self.kind.chunk, -1)
                    self._summarise(some, part, found.permute(0, 2, 3, 1, 4))

    def _summarise(self, layers: slice, at: Tensor, chunks: Tensor) -> None:
        # at [n]: where the summaries of chunks [layers, n, chunk, K, d] go
        parts = (chunks.mean(2, dtype=torch.float32),) if self.kind.score == "mean" else chunks.aminmax(dim=2)
        for kept, part in zip(self.kept.flatten(3, 4), parts, strict=True):
            kept[layers, :, at] = part.to(kept.device, kept.dtype).transpose(1, 2)

    def read(self, heads: slice, where: slice | Tensor, count: int) -> tuple[Tensor, ...]:
        """The first `count` chunks of the blocks `where`: (mean,) or (min, max), [heads, count, d] each; KV heads are counted through
        all layers."""
        return tuple(take(kept[heads], 1, where).flatten(1, 2)[:, :count] for kept in self.kept.flatten(1, 2))
