"""What control knows of rungs: how long their passes take and how often their proposals stand, as measured. Torch-free."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean
from typing import TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

_MOST_ENTRIES = 1024

_SAMPLES = 16
_FADE = 0.99
"""What a test counts for a round later."""
_PRIOR_TESTS, _GROUP_TESTS, _ALL_TESTS = 4.0, 64.0, 256.0
"""Weights: of a prior, and the most that are remembered of a group and of all."""
_BULK_TOKENS = 32
"""A pass with more tokens for each of its sequences is one that catches up; its time tells nothing about others."""
_SLOPE = 0.1
"""What a token more adds to a pass of one, as a share of it, before that is known."""


class PassTimes:
    """Seconds of one rung's passes, as a function of the tokens in them: the newest without outliers, straight lines between them."""

    def __init__(self) -> None:
        self._samples: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_SAMPLES))
        self._trusted: dict[int, float] = {}
        self._tokens: list[int] = []
        """Keys of `_trusted`, sorted."""
        self._per_bulk_token: float | None = None

    def add(self, tokens: int, sequences: int, seconds: float) -> None:
        """One pass of `tokens` tokens in all."""
        if tokens > _BULK_TOKENS * sequences:
            self._per_bulk_token = seconds / tokens
            return
        samples = self._samples[tokens]
        samples.append(seconds)
        # A first pass may be a cold one: it counts only where it was faster than expected.
        if len(samples) > 1:
            self._trusted[tokens] = _typical(samples)
            self._tokens = sorted(self._trusted)

    @property
    def known(self) -> bool:
        return bool(self._trusted)

    def samples(self, tokens: int) -> int:
        """Passes of so many tokens that were measured, the newest at least."""
        return len(self._samples.get(tokens, ()))

    @property
    def most_tokens(self) -> int:
        """In a pass that was measured; 0 before the first."""
        return max(self._samples, default=0)

    def seconds(self, tokens: int) -> float | None:
        """Of a pass; None before any was measured twice."""
        if not self._trusted:
            return None
        if tokens in self._trusted:
            return self._trusted[tokens]
        line = self._line(tokens)
        return min(line, self._samples[tokens][0]) if tokens in self._samples else line

    def bulk_token_seconds(self) -> float | None:
        """Of one token among many; None before that can be said."""
        if self._per_bulk_token is None and len(self._tokens) > 1:
            return self._slope()
        return self._per_bulk_token

    def _line(self, tokens: int) -> float:
        place = bisect_left(self._tokens, tokens)
        if 0 < place < len(self._tokens):
            low, high = self._tokens[place - 1], self._tokens[place]
            share = (tokens - low) / (high - low)
            return (1 - share) * self._trusted[low] + share * self._trusted[high]
        nearest = self._tokens[0 if place == 0 else -1]
        return max(self._trusted[nearest] + self._slope() * (tokens - nearest), self._trusted[nearest] / 2)

    def _slope(self) -> float:
        """Seconds that a token more takes."""
        low, high = self._tokens[0], self._tokens[-1]
        if low == high:
            return _SLOPE * self._trusted[low] / math.sqrt(low)
        return max(0.0, (self._trusted[high] - self._trusted[low]) / (high - low))


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
