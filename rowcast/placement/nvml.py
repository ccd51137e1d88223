"""What the NVIDIA driver says of this machine's cards, and of their memory, without CUDA. Torch-free.

An idle card lets its PCIe link drop to a lower generation, so what `read` finds at rest and what `pcie_link` finds while a copy runs
may differ; both are worth telling. Where there is no driver everything is None; a single fact that a driver does not tell is None too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

TOPOLOGY = {
    0: "one board",
    10: "one PCIe switch",
    20: "several PCIe switches",
    30: "one host bridge",
    40: "one NUMA node",
    50: "across NUMA nodes",
}
"""NVML's levels of the nearest common ancestor of two cards (nvmlGpuTopologyLevel_t)."""


@dataclass(frozen=True, slots=True)
class PcieLink:
    """What a link runs at, or may."""

    generation: int
    width: int

    def __str__(self) -> str:
        return f"PCIe {self.generation} x{self.width}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverGpu:
    """One card as the driver sees it."""

    index: int
    """The driver's, by PCI bus. CUDA may number otherwise."""
    name: str
    uuid: str
    memory_bytes: int | None
    link: PcieLink | None
    """Now."""
    link_limit: PcieLink | None
    """The most that card and slot agree on."""
    nvlinks: int
    """Links that are up."""
    numa_node: int | None
    mig: bool
    """Cut into instances: a process sees one of them, not the card."""


@dataclass(frozen=True, slots=True)
class DriverPair:
    """Two cards, by the driver's index, the lower first."""

    first: int
    second: int
    topology: str | None
    """The nearest thing that both hang on."""
    peer_access: bool | None
    """Whether each may read the other's memory."""


@dataclass(frozen=True, slots=True)
class DriverFacts:
    """Everything that `read` finds."""

    driver: str
    gpus: tuple[DriverGpu, ...]
    pairs: tuple[DriverPair, ...]

    def by_uuid(self, uuid: str) -> DriverGpu | None:
        """The card that CUDA calls by this id, with or without "GPU-" before it."""
        return next((gpu for gpu in self.gpus if gpu.uuid.removeprefix("GPU-") == uuid.removeprefix("GPU-")), None)


@dataclass(frozen=True, slots=True)
class CardMemory:
    """One card's memory at the time of asking."""

    used_bytes: int
    """By everybody, and by the driver itself."""
    processes: Mapping[int, int | None]
    """Bytes by process id, which in a container may be the host's; None where the driver does not tell. Empty where it names none."""


def read() -> DriverFacts | None:
    """All cards that the driver shows to this process; None where there is no driver, or no card."""
    with _opened() as nvml:
        if nvml is None:
            return None
        count = _ask(nvml, "nvmlDeviceGetCount") or 0
        found = [(index, _ask(nvml, "nvmlDeviceGetHandleByIndex", index)) for index in range(count)]
        handles = {index: handle for index, handle in found if handle is not None}
        if not handles:
            return None
        pairs = [_pair(nvml, handles, a, b) for a in handles for b in handles if a < b]
        driver = _text(_ask(nvml, "nvmlSystemGetDriverVersion"))
        return DriverFacts(driver, tuple(_gpu(nvml, index, handle) for index, handle in handles.items()), tuple(pairs))


def pcie_link(uuid: str) -> PcieLink | None:
    """What the link of the card with this id runs at now. To be asked while a copy runs."""
    with _opened() as nvml:
        if nvml is None:
            return None
        handle = _by_uuid(nvml, uuid)
        return None if handle is None else _link(nvml, handle)


def card_memory(uuid: str) -> CardMemory | None:
    """What of the card with this id is taken now; None where the driver does not tell."""
    with _opened() as nvml:
        if nvml is None:
            return None
        handle = _by_uuid(nvml, uuid)
        memory = None if handle is None else _ask(nvml, "nvmlDeviceGetMemoryInfo", handle)
        if memory is None:
            return None
        processes = _ask(nvml, "nvmlDeviceGetComputeRunningProcesses", handle) or []
        return CardMemory(int(memory.used), {int(each.pid): each.usedGpuMemory for each in processes})


@contextmanager
def kept_open() -> Iterator[None]:
    """Within, `read` and `pcie_link` need not load the driver's library anew."""
    with _opened():
        yield


@contextmanager
def _opened() -> Iterator[ModuleType | None]:
    """The library, initialised: NVML counts its users. None where it or the driver is missing."""
    nvml = _library()
    if nvml is None:
        yield None
        return
    try:
        yield nvml
    finally:
        _ask(nvml, "nvmlShutdown")


def _library() -> ModuleType | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError, OSError):
        return None
    module: ModuleType = pynvml
    return module


def _ask(nvml: ModuleType, question: str, *args: Any) -> Any:
    """The driver's answer, None where it has none: not every card, driver and version of the library knows every question."""
    try:
        return getattr(nvml, question)(*args)
    except (nvml.NVMLError, AttributeError):
        return None


def _by_uuid(nvml: ModuleType, uuid: str) -> Any:
    """With or without "GPU-" before it; None for a card that is not there."""
    return _ask(nvml, "nvmlDeviceGetHandleByUUID", uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")


def _gpu(nvml: ModuleType, index: int, handle: Any) -> DriverGpu:
    memory = _ask(nvml, "nvmlDeviceGetMemoryInfo", handle)
    generation = _ask(nvml, "nvmlDeviceGetMaxPcieLinkGeneration", handle)
    width = _ask(nvml, "nvmlDeviceGetMaxPcieLinkWidth", handle)
    links = (_ask(nvml, "nvmlDeviceGetNvLinkState", handle, link) for link in range(nvml.NVML_NVLINK_MAX_LINKS))
    mode = _ask(nvml, "nvmlDeviceGetMigMode", handle)
    return DriverGpu(
        index=index,
        name=_text(_ask(nvml, "nvmlDeviceGetName", handle)),
        uuid=_text(_ask(nvml, "nvmlDeviceGetUUID", handle)),
        memory_bytes=None if memory is None else int(memory.total),
        link=_link(nvml, handle),
        link_limit=PcieLink(generation, width) if generation and width else None,
        nvlinks=sum(1 for state in links if state == 1),
        numa_node=_ask(nvml, "nvmlDeviceGetNumaNodeId", handle),
        mig=bool(mode and mode[0]),
    )


def _link(nvml: ModuleType, handle: Any) -> PcieLink | None:
    generation = _ask(nvml, "nvmlDeviceGetCurrPcieLinkGeneration", handle)
    width = _ask(nvml, "nvmlDeviceGetCurrPcieLinkWidth", handle)
    return PcieLink(generation, width) if generation and width else None


_P2P_READ = 0
"""NVML's number of reads from a peer, which pynvml 13 has as a tuple."""


def _pair(nvml: ModuleType, handles: dict[int, Any], first: int, second: int) -> DriverPair:
    level = _ask(nvml, "nvmlDeviceGetTopologyCommonAncestor", handles[first], handles[second])
    ways = ((first, second), (second, first))
    states = [_ask(nvml, "nvmlDeviceGetP2PStatus", handles[a], handles[b], _P2P_READ) for a, b in ways]
    access = None if None in states else all(state == nvml.NVML_P2P_STATUS_OK for state in states)
    return DriverPair(first, second, None if level is None else TOPOLOGY.get(level), access)


def _text(answer: str | bytes | None) -> str:
    return answer.decode(errors="replace") if isinstance(answer, bytes) else answer or ""
