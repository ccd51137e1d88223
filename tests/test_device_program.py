"""The passes of a round, unrolled: every rung gets to its gamma, and nothing overflows, whatever stands."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from rowcast.runtime.device_round.graphs import Graphs
from rowcast.runtime.device_round.program import Pass, Programs, lag, left_to_do, unroll


def test_plain_is_one_pass() -> None:
    assert unroll((), lookup=False, own_kv=(), most=0) == (Pass(0, 1, False),)
    assert unroll((0, 0), lookup=False, own_kv=(True, False), most=8) == (Pass(2, 1, False),)


def test_a_draft_runs_what_it_lacks_first() -> None:
    assert unroll((3,), lookup=False, own_kv=(True,), most=3) == (
        Pass(0, 2, False), Pass(0, 1, False), Pass(0, 1, False), Pass(1, 4, True),
    )  # fmt: skip


def test_three_rungs() -> None:
    assert unroll((2, 6), lookup=False, own_kv=(True, False), most=6) == (
        Pass(0, 4, False), Pass(0, 1, False), Pass(1, 3, True),
        Pass(0, 2, False), Pass(0, 1, False), Pass(1, 3, True),
        Pass(2, 7, True),
    )  # fmt: skip


def test_lookups_are_judged_and_take_no_pass() -> None:
    assert unroll((5, 0), lookup=True, own_kv=(False, False), most=5) == (Pass(2, 6, True),)
    assert unroll((5, 7), lookup=True, own_kv=(False, False), most=7) == (Pass(1, 6, True), Pass(2, 8, True))


class Told:
    """A device that is asked. `answers`: tokens drafted, and where it stopped, each time."""

    def __init__(self, *answers: tuple[int, int]) -> None:
        self.answers = list(answers)
        self.events: list[str] = []

    def send_drafted(self) -> None:
        self.events.append("ask")

    def drafted(self) -> tuple[int, int]:
        self.events.append("wait")
        return self.answers.pop(0)

    def plays(self, gammas: tuple[int, ...], room: int, runs: int, *, own_kv: bool = True, lookup: bool = False) -> str:
        """What happens: passes by their rung, and questions."""
        rungs = [own_kv] * len(gammas)
        for p in left_to_do(unroll(gammas, lookup=lookup, own_kv=rungs, most=9, runs={1: runs, 2: runs}), gammas, room, self):
            self.events.append(str(p.rung))
        return " ".join(self.events)


@pytest.mark.parametrize(
    ("drafted", "stopped", "plays"),
    [
        (6, 0, "0 0 1 0 0 1 ask 0 0 wait 2"),  # all that was asked for
        (5, 0, "0 0 1 0 0 1 ask 0 0 wait 1 2"),
        (3, 2, "0 0 1 0 0 1 ask 0 0 wait 2"),  # no number was drawn
        (3, 1, "0 0 1 0 0 1 ask 0 0 wait 1 2"),  # by the rung further below, which is run again after the verdict
    ],
)
def test_a_run_is_left_out_where_all_is_drafted(drafted: int, stopped: int, plays: str) -> None:
    assert Told((drafted, stopped)).plays((2, 6), 9, runs=3) == plays


def test_the_device_is_asked_only_once_all_may_be_drafted() -> None:
    """By two runs at most 6 tokens, whatever else their passes have to catch up with."""
    assert Told().plays((2, 7), 9, runs=3) == "0 0 1 0 0 1 0 0 1 2"
    assert Told((5, 0), (6, 0), (7, 0)).plays((2, 6), 9, runs=5) == "0 0 1 0 0 1 ask 0 0 wait 1 ask 0 0 wait 2"
    assert Told((3, 0)).plays((2, 6), 3, runs=3) == "0 0 1 ask 0 0 wait 2"  # room for 3


def test_the_device_is_not_asked_where_nothing_is_left_out() -> None:
    assert Told().plays((2, 6), 9, runs=2) == "0 0 1 0 0 1 2"
    assert Told().plays((6,), 3, runs=1) == "0 0 0 0 0 0 1"
    assert Told().plays((0, 3), 9, runs=1) == "1 1 1 2"
    assert Told().plays((4, 3), 9, runs=3, lookup=True) == "1 2"
    assert Told().plays((0, 0), 9, runs=1) == "2"


def test_only_the_rung_below_the_last_is_left_out() -> None:
    assert Told((8, 0)).plays((1, 3, 8), 9, runs=3) == " ".join(
        ["0 1"] * 3 + ["2"] + ["0 1"] * 3 + ["2 ask"] + ["0 1"] * 3 + ["wait 3"]
    )


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
            above = sum(rung < other < rungs for other in range(rungs) if gammas[other])
            if have[rung] < -lag(above):
                have[rung] = 0
        have[rungs] = 0


@pytest.mark.parametrize("seed", range(8))
def test_a_draft_never_has_to_catch_up(seed: int) -> None:
    """Below a rung that may have to add a token without proposals, as the room is used up: whatever stands, its next first pass runs
    what it lacks."""
    rng = random.Random(seed)
    gammas, lacks, most = (2, 6), 0, 0
    for _ in range(200):
        drafted, held, judged = (
            0,
            -lacks,
            0,
        )  # tokens drafted, those that the draft holds, and those that the middle rung has judged
        while judged < gammas[1]:
            proposed = min(gammas[0], gammas[1] - judged - 1)
            if proposed:
                held = judged + proposed
            stood = sum(1 for _ in iter(lambda: rng.random() < 0.7, False)) if proposed else 0
            drafted = judged = judged + min(stood, proposed) + 1
            held = min(held, drafted)
        stood = rng.choice([rng.randint(0, drafted), drafted])
        # The newest token is the last rung's own; of what the draft ran, it holds all before its own newest proposal.
        lacks = max(0, stood + 1 - held)
        most = max(most, lacks)
    assert most <= lag(1)
    assert most > 2  # what two tokens a rung would do for
    assert unroll(gammas, lookup=False, own_kv=(True, False), most=6)[0] == Pass(0, 1 + lag(1), False)


@pytest.mark.parametrize(("gamma", "runs"), [(6, 3), (10, 5)])
def test_how_often_a_rung_runs_follows_what_stands_and_does_not_waver(gamma: int, runs: int) -> None:
    """Of proposals of two that stand with .6 each, a verifier gains 1.96 tokens a pass: three passes reach six, five ten. The mean of
    verdicts' shares would be .48, and passes three or four in turn."""
    rng = random.Random(2)
    programs = Programs(lookup=False, own_kv=(True, False), lookahead=gamma)
    lengths = []
    for _ in range(400):
        lengths.append(len(programs.of((2, gamma), gamma)))
        for _ in range(3):
            accepted = next((i for i in range(2) if rng.random() > 0.6), 2)
            programs.note(0, 1, accepted, 2)
    assert set(lengths) == {runs * 3 + 1}
    for _ in range(200):  # hardly anything stands: as many as there are tokens
        programs.note(0, 1, 0, 2)
    assert len(programs.of((2, gamma), gamma)) == gamma * 3 + 1


def test_calls_are_made_once_then_captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    class Graph:
        def replay(self) -> None:
            made.append("replay")

    def record(self: Graphs, calls: Callable[[], object]) -> Graph:
        made.append("capture")
        return Graph()

    monkeypatch.setattr(Graphs, "_record", record)
    graphs = Graphs(capture=True)
    told: list[float] = []
    graphs.on_capture = told.append
    for _ in range(3):
        graphs.run("pass", lambda: made.append("call"))
    assert made == ["call", "capture", "replay", "replay"]
    assert len(told) == 1 and told[0] >= 0
    assert (graphs.captured, graphs.first_calls) == (1, 1)
    graphs.clear()
    graphs.run("pass", lambda: made.append("call"))
    assert (made[-1], graphs.captured, graphs.first_calls) == ("call", 1, 2)


def test_without_capture_calls_are_made_one_by_one() -> None:
    made: list[int] = []
    graphs = Graphs(capture=False)
    for i in range(3):
        graphs.run("pass", lambda i=i: made.append(i))  # type: ignore[misc]
    assert made == [0, 1, 2]
    assert (graphs.captured, graphs.first_calls) == (0, 1)


def test_the_graph_that_nobody_asked_for_longest_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rowcast.runtime.device_round.graphs.MOST_GRAPHS", 2)
    made: list[str] = []
    graphs = Graphs(capture=False)
    for key in ("a", "b", "a", "c", "a", "b"):
        graphs.run(key, lambda: made.append(""))
    assert graphs.first_calls == 4  # b was gone when it came again
