"""Which rungs a sequence uses in its next round, and how many tokens each is asked for: the cost model, at run time. Torch-free.

Expected tokens of a round over its expected time (TriForce, arXiv 2404.11912, section 4.2; Leviathan et al., arXiv 2211.17192, section
3.3) decides, with times and acceptances as measured. What is unknown is tried out of a purse: a small share of the time spent so far.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations, pairwise, product
from typing import TYPE_CHECKING

from rowcast.runtime.ladder.costs import Acceptance, PassTimes, entry, expected_passes, expected_tokens
from rowcast.runtime.ladder.ngram import NgramLookup
from rowcast.runtime.ladder.path import Path
from rowcast.runtime.ladder.spec import Ladder

if TYPE_CHECKING:
    from rowcast.runtime.ladder.climb import Outcome, Pass

GAMMAS = (1, 2, 3, 4, 6, 8, 12, 16)
"""Asked of the uppermost rung in use. The largest bounds what a round drafts where nothing is pinned."""
_INNER_GAMMAS = (1, 2, 4)
_TRIAL_GAMMAS = (1, 2)
"""Of a rung that has not been timed."""

_PRIORS = {"ngram": (0.3, 0.6, 0.85), "draft": (0.5,), "self": (0.85,)}
"""Acceptance before any was measured; of n-grams by the length of the match."""
_MATCHES = (4, 8)
"""Where the second and the third class of match lengths begin."""
_LOOKUP_SECONDS = 1e-5

_PLAIN_ROUNDS = 3
"""Before the first that speculates, to compare with."""
_GAIN, _LOSS = 1.03, 1.01
"""Speculation starts where it is so much faster than plain, and stops where it is no longer so much faster."""
_DOUBT = 0.4
"""Added to both, over the number of plain rounds timed."""
_SMALL_GAIN = 1.15
"""Below it a plain round is timed now and then, to be sure."""
_TRIALS_APART = 2
"""A decision that lasts more rounds is kept between two trials."""
_PURSE_START, _PURSE_SHARE, _PURSE_MOST, _PURSE_LEAST = 2.0, 0.01, 3.0, -1.0
"""In plain rounds: at first, gained a round, bounds."""
_LARGEST_LOSS = 3.0
"""Plain rounds that one round may cost the purse: a cold call is no evidence."""
_NAMED_PURSE = 16.0
"""At first, where the user named the rungs."""
_HORIZON = 64
"""Tokens that a sequence is taken to have before it at least; else as many as it has generated."""
_TRIAL_CATCH_UP = 0.03
"""Share of the horizon's time that an untried draft may take to catch up."""
_BULK_SHARE = 0.1
"""Time of one token among many over that of a pass of one, before it is known."""
_MOST_ROUNDS = 16
"""A decision is thought over after 1, 2, 4, ... rounds, at most so many."""


@dataclass(slots=True)
class _Decision:
    gammas: tuple[int, ...]
    until: int
    """The round that it is thought over in."""
    lasts: int = 1
    """Rounds between thoughts."""
    trial: tuple[int, ...] | None = None
    """Used instead in the next round."""


@dataclass(slots=True)
class _Sequence:
    match_class: int = 0
    reached: dict[int, int] = field(default_factory=dict)
    """By draft rung: the sequence's length when the rung was last used."""


@dataclass(frozen=True, slots=True)
class _Forecast:
    """Of one sequence in a round in which all decoding sequences do as it does."""

    gammas: tuple[int, ...]
    tokens: float
    hoped: float
    """Tokens, if acceptance is as high as it may be."""
    seconds: float
    extra: float
    """Seconds for each token, to catch up."""

    def rate(self, tokens: float) -> float:
        return tokens / (self.seconds + tokens * self.extra)


class Controller:
    """Chooses gammas. Every choice gives the same output, only sooner or later."""

    def __init__(
        self, ladder: Ladder, *, adaptive: bool, lookup: NgramLookup | None = None, cost_ratios: Sequence[float] | None = None
    ) -> None:
        """`adaptive`: the rungs were found by `auto`, so that trials must cost next to nothing. `lookup`: that of the rung ngram, if
        there is one. `cost_ratios`: for each lower rung, the bytes that its pass reads over the last rung's."""
        self._rungs = ladder.lower
        self._adaptive = adaptive
        self._lookup = lookup
        self._ratios = list(cost_ratios or [0.5] * len(self._rungs))
        self._times = [PassTimes() for _ in ladder.rungs]
        self._acceptance: dict[tuple[int, int, int], Acceptance] = {}
        """By proposer, verifier and class of match."""
        self._decisions: OrderedDict[tuple[int, tuple[bool, ...], int, int], _Decision] = OrderedDict()
        """By group, usable rungs, batch and class of match."""
        self._sequences: OrderedDict[int, _Sequence] = OrderedDict()
        self._round = 0
        self._purse = _PURSE_START if adaptive else _NAMED_PURSE
        self._passes: list[Pass] = []
        self._gained = 0
        """Tokens that proposals gave in this round, beside the last rung's own."""

    def choose(self, group: int, *, batch: int, path: Path, room: int, allowed: Sequence[bool]) -> tuple[int, ...]:
        """For each rung below the last, how many tokens the next one in use asks of it at a time; 0: not used.

        Rungs that are not `allowed` are not used. `batch`: sequences that decode in this round. `room` >= 1: the uppermost rung in use
        is asked for no more. Call it for every decoding sequence before a round.
        """
        self._settle()
        sequence = entry(self._sequences, path.seq_id, _Sequence)
        usable = tuple(ok and self._usable(rung, path, sequence) for rung, ok in enumerate(allowed))
        if all(rung.gamma is not None for rung in self._rungs):
            gammas = tuple(rung.gamma or 0 if ok else 0 for rung, ok in zip(self._rungs, usable, strict=True))
        else:
            key = (group, usable, batch, sequence.match_class)
            decision = entry(self._decisions, key, lambda: _Decision((0,) * len(usable), 0))
            if self._round >= decision.until:
                self._decide(decision, group, usable, batch, path, sequence)
            gammas = decision.gammas
            if decision.trial is not None:
                gammas, decision.trial = decision.trial, None
        for rung, gamma in enumerate(gammas):
            if gamma and self._rungs[rung].kind == "draft":
                sequence.reached[rung] = path.committed
        return _within(gammas, room)

    def observe_pass(self, ran: Pass) -> None:
        """Call it for every pass of a lower rung, and for the last rung's where all its sequences decode."""
        self._times[ran.rung].add(ran.tokens, ran.sequences, ran.seconds)
        self._passes.append(ran)

    def observe_outcome(self, group: int, outcome: Outcome) -> None:
        """Call it for every proposal of the round, after the passes."""
        sequence = self._sequences.get(outcome.seq_id)
        match_class = sequence.match_class if sequence and self._rungs[outcome.proposer].kind == "ngram" else 0
        self._chances(outcome.proposer, outcome.verifier, match_class).add(group, outcome.proposed, outcome.accepted, self._round)
        if outcome.verifier == len(self._rungs):
            self._gained += outcome.accepted

    def _usable(self, rung: int, path: Path, sequence: _Sequence) -> bool:
        """Whether this rung may make sense for this sequence now. Notes the class of its n-gram match."""
        spec = self._rungs[rung]
        if spec.kind == "ngram" and self._lookup is not None:
            length = self._lookup.match_length(path)
            sequence.match_class = sum(length >= bound for bound in _MATCHES)
            return length > 0 or spec.gamma is not None
        if spec.gamma is not None:
            return True
        if spec.kind == "self":
            assert spec.kv is not None
            return path.committed >= 2 * spec.kv
        if self._adaptive and not self._times[rung].known:
            plain = self._times[-1].seconds(1) or 0.0
            return self._catch_up_seconds(rung, path, sequence) <= _TRIAL_CATCH_UP * plain * max(_HORIZON, _generated(path))
        return True

    def _catch_up_seconds(self, rung: int, path: Path, sequence: _Sequence) -> float:
        """Until this draft has run the tokens that it lacks."""
        lacks = path.committed - sequence.reached.get(rung, 0)
        if lacks <= max(GAMMAS):
            return 0.0
        each = self._times[rung].bulk_token_seconds()
        if each is None:
            each = self._ratios[rung] * (
                self._times[-1].bulk_token_seconds() or _BULK_SHARE * (self._times[-1].seconds(1) or 0.0)
            )
        return lacks * each

    def _decide(
        self, decision: _Decision, group: int, usable: tuple[bool, ...], batch: int, path: Path, sequence: _Sequence
    ) -> None:
        """Think a decision over: what is expected to be fastest, or what may be faster still if the purse pays for the trial."""
        pinned = any(ok and rung.gamma is not None for ok, rung in zip(usable, self._rungs, strict=True))
        plain = self._times[-1].seconds(batch)
        if not pinned and (plain is None or self._round < _PLAIN_ROUNDS):
            decision.gammas, decision.until = (0,) * len(usable), self._round + 1
            return
        forecasts = self._forecasts(group, usable, batch, path, sequence, plain or 1.0)
        best = max(forecasts, key=lambda f: f.rate(f.tokens))
        if not pinned:
            assert plain is not None
            gain = best.rate(best.tokens) * plain
            bar = (_LOSS if any(decision.gammas) else _GAIN) + _DOUBT / max(self._times[-1].samples(batch), _PLAIN_ROUNDS)
            tired = gain < _SMALL_GAIN and any(decision.gammas) and decision.lasts == _MOST_ROUNDS
            if gain < bar or tired or self._purse <= _PURSE_LEAST:
                best = forecasts[0]  # plain
            hoped = max(forecasts, key=lambda f: f.rate(f.hoped))
            better = hoped.rate(hoped.hoped) > max(_GAIN * best.rate(best.tokens), bar / plain)
            if better and hoped.seconds - plain <= self._purse * plain:
                decision.trial = hoped.gammas
        if list(map(bool, best.gammas)) == list(map(bool, decision.gammas)):
            decision.lasts = min(2 * decision.lasts, _MOST_ROUNDS)
        else:
            decision.lasts = 1 if any(best.gammas) else max(1, decision.lasts // 2)
        decision.gammas = best.gammas
        decision.until = self._round + (1 if decision.trial is not None and decision.lasts <= _TRIALS_APART else decision.lasts)

    def _forecasts(
        self, group: int, usable: tuple[bool, ...], batch: int, path: Path, sequence: _Sequence, plain: float
    ) -> list[_Forecast]:
        """Of all choices worth a thought; without pinned rungs the first is plain."""
        top = len(usable)
        horizon = max(_HORIZON, _generated(path))
        extra = [
            self._catch_up_seconds(r, path, sequence) / horizon if usable[r] and self._rungs[r].kind == "draft" else 0.0
            for r in range(top)
        ]
        catching_up = any(extra)
        means: dict[tuple[int, int], float] = {}
        highs: dict[tuple[int, int], float] = {}
        for proposer, verifier in combinations([r for r, ok in enumerate(usable) if ok] + [top], 2):
            match_class = sequence.match_class if self._rungs[proposer].kind == "ngram" else 0
            chance = self._chances(proposer, verifier, match_class).chance(group, self._round)
            means[proposer, verifier], highs[proposer, verifier] = chance.mean, chance.high
        seconds: dict[tuple[int, int], float] = {}
        most = 2 * self._times[-1].most_tokens + batch  # no pass far longer than those that were measured
        found = []
        for gammas in self._choices(usable):
            used = [r for r in range(top) if gammas[r]]
            gamma = gammas[used[-1]] if used else 0
            if batch * (gamma + 1) > most and self._rungs[used[-1]].gamma is None:
                continue
            inner = [means[pair] for pair in pairwise(used)]
            total = 0.0
            passes = expected_passes(inner, [gammas[r] for r in used], gamma) if used else []
            for rung, (count, tokens) in zip([*used, top], [*passes, (1.0, gamma + 1)], strict=True):
                each = seconds.get((rung, tokens))
                if each is None:
                    each = seconds[rung, tokens] = self._pass_seconds(rung, batch * tokens, plain)
                total += count * each
            last = (used[-1], top) if used else None
            found.append(
                _Forecast(
                    gammas,
                    expected_tokens(means[last], gamma) if last else 1.0,
                    expected_tokens(highs[last], gamma) if last else 1.0,
                    total,
                    sum(extra[r] for r in used) if catching_up else 0.0,
                )
            )
        return found

    def _choices(self, usable: tuple[bool, ...]) -> list[tuple[int, ...]]:
        """Gammas to compare: pinned rungs always on, at most one that was never timed."""
        tried = tuple(rung.kind == "ngram" or times.known for rung, times in zip(self._rungs, self._times, strict=False))
        return _choices(usable, tried, tuple(rung.gamma for rung in self._rungs))

    def _pass_seconds(self, rung: int, tokens: int, plain: float) -> float:
        if rung < len(self._rungs) and self._rungs[rung].kind == "ngram":
            return _LOOKUP_SECONDS
        measured = self._times[rung].seconds(tokens)
        if measured is not None:
            return measured
        return plain if rung == len(self._rungs) else plain * self._ratios[rung]

    def _chances(self, proposer: int, verifier: int, match_class: int) -> Acceptance:
        key = (proposer, verifier, match_class)
        found = self._acceptance.get(key)
        if found is None:
            found = self._acceptance[key] = Acceptance(_PRIORS[self._rungs[proposer].kind][match_class])
        return found

    def _settle(self) -> None:
        """Close the round that was observed: what speculation lost comes out of the purse, what it gained goes in."""
        if not self._passes:
            return
        top = len(self._rungs)
        last = [ran for ran in self._passes if ran.rung == top]
        plain = self._times[top].seconds(last[0].sequences) if last else None
        if plain is not None:
            spent = sum(ran.seconds for ran in self._passes) / plain
            self._purse += _PURSE_SHARE * spent
            if self._gained or len(self._passes) > 1 or last[0].tokens > last[0].sequences:
                self._purse -= min(spent - 1 - self._gained / last[0].sequences, _LARGEST_LOSS)
            self._purse = min(max(self._purse, _PURSE_LEAST), max(_PURSE_MOST, _NAMED_PURSE * (not self._adaptive)))
        self._passes.clear()
        self._gained = 0
        self._round += 1


@lru_cache(maxsize=256)
def _choices(usable: tuple[bool, ...], tried: tuple[bool, ...], pinned: tuple[int | None, ...]) -> list[tuple[int, ...]]:
    """All gammas of all sets of usable rungs, the smallest set first; a set holds all pinned rungs and at most one untried one."""
    rungs = [r for r, ok in enumerate(usable) if ok]
    found = []
    for size in range(len(rungs) + 1):
        for used in combinations(rungs, size):
            if any(pinned[r] is not None and r not in used for r in rungs):
                continue
            if sum(not tried[r] and pinned[r] is None for r in used) > 1:
                continue
            grids = []
            for r in used:
                gamma = pinned[r]
                grid = GAMMAS if r == used[-1] else _INNER_GAMMAS
                grids.append((gamma,) if gamma is not None else grid if tried[r] else _TRIAL_GAMMAS)
            for gammas in product(*grids):
                chosen = dict(zip(used, gammas, strict=True))
                found.append(tuple(chosen.get(r, 0) for r in range(len(usable))))
    return found


def _within(gammas: tuple[int, ...], room: int) -> tuple[int, ...]:
    """The uppermost rung in use is asked for at most `room` tokens."""
    top = next((r for r in reversed(range(len(gammas))) if gammas[r]), None)
    if top is None or gammas[top] <= room:
        return gammas
    return (*gammas[:top], room, *gammas[top + 1 :])


def _generated(path: Path) -> int:
    return path.committed - path.prompt_length
