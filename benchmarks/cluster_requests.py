"""Many requests of mixed lengths through the driver API, over several ranks: none is lost, nothing leaks, and what a batch is worth.

A third of them are drawn and run three times: the first time kernels are compiled and graphs captured for the batches that occur.

    python benchmarks/cluster_requests.py                  # a tiny random model, which shows the overheads
    python benchmarks/cluster_requests.py --model SmolLM2-135M-Instruct --ranks 3 --requests 200
    python benchmarks/cluster_requests.py --model random:opt-6.7b --dtype bfloat16        # a shape on two GPUs

Ends with exit code 1 where a request got other tokens than it asked for, or where a process grew by more than --leak MiB after the
first time. Throughput is told as ratios to one request at a time, in the same run. On a CPU oneDNN keeps a kernel for
each number of tokens that it meets, which looks like a leak: without ROWCAST_CPU_PACK=1 it is left out here.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
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
    parser.add_argument("--ladder", default="ngram / plain")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--sweep", type=int, default=64, help="requests for each batch size")
    parser.add_argument("--batch", type=int, action="append", help="max_num_seqs; repeatable (1, 4, 16, 64)")
    parser.add_argument("--leak", type=float, default=64, help="MiB that a process may grow")
    options = parser.parse_args()
    os.environ.setdefault("ROWCAST_CPU_PACK", "0")

    with tempfile.TemporaryDirectory() as folder:
        model = options.model or _tiny(Path(folder))
        given: dict[str, Any] = {
            "tensor_parallel_size": options.ranks,
            "launcher": options.launcher,
            "ladder": options.ladder,
            "dtype": options.dtype,
            "max_model_len": 512,
            "progress": False,
        }
        batches = options.batch or [1, 4, 16, 64]
        with LLM(model, max_num_seqs=max(batches), **given) as llm:
            found = _many(llm, options.requests)
        rates = {}
        for batch in batches:
            with LLM(model, max_num_seqs=batch, **given) as llm:
                rates[batch] = _rate(llm, options.sweep)
            print(f"max_num_seqs {batch}: {rates[batch] / rates[batches[0]]:.2f} times the tokens/s of {batches[0]}", flush=True)
    ratios = {batch: round(rate / rates[batches[0]], 3) for batch, rate in rates.items()}
    grown = max(found["grown_mib"].values())
    told = {
        "benchmark": "cluster_requests",
        "versions": known_versions(),
        "ranks": options.ranks,
        "model": options.model or "tiny",
        **found,
    }
    told["tokens_per_s"] = {f"max_num_seqs {batch}": round(rate, 1) for batch, rate in rates.items()}
    print(json.dumps({**told, "throughput_ratio": ratios}))
    sys.exit(found["lost"] > 0 or grown > options.leak)


def _many(llm: LLM, count: int) -> dict[str, Any]:
    """Generate for `count` requests, in three parts; what was lost and how processes have grown since the first."""
    prompts, params = _requests(llm, -(-count // 3))
    done, lost, tokens = 0, 0, 0
    before: dict[str, float] = {}
    started = time.perf_counter()
    while done < count:
        some = slice(count - done)
        outputs = llm.generate(prompts[some], params[some])
        lost += sum(not _is_whole(*each) for each in zip(outputs, prompts[some], params[some], strict=True))
        tokens += sum(output.metrics.generated_tokens for output in outputs)
        done += len(outputs)
        before = before or _resident_mib(llm)
        print(f"{done} of {count} requests, {lost} lost, {_resident_mib(llm)} MiB", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - started
    llm.engine.check()
    executor = llm.engine._executor
    after = _resident_mib(llm)
    return {
        "requests": count,
        "lost": lost,
        "generated_tokens": tokens,
        "seconds": round(seconds, 1),
        "rank_failures": executor.failures if isinstance(executor, GangExecutor) else 0,
        "grown_mib": {name: round(after[name] - size, 1) for name, size in before.items()},
    }


def _rate(llm: LLM, count: int) -> float:
    """Generated tokens a second."""
    prompts, params = _requests(llm, count)
    llm.generate(prompts[:2], params[:2])
    started = time.perf_counter()
    outputs = llm.generate(prompts, params)
    return sum(output.metrics.generated_tokens for output in outputs) / (time.perf_counter() - started)


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
