"""Which rungs a sequence uses in its next round, and how many tokens each is asked for: the cost model, at run time. Torch-free.

Expected tokens of a round over its expected time (TriForce, arXiv 2404.11912, section 4.2; Leviathan et al., arXiv 2211.17192, section
3.3) decides, with times and acceptances as measured. What is unknown is tried out of a purse: a small share of the time spent so far.
"""

from __future__ import annotations

from bisect import bisect
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING

from rowcast.runtime.ladder.costs import Acceptance, Chance, PassTimes, context_class, entry, expected_tokens, rounded
from rowcast.runtime.ladder.ngram import NgramLookup
from rowcast.runtime.ladder.options import GAMMAS as GAMMAS
from rowcast.runtime.ladder.options import Options
from rowcast.runtime.ladder.path import Path
from rowcast.runtime.ladder.spec import Ladder

if TYPE_CHECKING:
    from rowcast.runtime.ladder.climb import Outcome, Pass

_PRIORS = {"ngram": (0.3, 0.6, 0.85), "draft": (0.5,), "self": (0.85,)}
"""Acceptance before any was measured; of n-grams by the length of the match."""
_MATCHES = (1, 4, 8)
"""Where classes of match lengths begin."""

PLAIN_ROUNDS = 3
"""Before the first that speculates, to compare with."""
_GAIN, _LOSS = 1.03, 1.01
"""Speculation starts where it is so much faster than plain, and stops where it is no longer so much faster."""
_DOUBT = 0.4
"""Added to both, over the number of plain rounds timed."""
_PLAIN_APART = 32
"""Rounds between two plain ones, whatever speculation gains: it is plain's time that it is judged by."""
_TRIALS_APART = 2
"""A decision that lasts more rounds is kept between two trials."""
_PURSE_START, _PURSE_SHARE, _PURSE_MOST, _PURSE_LEAST = 2.0, 0.01, 3.0, -1.0
"""In plain rounds: at first, gained a round, bounds."""
_LARGEST_LOSS = 3.0
"""Plain rounds that one round may cost the purse, beside catching up: a cold call is no evidence."""
_NAMED_PURSE = 16.0
"""At first, where the user named the rungs."""
_HORIZON = 64
"""Tokens that a sequence is taken to have before it; or as many as it has generated; never more than it may still generate."""
_TRIAL_CATCH_UP = 0.03
"""Share of the horizon's time that a draft may take to catch up for a trial."""
_BULK_SHARE = 0.03
"""Time of one token among many over that of a pass of one, before a draft has caught up for the first time."""
_MOST_ROUNDS = 16
"""A decision is thought over after 1, 2, 4, ... rounds, at most so many."""

_NONE = Chance(0.0, 0.0)


@dataclass(slots=True)
class _Decision:
    gammas: tuple[int, ...]
    until: int
    """The round that it is thought over in."""
    thought: int = -1
    """The round that it was thought over in last."""
    lasts: int = 1
    """Rounds between thoughts."""
    trial: tuple[int, ...] | None = None
    """Used instead in the next round."""


@dataclass(slots=True)
class _Sequence:
    asked_in: int = -1
    """The round of the last call."""
    length: int = 0
    generated: int = 0
    match_class: int = 0
    """-1: nothing matches."""
    reached: dict[int, int] = field(default_factory=dict)
    """By draft rung: the sequence's length when the rung was last used."""


@dataclass(frozen=True, slots=True)
class _Ask:
    """What a decision is for."""

    group: int
    batch: int
    context: int
    """Tokens in the contexts of all that decode."""
    generated: int
    horizon: int
    match_class: int
    lacks: dict[int, int]
    """By draft rung that is far behind: tokens that it has to run first."""


class Controller:
    """Chooses gammas. Every choice gives the same output, only sooner or later."""

    def __init__(
        self, ladder: Ladder, *, adaptive: bool, lookup: NgramLookup | None = None, cost_ratios: Sequence[float] | None = None
    ) -> None:
        """`adaptive`: the rungs were found by `auto`, so that trials must cost next to nothing. `lookup`: that of the rung ngram, if
        there is one. `cost_ratios`: for each lower rung, the bytes that its pass reads over the last rung's."""
        self._rungs = ladder.lower
        self._drafts = [rung for rung, spec in enumerate(self._rungs) if spec.kind == "draft"]
        self._all_pinned = all(spec.gamma is not None for spec in self._rungs)
        self._adaptive = adaptive
        self._lookup = lookup
        self._ratios = list(cost_ratios or [0.5] * len(self._rungs))
        self._times = [PassTimes() for _ in ladder.rungs]
        self._options = Options(self._rungs, self._times, self._ratios)
        self._plain_due: bool | None = None
        """In this round; None before that is known."""
        self._plain_until: dict[int, int] = {}
        """By class of context: the round up to which all were plain last."""
        self._acceptance: dict[tuple[int, int, int], Acceptance] = {}
        """By proposer, verifier and class of match."""
        self._decisions: OrderedDict[tuple[int, tuple[bool, ...], bool, int, int], _Decision] = OrderedDict()
        """By group, usable rungs, whether a draft is far behind, batch and class of match."""
        self._sequences: OrderedDict[int, _Sequence] = OrderedDict()
        self._lengths: OrderedDict[int, int] = OrderedDict()
        """Of the sequences asked about last, as many as decode."""
        self._length_sum = 0
        self._batch = 1
        self._round = 0
        self._purse = _PURSE_START if adaptive else _NAMED_PURSE
        self._debt = 0.0
        """Plain rounds spent to catch up that nothing has paid for yet."""
        self._passes: list[Pass] = []
        self._caught_up = 0.0
        """Seconds of those of them that caught up."""
        self._uses: dict[int, tuple[list[int], dict[int, int]]] = {}
        """By sequence: draft rungs that it uses in this round, and what they lack."""
        self._behind: dict[int, int] = {}
        """By draft rung: tokens that it has to catch up in this round."""
        self._proposed = 0
        """Tokens proposed to the last rung in this round."""
        self._gained = 0
        """Those of them that stood."""

    def choose(self, group: int, *, batch: int, path: Path, room: int, left: int, allowed: Sequence[bool]) -> tuple[int, ...]:
        """For each rung below the last, how many tokens the next one in use asks of it at a time; 0: not used.

        Rungs that are not `allowed` are not used. `batch`: sequences that decode in this round. `room` >= 1: the uppermost rung in use
        is asked for no more. `left`: most tokens that the request may still generate. Call it for every decoding sequence before a
        round; where it is called again for one of them, the last call counts.
        """
        if self._all_pinned:  # there is nothing to think over
            return _within(tuple(rung.gamma or 0 if ok else 0 for rung, ok in zip(self._rungs, allowed, strict=True)), room)
        self._settle()
        sequence = entry(self._sequences, path.seq_id, _Sequence)
        if sequence.asked_in == self._round and sequence.length < path.committed:
            self._next_round()  # nothing was observed of the last one
        sequence.asked_in = self._round
        self._note_length(path, batch, sequence)
        lacks = {}
        for rung in self._drafts:
            missing = path.committed - sequence.reached.get(rung, 0)
            if missing > max(GAMMAS):
                lacks[rung] = missing
        if self._lookup is not None:
            sequence.match_class = bisect(_MATCHES, self._lookup.match_length(path)) - 1
        usable = tuple([ok and self._usable(rung, sequence) for rung, ok in enumerate(allowed)])
        gammas = self._gammas(group, usable, batch, left, sequence, lacks)
        drafts = [rung for rung in self._drafts if gammas[rung]]
        if drafts:
            self._uses[path.seq_id] = drafts, lacks
        elif self._uses:
            self._uses.pop(path.seq_id, None)
        return _within(gammas, room)

    def observe_pass(self, ran: Pass) -> None:
        """Call it for every pass of a lower rung, and for the last rung's where all its sequences decode."""
        if self._all_pinned:
            return
        if not self._passes:
            self._note_uses()
        self._passes.append(ran)
        times = self._times[ran.rung]
        if ran.tokens >= self._behind.get(ran.rung, ran.tokens + 1):
            del self._behind[ran.rung]
            self._caught_up += ran.seconds
            times.add_bulk(ran.tokens, ran.seconds)
            return
        context = self._context(ran.sequences)
        shift = times.add(ran.tokens, ran.sequences, context, ran.seconds, self._round)
        if ran.rung < len(self._rungs):
            return
        kind = context_class(context)
        if ran.tokens == ran.sequences:
            again = shift is not None and not shift.sure
            self._plain_until[kind] = max(self._round + again, self._plain_until.get(kind, 0))
        if shift is not None and shift.sure:
            for each in self._times:
                each.scale(shift, same_rung=each is times)
            self._options.clear()
            if ran.tokens != ran.sequences:
                self._plain_until.clear()

    def observe_outcome(self, group: int, outcome: Outcome) -> None:
        """Call it for every proposal of the round, after the passes."""
        if self._all_pinned:
            return
        sequence = self._sequences.get(outcome.seq_id)
        match_class = sequence.match_class if sequence and self._rungs[outcome.proposer].kind == "ngram" else 0
        self._chances(outcome.proposer, outcome.verifier, match_class).add(group, outcome.proposed, outcome.accepted, self._round)
        if outcome.verifier == len(self._rungs):
            self._proposed += outcome.proposed
            self._gained += outcome.accepted

    def forget_kv(self, seq_id: int) -> None:
        """No rung has K/V of this sequence any more."""
        self._sequences.pop(seq_id, None)
        self._uses.pop(seq_id, None)

    def _note_length(self, path: Path, batch: int, sequence: _Sequence) -> None:
        self._batch = batch
        sequence.length, sequence.generated = path.committed, path.committed - path.prompt_length
        self._length_sum += path.committed - self._lengths.pop(path.seq_id, 0)
        self._lengths[path.seq_id] = path.committed
        while len(self._lengths) > batch:
            self._length_sum -= self._lengths.popitem(last=False)[1]

    def _context(self, batch: int) -> int:
        """Tokens in the contexts of so many sequences."""
        return self._length_sum * batch // max(1, len(self._lengths))

    def _usable(self, rung: int, sequence: _Sequence) -> bool:
        """Whether this rung may make sense for this sequence now."""
        spec = self._rungs[rung]
        if spec.gamma is not None or spec.kind == "draft":
            return True
        if spec.kind == "ngram":
            return sequence.match_class >= 0
        return sequence.length >= spec.pays_from

    def _gammas(
        self, group: int, usable: tuple[bool, ...], batch: int, left: int, sequence: _Sequence, lacks: dict[int, int]
    ) -> tuple[int, ...]:
        pinned = any(ok and rung.gamma is not None for ok, rung in zip(usable, self._rungs, strict=True))
        if not any(usable) or (not pinned and self._plain_is_due(batch)):
            return (0,) * len(usable)
        key = (group, usable, bool(lacks), rounded(batch), sequence.match_class)
        decision = entry(self._decisions, key, lambda: _Decision((0,) * len(usable), 0))
        catches_up = lacks and any(decision.gammas) and self._round > decision.thought
        if self._round >= decision.until or catches_up:
            horizon = max(1, min(left, max(_HORIZON, sequence.generated)))
            ask = _Ask(group, batch, self._context(batch), sequence.generated, horizon, sequence.match_class, lacks)
            self._decide(decision, usable, pinned, ask)
        trial, decision.trial = decision.trial, None
        return trial or decision.gammas

    def _plain_is_due(self, batch: int) -> bool:
        """Whether all sequences are plain in this round, to time it."""
        if self._plain_due is None:
            kind = context_class(self._context(batch))
            until = self._plain_until.get(kind)
            if until is None or self._round - until >= _PLAIN_APART:
                until = self._plain_until[kind] = self._round
            self._plain_due = self._round <= until
        return self._plain_due

    def _affordable(self, rung: int, ask: _Ask) -> bool:
        """Whether this rung may catch up, if it has to."""
        if rung not in ask.lacks or self._rungs[rung].gamma is not None:
            return True
        if self._debt > max(self._purse, 0.0):
            return False
        return not self._adaptive or self._times[rung].known or self._catches_up_soon([rung], ask)

    def _catch_up_seconds(self, rung: int, ask: _Ask) -> float:
        """Until this draft has run the tokens that it lacks of this sequence. All sequences wait for it."""
        if rung not in ask.lacks:
            return 0.0
        lacks, last = ask.lacks[rung], self._times[-1]
        measured = self._times[rung].bulk_seconds(lacks)
        if measured is not None:
            return measured
        one, plain = last.seconds(1, ask.context) or 0.0, last.seconds(ask.batch, ask.context) or 0.0
        return lacks * self._ratios[rung] * min(_BULK_SHARE * one, plain / ask.batch)

    def _catches_up_soon(self, rungs: Iterable[int], ask: _Ask) -> bool:
        """Whether a trial of these drafts is lost in what the sequence takes anyway."""
        plain = self._times[-1].seconds(ask.batch, ask.context) or 0.0
        return sum(self._catch_up_seconds(rung, ask) for rung in rungs) <= _TRIAL_CATCH_UP * plain * ask.horizon

    def _decide(self, decision: _Decision, usable: tuple[bool, ...], pinned: bool, ask: _Ask) -> None:
        """Think a decision over: what is expected to be fastest, or what may be faster still if the purse pays for the trial."""
        decision.thought = self._round
        if not pinned and (self._round < PLAIN_ROUNDS or not self._times[-1].known):
            decision.until = self._round + 1
            return
        if ask.lacks:
            usable = tuple(ok and self._affordable(rung, ask) for rung, ok in enumerate(usable))
        top = len(usable)
        rungs = [rung for rung, ok in enumerate(usable) if ok]
        chances = {
            pair: self._chances(*pair, ask.match_class).chance(ask.group, self._round) for pair in combinations([*rungs, top], 2)
        }
        inner = {pair: chance.mean for pair, chance in chances.items() if pair[1] < top}
        options = self._options.find(usable, ask.batch, ask.context, inner, self._round)
        catch_up = {r: self._catch_up_seconds(r, ask) for r in ask.lacks}
        extra = {r: seconds * ask.batch / ask.horizon for r, seconds in catch_up.items()}  # as all wait for all
        rates, hopes = [], []
        for option in options:
            chance = chances.get((option.upper, top), _NONE)
            rates.append(option.rate(expected_tokens(chance.mean, option.gamma), extra))
            hopes.append(option.rate(expected_tokens(chance.high, option.gamma), extra))
        rate, hope = max(rates), max(hopes)
        best = options[rates.index(rate)]
        if not pinned:
            plain = options[0].seconds
            bar = _LOSS if any(decision.gammas) else _GAIN
            bar += _DOUBT / max(self._times[-1].samples(ask.batch, ask.context), PLAIN_ROUNDS)
            if rate * plain < bar or self._purse <= _PURSE_LEAST:
                best, rate = options[0], rates[0]
            hoped = options[hopes.index(hope)]
            price = hoped.seconds - plain + sum(catch_up.get(r, 0.0) for r in hoped.drafts)
            better = hope > max(_GAIN * rate, bar / plain) and price <= (self._purse + _TRIAL_CATCH_UP * ask.generated) * plain
            if better and (not self._adaptive or self._catches_up_soon(hoped.drafts, ask)):
                decision.trial = hoped.gammas
        if best.gammas == decision.gammas:
            decision.lasts = min(2 * decision.lasts, _MOST_ROUNDS)
        elif list(map(bool, best.gammas)) != list(map(bool, decision.gammas)):
            decision.lasts = 1 if any(best.gammas) else max(1, decision.lasts // 2)
        decision.gammas = best.gammas
        decision.until = self._round + (1 if decision.trial is not None and decision.lasts <= _TRIALS_APART else decision.lasts)

    def _chances(self, proposer: int, verifier: int, match_class: int) -> Acceptance:
        kind = self._rungs[proposer].kind
        key = (proposer, verifier, max(0, match_class) if kind == "ngram" else 0)
        found = self._acceptance.get(key)
        if found is None:
            found = self._acceptance[key] = Acceptance(_PRIORS[kind][key[2]])
        return found

    def _note_uses(self) -> None:
        """The round has begun: the drafts that were chosen do catch up."""
        for seq_id, (drafts, lacks) in self._uses.items():
            sequence = entry(self._sequences, seq_id, _Sequence)
            for rung in drafts:
                sequence.reached[rung] = sequence.length
                if rung in lacks:
                    self._behind[rung] = self._behind.get(rung, 0) + lacks[rung]

    def _settle(self) -> None:
        """Close the round that was observed: what speculation lost comes out of the purse, what it gained goes in.

        A round in which others prefill has no pass of the last rung: it is taken to have cost what such a pass does.
        """
        if not self._passes and not self._proposed:
            return
        times = self._times[-1]
        last = next((ran for ran in self._passes if ran.rung == len(self._rungs)), None)
        decoding = last.sequences if last else self._batch
        context = self._context(decoding)
        plain = times.seconds(decoding, context)
        if plain is not None:
            seconds = sum(ran.seconds for ran in self._passes) - self._caught_up
            if last is None:
                seconds += times.seconds(decoding + self._proposed, context) or plain
            self._debt += self._caught_up / plain
            income, loss = _PURSE_SHARE * seconds / plain, 0.0
            if self._proposed or len(self._passes) > (last is not None):
                loss = seconds / plain - 1 - self._gained / decoding
            income += max(0.0, -loss)
            paid = min(self._debt, income)
            self._debt -= paid
            self._purse += income - paid - min(max(0.0, loss), _LARGEST_LOSS)
            self._purse = min(max(self._purse, _PURSE_LEAST), max(_PURSE_MOST, _NAMED_PURSE * (not self._adaptive)))
        self._next_round()

    def _next_round(self) -> None:
        self._passes.clear()
        self._uses.clear()
        self._behind.clear()
        self._caught_up, self._proposed, self._gained = 0.0, 0, 0
        self._plain_due = None
        self._round += 1


def _within(gammas: tuple[int, ...], room: int) -> tuple[int, ...]:
    """The uppermost rung in use is asked for at most `room` tokens."""
    top = next((r for r in reversed(range(len(gammas))) if gammas[r]), None)
    if top is None or gammas[top] <= room:
        return gammas
    return (*gammas[:top], room, *gammas[top + 1 :])
