"""Machines as the planner sees them: cards, hosts, links, each rate with where it comes from. Torch-free.

Rates are bytes a second in one direction, as printed by the vendor (nominal) or as a copy reached them (measured). What share of a
nominal rate a program reaches is the cost model's business; a measured rate has lost that share already.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from rowcast.errors import UserError
from rowcast.placement.units import format_bytes

Origin = Literal["datasheet", "measured", "assumed", "given"]
"""datasheet: printed by the vendor or a standard, of which a program reaches a part. measured: what a copy or product reached on this
machine. assumed: a guess. given: said by the user, who means what is reached."""

Link = Literal["nvlink", "pcie", "host"]
"""How cards of one node reach one another: a link of their own, peer copies over PCIe, copies through host memory."""

Board = Literal["desktop", "workstation", "server"]
"""What a card is usually plugged into; says what host to assume."""

GIB = 1 << 30
MOST_GPUS = 4096

PINNABLE_SHARE = 0.9
"""Of host memory, where nothing was measured: the rest is the system's and the process's own."""

INTER_NODE_LATENCY_S = 5e-6
"""Assumed of one message between nodes: what NCCL's tuning model takes for a network hop of a tree (LL protocol)."""


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number with where it comes from. The unit is that of the field that holds it."""

    value: float
    origin: Origin
    source: str = ""
    """Datasheet, what was timed, or why it was assumed."""

    def __float__(self) -> float:
        return self.value

    def times(self, factor: float) -> Quantity:
        """The same quantity as it would be; the origin stays, as it says how much of it a program reaches."""
        return (
            self if factor == 1 else Quantity(self.value * factor, self.origin, f"{self.source}, times {factor:g}".lstrip(", "))
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One GPU."""

    name: str
    """As the table has it, such as RTX4090."""
    memory_bytes: int
    """What the driver reports as total, or a lower budget: the most that a process may take, context and all."""
    nominal_gib: int
    """Memory as it is sold. Vendors write GB; GDDR and HBM come in GiB, less what the driver keeps."""
    memory_rate: Quantity
    """Bytes/s between the memory and the chip, reads and writes together."""
    bus_rate: Quantity
    """Bytes/s from or to the host, one direction."""
    peer_rate: Quantity
    """Bytes/s over NVLink to all peers together, one direction (vendors print both directions' sum); 0: no NVLink."""
    flops: Quantity
    """Dense products of 16-bit numbers with 32-bit accumulation, operations/s (a multiplication and an addition are two)."""
    peer_access: bool
    """Whether cards of this kind copy to one another over PCIe without the host. GeForce cards do not."""
    nvlink: Literal["none", "bridge", "built-in"] = "none"
    """bridge: two cards can be joined, which is not assumed."""
    pcie_generation: int = 0
    pcie_lanes: int = 16
    board: Board = "server"

    @property
    def sold_bytes(self) -> int:
        """Its memory as people say it: a card of 24 GiB has some MiB less."""
        return max(self.memory_bytes, self.nominal_gib * GIB)

    @property
    def natural_link(self) -> Link:
        """How such cards reach one another when nothing else is said."""
        if self.nvlink == "built-in":
            return "nvlink"
        return "pcie" if self.peer_access else "host"


@dataclass(frozen=True, slots=True)
class HostProducts:
    """Bytes/s of weights that the CPU multiplies with one token, where they lie in its memory."""

    width: int
    """Bytes of a weight."""
    whole: Quantity
    """All rows of a table."""
    chosen: Quantity
    """Some of its rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The CPU side of one node."""

    memory_bytes: int
    memory_rate: Quantity
    """Bytes/s, reads and writes together, all cores."""
    pin_bytes: int
    """How much may be pinned for the GPUs."""
    flops: Quantity
    """Of all cores, operations/s, for the neurons that the CPU computes."""
    cores: int
    memory_origin: Origin = "given"
    products: tuple[HostProducts, ...] = ()
    """As far as they were measured; otherwise the memory's rate and the cores' arithmetic are what bounds them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One host with its cards."""

    cards: tuple[Card, ...]
    host: Host
    link: Link
    shared_bus_rate: Quantity | None = None
    """Bytes/s from the host to all cards at once; None: each has its own."""

    @property
    def nvlink_peers(self) -> int:
        """Other cards that a card reaches over NVLink."""
        return len(self.cards) - 1 if self.link == "nvlink" else 0

    @property
    def peer_rate(self) -> Quantity:
        """Bytes/s from one card to another, one direction. Over `host` every byte also crosses host memory, once each way."""
        rates = [card.peer_rate if self.link == "nvlink" else card.bus_rate for card in self.cards]
        return min(rates, key=float)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a plan is made for. Ranks are numbered node by node, card by card."""

    nodes: tuple[Node, ...]
    inter_node_rate: Quantity | None = None
    """Bytes/s from one node to another, one direction; None: one node only."""
    inter_node_latency_s: float = INTER_NODE_LATENCY_S

    @property
    def cards(self) -> tuple[Card, ...]:
        """All of them, by rank."""
        return tuple(card for node in self.nodes for card in node.cards)

    @property
    def num_gpus(self) -> int:
        return len(self.cards)

    @property
    def is_uniform(self) -> bool:
        """All nodes alike, with equal cards."""
        return len(set(self.cards)) <= 1 and len(set(self.nodes)) <= 1

    def describe(self) -> str:
        """One line, such as "2 x RTX4090 (24.0 GiB), PCIe 4 x16, peers by host; host 128.0 GiB"."""
        parts = [f"{count} nodes of {told}" if count > 1 else told for told, count in _counted(map(_node, self.nodes))]
        if self.inter_node_rate is not None:
            parts.append(f"{self.inter_node_rate.value / 1e9:g} GB/s between nodes")
        return "; ".join(parts)

    def with_changes(
        self,
        *,
        gpu_memory_bytes: int = 0,
        host_memory_bytes: int = 0,
        bus: float = 1.0,
        peers: float = 1.0,
        gpu_memory_rate: float = 1.0,
        host_memory_rate: float = 1.0,
        inter_node: float = 1.0,
    ) -> Machine:
        """The machine as it might be: so many bytes more for each GPU and each host, rates so many times as high.

        More host memory may be pinned in the same proportion. `bus` also moves what all cards share.
        """
        nodes = []
        for node in self.nodes:
            cards = tuple(
                replace(
                    card,
                    memory_bytes=card.memory_bytes + gpu_memory_bytes,
                    memory_rate=card.memory_rate.times(gpu_memory_rate),
                    bus_rate=card.bus_rate.times(bus),
                    peer_rate=card.peer_rate.times(peers),
                )
                for card in node.cards
            )
            old = node.host
            total = old.memory_bytes + host_memory_bytes
            pinned = old.pin_bytes + int(host_memory_bytes * old.pin_bytes / old.memory_bytes)
            host = replace(old, memory_bytes=total, pin_bytes=pinned, memory_rate=old.memory_rate.times(host_memory_rate))
            shared = node.shared_bus_rate and node.shared_bus_rate.times(bus)
            nodes.append(replace(node, cards=cards, host=host, shared_bus_rate=shared))
        return replace(self, nodes=tuple(nodes), inter_node_rate=self.inter_node_rate and self.inter_node_rate.times(inter_node))


def parse_gpus(text: str) -> tuple[tuple[Card, ...], ...]:
    """The cards of each node: "RTX4090", "2xRTX4090"; "2x8xH100" is two nodes of eight, "1xA100-80GB+1xRTX4090" one of unequal cards.

    Raises UserError for a form it cannot read, a count out of 1..4096 and an unknown card, with the nearest names.
    """
    from rowcast.placement.cards import find_card  # The table is made of this module's types.

    nodes = 1
    cards: list[Card] = []
    groups = [group.strip() for group in text.split("+")]
    for group in groups:
        found = re.fullmatch(r"(?:(\d+)\s*[x*]\s*)?(?:(\d+)\s*[x*]\s*)?(.*\S)", group, flags=re.IGNORECASE)
        if found is None or (found[2] and len(groups) > 1):
            raise UserError(
                f"gpus={text!r:.80} is not a list of cards: write 2xRTX4090, 2x8xH100 for two nodes of eight, or 1xA100-80GB+1xRTX4090 "
                "for unequal cards of one node"
            )
        outer, inner = (int(found[n][:9]) if found[n] else 1 for n in (1, 2))
        nodes, count = (outer, inner) if found[2] else (1, outer)
        if nodes * count < 1 or nodes * count + len(cards) > MOST_GPUS:
            raise UserError(f"gpus={text!r:.80} asks for {nodes * count} cards: write a count from 1 to {MOST_GPUS}")
        cards += [find_card(found[3])] * count
    return (tuple(cards),) * nodes


def machine_from(
    gpus: str,
    host_memory_bytes: int | None = None,
    *,
    link: str | None = None,
    inter_node: str | None = None,
    gpu_memory_bytes: int | None = None,
) -> Machine:
    """A machine that one does not have, out of the table of cards.

    `host_memory_bytes`: of each node; None assumes what the cards' usual hosts have. `link`: how peers reach one another ("nvlink",
    "pcie", "host") and the bus to the host ("pcie4x8", "25GB/s"), either or both, joined by a plus. `inter_node`: bytes ("25GB/s") or
    bits ("200Gb/s") a second and direction, needed for several nodes. `gpu_memory_bytes`: the most of each card that may be used; the
    size that a card is sold as is all of it.

    Raises UserError for what it cannot read and what the cards cannot do.
    """
    groups = parse_gpus(gpus)
    cards, peers = _linked(groups[0], link)
    if gpu_memory_bytes is not None:
        least = min(cards, key=lambda card: card.memory_bytes)
        if not 0 < gpu_memory_bytes <= least.sold_bytes:
            raise UserError(
                f"gpu_memory={format_bytes(gpu_memory_bytes)} is more than the {format_bytes(least.memory_bytes)} of a {least.name}: "
                "use at most that, or another card"
            )
        cards = tuple(replace(card, memory_bytes=min(gpu_memory_bytes, card.memory_bytes)) for card in cards)
    node = Node(cards=cards, host=assumed_host(cards, host_memory_bytes), link=peers)
    if len(groups) > 1 and inter_node is None:
        raise UserError(f"gpus={gpus!r:.80} has {len(groups)} nodes and no rate between them: add inter_node=25GB/s, or 200Gb/s")
    if len(groups) == 1 and inter_node is not None:
        raise UserError(f"inter_node={inter_node!r:.40} is a rate between nodes, and gpus={gpus!r:.80} has one: leave it out")
    rate = None if inter_node is None else Quantity(_rate(inter_node, "inter_node"), "given", f"inter_node {inter_node}")
    return Machine(nodes=(node,) * len(groups), inter_node_rate=rate)


def assumed_host(cards: tuple[Card, ...], memory_bytes: int | None = None) -> Host:
    """What such cards are usually plugged into. Everything but a given memory is assumed."""
    board = max((card.board for card in cards), key=list(_HOSTS).index)
    usual = _HOSTS[board]
    total = usual.memory_gib * GIB * (len(cards) if board == "server" else 1) if memory_bytes is None else memory_bytes
    return Host(
        memory_bytes=total,
        memory_rate=Quantity(usual.memory_rate, "assumed", f"a {board} with {usual.channels}"),
        pin_bytes=int(total * PINNABLE_SHARE),
        flops=assumed_flops(usual.cores),
        cores=usual.cores,
        memory_origin="assumed" if memory_bytes is None else "given",
    )


def assumed_flops(cores: int) -> Quantity:
    """Of a CPU. A probe's matrix-vector products are no measure of it: they wait for memory."""
    return Quantity(cores * _CORE_FLOPS, "assumed", f"{cores} cores with two 256-bit FMA units at 3 GHz, float32")


@dataclass(frozen=True, slots=True)
class _UsualHost:
    memory_gib: int
    """In all; of a server, for each card."""
    memory_rate: float
    """Bytes/s that its memory channels have."""
    channels: str
    cores: int


_CORE_FLOPS = 2 * 2 * 8 * 3e9

_HOSTS: dict[Board, _UsualHost] = {
    "desktop": _UsualHost(64, 76.8e9, "two channels of DDR5-4800", 16),
    "workstation": _UsualHost(128, 153.6e9, "four channels of DDR5-4800", 32),
    "server": _UsualHost(128, 204.8e9, "eight channels of DDR4-3200", 64),
}
"""From the least to the most; a machine with several kinds of cards is of the last."""

PCIE_LANE_RATE = {1: 0.25e9, 2: 0.5e9, 3: 1e9, 4: 2e9, 5: 4e9, 6: 8e9}
"""Nominal bytes/s of a lane in one direction, by generation: transfers a second over eight bits, codes and headers not taken off."""


def _linked(cards: tuple[Card, ...], link: str | None) -> tuple[tuple[Card, ...], Link]:
    """The cards with the bus that `link` names, and how they reach one another."""
    natural = {card.natural_link for card in cards}
    peers: Link = natural.pop() if len(natural) == 1 and len(set(cards)) == 1 else "host"
    for part in [] if link is None else [part.strip() for part in link.split("+")]:
        if part.lower() in ("nvlink", "pcie", "host"):
            peers = _possible(part.lower(), cards)
        elif found := re.fullmatch(r"pcie\s*(\d)(?:\.0)?\s*x\s*(\d+)", part, flags=re.IGNORECASE):
            generation, lanes = int(found[1]), int(found[2])
            if generation not in PCIE_LANE_RATE or lanes not in (1, 2, 4, 8, 16):
                raise UserError(
                    f"link={link!r:.40} names PCIe {generation} x{lanes}: use generation 1 to 6 and 1, 2, 4, 8, 16 lanes"
                )
            cards = tuple(_narrowed(card, generation, lanes) for card in cards)
        else:
            rate = Quantity(_rate(part, "link"), "given", f"link {part}")
            cards = tuple(replace(card, bus_rate=rate) for card in cards)
    return cards, peers


def _narrowed(card: Card, generation: int, lanes: int) -> Card:
    """In a slot of this kind: card and slot agree on the lower of both. The rate is nominal, as a datasheet's."""
    generation, lanes = min(generation, card.pcie_generation), min(lanes, card.pcie_lanes)
    rate = Quantity(PCIE_LANE_RATE[generation] * lanes, "datasheet", f"PCI Express base specification: {generation}.0 x{lanes}")
    return replace(card, bus_rate=rate, pcie_generation=generation, pcie_lanes=lanes)


def _possible(link: str, cards: tuple[Card, ...]) -> Link:
    for card in cards:
        if link == "nvlink" and card.nvlink == "none":
            raise UserError(f"link=nvlink is not possible with a {card.name}, which has no NVLink: use link={card.natural_link}")
        if link == "nvlink" and card.nvlink == "bridge" and len(cards) > 2:
            raise UserError(
                f"link=nvlink joins {len(cards)} cards, a {card.name} has bridges for pairs: use link={card.natural_link}"
            )
        if link == "pcie" and not card.peer_access:
            raise UserError(f"link=pcie is not possible with a {card.name}, which has no peer-to-peer access: use link=host")
    return "nvlink" if link == "nvlink" else "pcie" if link == "pcie" else "host"


def _rate(text: str, what: str) -> float:
    """Such as 25GB/s, or 200Gb/s and 200gbit/s in bits -> bytes/s."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])(i?)(B|bit)(?:/s|ps)\s*", text, flags=re.IGNORECASE)
    if found is None:
        also = "" if what == "inter_node" else ", nvlink, pcie, host or a slot such as pcie4x8"
        raise UserError(
            f"{what}={text!r:.40} is not a rate: write a number and a unit such as 25GB/s (or 200Gb/s, in bits){also}"
        )
    thousand = 1024.0 if found[3] else 1000.0
    bits = found[4].lower() == "bit" or (found[4] == "b" and found[2].isupper())  # "gb" is "GB" in a hurry.
    value: float = float(found[1]) * thousand ** ("KMGT".index(found[2].upper()) + 1) / (8 if bits else 1)
    if not 1e6 <= value <= 1e14:
        raise UserError(f"{what}={text!r:.40} is out of bounds: use a rate from 1MB/s to 100TB/s")
    return value


def _counted(texts: Iterable[str]) -> list[tuple[str, int]]:
    """Runs of equal texts with their lengths."""
    return [(text, len(list(run))) for text, run in groupby(texts)]


def _node(node: Node) -> str:
    told = [
        f"{count} x {name}"
        for name, count in _counted(f"{card.name} ({format_bytes(card.memory_bytes)}, {_bus(card)})" for card in node.cards)
    ]
    peers = {"nvlink": "NVLink", "pcie": "PCIe", "host": "host memory"}[node.link]
    told += [f"peers over {peers}"] if len(node.cards) > 1 else []
    return ", ".join([*told, f"host {format_bytes(node.host.memory_bytes)}"])


def _bus(card: Card) -> str:
    if card.bus_rate.origin != "datasheet" or not card.pcie_generation:
        return f"bus {card.bus_rate.value / 1e9:.3g} GB/s"
    return f"PCIe {card.pcie_generation} x{card.pcie_lanes}"
