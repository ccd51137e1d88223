"""Which group goes to which tier: a mixed-integer program, its proven bound, and a greedy baseline. Torch-free.

It knows groups, tiers, seconds and bytes, and nothing of models or machines (`costs` prices them). Groups that cost the same are
counted together, so that ten thousand of them make a program of some hundred integers; the bound is computed over every single group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]
    Bools = NDArray[np.bool_]

_MOST_NODES = 2000
"""Of the search. A limit in seconds would make a plan depend on what else the machine does."""

MOST_CLASSES = 160
"""Of groups, after counting like ones together; more are merged where they are most alike."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Problem:
    """minimise constant + weights . P over one tier t(g) for each group g, with P_p the slowest of p's chains:

        P_p = max over its chains n of base[n] + sum over g of seconds[n, g, t(g)]     (a pass: what overlaps is a chain of its own)
        sum over g of bytes[m, g, t(g)] <= limits[m]                                    (a device's memory, a host's, its pinned part)

    G groups, T tiers, N chains, M limits. No cost or size is negative.
    """

    allowed: Bools
    """[G, T]."""
    seconds: Floats
    """[N, G, T]."""
    base: Floats
    """[N]."""
    passes: Ints
    """[N]: the P that a chain bounds."""
    weights: Floats
    """[P]."""
    constant: float
    bytes: Floats
    """[M, G, T]."""
    limits: Floats
    """[M]."""

    def cost(self, tiers: Ints) -> float:
        """Of an assignment [G]."""
        return self._cost(self.seconds[:, _range(len(tiers)), tiers].sum(axis=1))

    def fits(self, tiers: Ints) -> bool:
        """Whether an assignment keeps all limits and allowed tiers."""
        groups = _range(len(tiers))
        used = self.bytes[:, groups, tiers].sum(axis=1)
        return bool(self.allowed[groups, tiers].all() and (used <= self.limits * (1 + 1e-12)).all())

    def cost_of_shares(self, shares: Floats) -> float:
        """Where so much of each group [G, T] goes to each tier."""
        return self._cost((self.seconds * shares).sum(axis=(1, 2)))

    def pass_seconds(self, tiers: Ints) -> Floats:
        """[P]: P_p of an assignment."""
        return self._slowest(self.seconds[:, _range(len(tiers)), tiers].sum(axis=1))

    def _cost(self, chains: Floats) -> float:
        return float(self.constant + self.weights @ self._slowest(chains))

    def _slowest(self, chains: Floats) -> Floats:
        import numpy as np

        found = np.zeros(len(self.weights))
        np.maximum.at(found, self.passes, self.base + chains)
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Relaxed:
    """The program without whole numbers: a bound, and what one byte more or one second less would gain."""

    cost: float
    """No assignment costs less."""
    counts: Floats
    """[C, T]: of each class, how many groups go where."""
    prices: Floats
    """[N]: of chains, what a second more costs."""
    rents: Floats
    """[M]: of limits, what a byte less costs."""


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """An assignment of every group, and how good it is."""

    tiers: Ints
    """[G]."""
    cost: float
    bound: float
    """No assignment costs less; proven by the multipliers of the relaxed program over all groups."""
    greedy: float | None
    """What the greedy baseline costs; None where it finds nothing."""

    @property
    def gap(self) -> float:
        """(cost - bound) / cost."""
        return max(0.0, (self.cost - self.bound) / self.cost) if self.cost else 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Classes:
    """Groups counted together: equal allowed tiers and bytes, equal or nearly equal seconds."""

    problem: Problem
    """With one row a class: the mean of its groups."""
    sizes: Ints
    """[C]."""
    of: Ints
    """[G]."""
    exact: bool
    """Only equal ones were counted together."""


def classify(problem: Problem, most: int = MOST_CLASSES) -> Classes:
    """Count like groups together. Those with equal bytes and unequal seconds are merged into neighbours by their seconds until at most
    about `most` classes are left."""
    import numpy as np

    count = len(problem.allowed)
    flags = np.unique(np.packbits(problem.allowed, axis=1), axis=0, return_inverse=True)[1].ravel()
    sizes_of = _alike(problem.bytes / np.maximum(problem.limits, 1.0)[:, None, None])
    shape_of = _pairs(flags, sizes_of)
    of = _pairs(shape_of, _alike(problem.seconds))
    exact = bool(of.max(initial=0) < most)
    if not exact:
        # Neighbours by their seconds, in even parts of each shape.
        parts = np.empty(count, dtype=np.int64)
        shares = np.bincount(shape_of) / count
        for shape, share in enumerate(shares):
            members = np.flatnonzero(shape_of == shape)
            order = np.argsort(problem.seconds[:, members].sum(axis=(0, 2)), kind="stable")
            wanted = max(1, min(len(members), round(most * share)))
            parts[members[order]] = np.arange(len(members)) * wanted // len(members)
        of = _pairs(shape_of, parts)
    sizes = np.bincount(of)
    first = np.unique(of, return_index=True)[1]

    def mean(values: Floats) -> Floats:  # [X, G, T] -> [X, C, T]
        if exact:
            return values[:, first]
        order = np.argsort(of, kind="stable")
        ends = np.r_[0, np.cumsum(sizes)[:-1]]
        summed: Floats = np.add.reduceat(values[:, order], ends, axis=1)
        return summed / sizes[None, :, None]

    few = replace(problem, allowed=problem.allowed[first], seconds=mean(problem.seconds), bytes=problem.bytes[:, first])
    return Classes(few, sizes, of, exact)


def relax(classes: Classes) -> Relaxed | None:
    """Solve the linear program; None where no assignment keeps the limits."""
    import numpy as np
    from scipy.optimize import linprog

    program = _Program(classes)
    if program.impossible:
        return None
    found = linprog(
        program.costs,
        A_ub=program.upper,
        b_ub=program.most,
        A_eq=program.equal,
        b_eq=program.sums,
        bounds=(0, None),
        method="highs",
    )
    if found.status != 0:
        return None
    chains, scale = len(classes.problem.base), program.scale
    marginals = -np.minimum(found.ineqlin.marginals, 0.0)
    prices = marginals[:chains]
    rents = marginals[chains:] * scale / np.maximum(classes.problem.limits, 1.0)
    return Relaxed(classes.problem.constant + found.fun * scale, program.counts(found.x), prices, rents)


def solve(problem: Problem, classes: Classes, relaxed: Relaxed, *, gap: float) -> Solution | None:
    """The best assignment within `gap` of the best one of whole classes, and its bound over single groups. None where none was found:
    groups are too large to fit whole, though parts of them would.

    `classes`, `relaxed`: of this problem.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    program = _Program(classes)
    whole = np.r_[np.ones(program.options), np.zeros(len(problem.weights))]
    found = milp(
        program.costs,
        constraints=[
            LinearConstraint(program.upper, -np.inf, program.most),
            LinearConstraint(program.equal, program.sums, program.sums),
        ],
        integrality=whole,
        bounds=Bounds(0, np.inf),
        options={"mip_rel_gap": gap, "node_limit": _MOST_NODES},
    )
    bound = lagrangian(problem, relaxed)
    if classes.exact and found.mip_dual_bound is not None:
        bound = max(bound, problem.constant + found.mip_dual_bound * program.scale)
    baseline = greedy(problem)
    tried = [baseline]
    if found.x is not None:
        tried.append(_expand(problem, classes, np.rint(program.counts(found.x)).astype(np.int64), relaxed))
    fitting = [tiers for tiers in tried if tiers is not None and problem.fits(tiers)]
    if not fitting:
        return None
    tiers = min(fitting, key=problem.cost)
    return Solution(tiers, problem.cost(tiers), bound, None if baseline is None else problem.cost(baseline))


def lagrangian(problem: Problem, relaxed: Relaxed) -> float:
    """A lower bound over all single groups, from any multipliers at least 0 (Lagrangian relaxation; Fisher 1981, section 2).

    Chains and limits are priced; what is left falls apart into one choice a group.
    """
    import numpy as np

    prices = relaxed.prices.copy()
    for p, weight in enumerate(problem.weights):  # dual feasibility: a pass's chains may not cost more than the pass
        mine = problem.passes == p
        total = prices[mine].sum()
        if total > weight:
            prices[mine] *= weight / total
    costs = np.tensordot(prices, problem.seconds, 1) + np.tensordot(relaxed.rents, problem.bytes, 1)
    least = np.where(problem.allowed, costs, np.inf).min(axis=1).sum()
    return float(problem.constant + least + prices @ problem.base - relaxed.rents @ problem.limits)


def missing(classes: Classes, gains: Floats) -> float:
    """The least e for which the limits, each raised by e times its gain [M], hold all groups or parts of them; infinity where none is
    enough."""
    import numpy as np
    from scipy.optimize import linprog

    program = _Program(classes)
    if program.impossible:
        return float("inf")
    chains, limits = len(classes.problem.base), np.maximum(classes.problem.limits, 1.0)
    rows = program.upper[chains:, : program.options].toarray()
    scale = float(limits.max())
    found = linprog(
        np.r_[np.zeros(program.options), 1.0],
        A_ub=np.c_[rows, -gains * scale / limits],
        b_ub=program.most[chains:],
        A_eq=np.c_[program.equal[:, : program.options].toarray(), np.zeros(len(program.sums))],
        b_eq=program.sums,
        bounds=(0, None),
        method="highs",
    )
    return float(found.fun) * scale if found.status == 0 else float("inf")


def greedy(problem: Problem) -> Ints | None:
    """The baseline: all at one tier beside the first, where it may be, then what gains most for each byte moves to the first.

    Every tier is tried as that one; the best assignment, None where none fits.
    """
    import numpy as np

    count, tiers = problem.allowed.shape
    groups = _range(count)
    worth = np.tensordot(problem.weights[problem.passes], problem.seconds, 1)  # [G, T]: as if nothing overlapped
    others = np.where(problem.allowed, worth, np.inf)
    others[:, 0] = np.where(problem.allowed[:, 1:].any(axis=1), np.inf, 0.0)
    cheapest = others.argmin(axis=1)
    found: list[Ints] = []
    for tier in range(tiers):
        assigned = np.where(problem.allowed[:, tier], tier, cheapest)
        used = problem.bytes[:, groups, assigned].sum(axis=1).tolist()
        gain = worth[groups, assigned] - worth[:, 0]
        size = problem.bytes[:, :, 0].sum(axis=0)
        wanted = problem.allowed[:, 0] & (assigned != 0)
        changes = (problem.bytes[:, :, 0] - problem.bytes[:, groups, assigned]).T.tolist()
        limits = problem.limits.tolist()
        for group in np.argsort(-gain / np.maximum(size, 1.0), kind="stable").tolist():
            if not wanted[group]:
                continue
            change = changes[group]
            if all(more <= 0 or at + more <= most for at, more, most in zip(used, change, limits, strict=True)):
                used = [at + more for at, more in zip(used, change, strict=True)]
                assigned[group] = 0
        if problem.fits(assigned):
            found.append(assigned)
    return min(found, key=problem.cost, default=None)


def assignments(problem: Problem) -> Iterator[Ints]:
    """Every assignment to allowed tiers: exhaustive search for small problems."""
    import numpy as np

    for tiers in product(*(np.flatnonzero(row) for row in problem.allowed)):
        yield np.array(tiers, dtype=np.int64)


class _Program:
    """The matrices of a class problem: x by class and allowed tier, then P; chains first, then limits.

    Seconds are counted in the scale of the largest chain and bytes in their limit, so that all numbers are near 1.
    """

    def __init__(self, classes: Classes) -> None:
        import numpy as np
        from scipy.sparse import csr_array

        problem = classes.problem
        mask = problem.allowed
        self.impossible = bool((~mask.any(axis=1)).any())
        rows, tiers = np.nonzero(mask)
        self._rows, self._tiers, self._shape = rows, tiers, mask.shape
        self.options = len(rows)
        seconds = problem.seconds[:, rows, tiers]
        ends = seconds.max(axis=1, initial=0.0) * classes.sizes.max(initial=1) + problem.base
        self.scale = float(ends.max(initial=0.0)) or 1.0
        limits, chains, passes = np.maximum(problem.limits, 1.0), len(problem.base), len(problem.weights)
        width = self.options + passes
        dense = np.zeros((chains + len(limits), width))
        dense[:chains, : self.options] = seconds / self.scale
        dense[np.arange(chains), self.options + problem.passes] = -1.0
        dense[chains:, : self.options] = problem.bytes[:, rows, tiers] / limits[:, None]
        self.upper: Any = csr_array(dense)
        self.most = np.r_[-problem.base / self.scale, problem.limits / limits]
        columns = np.arange(self.options)  # by class already: each row of `equal` is a run of them
        starts = np.searchsorted(rows, np.arange(mask.shape[0] + 1))
        self.equal: Any = csr_array((np.ones(self.options), columns, starts), shape=(mask.shape[0], width))
        self.sums = classes.sizes.astype(float)
        self.costs = np.r_[np.zeros(self.options), problem.weights]

    def counts(self, x: Floats) -> Floats:
        import numpy as np

        found = np.zeros(self._shape)
        found[self._rows, self._tiers] = x[: self.options]
        return found


def _expand(problem: Problem, classes: Classes, counts: Ints, relaxed: Relaxed) -> Ints:
    """Counts of classes [C, T] as an assignment of groups [G]: inside a class, groups go where they cost least at these prices."""
    import numpy as np

    costs = np.tensordot(relaxed.prices, problem.seconds, 1)  # [G, T]
    tiers = np.empty(len(classes.of), dtype=np.int64)
    members = np.argsort(classes.of, kind="stable")
    ends = np.cumsum(classes.sizes)
    for index, end in enumerate(ends):
        mine = members[end - classes.sizes[index] : end]
        used = np.flatnonzero(counts[index])
        if len(used) == 1:
            tiers[mine] = used[0]
            continue
        # Tiers by how steeply a group's cost there rises with its own; the groups that are read most go to the flattest.
        heat = costs[mine].sum(axis=1)
        hottest = mine[np.argsort(-heat, kind="stable")]
        steep = sorted(used, key=lambda t: float(np.ptp(costs[mine, t])) or float(costs[mine, t].mean()))
        place = 0
        for tier in steep:
            taken = counts[index, tier]
            tiers[hottest[place : place + taken]] = tier
            place += taken
        assert place == len(mine)
    return tiers


def _alike(values: Floats) -> Ints:
    """[G]: numbers 0.. for the groups of values [X, G, T], the same for groups that are equal to nine digits.

    They are told apart by a weighted sum: sorting numbers is many times faster than sorting rows.
    """
    import numpy as np

    weights = np.random.default_rng(0).uniform(1, 2, (values.shape[0], values.shape[2]))
    mixed = np.einsum("xt,xgt->g", weights, values) / max(float(values.max(initial=0.0)), 1e-300)
    sums, found = np.unique(mixed, return_inverse=True)
    steps = np.r_[0, np.cumsum(np.diff(sums) > 1e-9 * np.maximum(np.abs(sums[1:]), 1e-9))]
    numbers: Ints = steps[found.ravel()]
    return numbers


def _pairs(first: Ints, second: Ints) -> Ints:
    """[G]: numbers 0.. for pairs of numbers."""
    import numpy as np

    numbers: Ints = np.unique(first * (int(second.max(initial=0)) + 1) + second, return_inverse=True)[1].ravel()
    return numbers


def _range(count: int) -> Ints:
    import numpy as np

    return np.arange(count)
