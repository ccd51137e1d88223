"""What neither GPU nor host memory holds goes to disk: whole layers, the last ones first. Torch-free.

The planner knows no disk. It is asked with as much host memory as it wants; what it keeps on the GPU then goes to the first layers,
what the host has room for to the next ones, and the others are read from the checkpoint's files in every pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rowcast.placement.constants import STREAM_BYTES, Constants
from rowcast.placement.forecast import DeviceMemory, Forecast, RungTime, Share, Stage
from rowcast.placement.hardware import Machine
from rowcast.placement.resident import MAX_BATCH_TOKENS
from rowcast.placement.units import format_bytes
from rowcast.runtime.ladder.spec import Ladder
from rowcast.runtime.offloaded.tiers import DISK, RESIDENT, STREAMED
from rowcast.runtime.spec import ModelSpec, layer_parameters

BUFFERS = 3
"""`offload.disk.BUFFERS`, which would take torch to import."""

_PARTS = ("attention", "neurons")
"""Of a layer, what may lie there."""


def with_host_memory(machine: Machine, more_bytes: int) -> Machine:
    """The machine with so much more of it, all of which may be pinned."""
    nodes = []
    for node in machine.nodes:
        host = replace(node.host, memory_bytes=node.host.memory_bytes + more_bytes, pin_bytes=node.host.pin_bytes + more_bytes)
        nodes.append(replace(node, host=host))
    return replace(machine, nodes=tuple(nodes))


def chooses_rows(ladder: str) -> str | None:
    """The rung that cannot read from disk, as it chooses what it reads; None: there is none."""
    return next((str(rung) for rung in Ladder.parse(ladder).rungs if rung.sparse), None)


@dataclass(frozen=True, slots=True)
class OnDisk:
    """A forecast with layers on disk."""

    forecast: Forecast
    layers: int
    bytes: int
    pass_s: float
    """Of reading them once."""

    def told(self, layers: int) -> str:
        """For notes and warnings. `layers`: of the model."""
        return (
            f"{format_bytes(self.bytes)} of weights, the last {self.layers} of {layers} layers, have no room in host memory and are "
            f"read from disk in every pass, which takes {self.pass_s:.3g} s at the {self.bytes / self.pass_s / 1e9:.2f} GB/s that it "
            f"was measured to give: about {self.forecast.tokens_per_s:.2g} tokens/s"
        )


def to_disk(
    forecast: Forecast, spec: ModelSpec, width: int, machine: Machine, constants: Constants, rate: Callable[[], float]
) -> OnDisk | None:
    """A forecast of one GPU with more host memory than `machine` has, for the one that it has; None where layers are not all that is
    too much.

    `width`: bytes of a weight. `rate`: measures the disk, in bytes/s.
    """
    host, ring = machine.nodes[0].host, 2 * min(layer_parameters(spec) * width, STREAM_BYTES)
    gpu = next(each for each in forecast.memory if each.card != "host")
    there = next(each for each in forecast.memory if each.card == "host")
    layered = [share for share in forecast.shares if share.part in _PARTS]
    others = [share for share in forecast.shares if share.part not in _PARTS]
    whole = sum(share.bytes for share in layered)
    near = sum(share.bytes for share in layered if share.tier == RESIDENT)
    staging = BUFFERS * ring // 4
    unlayered = there.classes["weights"] - (whole - near)
    pinned = there.classes["KV"] + sum(share.bytes for share in others if share.part != "KV" and share.tier == STREAMED)
    system = min(constants.host_margin_bytes, host.memory_bytes)
    room = min(host.memory_bytes - system - unlayered - there.classes["KV"], host.pin_bytes - pinned) - staging
    if room < 0:
        return None
    # Buffers that a placement without streaming has none of.
    spare = max(0, gpu.classes["margin"] - round(constants.margin_share * gpu.budget_bytes))
    lacking = max(0, ring - gpu.classes["buffers"] - spare)
    sizes = _sizes(layered, spec.num_layers)
    count = 0
    while True:
        dealt = _dealt(layered[0].ranks, sizes[: spec.num_layers - count], max(0, near - lacking))
        streamed = sum(share.bytes for share in dealt if share.tier == STREAMED)
        if streamed <= room:
            break
        count += 1
    away = [
        Share(layered[0].ranks, part, i, DISK, 0, of, of, size) for i, part, of, size in _flat(sizes, spec.num_layers - count)
    ]
    disk_bytes = sum(share.bytes for share in away)
    held = sum(share.bytes for share in dealt if share.tier == RESIDENT)
    memory = [
        _holding(gpu, gpu.budget_bytes, weights=gpu.classes["weights"] - near + held, buffers=max(gpu.classes["buffers"], ring)),
        _holding(there, host.memory_bytes, weights=unlayered + streamed, buffers=staging, work=system),
    ]
    changed = replace(
        forecast, memory=memory, shares=[*others, *dealt, *away], machine=machine.describe(), alternatives=[], what_if=[]
    )
    seconds = disk_bytes / rate()
    return OnDisk(_slower(changed, seconds, disk_bytes, disk_bytes / max(1, whole - near)), count, disk_bytes, seconds)


_Sizes = Sequence[tuple[int, dict[str, tuple[int, int]]]]
"""By layer: its number; by part: groups, bytes."""


def _sizes(shares: Sequence[Share], layers: int) -> _Sizes:
    found: list[tuple[int, dict[str, tuple[int, int]]]] = [(layer, {}) for layer in range(layers)]
    for share in shares:
        parts = found[share.layer][1]
        parts[share.part] = share.of, parts.get(share.part, (0, 0))[1] + share.bytes
    return found


def _flat(sizes: _Sizes, first: int) -> list[tuple[int, str, int, int]]:
    return [(layer, part, *parts[part]) for layer, parts in sizes[first:] for part in _PARTS]


def _dealt(ranks: list[int], sizes: _Sizes, near: int) -> list[Share]:
    """The first groups next to the compute, as far as there is room for them, the others in host memory."""
    found = []
    for layer, part, of, size in _flat(sizes, 0):
        count = min(of, near * of // size)
        here = size * count // of
        near -= here
        for tier, first, groups, held in ((RESIDENT, 0, count, here), (STREAMED, count, of - count, size - here)):
            if groups:
                found.append(Share(ranks, part, layer, tier, first, groups, of, held))
    return found


def _holding(device: DeviceMemory, budget: int, **classes: int) -> DeviceMemory:
    """With these classes, the rest as margin."""
    held = device.classes | classes | {"margin": 0}
    return replace(device, budget_bytes=budget, classes=held | {"margin": budget - sum(held.values())})


def _slower(forecast: Forecast, seconds: float, disk_bytes: int, share: float) -> Forecast:
    """With passes that read so many bytes from disk. `share`: of what came from host memory before."""
    rungs, stages, more = list[RungTime](), list(forecast.stages), 0.0
    for rung in forecast.rungs:
        [kind] = Ladder.parse(rung.rung).rungs
        if kind.kind in ("plain", "self") and kind.bits is None:
            pass_s = seconds + rung.pass_s * (1 - share)
            more += rung.passes_per_token * (pass_s - rung.pass_s)
            each = rung.passes_per_token
            stages.append(Stage(rung.rung, "layers on disk", {"disk": each * disk_bytes}, {"disk": each * seconds}))
            rung = replace(rung, pass_s=pass_s, bound_by="disk" if seconds > 0.5 * pass_s else rung.bound_by)
        rungs.append(rung)
    told = forecast.seconds_per_token + more
    read_s = sum(stage.seconds.get("disk", 0.0) for stage in stages)
    ratio = forecast.seconds_per_token / told
    first = forecast.prompt and -(-forecast.prompt // MAX_BATCH_TOKENS) * seconds
    changed = replace(
        forecast,
        rungs=rungs,
        stages=stages,
        seconds_per_token=told,
        tokens_per_s=forecast.tokens_per_s * ratio,
        tokens_per_s_range=[each * ratio for each in forecast.tokens_per_s_range],
        first_token_s=forecast.first_token_s + first,
    )
    if read_s > 0.5 * told:
        changed = replace(changed, bottleneck="disk", bottleneck_share=min(1.0, read_s / told))
    return changed
