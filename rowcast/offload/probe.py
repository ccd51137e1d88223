"""Measures this machine: what its memories, links and processors reach, as plans need it.

A probe takes seconds, not minutes, and a bounded part of the memory that is free, which it gives back. What cannot be measured is left
out and named in the notes; without a GPU that is everything but the host. Other work on the machine makes rates lower than they are.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import mean, median
from typing import TypeVar

import torch
from torch import Tensor

from rowcast.errors import UserError
from rowcast.kernels.rows import ffn_hidden, rows_out
from rowcast.offload import gpu_rates
from rowcast.offload.host_memory import HostTensor, pinned_bank
from rowcast.placement import host as system
from rowcast.placement import nvml
from rowcast.placement.measured import CpuProduct, GpuProbe, HostProbe, PeerProbe, Probe

T = TypeVar("T")

logger = logging.getLogger(__name__)

_WIDTH = 4096
"""Of the neurons that the CPU multiplies."""

_FREE_SHARE = 4
"""No measurement takes more than one part in so many of the memory that is free."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is moved, and how often. Each is the most: little free memory makes them smaller."""

    host_bytes: int = 2 << 30
    """Of one array of the host's copies, sums and products: more than the caches hold, of which servers have hundreds of MiB."""
    bank_bytes: int = 1 << 30
    """Pinned memory that transfers and rows come from."""
    transfer_bytes: int = 128 << 20
    device_bytes: int = 1 << 30
    """Of one array of the copy within a card."""
    repeat: int = 5
    seconds: float = 25.0
    """After so long what is left is left out, the host and each card's main rates excepted."""


def probe(sizes: Sizes | None = None, tell: Callable[[str], None] = logger.info) -> Probe:
    """Measure everything that is there. `tell` gets a few words before each part."""
    run = _Run(sizes or Sizes(), tell)
    with nvml.kept_open():
        return run.all()


class _Run:
    """One probe while it runs."""

    def __init__(self, sizes: Sizes, tell: Callable[[str], None]) -> None:
        self._sizes, self._tell = sizes, tell
        self._began = time.perf_counter()
        self._notes: list[str] = []
        self._refused = False
        self._driver = nvml.read()
        self._facts = system.read()

    def all(self) -> Probe:
        self._tell("host memory and processor")
        host = self._host()
        gpus: list[GpuProbe] = []
        peers: list[PeerProbe] = []
        devices = [torch.device("cuda", place) for place in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
        if devices:
            host, gpus, peers = self._gpus(devices, host)
        else:
            seen = len(self._driver.gpus) if self._driver else 0
            why = f"the driver shows {seen}, torch {torch.__version__} sees none" if seen else "none was found"
            self._notes.append(f"no GPU was measured: {why}")
        return Probe(
            host=host,
            gpus=tuple(gpus),
            peers=tuple(peers),
            driver=self._driver.driver if self._driver else "",
            seconds=time.perf_counter() - self._began,
            notes=tuple(self._notes),
        )

    # The host.

    def _host(self) -> HostProbe:
        facts, repeat = self._facts, self._sizes.repeat
        size = max(min(self._sizes.host_bytes, facts.available_bytes // (2 * _FREE_SHARE)) // (4 * _WIDTH), 1) * 4 * _WIDTH
        copied, summed = _memory_rates(size, repeat)
        return HostProbe(
            cpu=facts.cpu,
            cores=facts.cores,
            numa_nodes=facts.numa_nodes,
            memory_bytes=facts.memory_bytes,
            available_bytes=facts.available_bytes,
            pin_bytes=facts.pinnable_bytes,
            pin_reason=f"{self._pin_limit}, not tried",
            wsl=facts.wsl,
            threads=torch.get_num_threads(),
            memory_rate=copied,
            read_rate=summed,
            products=tuple(_cpu_product(size, dtype, repeat) for dtype in (torch.bfloat16, torch.float32)),
        )

    # The GPUs.

    def _gpus(self, devices: list[torch.device], host: HostProbe) -> tuple[HostProbe, list[GpuProbe], list[PeerProbe]]:
        gpus = []
        for device in devices:
            gpu = self._described(device)
            self._tell(f"GPU {device.index}, {gpu.name}")
            gpus.append(self._within(device, gpu))
        bank = self._bank(devices[0])
        host = self._pinned(host, bank)
        if bank is not None:
            with bank:
                gpus = [self._over_bus(bank, device, gpu) for device, gpu in zip(devices, gpus, strict=True)]
                if len(devices) > 1:
                    self._tell("all GPUs at once")
                    size = self._transfer_bytes(bank)
                    rates = self._try("all GPUs at once", lambda: gpu_rates.bus_rates_together(bank, devices, size, 8))
                    if rates is not None:
                        gpus = [replace(gpu, to_device_together=rate) for gpu, rate in zip(gpus, rates, strict=True)]
        peers = [self._peers(first, second) for first in devices for second in devices if first.index < second.index]
        for device in devices:
            with torch.cuda.device(device):
                torch.cuda.empty_cache()
        return host, gpus, peers

    def _described(self, device: torch.device) -> GpuProbe:
        """By CUDA and the driver, nothing measured."""
        found = torch.cuda.get_device_properties(device)
        driver = self._of_driver(device)
        if driver is None:
            return GpuProbe(name=found.name, memory_bytes=found.total_memory)
        if driver.mig:
            self._notes.append(f"GPU {device.index} is cut into instances: its rates are those of one of them")
        return GpuProbe(
            name=found.name,
            memory_bytes=found.total_memory,
            pcie_generation_limit=driver.link_limit.generation if driver.link_limit else None,
            pcie_lanes_limit=driver.link_limit.width if driver.link_limit else None,
            nvlinks=driver.nvlinks,
            numa_node=driver.numa_node,
        )

    def _of_driver(self, device: torch.device) -> nvml.DriverGpu | None:
        uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
        return None if self._driver is None or uuid is None else self._driver.by_uuid(str(uuid))

    def _within(self, device: torch.device, gpu: GpuProbe) -> GpuProbe:
        repeat = self._sizes.repeat
        free, _ = torch.cuda.mem_get_info(device)
        size = max(min(self._sizes.device_bytes, free // (2 * _FREE_SHARE)), 1)
        what = f"GPU {device.index}"
        rate = self._try(f"{what}, copy within", lambda: gpu_rates.memory_rate(device, size, repeat))
        flops = self._try(f"{what}, product", lambda: gpu_rates.product_rate(device, repeat))
        return replace(gpu, memory_rate=rate, flops=flops)

    def _bank(self, device: torch.device) -> HostTensor | None:
        """Pinned memory, as much as is meant to be or, where the system refuses, a half of it, a quarter, ..."""
        size = min(self._sizes.bank_bytes, self._facts.available_bytes // _FREE_SHARE)
        unit = max(gpu_rates.ROW_BYTES)
        for halvings in range(5):
            length = max(size >> halvings, unit) // unit * unit
            try:
                return pinned_bank((length,), torch.uint8, device)
            except UserError as error:
                self._refused = True
                self._notes.append(str(error))
        return None

    @property
    def _pin_limit(self) -> str:
        return "what WSL 2 is taken to allow" if self._facts.wsl else "memory that is free"

    def _pinned(self, host: HostProbe, bank: HostTensor | None) -> HostProbe:
        """With what the trial says of pinning."""
        if bank is None:
            return replace(host, pin_bytes=0, pin_reason="the system refuses to pin memory")
        size, limit = bank.tensor.nbytes, self._facts.memlock_bytes
        if self._refused:
            return replace(host, pin_bytes=size, pin_reason="twice as much was refused")
        beyond = ", more than the limit on locked memory" if limit is not None and size > limit else ""
        return replace(host, pin_reason=f"{self._pin_limit}; {size >> 20} MiB were pinned as a trial{beyond}")

    def _over_bus(self, bank: HostTensor, device: torch.device, gpu: GpuProbe) -> GpuProbe:
        """By DMA and by the kernel that reads rows. `bank` was pinned for all cards; each reads it at the same address."""
        self._tell(f"GPU {device.index}, bus")
        seen, repeat, size = _seen_by(bank, device), self._sizes.repeat, self._transfer_bytes(bank)
        what = f"GPU {device.index}"
        rates = self._try(f"{what}, bus", lambda: gpu_rates.bus_rates(seen, size, repeat))
        driver = self._of_driver(device)
        if driver is not None:
            link = self._try(f"{what}, link", lambda: gpu_rates.link_under_load(seen, size, driver.uuid))
            if link is not None:
                gpu = replace(gpu, pcie_generation=link.generation, pcie_lanes=link.width)
        rows = []
        for row_bytes in gpu_rates.ROW_BYTES:
            if self._late(f"{what}, rows of {row_bytes >> 10} KiB"):
                break
            rate = self._try(
                f"{what}, rows of {row_bytes >> 10} KiB",
                lambda row_bytes=row_bytes: gpu_rates.row_rate(seen, row_bytes, repeat),  # type: ignore[misc]
            )
            if rate is not None:
                rows.append(rate)
        there, back = rates if rates is not None else (None, None)
        return replace(gpu, to_device=there, to_host=back, rows=tuple(rows))

    def _peers(self, first: torch.device, second: torch.device) -> PeerProbe:
        what = f"GPU {first.index} to {second.index}"
        direct = torch.cuda.can_device_access_peer(first, second)
        rate = None
        if not self._late(what):
            size = self._sizes.transfer_bytes
            rate = self._try(what, lambda: gpu_rates.peer_rate(first, second, size, self._sizes.repeat))
        pair = None
        if self._driver is not None and (one := self._of_driver(first)) and (other := self._of_driver(second)):
            places = {one.index, other.index}
            pair = next((pair for pair in self._driver.pairs if {pair.first, pair.second} == places), None)
        return PeerProbe(first.index, second.index, rate, direct, pair.topology if pair else None)

    def _transfer_bytes(self, bank: HostTensor) -> int:
        return min(self._sizes.transfer_bytes, bank.tensor.nbytes)

    def _late(self, what: str) -> bool:
        if time.perf_counter() - self._began <= self._sizes.seconds:
            return False
        self._notes.append(f"{what}: left out, as the probe took more than {self._sizes.seconds:g} s")
        return True

    def _try(self, what: str, measure: Callable[[], T]) -> T | None:
        """The measurement; None and a note where it fails."""
        try:
            return measure()
        except (RuntimeError, UserError) as error:  # torch's out-of-memory error is the former.
            self._notes.append(f"{what}: {str(error).splitlines()[0]}" if str(error) else what)
            return None


def _seen_by(bank: HostTensor, device: torch.device) -> HostTensor:
    """The same pinned memory for another card: it was pinned for all of them, at one address."""
    if device == bank.device or device.type != "cuda":
        return bank
    view = HostTensor(bank.tensor, torch.device("cpu"))  # Pins nothing.
    view.device, view.address = device, bank.address
    return view


def _memory_rates(size_bytes: int, repeat: int) -> tuple[float, float]:
    """Of the host: bytes read and written by a copy, bytes read by a sum, a second."""
    source = torch.ones(size_bytes // 4, dtype=torch.float32)
    target = torch.zeros_like(source)
    copied = _host_seconds(lambda: target.copy_(source), repeat)
    return 2 * size_bytes / copied, size_bytes / _host_seconds(source.sum, repeat)


def _cpu_product(size_bytes: int, dtype: torch.dtype, repeat: int) -> CpuProduct:
    """A token through neurons of a table, up and down, as the CPU computes cold ones.

    Rates are means: a pass waits for its slowest layer, and threads that others keep from running are a part of it.
    """
    neuron_bytes = 2 * _WIDTH * dtype.itemsize
    table = torch.ones(max(size_bytes // neuron_bytes, 2), 2, _WIDTH, dtype=dtype)
    ids = torch.arange(0, len(table), 2)
    x = torch.ones(1, _WIDTH, dtype=dtype)

    def rate(chosen: Tensor | None, bytes_: int) -> float:
        taken = []
        for _ in range(1 + 2 * repeat):
            start = time.perf_counter()
            rows_out(table[:, 1], ffn_hidden(None, table[:, 0], None, x, chosen, "relu"), chosen)
            taken.append(time.perf_counter() - start)
        return bytes_ / mean(taken[1:])

    return CpuProduct(dtype.itemsize, rate(None, table.nbytes), rate(ids, len(ids) * neuron_bytes))


def _host_seconds(call: Callable[[], object], repeat: int) -> float:
    """Median seconds of a call on the CPU; one call before warms up."""
    call()
    taken = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return median(taken)
