"""A round below the last rung: each rung extends a sequence by what the rung below proposes and it accepts.

The recursion of TriForce (arXiv 2404.11912, section 4.2, algorithm 1), for any number of rungs and for ragged batches: each sequence
has its own rungs and gammas and accepts its own number. It does not know what a model, a KV view or a law is.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

from torch import Tensor

from rowcast.errors import UserError
from rowcast.runtime.ladder.path import Path
from rowcast.runtime.ladder.rule import Law, Proposal, Rule, Verdict
from rowcast.runtime.ladder.runner import Lookup, Ran, Runner
from rowcast.runtime.protocols import Reads
from rowcast.runtime.sharded_logits import Logits
from rowcast.runtime.step import RungCounts

NOT_NUMBERS = "the model's logits are not numbers, as when float16 overflows: use dtype bfloat16 or float32, or a sound copy"


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass of a rung, for whoever models costs."""

    rung: int
    tokens: int
    """Tokens run, over all sequences."""
    sequences: int
    seconds: float
    """Forward pass, logits and verdicts."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one proposal, for whoever models acceptance."""

    seq_id: int
    proposer: int
    verifier: int
    proposed: int
    accepted: int


@dataclass(slots=True)
class Climber:
    """One sequence in one round."""

    path: Path
    gammas: Sequence[int]
    """For each rung below the last: how many tokens the next rung in use asks of it at a time; 0: not used."""
    counts: dict[str, RungCounts] = field(default_factory=lambda: defaultdict(RungCounts))
    """By rung. The climb adds to it."""

    def below(self, rung: int) -> int | None:
        """The nearest rung under `rung` that this sequence uses."""
        return next((r for r in reversed(range(rung)) if self.gammas[r]), None)


@dataclass(slots=True)
class Want:
    """Tokens that a rung is to add to a path, and the laws of those it has added."""

    climber: Climber
    count: int
    start: int
    """The path's length before any of them."""
    laws: list[Law] = field(default_factory=list)

    @property
    def missing(self) -> int:
        return self.count - (len(self.climber.path.ids) - self.start)


class Relay(Protocol):
    """How what a rung proposes comes to ranks that do not run it. Every rank makes the same calls."""

    drafts: bool
    """Whether the rung runs here."""

    def share(self, climb: Climb, rung: int, wants: Sequence[Want], limits: Sequence[int]) -> None:
        """Where the rung runs it has extended the paths, by at most `limits`. On the other ranks, extend them by the same tokens and
        laws."""
        ...


class Climb:
    """The rungs below the last one at work. Keeps nothing from round to round but what it reports."""

    def __init__(
        self, lower: Sequence[Runner | Lookup], rule: Rule, *, logit_rows: int, relays: Mapping[int, Relay] | None = None
    ) -> None:
        """`lower`: all rungs but the last, cheapest first. `logit_rows`: most rows of logits held at once, if one proposal fits.
        `relays`: of the rungs that do not run on every rank, by their place in `lower`."""
        self.lower = lower
        self.passes: list[Pass] = []
        """Of the round, as are `outcomes`: whoever starts one clears them."""
        self.outcomes: list[Outcome] = []
        self.on_pass: Callable[[Pass], None] | None = None
        """Told of each pass, right after it."""
        self._rule = rule
        self._logit_rows = logit_rows
        self._relays = relays or {}

    def propose(self, rung: int, climbers: Sequence[Climber], limits: Sequence[int]) -> list[Proposal]:
        """Extend each path by what the rungs below `rung` propose to it, at most `limits[i]` tokens for climber i.

        The proposals carry the same tokens; `verify` cuts the paths. Where nothing below is in use, a proposal is empty.
        """
        wants = [Want(c, 0, len(c.path.ids)) for c in climbers]
        asked: dict[int, list[Want]] = defaultdict(list)
        for want, limit in zip(wants, limits, strict=True):
            below = want.climber.below(rung)
            if below is not None:
                want.count = min(limit, want.climber.gammas[below])
                asked[below].append(want)
        for below, some in asked.items():
            self.extend(below, some)
        return [_proposal(want) for want in wants]

    def verify(
        self,
        rung: int,
        climbers: Sequence[Climber],
        proposals: Sequence[Proposal],
        runner: Runner,
        hidden: Tensor,
        *,
        decides: bool = False,
    ) -> Iterator[tuple[Verdict, Logits]]:
        """The rule's verdicts by the hidden states [sum(len(tokens) + 1), D] of the rung that verifies, each with its rows of logits.

        Each path is cut to what stands and gains the verifier's token before the next proposals are looked at; `lower` rungs up to
        this one drop rejected K/V. `decides`: it is the last one of these sequences, be it the ladder's or not.
        """
        rows = [len(p.tokens) + 1 for p in proposals]
        ends = list(accumulate(rows))
        for part in parts(rows, self._logit_rows):
            first = ends[part.start] - rows[part.start]
            logits = runner.logits(hidden[first : ends[part.stop - 1]])
            verdicts = self._rule.verify(rung, proposals[part], logits)
            for i, verdict in zip(range(part.start, part.stop), verdicts, strict=True):
                self._settle(rung, climbers[i], proposals[i], verdict, decides)
                yield verdict, logits[ends[i] - rows[i] - first : ends[i] - first]

    def note(self, rung: int, counts: Iterable[RungCounts], ran: Ran, reads: Reads, seconds: float) -> None:
        """Book a pass that took so long and read `reads` of the weights, shared by its sequences as they had tokens, or rows of
        logits, in it."""
        counts, total = list(counts), sum(ran.tokens)
        for found, tokens, kv_bytes, refreshes in zip(counts, ran.tokens, ran.kv_bytes, ran.refreshes, strict=True):
            found.tokens += tokens
            found.refreshes += refreshes
            found.seconds += seconds * tokens / total
            found.bytes_read += reads.bytes // len(ran.tokens) + kv_bytes
        if reads.neurons_of or reads.heads_of or reads.overflows or reads.fallbacks:
            _note_chosen(counts, ran, reads)
        self.passes.append(Pass(rung, total, len(ran.tokens), seconds))
        if self.on_pass is not None:
            self.on_pass(self.passes[-1])

    def extend(self, rung: int, wants: list[Want]) -> None:
        """Add exactly `count` tokens of this rung's law to each path, wherever it runs; a lookup may know fewer."""
        relay = self._relays.get(rung)
        limits = [want.count for want in wants]
        if relay is None or relay.drafts:
            self._extend_here(rung, wants)
        if relay is not None:
            relay.share(self, rung, wants, limits)

    def _extend_here(self, rung: int, wants: list[Want]) -> None:
        runner = self.lower[rung]
        if isinstance(runner, Lookup):
            for want in wants:
                started = time.perf_counter()
                found = runner.propose(want.climber.path, want.count)
                want.climber.path.ids += found
                want.laws += [None] * len(found)
                want.climber.counts[runner.name].seconds += time.perf_counter() - started
            return
        while wants := [want for want in wants if want.missing > 0]:
            climbers = [want.climber for want in wants]
            # The verifier adds a token of its own to what it accepts: one fewer is asked for.
            proposals = self.propose(rung, climbers, [want.missing - 1 for want in wants])
            started = time.perf_counter()
            ran = runner.forward([c.path for c in climbers], [len(p.tokens) + 1 for p in proposals])
            verdicts = [verdict for verdict, _ in self.verify(rung, climbers, proposals, runner, ran.hidden)]
            for want, verdict in zip(wants, verdicts, strict=True):
                want.laws += verdict.laws
                if verdict.token < 0:  # a rung that cannot count proposes nothing more
                    del want.laws[len(want.climber.path.ids) - want.start :]
                    want.count = len(want.climber.path.ids) - want.start
            self.note(rung, [c.counts[runner.name] for c in climbers], ran, runner.reads(), time.perf_counter() - started)

    def _settle(self, rung: int, climber: Climber, proposal: Proposal, verdict: Verdict, decides: bool) -> None:
        """Cut the path to what stands, append the verifier's token, drop K/V of what does not stand."""
        if verdict.token < 0 and decides:
            raise UserError(NOT_NUMBERS)
        path = climber.path
        proposed = len(proposal.tokens)
        stands = len(path.ids) - proposed + verdict.accepted
        path.ids[stands:] = [verdict.token] if verdict.token >= 0 else []
        for lower in self.lower[: rung + 1]:
            lower.truncate(path.seq_id, stands)
        below = climber.below(rung)
        if below is not None and proposed:
            climber.counts[self.lower[below].name].note(proposed, verdict.accepted)
            self.outcomes.append(Outcome(path.seq_id, below, rung, proposed, verdict.accepted))


def _note_chosen(counts: Sequence[RungCounts], ran: Ran, reads: Reads) -> None:
    """What a pass's tokens used where it did not use everything."""
    generated = max(1, sum(ran.generated))
    overflows, fallbacks = _split(reads.overflows, ran.generated), _split(reads.fallbacks, ran.wanted)
    layers: dict[int, tuple[list[int], list[int]]] = {}  # mostly all sequences have as many tokens, and so the same shares
    for i, (found, own) in enumerate(zip(counts, ran.generated, strict=True)):
        if own not in layers:
            layers[own] = _share(reads.neurons_by_layer, own, generated), _share(reads.heads_by_layer, own, generated)
        neurons, heads = layers[own]
        found.add(
            RungCounts(
                neurons=reads.neurons * own // generated,
                neurons_of=reads.neurons_of * own // generated,
                heads=reads.heads * own // generated,
                heads_of=reads.heads_of * own // generated,
                overflows=overflows[i],
                fallbacks=fallbacks[i],
                neurons_by_layer=neurons,
                heads_by_layer=heads,
            )
        )


def _proposal(want: Want) -> Proposal:
    path = want.climber.path
    return Proposal(path.seq_id, path.drafted(want.start), path.ids[want.start :], want.laws)


def _share(by_layer: Sequence[int], own: int, generated: int) -> list[int]:
    """A sequence's share of what a pass's generated tokens used of each layer. Empty where it had none among them."""
    return [count * own // generated for count in by_layer] if own else []


def _split(total: int, parts: Sequence[int]) -> list[int]:
    """`total` in whole numbers as the `parts` are to each other; the sum stays `total`, unless they are all 0."""
    whole, ends = max(1, sum(parts)), list(accumulate(parts))
    return [total * end // whole - total * (end - part) // whole for end, part in zip(ends, parts, strict=True)]


def parts(rows: Sequence[int], most: int) -> Iterator[slice]:
    """Consecutive items of at most `most` rows together, or one item of more."""
    first, total = 0, 0
    for i, count in enumerate(rows):
        if i > first and total + count > most:
            yield slice(first, i)
            first, total = i, 0
        total += count
    if rows:
        yield slice(first, len(rows))
