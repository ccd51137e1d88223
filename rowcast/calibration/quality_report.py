"""The report of `rowcast eval` for people, line by line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rowcast.runtime.plan_notes import OWN_CALIBRATION

_COLUMNS = {
    "perplexity": "{:11.3f}",
    "kl": "{:8.4f}",
    "acceptance": "{:11.3f}",
    "draft_acceptance": "{:17.3f}",
    "greedy": "{:8.3f}",
    "recall": "{:8.3f}",
    "recall_p1": "{:10.3f}",
    "recall_min": "{:11.3f}",
    "mass": "{:8.3f}",
    "density": "{:9.3f}",
    "neurons_share": "{:15.3f}",
    "bytes_share": "{:12.3f}",
}


def lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Which calibration is used that nobody gave; a table for each text, the prices below it, then the tasks."""
    if "own_calibration" in report:
        yield f"{OWN_CALIBRATION} ({report['own_calibration']})"
    for name, text in report["texts"].items():
        yield f"{report['model']}, {report['dtype']} on {report['device']}: {name}, {text['tokens']} tokens"
        yield from table(text)
        for view, found in text["views"].items():
            if "perplexity_over_oracle" not in found:
                continue
            sparsity = found["perplexity_over_dense"] - found["perplexity_over_oracle"]
            yield (
                f"{view}: price of sparsity {sparsity:+.3f} perplexity (oracle - dense), of prediction "
                f"{found['perplexity_over_oracle']:+.3f} (predicted - oracle)"
            )
    if "tasks" in report:
        yield from _tasks(report["tasks"])


def table(text: Mapping[str, Any]) -> Iterator[str]:
    """Of one text: the dense model, then each view. What was chosen: neurons where both they and heads were."""
    width = max(map(len, [*text["views"], "dense"]))
    titles = {name: len(cell.format(0.0)) for name, cell in _COLUMNS.items()}
    yield " " * width + "".join(f"{name:>{size}}" for name, size in titles.items())
    for name, found in {"dense": text["dense"] | {"bytes_share": 1.0}, **text["views"]}.items():
        found = found | found.get("neurons", found.get("heads", {}))
        cells = (cell.format(found[key]) if key in found else " " * titles[key] for key, cell in _COLUMNS.items())
        yield f"{name:<{width}}" + "".join(cells)


def _tasks(tasks: Mapping[str, Any]) -> Iterator[str]:
    """Right answers by kind of task: the dense model, then each view."""
    counts = tasks["items"]
    for prompt in ("dense_prompt", "sparse_prompt"):
        if prompt not in tasks:
            continue
        width = max(map(len, tasks[prompt]))
        yield f"tasks, {prompt.replace('_', ' ')}: right answers of " + ", ".join(
            f"{count} {kind}" for kind, count in counts.items()
        )
        for name, right in tasks[prompt].items():
            yield f"{name:<{width}}" + "".join(f"{right[kind]:>{len(kind) + 3}}" for kind in counts)
