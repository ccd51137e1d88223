"""What the probe measures: the host with tiny sizes; GPUs with the parts that need one pretended, and for real where there is one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nvml_faking import GEFORCE, fake_pynvml

from rowcast.cli import main
from rowcast.errors import UserError
from rowcast.kernels.gpu.host_rows import gather
from rowcast.offload import gpu_rates
from rowcast.offload import probe as probing
from rowcast.offload.host_memory import HostTensor, pinned_bank
from rowcast.offload.probe import Sizes, probe
from rowcast.placement import cache, nvml
from rowcast.placement.measured import Probe, RowRate

CPU = torch.device("cpu")
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else CPU
TINY = Sizes(host_bytes=1 << 20, bank_bytes=1 << 20, transfer_bytes=1 << 18, device_bytes=1 << 16, repeat=2)


def test_a_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    told: list[str] = []
    found = probe(TINY, told.append)
    host = found.host
    assert min(host.memory_rate, host.read_rate) > 1e6 and [product.width for product in host.products] == [2, 4]
    assert min(rate for product in host.products for rate in (product.whole, product.chosen)) > 1e6
    assert 0 < host.pin_bytes <= host.memory_bytes and host.pin_reason.endswith("not tried")
    assert host.threads == torch.get_num_threads()
    assert found.gpus == () and found.notes == ("no GPU was measured: none was found",)
    assert told == ["host memory and processor"]
    assert Probe.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_a_driver_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "pynvml", fake_pynvml([{"name": GEFORCE, "uuid": "GPU-a", "memory": 1}]))
    assert "the driver shows 1, torch" in probe(TINY).notes[0]


# The functions that measure a GPU, with a clock that stands still: what they call, and over how many bytes.


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every timed call is made `repeat` times and takes a second."""
    made: list[int] = []

    def seconds(call: Callable[[], object], device: torch.device, repeat: int) -> float:
        for _ in range(repeat):
            call()
        made.append(repeat)
        return 1.0

    monkeypatch.setattr(gpu_rates, "seconds", seconds)
    return made


def test_rates_of_a_card(calls: list[int]) -> None:
    assert gpu_rates.memory_rate(CPU, 1000, 3) == 2000
    assert gpu_rates.peer_rate(CPU, CPU, 1000, 3) == 1000
    assert calls == [3, 3]


def test_transfers_leave_the_bank_as_it_was(calls: list[int]) -> None:
    with HostTensor(torch.arange(1008, dtype=torch.int16).view(torch.uint8), CPU) as bank:
        before = bank.tensor.clone()
        assert gpu_rates.bus_rates(bank, 512, 5) == (512, 512)
        assert torch.equal(bank.tensor, before)


@pytest.mark.parametrize("row_bytes", [4096, 8192])
def test_rows_are_read_by_the_kernel(row_bytes: int, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_rates, "_MOVED_BYTES", 4 * row_bytes)
    seen: list[list[int]] = []

    def watched(address: int, stride: int, ids: torch.Tensor, count: torch.Tensor, out: torch.Tensor) -> None:
        seen.append(ids.tolist())
        gather(address, stride, ids, count, out)
        assert torch.equal(out.cpu(), bank.tensor.view(-1, row_bytes)[ids.long().cpu()])

    monkeypatch.setattr(gpu_rates, "gather", watched)
    with pinned_bank((10 * row_bytes,), torch.uint8, DEVICE) as bank:
        bank.tensor.copy_(torch.randint(0, 256, bank.tensor.shape, dtype=torch.uint8))
        assert gpu_rates.row_rate(bank, row_bytes, 2) == RowRate(row_bytes, 4.0 * row_bytes)
    first, second = seen
    assert len(set(first + second)) == 8 and first != sorted(first)


# A probe of two pretended cards.

CARDS = [
    {"name": GEFORCE, "uuid": f"GPU-{place}", "memory": 24 << 30, "generation": 4, "most": 4, "width": width}
    for place, width in (("b", 8), ("a", 16))
]
"""The driver's order; CUDA has it the other way round."""


class Bank(HostTensor):
    """Not pinned, but says that it is the first card's."""

    def __init__(self, size: int) -> None:
        super().__init__(torch.zeros(size, dtype=torch.uint8), CPU)
        self.device = torch.device("cuda", 0)
        self.closed = False

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Two cards; `banks` are those that were pinned, `refused` is how many attempts fail, `failing` names rates that raise."""
    state = SimpleNamespace(banks=[], refused=0, failing=set())
    monkeypatch.setitem(sys.modules, "pynvml", fake_pynvml(CARDS))
    cuda: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "device": lambda device: nullcontext(),
        "empty_cache": lambda: None,
        "mem_get_info": lambda device: (20 << 30, 24 << 30),
        "can_device_access_peer": lambda first, second: False,
        "get_device_properties": lambda device: SimpleNamespace(name=GEFORCE, total_memory=23 << 30, uuid="ab"[device.index]),
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)

    def pinned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> HostTensor:
        if state.refused:
            state.refused -= 1
            raise UserError("the system refuses to pin it")
        state.banks.append(Bank(*shape))
        return state.banks[-1]  # type: ignore[no-any-return]

    def rate(name: str, value: Callable[..., Any]) -> Callable[..., Any]:
        def measure(*args: Any) -> Any:
            if name in state.failing:
                raise torch.OutOfMemoryError("no memory\nat all")
            return value(*args)

        return measure

    monkeypatch.setattr(probing, "pinned_bank", pinned)
    rates: dict[str, Callable[..., Any]] = {
        "memory_rate": lambda device, size, repeat: 900e9 + device.index,
        "product_rate": lambda device, repeat: 150e12,
        "bus_rates": lambda bank, size, repeat: (24e9 - bank.device.index * 12e9, 25e9),
        "link_under_load": lambda bank, size, uuid: nvml.pcie_link(uuid),
        "bus_rates_together": lambda bank, devices, size, repeat: [13e9, 11e9],
        "row_rate": lambda bank, row_bytes, repeat: RowRate(row_bytes, min(row_bytes / 4096 * 6e9, 23e9)),
        "peer_rate": lambda source, target, size, repeat: 9e9,
    }
    for name, value in rates.items():
        monkeypatch.setattr(gpu_rates, name, rate(name, value))
    return state


def test_two_cards(pretended: SimpleNamespace) -> None:
    found = probe(TINY)
    assert found.notes == () and found.driver == "580.1"
    first, second = found.gpus
    assert (first.name, first.memory_bytes) == (GEFORCE, 23 << 30)
    # By identity, not by place: CUDA's first card is the driver's second.
    assert [(gpu.pcie_generation, gpu.pcie_lanes) for gpu in found.gpus] == [(4, 16), (4, 8)]
    assert (first.to_device, second.to_device, second.to_device_together) == (24e9, 12e9, 11e9)
    assert second.memory_rate == 900e9 + 1
    assert [row.row_bytes for row in first.rows] == list(gpu_rates.ROW_BYTES)
    assert first.kernel_row_bytes == 16 << 10
    (peer,) = found.peers
    assert (peer.rate, peer.direct, peer.topology) == (9e9, False, "one host bridge")
    assert found.host.pin_reason == "memory that is free; 1 MiB were pinned as a trial"
    assert [bank.closed for bank in pretended.banks] == [True]
    machine = found.machine()
    assert machine.describe() == (
        "1 x RTX4090 (23.0 GiB, bus 24 GB/s), 1 x RTX4090 (23.0 GiB, bus 12 GB/s), peers over host memory, "
        f"host {machine.describe().rpartition('host ')[2]}"
    )


def test_pinning_that_is_refused(pretended: SimpleNamespace) -> None:
    pretended.refused = 1
    found = probe(TINY)
    assert (found.host.pin_bytes, found.host.pin_reason) == (1 << 19, "twice as much was refused")
    assert found.gpus[0].to_device == 24e9 and "refuses to pin" in found.notes[0]


def test_no_pinning_at_all(pretended: SimpleNamespace) -> None:
    pretended.refused = 99
    found = probe(TINY)
    assert (found.host.pin_bytes, found.host.pin_reason) == (0, "the system refuses to pin memory")
    assert found.gpus[0].memory_rate == 900e9 and found.gpus[0].to_device is None and found.gpus[0].rows == ()


def test_a_measurement_that_fails_is_named(pretended: SimpleNamespace) -> None:
    pretended.failing = {"memory_rate", "bus_rates", "row_rate"}
    found = probe(TINY)
    assert found.gpus[0].memory_rate is None and found.gpus[0].to_device is None and found.gpus[0].rows == ()
    assert "GPU 1, bus: no memory" in found.notes and "GPU 0, rows of 4 KiB: no memory" in found.notes
    assert found.machine().cards[0].memory_rate.origin == "datasheet"
    assert [bank.closed for bank in pretended.banks] == [True]


def test_a_probe_that_takes_too_long_leaves_out_the_rest(pretended: SimpleNamespace) -> None:
    found = probe(Sizes(host_bytes=1 << 20, bank_bytes=1 << 20, repeat=1, seconds=0.0))
    assert found.gpus[1].to_device == 12e9 and found.gpus[1].rows == () and found.peers[0].rate is None
    assert any(note.startswith("GPU 0 to 1: left out") for note in found.notes)


# The command.


def test_command(
    pretended: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ROWCAST_CACHE", str(tmp_path))
    monkeypatch.setattr(probing.Sizes, "__init__", _tiny(probing.Sizes.__init__))
    assert main(["probe", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["machine"].startswith("1 x RTX4090") and Path(told["cache"]).parent == tmp_path
    kept = cache.load_probe()
    assert kept is not None and kept.to_json() == {name: told[name] for name in kept.to_json()}
    Path(told["cache"]).unlink()
    assert main(["probe", "--no-cache"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for words in (
        "24.0 GB/s measured, 75% of the datasheet's",
        "PCIe 4 x8 under load",
        "85% of DMA from 16 KiB",
        "not kept",
        "measured, 1 threads",
    ):
        assert words in out
    assert list(tmp_path.iterdir()) == []


def _tiny(init: Callable[..., None]) -> Callable[..., None]:
    def smaller(self: Sizes, **sizes: Any) -> None:
        init(self, **{"host_bytes": 1 << 20, "bank_bytes": 1 << 20, "repeat": 1, **sizes})

    return smaller


@pytest.mark.gpu
def test_a_real_card() -> None:
    free = torch.cuda.mem_get_info()[0]
    found = probe(Sizes(host_bytes=64 << 20, bank_bytes=256 << 20, device_bytes=256 << 20, repeat=3))
    gpu = found.gpus[0]
    assert gpu.memory_rate is not None and gpu.to_device is not None and gpu.to_host is not None and gpu.flops is not None
    assert 1e11 < gpu.memory_rate < 2e13 and 1e9 < gpu.to_device < 3e11 and 1e9 < gpu.to_host < 3e11 and gpu.flops > 1e13
    assert [row.row_bytes for row in gpu.rows] == list(gpu_rates.ROW_BYTES)
    assert all(row.rate < 1.2 * gpu.to_device for row in gpu.rows)
    assert found.seconds < 60
    card = found.machine().cards[0]
    if card.memory_rate.origin == "measured" and card.name in ("H100", "H200"):
        assert 0.6 < card.memory_rate.value / {"H100": 3.35e12, "H200": 4.8e12}[card.name] < 1.0
    assert torch.cuda.mem_get_info()[0] > free - (256 << 20)
