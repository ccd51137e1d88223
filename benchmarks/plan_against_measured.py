"""What `rowcast plan` foretells of this machine beside what the engine then takes: decode time, first token and memory.

    python benchmarks/plan_against_measured.py                      # a Llama-2-7B shape: dense, sparse, and two under a cap
    python benchmarks/plan_against_measured.py --model opt-6.7b --case "dense" --case "sparse"

The machine is probed first. Then each case, in a process of its own, is planned, run with random weights as that plan has it, and
compared. Corrections that earlier runs left are not used. Ends with exit code 1 where a decode time is off by more than --time or the
GPU's memory by more than --memory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from typing import Any

CASES: dict[str, dict[str, Any]] = {
    "dense": {"ladder": "plain"},
    "sparse": {"ladder": "self:mlp=0.1,by=q4", "mode": "approximate"},
    "streamed": {"ladder": "plain", "gpu_memory": 0.5},
    "rows": {"ladder": "self:mlp=0.1,by=q4", "mode": "approximate", "gpu_memory": 0.75},
}
"""`gpu_memory`: times the bytes of all weights."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default="llama-2-7b", help="a well-known model's name or a config.json; its weights are random"
    )
    parser.add_argument("--case", choices=CASES, action="append", help="repeatable; all")
    parser.add_argument(
        "--prompt", type=int, default=2048, help="tokens; the largest step that memory is planned for has as many"
    )
    parser.add_argument("--tokens", type=int, default=128, help="to generate")
    parser.add_argument("--time", type=float, default=0.20, help="most error of the decode time")
    parser.add_argument("--memory", type=float, default=0.05, help="most error of the GPU's memory")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--hit-rate", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(_case(options, CASES[options.one])))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "ROWCAST_CACHE": folder}
        subprocess.run([sys.executable, "-m", "rowcast", "probe"], env=environment, check=True)
        failed, found = False, {}
        for name in options.case or CASES:
            call = [sys.executable, __file__, *sys.argv[1:], "--one", name]
            ran = subprocess.run(call, env=environment, stdout=subprocess.PIPE, text=True, check=False)
            if ran.returncode:
                failed = True
                continue
            found[name] = json.loads(ran.stdout.splitlines()[-1])
            if found[name]["hit_rate"]:  # Nobody knew before; the plan is made again with it.
                call += ["--hit-rate", str(found[name]["hit_rate"])]
                ran = subprocess.run(call, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                found[name] = json.loads(ran.stdout.splitlines()[-1])
            failed |= _print(name, found[name], options.time, options.memory)
        print(json.dumps({"benchmark": "plan_against_measured", "model": options.model, "cases": found}))
    return int(failed)


def _case(options: argparse.Namespace, case: dict[str, Any]) -> dict[str, Any]:
    """Plan it, run it, compare."""
    import torch

    from rowcast import LLM, SamplingParams
    from rowcast.bench.shapes import open_shape
    from rowcast.placement.resident import pass_bytes
    from rowcast.runtime.config import spec_from_config
    from rowcast.runtime.plan_for import MachineWish, plan_for

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = open_shape(options.model, device=device)
    wish = dict(case)
    share = wish.pop("gpu_memory", None)
    spec = spec_from_config(checkpoint.config)
    cap = None if share is None else round(share * pass_bytes(spec, 2))
    plan = plan_for(
        options.model,
        MachineWish(gpu_memory=cap),
        prompt=options.prompt,
        context=options.prompt + options.tokens,
        dtype="bfloat16" if device.type == "cuda" else "auto",
        hit_rate=options.hit_rate,
        **wish,
    )
    llm = LLM(checkpoint, plan=plan, progress=False)
    moved = None
    for seed in range(3):
        ids = random.Random(seed).choices(range(spec.vocab_size), k=options.prompt)
        params = SamplingParams(temperature=0, max_tokens=options.tokens, ignore_eos=True, detokenize=False)
        (output,) = llm.generate(ids, params)
        moved = output.metrics.moved
    report = llm.plan_report()
    assert report is not None and plan.forecast is not None
    tiers: dict[str, float] = {}
    for part in plan.forecast.shares:
        tiers[part.tier] = tiers.get(part.tier, 0) + part.bytes
    hits = moved.rows_hit / moved.rows_wanted if moved is not None and moved.rows_wanted else None
    return {
        "cap_bytes": cap,
        "hit_rate": hits if options.hit_rate is None else options.hit_rate,
        "bytes_by_tier": tiers,
        "figures": report.to_json(),
    }


def _print(name: str, found: dict[str, Any], most_time: float, most_memory: float) -> bool:
    """One line a figure; whether one of those that count is off by too much."""
    failed = False
    tiers = ", ".join(f"{tier} {held / 1e9:.2f} GB" for tier, held in found["bytes_by_tier"].items())
    cap = "" if found["cap_bytes"] is None else f", GPU capped to {found['cap_bytes'] / 1e9:.2f} GB"
    hits = (
        ""
        if found["hit_rate"] is None
        else f", {found['hit_rate']:.0%} of the fetched rows were in the cache, as the plan was told"
    )
    print(f"{name}: {tiers}{cap}{hits}")
    bounds = {"seconds per token": most_time, "GPU memory held": most_memory}
    for what, figure in found["figures"].items():
        scale, unit = {"s": (1e3, " ms"), "bytes": (1e-9, " GB")}.get(figure.get("unit", ""), (1.0, ""))
        shown = [
            f"{figure[side] * scale:.4g}{unit}" if figure.get(side) is not None else "-" for side in ("predicted", "measured")
        ]
        error = figure["error"]
        off = what in bounds and (error is None or abs(error) > bounds[what])
        failed |= off
        told = "" if error is None else f" ({error:+.1%})"
        print(
            f"  {what}: predicted {shown[0]}, measured {shown[1]}{told}{' TOO FAR' if off else ''} {figure.get('note', '')}".rstrip()
        )
    sys.stdout.flush()
    return failed


if __name__ == "__main__":
    sys.exit(main())
