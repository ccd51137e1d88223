"""Where host memory lies on machines with several NUMA nodes: a made-up system, and the call that it leads to."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rowcast.offload import host_memory, numa

GPU = torch.device("cuda", 0)
PCI = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)


def system(root: Path, nodes: int, node: str | None = "1") -> Path:
    for number in range(nodes):
        (root / f"sys/devices/system/node/node{number}").mkdir(parents=True)
    place = root / "sys/bus/pci/devices/0000:3b:00.0"
    place.mkdir(parents=True)
    if node is not None:
        (place / "numa_node").write_text(f"{node}\n")
    return root


@pytest.mark.parametrize(("nodes", "told", "found"), [(2, "1", 1), (2, "0", 0), (2, "-1", None), (2, None, None), (1, "0", None)])
def test_the_node_next_to_a_gpu(
    nodes: int, told: str | None, found: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: PCI)
    assert numa.node_of(GPU, system(tmp_path, nodes, told)) == found
    assert numa.node_of(torch.device("cpu"), tmp_path) is None


def test_banks_ask_for_their_gpus_node_before_pages_are_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(numa, "node_of", lambda device: 1)

    def prefer(address: int, size: int, node: int) -> bool:
        asked.append((address, size, node))
        return True

    monkeypatch.setattr(numa, "prefer", prefer)
    bank = host_memory.pinned_bank((4, 64), torch.float32, torch.device("cpu"))
    assert asked == [(bank.tensor.data_ptr(), 4 * 64 * 4, 1)] and not bank.tensor.any()


def test_without_the_library_pages_lie_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(name)

    numa._library.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert not numa.prefer(0, 16, 1)
    numa._library.cache_clear()


def test_the_library_gets_the_bytes_and_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    fake = SimpleNamespace(numa_tonode_memory=lambda *given: calls.append(tuple(each.value for each in given)))
    monkeypatch.setattr(numa, "_library", lambda: fake)
    assert numa.prefer(4096, 64, 1) and calls == [(4096, 64, 1)]
