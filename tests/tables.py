"""Ladders of tables: rungs whose law at any history can be looked up, and the executor's part of a round."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from rowcast.runtime.ladder.climb import Climb, Climber
from rowcast.runtime.ladder.path import Path
from rowcast.runtime.ladder.rule import Proposal, Rule
from rowcast.runtime.ladder.runner import Lookup, Ran, Runner
from rowcast.runtime.params import SamplingParams
from rowcast.runtime.protocols import Reads
from rowcast.runtime.sampler import Row, Sampler

PROMPT = (0, 1)


class Table:
    """Implements `Runner`: the logits that follow a history are any function of the whole of it."""

    def __init__(self, name: str, rule: Callable[[tuple[int, ...]], Tensor]) -> None:
        """`rule`: history -> logits [V] float32."""
        self.name = name
        self._rule = rule
        self._numbers: dict[tuple[int, ...], int] = {}
        self._rows: list[Tensor] = []
        self._held: dict[int, list[int]] = {}

    @property
    def seq_ids(self) -> set[int]:
        return set(self._held)

    def row(self, history: Iterable[int]) -> Tensor:
        return self._rows[self._number(tuple(history))]

    def admit(self, path: Path, room: int) -> bool:
        return True

    def forward(self, paths: Sequence[Path], wanted: Sequence[int]) -> Ran:
        """The hidden state of a token is the number of the history that it ends."""
        numbers = []
        for path, count in zip(paths, wanted, strict=True):
            held = self._held.get(path.seq_id, [])
            assert path.ids[: len(held)] == held, "a rejected token is still in the view"
            assert len(path.ids) - len(held) >= count
            self._held[path.seq_id] = list(path.ids)
            ends = range(len(path.ids) - count + 1, len(path.ids) + 1)
            numbers += [self._number(tuple(path.ids[:end])) for end in ends]
        none = [0] * len(paths)
        return Ran(torch.tensor(numbers)[:, None], list(wanted), list(wanted), list(wanted), none, none)

    def logits(self, hidden: Tensor) -> Tensor:
        return torch.stack(self._rows)[hidden[:, 0]]

    def reads(self) -> Reads:
        return Reads()

    def truncate(self, seq_id: int, length: int) -> None:
        del self._held.get(seq_id, [])[length:]

    def commit(self, seq_id: int, length: int) -> None:
        self.truncate(seq_id, length)

    def free(self, seq_id: int) -> None:
        self._held.pop(seq_id, None)

    def _number(self, history: tuple[int, ...]) -> int:
        if history not in self._numbers:
            self._numbers[history] = len(self._rows)
            self._rows.append(self._rule(history))
        return self._numbers[history]


class Parrot:
    """Implements `Lookup`: knows tokens that follow from the history, sometimes fewer than it is asked for."""

    name = "parrot"
    seq_ids: set[int] = set()  # noqa: RUF012

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def admit(self, path: Path, room: int) -> bool:
        return True

    def propose(self, path: Path, count: int) -> list[int]:
        known = count - (len(path.ids) % 4 == 3)
        return [(sum(path.ids) + i * i) % self._vocab_size for i in range(known)]

    def truncate(self, seq_id: int, length: int) -> None: ...

    def commit(self, seq_id: int, length: int) -> None: ...

    def free(self, seq_id: int) -> None: ...


def random_table(name: str, seed: int, vocab_size: int, *, like: Table | None = None, spread: float = 1.5) -> Table:
    """Logits drawn for each history; `like`: another table's, disturbed."""

    def rule(history: tuple[int, ...]) -> Tensor:
        key = seed
        for token in history:
            key = (key * 1_000_003 + token + 1) % (2**61 - 1)
        noise = torch.randn(vocab_size, generator=torch.Generator().manual_seed(key)) * spread
        return noise if like is None else like.row(history) + noise

    return Table(name, rule)


def constant_table(name: str, logits: Sequence[float]) -> Table:
    return Table(name, lambda history: torch.tensor(logits))


class Rounds:
    """The executor's part: propose, run the last rung, verify, commit."""

    def __init__(self, rungs: Sequence[Runner | Lookup], rule: Rule, sampler: Sampler, *, logit_rows: int = 1 << 20) -> None:
        *lower, top = rungs
        assert isinstance(top, Table)
        self.climb = Climb(lower, rule, logit_rows=logit_rows)
        self._rungs, self._top, self._sampler = rungs, top, sampler

    def add(
        self, seq_id: int, params: SamplingParams, gammas: Sequence[int], *, output: Sequence[int] = (), seed: int = 0
    ) -> Climber:
        """A sequence that has generated `output`."""
        self._sampler.add(seq_id, params, seed=seed, sample_index=0, prompt_ids=PROMPT, eos_ids=[])
        self._sampler.commit(seq_id, output)
        ids = [*PROMPT, *output]
        return Climber(Path(seq_id, ids, len(ids), [], len(PROMPT)), gammas)

    def propose(self, climbers: Sequence[Climber], rung: int | None = None) -> list[Proposal]:
        return self.climb.propose(len(self._rungs) - 1 if rung is None else rung, climbers, [99] * len(climbers))

    def round(self, climbers: Sequence[Climber]) -> None:
        proposals = self.propose(climbers)
        ran = self._top.forward([c.path for c in climbers], [len(p.tokens) + 1 for p in proposals])
        for _ in self.climb.verify(len(self._rungs) - 1, climbers, proposals, self._top, ran.hidden):
            pass
        for climber in climbers:
            path = climber.path
            self._sampler.commit(path.seq_id, path.drafted())
            path.committed = len(path.ids)
            for rung in self._rungs:
                rung.commit(path.seq_id, path.committed - 1)

    def generate(self, climbers: Sequence[Climber], tokens: int) -> list[tuple[int, ...]]:
        """Rounds until each has `tokens` of output. -> these."""
        length = len(PROMPT) + tokens
        while running := [climber for climber in climbers if len(climber.path.ids) < length]:
            self.round(running)
        return [tuple(climber.path.ids[len(PROMPT) : length]) for climber in climbers]


def joint_law(table: Table, params: SamplingParams, vocab_size: int, tokens: int) -> dict[tuple[int, ...], float]:
    """The law of the first `tokens` of plain decoding, token by token."""
    law: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(tokens):
        sampler = Sampler(vocab_size)
        for seq_id, output in enumerate(law):
            sampler.add(seq_id, params, seed=0, sample_index=0, prompt_ids=PROMPT, eos_ids=[])
            sampler.commit(seq_id, output)
        logits = torch.stack([table.row((*PROMPT, *output)) for output in law])
        processed = sampler.process([Row(seq_id) for seq_id in range(len(law))], logits)
        if params.greedy:
            rows = torch.nn.functional.one_hot(processed.argmax(-1), vocab_size).tolist()
        else:
            rows = processed.double().softmax(-1).tolist()
        law = {
            (*output, token): before * row[token]
            for (output, before), row in zip(law.items(), rows, strict=True)
            for token in range(vocab_size)
            if row[token] > 0
        }
    return law


def total_variation(p: dict[tuple[int, ...], float], q: dict[tuple[int, ...], float]) -> float:
    return sum(abs(p.get(key, 0.0) - q.get(key, 0.0)) for key in {*p, *q}) / 2


fresh_ids = itertools.count()
"""Sequence ids that no table has seen."""
