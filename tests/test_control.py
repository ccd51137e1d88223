"""Control against a simulated clock and coin-flip acceptances: near the best fixed gammas where they pay, near plain elsewhere."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Sequence
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
    catches_up: bool = False
    """Whether a draft has to run the prompt before its first token."""
    context: float = 0.0
    """What a token of context adds to a pass of the last rung, as a share of it."""
    neighbour: float = 1.0
    """Times that everything takes as long."""
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
        if rung == len(self.seconds) - 1:
            taken *= 1 + self.context * self.prompt
        taken *= self.neighbour * max(0.1, self.random.gauss(1, self.noise)) * (1 if rung in self.warm else self.cold)
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
            lacks = out - self.held.get((group, rung), 0) if self.catches_up else 0
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


def play(
    world: World, choose: Controller | Gammas, choices: dict[int, Gammas], out: dict[int, int], *, mixed: bool = False
) -> None:
    """One round, and what control is told of it; `mixed`: others prefill in it."""
    world.passes.clear()
    world.outcomes.clear()
    world.round(choices, out)
    if isinstance(choose, Controller):
        for ran in world.passes[:-1] if mixed else world.passes:
            choose.observe_pass(ran)
        for group, outcome in world.outcomes:
            choose.observe_outcome(group, outcome)


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
            choices[group] = choose.choose(
                group, batch=groups, path=path, room=room, left=tokens - out[group], allowed=[True] * lower
            )
        play(world, choose, choices, out)
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


@dataclass
class Phase:
    """Requests one after another."""

    count: int
    prompt: int
    tokens: int
    accept: float
    neighbour: float = 1.0


def serve(world: World, controller: Controller, phases: Sequence[Phase]) -> list[float]:
    """Time over plain's, by phase."""
    found = []
    ids, top = itertools.count(1000), len(world.seconds) - 1
    for phase in phases:
        world.prompt, world.neighbour, world.accept = phase.prompt, phase.neighbour, always(phase.accept)
        started = world.clock
        for group in itertools.islice(ids, phase.count):
            out = {group: 0}
            while (left := phase.tokens - out[group]) > 0:
                committed = phase.prompt + out[group]
                path = Path(group, [], committed, [], phase.prompt)
                gammas: Gammas = (0,) * top
                if left > 1:
                    room = min(16, left - 1)
                    gammas = controller.choose(group, batch=1, path=path, room=room, left=left, allowed=[True] * top)
                play(world, controller, {group: gammas}, out)
        plain = world.seconds[-1] * (1 + world.context * phase.prompt) * phase.neighbour
        found.append((world.clock - started) / (phase.count * phase.tokens * plain))
    return found


SHORT_PROSE, SHORT_LISTS = Phase(8, 100, 256, 0.02), Phase(4, 100, 256, 0.9)
LONG_PROSE, LONG_LISTS = Phase(4, 8000, 256, 0.02), Phase(4, 8000, 256, 0.9)

LOSING_LAST = {
    "prose after long lists": (LOSING["n-grams in prose"], [LONG_LISTS, SHORT_PROSE]),
    "prose after long lists and long prose": (LOSING["n-grams in prose"], [LONG_LISTS, LONG_PROSE, SHORT_PROSE]),
    "long prose after short lists": (LOSING["n-grams in prose"], [SHORT_LISTS, LONG_PROSE]),
    "a neighbour leaves": (LOSING["n-grams in prose"], [Phase(4, 100, 256, 0.9, 3.0), SHORT_PROSE]),
    "a small neighbour leaves": (LOSING["n-grams in prose"], [Phase(4, 100, 256, 0.9, 1.2), SHORT_PROSE]),
    "a neighbour comes": (LOSING["seldom stands"], [Phase(4, 100, 256, 0.3), Phase(4, 100, 256, 0.3, 3.0)]),
    "a neighbour has come and gone": (
        LOSING["n-grams in prose"],
        [SHORT_LISTS, Phase(2, 100, 256, 0.02), Phase(1, 100, 64, 0.02, 3.0), SHORT_PROSE],
    ),
    "eight tokens after a long prompt": (LOSING["nothing stands"], [Phase(5, 100, 200, 0.8), Phase(60, 700, 8, 0.8)]),
    "sixteen tokens after a longer prompt": (LOSING["nothing stands"], [Phase(5, 100, 200, 0.8), Phase(60, 4000, 16, 0.5)]),
}


@pytest.mark.parametrize(("scene", "phases"), LOSING_LAST.values(), ids=LOSING_LAST)
def test_what_was_measured_elsewhere_is_not_believed_for_long(scene: Scene, phases: list[Phase]) -> None:
    def last(noise: float, seed: int) -> float:
        world = scene.world(noise, seed)
        world.catches_up, world.context, world.bulk = True, 0.0002, 0.02
        return serve(world, scene.controller(), phases)[-1]

    assert last(0.0, 0) <= 1.05
    noisy = [last(0.2, seed) for seed in range(4)]
    assert sum(noisy) / len(noisy) <= 1.05


def test_a_draft_catches_up_where_enough_tokens_are_left() -> None:
    world = World([0.1, 1.0], always(0.8), bulk=0.02, catches_up=True)
    controller = PAYING["draft"][0].controller()
    short, long = serve(world, controller, [Phase(5, 200, 200, 0.8), Phase(20, 700, 256, 0.8)])
    assert short < 0.6
    assert long < 0.6


def test_a_slower_machine_still_speculates_where_it_pays() -> None:
    world = World([0.1, 1.0], always(0.8))
    phases = [Phase(3, 100, 256, 0.8), Phase(3, 100, 256, 0.8, 3.0), Phase(3, 100, 256, 0.8)]
    assert max(serve(world, PAYING["draft"][0].controller(), phases)) < 0.6


def test_proposals_in_rounds_with_a_prefill_are_paid_for() -> None:
    scene = PAYING["draft"][0]
    controller, world = scene.controller(), scene.world(0.0, 0)
    serve(world, controller, [Phase(2, 100, 256, 0.8)])
    world.accept = always(0.0)
    started, rounds, drafting = world.clock, 300, 0.0
    for n in range(rounds):
        group, count = 50 + n // 50, n % 50
        path = Path(group, [], 100 + count, [], 100)
        gammas = controller.choose(group, batch=1, path=path, room=16, left=500, allowed=[True])
        play(world, controller, {group: gammas}, {group: count}, mixed=True)
        drafting += sum(ran.seconds for ran in world.passes[:-1])
    assert 0 < drafting < 0.03 * rounds
    assert world.clock - started < 1.05 * rounds


def test_preempted_kv_has_to_be_caught_up_again() -> None:
    world = World([0.1, 1.0], always(0.8), bulk=0.02, catches_up=True)
    controller = PAYING["draft"][0].controller()
    serve(world, controller, [Phase(5, 200, 200, 0.8), Phase(2, 700, 256, 0.8)])

    def gammas() -> Gammas:
        path = Path(1006, [], 956, [], 700)  # the last one served
        return controller.choose(1006, batch=1, path=path, room=2, left=3, allowed=[True])

    assert gammas()[0] > 0
    controller.forget_kv(1006)
    assert gammas() == (0,)


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
        play(world, controller, choices, dict.fromkeys(range(3), 0))
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


def test_choosing_for_64_sequences_costs_little() -> None:
    """At most three times what adding up 30,000 numbers takes, beside it; about as much where nothing else runs."""
    scene = Scene("ngram / draft:model=m / self:kv=128 / plain", [0.0, 0.1, 0.6, 1.0], always(0.6), [0.0, 0.1, 0.6], prompt=900)
    controller, world = scene.controller(), scene.world(0.1, 0)
    out, spent, beside = dict.fromkeys(range(64), 0), 0.0, 0.0
    for _ in range(60):
        started = time.process_time()
        sum(map(abs, range(30_000)))
        beside += time.process_time() - started
        started = time.process_time()
        choices = {
            group: controller.choose(
                group, batch=64, path=Path(group, [], 900 + count, [], 900), room=16, left=500, allowed=[True] * 3
            )
            for group, count in out.items()
        }
        spent += time.process_time() - started
        play(world, controller, choices, out)
    assert spent < 3 * beside


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
