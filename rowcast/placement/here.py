"""This machine as a plan sees it: as it was probed, else as its driver and the table of cards have it, else its CPU. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rowcast.errors import UserError
from rowcast.placement import cache, host, nvml
from rowcast.placement.cards import known_card
from rowcast.placement.hardware import PCIE_LANE_RATE, Card, Host, Link, Machine, Node, Quantity, assumed_flops, assumed_host
from rowcast.placement.measured import HostProbe, measured_host
from rowcast.placement.nvml import DriverFacts, DriverGpu
from rowcast.placement.units import format_bytes

_MEASURE = "measure them with rowcast probe"

_CORE_RATE = 12e9
"""Bytes/s that one core takes from memory. Assumed."""


@dataclass(frozen=True, slots=True)
class Here:
    """This machine, and how it is known."""

    machine: Machine
    told: str
    """For the plan's notes."""


def this_machine(*, gpu_memory_bytes: int | None = None, host_memory_bytes: int | None = None) -> Here:
    """The GPUs of this machine with its host, or its CPU where it has none; at most so much memory of each, and all that a card has for
    the size that it is sold as.

    Raises UserError for a card that is neither in the table nor probed, and for more memory than there is.
    """
    probe, driver = cache.load_probe(), nvml.read()
    gpus = _visible(driver, os.environ) if driver is not None else ()
    if probe is not None and probe.gpus and gpus:
        found = Here(probe.machine(), "machine: as rowcast probe measured it")
    elif driver is not None and gpus:
        found = Here(_by_table(driver, gpus), f"machine: cards by their datasheets, the host's rates are assumed; {_MEASURE}")
    elif probe is not None and not probe.gpus:
        found = Here(
            _cpu(_probed_host(probe.host)), "machine: the CPU, as no GPU is visible; rates as rowcast probe measured them"
        )
    else:
        found = Here(_cpu(_assumed_cpu()), f"machine: the CPU, as no GPU is visible; its rates are assumed, {_MEASURE}")
    machine = found.machine
    if gpu_memory_bytes is not None:
        if not machine.cards:
            amount = format_bytes(gpu_memory_bytes)
            raise UserError(
                f"gpu_memory={amount} was given, but this machine has no GPU: leave it out, or name cards with --gpus"
            )
        machine = _at_most(machine, gpu_memory_bytes)
    if host_memory_bytes is not None:
        machine = _with_host(machine, host_memory_bytes)
    return Here(machine, found.told)


def _by_table(driver: DriverFacts, gpus: tuple[DriverGpu, ...]) -> Machine:
    cards = tuple(map(_card, gpus))
    facts = host.read()
    side = replace(
        assumed_host(cards, facts.memory_bytes), pin_bytes=facts.pinnable_bytes, cores=facts.cores, memory_origin="measured"
    )
    return Machine(nodes=(Node(cards=cards, host=side, link=_link(driver, gpus)),))


def _card(gpu: DriverGpu) -> Card:
    """The table's, with the memory and the slot that the driver tells of."""
    known = None if gpu.mig else known_card(gpu.name)
    if known is None:
        part = "a part of a card (MIG)" if gpu.mig else "a card that is not in the table"
        raise UserError(f"this machine's {gpu.name!r:.60} is {part}: run rowcast probe first, or name cards with --gpus")
    if gpu.memory_bytes is not None:
        known = replace(known, memory_bytes=gpu.memory_bytes)
    limit = gpu.link_limit
    if limit is None or limit.generation not in PCIE_LANE_RATE:
        return known
    rate = Quantity(PCIE_LANE_RATE[limit.generation] * limit.width, "datasheet", f"{limit}, the most that card and slot agree on")
    return replace(known, bus_rate=rate, pcie_generation=limit.generation, pcie_lanes=limit.width)


def joined_by_nvlink() -> bool:
    """Whether all of the GPUs that this process sees are, as far as the driver tells."""
    driver = nvml.read()
    gpus = () if driver is None else _visible(driver, os.environ)
    return driver is not None and len(gpus) > 1 and _link(driver, gpus) == "nvlink"


def _link(driver: DriverFacts, gpus: tuple[DriverGpu, ...]) -> Link:
    """By what every pair of the cards can do."""
    indices = {gpu.index for gpu in gpus}
    pairs = [pair for pair in driver.pairs if {pair.first, pair.second} <= indices]
    if not pairs or not all(pair.peer_access for pair in pairs):
        return "host"
    return "nvlink" if all(gpu.nvlinks for gpu in gpus) else "pcie"


def _visible(driver: DriverFacts, environ: Mapping[str, str]) -> tuple[DriverGpu, ...]:
    """Those that CUDA shows to this process; what CUDA_VISIBLE_DEVICES says in another form than numbers and ids hides nothing."""
    wanted = environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return driver.gpus
    found = []
    for word in wanted.split(","):
        gpu = next((gpu for gpu in driver.gpus if word.strip() == str(gpu.index) or _is_id(word.strip(), gpu)), None)
        if gpu is None:  # CUDA, too, stops at the first that is none.
            break
        found.append(gpu)
    return tuple(found)


def _is_id(word: str, gpu: DriverGpu) -> bool:
    return word.startswith("GPU-") and gpu.uuid.startswith(word)


def _cpu(side: Host) -> Machine:
    return Machine(nodes=(Node(cards=(), host=side, link="host"),))


def _probed_host(probed: HostProbe) -> Host:
    """With no more memory than is free now."""
    found = measured_host(probed)
    return replace(found, memory_bytes=min(host.read().available_bytes, found.memory_bytes))


def _assumed_cpu() -> Host:
    """What is free of its memory; the rest as of a desktop."""
    facts = host.read()
    return Host(
        memory_bytes=facts.available_bytes,
        memory_rate=Quantity(
            min(76.8e9, facts.cores * _CORE_RATE), "assumed", "two channels of DDR5-4800, or what that many cores take"
        ),
        pin_bytes=facts.pinnable_bytes,
        flops=assumed_flops(facts.cores),
        cores=facts.cores,
        memory_origin="measured",
    )


def _at_most(machine: Machine, gpu_memory_bytes: int) -> Machine:
    least = min(machine.cards, key=lambda card: card.memory_bytes)
    if gpu_memory_bytes > least.sold_bytes:
        raise UserError(
            f"gpu_memory={format_bytes(gpu_memory_bytes)} is more than the {format_bytes(least.memory_bytes)} of this machine's "
            f"{least.name}: ask for less"
        )
    nodes = tuple(
        replace(
            node,
            cards=tuple(replace(card, memory_bytes=min(gpu_memory_bytes, card.memory_bytes)) for card in node.cards),
        )
        for node in machine.nodes
    )
    return replace(machine, nodes=nodes)


def _with_host(machine: Machine, host_memory_bytes: int) -> Machine:
    nodes = []
    for node in machine.nodes:
        if host_memory_bytes > node.host.memory_bytes:
            raise UserError(
                f"host_memory={format_bytes(host_memory_bytes)} is more than the {format_bytes(node.host.memory_bytes)} that are here: "
                "ask for less, or name cards with --gpus to plan for another one"
            )
        pinned = min(node.host.pin_bytes, host_memory_bytes)
        nodes.append(
            replace(node, host=replace(node.host, memory_bytes=host_memory_bytes, pin_bytes=pinned, memory_origin="given"))
        )
    return replace(machine, nodes=tuple(nodes))


def is_here(cards: Sequence[str]) -> bool:
    """Whether these cards, by their names in a plan, are this machine's first ones; none: a plan for the CPU."""
    driver = nvml.read()
    gpus = () if driver is None else _visible(driver, os.environ)
    names = [known.name if (known := known_card(gpu.name)) else gpu.name for gpu in gpus]
    return list(cards) == names[: len(cards)]
