"""What a probe found: this machine's rates as copies and products reached them, and the machine that they make. Torch-free.

`offload/probe.py` measures, `cache` keeps the result, the planner reads it: on the machine itself, or from a file of another one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from rowcast.errors import UserError
from rowcast.placement.cards import known_card
from rowcast.placement.hardware import GIB, PCIE_LANE_RATE, Card, Host, HostProducts, Link, Machine, Node, Quantity, assumed_flops

FORMAT = 2
"""Raised when a field changes its meaning."""

KERNEL_SHARE = 0.85
"""Of one large transfer's rate: rows that a kernel reads at this rate are worth reading one by one."""


@dataclass(frozen=True, slots=True)
class RowRate:
    """Scattered rows of host memory, read by a kernel of the GPU."""

    row_bytes: int
    rate: float
    """Bytes/s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuProbe:
    """One card. Rates are bytes/s in one direction; None: not measured."""

    name: str
    """The driver's."""
    memory_bytes: int
    """In all, what others use included."""
    pcie_generation: int | None = None
    pcie_lanes: int | None = None
    """Under load."""
    pcie_generation_limit: int | None = None
    pcie_lanes_limit: int | None = None
    """What card and slot may agree on."""
    nvlinks: int = 0
    numa_node: int | None = None
    memory_rate: float | None = None
    """Bytes read and written by a large copy within the card."""
    to_device: float | None = None
    to_host: float | None = None
    """By DMA from and to pinned memory, this card alone."""
    to_device_together: float | None = None
    """Likewise, while all cards receive."""
    flops: float | None = None
    """Of a large dense product in float16, operations/s."""
    rows: tuple[RowRate, ...] = ()
    """By row size, ascending."""

    @property
    def kernel_row_bytes(self) -> int | None:
        """The row size from which a kernel reaches `KERNEL_SHARE` of a DMA transfer's rate, for it and all larger ones; None: never."""
        if self.to_device is None:
            return None
        least = None
        for row in reversed(self.rows):
            if row.rate < KERNEL_SHARE * self.to_device:
                break
            least = row.row_bytes
        return least

    def whole_block_density(self, row_bytes: int) -> float | None:
        """The share of rows above which one transfer of the whole block is done sooner than a kernel that reads only these."""
        known = [row for row in self.rows if row.row_bytes <= row_bytes] or list(self.rows[:1])
        if self.to_device is None or not known:
            return None
        return min(1.0, known[-1].rate / self.to_device)


@dataclass(frozen=True, slots=True)
class PeerProbe:
    """Copies from one card to another."""

    source: int
    target: int
    """Places in `Probe.gpus`."""
    rate: float | None
    """Bytes/s."""
    direct: bool
    """Whether the cards reach each other's memory; otherwise copies pass through the host."""
    topology: str | None = None


@dataclass(frozen=True, slots=True)
class CpuProduct:
    """A token's products with neurons that lie in host memory, as the CPU computes them. Bytes of their weights a second."""

    width: int
    """Bytes of a weight."""
    whole: float
    """With all neurons of a table."""
    chosen: float
    """With every other one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostProbe:
    """The CPU side."""

    cpu: str
    cores: int
    numa_nodes: int
    memory_bytes: int
    available_bytes: int
    pin_bytes: int
    pin_reason: str
    """What `pin_bytes` rests on."""
    wsl: bool
    threads: int
    """That the rates below were reached with."""
    memory_rate: float
    """Bytes read and written by a large copy, a second."""
    read_rate: float
    """Bytes read by a sum over a large array, a second."""
    products: tuple[CpuProduct, ...] = ()
    """Of bfloat16 and float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One machine at one time."""

    format: int = FORMAT
    host: HostProbe
    gpus: tuple[GpuProbe, ...] = ()
    peers: tuple[PeerProbe, ...] = ()
    driver: str = ""
    seconds: float = 0.0
    """That the probe took."""
    notes: tuple[str, ...] = ()
    """What could not be measured, and why."""

    def machine(self) -> Machine:
        """What a plan for this machine is made for: cards of the table with what was measured in place of the datasheet's figures.

        Raises UserError without a GPU, and for a card that is not in the table and was not measured.
        """
        if not self.gpus:
            raise UserError("this machine has no GPU that can be planned for: name the cards, such as gpus=2xRTX4090")
        together = [gpu.to_device_together for gpu in self.gpus]
        shared = None
        if len(self.gpus) > 1 and None not in together:
            shared = Quantity(sum(rate or 0.0 for rate in together), "measured", "transfers to all cards at once")
        cards = [replace(_card(gpu), peer_rate=self._peer_rate(place)) for place, gpu in enumerate(self.gpus)]
        node = Node(cards=tuple(cards), host=measured_host(self.host), link=self._link(), shared_bus_rate=shared)
        return Machine(nodes=(node,))

    def _link(self) -> Link:
        if not self.peers or not all(peer.direct for peer in self.peers):
            return "host"
        return "nvlink" if all(gpu.nvlinks for gpu in self.gpus) else "pcie"

    def _peer_rate(self, place: int) -> Quantity:
        """The slowest copy that this card takes part in, over links of their own."""
        rates = [peer.rate for peer in self.peers if place in (peer.source, peer.target) and peer.direct and peer.rate]
        if not self.gpus[place].nvlinks:
            return Quantity(0.0, "measured", "no NVLink")
        if rates:
            return Quantity(min(rates), "measured", "copies from card to card")
        known = known_card(self.gpus[place].name)
        return known.peer_rate if known else Quantity(0.0, "assumed", "no other card to copy to")

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `from_json` takes them."""
        content: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return content

    @staticmethod
    def from_json(content: Any) -> Probe:
        """Raises ValueError for anything that `to_json` did not make."""
        probe: Probe = _read(Probe, content)
        if probe.format != FORMAT:
            raise ValueError(f"format {probe.format}, not {FORMAT}")
        return probe


def _card(gpu: GpuProbe) -> Card:
    """What was measured; of the rest, what the table says."""
    known = known_card(gpu.name)
    memory = _measured(gpu.memory_rate, "copy within the card, read and written")
    bus = _measured(gpu.to_device, "transfer from pinned memory") or _nominal_bus(gpu)
    flops = _measured(gpu.flops, "product of large matrices in float16")
    if known is not None:
        return replace(
            known,
            memory_bytes=gpu.memory_bytes,
            memory_rate=memory or known.memory_rate,
            bus_rate=bus or known.bus_rate,
            flops=flops or known.flops,
            pcie_generation=gpu.pcie_generation or known.pcie_generation,
            pcie_lanes=gpu.pcie_lanes or known.pcie_lanes,
        )
    if memory is None or bus is None or flops is None:
        raise UserError(f"the card {gpu.name!r:.60} is not in the table and was not measured: run rowcast probe while it is idle")
    return Card(
        name=gpu.name,
        memory_bytes=gpu.memory_bytes,
        nominal_gib=round(gpu.memory_bytes / GIB),
        memory_rate=memory,
        bus_rate=bus,
        peer_rate=Quantity(0.0, "assumed", "not in the table"),
        flops=flops,
        peer_access="GeForce" not in gpu.name,
        nvlink="built-in" if gpu.nvlinks else "none",
        pcie_generation=gpu.pcie_generation or 0,
        pcie_lanes=gpu.pcie_lanes or 16,
    )


def _measured(rate: float | None, how: str) -> Quantity | None:
    return None if rate is None else Quantity(rate, "measured", how)


def _nominal_bus(gpu: GpuProbe) -> Quantity | None:
    """Of the slot that the driver tells of."""
    generation, lanes = gpu.pcie_generation_limit, gpu.pcie_lanes_limit
    if generation not in PCIE_LANE_RATE or not lanes:
        return None
    return Quantity(PCIE_LANE_RATE[generation] * lanes, "datasheet", f"PCI Express base specification: {generation}.0 x{lanes}")


def measured_host(host: HostProbe) -> Host:
    """The host as it was probed."""
    return Host(
        memory_bytes=host.memory_bytes,
        memory_rate=Quantity(max(host.memory_rate, host.read_rate), "measured", f"copy or sum by {host.threads} threads"),
        pin_bytes=host.pin_bytes,
        flops=assumed_flops(host.cores),
        cores=host.cores,
        products=tuple(_products(host)),
        memory_origin="measured",
    )


def _products(host: HostProbe) -> Iterator[HostProducts]:
    for found in host.products:
        whole, chosen = (Quantity(rate, "measured", f"by {host.threads} threads") for rate in (found.whole, found.chosen))
        yield HostProducts(found.width, whole, chosen)


def _read(kind: Any, content: Any) -> Any:
    """`content`, plain JSON, as a value of the type `kind`. Raises ValueError where it is none."""
    if get_origin(kind) in (Union, UnionType):
        if content is None and type(None) in get_args(kind):
            return None
        (kind,) = [option for option in get_args(kind) if option is not type(None)]
    if is_dataclass(kind):
        names = {field.name for field in fields(kind)}
        if not isinstance(content, Mapping) or set(content) != names:
            raise ValueError(f"not the fields of a {kind}")
        hints = get_type_hints(kind)
        return kind(**{name: _read(hints[name], content[name]) for name in names})  # type: ignore[operator]
    if get_origin(kind) is tuple:
        if not isinstance(content, list):
            raise ValueError(f"{content!r:.60} is not a list")
        return tuple(_read(get_args(kind)[0], item) for item in content)
    if kind is float and type(content) is int:
        content = float(content)
    if type(content) is not kind or (kind is float and not 0 <= content < float("inf")):
        raise ValueError(f"{content!r:.60} is not a {kind.__name__}")
    return content
