"""What benchmarks tell of the time between the passes of rounds on a device."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_device_rounds import GREEDY, SEEDED, SOME, make_llm, models  # noqa: F401
from test_speculation import SELF
from triton_interpreting import take_arrays_as_bounds

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from _timeline import Kernel, Timeline, outside, profiled

from rowcast.kernels import gpu

take_arrays_as_bounds()
TRIFORCE = f"draft:kv=48,sinks=4,gamma=1 / {SELF},gamma=2 / plain"


def later(seconds: float, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        time.sleep(seconds)
        return function(*args)

    return call


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_a_step_is_its_passes_and_what_is_between_them(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """What is slow is found where it is: of a round's choice of chunks 20 ms, of the host behind it 30 ms."""
    monkeypatch.setattr(gpu, "interpreted", True)
    llm = make_llm(models, TRIFORCE)
    rounds: Any = llm.engine._executor._rounds  # type: ignore[attr-defined]
    choose, settle = rounds._refresh.run, rounds._settle
    rounds._refresh.run, rounds._settle = later(0.02, choose), later(0.03, settle)
    timeline = Timeline(rounds)
    request = llm.engine.add(SOME[0], replace(SEEDED, max_tokens=12))
    while request.stats.rounds < 2:
        llm.engine.step()
    assert timeline.seconds()
    timeline.clear()
    assert timeline.seconds() == {}
    counts = request.stats.rungs
    before = sum(each.seconds for each in counts.values())
    started = time.perf_counter()
    for _ in range(3):
        llm.engine.step()
    step_s = (time.perf_counter() - started) / 3
    passes_s = (sum(each.seconds for each in request.stats.rungs.values()) - before) / 3
    found = timeline.seconds()
    assert set(found) == {"gaps", "chunks", "waits", "host"}
    assert found["chunks"] > 0.02
    assert 0.03 < found["host"] < found["waits"]
    assert found["gaps"] + found["chunks"] + found["waits"] == pytest.approx(step_s - passes_s, rel=0.3)


def test_kernels_that_no_pass_launched() -> None:
    """Each belongs to the call that launched it, a graph's kernels to the graph's, whenever they run."""

    def call(at: float, correlation: int, cat: str = "cuda_runtime") -> dict[str, Any]:
        return {"cat": cat, "name": "cudaGraphLaunch", "ts": at, "dur": 1.0, "args": {"correlation": correlation}}

    def ran(name: str, correlation: int, dur: float, cat: str = "kernel") -> dict[str, Any]:
        return {"cat": cat, "name": name, "ts": 500.0, "dur": dur, "args": {"correlation": correlation}}

    marked = [{"cat": "user_annotation", "name": "pass of a round", "ts": at, "dur": 10.0, "args": {}} for at in (100.0, 200.0)]
    other = {"cat": "user_annotation", "name": "another", "ts": 100.0, "dur": 200.0, "args": {}}
    calls = [call(99.0, 1), call(105.0, 2), call(150.0, 3), call(209.0, 4, "cuda_driver"), call(230.0, 5)]
    kernels = [
        ran("copy", 1, 3.0, "gpu_memcpy"), ran("product", 2, 40.0), ran("product", 2, 40.0), ran("score", 3, 6.0),
        ran("product", 4, 40.0), ran("score", 5, 8.0), ran("fill", 77, 1.0, "gpu_memset"),
    ]  # fmt: skip
    found = outside([*marked, other, *calls, *kernels, {"ph": "M", "name": "process_name"}], 2)
    assert [(each.name, each.calls, round(1e6 * each.seconds, 9)) for each in found] == [
        ("score", 1.0, 7.0), ("copy", 0.5, 1.5), ("fill", 0.5, 0.5),
    ]  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_passes_are_marked_in_a_profile(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(gpu, "interpreted", True)
    marks: list[Any] = []

    def note(events: Any, times: int) -> list[Kernel]:
        marks.extend(each for each in events if each.get("cat") == "user_annotation" and each["name"] == "pass of a round")
        return outside(events, times)

    monkeypatch.setattr("_timeline.outside", note)
    llm = make_llm(models, "draft:kv=full,gamma=1 / plain")
    rounds: Any = llm.engine._executor._rounds  # type: ignore[attr-defined]
    request = llm.engine.add(SOME[0], replace(GREEDY, max_tokens=12))
    while request.stats.rounds < 1:
        llm.engine.step()
    assert profiled(rounds, llm.engine.step, 2) == []
    assert len(marks) == 4
