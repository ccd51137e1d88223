"""What is kept of each chunk of keys, so that chunks can be scored without reading them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rowcast.runtime.kv.places import take
from rowcast.runtime.kv.sizes import Summary


class Summaries:
    """Summaries of the full chunks of a paged store of keys, paged like it: [parts, layers, K, blocks, block_size / chunk, d].

    They exist for committed chunks only, so rollback needs no work: a chunk is summarised again when it is completed again.
    """

    def __init__(self, kind: Summary, stores: Sequence[tuple[slice, Tensor]], device: torch.device) -> None:
        """`stores`: keys [n, blocks, block_size, K, d] of neighbouring layers, of all in turn, blocks' entries being neighbours; some
        may lie in other memory, where their chunks are then summarised. Raises UserError where chunks do not fill blocks."""
        blocks, size, heads, width = stores[0][1].shape[1:]
        self.kind = kind
        self.per_block = kind.per_block(size)
        self._stores = [(layers, self._chunked(keys)) for layers, keys in stores]
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
            chunks = store[:, ids.to(store.device)]  # [layers, n, chunk, K, d]
            parts = (chunks.mean(2, dtype=torch.float32),) if self.kind.score == "mean" else chunks.aminmax(dim=2)
            for kept, part in zip(self.kept.flatten(3, 4), parts, strict=True):
                kept[layers, :, at] = part.to(kept.device, kept.dtype).transpose(1, 2)

    def read(self, heads: slice, where: slice | Tensor, count: int) -> tuple[Tensor, ...]:
        """The first `count` chunks of the blocks `where`: (mean,) or (min, max), [heads, count, d] each; KV heads are counted through
        all layers."""
        return tuple(take(kept[heads], 1, where).flatten(1, 2)[:, :count] for kept in self.kept.flatten(1, 2))
