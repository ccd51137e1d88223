"""The full KV view: a paged store of keys and values, a page being a block of positions of one sequence in all layers.

Who gets which block is the scheduler's business (`blocks`); this module puts entries where the block tables say and reads them
back. It does not allocate after it was made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rowcast.kernels.attention import attend
from rowcast.runtime.shard import Shard
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.step import SeqStep


@dataclass(slots=True)
class _Bound:
    """One sequence's part of the bound pass."""

    seq_id: int
    proposed: int
    """Tokens of this pass that are not committed yet."""
    first: int
    """Its tokens are rows first, first + 1, ... of the pass."""
    tokens: int
    length: int
    """Entries that the last of its tokens sees: committed ones and this pass's."""
    span: slice | None
    """Its entries in the store where its blocks are neighbours, so that they can be read in place."""
    blocks: Tensor | None
    """Otherwise: its block table [n]."""


class PagedKV:
    """Keys and values of all layers, [layers, blocks, block_size, K, d] each. Implements `KVView`."""

    def __init__(
        self, spec: ModelSpec, shard: Shard, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._spec = spec
        self._block_size = block_size
        self._device = device
        kv_heads = shard.kv_heads(spec)
        heads = shard.query_heads(spec)
        shape = (spec.num_layers, num_blocks, block_size, kv_heads.stop - kv_heads.start, spec.head_dim)
        self._keys = torch.empty(shape, dtype=dtype, device=device)
        self._values = torch.empty(shape, dtype=dtype, device=device)
        self._slopes: Tensor | None = None
        self._absolute_bias_scale: float | None = None
        if spec.alibi is not None:
            self._slopes = torch.tensor(spec.alibi.slopes[heads], device=device)
            if spec.alibi.bfloat16_bias:
                self._absolute_bias_scale = spec.attention_scale if spec.alibi.scaled else 1.0
        self._lengths: dict[int, int] = {}
        self._bound: list[_Bound] = []
        self._slots = torch.empty(0, dtype=torch.int64, device=device)

    @property
    def bytes(self) -> int:
        """Bytes of the whole store."""
        return 2 * self._keys.numel() * self._keys.element_size()

    @property
    def seq_ids(self) -> set[int]:
        """Sequences with committed entries."""
        return set(self._lengths)

    def length(self, seq_id: int) -> int:
        """Committed tokens of a sequence, 0 for an unknown one."""
        return self._lengths.get(seq_id, 0)

    def bind(self, steps: Sequence[SeqStep]) -> None:
        size = self._block_size
        self._bound.clear()
        slots: list[int] = []
        first = 0
        for step in steps:
            end = step.start + len(step.tokens)
            used = step.blocks[: -(-end // size)]
            assert step.start == self.length(step.seq_id), f"sequence {step.seq_id} is {self.length(step.seq_id)} long"
            assert len(used) * size >= end, f"sequence {step.seq_id}: {len(used)} blocks do not hold {end} tokens"
            neighbours = used == list(range(used[0], used[0] + len(used)))
            self._bound.append(
                _Bound(
                    step.seq_id,
                    len(step.tokens),
                    first,
                    len(step.tokens),
                    end,
                    slice(used[0] * size, used[0] * size + end) if neighbours else None,
                    None if neighbours else torch.tensor(used, device=self._device),
                )
            )
            slots.extend(used[p // size] * size + p % size for p in range(step.start, end))
            first += len(step.tokens)
        self._slots = torch.tensor(slots, device=self._device)

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:  # [T, K, d] each
        self._keys[layer].flatten(0, 1).index_copy_(0, self._slots, k)
        self._values[layer].flatten(0, 1).index_copy_(0, self._slots, v)

    def attend(self, layer: int, q: Tensor) -> Tensor:  # [T, H, d] -> [T, H, d]
        keys, values = self._keys[layer], self._values[layer]
        parts = []
        for seq in self._bound:
            parts.append(
                attend(
                    q[seq.first : seq.first + seq.tokens],
                    _entries(keys, seq),
                    _entries(values, seq),
                    scale=self._spec.attention_scale,
                    window=self._spec.windows[layer],
                    slopes=self._slopes,
                    absolute_bias_scale=self._absolute_bias_scale,
                )
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def commit(self, seq_id: int, tokens: int) -> None:
        bound = next((b for b in self._bound if b.seq_id == seq_id), None)
        if bound is None or tokens > bound.proposed:
            raise ValueError(f"sequence {seq_id} has fewer than {tokens} proposed tokens")
        bound.proposed -= tokens
        self._lengths[seq_id] = self.length(seq_id) + tokens

    def rollback(self, seq_id: int, length: int) -> None:
        if not 0 <= length <= self.length(seq_id):
            raise ValueError(f"cannot roll sequence {seq_id} of {self.length(seq_id)} tokens back to {length}")
        self._lengths[seq_id] = length
        self._forget_proposals(seq_id)

    def free(self, seq_id: int) -> None:
        self._lengths.pop(seq_id, None)
        self._forget_proposals(seq_id)

    def _forget_proposals(self, seq_id: int) -> None:
        for bound in self._bound:
            if bound.seq_id == seq_id:
                bound.proposed = 0


def _entries(store: Tensor, seq: _Bound) -> Tensor:
    """One sequence's entries in order of position: [blocks, block_size, K, d] -> [L, K, d]."""
    if seq.span is not None:
        return store.flatten(0, 1)[seq.span]
    return store[seq.blocks].flatten(0, 1)[: seq.length]
