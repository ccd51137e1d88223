"""A draft in the driver, outside the gang: rank 0 asks, the driver's device drafts, all ranks are told.

The driver follows each sequence's tokens by itself: what is committed it knows, what is drafted behind comes with the question. What
its caches hold of tokens that no longer stand is dropped when the sequence is next asked for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch

from rowcast.cluster.link import Link
from rowcast.cluster.wire import Answer, Ask, Asked, Message, Proposed, WireError
from rowcast.errors import UserError
from rowcast.runtime.device import current
from rowcast.runtime.drafting import MakeRule, draft_climb
from rowcast.runtime.ladder.climb import Climb, Climber, Outcome, Pass, Want, parts
from rowcast.runtime.ladder.path import Path
from rowcast.runtime.ladder.rule import Law
from rowcast.runtime.planning import Planned
from rowcast.runtime.sampler import Sampler
from rowcast.runtime.step import SeqResult, SeqSetup, SeqStep

log = logging.getLogger("rowcast")

MOST_LAW_BYTES = 64 << 20
"""Of the laws in one answer, if those of one sequence fit: more sequences are asked about one after another."""


@dataclass(slots=True)
class _Followed:
    ids: list[int]
    """Prompt and output."""
    prompt_length: int
    held: list[int] = field(default_factory=list)
    """The path at the end of the last answer, as far as what lies there still counts: the caches hold no other tokens."""
    settled: int = 0
    """So many of `held` were committed then."""


class DriverDraft:
    """The driver's side. Its `answer` never raises: a failure is told to the ranks, which refuse the step, and kept for `failed`. One
    that fails again at once, as on a device that is lost, proposes nothing from then on: the ranks do without."""

    def __init__(self, planned: Planned, vocab_size: int, make_rule: MakeRule, device: torch.device) -> None:
        """The ladder's rungs up to the draft with at=driver, which there is. Reads the draft's weights."""
        self._device = device
        self._lookahead = planned.plan.lookahead
        with current(self._device):
            self._sampler = Sampler(vocab_size, device)
            self._climb = draft_climb(planned, self._sampler, make_rule, device)
        self._lower = self._climb.lower
        self._sequences: dict[int, _Followed] = {}
        self._steps: dict[int, SeqStep] = {}
        self._failure: Exception | None = None
        self._failures = 0
        """Since the last proposals."""
        self._given_up = False
        log.info("the draft runs in the driver, on %s", device)

    @property
    def seq_ids(self) -> set[int]:
        """Sequences in its caches."""
        return set().union(*(rung.seq_ids for rung in self._lower))

    @torch.inference_mode()
    def add(self, setup: SeqSetup) -> None:
        """Follow a sequence that the ranks have taken."""
        with current(self._device):
            self._sampler.add(
                setup.seq_id,
                setup.params,
                seed=setup.seed,
                sample_index=setup.sample_index,
                prompt_ids=setup.prompt_ids,
                eos_ids=setup.eos_ids,
                bad_word_ids=setup.bad_word_ids,
            )
            self._sampler.commit(setup.seq_id, setup.output_ids)  # on the host, as it was not sampled from
        self._sequences[setup.seq_id] = _Followed(setup.prompt_ids + setup.output_ids, len(setup.prompt_ids))

    def begin(self, steps: Sequence[SeqStep]) -> None:
        """The ranks begin a round over them."""
        self._steps = {step.seq_id: step for step in steps}
        self._failure = None  # of a round that came to nothing for another reason, too

    @torch.inference_mode()
    def commit(self, results: Sequence[SeqResult]) -> None:
        """What the round gave."""
        for result in results:
            followed = self._sequences[result.seq_id]
            followed.ids += result.tokens
            # Behind all but the newest token entries lie in blocks that may be another's from now on.
            del followed.held[max(followed.settled, len(followed.ids) - 1) :]
        if self._given_up:
            return
        try:
            with current(self._device):
                for result in results:
                    self._sampler.commit(result.seq_id, result.tokens)
        except Exception as error:
            self._give_up(error)

    @torch.inference_mode()
    def free_kv(self, seq_id: int, length: int) -> None:
        """As `Executor.free_kv`."""
        followed = self._sequences[seq_id]
        del followed.ids[length:]
        followed.held, followed.settled = [], 0
        with current(self._device):
            self._sampler.rewind(seq_id, length - followed.prompt_length)
            for rung in self._lower:
                rung.free(seq_id)

    @torch.inference_mode()
    def remove(self, seq_id: int) -> None:
        """Forget the sequence."""
        if self._sequences.pop(seq_id, None) is not None:
            with current(self._device):
                self._sampler.remove(seq_id)
                for rung in self._lower:
                    rung.free(seq_id)

    @torch.inference_mode()
    def answer(self, ask: Ask) -> Answer:
        """The rung's proposals. Every sequence is one of the round that has begun."""
        try:
            self._check(ask)
            if not self._given_up:
                with current(self._device):
                    answer = self._answer(ask)
                self._failures = 0
                return answer
        except Exception as error:
            self._failures += 1
            if self._failures == 1 or isinstance(error, WireError):
                self._failure = error
                return Answer([], [], [], f"{self._told(error)}; use at=ranks")
            self._give_up(error)
        return Answer([Proposed([], [], asked.rounds, {}) for asked in ask.wants], [], [], None)

    def _told(self, error: Exception) -> str:
        sentence = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        return f"the draft failed on the driver's device {self._device}: {sentence}"

    def _give_up(self, error: Exception) -> None:
        self._given_up = True
        log.warning("%s: nothing is drafted any more, which costs time and no token", self._told(error))

    def failed(self) -> Exception | None:
        """What went wrong since the last call of this."""
        failure, self._failure = self._failure, None
        return failure

    def _check(self, ask: Ask) -> None:
        """Raises WireError for what no rank of this plan asks."""
        if ask.rung != len(self._lower) - 1:
            raise WireError(f"rank 0 asks for rung {ask.rung}, which is not here")
        for asked in ask.wants:
            where = f"rank 0 asks for sequence {asked.seq_id}"
            if asked.seq_id not in self._sequences or asked.seq_id not in self._steps:
                raise WireError(f"{where}, which is not of the round")
            if len(asked.gammas) < len(self._lower):
                raise WireError(f"{where} with {len(asked.gammas)} gammas")
            if not 0 <= asked.count <= self._lookahead:
                raise WireError(f"{where} and {asked.count} tokens, not 0 to {self._lookahead}")
            _check_ids(asked.drafted, self._lookahead, self._sampler.vocab_size, where)

    def _answer(self, ask: Ask) -> Answer:
        wants = []
        for asked in ask.wants:
            followed = self._sequences[asked.seq_id]
            step = self._steps[asked.seq_id]
            path = Path(asked.seq_id, followed.ids + asked.drafted, len(followed.ids), step.blocks, followed.prompt_length)
            self._follow(followed, path)
            self._sampler.resume_rounds(asked.seq_id, asked.rounds)
            wants.append(Want(Climber(path, asked.gammas), asked.count, len(path.ids)))
        self._climb.passes.clear()
        self._climb.outcomes.clear()
        self._climb.extend(ask.rung, wants)
        for want in wants:
            path = want.climber.path
            followed = self._sequences[path.seq_id]
            followed.held, followed.settled = path.ids, path.committed
        return Answer(
            [
                Proposed(
                    want.climber.path.ids[want.start :],
                    [None if law is None else law.float().cpu().numpy().tobytes() for law in want.laws],
                    self._sampler.rounds(want.climber.path.seq_id),
                    dict(want.climber.counts),
                )
                for want in wants
            ],
            [[ran.rung, ran.tokens, ran.sequences, ran.seconds] for ran in self._climb.passes],
            [[each.seq_id, each.proposer, each.verifier, each.proposed, each.accepted] for each in self._climb.outcomes],
            None,
        )

    def _follow(self, followed: _Followed, path: Path) -> None:
        """Make the caches hold of the path what they can, and nothing else."""
        same, end = followed.settled, min(len(followed.held), len(path.ids))
        while same < end and followed.held[same] == path.ids[same]:
            same += 1
        for rung in self._lower:
            admitted = rung.admit(path, 0)
            assert admitted, f"{rung.name} has no place for sequence {path.seq_id}, which it has on rank 0"
            rung.truncate(path.seq_id, same)
            if path.committed > followed.settled:
                rung.commit(path.seq_id, path.committed - 1)


class DriverRelay:
    """A rank's side. Implements `Relay`."""

    drafts = False

    def __init__(self, link: Link, *, leads: bool, sampler: Sampler, device: torch.device, laws: bool) -> None:
        """`leads`: this rank asks, for all. `laws`: the rule needs them."""
        self._link = link
        self._leads = leads
        self._sampler = sampler
        self._device = device
        self._most_laws = max(1, MOST_LAW_BYTES // (4 * sampler.vocab_size)) if laws else None

    def share(self, climb: Climb, rung: int, wants: Sequence[Want], limits: Sequence[int]) -> None:
        """Raises UserError where the draft failed: all ranks do, so that the gang lives on. Raises WireError for an answer that is
        none."""
        for part in [slice(None)] if self._most_laws is None else parts(limits, self._most_laws):
            self._share(climb, rung, wants[part], limits[part])

    def _share(self, climb: Climb, rung: int, wants: Sequence[Want], limits: Sequence[int]) -> None:
        started = time.perf_counter()
        if self._leads:
            self._link.send(Ask(rung, [self._asked(want) for want in wants]))
        answer = self._checked(self._link.receive(), limits)
        if answer.failure is not None:
            raise UserError(answer.failure)
        for want, proposed in zip(wants, answer.wants, strict=True):
            climber = want.climber
            climber.path.ids += proposed.ids
            want.laws += [self._law(law) for law in proposed.laws]
            self._sampler.resume_rounds(climber.path.seq_id, proposed.rounds)
            for name, counts in proposed.counts.items():
                climber.counts[name].add(counts)
        climb.outcomes += [Outcome(*outcome) for outcome in answer.outcomes]
        # The way there and back is a part of what the passes take, by which gammas are chosen.
        away = time.perf_counter() - started - sum(ran[3] for ran in answer.passes)
        for number, tokens, sequences, seconds in answer.passes:
            ran = Pass(int(number), int(tokens), int(sequences), seconds + max(0.0, away) / len(answer.passes))
            climb.passes.append(ran)
            if climb.on_pass is not None:
                climb.on_pass(ran)

    def _checked(self, answer: Message, limits: Sequence[int]) -> Answer:
        """It, if it answers the question; all ranks use it only then."""
        if not isinstance(answer, Answer):
            raise WireError(f"the driver said {type(answer).__name__} in place of what its draft proposes")
        if answer.failure is not None:
            return answer
        if len(answer.wants) != len(limits):
            raise WireError(f"the driver's draft proposes for {len(answer.wants)} sequences, not {len(limits)}")
        size = self._sampler.vocab_size
        for proposed, limit in zip(answer.wants, limits, strict=True):
            _check_ids(proposed.ids, limit, size, "the driver's draft proposes")
            if len(proposed.laws) not in (0, len(proposed.ids)):
                raise WireError(f"the driver's draft has {len(proposed.laws)} laws of {len(proposed.ids)} tokens")
            wrong = next((len(law) for law in proposed.laws if law is not None and len(law) != 4 * size), None)
            if wrong is not None:
                raise WireError(f"the driver's draft has a law of {wrong} bytes, not {4 * size}")
        for each, kind in ((answer.passes, Pass), (answer.outcomes, Outcome)):
            if any(len(values) != len(fields(kind)) for values in each):
                raise WireError(
                    f"the driver tells of a {kind.__name__.lower()} in another number of fields than {len(fields(kind))}"
                )
        return answer

    def _asked(self, want: Want) -> Asked:
        path = want.climber.path
        return Asked(path.seq_id, list(path.drafted()), want.count, list(want.climber.gammas), self._sampler.rounds(path.seq_id))

    def _law(self, law: bytes | None) -> Law:
        return None if law is None else torch.from_numpy(np.frombuffer(law, dtype=np.float32).copy()).to(self._device)


def _check_ids(ids: Sequence[int], most: int, vocab_size: int, where: str) -> None:
    """Raises WireError for more than so many token ids, and for those outside the vocabulary."""
    if len(ids) > most:
        raise WireError(f"{where}: {len(ids)} tokens, more than {most}")
    wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise WireError(f"{where}: token {wrong}, outside the vocabulary, 0 to {vocab_size - 1}")
