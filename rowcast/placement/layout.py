"""Which rank holds which share: tensor-parallel groups, pipeline stages, and ranks that are alike. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rowcast.errors import UserError
from rowcast.placement.hardware import Card, Machine
from rowcast.runtime.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Ranks of one stage with equal cards: they hold equal shares and are planned as one."""

    card: Card
    ranks: tuple[int, ...]
    stage: int
    node: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A tensor-parallel group and its layers."""

    layers: range
    nodes: tuple[int, ...]
    """More than one where the group crosses nodes."""
    link: str
    """nvlink, pcie, host or network: what its sums cross; the slowest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A machine divided among a model's ranks. Without a GPU the CPU is the one rank."""

    machine: Machine
    tensor_parallel: int
    stages: tuple[Stage, ...]
    sites: tuple[Site, ...]

    @property
    def name(self) -> str:
        count, pipeline = self.machine.num_gpus, len(self.stages)
        if count == 0:
            return "on the CPU"
        if count == 1:
            return "on one GPU"
        ways = [f"tensor parallel over {self.tensor_parallel} GPUs"] * (self.tensor_parallel > 1)
        ways += [f"a pipeline of {pipeline} stages"] * (pipeline > 1)
        return ", ".join(ways)

    @property
    def on_cpu(self) -> bool:
        return self.machine.num_gpus == 0

    def hop_s(self, stage: int, bytes_: float, start_s: float, share: float) -> float:
        """Seconds that a stage's output takes to the next one; 0 after the last. Within a node `start_s`, and its bytes at that share
        of the link's rate."""
        if stage + 1 == len(self.stages):
            return 0.0
        here, there = self.stages[stage].nodes[-1], self.stages[stage + 1].nodes[0]
        if here == there:
            return start_s + bytes_ / (share * self.machine.nodes[here].peer_rate.value)
        assert self.machine.inter_node_rate is not None
        return self.machine.inter_node_latency_s + bytes_ / self.machine.inter_node_rate.value


def layouts(machine: Machine, spec: ModelSpec, tensor_parallel: int | None = None) -> list[Layout]:
    """All GPUs, as tensor-parallel groups in a pipeline: the widest groups first. `tensor_parallel`: of that width only.

    Raises UserError where the width divides neither the GPUs nor the model's heads.
    """
    count = machine.num_gpus
    if count == 0:
        if tensor_parallel not in (None, 1):
            raise UserError(
                f"tensor_parallel={tensor_parallel} on a machine without a GPU: leave it out, or name GPUs with --gpus"
            )
        return [_cpu_layout(machine, spec)]
    if tensor_parallel is not None and (tensor_parallel < 1 or count % tensor_parallel or not divides(spec, tensor_parallel)):
        fits = ", ".join(str(tp) for tp in range(1, count + 1) if count % tp == 0 and divides(spec, tp))
        raise UserError(
            f"tensor_parallel={tensor_parallel} has to divide {count} GPUs and the model's {spec.num_heads} heads of "
            f"{spec.num_kv_heads} KV heads: use {fits}"
        )
    possible = [n for n in range(1, count + 1) if any(_shares(spec, n, tp) for tp in range(1, n + 1))]
    if count not in possible:
        raise UserError(
            f"{count} GPUs cannot share the model's {spec.num_heads} heads and {spec.num_layers} layers evenly: use "
            f"{', '.join(map(str, possible[-6:]))}"
        )
    widths = [tensor_parallel] if tensor_parallel is not None else [tp for tp in range(count, 0, -1) if count % tp == 0]
    return [_layout(machine, spec, tp) for tp in widths if _shares(spec, count, tp)]


def _shares(spec: ModelSpec, count: int, tp: int) -> bool:
    """Whether so many GPUs, in tensor-parallel groups of `tp`, have equal shares and a layer each."""
    return count % tp == 0 and divides(spec, tp) and count // tp <= spec.num_layers


def divides(spec: ModelSpec, tp: int) -> bool:
    """Query heads in equal parts, KV heads in equal parts or whole copies, neurons in equal parts."""
    kv = spec.num_kv_heads
    return spec.num_heads % tp == 0 and (kv % tp == 0 or tp % kv == 0) and spec.intermediate_size % tp == 0


def _layout(machine: Machine, spec: ModelSpec, tp: int) -> Layout:
    node_of = [index for index, node in enumerate(machine.nodes) for _ in node.cards]
    cards = machine.cards
    groups = [range(first, first + tp) for first in range(0, len(cards), tp)]
    memory = [tp * min(cards[rank].memory_bytes for rank in group) for group in groups]
    stages, sites, layer = [], [], 0
    for index, group in enumerate(groups):
        left = len(groups) - index - 1
        share = round((spec.num_layers - layer) * memory[index] / sum(memory[index:]))
        end = min(max(layer + 1, layer + share), spec.num_layers - left) if left else spec.num_layers
        nodes = tuple(sorted({node_of[rank] for rank in group}))
        link = "network" if len(nodes) > 1 else machine.nodes[nodes[0]].link
        stages.append(Stage(layers=range(layer, end), nodes=nodes, link=link))
        layer = end
        for node in nodes:
            mine = [rank for rank in group if node_of[rank] == node]
            for card in dict.fromkeys(cards[rank] for rank in mine):
                ranks = tuple(rank for rank in mine if cards[rank] == card)
                sites.append(Site(card=card, ranks=ranks, stage=index, node=node))
    return Layout(machine=machine, tensor_parallel=tp, stages=tuple(stages), sites=tuple(sites))


def _cpu_layout(machine: Machine, spec: ModelSpec) -> Layout:
    host = machine.nodes[0].host
    none = replace(host.memory_rate, value=0.0)
    card = Card(
        name="CPU",
        memory_bytes=host.memory_bytes,
        nominal_gib=host.memory_bytes >> 30,
        memory_rate=host.memory_rate,
        bus_rate=none,
        peer_rate=none,
        flops=host.flops,
        peer_access=False,
    )
    stage = Stage(layers=range(spec.num_layers), nodes=(0,), link="host")
    return Layout(machine=machine, tensor_parallel=1, stages=(stage,), sites=(Site(card=card, ranks=(0,), stage=0, node=0),))
