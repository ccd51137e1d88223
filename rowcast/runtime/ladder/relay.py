"""A draft that only rank 0 runs: what the other ranks have in its place, and how they learn what it proposes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from rowcast.placement.resident import LOGIT_ELEMENTS
from rowcast.runtime.ladder.climb import Climb, Want
from rowcast.runtime.ladder.path import Path
from rowcast.runtime.ladder.rule import Law
from rowcast.runtime.protocols import Decisions
from rowcast.runtime.sampler import Sampler


class Absent:
    """Implements `Runner` for a rung that runs elsewhere: it has a place for as many sequences as that one has."""

    def __init__(self, name: str, *, slots: int | None, max_position: int | None) -> None:
        """`slots`: sequences that the rung's view takes; None: any number. `max_position`: as of `ModelRunner`."""
        self.name = name
        self.seq_ids: set[int] = set()
        self._slots = slots
        self._max_position = max_position

    def admit(self, path: Path, room: int) -> bool:
        if self._max_position is not None and len(path.ids) + room > self._max_position:
            return False
        if self._slots is not None and path.seq_id not in self.seq_ids and len(self.seq_ids) >= self._slots:
            return False
        self.seq_ids.add(path.seq_id)
        return True

    def forward(self, paths: Sequence[Path], wanted: Sequence[int]) -> NoReturn:
        raise AssertionError(f"{self.name} runs elsewhere")

    def logits(self, hidden: Tensor) -> NoReturn:
        raise AssertionError(f"{self.name} runs elsewhere")

    def reads(self) -> NoReturn:
        raise AssertionError(f"{self.name} runs elsewhere")

    def truncate(self, seq_id: int, length: int) -> None: ...

    def commit(self, seq_id: int, length: int) -> None: ...

    def free(self, seq_id: int) -> None:
        self.seq_ids.discard(seq_id)


class FirstRelay:
    """Implements `Relay`: the deciding rank runs the rung and tells the others, ids by one broadcast, laws by others where there are
    some, as many at a time as logits are held."""

    def __init__(self, decisions: Decisions, sampler: Sampler, device: torch.device) -> None:
        self.drafts = decisions.leads
        self._decisions = decisions
        self._sampler = sampler
        self._device = device

    def share(self, climb: Climb, rung: int, wants: Sequence[Want], limits: Sequence[int]) -> None:
        numbers: list[int] = []
        for want, limit in zip(wants, limits, strict=True):
            ids = want.climber.path.ids[want.start :]
            sure = [int(law is None) for law in want.laws]
            numbers += [len(ids), len(sure), self._sampler.rounds(want.climber.path.seq_id)]
            numbers += [*ids, *[0] * (limit - len(ids)), *sure, *[0] * (limit - len(sure))]
        shared = iter(self._decisions.share(numbers))
        sures: list[list[int]] = []
        for want, limit in zip(wants, limits, strict=True):
            count, known, rounds = next(shared), next(shared), next(shared)
            ids, sure = [next(shared) for _ in range(limit)][:count], [next(shared) for _ in range(limit)][:known]
            sures.append(sure)
            if not self.drafts:
                want.climber.path.ids += ids
                self._sampler.resume_rounds(want.climber.path.seq_id, rounds)
        own = [law for want in wants for law in want.laws if law is not None]
        rows, size = sum(sure.count(0) for sure in sures), self._sampler.vocab_size
        laws: list[Tensor] = []
        most = max(1, LOGIT_ELEMENTS // size)
        for first in range(0, rows, most):
            count = min(most, rows - first)
            some = torch.stack(own[first : first + count]) if self.drafts else torch.empty(count, size, device=self._device)
            shown = self._decisions.share_tensor(some)
            laws += [] if self.drafts else shown
        if not self.drafts:
            given = iter(laws)
            for want, sure in zip(wants, sures, strict=True):
                found: list[Law] = [None if certain else next(given) for certain in sure]
                want.laws += found
