"""Many requests of mixed lengths through the driver API, over several ranks: what a batch is worth, none is lost, nothing leaks.

    python benchmarks/cluster_requests.py                  # a tiny random model, which shows the overheads
    python benchmarks/cluster_requests.py --model SmolLM2-135M-Instruct --ranks 3 --requests 200
    python benchmarks/cluster_requests.py --model random:opt-6.7b --dtype bfloat16 --launcher local      # a shape on two GPUs

A third of the requests is drawn and run three times. Gammas are pinned and prefixes are not shared, so that each time makes the same
steps: a pass that occurs is called in the first, captured in a graph in the second at the latest, and lengths of prompts that kernels
or libraries keep something for have all occurred. What a process grows by in the last third is no warming up. It may be what
malloc keeps of freed memory, some MiB either way, so that --leak has to be above that; 16 MiB are 49 KiB for each of 334. Graphs that
were captured are told beside it, of ranks that are processes of this machine.

Ends with exit code 1 where a request got other tokens than it asked for, or where a process grew by more than --leak MiB in the last
third. Throughput is told as ratios to the first batch size, with the ladder's last rung alone and requests of the same lengths: each
size is run twice, and the second time counts. On a CPU oneDNN keeps a kernel for each number of tokens that it meets, which looks
like a leak: without ROWCAST_CPU_PACK=1 it is left out here.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from bisect import bisect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _figures import known_versions

from rowcast import LLM, RequestOutput, SamplingParams
from rowcast.cluster.executor import GangExecutor

TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a directory, a GGUF file or a hub id; without it a tiny random Llama")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--launcher", choices=("auto", "local", "ray"), default="auto")
    parser.add_argument("--ladder", default="ngram:gamma=4 / plain")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--requests", type=int, default=1000, help="in three equal parts, rounded up")
    parser.add_argument("--batch", type=int, action="append", help="sequences at a time; repeatable (1, 4, 16, 64)")
    parser.add_argument("--leak", type=float, default=16, help="MiB that a process may grow in the last third")
    options = parser.parse_args()
    os.environ.setdefault("ROWCAST_CPU_PACK", "0")
    batches = options.batch or [1, 4, 16, 64]

    with tempfile.TemporaryDirectory() as folder:
        os.environ["ROWCAST_TRACE"] = f"{folder}/trace"
        model = options.model or _tiny(Path(folder))
        with LLM(
            model,
            max_num_seqs=max(batches),
            tensor_parallel_size=options.ranks,
            launcher=options.launcher,
            ladder=options.ladder,
            dtype=options.dtype,
            max_model_len=512,
            prefix_cache=False,
            progress=False,
        ) as llm:
            rates = _rates(llm, batches)
            found = _many(llm, options.requests)
        graphs = _graphs(Path(folder) / "trace", found.pop("ended"))
    grown = found["grown_mib"]
    most = max(grown.values())
    claims = ("growth of a process over the last third, MiB", most, options.leak), ("requests lost", found["lost"], 0)
    for what, value, bound in claims:
        print(f"{what}: {value:.4g}, at most {bound:g}: {'met' if value <= bound else 'MISSED'}", flush=True)
    told = {
        "benchmark": "cluster_requests",
        "versions": known_versions(),
        "ranks": options.ranks,
        "model": options.model or "tiny",
        **found,
        "at_most_mib": options.leak,
        "held": not found["lost"] and most <= options.leak,
        "tokens_per_s": {f"batch {batch}": round(rate, 1) for batch, rate in rates.items()},
        "throughput_ratio": {batch: round(rate / rates[batches[0]], 3) for batch, rate in rates.items()},
    }
    if graphs is not None:
        told["graphs_captured"] = dict(zip(("before", *_THIRDS), graphs, strict=True))
    print(json.dumps(told))
    sys.exit(not told["held"])


def _rates(llm: LLM, batches: Sequence[int]) -> dict[int, float]:
    """By sequences at a time: generated tokens a second."""
    scheduler, most = llm.engine.scheduler, llm.engine.scheduler.max_num_seqs
    rates: dict[int, float] = {}
    for batch in batches:
        scheduler.max_num_seqs = batch
        _rate(llm, 4 * batch + 16)  # compiles kernels and captures graphs
        rates[batch] = _rate(llm, 4 * batch + 16)
        ratio = rates[batch] / rates[batches[0]]
        print(f"{batch} sequences at a time: {ratio:.2f} times the tokens/s of {batches[0]}", flush=True)
    scheduler.max_num_seqs = most
    return rates


def _rate(llm: LLM, count: int) -> float:
    """Generated tokens a second, by the last rung alone."""
    last = llm.plan.ladder_text.split("/")[-1].strip()
    started = time.perf_counter()
    requests = [llm.engine.add(*each, ladder=last) for each in zip(*_requests(llm, count), strict=True)]
    while llm.engine.has_work:
        llm.engine.step()
    seconds = time.perf_counter() - started
    return sum(request.output().metrics.generated_tokens for request in requests) / seconds


_THIRDS = "first third", "second third", "last third"


def _many(llm: LLM, count: int) -> dict[str, Any]:
    """Generate for `count` requests, in three equal parts: what was lost, what processes have, and how they grew in the last part.
    "ended": when each part began and ended, of time.time."""
    prompts, params = _requests(llm, -(-count // 3))
    lost, tokens = 0, 0
    resident: dict[str, dict[str, float]] = {}
    ended = [time.time()]
    for number, third in enumerate(_THIRDS, start=1):
        outputs = llm.generate(prompts, params)
        lost += sum(not _is_whole(*each) for each in zip(outputs, prompts, params, strict=True))
        tokens += sum(output.metrics.generated_tokens for output in outputs)
        llm.engine.check()
        resident[third] = _resident_mib(llm)
        ended.append(time.time())
        done, seconds = number * len(prompts), ended[-1] - ended[-2]
        print(f"{done} requests, {lost} lost, {seconds:.1f} s, {resident[third]} MiB", file=sys.stderr, flush=True)
    executor = llm.engine._executor
    before, after = resident[_THIRDS[1]], resident[_THIRDS[2]]
    return {
        "requests": 3 * len(prompts),
        "lost": lost,
        "generated_tokens": tokens,
        "seconds": round(ended[-1] - ended[0], 1),
        "rank_failures": executor.failures if isinstance(executor, GangExecutor) else 0,
        "resident_mib": resident,
        "grown_mib": {name: round(after[name] - size, 1) for name, size in before.items()},
        "ended": ended,
    }


def _graphs(folder: Path, ended: Sequence[float]) -> list[int] | None:
    """Passes that rank 0 captured before and in each part of `_many`; None where it left no trace here."""
    traces = list(folder.glob("rank-0-*.json"))
    if not traces:
        return None
    counts = [0] * len(ended)
    for trace in traces:
        for event in json.loads(trace.read_text()):
            if event["name"] == "capture":
                counts[bisect(ended[:-1], event["ts"] / 1e6)] += 1
    return counts


def _requests(llm: LLM, count: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts of 4 to 200 tokens, outputs of 1 to 60; greedy and seeded ones, some with two samples. The same ones each time."""
    rng = random.Random(0)
    prompts = [[rng.randrange(3, llm.spec.vocab_size) for _ in range(rng.randint(4, 200))] for _ in range(count)]
    params = []
    for i in range(count):
        greedy = i % 3 == 0
        params.append(
            SamplingParams(
                temperature=0.0 if greedy else 0.9,
                seed=i,
                n=1 if greedy or i % 10 else 2,
                max_tokens=rng.randint(1, 60),
                ignore_eos=True,
                detokenize=False,
            )
        )
    return prompts, params


def _is_whole(output: RequestOutput, prompt: list[int], params: SamplingParams) -> bool:
    lengths = [len(sample.token_ids) for sample in output.outputs]
    return output.finished and output.prompt_token_ids == prompt and lengths == [params.max_tokens] * params.n


def _resident_mib(llm: LLM) -> dict[str, float]:
    """Of the driver and each rank, where they are on this machine."""
    executor = llm.engine._executor
    pids = {"driver": "self"}
    if isinstance(executor, GangExecutor) and executor.gang is not None:
        pids |= {f"rank {rank}": f"{pid}" for rank, pid in enumerate(executor.gang.pids)}
    found = {}
    for name, pid in pids.items():
        status = Path(f"/proc/{pid}/status")
        if status.exists():
            [line] = [line for line in status.read_text().splitlines() if line.startswith("VmRSS:")]
            found[name] = round(int(line.split()[1]) / 1024, 1)
    return found


def _tiny(folder: Path) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY), dtype=torch.float32).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
