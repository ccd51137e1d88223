"""docs/benchmarks.md says what the results beside it say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks/report.py"


def test_the_page_is_that_of_the_results_kept(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    scripts = "benchmarks/report.py", "benchmarks/report_figures.py"
    for name in (*scripts, *(f"docs/results/{path.name}" for path in (ROOT / "docs/results").glob("*.json"))):
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    (tmp_path / "docs/images").mkdir()
    subprocess.run([sys.executable, tmp_path / "benchmarks/report.py"], check=True, capture_output=True)
    assert (tmp_path / "docs/benchmarks.md").read_text() == (ROOT / "docs/benchmarks.md").read_text()

    output = tmp_path / "output"
    told = {"benchmark": "tried", "tokens_per_s": 12.34567, "runs": [{"ms": 1}, {"ms": 2, "cold": True}]}
    told |= {"copies": [{"bits": 3, "share": 0.51234}, {"bits": 4, "share": 0.75}], "nested": [{"a": {"b": 1}}]}
    output.write_text("a table\n" + json.dumps(told) + "\n")
    keep = ["--keep", str(output), "--as", "tried", "--title", "Tried", "--command", "try it", "--date", "2026-01-02"]
    subprocess.run([sys.executable, tmp_path / "benchmarks/report.py", *keep], check=True, capture_output=True)
    page = (tmp_path / "docs/benchmarks.md").read_text()
    alike = "Copies:\n\n| bits | share |\n|---|---|\n| 3 | 0.5123 |\n| 4 | 0.75 |\n"
    lines = ("| tokens per s | 12.35 |", "| runs 0 ms | 1 |", "| runs 1 ms | 2 |", "| nested 0 a b | 1 |", alike)
    for words in ("## Tried", "    try it", "2026-01-02", *lines):
        assert words in page
    figure = {"name": "plain", "ladder": "plain", "s_per_token": 0.02, "bytes": 8e10, "floor_s": 0.019, "planned_s": 0.021}
    figure |= {"peers": {"Transformers": 0.06}, "more": {"tokens_per_round": 4.2}}
    claim = {"what": "ladder over plain", "value": 2.71, "bound": 2.6, "at_most": False, "met": True}
    report = {"benchmark": "triforce", "model": "a shape", "figures": [figure], "claims": [claim], "failed": ["other: no time"]}
    output.write_text(json.dumps(report) + "\n")
    subprocess.run([sys.executable, tmp_path / "benchmarks/report.py", *keep], check=True, capture_output=True)
    page = (tmp_path / "docs/benchmarks.md").read_text()
    assert "| plain | 20.000 | 80.000 | 19.000 | 0.95 | 21.000 | Transformers 60.00 ms (3.00x) |" in page
    assert "- ladder over plain: 2.71, at least 2.6 wanted: met" in page
    assert "- not measured: other: no time" in page
    assert "| Tried | plain | 21.000 | 20.000 | 1.05 |" in page.partition("## Predicted and measured")[2]
