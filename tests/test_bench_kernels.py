"""`rowcast bench kernels`: which cases run, what the report says of them, and what happens to one that fails."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import rowcast.cli
from rowcast.bench import kernels
from rowcast.bench.gpu_timing import copy_bandwidth
from rowcast.bench.kernel_cases.case import Case
from rowcast.errors import UserError


def _fast() -> None: ...


def _slow() -> None: ...


def _broken() -> None: ...


def _first(device: str) -> Iterator[Case]:
    assert device == "a card"
    yield Case("gather", "8 x 8, bf16", 4_000, [_fast], {"library": [_slow]}, "rows in order")
    yield Case("product", "8 x 8, bf16", 2_000, [_slow])


def _second(device: str) -> Iterator[Case]:
    yield Case("product", "16 x 16, bf16", 8_000, [_broken])
    yield Case("scan", "100 tokens", 1_000, [_fast], {"broken": [_broken]})
    raise RuntimeError("no room for the next case\nand a long trace")


def _seconds(calls: Sequence[Callable[[], object]], *, replays: int) -> float:
    assert replays == 7
    if calls[0] is _broken:
        raise RuntimeError("out of resources: shared memory\nand what to do about it")
    return 2e-9 if calls[0] is _fast else 8e-9


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that copies 2 TB/s and two families of cases on it."""
    modules = {"first": SimpleNamespace(cases=_first), "second": SimpleNamespace(cases=_second)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(kernels, "copy_bandwidth", lambda: 2e12)
    monkeypatch.setattr(kernels, "graph_seconds", _seconds)
    monkeypatch.setattr(kernels, "FAMILIES", ("first", "absent", "second"))
    monkeypatch.setattr(kernels, "_module", modules.get)


def test_figures(pretended: None) -> None:
    report = kernels.run(only="gather", repeat=7)
    assert report["device"] == "a card" and report["copy_bytes_per_s"] == 2e12 and report["multiprocessors"] == 132
    assert set(report["versions"]) == {"torch", "cuda", "triton", "driver"}
    [case] = [case for case in report["cases"] if case["family"] == "first"]
    assert case == {
        "family": "first",
        "name": "gather",
        "shape": "8 x 8, bf16",
        "bytes": 4_000,
        "time_s": 2e-9,
        "floor_s": 2e-9,
        "share_of_floor": 1.0,
        "peers": {"library": {"time_s": 8e-9, "ratio": 4.0}},
        "note": "rows in order",
    }


@pytest.mark.parametrize(
    ("only", "names"),
    [
        (None, ["gather", "product", "product", "scan"]),
        ("first", ["gather", "product"]),
        ("product 16", ["product"]),
        ("100 tok", ["scan"]),
    ],
)
def test_only(pretended: None, only: str | None, names: list[str]) -> None:
    report = kernels.run(only, 7)
    assert [case["name"] for case in report["cases"] if case["name"] != "second"] == names


def test_no_case_fits(pretended: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "FAMILIES", ("first",))
    with pytest.raises(UserError, match="no case has 'gahter' in its name: there are first gather 8 x 8, bf16; first product"):
        kernels.run("gahter", 7)


def test_a_case_that_fails_leaves_the_others(pretended: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert rowcast.cli.main(["bench", "kernels", "--repeat", "7"]) == 1
    out, err = capsys.readouterr()
    report: dict[str, Any] = json.loads(out)
    assert len(out.splitlines()) == 1
    failed = {(case["name"], case["shape"]): case["error"] for case in report["cases"] if "error" in case}
    assert failed == {
        ("product", "16 x 16, bf16"): "RuntimeError: out of resources: shared memory",
        ("scan", "100 tokens"): "RuntimeError: out of resources: shared memory",
        ("second", ""): "RuntimeError: no room for the next case",
    }
    [scan] = [case for case in report["cases"] if case["name"] == "scan"]
    assert scan["time_s"] == 2e-9 and scan["peers"] == {}
    lines = err.splitlines()
    [gather] = [line for line in lines if "gather" in line]
    assert "100%" in gather and "library 0.0 (4.00x); rows in order" in gather
    assert any("failed" in line and "out of resources" in line for line in lines)


def test_success_ends_with_json(pretended: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(kernels, "FAMILIES", ("first",))
    assert rowcast.cli.main(["bench", "kernels", "--repeat", "7", "--json"]) == 0
    out, err = capsys.readouterr()
    assert not err
    assert [case["name"] for case in json.loads(out)["cases"]] == ["gather", "product"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert rowcast.cli.main(["bench", "kernels"]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err == "rowcast: bench kernels measures a GPU and none is visible: run it on a machine with a GPU.\n"


def test_families_that_are_there_have_cases() -> None:
    assert any(kernels._module(family) is not None for family in kernels.FAMILIES)
    assert kernels._module("nothing") is None
    for family in kernels.FAMILIES:
        module = kernels._module(family)
        assert module is None or callable(module.cases)


@pytest.mark.gpu
def test_a_copy_stays_behind_its_own_floor() -> None:
    source, target = (torch.zeros(1 << 28, dtype=torch.uint8, device="cuda") for _ in range(2))

    def copy() -> None:
        target.copy_(source)

    case = Case("copy", "256 MiB", 2 * source.nbytes, [copy], {"itself": [copy]})
    seen = []
    for _ in range(5):  # other processes may use the GPU at the same time
        figures = kernels.measure(case, copy_bandwidth(), 5)
        seen.append((figures["share_of_floor"], figures["peers"]["itself"]["ratio"]))
    assert any(0.7 < share < 1.1 and ratio == pytest.approx(1, abs=0.1) for share, ratio in seen), seen
