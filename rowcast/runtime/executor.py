"""The executor of one rank in this process: one ladder. Ranks of a gang run one each and make the same calls."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rowcast.errors import OutOfMemoryError, UserError
from rowcast.placement.resident import LOGIT_ELEMENTS
from rowcast.runtime.device import current
from rowcast.runtime.device_round.program import BATCHES
from rowcast.runtime.ladder.climb import NOT_NUMBERS, Climb, Climber, Pass, Relay
from rowcast.runtime.ladder.control import Controller
from rowcast.runtime.ladder.coupled import Coupled
from rowcast.runtime.ladder.model_runner import ModelRunner
from rowcast.runtime.ladder.path import Path
from rowcast.runtime.ladder.rule import Proposal, Rule
from rowcast.runtime.ladder.runner import Lookup, Runner
from rowcast.runtime.protocols import Decisions
from rowcast.runtime.sampler import Sampler, prompt_logprobs
from rowcast.runtime.sharded_logits import whole
from rowcast.runtime.step import PREFILL, SeqResult, SeqSetup, SeqStep, TokenLogprobs
from rowcast.runtime.trace import Trace

if TYPE_CHECKING:
    from rowcast.runtime.device_round.rounds import DeviceRounds
    from rowcast.runtime.gpu_ceiling import Ceiling
    from rowcast.runtime.offloaded.elsewhere import Elsewhere


@dataclass(eq=False, slots=True)
class LastRung:
    """A rung that decides for some of the sequences, over all of the KV."""

    runner: ModelRunner
    below: int
    """So many lower rungs, the cheapest ones, may draft for it."""
    controller: Controller | None
    """Chooses their gammas; None: there are none."""
    asked: bool = False
    """Whether the controller was, in this round."""


@dataclass(slots=True)
class _Sequence:
    ids: list[int]
    """Prompt and output."""
    prompt_length: int
    group: int
    last: LastRung
    drafts: list[bool]
    """For each rung below the last: whether it may draft."""


class LocalExecutor:
    """Implements `Executor`. A sequence's last rung runs every step of it; rungs below draft where it decodes."""

    def __init__(
        self,
        top: ModelRunner,
        sampler: Sampler,
        *,
        lower: Sequence[Runner | Lookup] = (),
        rule: Rule | None = None,
        controller: Controller | None = None,
        rounds: DeviceRounds | None = None,
        decisions: Decisions | None = None,
        elsewhere: Elsewhere | None = None,
        others: Sequence[LastRung] = (),
        relays: Mapping[int, Relay] | None = None,
    ) -> None:
        """`top`: the last rung, over all of the KV. `lower`: the others, cheapest first; they need a `controller`. `rule`: coupled.
        `rounds`: over the same rungs, for sequences that decode under the rule coupled; None: the host drives every round.
        `decisions`: by which several ranks choose the same gammas; None: this one is alone. `elsewhere`: what the rungs have in host
        memory; None: nothing. `others`: that decide for sequences which ask for them, over the KV that `top` has, in rounds that the
        host drives. `relays`: see `Climb`."""
        assert not lower or controller is not None
        assert all(other.runner.view is top.view for other in others)
        self._top = top
        self._lower = lower
        self._sampler = sampler
        self._lasts = [LastRung(top, len(lower), controller), *others]
        self._now = self._lasts[0]
        """Whose sequences' round runs."""
        self._logit_rows = max(1, LOGIT_ELEMENTS // sampler.vocab_size)
        self._climb = Climb(lower, rule or Coupled(sampler), logit_rows=self._logit_rows, relays=relays)
        self._rounds = rounds
        self._decisions = decisions
        self.elsewhere = elsewhere
        self._broken_off = False
        """The last step did not come to its end."""
        self.ceiling: Ceiling | None = None
        """What holds this process to a GPU's memory."""
        self._sequences: dict[int, _Sequence] = {}

    def add(self, setup: SeqSetup) -> None:
        self._sampler.add(
            setup.seq_id,
            setup.params,
            seed=setup.seed,
            sample_index=setup.sample_index,
            prompt_ids=setup.prompt_ids,
            eos_ids=setup.eos_ids,
            bad_word_ids=setup.bad_word_ids,
        )
        self._sampler.commit(setup.seq_id, setup.output_ids)
        last = next(each for each in self._lasts if setup.last in (None, each.runner.name))
        drafts = [setup.drafters is None or rung.name in setup.drafters for rung in self._lower[: last.below]]
        ids = setup.prompt_ids + setup.output_ids
        self._sequences[setup.seq_id] = _Sequence(ids, len(setup.prompt_ids), setup.group, last, drafts)

    @torch.inference_mode()
    def step(self, steps: Sequence[SeqStep]) -> list[SeqResult]:
        try:
            with current(self._sampler.device):
                if self.elsewhere is not None and self._broken_off:
                    self.elsewhere.repair()
                self._broken_off = True
                results = self._round(steps)
                self._broken_off = False
                if self.ceiling is not None:
                    self.ceiling.stepped()
                return results
        except torch.OutOfMemoryError as error:
            tokens = sum(len(step.tokens) for step in steps)
            raise OutOfMemoryError(
                f"the device ran out of memory in a step of {tokens} tokens and {len(steps)} sequences: lower max_num_batched_tokens "
                "or max_num_seqs, or free memory on it"
            ) from error

    def record(self, trace: Trace) -> None:
        """Note each pass in it from now on, those of a round on the device at its end, and each that is captured in a graph."""

        def note(ran: Pass) -> None:
            runner = self._lower[ran.rung] if ran.rung < self._now.below else self._now.runner
            trace.span(
                runner.name,
                time.perf_counter() - ran.seconds,
                ran.seconds,
                tokens=ran.tokens,
                sequences=ran.sequences,
            )

        self._climb.on_pass = note
        if self._rounds is not None:
            self._rounds.tell_captures(lambda seconds: trace.span("capture", time.perf_counter() - seconds, seconds))

    def _round(self, steps: Sequence[SeqStep]) -> list[SeqResult]:
        for step in steps:
            if step.adopts:
                self._top.adopt(step)
        climbers = self._climbers(steps)
        results: dict[int, SeqResult] = {}
        for last in self._lasts:
            chosen = [i for i, step in enumerate(steps) if self._sequences[step.seq_id].last is last]
            if chosen:
                self._now = last
                results |= zip(chosen, self._round_of([steps[i] for i in chosen], [climbers[i] for i in chosen]), strict=True)
        found = [results[i] for i in range(len(steps))]
        if self.elsewhere is None or not any(step.sample for step in steps):  # counting would wait for a prompt's part
            return found
        shares = self.elsewhere.moved().split(len(steps))
        return [replace(result, moved=share) for result, share in zip(found, shares, strict=True)]

    def _round_of(self, steps: Sequence[SeqStep], climbers: Sequence[Climber]) -> list[SeqResult]:
        """A round over sequences that have their last rung in common."""
        self._climb.passes.clear()
        self._climb.outcomes.clear()
        mine = [self._serves(step) for step in steps]
        if self._rounds is not None and self._rounds.driven and not all(mine):
            mine = [False] * len(steps)  # a last pass streams what it needs once for all of them
        results: dict[int, SeqResult] = {}
        device_passes = 0
        for on_device, run in ((True, self._device_round), (False, self._host_round)):
            chosen = [i for i, on in enumerate(mine) if on is on_device]
            if chosen:
                found = run([steps[i] for i in chosen], [climbers[i] for i in chosen])
                results |= zip(chosen, found, strict=True)
            if on_device:
                device_passes = len(self._climb.passes)
        self._report([step for step, on in zip(steps, mine, strict=True) if not on], device_passes)
        return [results[i] for i in range(len(steps))]

    def _serves(self, step: SeqStep) -> bool:
        """Whether the device runs the sequence's round: it decodes, and its pending token is none of the prompt's. It knows one last
        rung, the ladder's."""
        if self._rounds is None or self._now is not self._lasts[0]:
            return False
        return step.decodes and step.start >= step.prompt_length and self._rounds.serves(step.seq_id)

    def _device_round(self, steps: Sequence[SeqStep], climbers: Sequence[Climber]) -> list[SeqResult]:
        """One round over sequences that decode; the host waits for its end."""
        assert self._rounds is not None
        results = []
        for first in range(0, len(steps), BATCHES[-1]):
            some = slice(first, first + BATCHES[-1])
            finished = self._rounds.run(climbers[some], steps[some], self._climb, alone=len(steps) <= BATCHES[-1])
            for step, climber, tokens in zip(steps[some], climbers[some], finished, strict=True):
                if tokens[-1] < 0:
                    raise UserError(NOT_NUMBERS)
                self._commit(step, tokens)
                results.append(SeqResult(step.seq_id, tokens, None, None, climber.counts))
        return results

    def _host_round(self, steps: Sequence[SeqStep], climbers: Sequence[Climber]) -> list[SeqResult]:
        """One round, prefills among it, driven from here."""
        last, top = self._now.runner, self._now.below
        proposals = self._climb.propose(top, climbers, [step.room for step in steps])

        started = time.perf_counter()
        wanted = [
            len(step.tokens) if step.prompt_logprobs is not None else step.sample + len(proposal.tokens)
            for step, proposal in zip(steps, proposals, strict=True)
        ]
        ran = last.forward([climber.path for climber in climbers], wanted)
        parts = torch.split(ran.hidden, wanted)
        prompts = [self._prompt_logprobs(step, part) for step, part in zip(steps, parts, strict=True)]
        verdicts = self._verdicts(steps, climbers, proposals, parts)
        names = [last.name if step.decodes else PREFILL for step in steps]
        counts = [climber.counts[name] for climber, name in zip(climbers, names, strict=True)]
        self._climb.note(top, counts, ran, last.reads(), time.perf_counter() - started)

        results = []
        for step, climber, prompt in zip(steps, climbers, prompts, strict=True):
            tokens, logprobs = verdicts.get(step.seq_id, ([], None))
            self._commit(step, tokens)
            results.append(SeqResult(step.seq_id, tokens, logprobs, prompt, climber.counts))
        return results

    def free_kv(self, seq_id: int, length: int) -> None:
        for rung in (self._top, *self._lower):
            rung.free(seq_id)
        if self._rounds is not None:
            self._rounds.forget()
        sequence = self._sequences[seq_id]
        del sequence.ids[length:]
        self._sampler.rewind(seq_id, length - sequence.prompt_length)
        for last in self._lasts:
            if last.controller is not None:
                last.controller.forget_kv(seq_id)

    def remove(self, seq_id: int) -> None:
        if self._sequences.pop(seq_id, None) is None:
            return
        for rung in (self._top, *self._lower):
            rung.free(seq_id)
        self._sampler.remove(seq_id)

    def check(self, seq_ids: Collection[int]) -> None:
        """It remembers these sequences and no others. For tests and idle moments."""
        assert set(self._sequences) == set(seq_ids) == self._sampler.seq_ids
        for rung in (self._top, *self._lower):
            assert rung.seq_ids <= set(seq_ids), rung.name

    def _climbers(self, steps: Sequence[SeqStep]) -> list[Climber]:
        """The sequences at the start of the round, with the gammas that they climb by."""
        paths = [self._path(step) for step in steps]
        if self._decisions is None or self._decisions.leads:
            batch = Counter(id(self._sequences[step.seq_id].last) for step in steps if step.decodes)
            gammas = [
                self._gammas(step, path, batch[id(self._sequences[step.seq_id].last)])
                for step, path in zip(steps, paths, strict=True)
            ]
        else:
            gammas = [[0] * len(self._lower)] * len(steps)
        if self._decisions is not None and self._lower:
            gammas = self._shared(self._decisions, gammas, steps, paths)
        return [Climber(path, each) for path, each in zip(paths, gammas, strict=True)]

    def _shared(
        self, decisions: Decisions, gammas: Sequence[Sequence[int]], steps: Sequence[SeqStep], paths: Sequence[Path]
    ) -> list[Sequence[int]]:
        """The deciding rank's gammas. Rungs that it uses have a place there, and so they have here."""
        flat = decisions.share([gamma for each in gammas for gamma in each])
        width = len(self._lower)
        shared: list[Sequence[int]] = [flat[i * width : (i + 1) * width] for i in range(len(steps))]
        if not decisions.leads:
            for step, path, each in zip(steps, paths, shared, strict=True):
                for rung, gamma in zip(self._lower, each, strict=True):
                    admitted = not gamma or rung.admit(path, step.room)
                    assert admitted, f"{rung.name} has no place for sequence {step.seq_id}, which it has on the deciding rank"
        return shared

    def _path(self, step: SeqStep) -> Path:
        sequence = self._sequences[step.seq_id]
        end = step.start + len(step.tokens)
        return Path(
            step.seq_id,
            sequence.ids if step.sample else sequence.ids[:end],  # where it is sampled, `end` is its length
            end,
            step.blocks,
            sequence.prompt_length,
        )

    def _gammas(self, step: SeqStep, path: Path, batch: int) -> Sequence[int]:
        """`batch`: sequences that decode in this round and have the same last rung."""
        sequence = self._sequences[step.seq_id]
        last, group = sequence.last, sequence.group
        allowed = [step.room > 0 and step.decodes and may for may in sequence.drafts]
        if last.controller is None or not any(allowed):
            return [0] * len(self._lower)
        last.asked = True
        while True:
            gammas = last.controller.choose(group, batch=batch, path=path, room=step.room, left=step.left, allowed=allowed)
            # A rung is asked for a place only once it is to be used, and then keeps it.
            refusing = [r for r, gamma in enumerate(gammas) if gamma and not self._lower[r].admit(path, step.room)]
            if not refusing:
                return [*gammas, *[0] * (len(self._lower) - last.below)]
            for rung in refusing:
                allowed[rung] = False

    def _verdicts(
        self, steps: Sequence[SeqStep], climbers: Sequence[Climber], proposals: Sequence[Proposal], hidden: Sequence[Tensor]
    ) -> dict[int, tuple[list[int], list[TokenLogprobs] | None]]:
        """By sequence: the tokens that it gains, and their log-probabilities where asked for."""
        chosen = [i for i, step in enumerate(steps) if step.sample]
        if not chosen:
            return {}
        rows = torch.cat([hidden[i][-len(proposals[i].tokens) - 1 :] for i in chosen])
        last, own = self._now, ([climbers[i] for i in chosen], [proposals[i] for i in chosen])
        judged = self._climb.verify(last.below, *own, last.runner, rows, decides=True)
        found: dict[int, tuple[list[int], list[TokenLogprobs] | None]] = {}
        for i, (_, logits) in zip(chosen, judged, strict=True):
            path = climbers[i].path
            tokens = path.ids[path.committed :]
            found[path.seq_id] = tokens, self._sampler.report(path.seq_id, logits[: len(tokens)], tokens)
        return found

    def _commit(self, step: SeqStep, tokens: Sequence[int]) -> None:
        """K/V of all tokens but the newest, in every rung that has them; the full view comes first, others copy from it."""
        length = step.start + len(step.tokens) + max(0, len(tokens) - 1)
        for rung in (self._top, *self._lower):
            rung.commit(step.seq_id, length)
        self._sampler.commit(step.seq_id, tokens)

    def _report(self, steps: Sequence[SeqStep], device_passes: int) -> None:
        """Tell the controller, if it chose anything, what the round's passes took and what became of its proposals.

        The first `device_passes` are of sequences that decode; `steps`: those that the host drove.
        """
        top, controller = self._now.below, self._now.controller if self._now.asked else None
        self._now.asked = False
        if controller is not None:
            pure = all(step.decodes for step in steps)  # a prefill's chunk in the last rung's pass tells nothing about decoding
            for place, ran in enumerate(self._climb.passes):
                if ran.rung < top or pure or place < device_passes:
                    controller.observe_pass(ran)
            for outcome in self._climb.outcomes:
                controller.observe_outcome(self._sequences[outcome.seq_id].group, outcome)

    def _prompt_logprobs(self, step: SeqStep, hidden: Tensor) -> list[TokenLogprobs] | None:
        # hidden [t, D]: row i predicts the prompt token at position start + i + 1, where there is one
        if step.prompt_logprobs is None:
            return None
        sequence = self._sequences[step.seq_id]
        end = min(step.start + 1 + len(step.tokens), sequence.prompt_length)
        successors = sequence.ids[step.start + 1 : end]
        found: list[TokenLogprobs] = []
        for i in range(0, len(successors), self._logit_rows):
            ids = successors[i : i + self._logit_rows]
            found += prompt_logprobs(whole(self._now.runner.logits(hidden[i : i + len(ids)])), ids, step.prompt_logprobs)
        return found
