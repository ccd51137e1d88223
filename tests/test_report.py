"""docs/benchmarks.md says what the results beside it say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import report

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks/report.py"


def test_the_page_is_that_of_the_results_kept(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    scripts = "benchmarks/report.py", "benchmarks/report_figures.py", "benchmarks/report_tables.py"
    for name in (*scripts, *(f"docs/results/{path.name}" for path in (ROOT / "docs/results").glob("*.json"))):
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    (tmp_path / "docs/images").mkdir()
    subprocess.run([sys.executable, tmp_path / "benchmarks/report.py"], check=True, capture_output=True)
    assert (tmp_path / "docs/benchmarks.md").read_text() == (ROOT / "docs/benchmarks.md").read_text()

    output = tmp_path / "output"
    told = {
        "benchmark": "tried",
        "model": str(tmp_path / "SmolLM2.gguf"),
        "peak_bytes": 12_397_533_696,
        "gaps": [],
        "tokens_per_s": 12.34567,
        "runs": [{"ms": 1}, {"ms": 2, "cold": True}],
    }
    told |= {"copies": [{"bits": 3, "share": 0.51234}, {"bits": 4, "share": 0.75}], "nested": [{"a": {"b": 1}}]}
    output.write_text("a table\n" + json.dumps(told) + "\n")
    keep = ["--keep", str(output), "--as", "tried", "--title", "Tried", "--command", "try it", "--date", "2026-01-02"]
    subprocess.run([sys.executable, tmp_path / "benchmarks/report.py", *keep], check=True, capture_output=True)
    page = (tmp_path / "docs/benchmarks.md").read_text()
    alike = "Copies:\n\n| bits | share |\n|---|---|\n| 3 | 0.5123 |\n| 4 | 0.75 |\n"
    assert str(tmp_path) not in page + (tmp_path / "docs/results/tried.json").read_text()
    assert (
        "2026-01-02, SmolLM2 ([results/tried.json](results/tried.json)):" in page
        and "gaps" not in page.partition("## Tried")[2].partition("\n## ")[0]
    )
    lines = (
        "| tokens per s | 12.35 |",
        "| peak GB | 12.4 |",
        "| runs 0 ms | 1 |",
        "| runs 1 ms | 2 |",
        "| nested 0 a b | 1 |",
        alike,
    )
    for words in ("## Tried", "    try it", "2026-01-02", *lines):
        assert words in page
    figure = {"name": "plain", "ladder": "plain", "s_per_token": 0.02, "bytes": 8e10, "floor_s": 0.019, "planned_s": 0.021}
    figure |= {"peers": {"Transformers": 0.06}, "more": {"tokens_per_round": 4.2}}
    claim = {"what": "ladder over plain", "value": 2.71, "bound": 2.6, "at_most": False, "met": True}
    report = {"benchmark": "triforce", "model": "a shape", "figures": [figure], "claims": [claim], "failed": ["other: no time"]}
    output.write_text(json.dumps(report) + "\n")
    remark = ["--remark", "It was a warm day."]
    subprocess.run([sys.executable, tmp_path / "benchmarks/report.py", *keep, *remark], check=True, capture_output=True)
    page = (tmp_path / "docs/benchmarks.md").read_text()
    assert "    try it\n\nIt was a warm day.\n\n|  | ms a token" in page.partition("## Tried")[2]
    assert "| plain | 20.000 | 80.000 | 19.000 | 0.95 | 21.000 | Transformers 60.00 ms (3.00x) |" in page
    assert "- ladder over plain: 2.71, at least 2.6 wanted: met" in page
    assert "- not measured: other: no time" in page
    assert "| Tried | plain | 21.000 | 20.000 | 1.05 |" in page.partition("## Predicted and measured")[2]


def test_a_benchmark_that_was_cut_off_says_so() -> None:
    told: dict[str, Any] = {"figures": [], "claims": [], "failed": []}
    words = "**It was cut off: what it had not measured by then is not here.**"
    assert words in section("tried", told | {"cut_off": True}) and words not in section("tried", told)


def test_without_a_figure_there_is_no_table() -> None:
    claim = {"what": "outputs equal", "value": 6, "bound": 6, "at_most": False, "met": True}
    found = section("tried", {"figures": [], "claims": [claim], "failed": ["plain: no time"]})
    assert "    try it\n\n- outputs equal: 6, at least 6 wanted: met\n- not measured: plain: no time\n" in found
    assert "|" not in found


def section(name: str, told: dict[str, Any]) -> str:
    """A page's lines of one result."""
    page = report.page([{"title": "Tried", "date": "2026-01-02", "command": "try it", "name": name, "report": told}])
    return page.partition("## Tried")[2]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/tmp/m/SmolLM2-135M-Instruct.gguf", "SmolLM2-135M-Instruct"),
        ("/models/Llama-3.1-8B", "Llama-3.1-8B"),
        ("llama-2-7b", "llama-2-7b"),
    ],
)
def test_a_model_is_kept_by_its_name(path: str, name: str) -> None:
    assert report.without_places({"model": path, "ms": 1.5}) == {"model": name, "ms": 1.5}


def test_real_text_says_first_which_ladders_beat_plain() -> None:
    def figure(name: str, speed_up: float, rounds: float, **accepted: float) -> dict[str, Any]:
        more = {"speed_up": speed_up, "later_speed_up": 2 * speed_up, "tokens_per_round": rounds, "acceptance": accepted}
        times = {"s_per_token": 1e-3 / speed_up, "bytes": 0.0, "floor_s": 0.0, "planned_s": None}
        return {"name": name, "ladder": name, **times, "peers": {}, "more": more | {"differences": []}}

    figures = [figure("plain", 1.0, 1.0), figure("ngram / plain", 1.99, 3.1, ngram=0.8820512), figure("draft / plain", 0.5, 1.0)]
    claim = {"what": "draft / plain over Transformers", "value": 84.0, "bound": 1.0, "at_most": False, "met": True}
    found = section("real-text", {"model": "m", "figures": figures, "claims": [claim], "failed": []})
    assert (
        "**In this run faster than our own plain decoding: `ngram / plain`; not faster: `draft / plain`; no token was proposed by "
        "`draft / plain`.**" in found
    )
    own = "- draft / plain over our plain decoding: 0.50; 1.00 in the second half of the tokens"
    assert found.index("- ngram / plain over our plain decoding: 1.99") < found.index(own) < found.index("over Transformers: 84")
    assert "acceptance ngram .88" in found and "differences" not in found


def test_rows_of_host_memory_have_no_floor_in_the_gpus() -> None:
    case = {"name": "rows", "shape": "4 KiB", "floor_s": 44.7e-6, "time_s": 1326e-6, "share_of_floor": 0.03, "note": ""}
    case |= {"peers": {"dma": {"time_s": 1226e-6, "ratio": 0.92}}}
    cases = [case | {"family": "host"}, case | {"family": "attention"}]
    lines = section("kernels-cpu", {"copy_bytes_per_s": 3e12, "cases": cases}).splitlines()
    host, other = (line for line in lines if line.startswith("| rows"))
    assert host == "| rows | 4 KiB | 1326.0 | — | 0.92 of dma | dma 1226.0 (0.92x) |"
    assert other == "| rows | 4 KiB | 1326.0 | 44.7 | 0.03 | dma 1226.0 (0.92x) |"


def test_a_plan_is_a_table_for_each_case() -> None:
    times = {"unit": "s", "predicted": 0.00612, "measured": 0.005678, "error": 0.0778}
    reserved = {"unit": "bytes", "predicted": None, "measured": 14_954_790_912, "note": "rounded up", "error": None}
    case: dict[str, Any] = {
        "cap_bytes": 6_607_343_616,
        "hit_rate": None,
        "bytes_by_tier": {"resident": 4_641_390_592, "host": 262_144_000},
    }
    case |= {"figures": {"seconds per token": times, "GPU memory reserved": reserved}}
    found = section("planned", {"model": "m", "cases": {"streamed": case}})
    assert "**streamed**: resident 4.64 GB, host 0.26 GB; the GPU's memory capped to 6.61 GB." in found
    assert "| time per token | 6.12 ms | 5.678 ms | +7.8% |" in found
    assert "| GPU memory reserved (rounded up) | — | 14.95 GB | — |" in found


@pytest.mark.parametrize("held", [True, False])
def test_serving_says_what_held(held: bool) -> None:
    memory = {"after a third": {"rank 0": 2275.2, "kept KV": 1388.2}, "at the end": {"rank 0": 5114.1, "kept KV": 4233.5}}
    found = section("serving-load", {"case": "load", "held": held, "resident_mib": memory, "grown_mib": {"rank 0": -6.4}})
    assert ("\nHeld: no request lost" in found) is held and ("**Did not hold**: no request lost" in found) is not held
    assert "| rank 0 | 2,275.2 | 5,114.1 | -6.4 |" in found and "| kept KV | 1,388.2 | 4,233.5 | — |" in found


def test_a_gpus_tokens_are_counted_by_ladder() -> None:
    ladders = {
        "ngram / plain, alone": {"outputs": 8, "equal": 7, "gaps": [2.5e-6]},
        "plain, in a batch": {"outputs": 8, "equal": 8, "gaps": []},
    }
    found = section("exact-m", {"ladders": ladders})
    assert (
        "| `ngram / plain` | alone | 7 of 8 | 2.5e-06 |" in found and "| `plain` | in a batch | 8 of 8 | none differs |" in found
    )
