"""The planner: ladder, layout and placement that commit a token soonest, and why the others do not. Torch-free.

It compares layouts and ladders by the relaxed program over coarse groups, then places the best one's groups and proves how far from the
best that may be (`solver`). What it foretells is written down by `foretell`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby

from rowcast.errors import OutOfMemoryError
from rowcast.placement import solver
from rowcast.placement.constants import Constants
from rowcast.placement.corrections import factor
from rowcast.placement.costs import CostModel, Mode, Priced, modes
from rowcast.placement.forecast import Alternative, Forecast, WhatIf
from rowcast.placement.foretell import Found, foretell
from rowcast.placement.hardware import Machine
from rowcast.placement.layout import Layout, layouts
from rowcast.placement.workload import LadderUse, Workload

COARSE_GROUPS = 16
"""A layer, attention and KV included, where layouts and ladders are compared."""

GIB = 1 << 30
_NEAR_TIE = 0.02
"""So much slower may be what an engine executes than a pipeline, which none does, and still be taken."""
_LEAST_LADDERS = 2
"""Of those that take the least beside the weights, where nothing fits."""

_LIKELY_MODES = 4
"""The best ones, in which a machine that differs a little is looked at; and everything next to the compute."""
_LEADING_FAMILIES, _GOOD_MODES, _LIKELY_GAMMAS = 2, 2, 2
"""The best ladders and the best of their modes, with which other layouts are looked at; the best of a ladder's gammas."""


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
    layout it may be. `corrections`: by kind (`corrections.kind_of`), measured seconds of a rung's passes over those predicted.
    `explain`: also look for what a different machine would change. Raises OutOfMemoryError, which names the nearest change that fits,
    and UserError.
    """
    started = time.perf_counter()
    constants = constants or Constants()
    roughs = _compare(work, machine, tensor_parallel, constants, corrections)
    tolerance = gap / 4
    while roughs:
        best = min(roughs, key=lambda rough: _preferred(rough, tolerance))
        tried = {rough.mode for rough in roughs if rough.ladder is best.ladder and rough.layout is best.layout}
        others = [mode for mode in _worth_trying(best.ladder, best.layout, Mode() in tried) if mode not in tried]
        roughs += _rough(work, best.ladder, best.layout, constants, _factors(best.ladder, corrections), others)
        same = [rough for rough in roughs if rough.ladder is best.ladder and rough.layout is best.layout]
        same.sort(key=lambda rough: _preferred(rough, tolerance))
        model = CostModel(work, best.ladder, best.layout, constants, groups)
        placed = _place(model, same, _factors(best.ladder, corrections), gap)
        if placed is not None:
            break
        # Groups are too large to fit whole, though parts of them would.
        roughs = [rough for rough in roughs if rough.ladder is not best.ladder or rough.layout is not best.layout]
    else:
        raise OutOfMemoryError(_nearest_change(work, machine, tensor_parallel, constants))
    best = same[0]
    priced, solution, mode = placed
    found = Found(
        work=work,
        ladder=best.ladder,
        model=model,
        mode=mode,
        priced=priced,
        solution=solution,
        greedy=solution.greedy,
        solver_s=time.perf_counter() - started,
    )
    alternatives = _alternatives(work, machine, best, roughs, solution.cost, tensor_parallel, constants)
    what_if = _what_if(work, machine, best, same, solution.cost, constants, corrections) if explain else []
    return Decision(foretell(found, corrections, alternatives, what_if), best.ladder, best.layout)


def _preferred(rough: _Rough, tolerance: float) -> float:
    """Seconds, less for everything next to the compute and more for a pipeline: what is simpler, or can be executed, wins a tie."""
    seconds = rough.seconds * (1 - tolerance if rough.mode == Mode() else 1)
    return seconds * (1 + _NEAR_TIE) if _is_pipeline(rough.layout) else seconds


def _is_pipeline(layout: Layout) -> bool:
    """No engine executes one (`executable`)."""
    return len(layout.stages) > 1


def _worth_trying(ladder: LadderUse, layout: Layout, fits: bool) -> list[Mode]:
    """All modes; where everything fits next to the compute only that, and the CPU as a second memory: all other ways read through the
    memory next to the compute what they fetch."""
    found = modes(ladder, layout)
    return [mode for mode in found if not fits or mode in (Mode(), Mode(cpu=True))]


def _compare(
    work: Workload,
    machine: Machine,
    tensor_parallel: int | None,
    constants: Constants,
    corrections: Mapping[str, float] | None = None,
) -> list[_Rough]:
    """Layouts, ladders and modes that fit: all on the first layout that any fits, on others those that were good there.

    Of ladders that differ in gammas only, one is looked at in all modes; then, in the best of these, those that its placement makes
    the fastest.
    """
    found: list[_Rough] = []
    good: dict[str, tuple[list[Mode], list[LadderUse]]] = {}
    fastest: dict[str, float] = {}
    for layout in layouts(machine, work.spec, tensor_parallel):
        leading = sorted(fastest, key=lambda name: fastest[name])[:_LEADING_FAMILIES]
        for name, members in groupby(work.ladders, key=_family):
            if leading and name not in leading:
                continue
            family = list(members)
            if family[0].apart and len(layout.stages) * layout.tensor_parallel == 1:
                continue  # there is no other rank
            first = family[len(family) // 2]
            likely, gammas = good.get(name, (None, None))
            mine = list(_rough(work, first, layout, constants, _factors(first, corrections), likely))
            if not mine:
                continue
            mine.sort(key=lambda rough: rough.seconds)
            if gammas is None:
                others = [ladder for ladder in family if ladder is not first]
                others.sort(key=lambda ladder: _cost_as(mine[0], work, ladder, constants, corrections))
                gammas = others[:_LIKELY_GAMMAS]
                good[name] = [Mode(), *(rough.mode for rough in mine[:_GOOD_MODES] if rough.mode != Mode())], gammas
            for ladder in gammas:
                mine += _rough(work, ladder, layout, constants, _factors(ladder, corrections), [mine[0].mode])
            found += mine
            fastest[name] = min(rough.seconds for rough in mine)
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
    pending = modes(ladder, layout) if allowed is None else list(allowed)
    while pending:
        mode = pending.pop(0)
        priced = model.price(mode, factors)
        classes = solver.classify(priced.problem)
        relaxed = solver.relax(classes)
        if relaxed is not None:
            yield _Rough(layout, ladder, mode, relaxed.cost, priced, classes, relaxed)
            if mode == Mode():
                worth = _worth_trying(ladder, layout, True)
                pending = [each for each in pending if each in worth]


def _factors(ladder: LadderUse, corrections: Mapping[str, float] | None) -> list[float]:
    return [factor(corrections, rung.name, ladder.name) or 1.0 for rung in ladder.rungs]


def _place(model: CostModel, same: list[_Rough], factors: list[float], gap: float) -> tuple[Priced, solver.Solution, Mode] | None:
    """The best placement of a ladder on its layout over all of `same`, its modes, with a bound that holds for all of them; the first
    wins a tie within a quarter of the gap. None where whole groups fit in none."""
    bounds: list[float] = []
    taken: tuple[Priced, solver.Solution, Mode] | None = None
    for rough in same:
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
        bounds.append(relaxed.cost if solution is None else solution.bound)
        if solution is not None and (taken is None or solution.cost < taken[1].cost * (1 - gap / 4)):
            taken = priced, solution, rough.mode
    if taken is None:
        return None
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
    mine = [rough for rough in roughs if rough.ladder is best.ladder and rough.layout is best.layout]
    tried = {rough.mode for rough in mine}
    if Mode() not in tried:
        model = CostModel(work, best.ladder, best.layout, constants, COARSE_GROUPS * work.spec.num_layers)
        missing = math.ceil(_missing_bytes(model, Mode(), "GPU") / GIB * 10) / 10
        told.append(Alternative(Mode().name, None, f"does not fit: {missing:.1f} GiB more are needed on each GPU"))
    for rough in sorted(mine, key=lambda each: each.seconds):
        if rough.mode != best.mode and rough.seconds > best.seconds * (1 + 1e-9):
            told.append(_alternative(rough.mode.name, rough, seconds, best))
    for layout in layouts(machine, work.spec, tensor_parallel):
        if layout == best.layout:
            continue
        others = [rough for rough in roughs if rough.layout == layout]
        if others:
            told.append(_alternative(layout.name, min(others, key=lambda each: each.seconds), seconds, best))
        else:
            told.append(Alternative(layout.name, None, "does not fit"))
    for ladder in reversed(_first_of_families(work.ladders)):
        family = _family(ladder)
        if family == _family(best.ladder):
            continue
        others = [rough for rough in roughs if _family(rough.ladder) == family]
        if others:
            fastest = min(others, key=lambda each: _preferred(each, 0.0))
            told.append(_alternative(f"ladder {fastest.ladder.name}", fastest, seconds, best))
        else:
            told.append(Alternative(f"ladder {ladder.name}", None, "does not fit"))
    return told


def _alternative(what: str, rough: _Rough, seconds: float, best: _Rough) -> Alternative:
    """Its seconds are those of coarse groups, in the proportion that the taken plan's have."""
    at = rough.seconds * seconds / best.seconds
    why = ", and no engine executes it yet" * (_is_pipeline(rough.layout) and rough.layout != best.layout)
    return Alternative(what, at, f"{at / seconds:.2f} times the time: {_waits_for(rough)}{why}")


def _waits_for(rough: _Rough) -> str:
    """The link that most of a token's time is waited for, by the relaxed program's prices."""
    problem, prices = rough.classes.problem, rough.relaxed.prices
    ends = problem.base + (problem.seconds * rough.relaxed.counts[None]).sum(axis=(1, 2))
    waited = {"launches": problem.constant}
    for chain, price, end in zip(rough.priced.chains, prices, ends, strict=True):
        waited[chain.link] = waited.get(chain.link, 0.0) + float(price * end)
    return f"it waits for the {max(waited, key=lambda name: waited[name])}"


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
    promising = list(dict.fromkeys([Mode(), *(rough.mode for rough in likely)]))
    found = []
    for name, changed in changes.items():
        if changed == machine:
            continue
        layout = next(each for each in layouts(changed, work.spec, best.layout.tensor_parallel) if each.name == best.layout.name)
        roughs = _rough(work, best.ladder, layout, constants, _factors(best.ladder, corrections), promising)
        least = min((rough.seconds for rough in roughs), default=None)
        found.append(WhatIf(name, None if least is None else least * seconds / best.seconds))
    return found


def _nearest_change(work: Workload, machine: Machine, tensor_parallel: int | None, constants: Constants) -> str:
    """One sentence: what is short, and the smallest change of each kind that fits."""
    plans = layouts(machine, work.spec, tensor_parallel)

    def missing(asked: Workload, kind: str, ladders: tuple[LadderUse, ...] = work.ladders) -> float:
        """Bytes more of one kind; infinity where no amount is enough."""
        least = sorted(_first_of_families(ladders), key=lambda ladder: ladder.fixed_bytes + ladder.shared_bytes)[:_LEAST_LADDERS]
        return min(
            (
                _missing_bytes(CostModel(asked, ladder, layout, constants, COARSE_GROUPS * asked.spec.num_layers), mode, kind)
                for layout in plans
                for ladder in least
                for mode in _roomiest(ladder, layout)
            ),
            default=math.inf,
        )

    ways = []
    for kind, told in (("GPU", "more on each GPU"), ("host", "more host memory")):
        more = missing(work, kind) if kind == "host" or machine.num_gpus else math.inf
        if more < math.inf:
            amount = f"{math.ceil(more / GIB * 10) / 10:.1f} GiB" if more > GIB else f"{math.ceil(more / (1 << 20))} MiB"
            ways.append(f"{amount} {told}")

    def fits(asked: Workload) -> bool:
        return missing(asked, "host") <= 0

    low, high = 0, work.context
    while high - low > max(64, low // 32):
        middle = (low + high) // 2
        if fits(replace(work, context=middle, prompt=max(1, min(work.prompt, middle - 1)))):
            low = middle
        else:
            high = middle
    if low:
        ways.append(f"a context of {low // 64 * 64 or low} tokens")
    if work.batch > 1 and fits(replace(work, batch=1)):
        ways.append("a batch of 1")
    named = next((ladder for ladder in _first_of_families(work.fallbacks) if missing(work, "host", (ladder,)) <= 0), None)
    if named is not None:
        ways.append(f"the ladder {named.name} in mode approximate")
    told = f"{work.model} with a context of {work.context} tokens and {work.batch} sequence{'s' * (work.batch > 1)} does not fit"
    told += f" on {machine.describe()}"
    return f"{told}: it would with {', or '.join(ways)}" if ways else f"{told}: use a smaller model"


def _roomiest(ladder: LadderUse, layout: Layout) -> list[Mode]:
    """The modes that fit where any does, but for the buffers that a mode with more ways has beside one with fewer."""
    found = modes(ladder, layout)
    return [found[-1], *(mode for mode in found if mode in (Mode(), Mode(streamed=True), Mode(streamed=True, kv_away=True)))]


def _missing_bytes(model: CostModel, mode: Mode, kind: str) -> float:
    """How many bytes more on every GPU ("GPU"), or on every host ("host"), all parts need to have a place; 0: none."""
    import numpy as np

    priced = model.price(mode)
    on_cpu, constants = model.layout.on_cpu, model.constants
    gains = np.zeros(len(priced.limits))
    for row, name in enumerate(priced.limits):
        if name.startswith("GPU") and kind == "GPU":
            gains[row] = 1 - constants.margin_share
        elif not name.startswith("GPU") and kind == "host":
            host = model.layout.machine.nodes[int(name.split()[-1])].host
            gains[row] = host.pin_bytes / host.memory_bytes if name.startswith("pinned") else 1.0
    assert gains.any() or on_cpu
    return solver.missing(solver.classify(priced.problem), gains)


def _first_of_families(ladders: tuple[LadderUse, ...]) -> list[LadderUse]:
    return list({_family(ladder): ladder for ladder in reversed(ladders)}.values())
