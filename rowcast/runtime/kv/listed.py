"""The retrieval view of a GPU: chunks of the full store by list, read where they lie (TriForce's retrieval cache without its copies).

What is shown is what `SelectedKV` with the policy `Retrieval` shows: sinks, chosen chunks, the recent window and proposals. But nothing
is copied: a choice is a list of chunks for each layer and KV head, and proposals lie behind the committed entries, as in `SharedKV`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rowcast.kernels import gpu
from rowcast.runtime.kv.paged import PagedKV, visible_bytes
from rowcast.runtime.kv.selection import Retrieval
from rowcast.runtime.kv.shared import SharedKV
from rowcast.runtime.kv.sizes import ListWork, most_chunks, rounded_chunks
from rowcast.runtime.kv.slots import Slots
from rowcast.runtime.ladder.spec import RECENT, SINKS
from rowcast.runtime.step import SeqStep

_MOST_PROPOSALS = 64
"""More than a round ever has behind the committed tokens."""


@dataclass(slots=True)
class _Shown:
    """What is shown of one sequence."""

    slot: int
    synced: int = -1
    """The parent's length when it was brought up to date."""
    rewinds: int = 0
    chosen: bool = False
    recent: int = 0
    """All entries from here on are shown; those before it by list."""
    ready: tuple[int, int] | None = None
    """The parent's length and rewinds for which a round on the device has chosen already."""
    syncs: int = 0
    refreshes: int = 0
    scored_bytes: int = 0
    """Summaries read before the last bound pass."""


class ListedKV(SharedKV):
    """At most `budget` committed entries a sequence, layer and KV head, none of them copied. Implements `KVView`, on a GPU alone."""

    def __init__(
        self,
        parent: PagedKV,
        policy: Retrieval,
        *,
        budget: int,
        sinks: int = SINKS,
        recent: int = RECENT,
        refresh: int = 1,
        slots: int,
        rows: int,
        context: int,
    ) -> None:
        """As `SelectedKV`, whose preconditions hold here, too; of a round's proposals there may be any number. `rows`: most sequences
        of a round, with lists or without. `context`: entries of the longest one."""
        super().__init__(parent)
        self.sinks = -(-sinks // policy.chunk) * policy.chunk
        self._choice = (budget - self.sinks - recent - policy.chunk + 1) // policy.chunk
        assert self._choice >= 1, f"{budget} entries leave nothing to choose"
        self._policy = policy
        self._budget, self._recent, self._refresh = budget, recent, refresh
        self._slots = Slots(slots)
        self._shape = parent.spec.num_layers, parent.num_kv_heads, self._choice
        self._ids = torch.full((slots, *self._shape), -1, dtype=torch.int32, device=parent.device)
        self._rows = torch.full((rows, *self._shape), -1, dtype=torch.int32, device=parent.device)
        """The lists of a round's sequences."""
        tokens, group = parent.keep_queries, parent.num_heads // parent.num_kv_heads
        self._sizes = ListWork(parent.spec.num_layers, parent.num_kv_heads, tokens * group, parent.dtype.itemsize)
        each, all_ = self._sizes.bytes(most_chunks(context, tokens, policy.chunk))
        self._work = torch.empty(min(rows * each, all_) // 4, dtype=torch.float32, device=parent.device)
        """Of choices, one after another."""
        windows = [window or 0 for window in parent.spec.windows]
        self._windows = torch.tensor(windows, dtype=torch.int32, device=parent.device) if any(windows) else None
        self._shown: dict[int, _Shown] = {}
        self._bound: list[tuple[slice, SeqStep]] = []

    @property
    def chunk(self) -> int:
        """Positions to a chunk."""
        return self._policy.chunk

    @property
    def most_shown(self) -> int:
        """Bound of a token's entries, places in the lists that hold none included."""
        return self.sinks + self._choice * self.chunk + self._budget + _MOST_PROPOSALS

    @property
    def bytes(self) -> int:
        """Bytes of all lists, and of work space."""
        return self._ids.nbytes + self._rows.nbytes + self._work.nbytes

    def admit(self, seq_id: int) -> bool:
        """Whether the sequence has a slot now; it keeps it until `free`."""
        if not self._slots.take(seq_id):
            return False
        if seq_id not in self._shown:
            self._shown[seq_id] = _Shown(self._slots[seq_id])
            self._ids[self._slots[seq_id]].fill_(-1)  # the slot's last owner has left its list
        return super().admit(seq_id)

    def reserve(self, step: SeqStep) -> tuple[list[int], int]:
        self._sync(step)
        return super().reserve(step)

    def slot_if_due(self, seq_id: int) -> int:
        """The slot whose lists are to be chosen anew once the parent has grown; -1: they stay."""
        shown = self._shown[seq_id]
        return shown.slot if self._is_due(shown) else -1

    def choose(
        self,
        queries: Tensor,
        tables: Tensor,
        lengths: Tensor,
        slots: Tensor,
        *,
        most_chunks: int,
        counts: Tensor | None = None,
    ) -> None:
        """List the best chunks between the sinks and the recent entries of sequences that outgrew the budget. Asks the device nothing.

        queries [layers, B, n, H, d] after RoPE, of which the first counts[b] (int32 [B]; None: all) are the last committed tokens';
        tables [B, blocks], lengths [B] and slots [B] int32: the lists of slot -1 stay. `most_chunks`: that a sequence has at most.
        Precondition: summaries are up to date; B, n and `most_chunks` are within what the view was made for.
        """
        from rowcast.kernels.gpu import retrieval

        parent, chunk = self._parent, self.chunk
        stay = (slots < 0) | (lengths <= self._budget)
        first = torch.full_like(lengths, self.sinks // chunk)
        last = ((lengths - self._recent) // chunk).masked_fill_(stay, -1)
        together = self._sizes.together(most_chunks)
        for low in range(0, len(lengths), together):
            some = slice(low, low + together)
            scores = retrieval.chunk_scores(
                queries[:, some],
                parent.summary_store(self._policy.summary),
                tables[some],
                first[some],
                last[some],
                scale=self.spec.attention_scale,
                chunk=chunk,
                most_chunks=most_chunks,
                counts=None if counts is None else counts[some],
                lengths=lengths[some],
                slopes=self.slopes,
                absolute_bias_scale=self.absolute_bias_scale,
                windows=self._windows,
                work=self._work,
            )
            retrieval.choose_chunks(scores, self._choice, first[some], last[some], out=self._ids, slots=slots[some])

    def note_choice(self, seq_id: int, length: int) -> None:
        """`choose` was told of the sequence at this length, which the parent is to have."""
        shown = self._shown[seq_id]
        if length > self._budget:
            shown.chosen, shown.ready = True, (length, self._parent.rewinds(seq_id))

    def seat(self, seq_id: int, row: int) -> int:
        """Put the sequence's lists into a row of the round's; returns the position from which it shows everything."""
        shown = self._shown[seq_id]
        self._rows[row].copy_(self._ids[shown.slot])
        return shown.recent

    def lists(self, batch: int) -> Tensor:
        """[B, layers, K, n] int32, as `seat` filled it; -1: none."""
        return self._rows[:batch]

    def bind(self, steps: Sequence[SeqStep]) -> None:
        """As `KVView`. Precondition: the sequences are admitted, and the blocks cover what a round may draft."""
        for step in steps:
            self._sync(step)
        super().bind(steps)
        self._bound, first = [], 0
        for step in steps:
            self._bound.append((slice(first, first + len(step.tokens)), step))
            first += len(step.tokens)

    def attend(self, layer: int, q: Tensor, heads: Tensor | None = None) -> Tensor:  # [T, H, d] -> [T, C, d]
        from rowcast.kernels.gpu import decoding

        parts = []
        for rows, step in self._bound:
            shown = self._shown[step.seq_id]
            for first in range(rows.start, rows.stop, gpu.MOST_TOKENS):
                some = q[first : min(first + gpu.MOST_TOKENS, rows.stop)].contiguous()
                start = step.start + first - rows.start
                numbers = torch.tensor([start, shown.recent, *step.blocks], dtype=torch.int32, device=q.device)
                parts.append(
                    decoding.decode(
                        some,
                        *self.entries(layer),
                        numbers[None, 2:],
                        numbers[:1],
                        scale=self.spec.attention_scale,
                        most_entries=start + len(some),
                        most_shown=self.most_shown,
                        window=self.spec.windows[layer],
                        slopes=self.slopes,
                        absolute_bias_scale=self.absolute_bias_scale,
                        heads=heads,
                        chunks=decoding.Chunks(self._ids[shown.slot, layer][None], self.chunk, self.sinks, numbers[1:2]),
                    )
                )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def free(self, seq_id: int) -> None:
        super().free(seq_id)
        self._slots.give_back(seq_id)
        self._shown.pop(seq_id, None)

    def bytes_read(self, seq_id: int) -> int:
        """Bytes of K/V that attention reads in one pass for this sequence, up to `end`; of the first pass after the parent's length
        has changed also the summaries that were scored."""
        shown, parent, length = self._shown[seq_id], self._parent, self.length(seq_id)
        listed = self.sinks + self._choice * self.chunk * shown.chosen
        entries = length if length <= self._budget else listed + length - shown.recent
        entries += self.end(seq_id) - length
        return visible_bytes(parent.spec, parent.num_kv_heads, parent.dtype, entries) + shown.scored_bytes

    def refreshes(self, seq_id: int) -> int:
        """How often the sequence's chunks were chosen anew."""
        shown = self._shown.get(seq_id)
        return shown.refreshes if shown else 0

    def _sync(self, step: SeqStep) -> None:
        """Show the parent's committed entries as they are now."""
        shown, parent, length = self._shown[step.seq_id], self._parent, self.length(step.seq_id)
        shown.scored_bytes = 0
        if (shown.synced, shown.rewinds) == (length, parent.rewinds(step.seq_id)):
            return
        if shown.rewinds != parent.rewinds(step.seq_id):
            shown.rewinds, shown.syncs = parent.rewinds(step.seq_id), 0
            self._clear(shown)
        shown.synced = length
        if length <= self._budget:
            shown.recent = self.sinks
            self._clear(shown)
            return
        stop = (length - self._recent) // self.chunk * self.chunk
        if shown.ready == (length, shown.rewinds) or (self._is_due(shown) and self._choose(step, shown)):
            shown.chosen = True
            shown.refreshes += 1
            scored = self._policy.summary.parts * self._shape[0] * self._shape[1] * (stop - self.sinks) // self.chunk
            shown.scored_bytes = scored * self.spec.head_dim * parent.dtype.itemsize
        shown.syncs += 1
        shown.recent = stop if shown.chosen else length - self._budget + self.sinks

    def _clear(self, shown: _Shown) -> None:
        """Nothing is listed."""
        if shown.chosen:
            self._ids[shown.slot].fill_(-1)
            shown.chosen = False

    def _is_due(self, shown: _Shown) -> bool:
        return not shown.chosen or (self._refresh > 0 and shown.syncs % self._refresh == 0)

    def _choose(self, step: SeqStep, shown: _Shown) -> bool:
        """List the best chunks by the queries of the parent's last pass; whether it kept any."""
        parent, length = self._parent, self.length(step.seq_id)
        queries = parent.queries(step.seq_id, parent.keep_queries)
        if queries is None:
            return False
        numbers = torch.tensor([length, shown.slot, *step.blocks], dtype=torch.int32, device=queries.device)
        chunks = rounded_chunks(length // self.chunk)
        self.choose(queries[:, None], numbers[None, 2:], numbers[:1], numbers[1:2], most_chunks=chunks)
        return True
