"""A rung that runs a model: a decoder over a KV view."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rowcast.runtime.decoder import Decoder
from rowcast.runtime.kv.paged import PagedKV
from rowcast.runtime.ladder.path import Path
from rowcast.runtime.ladder.runner import Ran
from rowcast.runtime.protocols import KVView, Reads
from rowcast.runtime.sharded_logits import Logits
from rowcast.runtime.step import SeqStep


class ModelRunner:
    """Implements `Runner`. The decoder may be shared with other rungs; the view is this rung's own.

    A view that lacks many tokens, as a draft's does that has yet to read the prompt, gets them all before the pass, in pieces: the
    round takes so much longer, for every sequence in it.
    """

    def __init__(
        self,
        name: str,
        decoder: Decoder,
        view: KVView,
        *,
        max_batch_tokens: int,
        max_position: int | None = None,
    ) -> None:
        """`max_batch_tokens`: most tokens in one pass. `max_position`: where the model's positions end, if they do."""
        self.name = name
        self.view = view
        self.decoder = decoder
        self._max_batch_tokens = max_batch_tokens
        self._max_position = max_position

    @property
    def seq_ids(self) -> set[int]:
        return self.view.seq_ids

    def admit(self, path: Path, room: int) -> bool:
        if self._max_position is not None and len(path.ids) + room > self._max_position:
            return False
        return self.view.admit(path.seq_id)

    def forward(self, paths: Sequence[Path], wanted: Sequence[int]) -> Ran:
        view = self.view
        before = [view.end(path.seq_id) for path in paths]
        chosen = [view.refreshes(path.seq_id) for path in paths]
        if sum(len(path.ids) for path in paths) - sum(before) > self._max_batch_tokens:
            for path, want in zip(paths, wanted, strict=True):
                self.catch_up(path, len(path.ids) - want)
        steps = [_step(path, view.end(path.seq_id), len(path.ids)) for path in paths]
        hidden = self.decoder.run(steps, view)
        return Ran(
            _last_rows(hidden, [len(step.tokens) for step in steps], wanted),
            wanted=list(wanted),
            tokens=[len(path.ids) - start for path, start in zip(paths, before, strict=True)],
            generated=[max(0, len(path.ids) - max(start, path.prompt_length)) for path, start in zip(paths, before, strict=True)],
            kv_bytes=[view.bytes_read(path.seq_id) for path in paths],
            refreshes=[view.refreshes(path.seq_id) - count for path, count in zip(paths, chosen, strict=True)],
        )

    def logits(self, hidden: Tensor) -> Logits:
        return self.decoder.own_logits(hidden)

    def reads(self) -> Reads:
        return self.decoder.weights.reads()

    def truncate(self, seq_id: int, length: int) -> None:
        if self.view.end(seq_id) > length:
            self.view.rollback(seq_id, length)

    def commit(self, seq_id: int, length: int) -> None:
        view = self.view
        if seq_id in view.seq_ids:
            view.commit(seq_id, max(0, min(view.end(seq_id), length) - view.length(seq_id)))
            view.rollback(seq_id, view.length(seq_id))

    def free(self, seq_id: int) -> None:
        self.view.free(seq_id)

    def adopt(self, step: SeqStep) -> None:
        """The step's sequence begins at its `start`. Precondition: the view is a paged store, whose blocks hold what lies before."""
        assert isinstance(self.view, PagedKV)
        self.view.adopt(step.seq_id, step.start, step.blocks)

    def catch_up(self, path: Path, end: int) -> None:
        """Run the path's tokens before `end`, in pieces."""
        while (start := self.view.end(path.seq_id)) < end:
            self.decoder.run([_step(path, start, min(end, start + self._max_batch_tokens))], self.view)


def _step(path: Path, start: int, end: int) -> SeqStep:
    return SeqStep(path.seq_id, path.ids[start:end], start, path.blocks, path.prompt_length, sample=True)


def _last_rows(hidden: Tensor, tokens: Sequence[int], wanted: Sequence[int]) -> Tensor:
    """The last `wanted[i]` of each `tokens[i]` consecutive rows: [T, D] -> [sum(wanted), D]."""
    if list(tokens) == list(wanted):
        return hidden
    rows: list[int] = []
    end = 0
    for count, want in zip(tokens, wanted, strict=True):
        end += count
        rows.extend(range(end - want, end))
    return hidden[torch.tensor(rows, dtype=torch.int64, device=hidden.device)]
