"""The executor of a gang, in the driver: every rank makes the same step, and a gang that fails is built anew.

It mirrors what has been emitted of each sequence. After a failure the ranks are started again and told of every sequence with what it
has generated; the step that failed is reported as lost, so that the engine runs its sequences again from their tokens. So no token is
emitted twice, and under the rule coupled the output is that of an undisturbed run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NoReturn

from rowcast.cluster.gang import Gang, Limits, RankFailure
from rowcast.cluster.wire import Command
from rowcast.errors import DraftError, GangError, UserError
from rowcast.runtime.step import SeqResult, SeqSetup, SeqStep, StepLost

if TYPE_CHECKING:
    from rowcast.cluster.drafting import DriverDraft

log = logging.getLogger("rowcast")


@dataclass(slots=True)
class _Sequence:
    setup: SeqSetup
    output_ids: list[int]
    """All that it has generated."""


class GangExecutor:
    """Implements `Executor`. `shutdown` ends it; so does the end of the driver, whatever that is."""

    def __init__(self, start: Callable[[], Gang], limits: Limits, draft: DriverDraft | None = None) -> None:
        """`start` makes a gang, and raises what `Gang` raises. The first one is made here. `draft`: what runs in this process of the
        ladder, if anything; a step in which it fails raises DraftError."""
        self.draft = draft
        self._make = start
        self._limits = limits
        self._sequences: dict[int, _Sequence] = {}
        self._freed: list[list[int]] = []
        """What the ranks are told with the next command: see `Command.freed`."""
        self._gang: Gang | None = None
        self._life = 0
        """The gang's number."""
        self._counts_on: int | None = None
        """The gang whose K/V the engine counts on, for sequences that run and for blocks that others may adopt; None: on none."""
        self.failures = 0
        """In all."""
        self.on_failure: Callable[[], None] | None = None
        """Told of each."""
        self._recent_failures = 0
        self._calm_steps = 0
        """Since the last failure."""
        self._over: str | None = None
        """Why there is no gang any more."""
        self._ready()

    @property
    def gang(self) -> Gang | None:
        """The gang of now."""
        return self._gang

    def add(self, setup: SeqSetup) -> None:
        assert setup.seq_id not in self._sequences
        while True:
            try:
                self._call(Command(0, setups=[setup]))
                break
            except RankFailure as failure:
                self._failed(failure)
            except UserError:
                raise
            except BaseException:  # the ranks may have taken it
                self._freed.append([setup.seq_id])
                raise
        self._sequences[setup.seq_id] = _Sequence(setup, list(setup.output_ids))
        if self.draft is not None:
            self.draft.add(setup)

    def step(self, steps: Sequence[SeqStep]) -> list[SeqResult]:
        try:
            self._ready()
            if self._counts_on not in (None, self._life):
                self._counts_on = None
                raise StepLost("the gang that held the K/V is no more")
            if self.draft is not None:
                self.draft.begin(steps)
            results = self._call(Command(0, steps=list(steps)))
        except UserError as error:
            if self.draft is not None and (cause := self.draft.failed()) is not None:
                raise DraftError(str(error)) from cause
            raise
        except RankFailure as failure:
            self._counts_on = None
            self._failed(failure)
            raise StepLost(str(failure)) from failure
        self._counts_on = self._life
        for result in results:
            self._sequences[result.seq_id].output_ids += result.tokens
        if self.draft is not None:
            self.draft.commit(results)
        self._calm_steps += 1
        if self._calm_steps >= self._limits.calm_steps:
            self._recent_failures = 0
        return results

    def free_kv(self, seq_id: int, length: int) -> None:
        sequence = self._sequences[seq_id]
        del sequence.output_ids[length - len(sequence.setup.prompt_ids) :]
        self._freed.append([seq_id, length])
        if self.draft is not None:
            self.draft.free_kv(seq_id, length)

    def remove(self, seq_id: int) -> None:
        if self._sequences.pop(seq_id, None) is not None:
            self._freed.append([seq_id])
            if self.draft is not None:
                self.draft.remove(seq_id)

    def check(self, seq_ids: Collection[int]) -> None:
        assert set(self._sequences) == set(seq_ids)
        assert self.draft is None or self.draft.seq_ids <= set(seq_ids)
        if self._gang is not None and self._gang.alive:
            self._call(Command(0, check=sorted(seq_ids)))

    def look(self) -> None:
        """Note it if a rank has ended since the last call; the next one starts them again. Raises GangError as that does."""
        if self._gang is not None and self._gang.alive:
            try:
                self._gang.look()
            except RankFailure as failure:
                self._failed(failure)

    def revive(self) -> None:
        """Start the ranks again now, where they have ended, and not with the next command. Raises GangError as that does."""
        self._ready()

    def shutdown(self) -> None:
        """End the ranks. May be called twice; then there are no more steps."""
        self._over = self._over or "it was shut down"
        if self._gang is not None:
            self._gang.stop()

    def _call(self, command: Command) -> list[SeqResult]:
        """Raises RankFailure, and the UserError that the ranks raised."""
        gang = self._ready()
        freed, self._freed = self._freed, []
        return gang.call(replace(command, freed=freed), None if self.draft is None else self.draft.answer)

    def _ready(self) -> Gang:
        """A gang that lives and knows all sequences."""
        while self._over is None:
            if self._gang is not None and self._gang.alive:
                return self._gang
            try:
                self._begin()
            except RankFailure as failure:
                self._failed(failure)
        raise GangError(f"the model's ranks are gone: {self._over}; make a new LLM")

    def _begin(self) -> None:
        self._gang = self._make()
        self._life += 1
        self._freed.clear()
        known = [replace(sequence.setup, output_ids=sequence.output_ids) for sequence in self._sequences.values()]
        if known:
            try:
                self._gang.call(Command(0, setups=known))
            except UserError as error:  # they were taken before
                raise RankFailure(f"the ranks refuse a sequence that they had taken: {error}") from error

    def _failed(self, failure: RankFailure) -> None:
        """Kill the gang. Raises GangError if that was once too often."""
        if self._gang is not None:
            self._gang.kill()
        self.failures += 1
        if self.on_failure is not None:
            self.on_failure()
        self._recent_failures = self._recent_failures + 1
        self._calm_steps = 0
        sentence, _, trace = str(failure).partition("\n")
        if self._recent_failures >= self._limits.failures:
            self._give_up(sentence, failure)
        log.warning("%s: starting all ranks again (failure %s of %s)", sentence, self._recent_failures, self._limits.failures)
        if trace:
            log.info("%s", trace)

    def _give_up(self, sentence: str, failure: RankFailure) -> NoReturn:
        self._over = f"they failed {self._recent_failures} times, the last time as {sentence}"
        raise GangError(f"the model's ranks are gone: {self._over}; make a new LLM") from failure
