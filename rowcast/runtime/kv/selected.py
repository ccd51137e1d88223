"""A view of a few entries of the full store, for a rung that runs the target's own weights (TriForce's retrieval cache).

Entries are copies in compact memory: sinks, what a policy chose, the recent window, and behind them scratch for proposals, which
the full store never sees. The rung has nothing to catch up with: whatever the last rung committed is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rowcast.kernels.attention import attend_entries
from rowcast.runtime.kv.paged import PagedKV, visible_bytes, write_heads
from rowcast.runtime.kv.selection import Policy
from rowcast.runtime.kv.sizes import copy_bytes, head_groups
from rowcast.runtime.kv.slots import Slots
from rowcast.runtime.ladder.spec import RECENT, SINKS
from rowcast.runtime.protocols import Late
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.step import SeqStep


@dataclass(slots=True)
class _Shown:
    """What is shown of one sequence."""

    synced: int = 0
    """The parent's length when its entries were copied last."""
    rewinds: int = 0
    entries: int = 0
    proposals: int = 0
    chosen: int = 0
    """Entries that the policy chose; 0 as long as it has not."""
    syncs: int = 0
    """Since the sequence outgrew the budget."""
    refreshes: int = 0
    moved_bytes: int = 0
    """Read and written before the last bound pass, to bring what is shown up to date."""


@dataclass(frozen=True, slots=True)
class _Bound:
    """One sequence's part of the bound pass."""

    rows: slice
    slot: int
    own: slice
    """Where its tokens' entries lie."""
    positions: Tensor
    """Of its tokens, [T]."""


class SelectedKV:
    """At most `budget` committed entries a sequence, layer and KV head. Implements `KVView`; `length` is the parent's.

    The first `bind` after the parent's length has changed copies the recent window anew, exact K/V of the full pass, and lets the
    policy choose. So what is shown depends on the parent's committed entries and queries only.
    """

    def __init__(
        self,
        parent: PagedKV,
        policy: Policy,
        *,
        budget: int,
        sinks: int = SINKS,
        recent: int = RECENT,
        refresh: int = 1,
        slots: int,
        room: int,
    ) -> None:
        """`sinks` (rounded up to whole chunks) and `recent` entries are always in. The policy chooses at every `refresh`-th change of
        the parent's length, at the first one only if 0. `slots` sequences at a time, each with at most `room` proposals. Allocates
        everything. Precondition: the budget has room for a chunk wherever it starts (`Rung` sees to it).
        """
        self._sinks = -(-sinks // policy.chunk) * policy.chunk
        assert not parent.lazy, "the parent's entries are not complete"
        # The recent window starts at a chunk's start, so it may be up to chunk - 1 entries longer.
        self._choice = (budget - self._sinks - recent - policy.chunk + 1) // policy.chunk
        assert self._choice >= 1, f"{budget} entries leave nothing to choose"
        self._parent = parent
        self._policy = policy
        self._budget = budget
        self._recent = recent
        self._refresh = refresh
        self._room = room
        self._slots = Slots(slots)
        self._held_bytes: int = slots * parent.spec.num_layers * parent.num_kv_heads * budget * policy.held_bytes
        spec, dtype, device = parent.spec, parent.dtype, parent.device
        shape = (slots, spec.num_layers, parent.num_kv_heads, budget + room)
        self._keys = torch.empty(*shape, spec.head_dim, dtype=dtype, device=device)
        self._values = torch.empty(*shape, spec.head_dim, dtype=dtype, device=device)
        self._positions: Tensor | None = None
        if parent.slopes is not None or any(spec.windows):
            self._positions = torch.empty(shape, dtype=torch.int64, device=device)
        self._shown: dict[int, _Shown] = {}
        self._bound: list[_Bound] = []

    @property
    def bytes(self) -> int:
        """Bytes of all slots, and of what the policy holds for them."""
        stores = (self._keys, self._values) if self._positions is None else (self._keys, self._values, self._positions)
        return sum(store.numel() * store.element_size() for store in stores) + self._held_bytes

    @property
    def seq_ids(self) -> set[int]:
        """Admitted sequences."""
        return set(self._shown)

    def admit(self, seq_id: int) -> bool:
        """Whether the sequence has a slot now; it keeps it until `free`."""
        if not self._slots.take(seq_id):
            return False
        self._shown.setdefault(seq_id, _Shown())
        return True

    def length(self, seq_id: int) -> int:
        """The parent's."""
        return self._parent.length(seq_id)

    def end(self, seq_id: int) -> int:
        """`length` and the proposals behind it; none behind one that has changed since they were made."""
        shown, length = self._shown.get(seq_id), self.length(seq_id)
        return length + shown.proposals if shown is not None and self._is_current(seq_id, shown) else length

    def bytes_read(self, seq_id: int) -> int:
        """Bytes of K/V that attention reads in one pass for this sequence, up to `end`; of the first pass after the parent's length
        has changed also what was read to choose, and what was copied, read and written."""
        shown, parent = self._shown[seq_id], self._parent
        attended = visible_bytes(parent.spec, parent.num_kv_heads, parent.dtype, shown.entries + shown.proposals)
        return attended + shown.moved_bytes

    def refreshes(self, seq_id: int) -> int:
        """How often the sequence's entries were chosen anew."""
        shown = self._shown.get(seq_id)
        return shown.refreshes if shown else 0

    def bind(self, steps: Sequence[SeqStep]) -> None:
        """As `KVView`. Precondition: the sequences are admitted."""
        self._bound.clear()
        first = 0
        for step in steps:
            shown = self._note(step)
            tokens, start = len(step.tokens), step.start - self.length(step.seq_id)
            own = slice(shown.entries + start, shown.entries + start + tokens)
            positions = torch.arange(step.start, step.start + tokens, device=self._parent.device)
            slot = self._slots[step.seq_id]
            if self._positions is not None:
                self._positions[slot, :, :, own] = positions
            self._bound.append(_Bound(slice(first, first + tokens), slot, own, positions))
            first += tokens

    shares_entries = True

    @property
    def spec(self) -> ModelSpec:
        return self._parent.spec

    @property
    def slopes(self) -> Tensor | None:
        return self._parent.slopes

    @property
    def absolute_bias_scale(self) -> float | None:
        return self._parent.absolute_bias_scale

    @property
    def block_size(self) -> int:
        """A sequence's entries are one block."""
        return self._keys.shape[3]

    @property
    def serves_device(self) -> bool:
        """Whether true positions do not count. As are `entries` and `reserve`, for rounds on the device (`kv.device`)."""
        return self._positions is None

    def entries(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [slots, entries, K, d]."""
        return self._keys[:, layer].transpose(1, 2), self._values[:, layer].transpose(1, 2)

    def reserve(self, step: SeqStep) -> tuple[list[int], int]:
        """The step's tokens are proposals now; the sequence's slot, and what is added to a position to find its place there."""
        shown = self._note(step)
        return [self._slots[step.seq_id]], shown.entries - self.length(step.seq_id)

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:  # [T, K, d] each
        for seq in self._bound:
            self._keys[seq.slot, layer, :, seq.own] = k[seq.rows].transpose(0, 1)
            self._values[seq.slot, layer, :, seq.own] = v[seq.rows].transpose(0, 1)

    def late_from(self, seq_id: int) -> int:
        """Behind the parent's entries, which its own passes completed."""
        return self.length(seq_id)

    def fill(self, layer: int, late: Late) -> None:
        done = 0
        for span in late.spans:
            slot, rows = self._slots[span.seq_id], slice(done, done + len(span.positions))
            at = late.positions[rows] + (self._shown[span.seq_id].entries - self.length(span.seq_id))
            for store, entries in ((self._keys, late.k), (self._values, late.v)):
                write_heads(store[slot, layer].transpose(0, 1), at, late.heads, entries[rows])
            done = rows.stop

    def attend(self, layer: int, q: Tensor, heads: Tensor | None = None) -> Tensor:  # [T, H, d] -> [T, C, d]
        parts = [
            attend_entries(
                q[seq.rows],
                self._keys[seq.slot, layer, :, : seq.own.stop],
                self._values[seq.slot, layer, :, : seq.own.stop],
                scale=self._parent.spec.attention_scale,
                key_positions=None if self._positions is None else self._positions[seq.slot, layer, :, : seq.own.stop],
                query_positions=seq.positions,
                window=self._parent.spec.windows[layer],
                slopes=self._parent.slopes,
                absolute_bias_scale=self._parent.absolute_bias_scale,
                heads=heads,
            )
            for seq in self._bound
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def commit(self, seq_id: int, tokens: int) -> None:
        """Drops the sequence's proposals: the parent, which commits first, has those that stand."""
        if seq_id in self._shown:
            self._shown[seq_id].proposals = 0

    def rollback(self, seq_id: int, length: int) -> None:
        """Drops proposals at `length` and later. Raises ValueError outside length..end: committed entries are the parent's."""
        if not self.length(seq_id) <= length <= self.end(seq_id):
            raise ValueError(f"cannot roll sequence {seq_id} back to {length}: it has {self.length(seq_id)}..{self.end(seq_id)}")
        if seq_id in self._shown:
            self._shown[seq_id].proposals = length - self.length(seq_id)

    def free(self, seq_id: int) -> None:
        self._slots.give_back(seq_id)
        self._shown.pop(seq_id, None)
        self._policy.free(seq_id)

    def _note(self, step: SeqStep) -> _Shown:
        """Its tokens are proposals now, behind the parent's entries as they are."""
        shown, length = self._shown[step.seq_id], self.length(step.seq_id)
        shown.moved_bytes = 0
        if not self._is_current(step.seq_id, shown):
            self._sync(step.seq_id, shown)
        tokens, start = len(step.tokens), step.start - length
        assert 0 <= start <= shown.proposals, f"sequence {step.seq_id}: {step.start} is outside {length}.."
        assert start + tokens <= self._room, f"sequence {step.seq_id}: no room for {start + tokens} proposals"
        shown.proposals = start + tokens
        return shown

    def _is_current(self, seq_id: int, shown: _Shown) -> bool:
        return shown.synced == self._parent.length(seq_id) and shown.rewinds == self._parent.rewinds(seq_id)

    def _sync(self, seq_id: int, shown: _Shown) -> None:
        """Show the parent's committed entries as they are now."""
        length, table = self.length(seq_id), self._parent.table(seq_id)
        if shown.rewinds != self._parent.rewinds(seq_id):
            shown.synced = shown.chosen = shown.syncs = 0
            shown.rewinds = self._parent.rewinds(seq_id)
            self._policy.free(seq_id)

        def copy(at: int, positions: Tensor, run: int = 1) -> None:
            shown.moved_bytes += self._copy(seq_id, table, at, positions, run)

        def positions(first: int, last: int) -> Tensor:
            return torch.arange(first, last, device=table.device)

        if length <= self._budget:
            copy(shown.synced, positions(shown.synced, length))
            shown.entries = length
        else:
            copy(min(shown.synced, self._sinks), positions(min(shown.synced, self._sinks), self._sinks))
            span = range(self._sinks, (length - self._recent) // self._policy.chunk * self._policy.chunk)
            if not shown.chosen or (self._refresh and shown.syncs % self._refresh == 0):
                queries = self._parent.queries(seq_id, self._parent.keep_queries)
                found = self._policy.select(self._parent, seq_id, queries, span, self._choice)
                if found is not None:
                    copy(self._sinks, found.positions.flatten(0, 1), self._policy.chunk)
                    shown.moved_bytes += found.bytes_read
                    shown.chosen = found.positions.shape[-1]
                    shown.refreshes += 1
            shown.syncs += 1
            behind = self._sinks + shown.chosen
            recent = positions(span.stop if shown.chosen else length - self._budget + self._sinks, length)
            copy(behind, recent)
            shown.entries = behind + recent.shape[-1]
        shown.synced, shown.proposals = length, 0

    def _copy(self, seq_id: int, table: Tensor, at: int, positions: Tensor, run: int) -> int:
        """Copy the parent's entries at `positions` [layers * K, n], or [n] for all heads, to entries at, at + 1, ...; bytes moved.

        `table`: the parent's. `run`: positions come in whole chunks of so many.
        """
        slot, to, parent = self._slots[seq_id], slice(at, at + positions.shape[-1]), self._parent
        keys, values = self._keys[slot].flatten(0, 1), self._values[slot].flatten(0, 1)
        each = positions.shape[-1] * copy_bytes(parent.spec.head_dim, parent.dtype.itemsize)
        for heads in head_groups(len(keys), each):
            entries = table[positions if positions.dim() == 1 else positions[heads]]
            keys[heads, to] = parent.keys_of(entries, heads, run)
            values[heads, to] = parent.values_of(entries, heads, run)
        if self._positions is not None:
            self._positions[slot].flatten(0, 1)[:, to] = positions
        return int(4 * keys[:, to].numel() * keys.element_size())
