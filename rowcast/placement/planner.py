"""The planner: ladder, layout and placement that commit a token soonest, and why the others do not. Torch-free.

It compares layouts and ladders by the relaxed program over coarse groups, then places the best one's groups and proves how far from the
best that may be (`solver`). What it foretells is written down by `foretell`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby

from rowcast.errors import OutOfMemoryError
from rowcast.placement import solver
from rowcast.placement.constants import Constants
from rowcast.placement.costs import CostModel, Mode, Priced, modes
from rowcast.placement.forecast import Alternative, Forecast, WhatIf
from rowcast.placement.foretell import Found, foretell
from rowcast.placement.hardware import Machine
from rowcast.placement.layout import Layout, layouts
from rowcast.placement.units import format_bytes
from rowcast.placement.workload import LadderUse, Workload

COARSE_GROUPS = 16
"""A layer, attention and KV included, where layouts and ladders are compared."""

GIB = 1 << 30
_MOST_CHANGE = 1 << 50

_LIKELY_MODES = 4
"""The best ones, in which a machine that differs a little is looked at; and everything next to the compute."""
_GOOD_MODES, _LIKELY_GAMMAS = 2, 2
"""The best of a ladder's modes, in which other layouts are looked at; the best of its gammas."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided and what it foretells."""

    forecast: Forecast
    ladder: LadderUse
    layout: Layout


@dataclass(frozen=True, slots=True)
class _Rough:
    """One ladder on one layout in one mode, by the relaxed program over coarse groups."""

    layout: Layout
    ladder: LadderUse
    mode: Mode
    seconds: float
    """For each committed token; a bound for coarse groups, no plan."""
    priced: Priced
    classes: solver.Classes
    relaxed: solver.Relaxed


def decide(
    work: Workload,
    machine: Machine,
    *,
    tensor_parallel: int | None = None,
    groups: int = 10_000,
    gap: float = 0.01,
    constants: Constants | None = None,
    corrections: Mapping[str, float] | None = None,
    explain: bool = True,
) -> Decision:
    """The plan with the least seconds per committed token within all memory limits.

    `groups`: that the weights and KV of one rank are placed in, about. `gap`: how much worse than the best placement of its ladder and
    layout it may be. `corrections`: by a rung's name, measured seconds of its passes over those predicted. `explain`: also look for
    what a different machine would change. Raises OutOfMemoryError, which names the nearest change that fits, and UserError.
    """
    started = time.perf_counter()
    constants = constants or Constants()
    roughs = _compare(work, machine, tensor_parallel, constants, corrections)
    if not roughs:
        raise OutOfMemoryError(_nearest_change(work, machine, tensor_parallel, constants))
    best = min(roughs, key=lambda rough: rough.seconds)
    tried = {rough.mode for rough in roughs if rough.ladder is best.ladder and rough.layout is best.layout}
    others = [mode for mode in modes(best.ladder, best.layout) if mode not in tried and Mode() not in tried]
    roughs += _rough(work, best.ladder, best.layout, constants, _factors(best.ladder, corrections), others)
    best = min(roughs, key=lambda rough: rough.seconds)
    model = CostModel(work, best.ladder, best.layout, constants, groups)
    factors = _factors(best.ladder, corrections)
    same = [rough for rough in roughs if rough.ladder is best.ladder and rough.layout is best.layout]
    priced, solution, mode = _place(model, best, same, factors, gap)
    baseline = solver.greedy(priced.problem)
    greedy = None if baseline is None else priced.problem.cost(baseline)
    solver_s = time.perf_counter() - started
    found = Found(
        work=work,
        ladder=best.ladder,
        model=model,
        mode=mode,
        priced=priced,
        solution=solution,
        greedy=greedy,
        solver_s=solver_s,
    )
    alternatives = _alternatives(work, machine, best, roughs, solution.cost, tensor_parallel, constants)
    what_if = _what_if(work, machine, best, same, solution.cost, constants, corrections) if explain else []
    return Decision(foretell(found, corrections, alternatives, what_if), best.ladder, best.layout)


def _compare(
    work: Workload,
    machine: Machine,
    tensor_parallel: int | None,
    constants: Constants,
    corrections: Mapping[str, float] | None = None,
) -> list[_Rough]:
    """Layouts, ladders and modes that fit: every mode on the first layout, on others those that were good there.

    Of ladders that differ in gammas only, one is looked at in all modes; then, in the best of these, those that its placement makes
    the fastest.
    """
    found: list[_Rough] = []
    good: dict[str, list[Mode]] = {}
    for layout in layouts(machine, work.spec, tensor_parallel):
        for name, members in groupby(work.ladders, key=_family):
            family = list(members)
            first = family[len(family) // 2]
            mine = list(_rough(work, first, layout, constants, _factors(first, corrections), good.get(name)))
            if not mine:
                continue
            mine.sort(key=lambda rough: rough.seconds)
            good.setdefault(name, [Mode(), *(rough.mode for rough in mine[:_GOOD_MODES])])
            found += mine
            others = [ladder for ladder in family if ladder is not first]
            by_cost = sorted(others, key=lambda ladder: _cost_as(mine[0], work, ladder, constants, corrections))
            for ladder in by_cost[:_LIKELY_GAMMAS]:
                found += _rough(work, ladder, layout, constants, _factors(ladder, corrections), [mine[0].mode])
    return found


def _family(ladder: LadderUse) -> str:
    return ladder.family or ladder.name


def _cost_as(
    rough: _Rough, work: Workload, ladder: LadderUse, constants: Constants, corrections: Mapping[str, float] | None
) -> float:
    """Seconds of another ladder of the family, placed as this one."""
    model = CostModel(work, ladder, rough.layout, constants, COARSE_GROUPS * work.spec.num_layers)
    problem = model.price(rough.mode, _factors(ladder, corrections)).problem
    shares = rough.relaxed.counts[rough.classes.of] / rough.classes.sizes[rough.classes.of][:, None]
    return problem.cost_of_shares(shares)


def _rough(
    work: Workload,
    ladder: LadderUse,
    layout: Layout,
    constants: Constants,
    factors: list[float],
    allowed: list[Mode] | None = None,
) -> Iterator[_Rough]:
    model = CostModel(work, ladder, layout, constants, COARSE_GROUPS * work.spec.num_layers)
    for mode in modes(ladder, layout) if allowed is None else allowed:
        priced = model.price(mode, factors)
        classes = solver.classify(priced.problem)
        relaxed = solver.relax(classes)
        if relaxed is not None:
            yield _Rough(layout, ladder, mode, relaxed.cost, priced, classes, relaxed)
            if mode == Mode():  # Nothing is read faster than from the memory next to the compute.
                return


def _factors(ladder: LadderUse, corrections: Mapping[str, float] | None) -> list[float]:
    return [(corrections or {}).get(rung.name, 1.0) for rung in ladder.rungs]


def _place(
    model: CostModel, best: _Rough, same: list[_Rough], factors: list[float], gap: float
) -> tuple[Priced, solver.Solution, Mode]:
    """The best placement of the ladder on its layout over all modes, with a bound that holds for all of them."""
    bounds: list[float] = []
    taken: tuple[Priced, solver.Solution, Mode] | None = None
    for rough in sorted(same, key=lambda each: each.seconds):
        priced = model.price(rough.mode, factors)
        if taken is not None:
            # The multipliers of coarse groups bound fine ones, too: this mode has nothing better to offer, mostly.
            bound = solver.lagrangian(priced.problem, rough.relaxed)
            if bound >= taken[1].cost * (1 - gap / 2):
                bounds.append(bound)
                continue
        classes = solver.classify(priced.problem)
        relaxed = solver.relax(classes)
        if relaxed is None:
            continue
        solution = solver.solve(priced.problem, classes, relaxed, gap=gap / 4)
        bounds.append(solution.bound)
        if priced.problem.fits(solution.tiers) and (taken is None or solution.cost < taken[1].cost):
            taken = priced, solution, rough.mode
    assert taken is not None, f"{best.mode.name} fits by the relaxed program only"
    priced, solution, mode = taken
    return priced, replace(solution, bound=min(bounds)), mode


def _alternatives(
    work: Workload,
    machine: Machine,
    best: _Rough,
    roughs: list[_Rough],
    seconds: float,
    tensor_parallel: int | None,
    constants: Constants,
) -> list[Alternative]:
    """Other ways to place this ladder, other ladders and other layouts: the best of each, with what it waits for."""
    told: list[Alternative] = []
    base = best.seconds
    mine = [rough for rough in roughs if rough.ladder is best.ladder and rough.layout is best.layout]
    tried = {rough.mode for rough in mine}
    if Mode() not in tried:
        missing = _missing_bytes(work, best, constants)
        told.append(Alternative(Mode().name, None, f"does not fit: {format_bytes(missing)} more are needed on each GPU"))
    for rough in sorted(mine, key=lambda each: each.seconds):
        if rough.mode != best.mode and rough.seconds > base * (1 + 1e-9):
            told.append(_alternative(rough.mode.name, rough, seconds, base))
    for layout in layouts(machine, work.spec, tensor_parallel):
        if layout == best.layout:
            continue
        others = [rough for rough in roughs if rough.layout == layout]
        if others:
            told.append(_alternative(layout.name, min(others, key=lambda each: each.seconds), seconds, base))
        else:
            told.append(Alternative(layout.name, None, "does not fit"))
    for ladder in reversed(_first_of_families(work.ladders)):
        family = _family(ladder)
        if family == _family(best.ladder):
            continue
        others = [rough for rough in roughs if _family(rough.ladder) == family]
        if others:
            fastest = min(others, key=lambda each: each.seconds)
            told.append(_alternative(f"ladder {fastest.ladder.name}", fastest, seconds, base))
        else:
            told.append(Alternative(f"ladder {ladder.name}", None, "does not fit"))
    return told


def _alternative(what: str, rough: _Rough, seconds: float, base: float) -> Alternative:
    """Its seconds are those of coarse groups, in the proportion that the taken plan's have."""
    at = rough.seconds * seconds / base
    return Alternative(what, at, f"{at / seconds:.2f} times the time: {_waits_for(rough)}")


def _waits_for(rough: _Rough) -> str:
    """The link that most of a token's time is waited for, by the relaxed program's prices."""
    problem, prices = rough.classes.problem, rough.relaxed.prices
    ends = problem.base + (problem.seconds * rough.relaxed.counts[None]).sum(axis=(1, 2))
    waited = {"launches": problem.constant}
    for chain, price, end in zip(rough.priced.chains, prices, ends, strict=True):
        waited[chain.link] = waited.get(chain.link, 0.0) + float(price * end)
    return f"it waits for the {max(waited, key=lambda name: waited[name])}"


def _missing_bytes(work: Workload, best: _Rough, constants: Constants) -> int:
    """What everything next to the compute takes beyond the fullest site's memory."""
    model = CostModel(work, best.ladder, best.layout, constants, COARSE_GROUPS * work.spec.num_layers)
    problem = model.price(Mode()).problem
    used = problem.bytes[:, :, 0].sum(axis=1)
    sites = len(best.layout.sites)
    return max(1, round(float((used - problem.limits)[:sites].max())))


def _what_if(
    work: Workload,
    machine: Machine,
    best: _Rough,
    same: list[_Rough],
    seconds: float,
    constants: Constants,
    corrections: Mapping[str, float] | None,
) -> list[WhatIf]:
    """The chosen ladder on machines that differ in one thing, in the layout of the same name."""
    changes: dict[str, Machine] = {
        "1 GiB more on each GPU": machine.with_changes(gpu_memory_bytes=GIB),
        "8 GiB more on each GPU": machine.with_changes(gpu_memory_bytes=8 * GIB),
        "GPU memory a quarter faster": machine.with_changes(gpu_memory_rate=1.25),
        "a bus twice as fast": machine.with_changes(bus=2.0),
        "host memory twice as fast": machine.with_changes(host_memory_rate=2.0),
        "64 GiB more host memory": machine.with_changes(host_memory_bytes=64 * GIB),
        "links between GPUs twice as fast": machine.with_changes(peers=2.0, bus=1.0),
        "links between nodes twice as fast": machine.with_changes(inter_node=2.0),
    }
    if best.layout.on_cpu:
        changes = {name: changed for name, changed in changes.items() if name.endswith("host memory") or name.startswith("host")}
    likely = sorted(same, key=lambda rough: rough.seconds)[:_LIKELY_MODES]
    promising = [Mode()] * (len(same) > 1) + [rough.mode for rough in likely]
    found = []
    for name, changed in changes.items():
        if changed == machine:
            continue
        layout = next(each for each in layouts(changed, work.spec, best.layout.tensor_parallel) if each.name == best.layout.name)
        roughs = _rough(work, best.ladder, layout, constants, _factors(best.ladder, corrections), promising)
        least = min((rough.seconds for rough in roughs), default=best.seconds)
        found.append(WhatIf(name, min(least, best.seconds) * seconds / best.seconds))
    return found


def _nearest_change(work: Workload, machine: Machine, tensor_parallel: int | None, constants: Constants) -> str:
    """One sentence: what is short, and the smallest change of each kind that fits."""

    def fits(changed: Machine, asked: Workload = work) -> bool:
        for layout in layouts(changed, asked.spec, tensor_parallel):
            for ladder in _first_of_families(asked.ladders):
                if next(_rough(asked, ladder, layout, constants, _factors(ladder, None), _roomiest(ladder, layout)), None):
                    return True
        return False

    ways = []
    host = _least(lambda more: fits(machine.with_changes(host_memory_bytes=more)), GIB // 4)
    if machine.num_gpus:
        gpu = _least(lambda more: fits(machine.with_changes(gpu_memory_bytes=more)), GIB // 4)
        if gpu is not None:
            ways.append(f"{format_bytes(gpu)} more on each GPU")
    if host is not None:
        ways.append(f"{format_bytes(host)} more host memory")
    context = work.context
    while context > 64 and not fits(machine, replace(work, context=context, prompt=min(work.prompt, context - 1))):
        context //= 2
    if context < work.context and fits(machine, replace(work, context=context, prompt=min(work.prompt, context - 1))):
        low, high = context, min(work.context, context * 2)
        while high - low > max(64, low // 32):
            middle = (low + high) // 2
            if fits(machine, replace(work, context=middle, prompt=min(work.prompt, middle - 1))):
                low = middle
            else:
                high = middle
        ways.append(f"a context of {low // 64 * 64 or low} tokens")
    if work.batch > 1 and fits(machine, replace(work, batch=1)):
        ways.append("a batch of 1")
    for ladder in _first_of_families(work.fallbacks):
        if any(
            next(_rough(work, ladder, layout, constants, [1.0] * len(ladder.rungs)), None)
            for layout in layouts(machine, work.spec, tensor_parallel)
        ):
            ways.append(f"the ladder {ladder.name} in mode approximate")
            break
    told = f"{work.model} with a context of {work.context} tokens and {work.batch} sequence{'s' * (work.batch > 1)} does not fit"
    told += f" on {machine.describe()}"
    return f"{told}: it would with {', or '.join(ways)}" if ways else f"{told}: use a smaller model"


def _roomiest(ladder: LadderUse, layout: Layout) -> list[Mode]:
    """The modes that fit where any does, but for the buffers that a mode with more ways has beside one with fewer."""
    found = modes(ladder, layout)
    return [found[-1], *(mode for mode in found if mode in (Mode(), Mode(streamed=True), Mode(streamed=True, kv_away=True)))]


def _first_of_families(ladders: tuple[LadderUse, ...]) -> list[LadderUse]:
    return list({_family(ladder): ladder for ladder in reversed(ladders)}.values())


def _least(fits: Callable[[int], bool], step: int) -> int | None:
    """The fewest bytes, in whole steps, that fit; None where the most do not."""
    high = step
    while not fits(high):
        high *= 2
        if high > _MOST_CHANGE:
            return None
    low = high // 2 if high > step else 0
    while high - low > step:
        middle = (low + high) // 2 // step * step
        if fits(middle):
            high = middle
        else:
            low = middle
    return high
