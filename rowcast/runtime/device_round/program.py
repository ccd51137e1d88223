"""The passes of one round, in order, known before it starts: the recursion of `ladder.climb`, unrolled. Torch-free.

The host does not see how many proposals stood until the round is over, so a rung is run a fixed number of times: as often as it takes
to reach its gamma where as much stands as usually does. Where less does, the round drafts less, where more does, a pass has nothing to
do; the output is the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BATCHES = (1, 2, 4, 8, 16, 32, 64)
"""Sequences of a round, rounded up: each number has graphs of its own. More run in several rounds."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass of a rung over each sequence's next tokens, and the verdict on what the rung below has proposed."""

    rung: int
    tokens: int
    """Most tokens that it runs of a sequence."""
    judges: bool
    """Whether there may be proposals; else it draws the next token only."""


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
        lag = above if not first else above + 1 if own_kv[rung] else 0
        if lookup and rung == 0:
            return []
        if place == 0:
            return [Pass(rung, 1 + (lag if i == 0 else 0), False) for i in range(gammas[rung])]
        below = gammas[used[place - 1]]
        if lookup and used[place - 1] == 0:
            return [Pass(rung, 1 + below + lag, True)]
        passes: list[Pass] = []
        for i in range((runs or {}).get(rung, -(-gammas[rung] // (below + 1)))):
            passes += extend(place - 1, first and i == 0)
            passes.append(Pass(rung, 1 + below + (lag if i == 0 else 0), True))
        return passes

    lower = extend(len(used) - 1, True) if used else []
    return *lower, Pass(top, 1 + most, bool(used))
