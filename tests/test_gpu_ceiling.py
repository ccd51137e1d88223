"""A GPU's memory as a hard ceiling: what the driver counts of a process, and what the allocator gets of it."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn
from weakref import WeakSet

import pytest
import torch
from nvml_faking import GEFORCE, fake_pynvml
from plan_samples import FORECAST, GIB, forecast_plan, resident
from tiny import tiny_model

from rowcast import LLM
from rowcast.errors import OutOfMemoryError, UserError
from rowcast.placement import nvml, process_memory
from rowcast.placement.constants import Constants
from rowcast.placement.nvml import CardMemory
from rowcast.placement.plan import Plan
from rowcast.placement.process_memory import OwnBytes, _own, first_look, own_bytes
from rowcast.placement.report import Measured, compare
from rowcast.runtime import device as devices
from rowcast.runtime import gpu_ceiling
from rowcast.runtime.gpu_ceiling import Ceiling, ceiling_bytes, outside_bytes, peak_bytes

MIB = 1 << 20
PID, UUID = os.getpid(), "1234"
CUDA = torch.device("cuda", 0)


class Gpu:
    """A card of 80 GiB, torch's allocator on it, and a driver that counts both."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.allocated = self.reserved = self.most = 0
        self.context = 500 * MIB
        self.limit = 0
        self.alone = True
        """This process is named, by its id."""
        self.card: dict[str, Any] = {"name": GEFORCE, "uuid": f"GPU-{UUID}", "memory": 80 * GIB}
        monkeypatch.setitem(sys.modules, "pynvml", fake_pynvml([self.card]))
        monkeypatch.setattr(process_memory, "_before", {})
        monkeypatch.setattr(gpu_ceiling, "_models", WeakSet())  # other tests' models may be there still
        for name, answer in {
            "is_available": lambda: True,
            "is_initialized": lambda: False,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "empty_cache": self.empty,
            "memory_allocated": lambda device: self.allocated,
            "memory_reserved": lambda device: self.reserved,
            "max_memory_reserved": lambda device: self.most,
            "mem_get_info": lambda device: (80 * GIB - self.reserved - self.context, 80 * GIB),
            "get_device_properties": lambda device: SimpleNamespace(uuid=UUID, total_memory=80 * GIB),
            "set_per_process_memory_fraction": self.hold,
        }.items():
            monkeypatch.setattr(torch.cuda, name, answer)
        self.count()

    def count(self) -> None:
        """The driver's count is that of now."""
        size = self.reserved + self.context
        self.card |= {"used": size + 700 * MIB, "processes": {PID if self.alone else 77: size}}

    def take(self, size: int) -> None:
        self.allocated += size
        self.reserved += size
        self.most = max(self.most, self.reserved)
        self.count()

    def empty(self) -> None:
        self.reserved = self.allocated
        self.count()

    def hold(self, share: float, device: torch.device) -> None:
        self.limit = round(share * 80 * GIB)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


def test_what_the_driver_says_of_a_cards_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    card = {"name": GEFORCE, "uuid": "GPU-1", "memory": 24 * GIB, "used": 5 * GIB, "processes": {7: GIB, 8: None}}
    monkeypatch.setitem(sys.modules, "pynvml", fake_pynvml([card]))
    assert nvml.card_memory("1") == nvml.card_memory("GPU-1") == CardMemory(5 * GIB, {7: GIB, 8: None})
    assert nvml.card_memory("2") is None
    monkeypatch.setitem(sys.modules, "pynvml", fake_pynvml([card], broken=("nvmlDeviceGetComputeRunningProcesses",)))
    assert nvml.card_memory("1") == CardMemory(5 * GIB, {})
    monkeypatch.setitem(sys.modules, "pynvml", fake_pynvml([card], broken=("nvmlDeviceGetMemoryInfo",)))
    assert nvml.card_memory("1") is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvml.card_memory("1") is None


def test_this_process_among_others() -> None:
    """By its id; in a container as the one that came; as all that the card holds more only where nobody else is named."""
    before, idle = CardMemory(2000, {1: 900}), CardMemory(600, {})

    def own(first: CardMemory | None, used: int, processes: dict[int, int | None], least: int = 100) -> OwnBytes | None:
        return _own(first, CardMemory(used, processes), 42, least)

    assert own(before, 9999, {1: 900, 42: 700}) == own(None, 9999, {42: 700, 43: 1}) == OwnBytes(700, whole_card=False)
    assert own(before, 9999, {1: 900, 8042: 700}) == OwnBytes(700, whole_card=False)
    assert own(before, 9999, {1: 900, 42: 50, 8042: 700}) is None  # whose id 42 is cannot be told
    assert own(before, 9999, {1: 900, 8042: 700, 8043: 700}) is None
    assert own(before, 2500, {1: None, 42: None}) is None
    assert own(idle, 1500, {}) == own(idle, 1500, {42: None}) == own(idle, 1500, {8042: None}) == OwnBytes(900, whole_card=True)
    assert own(idle, 1500, {8042: None, 8043: None}) is None
    assert own(idle, 650, {}) is None and own(None, 1500, {}) is None


def test_the_first_look_counts(gpu: Gpu) -> None:
    """In a container: the driver names the process by an id that it does not know."""
    gpu.card |= {"used": 700 * MIB, "processes": {}}
    first_look()
    gpu.alone = False
    gpu.take(GIB)
    first_look()
    assert own_bytes(UUID, GIB) == OwnBytes(GIB + 500 * MIB, whole_card=False)
    gpu.card["processes"] = {}
    assert own_bytes(f"GPU-{UUID}", GIB) == OwnBytes(GIB + 500 * MIB, whole_card=True)
    assert own_bytes("other", GIB) is None


@pytest.mark.usefixtures("gpu")
def test_a_look_comes_before_the_device_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where a ceiling was asked for, or a plan has one: to load the driver's library takes a while."""
    chosen: list[bool] = []

    def choose(asked: str) -> NoReturn:
        chosen.append(bool(process_memory._before))
        raise UserError("far enough")

    monkeypatch.setattr(devices, "choose_device", choose)
    tiny_model("llama-gqa", tmp_path)
    wishes: tuple[dict[str, Any], ...] = ({}, {"device": "cpu"}, {"gpu_memory": "1GiB"})
    for wish in wishes:
        with pytest.raises(UserError, match="far enough"):
            LLM(tmp_path, **wish)
    process_memory._before.clear()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(UserError, match="far enough"):
        LLM(tmp_path, gpu_memory="1GiB")
    assert chosen == [False, False, True, False]


def test_a_budget_leaves_room_for_what_is_no_tensor(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there and what comes, at least what plans assume; of several ranks their collectives, which take more over NVLink."""
    assert outside_bytes(CUDA, 1) == Constants().context_bytes
    gpu.context = 900 * MIB
    gpu.take(GIB)
    assert outside_bytes(CUDA, 1) == 1156 * MIB and outside_bytes(CUDA, 2) == (1156 + 256) * MIB
    monkeypatch.setattr(gpu_ceiling, "joined_by_nvlink", lambda: True)
    assert outside_bytes(CUDA, 1) == 1156 * MIB and outside_bytes(CUDA, 2) == (1156 + 840) * MIB
    assert outside_bytes(CUDA, 4) == (1156 + 256 + 3 * 584) * MIB
    budget, reason = devices.budget_bytes(CUDA, 24 * GIB, "gpu_memory")
    assert budget == 24 * GIB - 1156 * MIB and "without 1.1 GiB" in reason
    with pytest.raises(UserError, match=r"gpu_memory=512\.0 MiB is not more than the 1\.1 GiB that"):
        devices.budget_bytes(CUDA, 512 * MIB, "gpu_memory")
    with pytest.raises(UserError, match="that are free on cuda"):
        devices.budget_bytes(CUDA, 100 * GIB, "gpu_memory")
    assert devices.budget_bytes(CUDA, None, "gpu_memory")[0] == pytest.approx(0.9 * (79 * GIB - 900 * MIB), abs=1)


def plan(ceiling: int = 24 * GIB) -> Plan:
    """Of 23 GiB of tensors."""
    return replace(resident(budget_bytes=23 * GIB), ceiling_bytes=ceiling)


def test_the_allocator_gets_what_the_rest_leaves(gpu: Gpu) -> None:
    """At the start, and less once kernels and graphs have come; never more than the plan's budget."""
    held = Ceiling(CUDA, plan())
    assert gpu.limit == 23 * GIB  # as much as the plan asks for
    gpu.context = 2 * GIB
    gpu.take(20 * GIB)
    held.check()
    assert gpu.limit == 22 * GIB
    gpu.context = 3 * GIB
    gpu.reserved += 2 * GIB  # freed by tensors, and not by the allocator
    gpu.count()
    held.check()
    assert gpu.limit == 21 * GIB and gpu.reserved == 20 * GIB
    gpu.context = 5 * GIB
    gpu.count()
    with pytest.raises(
        OutOfMemoryError, match=r"takes 25\.0 GiB of cuda:0 by the driver's count, 5\.0 GiB of it .* gpu_memory=24\.0 GiB"
    ):
        held.check()


def test_earlier_models_are_not_counted(gpu: Gpu) -> None:
    gpu.take(30 * GIB)
    held = Ceiling(CUDA, plan())
    assert gpu.limit == 53 * GIB
    gpu.context = 4 * GIB
    gpu.take(20 * GIB)
    held.check()
    assert gpu.limit == 50 * GIB


def test_models_of_one_process_have_their_sum(gpu: Gpu) -> None:
    """A second one, with a lower ceiling or none, takes nothing from the first; when one goes, so does its share."""
    gpu.take(GIB)
    first = Ceiling(CUDA, plan())
    gpu.take(20 * GIB)
    small = resident(budget_bytes=2 * GIB)
    second = Ceiling(CUDA, replace(small, ceiling_bytes=3 * GIB))
    assert gpu.limit == (1 + 23 + 2) * GIB
    gpu.context = 4 * GIB
    gpu.take(2 * GIB)
    for held in (first, second):
        held.check()
        assert gpu.limit == (1 + 24 + 3 - 4) * GIB
    third = Ceiling(CUDA, replace(small, ceiling_bytes=0))
    first.check()
    assert gpu.limit == (1 + 24 + 3 + 2 - 4) * GIB
    gpu.allocated -= 20 * GIB
    gpu.context = GIB
    gpu.count()
    del first, third, held
    second.check()
    assert gpu.limit == (1 + 2) * GIB and gpu.reserved == 3 * GIB
    del second
    assert gpu.limit == 80 * GIB


def test_what_was_there_counts_as_the_allocator_holds_it(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few small tensors keep large pieces of memory, of which nothing goes back."""
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    gpu.take(3 * GIB)
    gpu.allocated = GIB
    held = Ceiling(CUDA, replace(resident(budget_bytes=2 * GIB), ceiling_bytes=3 * GIB))
    assert gpu.limit == 5 * GIB
    held.check()


def test_a_model_that_could_not_be_loaded_allows_nothing(gpu: Gpu) -> None:
    """Whoever keeps the error keeps its ceiling."""
    kept = Ceiling(CUDA, plan())
    kept.end()
    assert gpu.limit == 80 * GIB
    another = Ceiling(CUDA, replace(resident(budget_bytes=2 * GIB), ceiling_bytes=3 * GIB))
    assert gpu.limit == 2 * GIB
    another.end()


def test_a_plan_that_the_ceiling_has_no_room_for(gpu: Gpu) -> None:
    gpu.context = 3 * GIB
    gpu.count()
    small = resident(budget_bytes=2 * GIB)
    needed = small.budget_bytes - small.margin_bytes
    with pytest.raises(OutOfMemoryError, match=r"gpu_memory=3\.\d GiB leaves .* beside the 3\.0 GiB that"):
        Ceiling(CUDA, replace(small, ceiling_bytes=3 * GIB + needed // 2))


def test_steps_are_checked_more_and_more_seldom(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    held, seen = Ceiling(CUDA, plan()), list[int]()
    monkeypatch.setattr(held, "check", lambda: seen.append(held._steps))
    for _ in range(100):
        held.stepped()
    assert seen == [1, 2, 4, 8, 16, 32, 64]
    held.end()


def test_without_a_ceiling_only_the_budget_counts(gpu: Gpu) -> None:
    held = Ceiling(CUDA, plan(0))
    gpu.context = 70 * GIB
    gpu.count()
    held.check()
    assert gpu.limit == 23 * GIB
    Ceiling(torch.device("cpu"), resident(device="cpu")).check()


def test_a_driver_that_does_not_tell(gpu: Gpu, caplog: pytest.LogCaptureFixture) -> None:
    """What is assumed is told, once; others' memory, where processes are not told apart, is nobody's fault."""
    gpu.alone = False
    gpu.take(0)
    held = Ceiling(CUDA, plan())
    held.check()
    assert gpu.limit == 23 * GIB and [each.message for each in caplog.records] == [
        "the driver does not tell what this process takes of cuda:0: beside tensors 768.0 MiB are assumed"
    ]
    two = Ceiling(CUDA, replace(resident(budget_bytes=23 * GIB), world=2, ceiling_bytes=26 * GIB))
    assert two._outside() == (768 + 256) * MIB
    process_memory._before[UUID] = CardMemory(0, {})
    gpu.card |= {"used": 9 * GIB, "processes": {}}
    assert gpu_ceiling._counted(CUDA) is None
    gpu.card["used"] = 2 * GIB
    assert gpu_ceiling._counted(CUDA) == OwnBytes(2 * GIB, whole_card=True)


def test_the_ceiling_of_a_plan() -> None:
    """Of one that foretells memory: the whole of a card, so that a larger one stands in."""
    assert ceiling_bytes(resident()) is None and ceiling_bytes(replace(resident(), device="cpu", ceiling_bytes=5)) is None
    assert ceiling_bytes(forecast_plan()) == 22 * GIB
    assert ceiling_bytes(replace(forecast_plan(), ceiling_bytes=5)) == 5


def test_the_most_by_the_drivers_count(gpu: Gpu) -> None:
    gpu.take(4 * GIB)
    gpu.allocated = GIB
    gpu.empty()
    assert peak_bytes(CUDA) == OwnBytes(4 * GIB + 500 * MIB, whole_card=False)
    gpu.alone = False
    gpu.count()
    assert peak_bytes(CUDA) is None


def test_it_is_compared() -> None:
    gpus = FORECAST.memory[:2]
    for whole_card in (False, True):
        driver = OwnBytes(20 * GIB, whole_card)
        found = compare(forecast_plan(), Measured(first_tokens=((100, 0.5),), acceptance={}, driver=driver))
        assert found is not None
        line = next(line for line in found.lines if line.what == "GPU memory by the driver")
        assert line.predicted == max(each.budget_bytes - each.classes["margin"] for each in gpus) and line.measured == 20 * GIB
        assert "at most 22.0 GiB" in line.note and ("others' count" in line.note) is whole_card


def test_a_plan_without_a_forecast_has_its_memory_compared() -> None:
    held = plan()
    seen = Measured(first_tokens=((1, 0.1),), acceptance={}, allocated_bytes=GIB, driver=OwnBytes(20 * GIB, whole_card=False))
    found = compare(held, seen)
    assert found is not None and not found.ratios
    by_driver = found.lines[-1]
    assert by_driver.predicted == 24 * GIB - held.margin_bytes and by_driver.measured == 20 * GIB
    assert "at most 24.0 GiB" in by_driver.note and found.lines[0].predicted == 23 * GIB - held.margin_bytes
    assert compare(plan(0), seen) is None and compare(held, replace(seen, first_tokens=())) is None
