"""Control against a simulated clock and coin-flip acceptances: near the best fixed gammas where they pay, near plain elsewhere."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from rowcast.runtime.ladder.climb import Outcome, Pass
from rowcast.runtime.ladder.control import Controller
from rowcast.runtime.ladder.costs import Acceptance, PassTimes, expected_passes, expected_tokens
from rowcast.runtime.ladder.ngram import NgramLookup
from rowcast.runtime.ladder.path import Path
from rowcast.runtime.ladder.spec import Ladder

Gammas = tuple[int, ...]


@dataclass
class World:
    """Rungs that take known times and accept by coin flips. Seconds are arbitrary."""

    seconds: list[float]
    """Of a pass of one token, by rung; 0 for a lookup."""
    accept: Callable[[int, int, int, int], float]
    """(group, proposer, verifier, tokens out) -> probability."""
    slope: float = 0.05
    """What a token more adds to a pass, as a share of it."""
    noise: float = 0.0
    cold: float = 1.0
    """Times that a rung's first pass takes as long."""
    bulk: float = 0.002
    """What a token costs among many, as a share of a pass of one."""
    seed: int = 0
    prompt: int = 100
    clock: float = 0.0
    passes: list[Pass] = field(default_factory=list)
    outcomes: list[tuple[int, Outcome]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.warm: set[int] = set()
        self.held: dict[tuple[int, int], int] = {}

    def run_pass(self, rung: int, tokens: int, sequences: int) -> None:
        taken = self.seconds[rung] * (
            1 + self.slope * (min(tokens, 32 * sequences) - 1) + self.bulk * max(0, tokens - 32 * sequences)
        )
        taken *= max(0.1, self.random.gauss(1, self.noise)) * (1 if rung in self.warm else self.cold)
        self.warm.add(rung)
        self.clock += taken
        self.passes.append(Pass(rung, tokens, sequences, taken))

    def below(self, gammas: Gammas, rung: int) -> int | None:
        return next((r for r in reversed(range(rung)) if gammas[r]), None)

    def flips(self, group: int, proposer: int, verifier: int, proposed: int, out: int) -> int:
        accepted = 0
        while accepted < proposed and self.random.random() < self.accept(group, proposer, verifier, out):
            accepted += 1
        if proposed:
            self.outcomes.append((group, Outcome(group, proposer, verifier, proposed, accepted)))
        return accepted

    def extend(self, group: int, gammas: Gammas, rung: int, count: int, out: int) -> None:
        """One sequence alone; a batch's draft passes are simulated one by one, each for one sequence."""
        if not self.seconds[rung]:
            return
        while count > 0:
            below = self.below(gammas, rung)
            proposed = 0 if below is None else min(gammas[below], count - 1)
            if below is not None and proposed:
                self.extend(group, gammas, below, proposed, out)
            lacks = out - self.held.get((group, rung), 0) if self.prompt > 1000 else 0
            self.held[group, rung] = out
            self.run_pass(rung, proposed + 1 + max(0, lacks - 20), 1)
            count -= 1 + (self.flips(group, below, rung, proposed, out) if below is not None else 0)

    def round(self, choices: dict[int, Gammas], out: dict[int, int]) -> None:
        """One round for all groups, a sequence each."""
        top = len(self.seconds) - 1
        proposed = {}
        for group, gammas in choices.items():
            below = self.below(gammas, top)
            proposed[group] = (below, 0 if below is None else gammas[below])
            if below is not None:
                self.extend(group, gammas, below, gammas[below], self.prompt + out[group])
        self.run_pass(top, sum(count + 1 for _, count in proposed.values()), len(choices))
        for group, (below, count) in proposed.items():
            accepted = 0 if below is None else self.flips(group, below, top, count, out[group])
            out[group] += accepted + 1


def run(world: World, choose: Controller | Gammas, *, tokens: int = 256, groups: int = 1, room: int = 16) -> float:
    """Seconds a token until all groups have `tokens` each."""
    out = dict.fromkeys(range(groups), 0)
    lower = len(world.seconds) - 1
    while any(count < tokens for count in out.values()):
        choices = {}
        for group in out:
            if isinstance(choose, tuple):
                choices[group] = choose
                continue
            path = Path(group, [], world.prompt + out[group], [], world.prompt)
            choices[group] = choose.choose(group, batch=groups, path=path, room=room, left=tokens - out[group], allowed=[True] * lower)
        world.passes.clear()
        world.outcomes.clear()
        world.round(choices, out)
        if isinstance(choose, Controller):
            for ran in world.passes:
                choose.observe_pass(ran)
            for group, outcome in world.outcomes:
                choose.observe_outcome(group, outcome)
    return world.clock / sum(out.values())


class OneMatch(NgramLookup):
    """Always finds a match of the same length."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def match_length(self, path: Path) -> int:
        return self.length


def always(chance: float) -> Callable[[int, int, int, int], float]:
    return lambda group, proposer, verifier, out: chance


@dataclass
class Scene:
    ladder: str
    seconds: list[float]
    accept: Callable[[int, int, int, int], float]
    ratios: list[float] = field(default_factory=lambda: [0.1])
    groups: int = 1
    slope: float = 0.05
    cold: float = 1.0
    prompt: int = 100
    match: int = 3

    def world(self, noise: float, seed: int) -> World:
        return World(self.seconds, self.accept, slope=self.slope, noise=noise, cold=self.cold, seed=seed, prompt=self.prompt)

    def controller(self, *, adaptive: bool = True) -> Controller:
        return Controller(Ladder.parse(self.ladder), adaptive=adaptive, lookup=OneMatch(self.match), cost_ratios=self.ratios)

    def fixed(self, gammas: Gammas, tokens: int = 2000) -> float:
        return run(self.world(0.0, 1), gammas, tokens=tokens, groups=self.groups)

    def plain(self, tokens: int = 256) -> float:
        return self.fixed((0,) * len(self.ratios), tokens)

    def controlled(self, noise: float, *, tokens: int = 256, seeds: int = 6) -> list[float]:
        """Over plain's time, run by run; each starts without knowledge."""
        plain = self.plain(tokens)
        return [
            run(self.world(noise, seed), self.controller(), tokens=tokens, groups=self.groups) / plain for seed in range(seeds)
        ]


DRAFT = "draft:model=m / plain"
TRIFORCE = {(0, 1): 0.6, (1, 2): 0.92, (0, 2): 0.45}

LOSING = {
    "nothing stands": Scene(DRAFT, [0.1, 1.0], always(0.0)),
    "nothing stands, as slow as the target": Scene(DRAFT, [1.0, 1.0], always(0.0)),
    "as slow as the target": Scene(DRAFT, [1.0, 1.0], always(0.5)),
    "seldom stands": Scene(DRAFT, [0.3, 1.0], always(0.3), [0.3], slope=0.2),
    "verifying costs as much as decoding": Scene(DRAFT, [0.1, 1.0], always(0.6), slope=1.0),
    "retrieval that saves nothing": Scene("self:kv=128 / plain", [0.95, 1.0], always(0.93), [0.6], prompt=900),
    "n-grams in prose": Scene("ngram / plain", [0.0, 1.0], always(0.05), [0.0], slope=0.1),
    "n-grams in prose, long matches": Scene("ngram / plain", [0.0, 1.0], always(0.05), [0.0], slope=0.1, match=9),
    "n-grams in prose, cold calls": Scene("ngram / plain", [0.0, 1.0], always(0.05), [0.0], slope=0.1, cold=5.0),
    "everything, nothing stands": Scene(
        "ngram / draft:model=m / self:kv=128 / plain", [0.0, 0.1, 0.6, 1.0], always(0.0), [0.0, 0.1, 0.6], prompt=900
    ),
}

# The best fixed gammas are those that the fastest of all fixed choices has over 4,000 tokens.
PAYING = {
    "draft": (Scene(DRAFT, [0.1, 1.0], always(0.8)), (4,)),
    "draft, verifying costs": (Scene(DRAFT, [0.1, 1.0], always(0.8), slope=0.3), (2,)),
    "poor draft": (Scene(DRAFT, [0.12, 1.0], always(0.48)), (2,)),
    "retrieval": (Scene("self:kv=128 / plain", [0.6, 1.0], always(0.93), [0.6], prompt=900), (2,)),
    "n-grams in a list": (Scene("ngram / plain", [0.0, 1.0], always(0.9), [0.0]), (12,)),
    "three rungs with TriForce's times": (
        Scene(
            "draft:model=m / self:kv=128 / plain",
            [0.45, 14.0, 56.0],
            lambda group, proposer, verifier, out: TRIFORCE[proposer, verifier],
            [0.01, 0.25],
            slope=0.005,
            prompt=900,
        ),
        (6, 12),
    ),
}


@pytest.mark.parametrize("scene", LOSING.values(), ids=LOSING)
def test_where_speculation_loses_control_costs_little(scene: Scene) -> None:
    assert max(scene.controlled(0.0)) <= 1.05
    noisy = scene.controlled(0.2, seeds=12)
    assert sum(noisy) / len(noisy) <= 1.05


@pytest.mark.parametrize(("scene", "gammas"), PAYING.values(), ids=PAYING)
def test_where_speculation_pays_control_comes_near_the_best(scene: Scene, gammas: Gammas) -> None:
    best = scene.fixed(gammas) / scene.plain()
    assert best < 0.85
    for noise in (0.0, 0.2):
        first = scene.controlled(noise)
        later = scene.controlled(noise, tokens=2000, seeds=3)
        assert sum(first) / len(first) <= 1.2 * best
        assert sum(later) / len(later) <= 1.06 * best


def test_it_follows_an_acceptance_that_drifts() -> None:
    scene = Scene(DRAFT, [0.1, 1.0], lambda group, proposer, verifier, out: 0.85 if out % 600 < 300 else 0.0)
    ratios = scene.controlled(0.1, tokens=1800, seeds=3)
    always_on = min(scene.fixed((gamma,)) for gamma in (1, 2, 4)) / scene.plain()
    assert sum(ratios) / 3 < always_on


def test_groups_in_one_batch_get_their_own_gammas() -> None:
    chances = (0.9, 0.5, 0.0)
    scene = Scene(DRAFT, [0.1, 1.0], lambda group, proposer, verifier, out: chances[group], groups=3)
    controller = scene.controller()
    world = scene.world(0.0, 0)
    taken = run(world, controller, tokens=600, groups=3)
    assert taken < 0.85 * scene.plain()
    paths = [Path(group, [], 700, [], 100) for group in range(3)]
    uses = [0, 0, 0]
    for _ in range(20):
        choices = {p.seq_id: controller.choose(p.seq_id, batch=3, path=p, room=16, left=500, allowed=[True]) for p in paths}
        for group, gammas in choices.items():
            uses[group] += gammas[0]
        world.passes.clear()
        world.outcomes.clear()
        world.round(choices, dict.fromkeys(range(3), 0))
        for ran in world.passes:
            controller.observe_pass(ran)
        for group, outcome in world.outcomes:
            controller.observe_outcome(group, outcome)
    assert uses[0] > uses[1] >= uses[2]
    assert uses[2] <= 5


def path(committed: int = 100, prompt_length: int = 90) -> Path:
    return Path(0, [], committed, [], prompt_length)


def test_pinned_rungs_are_left_alone() -> None:
    controller = Controller(Ladder.parse("ngram:gamma=3 / self:kv=512,gamma=5 / plain"), adaptive=False)
    assert controller.choose(0, batch=1, path=path(), room=16, left=500, allowed=[True, True]) == (3, 5)
    assert controller.choose(0, batch=1, path=path(), room=2, left=500, allowed=[True, True]) == (3, 2)
    assert controller.choose(0, batch=1, path=path(), room=2, left=500, allowed=[True, False]) == (2, 0)
    assert controller.choose(0, batch=1, path=path(), room=2, left=500, allowed=[False, False]) == (0, 0)


def test_a_pinned_rung_stays_on_beside_one_that_is_not() -> None:
    scene = Scene("draft:model=m,gamma=2 / self:kv=128 / plain", [0.5, 3.0, 1.0], always(0.0), [0.5, 0.9], prompt=900)
    controller = scene.controller(adaptive=False)
    run(scene.world(0.0, 0), controller)
    assert controller.choose(0, batch=1, path=path(900), room=16, left=500, allowed=[True, True]) == (2, 0)


def test_what_makes_no_sense_is_not_tried() -> None:
    scene = Scene("ngram / self:kv=128 / plain", [0.0, 0.1, 1.0], always(0.9), [0.0, 0.1], match=0, prompt=100)
    controller = scene.controller()
    run(scene.world(0.0, 0), controller, tokens=30)
    # No match, and the retrieval view would show more than half of the context.
    assert controller.choose(0, batch=1, path=path(255), room=16, left=500, allowed=[True, True]) == (0, 0)
    assert controller.choose(0, batch=1, path=path(256), room=16, left=500, allowed=[True, True])[1] > 0


def test_room_bounds_the_uppermost_rung() -> None:
    scene = Scene("ngram / plain", [0.0, 1.0], always(0.95), [0.0], match=9)
    controller = scene.controller()
    run(scene.world(0.0, 0), controller)
    assert controller.choose(0, batch=1, path=path(), room=16, left=500, allowed=[True])[0] > 3
    assert controller.choose(0, batch=1, path=path(), room=3, left=500, allowed=[True]) == (3,)


def test_choosing_costs_microseconds() -> None:
    scene = Scene("ngram / draft:model=m / self:kv=128 / plain", [0.0, 0.1, 0.6, 1.0], always(0.8), [0.0, 0.1, 0.6], prompt=900)
    controller = scene.controller()
    run(scene.world(0.1, 0), controller, tokens=200)
    started = time.perf_counter()
    for _ in range(1000):
        controller.choose(0, batch=1, path=path(1200, 900), room=16, left=500, allowed=[True, True, True])
    assert time.perf_counter() - started < 0.1


def test_times_between_and_beyond_what_was_measured() -> None:
    times = PassTimes()

    def add(tokens: int, seconds: float) -> None:
        times.add(tokens, 1, 100, seconds, 0)

    assert times.seconds(1, 100) is None
    add(1, 50.0)
    assert times.seconds(1, 100) is None  # perhaps a cold call
    add(1, 1.0)
    assert times.seconds(1, 100) == 1.0
    assert times.seconds(3, 100) == pytest.approx(1.2)  # a guess
    for seconds in (1.8, 1.8):
        add(5, seconds)
    assert times.seconds(3, 100) == pytest.approx(1.4)
    assert times.seconds(9, 100) == pytest.approx(2.6)
    add(500, 100.0)
    assert times.seconds(9, 100) == pytest.approx(2.6)
    assert times.bulk_seconds(1000) == 200.0


def test_acceptance_is_the_groups_own_once_it_is_known() -> None:
    acceptance = Acceptance(0.5)
    assert acceptance.chance(0, 0).mean == 0.5
    for now in range(200):
        acceptance.add(0, 4, 4, now)
    assert acceptance.chance(0, 200).mean > 0.95
    fresh = acceptance.chance(1, 200)
    assert fresh.mean > 0.9
    for now in range(200, 230):
        acceptance.add(1, 4, 0, now)
    assert acceptance.chance(1, 230).mean < 0.15
    assert acceptance.chance(0, 230).mean > 0.9
    assert acceptance.chance(1, 600).high > acceptance.chance(1, 230).high


def test_expected_passes_are_those_that_the_rungs_make() -> None:
    chances = {(0, 1): 0.6, (1, 2): 0.9}
    world = World([0.1, 1.0, 3.0], lambda group, proposer, verifier, out: chances[proposer, verifier])
    rounds, out = 4000, {0: 0}
    calls = [0, 0]
    for _ in range(rounds):
        world.passes.clear()
        world.round({0: (2, 6)}, out)
        for ran in world.passes[:-1]:
            calls[ran.rung] += 1
    assert out[0] / rounds == pytest.approx(expected_tokens(0.9, 6), rel=0.02)
    (lower, one), (upper, three) = expected_passes([0.6], [2, 6], 6)
    assert (one, three) == (1, 3)
    assert upper == pytest.approx(calls[1] / rounds, rel=0.02)
    assert lower == pytest.approx(calls[0] / rounds, rel=0.02)
