"""What control knows of rungs: how long their passes take and how often their proposals stand, as measured. Torch-free."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean
from typing import TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

_MOST_ENTRIES = 1024

_SAMPLES, _SAMPLE_ROUNDS = 16, 256
"""The newest that count, and how old they may be."""
_FADE = 0.99
"""What a test counts for a round later."""
_PRIOR_TESTS, _GROUP_TESTS, _ALL_TESTS = 4.0, 64.0, 256.0
"""Weights: of a prior, and the most that are remembered of a group and of all."""
_BULK_TOKENS = 32
"""A pass with more tokens for each of its sequences is one that catches up; its time tells nothing about others."""
_SLOPE = 0.1
"""What a token more adds to a pass of one, as a share of it, before that is known."""
_SMALL_CONTEXT = 512
"""Tokens. Less is one class."""
_SHIFT_PASSES, _SHIFT_BEFORE, _SHIFT_LEAST = 3, 5, 1.05
"""So many passes in a row, slower or faster by that factor than each of so many earlier ones, show that the machine's speed changed."""


@dataclass(frozen=True, slots=True)
class Shift:
    """The newest passes of one kind were all slower, or all faster, than each earlier one."""

    factor: float
    """Of their seconds."""
    since: int
    """The round of the last pass that was as before."""
    began: int
    """That of the first that was not."""
    now: int
    sure: bool
    """They were enough to say so, and what came before is forgotten."""


class PassTimes:
    """Seconds of one rung's passes by the tokens in them: the newest without outliers, straight lines between them.

    Each class of total context (a power of two of tokens) has its own line. One that was never measured borrows the nearest's.
    """

    def __init__(self) -> None:
        self._lines: dict[int, _Line] = {}
        """By class of context."""
        self._bulk: dict[int, tuple[int, float]] = {}
        """The newest pass of each power of two of tokens: tokens, seconds."""
        self.points = 0
        """Kinds of passes that were measured twice."""

    def add(self, tokens: int, sequences: int, context: int, seconds: float, now: int) -> Shift | None:
        """One pass of `tokens` tokens in all, over sequences of `context` tokens in all, in round `now`. Returns whether such passes
        take longer or less long than they did."""
        if tokens > _BULK_TOKENS * sequences:
            self.add_bulk(tokens, seconds)
            return None
        line = self._lines.setdefault(context_class(context), _Line())
        points = len(line.tokens)
        shift = line.add(rounded(tokens), seconds, now)
        self.points += len(line.tokens) - points
        return shift

    def add_bulk(self, tokens: int, seconds: float) -> None:
        """A pass that caught up."""
        self._bulk[tokens.bit_length()] = tokens, seconds

    def scale(self, shift: Shift, *, same_rung: bool) -> None:
        """The machine's speed changed: what was measured before takes longer or less long now. `same_rung`: this rung's passes showed
        it, so that what may have been measured before or after is better forgotten."""
        for line in self._lines.values():
            line.scale(shift, forget=same_rung)
        self.points = sum(len(line.tokens) for line in self._lines.values())

    @property
    def known(self) -> bool:
        return self.points > 0

    @property
    def most_tokens(self) -> int:
        """In a pass that was measured; 0 before the first."""
        return max((tokens for line in self._lines.values() for tokens in line.samples), default=0)

    def samples(self, tokens: int, context: int) -> int:
        """Passes of so many tokens over about so much context that were measured, the newest at least."""
        line = self._lines.get(context_class(context))
        return len(line.samples.get(rounded(tokens), ())) if line else 0

    def seconds(self, tokens: int, context: int) -> float | None:
        """Of a pass; None before any was measured twice."""
        near = self._nearest(context)
        if not near:
            return None
        slope = near[0].slope
        if slope is None:  # one point: the next line that has two knows how steep
            slope = next((line.slope for line in near if line.slope is not None), near[0].guessed_slope)
        return near[0].seconds(rounded(tokens), slope)

    def bulk_seconds(self, tokens: int) -> float | None:
        """To catch up so many tokens; None before any were. In proportion to one pass, or in line with the two nearest in size."""
        near = sorted(self._bulk.values(), key=lambda bulk: abs(bulk[0] - tokens))[:2]
        if not near:
            return None
        (low, fast), (high, slow) = min(near), max(near)
        if low == high or slow <= fast:
            return slow * tokens / high
        return max(fast + (slow - fast) * (tokens - low) / (high - low), fast * tokens / max(low, tokens))

    def _nearest(self, context: int) -> list[_Line]:
        """Lines with a trusted point, the class of `context` first."""
        mine = context_class(context)
        return [self._lines[c] for c in sorted(self._lines, key=lambda c: abs(c - mine)) if self._lines[c].tokens]


class _Line:
    """Seconds by tokens, in one class of context."""

    def __init__(self) -> None:
        self.samples: dict[int, deque[tuple[int, float]]] = defaultdict(lambda: deque(maxlen=_SAMPLES))
        """By tokens: (round, seconds), oldest first."""
        self.tokens: list[int] = []
        """Where it is trusted, sorted."""
        self._trusted: dict[int, float] = {}

    def add(self, tokens: int, seconds: float, now: int) -> Shift | None:
        samples = self.samples[tokens]
        while samples and samples[0][0] < now - _SAMPLE_ROUNDS:
            samples.popleft()
        samples.append((now, seconds))
        shift = _shift(samples)
        while shift and shift.sure and len(samples) > _SHIFT_PASSES:
            samples.popleft()
        # A first pass may be a cold one: it counts only where it was faster than expected.
        if len(samples) > 1:
            self._trust(tokens)
        return shift

    def scale(self, shift: Shift, *, forget: bool) -> None:
        for tokens, samples in list(self.samples.items()):
            newest = samples[-1][0]
            if newest < shift.since:
                self.samples[tokens] = deque(((shift.now, seconds * shift.factor) for _, seconds in samples), maxlen=_SAMPLES)
                if tokens in self._trusted:
                    self._trust(tokens)
            elif forget and newest < shift.began:
                del self.samples[tokens]
                if self._trusted.pop(tokens, None):
                    self.tokens.remove(tokens)

    def seconds(self, tokens: int, slope: float) -> float:
        """`slope`: what a token more takes beyond the ends."""
        if tokens in self._trusted:
            return self._trusted[tokens]
        place = bisect_left(self.tokens, tokens)
        if 0 < place < len(self.tokens):
            low, high = self.tokens[place - 1], self.tokens[place]
            share = (tokens - low) / (high - low)
            found = (1 - share) * self._trusted[low] + share * self._trusted[high]
        else:
            nearest = self.tokens[0 if place == 0 else -1]
            found = max(self._trusted[nearest] + slope * (tokens - nearest), self._trusted[nearest] / 2)
        return min(found, self.samples[tokens][-1][1]) if tokens in self.samples else found

    @property
    def slope(self) -> float | None:
        """Seconds that a token more takes; None with one point."""
        low, high = self.tokens[0], self.tokens[-1]
        return max(0.0, (self._trusted[high] - self._trusted[low]) / (high - low)) if low < high else None

    @property
    def guessed_slope(self) -> float:
        return _SLOPE * self._trusted[self.tokens[0]] / math.sqrt(self.tokens[0])

    def _trust(self, tokens: int) -> None:
        if tokens not in self._trusted:
            insort(self.tokens, tokens)
        self._trusted[tokens] = _typical([seconds for _, seconds in self.samples[tokens]])


def context_class(context: int) -> int:
    """Powers of two; what is small takes no time to read."""
    return (context // _SMALL_CONTEXT).bit_length()


def rounded(count: int) -> int:
    """To four significant bits, so that ragged passes of about one size share what was measured."""
    shift = max(0, count.bit_length() - 4)
    return (count + (1 << shift >> 1)) >> shift << shift


def _shift(samples: Sequence[tuple[int, float]]) -> Shift | None:
    """Judged by rank, so that noise sets its own bar. `samples`: (round, seconds), oldest first."""
    rounds = [then for then, _ in samples]
    seconds = [each for _, each in samples]
    for count in range(_SHIFT_PASSES, 0, -1):
        before, after = seconds[:-count], seconds[-count:]
        if len(before) < _SHIFT_BEFORE:
            continue
        if min(after) > max(before) * _SHIFT_LEAST or max(after) * _SHIFT_LEAST < min(before):
            factor = _typical(after) / _typical(before)
            return Shift(factor, rounds[-count - 1], rounds[-count], rounds[-1], count == _SHIFT_PASSES)
    return None


def _typical(samples: Sequence[float]) -> float:
    """Mean of the middle half; of two, the lesser where the other is out of all proportion."""
    if len(samples) == 2 and max(samples) > 2 * min(samples):
        return min(samples)
    cut = max(len(samples) // 4, len(samples) == 3)
    return fmean(sorted(samples)[cut : len(samples) - cut])


@dataclass(slots=True)
class _Tally:
    tested: float = 0.0
    accepted: float = 0.0
    round: int = 0

    def scale(self, factor: float) -> None:
        self.tested *= factor
        self.accepted *= factor

    def add(self, tested: int, accepted: int, window: float) -> None:
        """What goes beyond `window` tests pushes old ones out."""
        self.scale(min(1.0, window / max(self.tested, window)))
        self.tested += tested
        self.accepted += accepted

    def age(self, now: int) -> None:
        """Old rounds weigh less."""
        self.scale(_FADE ** (now - self.round))
        self.round = now


@dataclass(frozen=True, slots=True)
class Chance:
    """That the next proposal stands."""

    mean: float
    high: float
    """One standard deviation above the mean, by this group's own tests."""


class Acceptance:
    """How often one rung's proposals stand before one verifier: a group's counts, drawn to everyone's, and those to a prior."""

    def __init__(self, prior: float) -> None:
        self._prior = prior
        self._all = _Tally()
        self._groups: OrderedDict[int, _Tally] = OrderedDict()

    def add(self, group: int, proposed: int, accepted: int, now: int) -> None:
        """A proposal of `proposed` tokens, of which `accepted` stood, in round `now`."""
        tested = min(proposed, accepted + 1)
        mine = entry(self._groups, group, _Tally)
        mine.age(now)
        mine.add(tested, accepted, _GROUP_TESTS)
        self._all.add(tested, accepted, _ALL_TESTS)

    def chance(self, group: int, now: int) -> Chance:
        """As of round `now`. A group's own tests age, so that what was long not tried becomes uncertain, not better."""
        mine = entry(self._groups, group, _Tally)
        mine.age(now)
        weight = _PRIOR_TESTS
        everyone = (self._all.accepted + weight * self._prior) / (self._all.tested + weight)
        mean = (mine.accepted + weight * everyone) / (mine.tested + weight)
        trust = 1 / (mine.tested + weight)
        return Chance(mean, min(0.98, mean + math.sqrt((mean * (1 - mean) + trust) * trust)))


def expected_tokens(acceptance: float, proposed: int) -> float:
    """That a verifier's pass yields, its own token included: (1 - a^(g+1)) / (1 - a) (arXiv 2211.17192, equation 1)."""
    if acceptance > 0.999:
        return proposed + 1.0
    return float((1 - acceptance ** (proposed + 1)) / (1 - acceptance))


def expected_passes(acceptance: Sequence[float], gammas: Sequence[int], asked: int) -> list[tuple[float, int]]:
    """Passes that rungs in use, cheapest first, make until the uppermost has added `asked` tokens, and a sequence's tokens in each.

    acceptance[i], gammas[i]: of rung i's proposals by rung i + 1; the uppermost's are not read. The lowest runs one token a pass.
    """
    found: list[tuple[float, int]] = []
    calls = 1.0
    for i in range(len(gammas) - 1, 0, -1):
        passes, proposed = _passes_and_proposed(round(acceptance[i - 1], 2), gammas[i - 1], asked)
        found.append((calls * passes, round(proposed / passes) + 1))
        calls *= passes
        asked = max(1, round(proposed / passes))
        calls *= proposed / passes / asked
    found.append((calls * asked, 1))
    return found[::-1]


@lru_cache(maxsize=1 << 14)
def _passes_and_proposed(acceptance: float, gamma: int, asked: int) -> tuple[float, float]:
    """Passes of a rung until it has added `asked` tokens, and the tokens proposed to it by then, at most `gamma` at a time."""
    passes, proposed = [0.0], [0.0]
    for missing in range(1, asked + 1):
        # It adds a token of its own to what it accepts: one fewer is asked for.
        most = min(gamma, missing - 1)
        chances = [acceptance**n * (1 - acceptance if n < most else 1) for n in range(most + 1)]
        passes.append(1 + sum(p * passes[missing - 1 - n] for n, p in enumerate(chances)))
        proposed.append(most + sum(p * proposed[missing - 1 - n] for n, p in enumerate(chances)))
    return passes[asked], proposed[asked]


def entry(table: OrderedDict[K, V], key: K, make: Callable[[], V]) -> V:
    """The entry under `key`, made if need be. The table forgets what was not asked for in a long time."""
    found = table.get(key)
    if found is None:
        found = table[key] = make()
        if len(table) > _MOST_ENTRIES:
            table.popitem(last=False)
    else:
        table.move_to_end(key)
    return found
