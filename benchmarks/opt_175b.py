"""OPT-175B, whole, over the GPUs of one machine: dense and sparse decoding, memory, a token's time by part, batches, a lost rank.

    ray start --head && ray job submit --working-dir . -- python benchmarks/opt_175b.py [--ranks 4] [--parts dense sparse ...]

Needs 4 GPUs of 141 GB; another shape (`--model`) does with less. The weights are random, and each rank makes its share on its GPU. The
sparse points are Deja Vu's (arXiv 2310.17157): 5,000 of 49,152 neurons in layers 0 to 85 and all in the last ten, 48 or 24 of 96 heads;
other shapes take the same shares. Predictors are random and of the size that `rowcast calibrate` makes: times are those of a calibrated
model, the output is worth as little as the weights. Floors are bytes over what a copy reaches on GPU 0. Each ladder has ranks of its
own, which make the weights again. Within `--seconds`, parts that would not end in time are left out and told, as is one that fails. The
last line is JSON.

Parts: dense, sparse: batch 1; memory: of each rank, and what was planned; kill: SIGKILL to a rank in mid-generation; token: a token's
time by part; plan: what `rowcast plan` foretells for the datasheet's machine; batch: 1 to 32 sequences; transformers: a few layers on
one GPU.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import opt_175b_ranks
import torch
from _eager import eager_layers
from _figures import Claim, Line, known_versions, variant
from opt_175b_floors import Bytes, kept, mean_kept
from opt_175b_parts import Session, batches, foretell, kill, memory, params, prompts, token
from opt_175b_ranks import watched
from tensor_parallel import write_calibration

from rowcast import LLM
from rowcast.bench.gpu_timing import copy_bandwidth
from rowcast.cluster.gang import Limits

WHAT = ("dense", "sparse", "memory", "plan", "kill", "token", "batch", "transformers")
CARDS = ("H200", "H100")
POINTS = ((0.5, "dejavu-ahead"), (0.25, "dejavu-ahead"), (0.5, "dejavu"), (0.25, "dejavu"))
"""Share of the heads, and what chooses neurons: where it looks ahead heads are chosen ahead, too. The first that is asked for has all
parts, the others batch 1 only."""


def write_predictors(args: argparse.Namespace, folder: Path) -> Path:
    layers = kept_layers(args)
    grid = {0.01: [0.01] * layers, mean_kept(layers): kept(layers), 1.0: [1.0] * layers}
    return write_calibration(folder, f"random:{args.model}", *sorted({by for _, by in POINTS}), densities=grid)


def kept_layers(args: argparse.Namespace) -> int:
    from rowcast.runtime.forecast import open_spec

    return open_spec(args.model)[0].num_layers


@contextmanager
def engine(session: Session, ladder: str, folder: Path, calibration: Path | None) -> Iterator[tuple[LLM, dict[str, float]]]:
    """Ranks of their own, which have generated once, so that kernels are compiled and graphs captured; how long that took."""
    args = session.args
    if args.device == "cuda":
        wait_for_memory()
    started = time.perf_counter()
    with LLM(
        f"random:{args.model}",
        tensor_parallel_size=args.ranks,
        limits=Limits(start_s=120.0, step_s=60.0),
        launcher=launcher(args, folder),
        ladder=ladder,
        mode="exact" if ladder == "plain" else "approximate",
        calibration=calibration,
        dtype=args.dtype,
        device=args.device,
        max_num_seqs=max(args.batch),
        max_model_len=args.max_model_len,
        progress=False,
    ) as llm:
        load_s = time.perf_counter() - started
        for _ in range(2):
            llm.generate(prompts(llm, args, 1)[0], params(8))
        yield llm, {"load_s": load_s, "warm_s": time.perf_counter() - started - load_s}


def launcher(args: argparse.Namespace, folder: Path) -> Any:
    """Of ranks that answer questions, or of processes of this machine, which do not."""
    if args.launcher == "local":
        return "local"
    from ray import cloudpickle

    from rowcast.cluster.ray_launcher import RayLauncher

    cloudpickle.register_pickle_by_value(opt_175b_ranks)  # type: ignore[no-untyped-call]  # the cluster's processes have no such module
    return RayLauncher(gpus=int(args.device == "cuda"), actor=watched(str(folder)))


def wait_for_memory() -> None:
    """Until the ranks before have given theirs back."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    if mine := os.environ.get("CUDA_VISIBLE_DEVICES"):
        query += ["-i", mine]
    for _ in range(40):
        asked = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
        if all(int(used) < 6000 for used in asked if used.isdigit()):
            return
        time.sleep(0.5)


def alone(session: Session, llm: LLM, ladder: str, floor: Bytes, times: dict[str, float]) -> dict[str, Any]:
    """Batch 1."""
    args = session.args
    runs = [llm.generate(prompt, params(args.max_tokens))[0].metrics for prompt in prompts(llm, args, args.repeat, seed=1)]
    last = llm.plan.ladder[-1].partition(":")[0]
    counts = [run.rungs[last] for run in runs]
    wall_s = median(1 / run.tokens_per_s for run in runs if run.tokens_per_s)
    on_device = [sum(c.seconds for name, c in run.rungs.items() if name != "prefill") / (args.max_tokens - 1) for run in runs]
    read = median(c.bytes_read / c.tokens for c in counts)
    found = {
        "ladder": ladder,
        "ms_per_token": 1e3 * wall_s,
        "on_device_ms": 1e3 * median(on_device),
        "floor_ms": 1e3 * read / session.bandwidth,
        "share_of_floor": read / session.bandwidth / wall_s,
        "counted_floor_ms": 1e3 * floor.total / session.bandwidth,
        "read_bytes": read,
        "density": median(run.density.get(last, 1.0) for run in runs),
        "head_density": median(run.head_density.get(last, 1.0) for run in runs),
        "ttft_s": median(run.ttft_s or 0.0 for run in runs),
        "runs_ms": [1e3 / run.tokens_per_s for run in runs if run.tokens_per_s],
        **times,
    }
    other = session.found.get("dense")
    if ladder != "plain" and other:
        found["speed_up"] = other["ms_per_token"] / found["ms_per_token"]
    session.say(
        f"{ladder}: {found['ms_per_token']:.2f} ms a token, floor {found['floor_ms']:.2f} ({found['share_of_floor']:.2f} of it), "
        f"{read / 1e9:.2f} GB a rank ({floor.total / 1e9:.2f} by count), on the device {found['on_device_ms']:.2f} ms; neurons "
        f"{found['density']:.3f}, heads {found['head_density']:.2f}; {found.get('speed_up', 1.0):.2f}x; loaded in "
        f"{times['load_s']:.1f} s, warm after {times['warm_s']:.1f} s, first token after {found['ttft_s']:.2f} s"
    )
    return found


def dense(session: Session, folder: Path) -> None:
    floor = None
    with engine(session, "plain", folder, None) as (llm, times):
        args = session.args
        floor = Bytes(llm.spec, args.ranks, args.prompt_tokens + args.max_tokens // 2, None, 1.0)
        session.part("dense", "dense", 0, lambda: alone(session, llm, "plain", floor, times))
        session.part("memory", "memory", 0, lambda: memory(session, llm, folder, "dense"))
        session.part("token", "token", 100, lambda: token(session, llm, folder, floor, "dense"))
        session.part("kill", "kill", 130, lambda: kill(session, llm))
        session.part("batch", "batch_dense", 110, lambda: batches(session, llm, "dense"))


def sparse(session: Session, folder: Path, calibration: Path) -> None:
    args = session.args
    layers = kept_layers(args)
    for number, (heads, by) in enumerate(POINTS[point] for point in args.points):
        ladder = f"self:mlp={mean_kept(layers)},by={by},heads={heads}{',heads_by=ahead' if by.endswith('-ahead') else ''}"
        name, first = f"sparse, {heads} of the heads, {by}", number == 0
        if not first and session.left_s < (45 if number == 1 else 70) * args.pace:
            session.say(f"{name} is left out: {session.left_s:.0f} s are left")
            session.failed.append(f"{name}: no time")
            continue
        with engine(session, ladder, folder, calibration) as (llm, times):
            floor = Bytes(llm.spec, args.ranks, args.prompt_tokens + args.max_tokens // 2, kept(layers), heads)
            session.part("sparse", name, 0, lambda: alone(session, llm, ladder, floor, times))  # noqa: B023
            if first:
                session.part("memory", "memory_sparse", 0, lambda: memory(session, llm, folder, "sparse"))
                session.part("plan", "plan_sparse", 0, lambda: foretell(session, ladder, calibration))  # noqa: B023
                session.part("batch", "batch_sparse", 30, lambda: batches(session, llm, "sparse"))
            session.part("token", f"token, {name}", 10, lambda: token(session, llm, folder, floor, name))  # noqa: B023


def claims(found: dict[str, Any]) -> Iterator[Claim]:
    """What is wanted of a whole OPT-175B on four GPUs; of fewer layers the times are no claims."""
    dense, points = found.get("dense"), [one for name, one in found.items() if name.startswith("sparse") and one]
    if dense:
        yield Claim("dense decoding: share of the floor", dense["share_of_floor"], 0.75)
    if not points:
        return
    best = min(points, key=lambda one: one["ms_per_token"])
    if found["model"] == "opt-175b":
        yield Claim(f"{best['ladder']}: ms a token", best["ms_per_token"], 10.0, at_most=True)
    if dense:
        yield Claim(f"{best['ladder']} over dense", dense["ms_per_token"] / best["ms_per_token"], 2.3)
    if eager := found.get("transformers"):
        yield Claim(
            f"{best['ladder']} over Transformers, eager, its layers one after the other",
            eager["token_ms"] / best["ms_per_token"],
            15.0,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="opt-175b", help="A well-known model's name, or the path of a config.json.")
    parser.add_argument("--layers", type=int, help="As many as the GPUs hold; all.")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--parts", nargs="+", default=list(WHAT), choices=WHAT, help="dense and sparse in this order")
    parser.add_argument(
        "--points", type=int, nargs="+", default=[1, 0, 3, 2], choices=range(len(POINTS)), help="Of the sparse ones."
    )
    parser.add_argument("--launcher", choices=("ray", "local"), default="ray", help="local: without memory and token")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--card", help="What the plan is for; left out: the GPU's, if it is one of CARDS.")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--max-model-len", type=int, default=704)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--batch-tokens", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=1e6, help="After which no more is begun.")
    parser.add_argument("--pace", type=float, default=1.0, help="Times what a part is thought to take.")
    args = parser.parse_args()
    session = Session(args)
    name = args.device
    if args.device == "cuda":
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # the driver keeps no memory of a GPU
            session.bandwidth = pool.submit(copy_bandwidth).result()
            name = pool.submit(torch.cuda.get_device_name).result()
        asked = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
        session.say(f"{len(asked.stdout.splitlines())} GPUs, torch {torch.__version__}")
    args.card = args.card or next((card for card in CARDS if card in name), CARDS[0])
    session.found |= {
        "planned_for": f"{args.ranks} x {args.card}",
        "device": name,
        "bandwidth": session.bandwidth,
        "versions": known_versions(),
    }
    line = Line(lambda: {**session.found, "failed": session.failed})
    session.say(f"{args.model}, {args.ranks} x {name}, a copy reaches {session.bandwidth / 1e12:.2f} TB/s")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as pool_of_one:
        if args.layers is not None:
            session.found["model"] = f"{args.model}, {args.layers} layers"
            args.model = variant(args.model, Path(folder), "fewer-layers", num_hidden_layers=args.layers)
        (questions := Path(folder, "questions")).mkdir()
        (predictors := Path(folder, "predictors")).mkdir()
        written: Future[Path] = pool_of_one.submit(write_predictors, args, predictors)
        session.part("plan", "plan_dense", 0, lambda: foretell(session, "plain", None))
        ladders = {"dense": lambda: dense(session, questions), "sparse": lambda: sparse(session, questions, written.result())}
        for what in args.parts:
            if what in ladders:
                session.part(what, f"ranks, {what}", 30, ladders[what])
        if "transformers" in args.parts:
            if args.device == "cuda":
                wait_for_memory()
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                layers = pool.submit  # in a process of its own, which leaves no memory behind
                session.part(
                    "transformers",
                    "transformers",
                    20,
                    lambda: layers(eager_layers, args.model, args.device, args.dtype, args.prompt_tokens).result(),
                )
        if one := session.found.get("transformers"):
            session.say(
                f"Transformers, eager: {one['layer_ms']:.2f} ms a layer, with all of them {one['token_ms']:.0f} ms; {one}"
            )
    for name, one in session.found.items():
        if name.startswith("sparse") and one and session.found.get("dense"):
            one["speed_up"] = session.found["dense"]["ms_per_token"] / one["ms_per_token"]
            session.say(f"{name}: {one['speed_up']:.2f}x dense")
    session.found["claims"] = [{**asdict(each), "met": each.met} for each in claims(session.found)]
    for each in session.found["claims"]:
        session.say(f"{each['what']}: {each['value']:.3g}, {each['bound']:g} wanted: {'met' if each['met'] else 'MISSED'}")
    line.tell()
    sys.exit(1 if session.failed else 0)


if __name__ == "__main__":
    main()
