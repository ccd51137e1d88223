"""What `opt_175b.py` asks of its ranks beside tokens: the memory that each has taken, and which kernels a token's time goes to.

Ranks are actors that look for a question, a small file, before each command.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PREDICTORS = ("lowbit_kernel", "top_ids", "top_mask", "above_", "union_kernel", "_head_scores", "_choose_heads", "rerank")
"""Parts of the names of kernels that choose neurons and heads."""
PARTS = ("attention", "MLP", "predictors", "all-reduce", "LM head", "gaps")

Kernel = tuple[float, float, str]
"""Start and duration in microseconds, name."""


def watched(folder: str) -> Any:
    """A rank that answers the questions which `ask` leaves in the folder, on the ranks' own machine."""
    from rowcast.cluster.ray_launcher import RankActor

    class Watched(RankActor):
        def run(self, address: str, token: str, rank: int) -> None:
            watch(Path(folder), rank)
            RankActor.run(self, address, token, rank)

    return Watched


def watch(folder: Path, rank: int) -> None:
    """Have this process answer."""
    from rowcast.cluster import rank as ranks

    carry_out, seen, left = ranks.carry_out, [""], [0]
    profiler: list[Any] = []

    def answer(text: str, found: object) -> None:
        part = folder / f"{rank}.part"
        part.write_text(json.dumps(found))
        part.rename(folder / f"answer-{text.split()[0]}-{rank}.json")

    def looked(executor: Any, command: Any) -> Any:
        if profiler and not left[0]:
            answer(seen[0], _stop(profiler.pop(), folder))
        if profiler:
            left[0] -= 1
        elif (ask := folder / "ask").exists() and (text := ask.read_text()) not in ("", seen[0]):
            seen[0] = text
            _, what, count = text.split()
            if what == "memory":
                answer(text, _memory())
            elif rank == 0:
                left[0] = int(count)
                profiler.append(_start())
        return carry_out(executor, command)

    ranks.carry_out = looked


def ask(folder: Path, ranks: Sequence[int], what: str, count: int, run: Callable[[], object]) -> list[Any]:
    """What these ranks answer while `run` gives them commands; `what`: memory, or profile (rank 0 alone, `count` commands)."""
    number = f"{time.time_ns()}"
    part = folder / "ask.part"
    part.write_text(f"{number} {what} {count}")
    part.rename(folder / "ask")
    run()
    found = [folder / f"answer-{number}-{rank}.json" for rank in ranks]
    until = time.monotonic() + 20
    while not all(each.exists() for each in found):
        if time.monotonic() > until:
            raise TimeoutError(f"ranks did not answer: {what}")
        time.sleep(0.05)
    return [json.loads(each.read_text()) for each in found]


def _memory() -> dict[str, int]:
    import torch

    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    return {
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "device": total - free,
    }


def _start() -> Any:
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    found = profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU])
    if on_gpu:
        torch.cuda.synchronize()
    found.start()
    return found


def _stop(profiler: Any, folder: Path) -> list[Kernel]:
    """What ran."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    profiler.stop()
    path = folder / "kernels.json"
    profiler.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset") if torch.cuda.is_available() else ("cpu_op",)
    return [(event["ts"], event["dur"], event["name"]) for event in events if event.get("cat") in kinds]


def by_part(kernels: Sequence[Kernel], layers: int) -> dict[str, Any]:
    """Milliseconds of a token by part, from whole tokens' kernels. What runs at the same time counts once, for what began first;
    "busy": kernels' own durations, added up. A token has a sum of embeddings, which counts with the all-reduces, and two a layer: after
    an odd number of sums comes attention, after an even one an MLP. The rest of a token, embeddings and draws, counts with the LM head.
    """
    ordered = sorted(kernels)
    fast = any("_sum_kernel" in name for _, _, name in ordered)
    begins = [start for start, _, name in ordered if "_prepare_kernel" in name]
    if len(begins) < 3:
        raise ValueError(f"{len(ordered)} kernels with {len(begins)} tokens among them are too few")
    tokens, first, last = len(begins) - 1, begins[0], begins[-1]
    took, busy = dict.fromkeys(PARTS, 0.0), dict.fromkeys(PARTS, 0.0)
    names: dict[str, list[float]] = {}
    sums, covered = 0, first
    for start, duration, name in ordered:
        if not first <= start < last:
            continue
        if "_prepare_kernel" in name:
            sums = 0
        part = "LM head" if sums > 2 * layers else ("MLP", "attention")[sums % 2]
        if not sums:  # tables of embeddings are shared out by rows of the vocabulary
            part = "LM head"
        if any(word in name for word in PREDICTORS):
            part = "predictors"
        elif ("_sum_kernel" if fast else "nccl") in name and sums <= 2 * layers:
            part, sums = "all-reduce", sums + 1
        took["gaps"] += max(0.0, start - covered)
        took[part] += max(0.0, start + duration - max(start, covered))
        busy[part] += duration
        covered = max(covered, start + duration)
        each = names.setdefault(f"{part}: {name[:50]}", [0, 0.0])
        each[0] += 1 / tokens
        each[1] += duration / tokens / 1e3
    took["gaps"] += max(0.0, last - covered)
    return {
        "tokens": tokens,
        "token_ms": (last - first) / tokens / 1e3,
        "ms": {part: value / tokens / 1e3 for part, value in took.items()},
        "busy_ms": {part: value / tokens / 1e3 for part, value in busy.items() if part != "gaps"},
        "kernels": dict(sorted(names.items(), key=lambda item: -item[1][1])[:24]),
    }
