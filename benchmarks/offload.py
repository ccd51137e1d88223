"""Models of which a part lies in host memory, by shape with random weights: seconds a token against the bytes and the bus.

    python benchmarks/offload.py                                          # all cases of a Llama-2-7B and an OPT-6.7B shape
    python benchmarks/offload.py --case streamed --model llama-2-7b
    python benchmarks/offload.py --case rows --model opt-66b --gpu-memory 66GiB --density 0.08 --rank 256
    python benchmarks/offload.py --case kv --ranks 2 --gpu-memory 24GiB --gammas 2,20

Cases, each in a process of its own:

    streamed   all weights lie in host memory, every pass streams them: a token's bytes over the time, against one large copy's rate
    filled     as much as fits in --gpu-memory stays there, the rest is streamed: what `rows` is compared with
    rows       the neurons that a token needs are fetched, approximate; attention, LM head and the most frequent neurons stay
    kv         KV of a long prompt in host memory, plain decoding and TriForce's ladder with simulated acceptance

`rows` of an OPT shape runs Deja Vu's ladder: low-rank predictors that read the attention's input, of random weights whose bias makes
26% of the neurons take 80% of the activations (PowerInfer's measure of OPT-30B, arXiv 2312.12456, section 2). Other shapes choose by
their own weights in 4 bits, which has no hot set. A table on standard error, one line of JSON on standard output.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from offload_bus import bus_rate
from offload_places import Budget, filled, rows, streamed
from offload_profile import Varied, write_profile

from rowcast import LLM, SamplingParams
from rowcast.bench.shapes import open_shape
from rowcast.placement.units import parse_bytes
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.sparse.artefact import Calibration

TEMPERATURE = 100.0
"""Tokens are drawn as if all were alike: those of a shape mean nothing."""
MODELS = {"streamed": "llama-2-7b", "filled": "opt-6.7b", "rows": "opt-6.7b", "kv": "yarn-llama-2-7b-128k"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=MODELS, action="append", help="repeatable; streamed, filled and rows")
    parser.add_argument("--model", help="a well-known model's name or a config.json; by default " + str(MODELS))
    parser.add_argument("--gpu-memory", default="10GiB", help="for filled and rows: what the process may take of the GPU")
    parser.add_argument("--cache", type=float, default=0.5, help="share of the room for neurons that keeps fetched ones")
    parser.add_argument("--density", type=float, default=0.1, help="share of the neurons that a token uses")
    parser.add_argument("--by", default="dejavu-ahead", help="how shapes with predictors choose")
    parser.add_argument("--heads", type=float, help="share of the heads, of shapes with predictors; all")
    parser.add_argument("--rank", type=int, default=256, help="of the predictors")
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--tokens", type=int, default=32, help="to generate")
    parser.add_argument("--kv-prompt", type=int, default=127_000, help="of kv, tokens")
    parser.add_argument(
        "--real-prompt", action="store_true", help="of kv: run all of it; else its last tokens only, the KV is zeros"
    )
    parser.add_argument("--ranks", type=int, default=1, help="of kv: GPUs, each with --gpu-memory and its own part of the KV")
    parser.add_argument("--kv-budget", type=int, default=4096, help="of kv: entries of the retrieval cache")
    parser.add_argument("--gammas", default="2,14", help="of kv: of the draft and of the retrieval rung")
    parser.add_argument("--eager", action="store_true", help="no captured graphs")
    parser.add_argument("--profile", action="store_true", help="print where a token's time goes")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(_case(options.one, options)))
        return 0
    found, failed = {}, False
    for name in options.case or ("streamed", "filled", "rows"):
        ran = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--one", name], stdout=subprocess.PIPE, text=True, check=False
        )
        failed |= ran.returncode != 0
        if ran.returncode == 0:
            found[name] = json.loads(ran.stdout.splitlines()[-1])
            (_print_kv if name == "kv" else _print)(name, found[name])
    print(json.dumps({"benchmark": "offload", "cases": found}))
    return int(failed)


def _case(name: str, options: argparse.Namespace) -> dict[str, Any]:
    model = options.model or MODELS[name]
    if name == "kv":
        import offload_kv

        inner, outer = map(int, options.gammas.split(","))
        cap = parse_bytes(options.gpu_memory, "gpu_memory")
        wish = offload_kv.Wish(
            model, options.kv_prompt, options.real_prompt, cap, (inner, outer), options.kv_budget, options.ranks
        )
        return offload_kv.run(wish)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rate = bus_rate(device)
    checkpoint = open_shape(model, device=device)
    spec = spec_from_config(checkpoint.config)
    budget = Budget(
        parse_bytes(options.gpu_memory, "gpu_memory"), options.cache, options.prompt + 4 * options.tokens, device.type
    )
    checkpoint = replace(checkpoint, source=Varied(spec, 0, device))
    overlap = None
    with tempfile.TemporaryDirectory() as folder:
        calibration = None
        if name == "rows" and not spec.gated:
            overlap = write_profile(
                Path(folder), spec, checkpoint.source.fingerprint(), options.by, options.density, options.rank, options.heads
            )
            calibration = Calibration.open(folder, None)
        started = time.perf_counter()
        if name == "rows":
            heads = "" if options.heads is None else f",heads={options.heads:g}"
            by = "q4" if calibration is None else options.by
            plan = rows(spec, budget, f"self:mlp={options.density:g},by={by}{heads}", calibration)
        else:
            plan = streamed(spec, budget) if name == "streamed" else filled(spec, budget)
        given: dict[str, Any] = {} if calibration is None else {"calibration": folder}
        llm = LLM(checkpoint, plan=plan, progress=False, eager=options.eager, **given)
        loaded_s = time.perf_counter() - started
    return {
        "model": model,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "bus_gb_s": rate / 1e9,
        "load_s": loaded_s,
        "budget_bytes": plan.budget_bytes,
        "ladder": plan.ladder_text,
        "overlap": overlap,
        **_places(plan),
        **_timed(llm, options),
    }


def _places(plan: Any) -> dict[str, float]:
    found: dict[str, float] = {}
    for share in plan.forecast.shares:
        found[f"{share.tier}_gb"] = found.get(f"{share.tier}_gb", 0.0) + share.bytes / 1e9
    return found


def _timed(llm: LLM, options: argparse.Namespace) -> dict[str, Any]:
    """After two requests, so that graphs are captured and caches are warm."""
    elsewhere, vocabulary = llm.engine._executor.elsewhere, llm.spec.vocab_size  # type: ignore[attr-defined]

    def run(seed: int, tokens: int) -> tuple[Any, Any]:
        ids = random.Random(seed).choices(range(vocabulary), k=options.prompt)
        params = SamplingParams(temperature=TEMPERATURE, seed=seed, max_tokens=tokens, ignore_eos=True, detokenize=False)
        elsewhere.counts()
        [output] = llm.generate(ids, params)
        return output.metrics, elsewhere.counts()

    started = time.perf_counter()
    warm = 4 if elsewhere.weights.pool is not None else 2  # a pass that streams all has nothing more to warm
    run(0, warm), run(1, warm)
    warm_s = time.perf_counter() - started
    first, prefill = run(2, 1)
    timed, counts = run(3, 1 + options.tokens)
    if options.profile:
        _profile(lambda: run(4, 6))
    pool, tokens = elsewhere.weights.pool, options.tokens
    row_bytes = 0 if pool is None else pool.rows.rows[0].nbytes
    assert timed.tokens_per_s is not None
    on_gpu = torch.cuda.is_available()
    return {
        "warm_s": warm_s,
        "s_per_token": 1 / timed.tokens_per_s,
        "first_token_s": first.ttft_s,
        "streamed_bytes_per_token": (counts.weights.bytes - prefill.weights.bytes) / tokens,
        "rows_wanted": counts.rows.wanted / tokens,
        "rows_hit": counts.rows.hit / max(1, counts.rows.wanted),
        "row_bytes_per_token": counts.rows.moved * row_bytes / tokens,
        "prefill_bytes": prefill.weights.bytes,
        "stalled_s_per_token": (counts.weights.stalled_s - prefill.weights.stalled_s) / tokens,
        "gpu_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "reserved_bytes": torch.cuda.max_memory_reserved() if on_gpu else 0,
        "host_bytes": elsewhere.host_bytes,
    }


def _profile(run: Callable[[], object]) -> None:
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as found:
        run()
    for order in ("self_cuda_time_total", "self_cpu_time_total"):
        print(found.key_averages().table(sort_by=order, row_limit=18, max_name_column_width=60), file=sys.stderr)


def _print(name: str, found: dict[str, Any]) -> None:
    moved = found["streamed_bytes_per_token"] + found["row_bytes_per_token"]
    took, floor = found["s_per_token"], moved / (found["bus_gb_s"] * 1e9)
    shared = "" if found["overlap"] is None else f"; {found['overlap']:.0%} of a token's neurons are any other's, too"
    tiers = ", ".join(f"{key[:-3]} {value:.2f} GB" for key, value in found.items() if key.endswith("_gb"))
    print(
        f"{name} {found['model']} ({found['gpu']}, loaded in {found['load_s']:.1f} s, warm after {found['warm_s']:.1f} s): {tiers}",
        file=sys.stderr,
    )
    print(
        f"  {took * 1e3:.2f} ms a token, {moved / 1e9:.3f} GB of it over a bus of {found['bus_gb_s']:.1f} GB/s = {floor * 1e3:.2f} ms "
        f"({floor / took:.1%}); first token {found['first_token_s'] * 1e3:.0f} ms with {found['prefill_bytes'] / 1e9:.2f} GB; "
        f"rows {found['rows_wanted']:.0f} a token, {found['rows_hit']:.1%} hit; stalled {found['stalled_s_per_token'] * 1e3:.2f} ms",
        file=sys.stderr,
    )
    print(
        f"  GPU {found['gpu_bytes'] / 1e9:.2f} GB (reserved {found['reserved_bytes'] / 1e9:.2f}) of {found['budget_bytes'] / 1e9:.2f}; "
        f"pinned {found['host_bytes'] / 1e9:.2f} GB; {found['ladder']}{shared}",
        file=sys.stderr,
    )
    sys.stderr.flush()


def _print_kv(name: str, found: dict[str, Any]) -> None:
    """Floors are of the slowest rank: its part of the KV over its bus."""
    floor = found["floor_s"]
    plain = found["plain"]["s_per_token"]
    prompt = "run" if found["prompt_was_run"] else "not run but for its last tokens: the KV is zeros"
    print(
        f"{name} {found['model']} ({found['ranks']} x {found['gpu']}): {found['prompt']} tokens ({prompt}), "
        f"{found['kv_bytes'] / 1e9:.1f} GB of KV a rank, at the same time "
        f"{', '.join(f'{rate / 1e9:.1f}' for rate in found['bus_rates'])} GB/s over the bus of each",
        file=sys.stderr,
    )
    for way, each in found.items():
        if not isinstance(each, dict):
            continue
        took, mean = each["s_per_token"], each["expected_tokens_per_round"]
        rungs = {rung: f"{c['s']:.2f} s for {c['tokens']} tokens" for rung, c in each["rungs"].items()}
        share = f" ({floor / took:.1%})" if way == "plain" else ""
        print(
            f"  {way}: {took * 1e3:.1f} ms a token, a pass's floor {floor * 1e3:.0f} ms{share}, {plain / took:.2f}x plain; rounds of "
            f"{each['s_per_round']:.3f} s and {each['tokens_per_round']:.2f} tokens, {mean:.2f} on average: "
            f"{plain * mean / each['s_per_round']:.2f}x plain; loaded in {each['load_s']:.1f} s, first token "
            f"{each['first_token_s']:.1f} s, first round {each['first_round_s']:.1f} s, "
            f"{each['kv_bytes_per_round'] / 1e9:.1f} GB of KV a round; {rungs}; "
            f"GPU {each['gpu_bytes'] / 1e9:.1f} GB, by the driver {each['driver_bytes'] / 1e9:.1f} GB of "
            f"{each['cap_bytes'] / 1e9:.1f}, pinned {each['host_bytes'] / 1e9:.1f} GB",
            file=sys.stderr,
        )
    sys.stderr.flush()


if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    sys.exit(main())
