"""The two rules through the real climb, exactly: every branch of chance walked, or every draw compared with plain decoding's."""

from __future__ import annotations

import contextlib
import gc
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
from tables import Parrot, Rounds, constant_table, fresh_ids, joint_law, random_table, total_variation
from torch import Tensor

from rowcast.runtime.ladder.coupled import Coupled
from rowcast.runtime.ladder.maximal import Dice, Maximal, residual
from rowcast.runtime.ladder.rule import Proposal, Rule, Verdict
from rowcast.runtime.ladder.simulated import Simulated
from rowcast.runtime.params import SamplingParams
from rowcast.runtime.sampler import Row, Sampler
from rowcast.runtime.sharded_logits import Logits

V = 3


def make_rungs(vocab_size: int = V) -> list[Any]:
    """Lookup, draft, middle, last. Gammas of 0 leave rungs out, so these are ladders of any depth."""
    last = random_table("last", 1, vocab_size)
    middle = random_table("middle", 2, vocab_size, like=last, spread=0.7)
    draft = random_table("draft", 3, vocab_size, like=middle)
    return [Parrot(vocab_size), draft, middle, last]


RUNGS = make_rungs()


@pytest.fixture(autouse=True)
def _no_garbage_collection() -> Iterator[None]:
    """There are no cycles here, and half of the time would go by in looking for some."""
    gc.disable()
    yield
    gc.enable()


@dataclass
class Branch:
    """One way that chance may go: the choices made so far, then the first of each, the others noted."""

    case: int
    script: list[int]
    taken: int = 0
    weight: float = 1.0
    forks: list[list[int]] = field(default_factory=list)

    def choose(self, weights: Sequence[float]) -> int:
        if self.taken == len(self.script):
            first, *others = [i for i, weight in enumerate(weights) if weight > 0]
            self.forks += [[*self.script, other] for other in others]
            self.script.append(first)
        choice = self.script[self.taken]
        self.taken += 1
        self.weight *= weights[choice]
        return choice


class ScriptedDice:
    """Implements `Dice`: each sequence goes the way of its branch. What comes after a rejection has no say."""

    def __init__(self, branches: dict[int, Branch]) -> None:
        self._branches = branches

    def accept(self, rung: int, rows: Sequence[Row], rounds: Sequence[int], p: Tensor, q: Tensor) -> Tensor:
        stands: dict[int, bool] = {}
        found = []
        for row, ratio in zip(rows, (p / q).clamp(max=1).tolist(), strict=True):
            if stands.get(row.seq_id, True):
                stands[row.seq_id] = self._branches[row.seq_id].choose([ratio, 1 - ratio]) == 0
            found.append(stands[row.seq_id])
        return torch.tensor(found)

    def draw(self, rung: int, rows: Sequence[Row], rounds: Sequence[int], law: Tensor) -> Tensor:
        weights = law.double().softmax(-1).tolist()
        return torch.tensor([self._branches[row.seq_id].choose(w) for row, w in zip(rows, weights, strict=True)])


Outcomes = dict[tuple[int, ...], float]
MakeRule = Callable[[Sampler, Dice], Rule]


def outcomes(
    cases: Sequence[tuple[Sequence[int], tuple[int, ...]]],
    *,
    params: SamplingParams,
    rungs: Sequence[Any] = RUNGS,
    proposer: int | None = None,
    make_rule: MakeRule = Maximal,
) -> list[Outcomes]:
    """For each (gammas, output so far): what one round may add, and its probability. `proposer`: what that rung may propose."""
    found: list[Outcomes] = [defaultdict(float) for _ in cases]
    waiting = [Branch(i, []) for i in range(len(cases))]
    while waiting:
        batch, waiting = waiting[:4000], waiting[4000:]
        branches = {next(fresh_ids): branch for branch in batch}
        sampler = Sampler(V)
        ladder = Rounds(rungs, make_rule(sampler, ScriptedDice(branches)), sampler)
        climbers = [ladder.add(i, params, cases[b.case][0], output=cases[b.case][1]) for i, b in branches.items()]
        if proposer is None:
            ladder.round(climbers)
        else:
            ladder.propose(climbers, proposer + 1)
        for climber, branch in zip(climbers, batch, strict=True):
            added = climber.path.ids[climber.path.prompt_length + len(cases[branch.case][1]) :]
            found[branch.case][tuple(added)] += branch.weight
            waiting += [Branch(branch.case, script) for script in branch.forks]
    return found


def output_laws(ladders: Sequence[Sequence[int]], tokens: int, **keywords: Any) -> list[Outcomes]:
    """For each ladder (gammas): the joint law of the first `tokens` of its output, over all rounds that they take."""
    laws: list[Outcomes] = [defaultdict(float, {(): 1.0}) for _ in ladders]
    for length in range(tokens):
        # All ways to this length are complete: a round adds at least one token.
        at = [(i, output) for i, law in enumerate(laws) for output in list(law) if len(output) == length]
        for (i, output), added in zip(at, outcomes([(ladders[i], output) for i, output in at], **keywords), strict=True):
            before = laws[i].pop(output)
            for more, weight in added.items():
                laws[i][(output + more)[:tokens]] += before * weight
    return laws


SHALLOW = {
    "plain": (0, 0, 0),
    "two rungs, gamma 1": (0, 0, 1),
    "two rungs, gamma 3": (0, 0, 3),
    "two rungs, the draft": (0, 2, 0),
    "three rungs, 1 and 1": (0, 1, 1),
    "lookup": (3, 0, 0),
}
DEEP = {
    "three rungs, 3 and 1": (0, 3, 1),
    "three rungs, 1 and 3": (0, 1, 3),
    "three rungs, 2 and 3": (0, 2, 3),
    "lookup under a model": (2, 0, 3),
    "four rungs": (1, 2, 2),
}
LADDERS = SHALLOW | DEEP
PARAMS = {
    "plain": SamplingParams(),
    "penalised, truncated": SamplingParams(temperature=0.7, frequency_penalty=0.6, repetition_penalty=1.3, top_k=2),
    "greedy": SamplingParams(temperature=0),
}


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
@pytest.mark.parametrize(("ladders", "tokens"), [(SHALLOW, 4), (DEEP, 3)], ids=["shallow", "deep"])
def test_maximal_has_exactly_the_last_rungs_joint_law(
    params: SamplingParams, ladders: dict[str, tuple[int, ...]], tokens: int
) -> None:
    """In one ragged batch, over as many rounds as the tokens take."""
    expected = joint_law(RUNGS[-1], params, V, tokens)
    for name, law in zip(ladders, output_laws(list(ladders.values()), tokens, params=params), strict=True):
        assert sum(law.values()) == pytest.approx(1, abs=1e-12), name
        assert set(law) == set(expected), name
        assert max(abs(law[key] - expected[key]) for key in expected) < 1e-12, name


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_every_rung_proposes_by_its_own_joint_law(params: SamplingParams) -> None:
    for rung, ladders in {1: [(0, 3, 0), (2, 3, 0)], 2: [(0, 0, 3), (0, 2, 3), (3, 0, 3), (1, 1, 3)]}.items():
        expected = joint_law(RUNGS[rung], params, V, 3)
        for law in outcomes([(gammas, ()) for gammas in ladders], params=params, proposer=rung):
            assert set(law) == set(expected)
            assert max(abs(law[key] - expected[key]) for key in expected) < 1e-12


class PublishedBug(Maximal):
    """At the middle rung a rejected token is replaced from the verifier's law instead of the residual."""

    def verify(self, rung: int, proposals: Sequence[Proposal], logits: Logits) -> list[Verdict]:
        inner = mock.patch("rowcast.runtime.ladder.maximal.residual", lambda p, q: p) if rung == 2 else contextlib.nullcontext()
        with inner:
            return super().verify(rung, proposals, logits)


def test_enumeration_catches_a_missing_residual_of_the_inner_level() -> None:
    """The last rung rejects by the law that the middle one should have, so the error reaches the output."""
    params = SamplingParams()
    (law,) = outcomes([((0, 2, 3), ())], params=params, proposer=2, make_rule=PublishedBug)
    assert total_variation(law, joint_law(RUNGS[2], params, V, 3)) > 0.05
    two, three = output_laws([(0, 0, 3), (0, 2, 3)], 2, params=params, make_rule=PublishedBug)
    expected = joint_law(RUNGS[3], params, V, 2)
    assert total_variation(two, expected) < 1e-12
    assert total_variation(three, expected) > 0.02


@pytest.mark.parametrize("gammas", LADDERS.values(), ids=LADDERS)
def test_proposals_carry_the_law_that_each_token_was_drawn_from(gammas: tuple[int, ...]) -> None:
    params = PARAMS["penalised, truncated"]
    sampler = Sampler(V)
    ladder = Rounds(RUNGS, Maximal(sampler), sampler)
    climber = ladder.add(next(fresh_ids), params, gammas)
    (proposal,) = ladder.propose([climber])
    proposer = climber.below(3)
    assert len(proposal.laws) == len(proposal.tokens)
    assert bool(proposal.tokens) == any(gammas)
    for j, law in enumerate(proposal.laws):
        if proposer == 0:
            assert law is None
        else:
            assert proposer is not None
            ids = proposal.tokens[:j]
            logits = RUNGS[proposer].row((*climber.path.ids[: climber.path.committed], *ids))
            assert law is not None
            assert torch.equal(law, sampler.process([Row(proposal.seq_id, tuple(ids))], logits[None])[0])


MANY = [
    SamplingParams(),
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.8, top_p=0.9),
    SamplingParams(temperature=1.5, top_k=4, min_p=0.05),
    SamplingParams(presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=1.2),
    SamplingParams(temperature=0, frequency_penalty=0.8),
    SamplingParams(min_tokens=6, stop_token_ids=[2], logit_bias={1: 1.0}, allowed_token_ids=[0, 1, 2, 3, 5]),
]
WIDE = make_rungs(7)


def generated(
    make_rule: Callable[[Sampler], Rule], ladders: Sequence[tuple[int, ...]], *, tokens: int = 12, logit_rows: int = 1 << 20
) -> tuple[list[tuple[int, ...]], Rounds]:
    """Every ladder with all of MANY, each with its own seed, in one batch: outputs, ladder by ladder."""
    sampler = Sampler(7)
    rounds = Rounds(WIDE, make_rule(sampler), sampler, logit_rows=logit_rows)
    climbers = [
        rounds.add(next(fresh_ids), params, gammas, seed=seed) for gammas in ladders for seed, params in enumerate(MANY * 2)
    ]
    return rounds.generate(climbers, tokens), rounds


def test_coupled_gives_plain_decodings_output_token_for_token() -> None:
    plain, _ = generated(Coupled, [(0, 0, 0)])
    assert len(set(plain)) > len(MANY)
    together, rounds = generated(Coupled, list(LADDERS.values()), logit_rows=9)
    assert together == plain * len(LADDERS)
    assert {outcome.accepted for outcome in rounds.climb.outcomes if outcome.verifier == 3} == {0, 1, 2, 3}


@pytest.mark.parametrize("make_rule", [Coupled, Maximal])
def test_a_sequence_is_the_same_in_a_batch_and_alone(make_rule: Callable[[Sampler], Rule]) -> None:
    """Greedy and random ones, ladders of all depths, judged in parts or at once."""
    ladders = list(LADDERS.values())
    together, _ = generated(make_rule, ladders, tokens=6, logit_rows=9)
    for i, gammas in enumerate(ladders):
        alone, _ = generated(make_rule, [gammas], tokens=6)
        assert together[i * len(alone) : (i + 1) * len(alone)] == alone


@pytest.mark.parametrize("make_rule", [Coupled, Maximal])
def test_greedy_takes_the_last_rungs_likeliest_token(make_rule: Callable[[Sampler], Rule]) -> None:
    outputs, _ = generated(make_rule, list(LADDERS.values()))
    for i, params in enumerate(MANY):
        if params.greedy:
            (expected,) = joint_law(WIDE[-1], params, 7, 12)
            assert set(outputs[i :: len(MANY)]) == {expected}


P = [0.35, 0.25, 0.2, 0.1, 0.07, 0.03]
Q = [0.1, 0.3, 0.15, 0.25, 0.0, 0.2]
TV = sum(abs(p - q) for p, q in zip(P, Q, strict=True)) / 2


def coupled_acceptance(p: Sequence[float], q: Sequence[float]) -> float:
    """sum_i 1 / sum_j max(p_j / p_i, q_j / q_i)."""
    pairs = list(zip(p, q, strict=True))
    return sum(1 / sum(max(pj / pi, qj / qi) for pj, qj in pairs) for pi, qi in pairs if pi and qi)


@pytest.mark.parametrize(
    ("make_rule", "expected"),
    [(Coupled, coupled_acceptance(P, Q)), (Maximal, sum(min(p, q) for p, q in zip(P, Q, strict=True)))],
)
def test_measured_acceptance_is_the_closed_form(make_rule: Callable[[Sampler], Rule], expected: float) -> None:
    """Within 4 standard errors."""
    assert (1 - TV) / (1 + TV) <= expected <= 1 - TV + 1e-12
    count = 10_000
    sampler = Sampler(len(P))
    rungs = [constant_table(name, [math.log(x) if x else -math.inf for x in law]) for name, law in (("q", Q), ("p", P))]
    rounds = Rounds(rungs, make_rule(sampler), sampler)
    params = SamplingParams()
    rounds.round([rounds.add(seed, params, [1], seed=seed) for seed in range(count)])
    measured = sum(outcome.accepted for outcome in rounds.climb.outcomes) / count
    assert abs(measured - expected) < 4 * math.sqrt(expected * (1 - expected) / count)


def test_what_rounding_leaves_of_a_residual() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2]] * 3, dtype=torch.float64)
    q = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.4, 0.4], [0.0, 1.0, 0.0]], dtype=torch.float64)
    expected = torch.tensor([[0.5, 0.3, 0.2], [0.3, 0.0, 0.0], [0.5, 0.0, 0.2]], dtype=torch.float64)
    torch.testing.assert_close(residual(p, q), expected)


@pytest.mark.parametrize("make_rule", [Coupled, Maximal])
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_verifier_whose_logits_are_not_numbers_gives_no_token(make_rule: Callable[[Sampler], Rule], temperature: float) -> None:
    sampler = Sampler(V)
    sampler.add(0, SamplingParams(temperature=temperature), seed=0, sample_index=0, prompt_ids=[0], eos_ids=[])
    proposal = Proposal(0, (), [1, 2], [torch.zeros(V), None])
    (verdict,) = make_rule(sampler).verify(1, [proposal], torch.full((3, V), math.nan))
    assert (verdict.accepted, verdict.token) == (0, -1)


@pytest.mark.parametrize("make_rule", [Coupled, Maximal])
def test_simulated_acceptance_has_the_rates_it_was_given(make_rule: Callable[[Sampler], Rule]) -> None:
    sampler = Sampler(7)
    rounds = Rounds(WIDE, Simulated(make_rule(sampler), {2: 0.9, 3: 0.6}, seed=1), sampler)
    climbers = [rounds.add(next(fresh_ids), SamplingParams(), (0, 2, 3), seed=seed) for seed in range(500)]
    rounds.generate(climbers, 8)
    for verifier, rate in ((2, 0.9), (3, 0.6)):
        judged = [outcome for outcome in rounds.climb.outcomes if outcome.verifier == verifier]
        tested = sum(min(outcome.accepted + 1, outcome.proposed) for outcome in judged)
        measured = sum(outcome.accepted for outcome in judged) / tested
        assert abs(measured - rate) < 4 * math.sqrt(rate * (1 - rate) / tested)
