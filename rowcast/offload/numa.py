"""Host memory on the NUMA node that a GPU is plugged into: a transfer from another node crosses the link between processors, too.

Linux, with libnuma (`libnuma1` on Debian and Ubuntu). Elsewhere, and on machines with one node, pages lie where the system puts them.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger("rowcast")


def node_of(device: torch.device, root: Path = Path("/")) -> int | None:
    """The node next to a GPU; None: there is one only, or nobody knows."""
    if device.type != "cuda" or len(list((root / "sys/devices/system/node").glob("node[0-9]*"))) < 2:
        return None
    found: Any = torch.cuda.get_device_properties(device)
    try:
        place = f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"
        node = int((root / "sys/bus/pci/devices" / place / "numa_node").read_text())
    except (AttributeError, OSError, ValueError):  # Older versions of torch do not tell a card's place.
        return None
    return node if node >= 0 else None


def prefer(address: int, size: int, node: int) -> bool:
    """Pages of these bytes that were not touched yet will lie on the node as long as it has room. False: nobody could see to it."""
    library = _library()
    if library is None:
        return False
    library.numa_tonode_memory(ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_int(node))
    return True


@cache
def _library() -> Any:
    try:
        library = ctypes.CDLL("libnuma.so.1")
        usable = library.numa_available() >= 0
    except (OSError, AttributeError):
        usable = False
    if not usable:
        log.info("host memory lies on any NUMA node: libnuma is not installed")
        return None
    return library
