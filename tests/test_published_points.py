"""Times that others published, and our own, by the cost model alone: within their bounds, and out of them where a constant is wrong."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType

import pytest

from rowcast.placement.constants import ALL_REDUCE_S, LOWBIT_SHARES, Constants

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "published_points.py"
DOC = (ROOT / "docs" / "planning.md").read_text()

REQUIRED = {
    "triforce-7b-plain": 840,
    "triforce-7b": 108,
    "triforce-13b-plain": 1794,
    "triforce-13b": 226,
    "triforce-a100-full": 56,
    "triforce-a100-retrieval": 14,
    "dejavu-gain": 2,
    "flexgen-streaming": 8 * 32 / 1.57,
}
OWN = {"own-copy": 2.96, "own-7b": 5.53, "own-135m": 1e3 / 1293, "own-32k": 10.9}


@pytest.fixture(scope="module")
def points() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        yield importlib.import_module("published_points")


def off(points: ModuleType, constants: Constants) -> list[str]:
    """Points that miss their bounds."""
    return [point.key for point in points.POINTS if abs(point.error(constants)) > point.most_error]


@pytest.mark.parametrize("key", REQUIRED)
def test_published_within_a_quarter(points: ModuleType, key: str) -> None:
    point = next(point for point in points.POINTS if point.key == key)
    assert point.required and point.published == REQUIRED[key]
    assert abs(point.error(Constants())) <= 0.25


@pytest.mark.parametrize("key", OWN)
def test_own_within_a_tenth(points: ModuleType, key: str) -> None:
    point = next(point for point in points.POINTS if point.key == key)
    assert point.required and point.published == OWN[key]
    assert abs(point.error(Constants())) <= 0.10


def test_all_that_are_covered_are_within_their_bounds(points: ModuleType) -> None:
    assert off(points, Constants()) == []
    assert max(point.most_error for point in points.POINTS if point.role != "not covered") == 0.25


MUTATIONS = {
    "half the copy rate": ("copy_share", 0.5),
    "half the weights' rate": ("weights_share", 0.5),
    "twice the weights' rate": ("weights_share", 2.0),
    "half the KV's rate": ("kv_share", 0.5),
    "twice the KV's rate": ("kv_share", 2.0),
    "half the rows' rate": ("rows_share", 0.5),
    "half the bus": ("bus_share", 0.5),
    "twice the bus": ("bus_share", 2.0),
    "half the host's memory": ("host_share", 0.5),
    "twice a layer's calls": ("layer_s", 2.0),
    "twice a framework's calls": ("eager_layer_s", 2.0),
    "twice a round's host work": ("round_s", 2.0),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_constant_breaks_a_point(points: ModuleType, name: str) -> None:
    constant, factor = MUTATIONS[name]
    wrong = replace(Constants(), **{constant: getattr(Constants(), constant) * factor})
    assert off(points, wrong)


def test_sums_over_ranks_that_take_four_times_as_long_break_a_point(points: ModuleType) -> None:
    wrong = replace(Constants(), all_reduce_s=ALL_REDUCE_S | {"nvlink": 4 * ALL_REDUCE_S["nvlink"]})
    assert "gpt-fast-7B-x8" in off(points, wrong)


def test_half_the_bus_breaks_what_is_streamed(points: ModuleType) -> None:
    broken = off(points, replace(Constants(), bus_share=Constants().bus_share / 2))
    assert {"triforce-7b-plain", "triforce-7b", "triforce-13b-plain", "triforce-13b", "flexgen-streaming"} <= set(broken)


def test_published_placements_fit(points: ModuleType) -> None:
    for case in (
        points.TRIFORCE_7B,
        points.TRIFORCE_13B,
        points.A100_TRIFORCE,
        points.OPT_175B,
        points.DEJA_VU,
        points.STREAMED_30B,
    ):
        assert points.price(case, Constants()).fits
    assert not points.price(replace(points.TRIFORCE_13B, kv_on_chip=20), Constants()).fits


def test_the_page_has_the_tables_as_they_are(points: ModuleType) -> None:
    for text in (points.table("published", Constants()), points.table("own", Constants()), *points.notes(Constants())):
        assert text in DOC, "docs/planning.md is not what benchmarks/published_points.py --markdown prints"


@pytest.mark.parametrize("name", [field.name for field in fields(Constants) if field.name != "eager"])
def test_the_page_has_each_constant(name: str) -> None:
    found = re.search(rf"^\| `{name}` \| ([^|]+) \|", DOC, re.MULTILINE)
    assert found, f"docs/planning.md lacks {name}"
    assert found[1] == shown(name, getattr(Constants(), name))


def shown(name: str, value: object) -> str:
    if name == "all_reduce_s":
        return ", ".join(f"{link} {seconds * 1e6:g} us" for link, seconds in ALL_REDUCE_S.items())
    if name == "lowbit_share":
        return ", ".join(f"{bits} bits {share:g}" for bits, share in LOWBIT_SHARES.items())
    assert isinstance(value, (int, float))
    if name.endswith("_bytes"):
        return f"{value / 2**20:g} MiB"
    return f"{value * 1e6:g} us" if name.endswith("_s") else f"{value:g}"


def test_the_script_needs_no_torch_and_ends_in_json() -> None:
    code = (
        f"import sys, runpy; sys.modules['torch'] = None; sys.argv = ['x']; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    path = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); "
    done = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True, cwd=ROOT, check=True)
    told = json.loads(done.stdout.splitlines()[-1])
    assert {point["key"] for point in told["points"]} >= REQUIRED.keys() | OWN.keys()
    assert all(isinstance(point["error"], float) for point in told["points"])
