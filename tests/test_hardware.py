"""Machines by name, the table of cards, what the driver and the system say, and what is remembered of a machine."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from nvml_faking import GEFORCE, fake_pynvml

from rowcast.errors import UserError
from rowcast.placement import cache, here, host, nvml
from rowcast.placement.cards import CARDS, find_card, known_card
from rowcast.placement.hardware import GIB, Machine, Quantity, machine_from, parse_gpus
from rowcast.placement.measured import CpuProduct, GpuProbe, HostProbe, PeerProbe, Probe, RowRate


def names(text: str) -> list[list[str]]:
    return [[card.name for card in node] for node in parse_gpus(text)]


# Machines by name.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("RTX4090", [["RTX4090"]]),
        ("4090", [["RTX4090"]]),
        ("2xRTX4090", [["RTX4090"] * 2]),
        (" 2 x rtx 4090 ", [["RTX4090"] * 2]),
        ("8xA100-80GB", [["A100-80GB"] * 8]),
        ("2x8xH100", [["H100"] * 8] * 2),
        ("1xA100-80GB+1xRTX4090", [["A100-80GB", "RTX4090"]]),
        ("2*l4+T4", [["L4", "L4", "T4"]]),
    ],
)
def test_gpus_by_name(text: str, expected: list[list[str]]) -> None:
    assert names(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "not a list of cards"),
        ("2x", "not in the table"),
        ("0xH100", "asks for 0 cards: write a count from 1 to 4096"),
        ("99999999999999xH100", "write a count from 1 to 4096"),
        ("2x2xH100+L4", "not a list of cards"),
        ("A100", "did you mean A100-40GB, A100-80GB, A100-80GB-PCIe?"),
        ("2xRTX4080", "RTX4090"),
        ("4xH201", f"(did you mean H200?): use one of {', '.join(CARDS)}, or"),
        ("4xFOO", f"not in the table: use one of {', '.join(CARDS)}, or"),
        ("RTX 4090 Laptop GPU", "not in the table"),
    ],
)
def test_gpus_that_are_refused(text: str, expected: str) -> None:
    with pytest.raises(UserError, match=r"(gpus=|the card)") as error:
        parse_gpus(text)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB-PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H200", "H200"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-16GB", "V100-16GB"),
        ("NVIDIA RTX A6000", "RTXA6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX6000Ada"),
    ],
)
def test_the_drivers_names_are_known(said: str, name: str) -> None:
    assert find_card(said) is CARDS[name]


def test_every_figure_of_the_table_has_a_source() -> None:
    for card in CARDS.values():
        for quantity in (card.memory_rate, card.bus_rate, card.peer_rate, card.flops):
            assert quantity.origin == "datasheet" and quantity.source
        assert (card.peer_rate.value > 0) == (card.nvlink != "none")
        assert 0.93 < card.memory_bytes / (card.nominal_gib * GIB) <= 1.0
        assert find_card(card.name) is card


def test_the_table_holds_dense_rates() -> None:
    """Twice as high where sparse rates, or those with 16-bit sums, got in; NVLink of one direction."""
    expected = {"RTX4090": 165e12, "H100": 989e12, "L4": 121e12, "RTXA6000": 155e12, "L40S": 362e12, "T4": 65e12}
    for name, flops in expected.items():
        assert CARDS[name].flops.value == pytest.approx(flops, rel=0.01)
    assert CARDS["H200"].peer_rate.value == 450e9
    assert CARDS["RTX5090"].bus_rate.value == 64e9


def test_how_cards_reach_one_another() -> None:
    assert machine_from("2xRTX4090", 128 * GIB).nodes[0].link == "host"
    assert machine_from("4xH200").nodes[0].link == "nvlink"
    assert machine_from("2xL40S").nodes[0].link == "pcie"
    assert machine_from("A100-80GB+RTX4090").nodes[0].link == "host"
    assert machine_from("2xRTX3090", link="nvlink").nodes[0].peer_rate.value == 56.25e9
    assert machine_from("4xH200", link="pcie").nodes[0].peer_rate.value == 64e9


@pytest.mark.parametrize(
    ("link", "rate", "origin"),
    [
        ("pcie4x8", 16e9, "datasheet"),
        ("PCIe 5.0 x16", 32e9, "datasheet"),  # The card has PCIe 4.
        ("25GB/s", 25e9, "given"),
        ("25gb/s", 25e9, "given"),
        ("200Gb/s", 25e9, "given"),
        ("host+12.5GB/s", 12.5e9, "given"),
    ],
)
def test_a_bus_by_name(link: str, rate: float, origin: str) -> None:
    bus = machine_from("2xRTX4090", 64 * GIB, link=link).cards[1].bus_rate
    assert (bus.value, bus.origin) == (rate, origin)


@pytest.mark.parametrize(
    ("gpus", "link", "expected"),
    [
        ("2xRTX4090", "nvlink", "has no NVLink: use link=host"),
        ("2xRTX4090", "pcie", "no peer-to-peer access: use link=host"),
        ("4xRTX3090", "nvlink", "bridges for pairs: use link=host"),
        ("H100", "25", "not a rate"),
        ("H100", "pcie9x3", "use generation 1 to 6"),
        ("H100", "900TB/s", "use a rate from"),
    ],
)
def test_links_that_are_refused(gpus: str, link: str, expected: str) -> None:
    with pytest.raises(UserError, match="link=") as error:
        machine_from(gpus, link=link)
    assert expected in str(error.value)


def test_several_nodes_need_a_rate_between_them() -> None:
    machine = machine_from("2x8xH100", 1024 * GIB, inter_node="400Gb/s")
    assert machine.num_gpus == 16 and machine.is_uniform
    assert machine.inter_node_rate is not None and machine.inter_node_rate.value == 50e9
    assert machine.describe() == (
        "2 nodes of 8 x H100 (79.6 GiB, PCIe 5 x16), peers over NVLink, host 1.0 TiB; 50 GB/s between nodes"
    )
    for gpus, rate, told in (("2x8xH100", None, "no rate between them: add"), ("8xH100", "50GB/s", "has one: leave it out")):
        with pytest.raises(UserError, match=told):
            machine_from(gpus, inter_node=rate)


def test_a_lower_budget_for_a_card() -> None:
    assert machine_from("H200", gpu_memory_bytes=24 * GIB).cards[0].memory_bytes == 24 * GIB
    assert machine_from("2xRTX4090", gpu_memory_bytes=24 * GIB) == machine_from("2xRTX4090")
    with pytest.raises(UserError, match=r"gpu_memory=24\.5 GiB is more than the 24\.0 GiB of a RTX4090"):
        machine_from("2xRTX4090", gpu_memory_bytes=49 * GIB // 2)
    with pytest.raises(UserError, match=r"gpu_memory=48\.0 GiB is more than the 24\.0 GiB of a RTX4090"):
        machine_from("H200+RTX4090", gpu_memory_bytes=48 * GIB)


def test_a_host_that_is_assumed_says_so() -> None:
    desktop, server = machine_from("2xRTX4090").nodes[0].host, machine_from("8xA100-80GB").nodes[0].host
    assert (desktop.memory_origin, desktop.memory_rate.origin, desktop.flops.origin) == ("assumed",) * 3
    assert server.memory_rate.value > desktop.memory_rate.value
    assert server.memory_bytes == 1024 * GIB
    given = machine_from("2xRTX4090", 200 * GIB).nodes[0].host
    assert (given.memory_bytes, given.memory_origin) == (200 * GIB, "given")
    assert given.pin_bytes < given.memory_bytes


def test_what_if() -> None:
    machine = machine_from("2xRTX4090", 100 * GIB)
    changed = machine.with_changes(gpu_memory_bytes=GIB, host_memory_bytes=100 * GIB, bus=2.0)
    assert changed.cards[0].memory_bytes == machine.cards[0].memory_bytes + GIB
    assert changed.cards[1].bus_rate.value == 64e9 and changed.cards[1].bus_rate.origin == "datasheet"
    assert changed.nodes[0].host.memory_bytes == 200 * GIB
    assert changed.nodes[0].host.pin_bytes == pytest.approx(2 * machine.nodes[0].host.pin_bytes, abs=2)
    assert machine.with_changes() == machine


# The driver.

H200 = "NVIDIA H200"
PAIR = [{"name": GEFORCE, "uuid": f"GPU-{place}", "memory": 25757220864} for place in "ab"]


def test_two_cards_of_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_pynvml(PAIR))
    facts = nvml.read()
    assert facts is not None and facts.driver == "580.1"
    first = facts.by_uuid("a")
    assert first is not None and first is facts.by_uuid("GPU-a")
    assert (first.link, first.link_limit) == (nvml.PcieLink(1, 16), nvml.PcieLink(4, 16))
    assert first.nvlinks == 0 and not first.mig
    assert facts.pairs == (nvml.DriverPair(0, 1, "one host bridge", False),)
    assert nvml.pcie_link("b") == nvml.PcieLink(1, 16)
    assert nvml.pcie_link("c") is None


def test_a_cards_size_as_it_is_sold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver tells of 12 MiB less than 24 GiB."""
    monkeypatch.setattr(cache, "load_probe", lambda: None)
    monkeypatch.setitem(sys.modules, "pynvml", fake_pynvml(PAIR))
    cards = here.this_machine(gpu_memory_bytes=24 * GIB).machine.cards
    assert [card.memory_bytes for card in cards] == [PAIR[0]["memory"]] * 2
    with pytest.raises(UserError, match=r"gpu_memory=25\.0 GiB is more than the 24\.0 GiB of this machine's RTX4090"):
        here.this_machine(gpu_memory_bytes=25 * GIB)


def test_links_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [{"name": H200, "uuid": f"GPU-{place}", "memory": 1, "nvlinks": 18} for place in "ab"]
    monkeypatch.setitem(sys.modules, "pynvml", fake_pynvml(cards))
    facts = nvml.read()
    assert facts is not None and facts.gpus[1].nvlinks == 18 and facts.pairs[0].peer_access is True
    assert here.joined_by_nvlink()
    monkeypatch.setitem(sys.modules, "pynvml", fake_pynvml(cards[:1]))
    assert not here.joined_by_nvlink()
    monkeypatch.setitem(
        sys.modules, "pynvml", fake_pynvml([{"name": GEFORCE, "uuid": f"GPU-{place}", "memory": 1} for place in "ab"])
    )
    assert not here.joined_by_nvlink()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert not here.joined_by_nvlink()


def test_a_driver_that_tells_little(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = ("nvmlDeviceGetNumaNodeId", "nvmlDeviceGetCurrPcieLinkWidth", "nvmlDeviceGetP2PStatus", "nvmlDeviceGetMemoryInfo")
    module = fake_pynvml(PAIR, broken=silent)
    del module.nvmlDeviceGetMigMode
    monkeypatch.setitem(sys.modules, "pynvml", module)
    facts = nvml.read()
    assert facts is not None
    gpu = facts.gpus[0]
    assert (gpu.numa_node, gpu.link, gpu.memory_bytes, gpu.mig) == (None, None, None, False)
    assert facts.pairs[0].peer_access is None


@pytest.mark.parametrize("broken", ["nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex"])
def test_no_driver(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_pynvml(PAIR, broken=(broken,)))
    assert nvml.read() is None


def test_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvml.read() is None and nvml.pcie_link("a") is None


# The system.


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = "MemTotal:       67108864 kB\nMemFree: 1 kB\nMemAvailable:   33554432 kB\n"


def test_a_desktop(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": MEMINFO,
        "proc/cpuinfo": "processor: 0\nmodel name\t: A CPU\n",
        "sys/devices/system/node/node0/x": "",
    }
    facts = host.read(system(tmp_path, files))
    assert (facts.cpu, facts.memory_bytes, facts.available_bytes) == ("A CPU", 64 * GIB, 32 * GIB)
    assert (facts.numa_nodes, facts.wsl, facts.pinnable_bytes) == (1, False, 32 * GIB)


def test_a_container_has_what_its_limits_leave(tmp_path: Path) -> None:
    group = {
        "memory.max": str(8 * GIB),
        "memory.current": str(5 * GIB),
        "memory.stat": f"anon 1\ninactive_file {GIB}\n",
        "cpu.max": "100000 100000",
    }
    facts = host.read(system(tmp_path, {"proc/meminfo": MEMINFO} | {f"sys/fs/cgroup/{k}": v for k, v in group.items()}))
    assert (facts.memory_bytes, facts.available_bytes, facts.cores) == (8 * GIB, 4 * GIB, 1)


def test_no_limit_and_wsl(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": MEMINFO,
        "sys/fs/cgroup/memory.max": "max\n",
        "sys/fs/cgroup/memory.current": "5",
        "proc/sys/kernel/osrelease": "5.15.90.1-microsoft-standard-WSL2\n",
    }
    facts = host.read(system(tmp_path, files))
    assert facts.memory_bytes == 64 * GIB and facts.wsl
    assert facts.pinnable_bytes == GIB


# What a probe found.

HOST = HostProbe(
    cpu="A CPU", cores=16, numa_nodes=1, memory_bytes=64 * GIB, available_bytes=60 * GIB, pin_bytes=50 * GIB, pin_reason="a trial",
    wsl=False, threads=8, memory_rate=50e9, read_rate=45e9, products=(CpuProduct(2, 40e9, 30e9),),
)  # fmt: skip
ROWS = tuple(RowRate(kib << 10, rate * 1e9) for kib, rate in ((4, 12), (8, 20), (16, 23), (32, 24)))


def gpu(name: str = GEFORCE, **changes: Any) -> GpuProbe:
    known: dict[str, Any] = {
        "memory_bytes": 25 * 10**9, "pcie_generation": 4, "pcie_lanes": 8, "memory_rate": 900e9, "to_device": 24e9, "to_host": 25e9,
        "to_device_together": 13e9, "flops": 150e12, "rows": ROWS,
    }  # fmt: skip
    return GpuProbe(name=name, **(known | changes))


def test_a_machine_of_what_was_measured() -> None:
    probe = Probe(host=HOST, gpus=(gpu(), gpu(to_device=12e9)), peers=(PeerProbe(0, 1, 9e9, False),))
    machine = probe.machine()
    card, (node,) = machine.cards[0], machine.nodes
    assert card.name == "RTX4090" and card.memory_bytes == 25 * 10**9
    assert [q.origin for q in (card.memory_rate, card.bus_rate, card.flops)] == ["measured"] * 3
    assert [c.bus_rate.value for c in machine.cards] == [24e9, 12e9]
    assert node.link == "host" and node.shared_bus_rate is not None and node.shared_bus_rate.value == 26e9
    assert node.host.memory_rate == Quantity(50e9, "measured", "copy or sum by 8 threads")
    assert node.host.pin_bytes == 50 * GIB


def test_measured_links_between_cards() -> None:
    cards = tuple(gpu(H200, nvlinks=18) for _ in range(3))
    rates = {(0, 1): 400e9, (0, 2): 300e9, (1, 2): 200e9}
    peers = tuple(PeerProbe(*pair, rate, True) for pair, rate in rates.items())
    node = Probe(host=HOST, gpus=cards, peers=peers).machine().nodes[0]
    assert node.link == "nvlink" and [card.peer_rate.value for card in node.cards] == [300e9, 200e9, 200e9]
    without = tuple(gpu("NVIDIA L40S") for _ in range(3))
    assert Probe(host=HOST, gpus=without, peers=peers).machine().nodes[0].link == "pcie"


def test_what_was_not_measured_is_the_tables() -> None:
    bare = gpu(memory_rate=None, to_device=None, flops=None, to_device_together=None)
    card = Probe(host=HOST, gpus=(bare,)).machine().cards[0]
    assert card.memory_rate == CARDS["RTX4090"].memory_rate and card.bus_rate == CARDS["RTX4090"].bus_rate
    slot = gpu(to_device=None, pcie_generation_limit=3, pcie_lanes_limit=8)
    assert Probe(host=HOST, gpus=(slot,)).machine().cards[0].bus_rate.value == 8e9


def test_cards_that_the_table_lacks() -> None:
    card = Probe(host=HOST, gpus=(gpu("NVIDIA X1"),)).machine().cards[0]
    assert (card.name, card.flops.value, card.memory_rate.origin) == ("NVIDIA X1", 150e12, "measured")
    with pytest.raises(UserError, match="is not in the table and was not measured"):
        Probe(host=HOST, gpus=(gpu("NVIDIA X1", flops=None),)).machine()
    with pytest.raises(UserError, match="has no GPU"):
        Probe(host=HOST).machine()


def test_crossover() -> None:
    assert gpu().kernel_row_bytes == 16 << 10  # .85 of 24 GB/s are 20.4.
    assert gpu(to_device=30e9).kernel_row_bytes is None
    assert gpu(rows=(RowRate(4096, 23e9), RowRate(8192, 10e9), RowRate(16384, 23e9))).kernel_row_bytes == 16384
    assert gpu().whole_block_density(8192) == pytest.approx(20 / 24)
    assert gpu().whole_block_density(10_000) == pytest.approx(20 / 24)
    assert gpu(rows=()).whole_block_density(8192) is None


# What is remembered.

ME = cache.Identity("A CPU", 16, "580.1", (GEFORCE, GEFORCE))
PROBE = Probe(
    host=HOST, gpus=(gpu(), gpu()), peers=(PeerProbe(0, 1, None, False, "one host bridge"),), driver="580.1", seconds=3.5
)


def ours(**parts: Any) -> bytes:
    return json.dumps({"format": 1, "machine": ME.digest} | parts).encode()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ROWCAST_CACHE", str(tmp_path))
    return tmp_path


def test_a_probe_is_kept(folder: Path) -> None:
    assert cache.load_probe(ME) is None
    path = cache.store_probe(PROBE, ME)
    assert path is not None and path.parent == folder
    assert cache.load_probe(ME) == PROBE
    assert cache.load_probe(cache.Identity("A CPU", 16, "590", ME.cards)) is None
    assert [file.name for file in folder.iterdir()] == [path.name]


def test_corrections_are_medians_of_the_latest(folder: Path) -> None:
    cache.store_probe(PROBE, ME)
    for measured in [100.0] * 20 + [1.0, 2.0, 3.0] * 5 + [2.0]:
        cache.add_correction("decode", predicted=2.0, measured=measured, machine=ME)
    cache.add_correction("memory", predicted=0.0, measured=1.0, machine=ME)
    assert cache.corrections(ME) == {"decode": 1.0}
    assert cache.load_probe(ME) == PROBE


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b"{}", b'{"format": 2}', b'{"format": 1, "machine": "other"}', b"9" * (5 << 20),
        ours(probe={"format": 1}, corrections=[1]),
        ours(probe=PROBE.to_json() | {"format": 99}, corrections={"a": ["b"]}),
        ours(probe=PROBE.to_json() | {"seconds": -1.0}),
        ours(probe=PROBE.to_json() | {"gpus": "two"}),
        ours(probe=PROBE.to_json() | {"driver": 5}),
    ],
)  # fmt: skip
def test_files_that_are_not_ours_are_left_out(content: bytes, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = folder / f"{ME.digest}.json"
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING, "rowcast"):
        assert cache.load_probe(ME) is None
    assert str(path) in caplog.text
    assert cache.corrections(ME) == {}
    cache.store_probe(PROBE, ME)
    assert cache.load_probe(ME) == PROBE


def test_a_folder_that_cannot_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "file").write_text("")
    monkeypatch.setenv("ROWCAST_CACHE", str(folder / "file" / "below"))
    with caplog.at_level(logging.WARNING, "rowcast"):
        assert cache.store_probe(PROBE, ME) is None
    assert "nothing is remembered" in caplog.text


def test_where_files_lie() -> None:
    assert cache.folder({"ROWCAST_CACHE": "/a", "XDG_CACHE_HOME": "/b"}) == Path("/a")
    assert cache.folder({"XDG_CACHE_HOME": "/b"}) == Path("/b/rowcast")
    assert cache.folder({"XDG_CACHE_HOME": "b"}) == cache.folder({}) == Path.home() / ".cache" / "rowcast"


def test_this_machine_is_known_by_its_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", fake_pynvml(PAIR))
    found = cache.this_machine()
    assert (found.driver, found.cards) == ("580.1", (GEFORCE, GEFORCE))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    fewer = cache.this_machine().digest
    monkeypatch.setitem(sys.modules, "pynvml", fake_pynvml(PAIR[:1]))
    assert len({found.digest, fewer, cache.this_machine().digest}) == 3


def test_machines_compare_by_value() -> None:
    assert isinstance(machine_from("2xH100"), Machine) and machine_from("2xH100") == machine_from("2xh100")
    assert known_card("nothing") is None
