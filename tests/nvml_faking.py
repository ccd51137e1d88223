"""A driver's library, pretended: what `rowcast.placement.nvml` asks of pynvml."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

GEFORCE = "NVIDIA GeForce RTX 4090"


class NVMLError(Exception):
    """The library's."""


def fake_pynvml(cards: list[dict[str, Any]], *, broken: tuple[str, ...] = ()) -> ModuleType:
    """A driver with these cards; what they hold is read when it is asked for. The functions named in `broken` fail as on a card that
    does not know them."""

    def of(field: str, default: Any = None) -> Any:
        return lambda handle: cards[handle].get(field, default)

    def by_uuid(uuid: str) -> int:
        found = [index for index, card in enumerate(cards) if card["uuid"] == uuid]
        if not found:
            raise NVMLError("not found")
        return found[0]

    def nvlink(handle: int, link: int) -> int:
        if link >= cards[handle].get("nvlinks", 0):
            raise NVMLError("invalid argument")
        return 1

    def processes(handle: int) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in cards[handle].get("processes", {}).items()]

    module = ModuleType("pynvml")
    content: dict[str, Any] = {
        "NVMLError": NVMLError,
        "NVML_NVLINK_MAX_LINKS": 18,
        "NVML_P2P_STATUS_OK": 0,
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: b"580.1",
        "nvmlDeviceGetCount": lambda: len(cards),
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetHandleByUUID": by_uuid,
        "nvmlDeviceGetName": of("name"),
        "nvmlDeviceGetUUID": of("uuid"),
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(
            total=cards[handle]["memory"], used=cards[handle].get("used", 0)
        ),
        "nvmlDeviceGetComputeRunningProcesses": processes,
        "nvmlDeviceGetCurrPcieLinkGeneration": of("generation", 1),
        "nvmlDeviceGetCurrPcieLinkWidth": of("width", 16),
        "nvmlDeviceGetMaxPcieLinkGeneration": of("most", 4),
        "nvmlDeviceGetMaxPcieLinkWidth": of("width", 16),
        "nvmlDeviceGetNvLinkState": nvlink,
        "nvmlDeviceGetMigMode": lambda handle: (0, 0),
        "nvmlDeviceGetNumaNodeId": of("numa", 0),
        "nvmlDeviceGetTopologyCommonAncestor": lambda a, b: 30,
        "nvmlDeviceGetP2PStatus": lambda a, b, what: {0: 0 if "nvlinks" in cards[a] else 3}[what],
    }

    def fails(*_: Any) -> None:
        raise NVMLError("not supported")

    for name, value in (content | dict.fromkeys(broken, fails)).items():
        setattr(module, name, value)
    return module
