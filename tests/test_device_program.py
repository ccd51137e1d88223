"""The passes of a round, unrolled: every rung gets to its gamma, and nothing overflows, whatever stands."""

from __future__ import annotations

import random

import pytest

from rowcast.runtime.device_round.program import Pass, unroll


def test_plain_is_one_pass() -> None:
    assert unroll((), lookup=False, own_kv=(), most=0) == (Pass(0, 1, False),)
    assert unroll((0, 0), lookup=False, own_kv=(True, False), most=8) == (Pass(2, 1, False),)


def test_a_draft_runs_what_it_lacks_first() -> None:
    assert unroll((3,), lookup=False, own_kv=(True,), most=3) == (
        Pass(0, 2, False), Pass(0, 1, False), Pass(0, 1, False), Pass(1, 4, True),
    )  # fmt: skip


def test_three_rungs() -> None:
    assert unroll((2, 6), lookup=False, own_kv=(True, False), most=6) == (
        Pass(0, 3, False), Pass(0, 1, False), Pass(1, 3, True),
        Pass(0, 2, False), Pass(0, 1, False), Pass(1, 3, True),
        Pass(2, 7, True),
    )  # fmt: skip


def test_lookups_are_judged_and_take_no_pass() -> None:
    assert unroll((5, 0), lookup=True, own_kv=(False, False), most=5) == (Pass(2, 6, True),)
    assert unroll((5, 7), lookup=True, own_kv=(False, False), most=7) == (Pass(1, 6, True), Pass(2, 8, True))


@pytest.mark.parametrize("seed", range(40))
def test_no_pass_is_too_short(seed: int) -> None:
    """Random ladders, round after round, with room that is short and proposals that stand at random, often all of them: a pass holds
    all tokens that its rung lacks, and what a rung lacks after a round is no more than its next first pass takes."""
    rng = random.Random(seed)
    rungs = rng.randint(1, 3)
    own_kv = [rng.random() < 0.5 for _ in range(rungs)]
    gammas = [rng.choice([0, 1, 2, 3, 6]) for _ in range(rungs)]
    asked = next((gamma for gamma in reversed(gammas) if gamma), 0)
    have = [0] * (rungs + 1)
    for _ in range(50):
        room = rng.randint(0, 9)
        runs = {rung: rng.randint(1, 3) for rung in range(rungs)}
        passes = unroll(gammas if room else [0] * rungs, lookup=False, own_kv=own_kv, most=min(room, asked), runs=runs)
        used = sorted({p.rung for p in passes})
        judged_from, drafted = [1] * (rungs + 1), 0
        most = passes[-1].tokens - 1
        assert most <= room
        for p in passes:
            above = sum(rung > p.rung for rung in used)
            limit = most - (above - 1) if above else 1 << 30
            if drafted >= limit:
                continue
            ran = drafted + 1 - have[p.rung]
            assert 1 <= ran <= p.tokens
            proposed = drafted + 1 - judged_from[p.rung] if p.judges else 0
            stands = proposed if rng.random() < 0.7 else rng.randint(0, proposed)
            drafted = drafted - proposed + stands + 1
            assert p.rung == rungs or drafted <= most
            for rung in range(p.rung):
                have[rung] = min(have[rung], drafted)
            have[p.rung] = drafted
            judged_from[: p.rung + 1] = [drafted + 1] * (p.rung + 1)
        for rung in range(rungs):
            # A rung that was left out, or was cut short by the room, is filled up by the host.
            have[rung] = min(0, have[rung] - drafted) if own_kv[rung] else 0
            if have[rung] < -sum(rung <= other < rungs for other in range(rungs) if gammas[other]):
                have[rung] = 0
        have[rungs] = 0
