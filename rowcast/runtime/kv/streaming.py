"""A store for a draft model of its own: the first tokens and the recent ones (StreamingLLM, arXiv 2309.17453, section 3.2).

Positions are by slot: the sinks slide along, so that whatever is shown stands at neighbouring positions. Only differences count
under RoPE and ALiBi; the recent keys therefore keep their true positions and the sinks are rotated up to them.

What a token sees is a function of its position alone, however passes were cut: the recent entries of position p start at
sinks + stride * ceil(max(0, p + 1 - budget) / stride).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rowcast.errors import UserError
from rowcast.kernels.attention import attend
from rowcast.runtime.kv.paged import alibi, visible_bytes, write_heads
from rowcast.runtime.kv.sizes import why_not_streaming
from rowcast.runtime.kv.slots import Slots
from rowcast.runtime.ladder.spec import SINKS, STREAMING_STRIDE
from rowcast.runtime.protocols import Late
from rowcast.runtime.rope import Rope, apply_rope
from rowcast.runtime.shard import Shard
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.step import SeqStep


@dataclass(slots=True)
class _Sequence:
    length: int = 0
    end: int = 0
    floor: int = 0
    """What it can be rolled back to, beside 0: later entries' contexts are still there."""
    base: int = 0
    """The store holds the recent entries base .. end - 1, behind the sinks as base sees them."""


@dataclass(frozen=True, slots=True)
class _Group:
    """Tokens of a pass, positions first .. last - 1, that see the sinks and what is recent from `start` on."""

    first: int
    last: int
    start: int
    turn: tuple[Tensor, Tensor] | None
    """cos and sin [1, 1, d] that bring the sinks there."""


@dataclass(frozen=True, slots=True)
class _Bound:
    """One sequence's part of the bound pass."""

    rows: slice
    slot: int
    start: int
    end: int
    base: int
    """Where its recent entries start while the pass runs."""
    kept: int | None
    """Where they start after it, if the store cannot hold all of them: then the pass attends beside the store."""
    groups: list[_Group]


class StreamingKV:
    """At most `budget` entries a token: [layers, slots, K, entries, d] for keys and for values. Implements `KVView`."""

    def __init__(
        self,
        spec: ModelSpec,
        shard: Shard,
        *,
        budget: int,
        sinks: int = SINKS,
        stride: int = STREAMING_STRIDE,
        slots: int,
        room: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`slots` sequences at a time. Of a pass that is longer than the store, the last `room` tokens can be rolled back. Entries
        are evicted `stride` at a time. Allocates everything. Raises UserError where the model cannot stream. Precondition: the budget
        is more than sinks and a stride (`Rung` sees to it).
        """
        reason = why_not_streaming(spec)
        if reason is not None:
            raise UserError(f"this {spec.family} model cannot run over a streaming KV view, as {reason}: give it its whole KV")
        assert budget > sinks + stride, f"{budget} entries are too few for {sinks} sinks and a stride of {stride}"
        self.spec = spec
        self._device = device
        self._dtype = dtype
        self._budget = budget
        self._sinks = sinks
        self._stride = stride
        self._room = room
        self._slots = Slots(slots)
        self.slopes, self.absolute_bias_scale = alibi(spec, shard, device)
        self._rope: Rope | None = None
        if spec.rope is not None:
            # The keys come with the attention factor applied.
            self._rope = Rope(dataclasses.replace(spec.rope, attention_factor=1.0), spec.head_dim, device)
        kv_heads = shard.kv_heads(spec)
        self._kv_heads = kv_heads.stop - kv_heads.start
        shape = (spec.num_layers, slots, self._kv_heads, budget + stride + room, spec.head_dim)
        self._keys = torch.empty(shape, dtype=dtype, device=device)
        self._values = torch.empty(shape, dtype=dtype, device=device)
        self._sink_keys = torch.empty(*shape[:3], sinks, spec.head_dim, dtype=dtype, device=device)
        """At their true positions; written when `base` first moves."""
        self._sequences: dict[int, _Sequence] = {}
        self._bound: list[_Bound] = []
        self._beside: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def bytes(self) -> int:
        """Bytes of all slots."""
        return (2 * self._keys.numel() + self._sink_keys.numel()) * self._keys.element_size()

    @property
    def seq_ids(self) -> set[int]:
        """Admitted sequences."""
        return set(self._sequences)

    def admit(self, seq_id: int) -> bool:
        """Whether the sequence has a slot now; it keeps it until `free`."""
        if not self._slots.take(seq_id):
            return False
        self._sequences.setdefault(seq_id, _Sequence(base=self._sinks))
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
        """Bytes of K/V that attention reads in one pass for this sequence's last token."""
        end = self.end(seq_id)
        shown = end - self._start(end - 1) + self._sinks
        return visible_bytes(self.spec, self._kv_heads, self._dtype, shown)

    def refreshes(self, seq_id: int) -> int:
        """0: it does not choose."""
        return 0

    def bind(self, steps: Sequence[SeqStep]) -> None:
        """As `KVView`. Precondition: the sequences are admitted."""
        self._bound.clear()
        self._beside.clear()
        first = 0
        for step in steps:
            seq, slot = self._sequences[step.seq_id], self._slots[step.seq_id]
            assert max(seq.length, seq.floor) <= step.start <= seq.end, f"sequence {step.seq_id} cannot go on at {step.start}"
            seq.end = step.start
            self._evict(seq, slot)
            end, base = step.start + len(step.tokens), seq.base
            kept = None
            if self._sinks + end - base > self._keys.shape[3]:
                seq.floor = max(seq.floor, end - self._room)
                kept = seq.base = self._start(seq.floor)
            rows = slice(first, first + len(step.tokens))
            self._bound.append(_Bound(rows, slot, step.start, end, base, kept, list(self._groups(step.start, end, base))))
            seq.end, first = end, rows.stop

    shares_entries = False

    @property
    def block_size(self) -> int:
        """A sequence's entries are one block."""
        return self._keys.shape[3]

    @property
    def serves_device(self) -> bool:
        """Whether no layer's window is shorter than the store. As `entries` and `reserve`, for rounds on the device (`kv.device`)."""
        return all(window is None or window >= self.block_size for window in self.spec.windows)

    def entries(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [slots, entries, K, d]."""
        return self._keys[layer].transpose(1, 2), self._values[layer].transpose(1, 2)

    def reserve(self, step: SeqStep) -> tuple[list[int], int]:
        """The step's tokens are proposals now; the sequence's slot, and what is added to a position to find its place there.

        All of them see what the first one sees, also where a later one's recent entries would start further on: on the device a
        round evicts nothing. Precondition: all before the step is committed: there is room for the proposals of one round.
        """
        seq, slot = self._sequences[step.seq_id], self._slots[step.seq_id]
        assert step.start == seq.length, f"sequence {step.seq_id} cannot go on at {step.start}: {seq.length} tokens are committed"
        seq.end = step.start
        self._evict(seq, slot)
        seq.end = step.start + len(step.tokens)
        assert self._sinks + seq.end - seq.base <= self.block_size, (
            f"sequence {step.seq_id}: no room for {len(step.tokens)} tokens"
        )
        return [slot], self._sinks - seq.base

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:  # [T, K, d] each
        for seq in self._bound:
            new_keys, new_values = k[seq.rows].transpose(0, 1), v[seq.rows].transpose(0, 1)
            keys, values = self._keys[layer, seq.slot], self._values[layer, seq.slot]
            at = self._sinks + seq.start - seq.base
            if seq.kept is None:
                keys[:, at : at + new_keys.shape[1]] = new_keys
                values[:, at : at + new_keys.shape[1]] = new_values
            else:
                beside = torch.cat((keys[:, :at], new_keys), 1), torch.cat((values[:, :at], new_values), 1)
                self._beside[seq.slot] = beside
                self._keep_last(layer, seq, *beside)

    def late_from(self, seq_id: int) -> int:
        """Behind the sinks, whose keys may be turned at any time, and behind what was evicted."""
        slot = self._slots[seq_id]
        return next(seq.base for seq in self._bound if seq.slot == slot)

    def fill(self, layer: int, late: Late) -> None:
        done = 0
        for span in late.spans:
            slot, rows = self._slots[span.seq_id], slice(done, done + len(span.positions))
            at = late.positions[rows] + (self._sinks - self.late_from(span.seq_id))
            for store, entries in ((self._keys, late.k), (self._values, late.v)):
                write_heads(store[layer, slot].transpose(0, 1), at, late.heads, entries[rows])
            done = rows.stop

    def attend(self, layer: int, q: Tensor, heads: Tensor | None = None) -> Tensor:  # [T, H, d] -> [T, C, d]
        parts = []
        for seq in self._bound:
            if seq.kept is None:
                keys, values = self._keys[layer, seq.slot], self._values[layer, seq.slot]
            else:
                keys, values = self._beside.pop(seq.slot)
            sinks = keys[:, : self._sinks] if seq.base == self._sinks else self._sink_keys[layer, seq.slot]
            for group in seq.groups:
                own, recent = group.last - group.first, slice(group.start - seq.base, group.last - seq.base)
                first = seq.rows.start + group.first - seq.start
                parts.append(
                    attend(
                        q[first : first + own],
                        self._shown(keys, recent, _turn(sinks, group.turn)).transpose(0, 1),
                        self._shown(values, recent, values[:, : self._sinks]).transpose(0, 1),
                        scale=self.spec.attention_scale,
                        window=self.spec.windows[layer],
                        slopes=self.slopes,
                        absolute_bias_scale=self.absolute_bias_scale,
                        heads=heads,
                    )
                )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def commit(self, seq_id: int, tokens: int) -> None:
        seq = self._sequences.get(seq_id)
        if seq is None or tokens > seq.end - seq.length:
            raise ValueError(f"sequence {seq_id} has fewer than {tokens} proposed tokens")
        seq.length += tokens
        seq.floor = max(seq.floor, seq.length)

    def rollback(self, seq_id: int, length: int) -> None:
        """Drop proposals at `length` and later. Raises ValueError for any other length but 0, and for proposals of a pass longer than
        the store beyond its last `room`: what they saw is gone."""
        seq = self._sequences.get(seq_id, _Sequence())
        if length == 0:
            seq.length, seq.end, seq.floor, seq.base = 0, 0, 0, self._sinks
        elif seq.floor <= length <= seq.end:
            seq.end = length
        else:
            raise ValueError(f"cannot roll sequence {seq_id} back to {length}: only to 0 or to {seq.floor}..{seq.end}")

    def free(self, seq_id: int) -> None:
        self._slots.give_back(seq_id)
        self._sequences.pop(seq_id, None)

    def _start(self, position: int) -> int:
        """Where the recent entries of a token start."""
        return self._sinks + self._stride * -(-max(0, position + 1 - self._budget) // self._stride)

    def _groups(self, first: int, end: int, base: int) -> Iterator[_Group]:
        """Positions first .. end - 1 by what they see; the base's own group needs no turn."""
        while first < end:
            start = self._start(first)
            last = min(end, self._budget + start - self._sinks)
            yield _Group(first, last, start, None if start == base else self._angles(start))
            first = last

    def _angles(self, start: int) -> tuple[Tensor, Tensor] | None:
        """cos and sin that turn sinks at their true positions to those before `start`."""
        if self._rope is None:
            return None
        none = torch.zeros(1, dtype=torch.int64, device=self._device)
        return self._rope.cos_sin(none + start - self._sinks, none)

    def _shown(self, entries: Tensor, recent: slice, sinks: Tensor) -> Tensor:
        """Sinks and recent entries (`recent`: from the base): entries [K, n, d] -> [K, m, d], in place if they are neighbours."""
        if recent.start == 0:
            return entries[:, : self._sinks + recent.stop]
        return torch.cat((sinks, entries[:, self._sinks + recent.start : self._sinks + recent.stop]), 1)

    def _evict(self, seq: _Sequence, slot: int) -> None:
        """Let the recent entries start where the next token sees them start, in all layers."""
        start, sinks = self._start(max(seq.length, seq.floor)), self._sinks
        if start == seq.base:
            return
        if seq.base == sinks:
            self._sink_keys[:, slot] = self._keys[:, slot, :, :sinks]
        gone, held = start - seq.base, seq.end - start
        for store in (self._keys[:, slot], self._values[:, slot]):
            store[:, :, sinks : sinks + held] = store[:, :, sinks + gone : sinks + gone + held].clone()
        turned = _turn(self._sink_keys[:, slot].flatten(0, 1), self._angles(start))
        self._keys[:, slot, :, :sinks] = turned.view(self.spec.num_layers, self._kv_heads, sinks, self.spec.head_dim)
        seq.base = start

    def _keep_last(self, layer: int, seq: _Bound, keys: Tensor, values: Tensor) -> None:
        """Put what later passes see of entries [K, n, d], which start at the pass's base, into the store."""
        assert seq.kept is not None
        sinks, held = self._sinks, self._sinks + seq.end - seq.kept
        if seq.base == sinks:
            self._sink_keys[layer, seq.slot] = keys[:, :sinks]
        self._keys[layer, seq.slot, :, :sinks] = _turn(self._sink_keys[layer, seq.slot], self._angles(seq.kept))
        self._values[layer, seq.slot, :, :sinks] = values[:, :sinks]
        for store, entries in ((self._keys, keys), (self._values, values)):
            store[layer, seq.slot, :, sinks:held] = entries[:, sinks + seq.kept - seq.base :]


def _turn(sinks: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor:
    """Rotate keys [N, sinks, d] on by angles cos, sin [1, 1, d], in float32; keys without rotary positions stay."""
    return sinks if turn is None else apply_rope(sinks.float(), *turn).to(sinks.dtype)
