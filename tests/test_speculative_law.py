"""The sampler's own noise under both rules: G-tests on joint n-grams that span rounds. They would see noise used twice."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import scipy.stats
from tables import PROMPT, Parrot, Rounds, constant_table, fresh_ids, joint_law, random_table
from torch import Tensor

from rowcast.runtime.ladder.coupled import Coupled
from rowcast.runtime.ladder.maximal import Maximal, PhiloxDice
from rowcast.runtime.ladder.rule import Rule
from rowcast.runtime.params import SamplingParams
from rowcast.runtime.sampler import Row, Sampler

V = 4
TOKENS = 4
"""More than one round of gamma 2 can give."""
SEQUENCES = 9_000
"""In each case. With the draws of all rungs and the coins that is a million numbers."""

LAST = random_table("last", 11, V, spread=1.0)
NEAR = random_table("near", 12, V, like=LAST, spread=0.6)
FAR = random_table("far", 13, V, spread=1.0)
INF = float("inf")
CASES: dict[str, tuple[Callable[[Sampler], Rule], list[Any], SamplingParams]] = {
    "two rungs": (Maximal, [NEAR, LAST], SamplingParams()),
    "three rungs": (Maximal, [FAR, NEAR, LAST], SamplingParams()),
    "lookup": (Maximal, [Parrot(V), LAST], SamplingParams()),
    "acceptance 1": (Maximal, [random_table("as last", 11, V, spread=1.0), LAST], SamplingParams()),
    "acceptance 0": (
        Maximal,
        [constant_table("left", [0.0, 0.5, -INF, -INF]), constant_table("right", [-INF, -INF, 1.0, 0.3])],
        SamplingParams(),
    ),
    "top-k, penalties": (
        Maximal,
        [FAR, LAST],
        SamplingParams(temperature=1.4, top_k=3, frequency_penalty=0.7, repetition_penalty=1.2),
    ),
    "top-p": (Maximal, [FAR, NEAR, LAST], SamplingParams(temperature=0.8, top_p=0.85)),
    "coupled, two rungs": (Coupled, [NEAR, LAST], SamplingParams()),
    "coupled, three rungs, top-p": (Coupled, [FAR, NEAR, LAST], SamplingParams(top_p=0.9, presence_penalty=0.4)),
}


@pytest.fixture(autouse=True)
def _no_garbage_collection() -> Iterator[None]:
    """There are no cycles here, and half of the time would go by in looking for some."""
    gc.disable()
    yield
    gc.enable()


def outputs(make_rule: Callable[[Sampler], Rule], rungs: Sequence[Any], params: SamplingParams) -> list[tuple[int, ...]]:
    """Of one sequence for each seed."""
    sampler = Sampler(V)
    rounds = Rounds(rungs, make_rule(sampler), sampler)
    gammas = [2] * (len(rungs) - 1)
    return rounds.generate([rounds.add(next(fresh_ids), params, gammas, seed=seed) for seed in range(SEQUENCES)], TOKENS)


def g_test(drawn: Sequence[tuple[int, ...]], law: dict[tuple[int, ...], float]) -> float:
    """The p-value of the n-grams under their law; those expected fewer than 5 times are pooled."""
    counts = Counter(drawn)
    assert set(counts) <= set(law), "a token that the law forbids"
    expected = {key: weight * len(drawn) for key, weight in law.items()}
    common = [key for key, count in expected.items() if count >= 5]
    cells = [(counts[key], expected[key]) for key in common]
    rest = len(drawn) - sum(count for count, _ in cells), len(drawn) - sum(count for _, count in cells)
    if rest[1] > 1e-6:
        cells.append(rest)
    observed, wanted = zip(*cells, strict=True)
    return float(scipy.stats.power_divergence(observed, wanted, lambda_="log-likelihood").pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted for being one family (Holm, 1979), ascending."""
    adjusted, most = [], 0.0
    for i, p in enumerate(sorted(p_values)):
        most = max(most, p * (len(p_values) - i))
        adjusted.append(min(most, 1.0))
    return adjusted


def test_joint_laws_of_several_rounds_are_the_last_rungs() -> None:
    found = {
        name: g_test(outputs(make_rule, rungs, params), joint_law(rungs[-1], params, V, TOKENS))
        for name, (make_rule, rungs, params) in CASES.items()
    }
    assert min(holm(list(found.values()))) > 0.01, found


def test_no_noise_is_used_twice() -> None:
    used: list[tuple[str, int, int, int, int]] = []

    class Recorded(PhiloxDice):
        def accept(self, rung: int, rows: Sequence[Row], rounds: Sequence[int], p: Tensor, q: Tensor) -> Tensor:
            used.extend(("accept", row.seq_id, len(row.drafted), rung, n) for row, n in zip(rows, rounds, strict=True))
            return super().accept(rung, rows, rounds, p, q)

        def draw(self, rung: int, rows: Sequence[Row], rounds: Sequence[int], law: Tensor) -> Tensor:
            used.extend(("draw", row.seq_id, len(row.drafted), rung, n) for row, n in zip(rows, rounds, strict=True))
            return super().draw(rung, rows, rounds, law)

    sampler = Sampler(V)
    rounds = Rounds([FAR, NEAR, LAST], Maximal(sampler, Recorded(sampler)), sampler)
    rounds.generate([rounds.add(next(fresh_ids), SamplingParams(), [2, 3], seed=seed) for seed in range(50)], 8)
    assert len(set(used)) == len(used) > 50 * 8


class StaleDice(PhiloxDice):
    """Every round sees the noise of the first one again."""

    def __init__(self, seeds: int, first_id: int) -> None:
        sampler = Sampler(V)  # nothing is ever committed to it
        for seed in range(seeds):
            sampler.add(first_id + seed, SamplingParams(), seed=seed, sample_index=0, prompt_ids=PROMPT, eos_ids=[])
        super().__init__(sampler)

    def accept(self, rung: int, rows: Sequence[Row], rounds: Sequence[int], p: Tensor, q: Tensor) -> Tensor:
        return super().accept(rung, rows, [0] * len(rows), p, q)

    def draw(self, rung: int, rows: Sequence[Row], rounds: Sequence[int], law: Tensor) -> Tensor:
        return super().draw(rung, rows, [0] * len(rows), law)


def test_the_g_test_sees_noise_used_twice() -> None:
    """The first round's tokens have their law; the n-grams that span rounds do not."""
    rungs = [NEAR, LAST]
    first_id = next(fresh_ids) + 1
    drawn = outputs(lambda sampler: Maximal(sampler, StaleDice(SEQUENCES, first_id)), rungs, SamplingParams())
    for tokens, sound in ((1, True), (TOKENS, False)):
        p_value = g_test([output[:tokens] for output in drawn], joint_law(LAST, SamplingParams(), V, tokens))
        assert (p_value > 0.01) == sound
        assert sound or p_value < 1e-9
