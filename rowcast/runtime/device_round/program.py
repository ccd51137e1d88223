"""The passes of one round, in order, known before it starts: the recursion of `ladder.climb`, unrolled. Torch-free.

The host does not wait for how many proposals stand, so a rung is run a fixed number of times: as often as it takes to reach its gamma
where as much stands as usually does. Where less does, the round drafts less, where more does, a pass has nothing to do. But for a lone
sequence, whose host may wait and leave such passes out (`left_to_do`). The output is the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from rowcast.runtime.ladder.costs import expected_tokens

BATCHES = (1, 2, 4, 8, 16, 32, 64)
"""Sequences of a round, rounded up: each number has graphs of its own. More run in several rounds."""

MOST_PASSES = 64
"""Of a round."""
MOST_LAG = 3
"""Tokens before the newest that a rung's first pass runs at most: a round's state remembers one more (`kernels.rounds.HISTORY`)."""
_STANDS, _NEWEST = 0.7, 0.02
"""Share of the judged proposals that is taken to stand before any were judged, and what the newest verdict weighs."""
_SLACK = 1.0
"""How often a rung is run changes where that is so far from what would suit: acceptances are measured, and waver."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass of a rung over each sequence's next tokens, and the verdict on what the rung below has proposed."""

    rung: int
    tokens: int
    """Most tokens that it runs of a sequence."""
    judges: bool
    """Whether there may be proposals; else it draws the next token only."""


def lag(above: int) -> int:
    """Tokens before its newest that a rung with K/V of its own may lack when a round begins, `above` other rungs being between it and
    the last: its own newest, and two of each of them, which may add one token with proposals and one without."""
    return min(1 + 2 * above, MOST_LAG)


def unroll(
    gammas: Sequence[int], *, lookup: bool, own_kv: Sequence[bool], most: int, runs: Mapping[int, int] | None = None
) -> tuple[Pass, ...]:
    """The round in which each rung below the last is asked for `gammas[r]` tokens at a time, 0: not used.

    `lookup`: rung 0 looks tokens up, and the host has put what it found into the path. `own_kv`: whether a rung has K/V of its own, so
    that it lacks its newest tokens where all of the round before stood. `most`: tokens that the last rung is asked to judge at most.
    `runs`: how often a rung that judges another's proposals is run to reach its gamma; by default as if all stood.
    """
    top = len(gammas)
    used = [rung for rung in range(top) if gammas[rung]]
    most = most if used else 0

    def extend(place: int, first: bool) -> list[Pass]:
        """Passes by which rung used[place] adds its tokens, `first` in the round or again.

        Where all stood, it has yet to run its own newest token and those that the rungs above it have added.
        """
        rung = used[place]
        above = len(used) - 1 - place
        lacks = above if not first else lag(above) if own_kv[rung] else 0
        if lookup and rung == 0:
            return []
        if place == 0:
            return [Pass(rung, 1 + (lacks if i == 0 else 0), False) for i in range(gammas[rung])]
        below = gammas[used[place - 1]]
        if lookup and used[place - 1] == 0:
            return [Pass(rung, 1 + below + lacks, True)]
        passes: list[Pass] = []
        for i in range((runs or {}).get(rung, -(-gammas[rung] // (below + 1)))):
            passes += extend(place - 1, first and i == 0)
            passes.append(Pass(rung, 1 + below + (lacks if i == 0 else 0), True))
        return passes

    lower = extend(len(used) - 1, True) if used else []
    return *lower, Pass(top, 1 + most, bool(used))


class Drafting(Protocol):
    """How far the device is with a lone sequence, to be asked for."""

    def send_drafted(self) -> None:
        """Ask for what `drafted` says, as the passes launched so far leave it."""
        ...

    def drafted(self) -> tuple[int, int]:
        """Tokens drafted, and the rung below which nothing more is proposed, at the last `send_drafted`; waits for that."""
        ...


def left_to_do(program: Sequence[Pass], gammas: Sequence[int], room: int, device: Drafting) -> Iterator[Pass]:
    """A lone sequence's passes, each to be launched before the next is asked for: without runs of the rung below the last that find
    all drafted, which would read its weights for nothing.

    `gammas`: as `unroll`. `room`: tokens that it may draft. The device is asked once all may be drafted, and goes on with the passes of
    the rungs further below while the host waits for the answer.
    """
    used = [rung for rung, gamma in enumerate(gammas) if gamma]
    if len(used) < 2:
        yield from program
        return
    below, upper = used[-2:]
    wanted, most = min(gammas[upper], room), 0
    *lower, last = program
    ends = [number + 1 for number, p in enumerate(lower) if p.rung == upper]
    for start, end in pairwise([0, *ends]):
        *drafts, judge = lower[start:end]
        may_be_over = most >= wanted
        if may_be_over:
            device.send_drafted()
        yield from drafts
        if may_be_over and _is_over(device, wanted, upper):
            break
        yield judge
        most += gammas[below] + 1
    yield last


def _is_over(device: Drafting, wanted: int, rung: int) -> bool:
    """Whether the rung has nothing left to draft, or may not."""
    drafted, stopped = device.drafted()
    return drafted >= wanted or stopped > rung


class Programs:
    """Which passes a round has, by what has stood lately. The same on every rank: that depends on tokens alone."""

    def __init__(self, *, lookup: bool, own_kv: Sequence[bool], lookahead: int) -> None:
        """`lookup`, `own_kv`: as `unroll`. `lookahead`: tokens that a round drafts at most for one sequence."""
        self._lookup, self._own_kv, self._lookahead = lookup, own_kv, lookahead
        self._known: dict[tuple[object, ...], tuple[Pass, ...]] = {}
        self._runs: dict[tuple[tuple[int, ...], int], int] = {}
        """By gammas and rung."""
        self._stood: dict[tuple[int, int], tuple[float, float]] = {}
        """By proposing and judging rung: proposals that stood and proposals that were judged, of a verdict lately."""

    def of(self, gammas: tuple[int, ...], most_asked: int) -> tuple[Pass, ...]:
        """The same whatever room there is, so that the end of a request needs no graphs of its own."""
        used = [rung for rung, gamma in enumerate(gammas) if gamma]
        runs = {rung: self._often(gammas, below, rung) for below, rung in pairwise(used)}
        key = gammas, tuple(runs.items()), most_asked
        found = self._known.get(key)
        while found is None or len(found) > MOST_PASSES:
            if found is not None:  # fewer runs draft less
                often = max(runs, key=lambda rung: runs[rung])
                runs[often] -= 1
            most = min(self._lookahead, most_asked)
            found = unroll(gammas, lookup=self._lookup, own_kv=self._own_kv, most=most, runs=runs)
        self._known[key] = found
        return found

    def note(self, below: int, rung: int, accepted: int, proposed: int) -> None:
        """Of `proposed` >= 1 tokens so many stood. Those behind the first that did not were not judged."""
        stood, judged = self._stood.get((below, rung), (_STANDS, 1.0))
        self._stood[below, rung] = (
            stood + _NEWEST * (accepted - stood),
            judged + _NEWEST * (min(accepted + 1, proposed) - judged),
        )

    def stands(self, below: int, rung: int) -> float:
        """The share of the judged proposals that stood lately: of both sums, as the mean of verdicts' shares is less than a proposal's
        chance."""
        stood, judged = self._stood.get((below, rung), (_STANDS, 1.0))
        return stood / judged

    def _often(self, gammas: tuple[int, ...], below: int, rung: int) -> int:
        """How often the rung is run to reach its gamma."""
        suits = gammas[rung] / expected_tokens(self.stands(below, rung), gammas[below])
        last = self._runs.get((gammas, rung))
        if last is None or abs(suits - last) > _SLACK:
            last = self._runs[gammas, rung] = max(1, round(suits))
        return last
