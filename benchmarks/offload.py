"""Models of which a part lies in host memory, by shape with random weights: seconds a token against the bytes and the bus.

    python benchmarks/offload.py                                          # a Llama-2-7B and an OPT-6.7B shape on one GPU
    python benchmarks/offload.py --case streamed --model llama-2-7b --ranks 2 --gpu-memory 24GiB
    python benchmarks/offload.py --case filled rows accelerate --model opt-66b --ranks 2 --gpu-memory 24GiB --heads 0.5
    python benchmarks/offload.py --case kv --ranks 2 --gpu-memory 24GiB --gammas 2,20
    python benchmarks/offload.py --case lowbit --model llama-2-70b --ranks 2 --gpu-memory 24GiB --rates 0.8 0.9

Cases, each in a process of its own, and each rank of it in another:

    streamed    all weights lie in host memory, every pass streams them: a token's bytes over the time, against one large copy's rate
    filled      as much as fits in --gpu-memory stays there, the rest is streamed: what `rows` is compared with
    rows        the neurons that a token needs are fetched, approximate; attention, LM head and the most frequent neurons stay
    peer        as rows, from the memory of GPU 1
    lowbit      exact: all weights in 4 bits stay and draft, the 16-bit ones are streamed; plain decoding, then simulated acceptances
    kv          KV of a long prompt in host memory, plain decoding and TriForce's ladder with simulated acceptance
    accelerate  the peer of filled: some of the layers under Accelerate's device_map, times those of the shape

`rows` of an OPT shape runs Deja Vu's ladder: low-rank predictors that read the attention's input, of random weights whose bias makes
26% of the neurons take 80% of the activations (PowerInfer's measure of OPT-30B, arXiv 2312.12456, section 2). Other shapes choose by
their own weights in 4 bits, which has no hot set. --gpu-memory is held to by the driver's count. NCCL is held to two channels, as its
many channels for NVLink, which cards of consumers do not have, take memory that these do without. Beside each figure stand what the bus
alone would take, what the planner's cost model foretells of the placement, with the bus's rate and the row cache's hits as they were in
the run, and the same for as many RTX 4090. A table on standard error, one line of JSON on standard output.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import offload_cases
import offload_kv
import torch
from _figures import Session
from _simulated import device_of, on_ranks
from offload_accelerate import layers_at_a_time
from offload_foretold import Asked
from offload_profile import Varied, write_profile
from offload_report import tell

from rowcast.bench.shapes import open_shape
from rowcast.placement.units import parse_bytes
from rowcast.runtime.config import spec_from_config

MODELS = {
    "streamed": "llama-2-7b",
    "filled": "opt-6.7b",
    "rows": "opt-6.7b",
    "peer": "opt-6.7b",
    "lowbit": "llama-2-70b",
    "kv": "yarn-llama-2-7b-128k",
    "accelerate": "opt-6.7b",
}


NOTES = {
    "rows": "rows of an OPT shape: predictors are random, with a hot set of 26% of the neurons that takes 80% of the activations by "
    "construction",
    "lowbit": "lowbit: acceptance is simulated, all verification done; a token's time is a round's over the tokens it has on average",
    "kv": "kv: acceptance is simulated (rule coupled), all verification done; a token's time is a round's over the tokens it has on "
    "average; of the prompt the last 64 tokens were run (all with --real-prompt)",
    "accelerate": "accelerate: some layers were run, times are those of all the shape's by count; its GPU memory is that of all ranks "
    "together",
}
"""What a reader of the figures has to know."""

PEER_TOKENS = 4
"""That accelerate is asked for at most: each walks through CPU memory."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=MODELS, nargs="+", default=["streamed", "filled", "rows"])
    parser.add_argument("--model", help="a well-known model's name or a config.json; by default " + str(MODELS))
    parser.add_argument("--ranks", type=int, default=1, help="GPUs, each with --gpu-memory and its own share of the model")
    parser.add_argument("--gpu-memory", default="10GiB", help="that each process may take of its GPU")
    parser.add_argument("--cache", type=float, default=0.5, help="share of the room for neurons that keeps fetched ones")
    parser.add_argument("--density", type=float, default=0.1, help="share of the neurons that a token uses")
    parser.add_argument("--by", default="dejavu-ahead", help="how shapes with predictors choose")
    parser.add_argument("--heads", type=float, help="share of the heads, of shapes with predictors; all")
    parser.add_argument("--rank", type=int, default=256, help="of the predictors")
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--tokens", type=int, default=16, help="to generate, or rounds of lowbit")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.8, 0.9], help="of lowbit: simulated acceptances")
    parser.add_argument("--gamma", type=int, default=16, help="of lowbit")
    parser.add_argument("--kv-prompt", type=int, default=127_000, help="of kv, tokens")
    parser.add_argument("--kv-rounds", type=int, default=10, help="timed of each way of kv")
    parser.add_argument("--real-prompt", action="store_true", help="of kv: run all of it; else its last tokens, the KV is zeros")
    parser.add_argument("--kv-budget", type=int, default=4096, help="of kv: entries of the retrieval cache")
    parser.add_argument("--gammas", default="2,20", help="of kv: of the draft and of the retrieval rung")
    parser.add_argument("--outer", type=float, default=0.92, help="of kv: simulated acceptance by the last rung")
    parser.add_argument("--inner", type=float, nargs="+", default=[0.6, 0.8, 0.4], help="likewise by the rung below it")
    parser.add_argument("--draft", default=offload_kv.DRAFT, help="of kv")
    parser.add_argument("--layers", type=int, default=3, help="of accelerate")
    parser.add_argument("--eager", action="store_true", help="no captured graphs")
    parser.add_argument("--profile", action="store_true", help="print where a token's time goes")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(one_case(args.one, args)))
        return 0
    models = sorted({args.model or MODELS[name] for name in args.case})
    session = Session("offload", ", ".join(models), device_of(0), ranks=args.ranks, gpu_memory=args.gpu_memory)
    session.head["note"] = "; ".join(["Weights are random", *(NOTES[name] for name in args.case if name in NOTES)])
    session.head["cases"] = found = {}
    for name in args.case:
        call = [sys.executable, __file__, *sys.argv[1:], "--one", name]
        ran = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=False)
        if ran.returncode or not ran.stdout.strip():
            session.fail(name, f"exit code {ran.returncode}")
            continue
        found[name] = json.loads(ran.stdout.splitlines()[-1])
        tell(session, name, found[name])
    if "rows" in found and "filled" in found:
        mine = found["rows"]["s_per_token"]
        session.claim("rows over full streaming that keeps what fits", found["filled"]["s_per_token"] / mine, 10)
    if "rows" in found and "accelerate" in found:
        session.claim("rows over Accelerate", found["accelerate"]["s_per_token"] / found["rows"]["s_per_token"], 30)
    return session.end()


def one_case(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """What it found on rank 0, and what the planner foretells."""
    model, cap = args.model or MODELS[name], parse_bytes(args.gpu_memory, "gpu_memory")
    if name == "accelerate":
        return layers_at_a_time(model, device_of(0), args.ranks * cap, args.prompt, args.layers, min(args.tokens, PEER_TOKENS))
    if name == "kv":
        inner, outer = map(int, args.gammas.split(","))
        shape = model, args.kv_prompt, args.real_prompt, cap, (inner, outer), args.kv_budget, args.ranks
        wish = offload_kv.Wish(*shape, args.outer, tuple(args.inner), args.kv_rounds, args.draft, profile=args.profile)
        found = on_ranks(args.ranks, offload_kv.run, wish) | {"outer": args.outer}
        wish = replace(wish, outside=found["outside_bytes"])
        plans = {ladder: wish.placed(device_of(0), ladder)[0] for ladder in ("plain", wish.ladder)}
        ways: dict[str, tuple[str, str | None]] = {"plain": ("plain", None)}
        ways |= {f"triforce {rate}": (wish.ladder, f"self={args.outer},draft={rate}") for rate in args.inner}
        for way, (ladder, chances) in ways.items():
            asked = Asked(
                model=model, plan=plans[ladder], context=args.kv_prompt, cap_bytes=cap, bus_rate=min(found["bus_rates"])
            )
            found[way] |= foretold(asked, ladder, chances)
        return found
    return weights_case(name, args, model, cap)


def foretold(asked: Asked, ladder: str, acceptance: str | float | None = None) -> dict[str, float | None]:
    return {
        "planned_s": asked.foretold(ladder, acceptance=acceptance),
        "projected_s": asked.projected(ladder, acceptance=acceptance),
    }


def weights_case(name: str, args: argparse.Namespace, model: str, cap: int) -> dict[str, Any]:
    """Those in which weights lie elsewhere."""
    spec = spec_from_config(open_shape(model).config)
    with tempfile.TemporaryDirectory() as folder:
        overlap, ladder = None, f"self:bits=4,gamma={args.gamma} / plain" if name == "lowbit" else "plain"
        if name in ("rows", "peer"):
            heads = "" if args.heads is None else f",heads={args.heads:g}"
            ladder = f"self:mlp={args.density:g},by={'q4' if spec.gated else args.by}{heads}"
            if not spec.gated:
                fingerprint = Varied(spec, 0, torch.device("cpu")).fingerprint()
                overlap = write_profile(Path(folder), spec, fingerprint, args.by, args.density, args.rank, args.heads)
        calibration = None if overlap is None else folder
        wish = offload_cases.Wish(
            case=name,
            model=model,
            ranks=args.ranks,
            cap_bytes=cap,
            cache=args.cache,
            ladder=ladder,
            calibration=calibration,
            prompt=args.prompt,
            tokens=args.tokens,
            rates=tuple(args.rates),
            gamma=args.gamma if name == "lowbit" else 0,
            eager=args.eager,
            profile=args.profile,
        )
        found = on_ranks(args.ranks, offload_cases.run, wish) | {"overlap": overlap}
        wish = replace(wish, outside=found["outside_bytes"])
        asked = Asked(
            model=model,
            plan=wish.placed(device_of(0))[0],
            context=args.prompt + args.tokens,
            cap_bytes=cap,
            bus_rate=min(found["bus_rates"]),
            calibration=calibration,
            hit_rate=found.get("rows_hit"),
        )
        if name != "lowbit":
            return found | foretold(asked, ladder)
        found["plain"] |= foretold(asked, "plain")
        for rate in args.rates:
            found[f"{rate}"] |= foretold(asked, ladder, rate)
        return found


if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("NCCL_MAX_NCHANNELS", "2")
    sys.exit(main())
