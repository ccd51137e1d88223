"""What is kept of each chunk of keys, so that chunks can be scored without reading them."""

from __future__ import annotations

import torch
from torch import Tensor

from rowcast.runtime.kv.places import take
from rowcast.runtime.kv.sizes import Summary


class Summaries:
    """Summaries of the full chunks of a paged store of keys, paged like it: [parts, layers, K, blocks, block_size / chunk, d].

    They exist for committed chunks only, so rollback needs no work: a chunk is summarised again when it is completed again.
    """

    def __init__(self, kind: Summary, keys: Tensor) -> None:
        """`keys` [layers, blocks, block_size, K, d]: the store. Raises UserError where chunks do not fill its blocks."""
        layers, blocks, size = keys.shape[:3]
        self.kind = kind
        self.per_block = kind.per_block(size)
        self._chunks = keys.view(layers, blocks * self.per_block, kind.chunk, *keys.shape[3:])
        shape = (kind.parts, layers, keys.shape[3], blocks, self.per_block, keys.shape[4])
        self.kept = torch.empty(shape, dtype=keys.dtype, device=keys.device)

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
        ids = torch.tensor([blocks[c // each] * each + c % each for c in full], device=self._chunks.device)
        chunks = self._chunks[:, ids]  # [layers, n, chunk, K, d]
        parts = (chunks.mean(2, dtype=torch.float32),) if self.kind.score == "mean" else chunks.aminmax(dim=2)
        for kept, part in zip(self.kept.flatten(3, 4), parts, strict=True):
            kept[:, :, ids] = part.to(kept.dtype).transpose(1, 2)

    def read(self, heads: slice, where: slice | Tensor, count: int) -> tuple[Tensor, ...]:
        """The first `count` chunks of the blocks `where`: (mean,) or (min, max), [heads, count, d] each; KV heads are counted through
        all layers."""
        return tuple(take(kept[heads], 1, where).flatten(1, 2)[:, :count] for kept in self.kept.flatten(1, 2))
