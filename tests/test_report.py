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
    for name in ("benchmarks/report.py", *(f"docs/results/{path.name}" for path in (ROOT / "docs/results").glob("*.json"))):
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    (tmp_path / "docs/images").mkdir()
    subprocess.run([sys.executable, tmp_path / "benchmarks/report.py"], check=True, capture_output=True)
    assert (tmp_path / "docs/benchmarks.md").read_text() == (ROOT / "docs/benchmarks.md").read_text()

    output = tmp_path / "output"
    output.write_text(
        "a table\n" + json.dumps({"benchmark": "tried", "tokens_per_s": 12.34567, "runs": [{"ms": 1}, {"ms": 2}]}) + "\n"
    )
    keep = ["--keep", str(output), "--as", "tried", "--title", "Tried", "--command", "try it", "--date", "2026-01-02"]
    subprocess.run([sys.executable, tmp_path / "benchmarks/report.py", *keep], check=True, capture_output=True)
    page = (tmp_path / "docs/benchmarks.md").read_text()
    for words in ("## Tried", "    try it", "2026-01-02", "| tokens per s | 12.35 |", "| runs 1 ms | 2 |"):
        assert words in page
