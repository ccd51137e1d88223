"""Rounds on the device against the climb: scripted draws, random histories; the kernels against the plain Python that defines them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rowcast.kernels import rounds
from rowcast.kernels.gpu import rounds as kernels
from rowcast.kernels.rounds import FAILED, HISTORY, LAGGING, Pass, Round
from rowcast.runtime.ladder.climb import Climb, Climber
from rowcast.runtime.ladder.coupled import leading
from rowcast.runtime.ladder.path import Path
from rowcast.runtime.ladder.rule import Verdict
from rowcast.runtime.protocols import Reads
from rowcast.runtime.step import RungCounts

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK, TRASH = 4, 999_999


class Script:
    """Draws as a function of (rung, sequence, tokens so far): lower rungs draw what the last one would with their own probability."""

    def __init__(self, agrees: Sequence[float], nan: float = 0.0) -> None:
        self.agrees, self.nan = agrees, nan

    def draw(self, rung: int, seq: int, tokens: Sequence[int]) -> int:
        truth = random.Random(f"{seq} {list(tokens)}").randrange(1000)
        own = random.Random(f"{rung} {seq} {list(tokens)}")
        if rung == len(self.agrees):
            return truth
        if own.random() < self.nan:
            return -1
        return truth if own.random() < self.agrees[rung] else own.randrange(1000)


class Scripted:
    """A runner that counts K/V, and the coupled rule by the script."""

    def __init__(self, rung: int, script: Script) -> None:
        self.name, self.rung, self.script, self.ends = f"rung {rung}", rung, script, {}  # type: ignore[var-annotated]

    def forward(self, paths: Sequence[Path], wanted: Sequence[int]) -> Any:
        self.ends.update({path.seq_id: len(path.ids) for path in paths})
        zeros = [0] * len(paths)
        return SimpleNamespace(
            hidden=torch.zeros(sum(wanted), 1), tokens=wanted, generated=wanted, wanted=wanted, refreshes=zeros, kv_bytes=zeros
        )

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden

    def reads(self) -> Reads:
        return Reads()

    def truncate(self, seq_id: int, length: int) -> None:
        self.ends[seq_id] = min(self.ends.get(seq_id, 0), length)


class Rule:
    def __init__(self, script: Script, paths: dict[int, Path]) -> None:
        self.script, self.paths = script, paths

    def verify(self, rung: int, proposals: Sequence[Any], logits: Tensor) -> list[Verdict]:
        found = []
        for proposal in proposals:
            path = self.paths[proposal.seq_id]
            before = [*path.ids[: path.committed], *proposal.drafted]
            own = [
                self.script.draw(rung, proposal.seq_id, [*before, *proposal.tokens[:n]]) for n in range(len(proposal.tokens) + 1)
            ]
            accepted = leading(theirs == ours for theirs, ours in zip(proposal.tokens, own, strict=False))
            found.append(Verdict(accepted, own[accepted], []))
        return found


def climb_round(
    script: Script, runners: list[Scripted], paths: dict[int, Path], gammas: list[list[int]], rooms: list[int]
) -> list[Any]:
    """One round as the climb does it; extends the paths and gives what became of the proposals."""
    climbers = [Climber(path, gammas[seq]) for seq, path in paths.items()]
    for climber in climbers:
        climber.counts.update({r.name: RungCounts() for r in runners})
    climb = Climb(runners[:-1], Rule(script, paths), logit_rows=1000)  # type: ignore[arg-type]
    last = len(runners) - 1
    proposals = climb.propose(last, climbers, rooms)
    ran = runners[-1].forward([c.path for c in climbers], [len(p.tokens) + 1 for p in proposals])
    list(climb.verify(last, climbers, proposals, runners[-1], ran.hidden))  # type: ignore[arg-type]
    for path in paths.values():
        runners[-1].truncate(path.seq_id, len(path.ids) - 1)
        path.committed = len(path.ids)
    return climb.outcomes


def copy_of(state: Any, device: torch.device) -> Any:
    moved = {f.name: getattr(state, f.name) for f in fields(state)}
    return type(state)(**{name: t.to(device, copy=True) if isinstance(t, Tensor) else t for name, t in moved.items()})


def assert_same(mine: Any, theirs: Any) -> None:
    for f in fields(mine):
        a, b = getattr(mine, f.name), getattr(theirs, f.name)
        assert torch.equal(a, b.to(a.device)) if isinstance(a, Tensor) else a == b, f.name


class Machine:
    """Plays rounds on the device, every step by the kernels and by their definition; checks what the passes would run."""

    def __init__(self, script: Script, rungs: int, sequences: int, most: int, passes: list[int], tokens: list[int]) -> None:
        self.script, self.passes = script, passes
        self.state = Round.empty(sequences, rungs, most, len(passes))
        g = torch.Generator().manual_seed(0)
        tables = [torch.randperm(sequences * 64, generator=g, dtype=torch.int32).view(sequences, 64) for _ in range(rungs)]
        offsets = [torch.arange(sequences, dtype=torch.int32) * 3 * r for r in range(rungs)]
        self.steps = [
            Pass.empty(self.state, r, tokens[r], tables[r], BLOCK, TRASH, offsets[r] if r else None) for r in range(rungs)
        ]
        self.kv: list[list[dict[int, int]]] = [[{} for _ in range(sequences)] for _ in range(rungs)]
        self.there, self.steps_there = copy_of(self.state, DEVICE), [copy_of(s, DEVICE) for s in self.steps]

    def enter(self, row: int, tokens: Sequence[int], have: Sequence[int]) -> None:
        """A sequence whose rungs hold K/V of so many tokens before and from the pending one on."""
        recent = tokens[-HISTORY - 1 :]
        self.state.path[row, HISTORY + 1 - len(recent) : HISTORY + 1] = torch.tensor(recent)
        self.state.base[row], self.state.active[row] = len(tokens) - 1, 1
        for r, held in enumerate(have):
            self.state.have[r, row] = held
            self.kv[r][row] = {i: tokens[i] for i in range(len(tokens) - 1 + held)}

    def play(self, texts: dict[int, list[int]], shared: Sequence[int] = ()) -> None:
        """One round; `texts`: committed tokens by row."""
        self.there = copy_of(self.state, DEVICE)
        self.prepare(0)
        for number, rung in enumerate(self.passes):
            drawn = self.run(rung, texts, shared)
            if number == len(self.passes) - 1:
                rounds.commit(self.state, self.steps[rung], drawn, number, shared)
                kernels.commit(self.there, self.steps_there[rung], drawn.to(DEVICE), number, shared)
            elif number % 2:  # the next pass's inputs in the same launch, or in one of their own
                after = self.passes[number + 1]
                rounds.verdict(self.state, self.steps[rung], drawn, number, self.steps[after])
                kernels.verdict(self.there, self.steps_there[rung], drawn.to(DEVICE), number, self.steps_there[after])
                assert_same(self.steps[after], self.steps_there[after])
            else:
                rounds.verdict(self.state, self.steps[rung], drawn, number)
                kernels.verdict(self.there, self.steps_there[rung], drawn.to(DEVICE), number)
                self.prepare(number + 1)
            assert_same(self.state, self.there)

    def prepare(self, number: int) -> None:
        rung = self.passes[number]
        rounds.prepare(self.state, self.steps[rung])
        kernels.prepare(self.there, self.steps_there[rung])
        assert_same(self.steps[rung], self.steps_there[rung])

    def run(self, rung: int, texts: dict[int, list[int]], shared: Sequence[int]) -> Tensor:
        """A pass: checks ids, positions, slots and K/V; the script's draws where they are wanted, nonsense elsewhere."""
        state, step = self.state, self.steps[rung]
        drawn = torch.randint(5000, 6000, step.ids.shape)
        for row in range(len(state.base)):
            offset, count = int(step.offsets[row]), int(step.counts[row])
            start = int(step.starts[row]) - offset
            own = slice(row * step.tokens, (row + 1) * step.tokens)
            drafted = state.path[row, HISTORY + 1 :][: int(state.drafted[row])].tolist()
            tokens = [*texts.get(row, []), *drafted]
            positions = list(range(start, start + count))
            assert step.ids[own].tolist() == tokens[start : start + count] + [0] * (step.tokens - count)
            assert step.positions[own].tolist() == positions + [0] * (step.tokens - count)
            places = [p + offset for p in positions]
            slots = [int(step.tables[row, p // BLOCK]) * BLOCK + p % BLOCK for p in places]
            assert step.slots[own].tolist() == slots + [TRASH] * (step.tokens - count)
            for p in positions:
                self.kv[rung][row][p] = tokens[p]
            if count and rung not in shared:
                assert [self.kv[rung][row][p] for p in range(start + count)] == tokens[: start + count]
            for t in range(count):
                if step.wanted[own][t]:
                    drawn[row * step.tokens + t] = self.script.draw(rung, row, tokens[: start + t + 1])
        return drawn


@pytest.mark.parametrize(
    ("agrees", "gammas", "nan"),
    [
        ([0.7], [[3], [0], [1]], 0.05),
        ([0.6, 0.8], [[2, 4], [0, 3], [2, 0]], 0.0),
        ([0.9, 0.9], [[2, 3], [1, 3], [0, 0]], 0.3),
        ([0.6, 0.7, 0.9], [[1, 2, 3], [1, 0, 3], [0, 2, 2]], 0.05),
    ],
)
def test_rounds_are_the_climbs(agrees: list[float], gammas: list[list[int]], nan: float) -> None:
    script, rungs, chance = Script(agrees, nan), len(agrees) + 1, random.Random(len(gammas[0]))
    highest = [max(g[r] for g in gammas) for r in range(rungs - 1)]
    passes: list[int] = []
    for rung, most in enumerate(highest):  # each token of a rung may need as many of the one below
        passes = [*passes, rung] * most
    passes.append(rungs - 1)
    most = max(highest) + 1
    machine = Machine(script, rungs, 4, most, passes, [*[max(HISTORY, most) + 1] * (rungs - 1), most])
    runners = [Scripted(r, script) for r in range(rungs)]
    paths = {}
    for row in range(3):  # the fourth is padding
        tokens = [chance.randrange(1000) for _ in range(chance.randrange(4, 9))]
        have = [*(-chance.randrange(3) for _ in agrees), 0]
        machine.enter(row, tokens, have)
        paths[row] = Path(row, list(tokens), len(tokens), [], len(tokens))
        for runner, held in zip(runners, have, strict=True):
            runner.ends[row] = len(tokens) - 1 + held
        machine.state.gammas[: rungs - 1, row] = torch.tensor(gammas[row])
    emitted = 0
    for _ in range({2: 4, 3: 2, 4: 1}[rungs]):
        texts = {row: list(path.ids) for row, path in paths.items()}
        rooms = [chance.choice([0, 2, most - 1, most - 1]) for _ in paths]
        machine.state.room[:3] = torch.tensor(rooms)
        machine.play(texts)
        outcomes = climb_round(script, runners, paths, gammas, rooms)
        for row, path in paths.items():
            count, flags, *tokens = machine.state.report[row].tolist()
            assert tokens[:count] == path.ids[len(texts[row]) :]
            assert set(tokens[count:]) <= {-1} and not flags & FAILED
            emitted += count
            theirs = [(o.verifier, o.proposed, o.accepted) for o in outcomes if o.seq_id == row]
            pairs = zip(machine.passes, machine.state.stats[:, row].tolist(), strict=True)
            assert [(rung, proposed, accepted) for rung, (accepted, proposed, _) in pairs if proposed] == theirs
            for rung, runner in enumerate(runners):
                held = int(machine.state.have[rung, row])
                assert held == runner.ends[row] - (len(path.ids) - 1)
                if held <= -HISTORY:  # someone has to fill it
                    assert flags & LAGGING or rung == rungs - 1 or not gammas[row][rung]
                    machine.state.have[rung, row], runner.ends[row] = 0, len(path.ids) - 1
                    machine.kv[rung][row] = dict(enumerate(path.ids[:-1]))
        assert machine.state.report[3].tolist() == [0, 0] + [-1] * (HISTORY + 1 + most)
    assert emitted > 3


def test_a_rung_that_lags_catches_up_in_several_passes() -> None:
    script = Script([1.0])
    machine = Machine(script, 2, 1, 4, [0, 0, 0, 1], [2, 4])
    machine.state.gammas[0], machine.state.room[0] = 3, 3
    text = list(range(7, 14))
    machine.enter(0, text, [-3, 0])
    machine.play({0: text})
    # Four tokens in two passes of two, of which the second draws; one more in the third.
    assert machine.state.report[0, :2].tolist() == [3, 0] and machine.state.stats[:, 0].tolist() == [
        [0, 0, 2],
        [0, 0, 2],
        [0, 0, 1],
        [2, 2, 3],
    ]


def test_a_rung_too_far_behind_sits_out() -> None:
    machine = Machine(Script([1.0]), 2, 1, 4, [0, 0, 1], [6, 4])
    machine.state.gammas[0], machine.state.room[0] = 3, 3
    text = list(range(7, 14))
    machine.enter(0, text, [-HISTORY, 0])
    machine.play({0: text})
    assert machine.state.report[0, :2].tolist() == [1, LAGGING] and int(machine.state.have[0, 0]) == -HISTORY - 1


def test_views_that_share_the_store_begin_at_the_pending_token() -> None:
    machine = Machine(Script([0.6]), 2, 1, 4, [0, 0, 0, 1], [4, 4])
    machine.state.gammas[0], machine.state.room[0] = 3, 3
    text = list(range(7, 14))
    machine.enter(0, text, [0, 0])
    for _ in range(4):
        machine.play({0: text}, shared=[0])
        count, flags, *tokens = machine.state.report[0].tolist()
        text += tokens[:count]
        assert machine.state.have.flatten().tolist() == [0, 0] and flags == 0 and int(machine.state.base[0]) == len(text) - 1


def test_a_stopped_rung_proposes_again_once_the_one_above_has_judged() -> None:
    class Broken(Script):
        def draw(self, rung: int, seq: int, tokens: Sequence[int]) -> int:
            return -1 if rung == 0 and len(tokens) == 7 else super().draw(rung, seq, tokens)

    machine = Machine(Broken([1.0, 1.0]), 3, 1, 5, [0, 0, 1, 0, 1, 2], [4, 4, 5])
    machine.state.gammas[:2, 0], machine.state.room[0] = torch.tensor([2, 4]), 4
    text = list(range(7, 14))
    machine.enter(0, text, [0, 0, 0])
    machine.play({0: text})
    # The draft fails at once and sits out; the middle rung draws, the draft proposes, both stand, the last rung adds its own.
    assert machine.state.stats[:, 0].tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 1], [0, 0, 1], [1, 1, 2], [3, 3, 4]]
    assert machine.state.report[0, :2].tolist() == [4, 0]


def test_nan_at_the_last_rung_fails_the_sequence_alone() -> None:
    class Broken(Script):
        def draw(self, rung: int, seq: int, tokens: Sequence[int]) -> int:
            return -1 if rung == 1 and seq == 0 and len(tokens) == 9 else super().draw(rung, seq, tokens)

    machine = Machine(Broken([1.0]), 2, 2, 4, [0, 0, 0, 1], [4, 4])
    machine.state.gammas[0], machine.state.room[:] = 3, 3
    texts = {row: list(range(7 + row, 14 + row)) for row in (0, 1)}
    for row, text in texts.items():
        machine.enter(row, text, [0, 0])
    machine.play(texts)
    assert machine.state.report[:, :2].tolist() == [[2, FAILED], [4, 0]]


@pytest.mark.gpu
def test_a_captured_round_replays() -> None:
    """Draws that agree with the path or not by a fixed table of tokens: a round in one graph, its steps in the same order by hand."""
    state = Round.empty(3, 2, 4, 4, DEVICE)
    tables = torch.arange(3 * 64, dtype=torch.int32, device=DEVICE).view(3, 64)
    draft, last = Pass.empty(state, 0, 4, tables, BLOCK, TRASH), Pass.empty(state, 1, 4, tables, BLOCK, TRASH)
    successor = torch.randint(50, (2, 50), device=DEVICE)
    successor[0] = torch.where(torch.rand(50, device=DEVICE) < 0.7, successor[1], successor[0])

    def play() -> None:
        rounds.prepare(state, draft)
        for number in range(3):
            then = draft if number < 2 else last
            rounds.verdict(state, draft, successor[0][draft.ids], number, then)
        rounds.commit(state, last, successor[1][last.ids], 3)

    play()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        play()
    state.active[:2], state.room[:], state.gammas[0] = 1, 3, 3
    state.base[:2] = 9
    text = [[5], [6]]
    state.path[:2, HISTORY] = torch.tensor([5, 6])
    for _ in range(8):
        graph.replay()
        for row in range(2):
            count, flags, *tokens = (int(value) for value in state.report[row])
            assert flags == 0 and 1 <= count <= 4
            for token in tokens[:count]:
                assert token == int(successor[1, text[row][-1]])
                text[row].append(token)
    assert state.base.tolist() == [8 + len(text[0]), 8 + len(text[1]), 0]
