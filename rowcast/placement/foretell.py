"""From a solved placement to what a plan tells of it: memory, stages, the bottleneck, ranges. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from rowcast.placement.corrections import factor
from rowcast.placement.costs import CPU, HOST, PEER, RESIDENT, ROWS, STREAMED, CostModel, Mode, Priced
from rowcast.placement.forecast import (
    MEMORY_CLASSES,
    TIERS,
    Alternative,
    DeviceMemory,
    Forecast,
    RungTime,
    Share,
    Stage,
    WhatIf,
)
from rowcast.placement.groups import KV, PARTS
from rowcast.placement.solver import Solution
from rowcast.placement.workload import Input, LadderUse, Workload

TIER_NAMES = {RESIDENT: "resident", STREAMED: "streamed", ROWS: "rows", CPU: "cpu", HOST: "host"}
assert set(TIER_NAMES.values()) | {"peer", "disk"} == set(TIERS)

_TIED = 0.02
"""A link that takes so much less of a stage than the slowest one is waited for as well: placements even them out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What the planner decided."""

    work: Workload
    ladder: LadderUse
    model: CostModel
    mode: Mode
    priced: Priced
    solution: Solution
    greedy: float | None
    """Seconds of the greedy baseline."""
    solver_s: float


def foretell(
    found: Found, corrections: Mapping[str, float] | None, alternatives: list[Alternative], what_if: list[WhatIf]
) -> Forecast:
    """All that the plan file says of the placement."""
    work, ladder, layout = found.work, found.ladder, found.model.layout
    seconds = found.solution.cost
    rungs, waited = _rungs(found)
    bottleneck = max(waited, key=lambda link: waited[link])
    machine = layout.machine
    bus, kv_bus = _away_bytes(found)
    constants = found.model.constants
    return Forecast(
        model=work.model,
        machine=machine.describe(),
        gpus=[card.name for card in machine.cards],
        layout=layout.name,
        tensor_parallel=layout.tensor_parallel,
        pipeline_stages=len(layout.stages),
        context=work.context,
        prompt=work.prompt,
        batch=work.batch,
        ladder=ladder.name,
        seconds_per_token=seconds,
        tokens_per_s=work.batch / seconds,
        tokens_per_s_range=_range(found),
        first_token_s=found.model.first_token_s(bus, kv_bus),
        tokens_per_round=ladder.tokens_per_round,
        bottleneck=bottleneck,
        bottleneck_share=min(1.0, waited[bottleneck] / seconds),
        gap=found.solution.gap,
        solver_s=found.solver_s,
        greedy_seconds_per_token=found.greedy,
        groups=int(sum(len(site.ranks) for site in layout.sites) / len(layout.sites) * len(found.priced.groups)),
        memory=_memory(found),
        rungs=rungs,
        stages=_stages(found),
        shares=_shares(found),
        alternatives=alternatives,
        what_if=what_if,
        inputs=_inputs(found, corrections),
        notes=[f"placement: {found.mode.name}", f"all rates and calls may be {constants.spread:.0%} off: the ends of the range"],
    )


def _rungs(found: Found) -> tuple[list[RungTime], dict[str, float]]:
    """Each rung's passes, and the seconds of a committed token by what is waited for: where several links take a stage as long, by
    each of them, so that together they may be more than all."""
    priced, tiers = found.priced, found.solution.tiers
    problem, count = priced.problem, len(found.model.layout.stages)
    ends = problem.base + problem.seconds[:, range(len(tiers)), tiers].sum(axis=1)
    waited: dict[str, float] = {"launches": found.model.constants.round_s / found.ladder.tokens_per_round}
    told = []
    for k, rung in enumerate(found.ladder.rungs):
        per_token = rung.passes / found.ladder.tokens_per_round
        launches, sums = priced.launches[k]
        spent = {"launches": launches, "network" if len(found.model.layout.machine.nodes) > 1 else "peers": sums}
        pass_s = sum(spent.values())
        for stage in range(count):
            mine = [i for i, chain in enumerate(priced.chains) if (chain.rung, chain.stage) == (k, stage)]
            longest = {priced.chains[i].link: float(ends[i]) for i in sorted(mine, key=lambda i: ends[i])}
            slowest = max(longest.values())
            pass_s += slowest
            for link, seconds in longest.items():
                if seconds >= slowest * (1 - _TIED):
                    spent[link] = spent.get(link, 0.0) + seconds
        for link, seconds in spent.items():
            waited[link] = waited.get(link, 0.0) + per_token * seconds
        bound_by = max(spent, key=lambda link: spent[link])
        told.append(RungTime(rung.name, per_token, pass_s, bound_by, _overlap(found.mode, rung.ahead)))
    for seconds in _renewed(found).values():
        waited["bus"] = waited.get("bus", 0.0) + seconds
    return told, waited


def _renewed(found: Found) -> dict[int, float]:
    """Seconds of a committed token in which views of a few entries copy them anew, by stage: the slowest site's."""
    problem, tiers, last = found.priced.problem, found.solution.tiers, len(found.ladder.rungs)
    seconds: dict[int, float] = {}
    for i, chain in enumerate(found.priced.chains):
        if chain.rung == last:
            end = float(problem.seconds[i, range(len(tiers)), tiers].sum()) / found.ladder.tokens_per_round
            seconds[chain.stage] = max(seconds.get(chain.stage, 0.0), end)
    return seconds


def _overlap(mode: Mode, ahead: bool) -> str:
    ways = ["calls of kernels and sums over ranks add all their time"]
    if mode.streamed:
        ways.insert(0, "whole layers are copied ahead, while everything else runs")
    if mode.rows:
        ways.insert(
            0,
            "rows are fetched while attention runs" if ahead else "rows are fetched once they are known, and waited for",
        )
    if mode.cpu:
        ways.insert(0, "the CPU computes its neurons while the GPU computes its own")
    if mode.kv_away:
        ways.insert(0, "KV is copied a layer ahead")
    return "; ".join(ways)


def _memory(found: Found) -> list[DeviceMemory]:
    """Of every GPU and every host."""
    import numpy as np

    priced, tiers, layout = found.priced, found.solution.tiers, found.model.layout
    problem, groups = priced.problem, priced.groups
    used = problem.bytes[:, range(len(tiers)), tiers]  # [M, G]
    devices = []
    for i, site in enumerate(layout.sites):
        classes = dict(priced.fixed[i])
        kv = groups.part == KV
        classes["weights"] += round(float(used[i, ~kv].sum()))
        classes["KV"] = round(float(used[i, kv].sum()))
        classes["margin"] += site.card.memory_bytes - sum(classes.values())
        ordered = {name: classes.get(name, 0) for name in MEMORY_CLASSES}
        devices += [
            DeviceMemory("host" if layout.on_cpu else f"GPU {rank}", site.card.name, site.card.memory_bytes, ordered)
            for rank in site.ranks
        ]
    devices.sort(key=lambda device: int(device.device.split()[-1]) if device.device != "host" else 0)
    if not layout.on_cpu:
        for n, node in enumerate(layout.machine.nodes):
            row = priced.limits.index(f"host of node {n}")
            kv = groups.part == KV
            classes = dict.fromkeys(MEMORY_CLASSES, 0)
            classes["weights"], classes["KV"] = round(float(used[row, ~kv].sum())), round(float(used[row, kv].sum()))
            classes["work"] = min(found.model.constants.host_margin_bytes, node.host.memory_bytes)
            classes["margin"] = node.host.memory_bytes - sum(classes.values())
            devices.append(DeviceMemory(f"host of node {n}", "host", node.host.memory_bytes, classes))
    assert all(np.isfinite(device.budget_bytes) for device in devices)
    return devices


def _stages(found: Found) -> list[Stage]:
    """Bytes and seconds of each rung's parts, for a committed token."""
    import numpy as np

    priced, tiers, layout, work = found.priced, found.solution.tiers, found.model.layout, found.work
    groups, rows = priced.groups, range(len(tiers))
    told = []
    for k, rung in enumerate(found.ladder.rungs):
        per_token = rung.passes / found.ladder.tokens_per_round
        reads = (found.model.reads_away() if found.mode.kv_away else groups.reads)[k]
        ranks = np.array([len(site.ranks) for site in layout.sites])[groups.site]
        read, whole = groups.bytes * reads, groups.bytes * (reads > 0)
        memory_link = "host memory" if layout.on_cpu else "GPU memory"
        others = {
            "bus": np.select([tiers == STREAMED, tiers == ROWS], [whole, read * (1 - work.hit_rate)], 0.0),
            "host memory": np.select(
                [tiers == STREAMED, tiers == ROWS, tiers == CPU], [whole, read * (1 - work.hit_rate), read], 0.0
            ),
            "peers": np.where(tiers >= PEER, read, 0.0),
        }
        bytes_by = others | {
            memory_link: np.select(
                [tiers == RESIDENT, tiers == STREAMED, (tiers == ROWS) | (tiers >= PEER)], [read, read + whole, 2 * read], 0.0
            ),
        }
        seconds_by = {link: np.zeros(len(tiers)) for link in (*bytes_by, "CPU")}
        seen: set[tuple[int, int, str]] = set()
        for i, chain in enumerate(priced.chains):
            key = chain.stage, chain.site, chain.link
            if chain.rung != k or key in seen or chain.link not in seconds_by or chain.link == "CPU":
                continue
            seen.add(key)
            mine = priced.problem.seconds[i, rows, tiers]
            seconds_by[chain.link] = np.maximum(seconds_by[chain.link], mine)
        seconds_by["CPU"] = np.where(tiers == CPU, seconds_by["host memory"], 0.0)
        for part, name in enumerate(PARTS):
            mine = groups.part == part
            if not mine.any() or not reads[mine].any():
                continue
            told.append(
                Stage(
                    rung.name,
                    name,
                    {link: float((by * ranks)[mine].sum()) * per_token for link, by in bytes_by.items() if by[mine].any()},
                    {
                        link: _slowest(by[mine], groups.site[mine], layout.sites) * per_token
                        for link, by in seconds_by.items()
                        if by[mine].any()
                    },
                )
            )
        fixed = sum(
            max((found.model.fixed_read_seconds(s, rung, found.mode) for s in layout.sites if s.stage == stage), default=0.0)
            for stage in range(len(layout.stages))
        )
        if fixed:
            name = "draft" if rung.model is not None else "own weights, proxies and copies of KV"
            read_bytes = sum(
                bytes_ * (len(site.ranks) if rung.at == "ranks" else 1)
                for site in (layout.sites if rung.at == "ranks" else layout.sites[:1])
                for bytes_, _ in found.model.fixed_reads(site, rung, found.mode)
            )
            link = "host memory" if rung.at == "driver" else memory_link
            told.append(Stage(rung.name, name, {link: read_bytes * per_token}, {link: fixed * per_token}))
        launches, sums = priced.launches[k]
        told.append(Stage(rung.name, "launches", {}, {"launches": launches * per_token}))
        if sums:
            link = "network" if len(layout.machine.nodes) > 1 else "peers"
            told.append(Stage(rung.name, "collectives", {}, {link: sums * per_token}))
    if renewed := sum(_renewed(found).values()):
        rung = max(found.ladder.rungs, key=lambda rung: rung.renewed)
        away = groups.bytes * ranks * ((groups.part == KV) & (tiers == STREAMED))
        copied = sum(min(1.0, rung.renewed / work.context) * rung.sequences for rung in found.ladder.rungs)
        moved = float(away.sum()) * copied / found.ladder.tokens_per_round
        told.append(Stage(rung.name, "entries copied anew", {"bus": moved}, {"bus": renewed}))
    return told


def _slowest(seconds: Sequence[float], site: Sequence[int], sites: Sequence[object]) -> float:
    """Of the sites' sums, the stages' one after another: an upper end where sites of one stage differ."""
    import numpy as np

    sums = np.bincount(np.asarray(site), np.asarray(seconds), len(sites))
    by_stage: dict[int, float] = {}
    for index, each in enumerate(sites):
        stage = each.stage  # type: ignore[attr-defined]
        by_stage[stage] = max(by_stage.get(stage, 0.0), float(sums[index]))
    return sum(by_stage.values())


def _shares(found: Found) -> list[Share]:
    """Runs of neighbouring groups in one tier, layer by layer."""
    groups, tiers, sites = found.priced.groups, found.solution.tiers, found.model.layout.sites
    keys = list(
        zip(
            groups.site.tolist(),
            groups.part.tolist(),
            groups.layer.tolist(),
            groups.index.tolist(),
            tiers.tolist(),
            groups.of.tolist(),
            groups.bytes.tolist(),
            strict=True,
        )
    )
    keys.sort()
    told: list[Share] = []
    for (site, part, layer), members in groupby(keys, key=lambda key: key[:3]):
        for tier, run in groupby(members, key=lambda key: key[4]):
            held = list(run)
            name = TIER_NAMES.get(tier, "peer")
            first, of = held[0][3], held[0][5]
            bytes_ = round(sum(key[6] for key in held))
            told.append(Share(list(sites[site].ranks), PARTS[part], layer, name, first, len(held), of, bytes_))
    return told


def _away_bytes(found: Found) -> tuple[float, float]:
    """Weights, and KV of one sequence, of one rank that cross the bus in a pass over everything; the fullest rank's."""
    import numpy as np

    groups, tiers = found.priced.groups, found.solution.tiers
    away = np.where((tiers == STREAMED) | (tiers == ROWS) | (tiers == CPU), groups.bytes, 0.0)
    weights = np.bincount(groups.site, away * (groups.part != KV))
    kv = np.bincount(groups.site, away * (groups.part == KV))
    return float(weights.max()), float(kv.max()) / found.work.batch


def _range(found: Found) -> list[float]:
    """Tokens/s of all sequences where all rates and calls, and acceptances, are as bad, and as good, as they may be."""
    spread, mid = found.model.constants.spread, found.work.batch / found.solution.cost
    low, high = found.ladder.tokens_per_round_range
    return [
        mid * min(1.0, low / found.ladder.tokens_per_round) * (1 - spread),
        mid * max(1.0, high / found.ladder.tokens_per_round) * (1 + spread),
    ]


def _inputs(found: Found, corrections: Mapping[str, float] | None) -> list[Input]:
    """What the prediction rests on."""
    layout, work = found.model.layout, found.work
    told: list[Input] = []
    for card in dict.fromkeys(site.card for site in layout.sites):
        told.append(
            Input(f"{card.name}: memory rate, bytes/s", card.memory_rate.value, card.memory_rate.origin, card.memory_rate.source)
        )
        if not layout.on_cpu:
            told.append(Input(f"{card.name}: bus rate, bytes/s", card.bus_rate.value, card.bus_rate.origin, card.bus_rate.source))
        told.append(Input(f"{card.name}: dense rate, operations/s", card.flops.value, card.flops.origin, card.flops.source))
    for n, node in enumerate(layout.machine.nodes):
        host = node.host
        told.append(Input(f"node {n}: host memory, bytes", host.memory_bytes, host.memory_origin))
        told.append(
            Input(
                f"node {n}: host memory rate, bytes/s", host.memory_rate.value, host.memory_rate.origin, host.memory_rate.source
            )
        )
        for products in host.products:
            if products.width == work.width and not layout.on_cpu:
                rates = (("all", products.whole), ("chosen", products.chosen))
                told += [
                    Input(f"node {n}: {which} neurons by the CPU, bytes/s", r.value, r.origin, r.source) for which, r in rates
                ]
    if (rate := layout.machine.inter_node_rate) is not None:
        told.append(Input("between nodes, bytes/s", rate.value, rate.origin, rate.source))
    told += [*work.inputs, *found.ladder.inputs]
    told += [
        Input(f"{rung.name}: measured over predicted", ratio, "measured", "earlier runs of this machine")
        for rung in found.ladder.rungs
        if (ratio := factor(corrections, rung.name, found.ladder.name)) is not None
    ]
    if any(rung.neurons < 1 for rung in found.ladder.rungs):
        layers = work.hotness.layers
        mean = sum(map(sum, layers)) / sum(map(len, layers))
        told.append(Input("neurons needed by a token, mean share", mean, work.hotness.origin, work.hotness.source))
        told.append(Input("hit rate of the row cache", work.hit_rate, "given" if work.hit_rate else "assumed"))
    return told
