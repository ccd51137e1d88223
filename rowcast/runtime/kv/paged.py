"""The full KV view: a paged store of keys and values, a page being a block of positions of one sequence in all layers.

Who gets which block is the scheduler's business (`blocks`); this module puts entries where the block tables say and reads them
back. For views that choose among its entries it can keep chunk summaries, and the last queries of each pass; to them its KV heads
are counted through all layers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rowcast.kernels import gpu
from rowcast.kernels.attention import attend
from rowcast.runtime.kv.places import places, take
from rowcast.runtime.kv.sizes import Summary
from rowcast.runtime.kv.summaries import Fetch, Summaries
from rowcast.runtime.protocols import Late
from rowcast.runtime.shard import Shard
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.step import SeqStep


@dataclass(slots=True)
class _Queries:
    """Queries of a sequence's last pass, from position `start` on."""

    start: int
    layers: list[Tensor] = field(default_factory=list)
    """[n, H, d] each."""


@dataclass(slots=True)
class _Sequence:
    length: int = 0
    end: int = 0
    rewinds: int = 0
    summarised: int = 0
    """Entries whose chunks a round on the device has summarised, before they were committed here."""
    blocks: list[int] = field(default_factory=list)
    queries: _Queries | None = None


@dataclass(slots=True)
class _Bound:
    """One sequence's part of the bound pass."""

    first: int
    """Its tokens are rows first, first + 1, ... of the pass."""
    tokens: int
    length: int
    """Entries that the last of its tokens sees."""
    blocks: slice | Tensor
    """Its blocks in the store; a slice where they are neighbours, so that they can be read in place."""
    queries: _Queries | None
    at: tuple[Tensor, Tensor] | None
    """On a GPU, where tokens are few: its table [1, n] and the position of its first token [1], int32."""


class PagedKV:
    """Keys and values of all layers, [layers, blocks, block_size, K, d] each. Implements `KVView`."""

    def __init__(
        self,
        spec: ModelSpec,
        shard: Shard,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        keep_queries: int = 0,
        summaries: Collection[Summary] = (),
        lazy: bool = False,
    ) -> None:
        """`keep_queries`: of each sequence's last pass keep the queries of so many last tokens; those rejected are of no use, so it
        should exceed the longest proposal. `summaries`: kinds of chunk summaries to keep. `lazy`: entries may be completed by later
        passes; not where something else reads them, so without summaries and without views that copy from this one. Raises
        UserError where a chunk does not divide `block_size`.
        """
        assert not (lazy and summaries), "summaries are of complete entries"
        self.lazy = lazy
        self.spec = spec
        self.device = device
        self.dtype = dtype
        self.keep_queries = keep_queries
        self.slopes, self.absolute_bias_scale = alibi(spec, shard, device)
        heads, kv_heads = shard.query_heads(spec), shard.kv_heads(spec)
        self.num_heads = heads.stop - heads.start
        """Query heads of this rank."""
        self.num_kv_heads = kv_heads.stop - kv_heads.start
        self.block_size = block_size
        shape = (self._held_layers(spec), num_blocks, block_size, self.num_kv_heads, spec.head_dim)
        self._keys = torch.empty(shape, dtype=dtype, device=device)
        self._values = torch.empty(shape, dtype=dtype, device=device)
        self._summaries = {kind: Summaries(kind, self._key_stores(), device, self._key_fetch()) for kind in summaries}
        self._sequences: dict[int, _Sequence] = {}
        self._bound: list[_Bound] = []
        self._tables: dict[int, list[int]] = {}
        """The bound sequences' blocks."""
        self._keeps_all = False
        self._slots = torch.empty(0, dtype=torch.int64, device=device)

    def _held_layers(self, spec: ModelSpec) -> int:
        """Layers of this store's entries on the device."""
        return spec.num_layers

    def _key_stores(self) -> list[tuple[slice, Tensor]]:
        """Keys [n, blocks, block_size, K, d] of neighbouring layers, of all."""
        return [(slice(None), self._keys)]

    def _key_fetch(self) -> Fetch | None:
        """Brings keys of those that lie in other memory; None: there are none, or it had better stay there."""
        return None

    @property
    def bytes(self) -> int:
        """Bytes of the whole store and its summaries."""
        return 2 * self._keys.numel() * self._keys.element_size() + sum(s.bytes for s in self._summaries.values())

    @property
    def seq_ids(self) -> set[int]:
        """Sequences with entries."""
        return set(self._sequences)

    def admit(self, seq_id: int) -> bool:
        """True: places are blocks, which the scheduler gives."""
        return True

    def length(self, seq_id: int) -> int:
        """Committed tokens of a sequence, 0 for an unknown one."""
        found = self._sequences.get(seq_id)
        return found.length if found else 0

    def end(self, seq_id: int) -> int:
        """`length` and the proposals behind it."""
        found = self._sequences.get(seq_id)
        return found.end if found else 0

    def bytes_read(self, seq_id: int) -> int:
        """Bytes of K/V that attention reads in one pass for this sequence, up to `end`."""
        return visible_bytes(self.spec, self.num_kv_heads, self.dtype, self.end(seq_id))

    def refreshes(self, seq_id: int) -> int:
        """0: it shows everything."""
        return 0

    def rewinds(self, seq_id: int) -> int:
        """How often committed entries of the sequence were dropped: whoever copied some has to copy them again."""
        found = self._sequences.get(seq_id)
        return found.rewinds if found else 0

    def adopt(self, seq_id: int, length: int, blocks: Sequence[int]) -> None:
        """The sequence begins with `length` committed tokens, whose entries and summaries `blocks` hold: others have filled whole ones
        with the same tokens. Precondition: it is unknown."""
        assert seq_id not in self._sequences, f"sequence {seq_id} has entries already"
        assert length % self.block_size == 0, f"{length} tokens are not whole blocks of {self.block_size}"
        self._sequences[seq_id] = _Sequence(length, length, blocks=list(blocks[: length // self.block_size]))

    def bind(self, steps: Sequence[SeqStep]) -> None:
        queries = []
        for step in steps:
            end = step.start + len(step.tokens)
            seq = self._sequences.setdefault(step.seq_id, _Sequence())
            assert seq.length <= step.start <= seq.end, f"sequence {step.seq_id}: {step.start} is outside {seq.length}..{seq.end}"
            seq.end, seq.blocks = end, step.blocks[: -(-end // self.block_size)]
            seq.queries = _Queries(max(step.start, end - self.keep_queries)) if self.keep_queries else None
            queries.append(seq.queries)
        self._place(steps, queries)

    shares_entries = False

    @property
    def serves_device(self) -> bool:
        """True: entries stand at their positions. As are `entries` and `reserve`, for rounds on the device (`kv.device`)."""
        return True

    def entries(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [blocks, block_size, K, d]."""
        return self._keys[layer], self._values[layer]

    def reserve(self, step: SeqStep) -> tuple[list[int], int]:
        """The step's tokens are proposals now; their blocks, and 0. Kept queries are void until `keep`."""
        seq, end = self._sequences.setdefault(step.seq_id, _Sequence()), step.start + len(step.tokens)
        assert seq.length <= step.start <= seq.end, f"sequence {step.seq_id}: {step.start} is outside {seq.length}..{seq.end}"
        seq.end, seq.blocks, seq.queries = end, step.blocks[: -(-end // self.block_size)], None
        assert len(seq.blocks) * self.block_size >= end, (
            f"sequence {step.seq_id}: {len(seq.blocks)} blocks do not hold {end} tokens"
        )
        return seq.blocks, 0

    def keep(self, seq_id: int, start: int, queries: Tensor) -> None:
        """Queries [layers, n, H, d], after RoPE, of a sequence's last pass, which began at `start`."""
        self._sequences[seq_id].queries = _Queries(start, list(queries))

    def lend(self, steps: Sequence[SeqStep]) -> None:
        """Another view's pass: `append` and `attend` refer to its tokens until the next `bind`; nothing is noted of the sequences.

        Precondition: as for `bind`, but the tokens lie behind the committed ones anywhere.
        """
        self._place(steps, [None] * len(steps))

    def _slots_of(self, seq_id: int, positions: range) -> list[int]:
        """Where entries of a bound sequence lie among those of a layer."""
        blocks, size = self._tables[seq_id], self.block_size
        return [blocks[p // size] * size + p % size for p in positions]

    def _place(self, steps: Sequence[SeqStep], queries: Sequence[_Queries | None]) -> None:
        """Where the tokens of a pass go, and what keeps their last queries."""
        size = self.block_size
        self._bound.clear()
        self._tables = {step.seq_id: step.blocks for step in steps}
        slots: list[int] = []
        first = 0
        for step, kept in zip(steps, queries, strict=True):
            tokens = len(step.tokens)
            end = step.start + tokens
            used = step.blocks[: -(-end // size)]
            assert len(used) * size >= end, f"sequence {step.seq_id}: {len(used)} blocks do not hold {end} tokens"
            at = None
            if tokens <= gpu.MOST_TOKENS and gpu.serves(self.device):
                numbers = torch.tensor([step.start, *used], dtype=torch.int32, device=self.device)
                at = numbers[None, 1:], numbers[:1]
            self._bound.append(_Bound(first, tokens, end, places(used, self.device), kept, at))
            slots += self._slots_of(step.seq_id, range(step.start, end))
            first += tokens
        self._keeps_all = all(b.tokens <= self.keep_queries for b in self._bound)
        self._slots = torch.tensor(slots, device=self.device)

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:  # [T, K, d] each
        for store, entries in zip(self.entries(layer), (k, v), strict=True):
            store.flatten(0, 1).index_copy_(0, self._slots, entries)

    def late_from(self, seq_id: int) -> int | None:
        """0, if entries may be late at all."""
        return 0 if self.lazy else None

    def fill(self, layer: int, late: Late) -> None:
        slots = [slot for span in late.spans for slot in self._slots_of(span.seq_id, span.positions)]
        at = torch.tensor(slots, device=self.device)
        for store, entries in zip(self.entries(layer), (late.k, late.v), strict=True):
            write_heads(store.flatten(0, 1), at, late.heads, entries)

    def attend(self, layer: int, q: Tensor, heads: Tensor | None = None) -> Tensor:  # [T, H, d] -> [T, C, d]
        keys, values = self.entries(layer)
        parts = []
        for seq in self._bound:
            rows = self._noted(seq, q)
            if seq.at is not None:
                parts.append(self._decode(layer, rows, seq.at, seq.length, heads))
                continue
            parts.append(
                attend(
                    rows,
                    take(keys, 0, seq.blocks).flatten(0, 1)[: seq.length],
                    take(values, 0, seq.blocks).flatten(0, 1)[: seq.length],
                    scale=self.spec.attention_scale,
                    window=self.spec.windows[layer],
                    slopes=self.slopes,
                    absolute_bias_scale=self.absolute_bias_scale,
                    heads=heads,
                )
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _noted(self, seq: _Bound, q: Tensor) -> Tensor:
        """The sequence's rows of q [T, H, d], the last of which are kept where somebody asks for them."""
        rows = q[seq.first : seq.first + seq.tokens]
        if seq.queries is not None:
            last = rows[-self.keep_queries :]
            seq.queries.layers.append(last if self._keeps_all else last.clone())
        return rows

    def _decode(self, layer: int, rows: Tensor, at: tuple[Tensor, Tensor], end: int, heads: Tensor | None) -> Tensor:
        """`attend` for a sequence's few last tokens, by the kernel that rounds on the device use, too: [T, H, d] -> [T, C, d]."""
        from rowcast.kernels.gpu import decoding

        return decoding.decode(
            rows.contiguous(),
            *self.entries(layer),
            *at,
            scale=self.spec.attention_scale,
            most_entries=end,
            window=self.spec.windows[layer],
            slopes=self.slopes,
            absolute_bias_scale=self.absolute_bias_scale,
            heads=heads,
        )

    def commit(self, seq_id: int, tokens: int) -> None:
        seq = self._sequences.get(seq_id)
        if seq is None or tokens > seq.end - seq.length:
            raise ValueError(f"sequence {seq_id} has fewer than {tokens} proposed tokens")
        new = seq.length + tokens
        for summaries in self._summaries.values():
            summaries.update(seq.blocks, max(seq.length, min(seq.summarised, new)), new)
        seq.length = new

    def rollback(self, seq_id: int, length: int) -> None:
        if not 0 <= length <= self.end(seq_id):
            raise ValueError(f"cannot roll sequence {seq_id} of {self.end(seq_id)} tokens back to {length}")
        seq = self._sequences.get(seq_id)
        if seq is None:
            return
        seq.rewinds += length < seq.length
        seq.length, seq.end, seq.summarised = min(seq.length, length), length, min(seq.summarised, length)

    def free(self, seq_id: int) -> None:
        self._sequences.pop(seq_id, None)

    def queries(self, seq_id: int, count: int) -> Tensor | None:
        """Post-RoPE queries [layers, n, H, d] of the last n <= `count` committed tokens that ran in the sequence's last pass and were
        kept; n >= 1, the last one at position length - 1. None if there are none."""
        seq = self._sequences.get(seq_id)
        if seq is None or seq.queries is None:
            return None
        stop = seq.length - seq.queries.start
        return torch.stack([q[max(0, stop - count) : stop] for q in seq.queries.layers]) if stop > 0 else None

    def summary(self, seq_id: int, kind: Summary, heads: slice = slice(None)) -> tuple[Tensor, ...]:
        """Summaries of the sequence's full, committed chunks in order: (mean,) or (min, max), [heads, chunks, d] each.

        Raises KeyError for a kind that is not kept.
        """
        summaries, seq = self._summaries[kind], self._sequences[seq_id]
        count = seq.length // kind.chunk
        return summaries.read(heads, places(seq.blocks[: -(-count // summaries.per_block)], self.device), count)

    def summarise(self, tables: Tensor, old: Tensor, new: Tensor) -> None:
        """On a GPU, where nobody waits: sequences with these tables [B, n] have grown from `old` to `new` entries, int32 [B] each."""
        from rowcast.kernels.gpu import retrieval

        for kind, kept in self._summaries.items():
            retrieval.summarise(self._keys, tables, old, new, kept.kept, chunk=kind.chunk, score=kind.score)

    def note_summaries(self, seq_id: int, length: int) -> None:
        """`summarise` was told of the sequence's first `length` entries, so that `commit` need not do it."""
        self._sequences[seq_id].summarised = length

    def summary_store(self, kind: Summary) -> Tensor:
        """All summaries of a kind, [parts, layers, K, blocks, block_size / chunk, d]. Raises KeyError for a kind that is not kept."""
        return self._summaries[kind].kept

    def table(self, seq_id: int) -> Tensor:
        """For each committed entry of a sequence, where it lies among those of a layer: [length]."""
        seq, size = self._sequences[seq_id], self.block_size
        first = torch.tensor(seq.blocks, device=self.device) * size
        return (first[:, None] + torch.arange(size, device=self.device)).flatten()[: seq.length]

    def blocks_of(self, seq_id: int) -> Tensor:
        """A sequence's block table: int32 [n]."""
        return torch.tensor(self._sequences[seq_id].blocks, dtype=torch.int32, device=self.device)

    def keys_of(self, entries: Tensor, heads: slice = slice(None), run: int = 1) -> Tensor:
        """Of KV heads counted through all layers: entries [heads, n] of a `table`, other ones for each, or [n] -> [heads, n, d].

        `run`: so many of them, from the first on, are always one whole chunk of positions; it divides the block size.
        """
        return _rows(self._keys, self._places_of(entries, heads))

    def values_of(self, entries: Tensor, heads: slice = slice(None), run: int = 1) -> Tensor:
        """Likewise."""
        return _rows(self._values, self._places_of(entries, heads))

    def _places_of(self, entries: Tensor, heads: slice) -> Tensor:
        # [heads, n] or [n] -> [heads, n], rows of the store as [..., d]
        head = torch.arange(len(self._keys) * self.num_kv_heads, device=self.device)[heads, None]
        of_layer = self._keys.shape[1] * self.block_size * self.num_kv_heads
        found: Tensor = entries * self.num_kv_heads + (head // self.num_kv_heads * of_layer + head % self.num_kv_heads)
        return found


def alibi(spec: ModelSpec, shard: Shard, device: torch.device) -> tuple[Tensor | None, float | None]:
    """`slopes` [H] of this rank's heads and `absolute_bias_scale`, as attention takes them."""
    if spec.alibi is None:
        return None, None
    slopes = torch.tensor(spec.alibi.slopes[shard.query_heads(spec)], device=device)
    if not spec.alibi.bfloat16_bias:
        return slopes, None
    return slopes, spec.attention_scale if spec.alibi.scaled else 1.0


def visible_bytes(spec: ModelSpec, kv_heads: int, dtype: torch.dtype, entries: int) -> int:
    """Bytes of keys and values that a token reads in all layers where a view shows it `entries` neighbouring ones."""
    return 2 * kv_heads * spec.head_dim * dtype.itemsize * sum(min(entries, window or entries) for window in spec.windows)


def write_heads(store: Tensor, at: Tensor, heads: Tensor | None, entries: Tensor) -> None:
    """Write entries [L, C, d] of the KV heads `heads` [C] (None: all) to the rows `at` [L] of a store [n, K, d]."""
    if heads is None:
        store.index_copy_(0, at, entries)
    else:
        store[at[:, None], heads] = entries


def _rows(store: Tensor, rows: Tensor) -> Tensor:
    # store [..., d], rows [..., n] -> [..., n, d]
    size = store.shape[-1]
    return store.view(-1, size).index_select(0, rows.flatten()).view(*rows.shape, size)
