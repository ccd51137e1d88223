"""The full KV view where entries of some layers lie in host memory.

Blocks of those layers stay there, head by head. What a pass appends is written through. A pass copies the entries that its tokens see
through a ring of buffers, a layer ahead, some KV heads at a time; views that show a few entries read these alone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from rowcast.kernels import gpu
from rowcast.kernels.attention import attend
from rowcast.offload.host_store import HostStore
from rowcast.offload.outbox import Outbox
from rowcast.offload.streamer import Order, StreamCounts, Streamer
from rowcast.runtime.kv.host_entries import KvPiece, Run, runs_of, together, write
from rowcast.runtime.kv.paged import PagedKV, _Queries
from rowcast.runtime.kv.sizes import Summary
from rowcast.runtime.kv.summaries import Fetch
from rowcast.runtime.protocols import Late
from rowcast.runtime.shard import Shard
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.step import SeqStep

PIECE_BYTES = 256 << 20
"""Of a layer's entries, copied at once; a single head's may be more."""

SLOTS = 2
"""Buffers of the ring."""

PART_TOKENS = 2048

MOST_KERNEL_TOKENS = 4 * gpu.MOST_TOKENS
"""Of a verification, up to which the decode kernel reads what is in a buffer, once for every `gpu.MOST_TOKENS` tokens: a library's
kernel has a single program for each head."""

OUTBOX_BYTES = 64 << 20
"""New entries on their way to the host."""


@dataclass(frozen=True, slots=True)
class _Decoded:
    """Up to 16 of a bound sequence's tokens, as flash-decoding takes them over a buffer."""

    tokens: slice
    """Of those that are bound."""
    table: Tensor
    """int32 [1, n]: the blocks of the buffer that hold its entries."""
    starts: Tensor
    """int32 [1]."""
    length: int
    """Entries, with the tokens' own."""


class HostedKV(PagedKV):
    """Keys and values of all layers, those of `away` in host memory. Implements `KVView`."""

    def __init__(
        self,
        spec: ModelSpec,
        shard: Shard,
        *,
        away: Collection[int],
        store: HostStore,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        keep_queries: int = 0,
        summaries: Collection[Summary] = (),
        piece_bytes: int = PIECE_BYTES,
        part_tokens: int = PART_TOKENS,
    ) -> None:
        """As `PagedKV`, without entries that are completed late; `away`: layers, at least one. `part_tokens`: of longer passes, so many
        at a time are run through a layer. Raises OutOfMemoryError where host memory is short."""
        here = [layer for layer in range(spec.num_layers) if layer not in away]
        self._here = {layer: place for place, layer in enumerate(here)}
        self._away = {layer: place for place, layer in enumerate(sorted(away))}
        heads = shard.kv_heads(spec)
        count, entries = heads.stop - heads.start, num_blocks * block_size
        self.store = store
        self._host = store.bank((2 * len(self._away) * count * entries, spec.head_dim), dtype)
        self._entries = self._host.tensor.view(2, len(self._away), count, entries, spec.head_dim)
        super().__init__(
            spec,
            shard,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=dtype,
            device=device,
            keep_queries=keep_queries,
            summaries=summaries,
        )
        each = 2 * entries * spec.head_dim * dtype.itemsize
        together = max(1, min(count, piece_bytes // each))
        self._groups = [slice(first, min(first + together, count)) for first in range(0, count, together)]
        self._ring = Streamer(device, slots=SLOTS, slot_bytes=together * each)
        self._part_tokens = max(part_tokens, keep_queries + 1)
        self._parts: list[list[tuple[SeqStep, _Queries | None]]] = []
        """Of the bound pass."""
        self._part = 0
        self._outbox = Outbox(store, OUTBOX_BYTES)
        self._gathered = 0
        """Bytes of single entries that were copied."""
        self._pieces: dict[tuple[int, int], KvPiece] = {}
        self._own = torch.empty(0, dtype=torch.int64, device=device)
        """Of the bound tokens, their places among the entries in a buffer."""
        self._firsts: dict[int, int] = {}
        """By sequence, where its entries begin there."""
        self._seats: list[int] = []
        """The same, in the order of what is bound."""
        self._decoded: list[list[_Decoded]] = []
        """In the same order; empty for what does not go by kernel."""
        self._writes: Sequence[Run] = ()
        """Of the bound tokens, where their entries go in host memory."""
        self._new: tuple[Tensor, Tensor] | None = None
        """Keys and values of the layer that runs, [T, K, d] each."""

    def _held_layers(self, spec: ModelSpec) -> int:
        return len(self._here)

    def _key_stores(self) -> list[tuple[slice, Tensor]]:
        stores = []
        for _, run in groupby(range(self.spec.num_layers), key=lambda layer: layer in self._away):
            layers = list(run)
            first, span = layers[0], slice(layers[0], layers[-1] + 1)
            if first in self._here:
                stores.append((span, self._keys[self._here[first] :][: len(layers)]))
            else:
                keys = self._entries[0, self._away[first] :][: len(layers)]  # [n, K, entries, d]
                blocks = keys.view(*keys.shape[:2], -1, self.block_size, keys.shape[3])
                stores.append((span, blocks.permute(0, 2, 3, 1, 4)))
        return stores

    def _key_fetch(self) -> Fetch | None:
        return self.keys_of if self.device.type == "cuda" else None

    @property
    def by_layer(self) -> bool:
        """Whether long passes can be run layer by layer: the buffers hold all heads of one at once."""
        return len(self._groups) <= SLOTS

    @property
    def bytes(self) -> int:
        """Bytes of what lies on the device: entries, summaries, buffers."""
        return super().bytes + self._ring.bytes

    @property
    def serves_device(self) -> bool:
        """False: the host starts the copies of every layer."""
        return False

    def counts(self) -> StreamCounts:
        """What passes streamed from host memory, and views of a few entries copied, since the last call of this."""
        counts = self._ring.counts()
        counts.bytes, self._gathered = counts.bytes + self._gathered, 0
        return counts

    @property
    def sent_bytes(self) -> int:
        """New entries that went to host memory."""
        return self._outbox.bytes

    def entries(self, layer: int) -> tuple[Tensor, Tensor]:
        """As `PagedKV`, of a layer on the device."""
        place = self._here[layer]
        return self._keys[place], self._values[place]

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:  # [T, K, d] each
        if layer in self._here:
            super().append(layer, k, v)
            return
        self._new = k, v
        host, runs = self._entries[:, self._away[layer]], self._writes  # [2, K, entries, d]
        self._outbox.post(torch.stack((k, v)).transpose(1, 2).contiguous(), lambda new: write(host, runs, new))

    def fill(self, layer: int, late: Late) -> None:
        assert layer in self._here, "entries in host memory have to be complete"
        super().fill(layer, late)

    def attend(self, layer: int, q: Tensor, heads: Tensor | None = None) -> Tensor:  # [T, H, d] -> [T, C, d]
        if layer in self._here:
            return super().attend(layer, q, heads)
        assert self._new is not None
        rows = [self._noted(seq, q) for seq in self._bound]
        share = q.shape[1] // self.num_kv_heads
        parts: list[Tensor] = []
        for group, span in enumerate(self._groups):
            piece = self._pieces[layer, group]
            assert not self._part or self._ring.holds(piece), "what earlier parts left in the buffer is lost"
            entries = piece.view(self._ring.take(piece))
            for kept, new in zip(entries, self._new, strict=True):
                kept.index_copy_(1, self._own, new[:, span].transpose(0, 1))
            queries = slice(span.start * share, span.stop * share)
            found = [self._over(layer, i, rows[i][:, queries], entries, queries) for i in range(len(rows))]
            parts.append(found[0] if len(found) == 1 else torch.cat(found))
            self._ring.release(piece)
        self._new = None
        out = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return out if heads is None else out.index_select(1, heads)

    def commit(self, seq_id: int, tokens: int) -> None:
        if self._summaries:
            self._outbox.drain()
        super().commit(seq_id, tokens)

    def keys_of(self, entries: Tensor, heads: slice = slice(None), run: int = 1) -> Tensor:
        return self._of(0, self._keys, entries, heads, run)

    def values_of(self, entries: Tensor, heads: slice = slice(None), run: int = 1) -> Tensor:
        return self._of(1, self._values, entries, heads, run)

    def close(self) -> None:
        """Wait for copies that are under way, and give host memory back. Nothing may be asked of the view after that."""
        self._outbox.drain()
        self._ring.close()
        self.store.close()

    def parts(self) -> Sequence[Sequence[SeqStep]]:
        """As `KeepsLayer`. A single part also where a layer's buffers do not hold all of its heads at once."""
        return [[step for step, _ in part] for part in self._parts]

    def part(self, number: int) -> None:
        chosen = self._parts[number]
        self._part = number
        self._seat([step for step, _ in chosen], [queries for _, queries in chosen])

    def _place(self, steps: Sequence[SeqStep], queries: Sequence[_Queries | None]) -> None:
        self._outbox.drain()
        size, total = self.block_size, 0
        runs: list[Run] = []
        self._firsts = {}
        for step in steps:
            blocks = step.blocks[: -(-(step.start + len(step.tokens)) // size)]
            self._firsts[step.seq_id] = total
            runs += runs_of(blocks, step.start, size, total)
            total += len(blocks) * size
        self._pieces = {
            (layer, group): KvPiece((layer, group), self._entries[:, place, span], runs, total)
            for layer, place in self._away.items()
            for group, span in enumerate(self._groups)
        }
        self._part, self._parts = 0, [list(zip(steps, queries, strict=True))]
        if self.by_layer:
            self._parts = _cut(steps, queries, self._part_tokens, self.keep_queries)
        pieces = self._pieces.values()
        order = [piece for layer in self._away for _ in self._parts for piece in pieces if piece.key[0] == layer]
        self._ring.begin(Order(order, cyclic=False), fresh=True)
        self._seat(steps, queries)

    def _seat(self, steps: Sequence[SeqStep], queries: Sequence[_Queries | None]) -> None:
        """Where these of the bound tokens go, in buffers and in host memory."""
        super()._place(steps, queries)
        own: list[int] = []
        slots: list[int] = []
        for step in steps:
            first, positions = self._firsts[step.seq_id], range(step.start, step.start + len(step.tokens))
            own += range(first + positions.start, first + positions.stop)
            slots += self._slots_of(step.seq_id, positions)
        self._own = torch.tensor(own, device=self.device)
        self._writes = together(slots)
        self._seats = [self._firsts[step.seq_id] for step in steps]
        self._decoded = [
            self._by_kernel(seq.length, len(step.tokens), self._firsts[step.seq_id])
            for seq, step in zip(self._bound, steps, strict=True)
        ]

    def _by_kernel(self, length: int, tokens: int, first: int) -> list[_Decoded]:
        """How flash-decoding takes the newest `tokens` of a sequence of `length` entries, from `first` on in a buffer. Made before
        the pass: attention reads it before it waits for the kernel before."""
        if tokens > MOST_KERNEL_TOKENS or not gpu.serves(self.device):
            return []
        found, first = [], first // self.block_size
        for done in range(length - tokens, length, gpu.MOST_TOKENS):
            end = min(done + gpu.MOST_TOKENS, length)
            table = torch.arange(first, first + -(-end // self.block_size), dtype=torch.int32, device=self.device)
            starts = torch.full((1,), done, dtype=torch.int32, device=self.device)
            found.append(_Decoded(slice(done - length + tokens, end - length + tokens), table[None], starts, end))
        return found

    def _over(self, layer: int, place: int, rows: Tensor, entries: Tensor, heads: slice) -> Tensor:
        """Of one bound sequence, the query heads `heads`, whose rows these are: attention over entries [2, Kg, n, d] of a buffer."""
        slopes = None if self.slopes is None else self.slopes[heads]
        if not self._decoded[place]:
            first, length = self._seats[place], self._bound[place].length
            keys, values = entries[:, :, first : first + length].transpose(1, 2)
            return attend(
                rows,
                keys,
                values,
                scale=self.spec.attention_scale,
                window=self.spec.windows[layer],
                slopes=slopes,
                absolute_bias_scale=self.absolute_bias_scale,
            )
        from rowcast.kernels.gpu import decoding

        blocks = entries.view(2, entries.shape[1], -1, self.block_size, entries.shape[3]).permute(
            0, 2, 3, 1, 4
        )  # [2, blocks, block_size, Kg, d]
        parts = [
            decoding.decode(
                rows[part.tokens].contiguous(),
                blocks[0],
                blocks[1],
                part.table,
                part.starts,
                scale=self.spec.attention_scale,
                most_entries=part.length,
                window=self.spec.windows[layer],
                slopes=slopes,
                absolute_bias_scale=self.absolute_bias_scale,
            )
            for part in self._decoded[place]
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _of(self, which: int, here: Tensor, entries: Tensor, heads: slice, run: int) -> Tensor:
        """Keys (0) or values (1): entries [heads, n], or [n] -> [heads, n, d]."""
        self._outbox.drain()
        count = self.num_kv_heads
        chosen = range(self.spec.num_layers * count)[heads]
        lines = entries.expand(len(chosen), -1)
        out = torch.empty(*lines.shape, self.spec.head_dim, dtype=self.dtype, device=self.device)
        for away, neighbours in groupby(enumerate(chosen), key=lambda line: line[1] // count in self._away):
            each = list(neighbours)
            rows = slice(each[0][0], each[-1][0] + 1)
            if away:
                places = [self._away[head // count] * count + head % count for _, head in each]
                at = torch.tensor(places, device=self.device)[:, None] * self._entries.shape[3] + lines[rows, ::run]
                at += which * self._away_entries  # of each run the first: a head's neighbours lie behind one another
                number = torch.full((1,), at.numel(), dtype=torch.int32, device=self.device)
                found = out[rows].view(-1, run * self.spec.head_dim)
                self._gathered += found.nbytes
                self._host.widened(run).gather((at.flatten() // run).int(), number, found)
            else:
                places = [self._here[head // count] * self._layer_entries + head % count for _, head in each]
                at = torch.tensor(places, device=self.device)[:, None] + lines[rows] * count
                out[rows] = here.view(-1, self.spec.head_dim)[at]
        return out

    @property
    def _away_entries(self) -> int:
        """Keys in host memory, of all heads and layers there."""
        return self._entries[0].numel() // self.spec.head_dim

    @property
    def _layer_entries(self) -> int:
        """Of a layer on the device, of all heads."""
        return int(self._keys.shape[1] * self.block_size * self.num_kv_heads)


def _cut(
    steps: Sequence[SeqStep], queries: Sequence[_Queries | None], size: int, keep: int
) -> list[list[tuple[SeqStep, _Queries | None]]]:
    """The tokens of a pass in parts of at most `size`. The last `keep` of each sequence's tokens are in one, whose queries are kept."""
    parts: list[list[tuple[SeqStep, _Queries | None]]] = [[]]
    room = size
    for step, kept in zip(steps, queries, strict=True):
        done, total = 0, len(step.tokens)
        while done < total:
            count = min(room, total - done)
            if done + count < total < done + count + keep:  # the rest would be too short
                count = max(0, total - keep - done)
            if count:
                last = done + count == total
                cut = replace(step, tokens=step.tokens[done : done + count], start=step.start + done)
                parts[-1].append((cut, kept if last else None))
            done, room = done + count, room - count
            if done < total:
                parts.append([])
                room = size
    return [part for part in parts if part]
