"""What each choice of gammas would cost, as far as passes have been timed. Torch-free."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, pairwise, product

from rowcast.runtime.ladder.costs import PassTimes, context_class, entry, expected_passes, rounded
from rowcast.runtime.ladder.spec import Rung

GAMMAS = (1, 2, 3, 4, 6, 8, 12, 16)
"""Asked of the uppermost rung in use. The largest bounds what a round drafts where nothing is pinned."""
INNER_GAMMAS = (1, 2, 4)
_TRIAL_GAMMAS = (1, 2)
"""Of a rung that has not been timed."""
_LOOKUP_SECONDS = 1e-5
_MOST_ROUNDS = 8
"""A table is made anew after 1, 2, 4, ... rounds, at most so many."""


@dataclass(frozen=True, slots=True)
class Option:
    """Gammas, where all decoding sequences use them."""

    gammas: tuple[int, ...]
    upper: int
    """The uppermost rung in use; -1 where none is."""
    gamma: int
    """Asked of it."""
    seconds: float
    """Of a round."""
    drafts: tuple[int, ...]
    """Draft rungs in use."""

    def rate(self, tokens: float, extra: Mapping[int, float]) -> float:
        """Tokens a second; `extra`: by draft rung, seconds for each token to catch up."""
        return tokens / (self.seconds + tokens * sum(extra.get(rung, 0.0) for rung in self.drafts) if extra else self.seconds)


@dataclass(slots=True)
class _Table:
    options: list[Option]
    until: int
    lasts: int = 1
    points: int = 0
    """Times that were known when it was made."""


class Options:
    """Tables of options, kept for some rounds and shared by all sequences that are alike."""

    def __init__(self, rungs: Sequence[Rung], times: Sequence[PassTimes], ratios: Sequence[float]) -> None:
        """`rungs`: all but the last. `times`: of all rungs; read at each use. `ratios`: a lower rung's time over the last one's,
        before it was timed."""
        self._rungs = rungs
        self._times = times
        self._ratios = ratios
        self._tables: OrderedDict[tuple[object, ...], _Table] = OrderedDict()

    def find(
        self, usable: tuple[bool, ...], batch: int, context: int, acceptance: Mapping[tuple[int, int], float], now: int
    ) -> list[Option]:
        """Of the choices that ask as many tokens of the same rung and use the same drafts, the cheapest; without pinned rungs the
        first is plain. `acceptance`: by proposer and verifier, the last rung not among them. `now`: the round."""
        batch = rounded(batch)
        coarse = {pair: round(chance, 1) for pair, chance in acceptance.items()}
        points = sum(times.points for times in self._times)
        key = (usable, batch, context_class(context), *coarse.values())
        table = entry(self._tables, key, lambda: _Table([], 0))
        if now >= table.until or points != table.points:
            table.lasts = min(2 * table.lasts, _MOST_ROUNDS) if points == table.points else 1
            table.points = points
            table.options = self._cheapest(usable, batch, context, coarse)
            table.until = now + table.lasts
        return table.options

    def clear(self) -> None:
        """Times have changed."""
        self._tables.clear()

    def _cheapest(
        self, usable: tuple[bool, ...], batch: int, context: int, acceptance: Mapping[tuple[int, int], float]
    ) -> list[Option]:
        top = len(usable)
        most = 2 * self._times[top].most_tokens + batch  # no pass far longer than those that were measured
        tried = tuple(rung.kind == "ngram" or times.known for rung, times in zip(self._rungs, self._times, strict=False))
        seconds: dict[tuple[int, int], float] = {}
        found: dict[tuple[int, int, tuple[int, ...]], Option] = {}
        for gammas in _choices(usable, tried, tuple(rung.gamma for rung in self._rungs)):
            used = [r for r in range(top) if gammas[r]]
            upper = used[-1] if used else -1
            gamma = gammas[upper] if used else 0
            if batch * (gamma + 1) > most and self._rungs[upper].gamma is None:
                continue
            inner = [acceptance[pair] for pair in pairwise(used)]
            passes = expected_passes(inner, [gammas[r] for r in used], gamma) if used else []
            total = 0.0
            for rung, (count, tokens) in zip([*used, top], [*passes, (1.0, gamma + 1)], strict=True):
                each = seconds.get((rung, tokens))
                if each is None:
                    each = seconds[rung, tokens] = self._pass_seconds(rung, batch, tokens, context)
                total += count * each
            drafts = tuple(r for r in used if self._rungs[r].kind == "draft")
            best = found.get((upper, gamma, drafts))
            if best is None or total < best.seconds:
                found[upper, gamma, drafts] = Option(gammas, upper, gamma, total, drafts)
        return list(found.values())

    def _pass_seconds(self, rung: int, batch: int, tokens: int, context: int) -> float:
        """With so many tokens of each sequence."""
        last = len(self._rungs)
        if rung < last and self._rungs[rung].kind == "ngram":
            return _LOOKUP_SECONDS
        measured = self._times[rung].seconds(batch * tokens, context)
        if measured is not None:
            return measured
        return 1.0 if rung == last else (self._times[last].seconds(batch, context) or 1.0) * self._ratios[rung]


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
                grid = GAMMAS if r == used[-1] else INNER_GAMMAS
                grids.append((gamma,) if gamma is not None else grid if tried[r] else _TRIAL_GAMMAS)
            for gammas in product(*grids):
                chosen = dict(zip(used, gammas, strict=True))
                found.append(tuple(chosen.get(r, 0) for r in range(len(usable))))
    return found
