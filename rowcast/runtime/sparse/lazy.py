"""Lazy K/V: a head that a token skips gets the token's keys and values only once a later token uses the head.

The attention's inputs of the last tokens are kept for that (Deja Vu, arXiv 2310.17157, whose code keeps 16). Whoever uses a head
first fills in all that it lacks, reading its rows once; so what a head lacks is always its last entries, and one position a head
says which. Attention therefore never sees a missing entry: lazy K/V changes what is read and when, and no output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rowcast.runtime.protocols import KVView, Span
from rowcast.runtime.sparse.sizes import LATE_TOKENS
from rowcast.runtime.step import SeqStep


@dataclass(frozen=True, slots=True)
class Lacking:
    """What earlier tokens lack of the heads that a pass computes in one layer: L tokens, sequence by sequence."""

    inputs: Tensor
    """[L, D]."""
    positions: Tensor
    """[L] int64."""
    prompt_lengths: Tensor
    """[L] int64, of their requests."""
    spans: Sequence[Span]


@dataclass(slots=True)
class _Sequence:
    inputs: Tensor
    """[layers, LATE_TOKENS, D]: that of position p is at p % LATE_TOKENS."""
    filled: list[list[int]]
    """By layer and head: the position that its K/V are complete up to."""

    @property
    def base(self) -> int:
        """Inputs from here on may be needed."""
        return min(map(min, self.filled))

    def clamp(self, low: int, high: int) -> None:
        """Entries before `low` are complete without us, those from `high` on are no more."""
        self.filled = [[max(low, min(high, end)) for end in heads] for heads in self.filled]


class LazyKV:
    """The inputs of tokens whose K/V some heads may lack, for the sequences of one KV view.

    Keyed by sequence and position: a position that runs again replaces what was kept of it, so that rejected proposals need no call.
    """

    def __init__(self, layers: int, heads: int) -> None:
        """`heads`: this rank's, of queries and of K/V alike."""
        self._shape = layers, heads
        self._sequences: dict[int, _Sequence] = {}
        self._steps: Sequence[SeqStep] = ()
        self._written: list[tuple[list[int], Sequence[int], int]] = []
        """Once K/V of the last `exchange` are written: the entries of `filled`, the heads, and what they are then filled up to."""
        self.complete = True
        """Whether the pass computes K/V of all heads, its own and those that are missing."""

    @property
    def bytes(self) -> int:
        """Bytes of all kept inputs: at most `late_bytes` for each sequence of the view."""
        return sum(seq.inputs.nbytes for seq in self._sequences.values())

    def begin(self, steps: Sequence[SeqStep], kv: KVView, few: bool) -> None:
        """A pass over `steps`, which are bound to `kv`, starts. `few`: it reads chosen heads only, as far as it may."""
        for gone in self._sequences.keys() - kv.seq_ids:
            del self._sequences[gone]
        self._steps = steps
        self._written.clear()
        self.complete = not few
        for step in steps:
            seq, base, first = self._sequences.get(step.seq_id), step.start, kv.late_from(step.seq_id)
            if seq is not None:
                seq.clamp(first or 0, step.start)
                base = seq.base
            if first is None or step.start < first or step.start + len(step.tokens) - base >= LATE_TOKENS:
                self.complete = True

    def exchange(self, layer: int, x: Tensor, heads: Tensor | None) -> Lacking | None:
        """Keep the inputs x [T, D] of the bound tokens, and take those of earlier ones that lack `heads` [C] (None: all).

        The caller computes K/V of `heads` for both, no others, and calls `written` when the view has them; with `complete`, `heads` is
        None.
        """
        assert heads is None or not self.complete
        chosen = range(self._shape[1]) if heads is None else heads.tolist()
        inputs: list[Tensor] = []
        spans: list[Span] = []
        prompt_lengths: list[int] = []
        row = 0
        for step in self._steps:
            rows, end = x[row : row + len(step.tokens)], step.start + len(step.tokens)
            row += len(step.tokens)
            seq = self._sequences.get(step.seq_id)
            if seq is None:
                if self.complete:
                    continue
                layers, count = self._shape
                kept = x.new_empty(layers, LATE_TOKENS, x.shape[1])
                seq = self._sequences[step.seq_id] = _Sequence(kept, [[step.start] * count for _ in range(layers)])
            filled = seq.filled[layer]
            missing = range(min(filled[head] for head in chosen), step.start)
            if missing:
                inputs.append(seq.inputs[layer, _ring(missing, x.device)])
                spans.append(Span(step.seq_id, missing))
                prompt_lengths += [step.prompt_length] * len(missing)
            self._written.append((filled, chosen, end))
            if not self.complete:
                seq.inputs[layer, _ring(range(step.start, end), x.device)] = rows
        if not spans:
            return None
        positions = torch.tensor([p for span in spans for p in span.positions], device=x.device)
        return Lacking(torch.cat(inputs), positions, torch.tensor(prompt_lengths, device=x.device), spans)

    def written(self) -> None:
        """The view has the K/V that the last `exchange` asked for."""
        for filled, heads, end in self._written:
            for head in heads:
                filled[head] = end
        self._written.clear()


def _ring(positions: range, device: torch.device) -> Tensor:
    return torch.tensor([p % LATE_TOKENS for p in positions], device=device)
