"""The placement program against exhaustive search; its bounds, its limits, its greedy baseline."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rowcast.placement import solver
from rowcast.placement.solver import Problem, assignments, classify, greedy, lagrangian, relax


def instance(seed: int, groups: int = 6, tiers: int = 3, chains: int = 4, passes: int = 2, alike: bool = False) -> Problem:
    """Tier 0 takes a device's memory, the others a host's; `alike`: groups of two kinds only."""
    rng = np.random.default_rng(seed)
    seconds = rng.random((chains, groups, tiers)) * rng.choice([0, 1], (chains, groups, tiers))
    seconds[:, :, 0] *= 0.1
    sizes = rng.integers(1, 5, groups).astype(float)
    allowed = rng.random((groups, tiers)) < 0.85
    if alike:
        kind = np.arange(groups) % 2
        seconds, sizes, allowed = seconds[:, kind], sizes[kind], allowed[kind]
    allowed[:, 1] = True
    bytes_ = np.zeros((2, groups, tiers))
    bytes_[0, :, 0], bytes_[1, :, 1:] = sizes, sizes[:, None]
    return Problem(
        allowed=allowed,
        seconds=seconds,
        base=rng.random(chains) * 0.3,
        passes=np.r_[np.arange(passes), rng.integers(0, passes, chains - passes)],
        weights=rng.random(passes) + 0.1,
        constant=0.1,
        bytes=bytes_,
        limits=np.array([sizes.sum() * 0.5, sizes.sum() * 0.8]),
    )


def best_of_all(problem: Problem) -> float | None:
    return min((problem.cost(tiers) for tiers in assignments(problem) if problem.fits(tiers)), default=None)


def solved(problem: Problem, gap: float = 0.0, most: int = solver.MOST_CLASSES) -> solver.Solution | None:
    classes = classify(problem, most)
    relaxed = relax(classes)
    return None if relaxed is None else solver.solve(problem, classes, relaxed, gap=gap)


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_the_solver_equals_exhaustive_search(seed: int, alike: bool) -> None:
    problem = instance(seed, alike=alike)
    best = best_of_all(problem)
    found = solved(problem)
    if best is None:
        assert found is None or not problem.fits(found.tiers)
        return
    assert found is not None and problem.fits(found.tiers)
    assert found.cost == pytest.approx(best, abs=1e-9)
    assert found.bound <= best + 1e-9
    baseline = greedy(problem)
    assert baseline is None or (problem.fits(baseline) and problem.cost(baseline) >= best - 1e-12)


def test_groups_that_cost_the_same_are_counted_together() -> None:
    problem = instance(3, groups=200, alike=True)
    classes = classify(problem)
    assert sorted(classes.sizes) == [100, 100]
    np.testing.assert_allclose(classes.problem.seconds[:, classes.of], problem.seconds, rtol=1e-12)


def test_unlike_groups_are_merged_with_their_neighbours_and_the_bound_still_holds() -> None:
    problem = instance(4, groups=600)
    fine, coarse = solved(problem, gap=1e-4, most=10_000), solved(problem, gap=1e-4, most=30)
    assert fine is not None and coarse is not None
    assert len(classify(problem, 30).sizes) < 60 < len(classify(problem, 10_000).sizes)
    assert coarse.bound <= fine.cost + 1e-9 and fine.bound <= coarse.cost + 1e-9
    assert problem.fits(fine.tiers)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_any_multipliers_bound_every_assignment(seed: int, other: int) -> None:
    problem = instance(seed, groups=5)
    rng = np.random.default_rng(other)
    prices, rents = rng.random(len(problem.base)), rng.random(len(problem.limits)) * 0.1
    bound = lagrangian(problem, solver.Relaxed(0.0, np.zeros((5, 3)), prices, rents))
    best = best_of_all(problem)
    assert best is None or bound <= best + 1e-9


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.floats(0.2, 1.0), st.floats(1.0, 2.0), st.floats(0.3, 1.0))
def test_more_memory_and_faster_links_never_cost_more(seed: int, share: float, more: float, faster: float) -> None:
    problem = instance(seed, groups=40)
    problem = replace(problem, limits=np.array([problem.bytes[0].sum() * share, problem.bytes[1].max(axis=1).sum()]))
    better = replace(
        problem, limits=problem.limits * more, seconds=problem.seconds * np.array([1.0, faster, 1.0, 1.0])[:, None, None]
    )
    gap = 1e-6
    first, second = solved(problem, gap), solved(better, gap)
    if first is None:
        return
    assert second is not None
    assert problem.fits(first.tiers) and better.fits(second.tiers)
    assert second.cost <= first.cost * (1 + 1e-5) + 1e-9


def test_parts_that_fit_and_groups_that_do_not_have_no_solution() -> None:
    """Two groups of three bytes and two places of three and a half: half a group more would fit."""
    problem = replace(
        instance(5, groups=3),
        allowed=np.ones((3, 3), dtype=bool),
        bytes=np.stack([np.array([[3.0, 0, 0]] * 3), np.array([[0, 3.0, 3.0]] * 3)]),
        limits=np.array([3.5, 5.5]),
    )
    assert best_of_all(problem) is None
    classes = classify(problem)
    relaxed = relax(classes)
    assert relaxed is not None and solver.solve(problem, classes, relaxed, gap=0.0) is None
    assert solver.missing(classes, np.array([0.0, 1.0])) == pytest.approx(0.0)
    assert solver.missing(classify(replace(problem, limits=np.array([3.5, 2.0]))), np.array([0.0, 1.0])) == pytest.approx(3.5)


def test_groups_that_differ_in_where_they_may_lie_are_not_merged() -> None:
    problem = instance(3, groups=8, alike=True)
    allowed = np.ones((8, 3), dtype=bool)
    allowed[5, 2] = False
    problem = replace(problem, allowed=allowed, bytes=problem.bytes * 4e8, limits=problem.limits * 4e8)
    assert len(classify(problem).sizes) == 3


def test_what_cannot_fit_has_no_solution() -> None:
    problem = replace(instance(5), limits=np.zeros(2))
    assert solved(problem) is None and greedy(problem) is None
