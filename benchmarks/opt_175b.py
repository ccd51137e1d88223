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
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import opt_175b_ranks
import torch
from opt_175b_floors import Bytes, eager_layers, kept, mean_kept
from opt_175b_ranks import PARTS, ask, by_part, watched
from ray import cloudpickle
from tensor_parallel import write_calibration

from rowcast import LLM, SamplingParams
from rowcast.bench.gpu_timing import copy_bandwidth
from rowcast.cluster.executor import GangExecutor
from rowcast.cluster.gang import Limits
from rowcast.cluster.ray_launcher import RayLauncher
from rowcast.runtime.params import SamplingParams as Params

WHAT = ("dense", "sparse", "memory", "plan", "kill", "token", "batch", "transformers")
POINTS = ((0.5, "dejavu-ahead"), (0.25, "dejavu-ahead"), (0.5, "dejavu"))
"""Share of the heads, and what chooses neurons; the first has all parts, the others batch 1 only."""


class Session:
    """What was found, and the time that is left."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.began = time.monotonic()
        self.found: dict[str, Any] = {"benchmark": "opt_175b", "model": args.model, "ranks": args.ranks}
        self.failed: list[str] = []
        self.bandwidth = 1e10

    @property
    def left_s(self) -> float:
        return float(self.args.seconds) - (time.monotonic() - self.began)

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began:5.1f} s] {text}", flush=True)

    def part(self, what: str, name: str, needs_s: float, run: Callable[[], object]) -> None:
        """Run it if it was asked for and there is time; keep what it returns under `name`."""
        if what not in self.args.parts:
            return
        if self.left_s < needs_s * self.args.pace:
            self.say(f"{name} is left out: {self.left_s:.0f} s are left")
            self.failed.append(f"{name}: no time")
            return
        try:
            self.found[name] = run()
        except Exception as error:  # the others may run
            self.say(f"{name} failed: {type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}")
            traceback.print_exc(limit=-4, file=sys.stderr)
            self.failed.append(f"{name}: {error!s:.200}")


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
        launcher=RayLauncher(gpus=int(args.device == "cuda"), actor=watched(str(folder))),
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


def wait_for_memory() -> None:
    """Until the ranks before have given theirs back."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    for _ in range(40):
        asked = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
        if all(int(used) < 6000 for used in asked if used.isdigit()):
            return
        time.sleep(0.5)


def prompts(llm: LLM, args: argparse.Namespace, count: int, seed: int = 0) -> list[list[int]]:
    drawn = torch.randint(llm.spec.vocab_size, (count, args.prompt_tokens), generator=torch.Generator().manual_seed(seed))
    return [[int(token) for token in row] for row in drawn]


def params(tokens: int, **more: Any) -> Params:
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, **more)


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


def memory(session: Session, llm: LLM, folder: Path, what: str) -> dict[str, Any]:
    """Bytes by rank, beside the plan's."""
    plan, ranks = llm.plan, range(session.args.ranks)
    taken = ask(folder, ranks, "memory", 0, lambda: llm.generate([1, 2, 3], params(4)))
    parts = {"weights": plan.weight_bytes, "rungs": plan.rung_bytes, "KV": plan.kv_bytes, "work": plan.work_bytes}
    planned = sum(parts.values())
    session.say(f"memory, {what}: planned {planned / 1e9:.2f} GB a rank: " + told(parts, 1e9, "GB"))
    for rank, one in zip(ranks, taken, strict=True):
        session.say(f"  rank {rank}: " + told(one, 1e9, "GB"))
    return {"planned": parts, "planned_bytes": planned, "ranks": taken}


def told(found: dict[str, Any], scale: float, unit: str) -> str:
    return ", ".join(f"{name} {value / scale:.2f}" for name, value in found.items()) + f" {unit}"


def token(session: Session, llm: LLM, folder: Path, floor: Bytes, what: str) -> dict[str, Any]:
    """A token's time by part, of rank 0, beside the floors."""
    if session.args.device != "cuda":
        raise ValueError("kernels are a GPU's")
    [prompt] = prompts(llm, session.args, 1, seed=1)
    [kernels] = ask(folder, range(1), "profile", 12, lambda: llm.generate(prompt, params(24)))
    found = by_part([(start, took, name) for start, took, name in kernels], llm.spec.num_layers)
    found["floor_ms"] = {part: 1e3 * read / session.bandwidth for part, read in floor.parts.items()}
    session.say(f"a token of {what} by part, {found['token_ms']:.2f} ms under the profiler, rank 0 (floor):")
    for part in PARTS:
        session.say(
            f"  {part:11} {found['ms'][part]:7.3f} ms ({found['floor_ms'][part]:.3f}), busy {found['busy_ms'].get(part, 0):.3f}"
        )
    for name, (count, ms) in list(found["kernels"].items())[:14]:
        session.say(f"    {name:64} {count:7.1f} a token, {1e3 * ms / count:7.1f} us each, {ms:7.3f} ms")
    return found


def batches(session: Session, llm: LLM, what: str) -> list[dict[str, Any]]:
    """Steps of several sequences, whose prompts have been run before."""
    args, found = session.args, []
    several = prompts(llm, args, max(args.batch), seed=2)
    last = llm.plan.ladder[-1].partition(":")[0]
    for size in sorted(args.batch):
        if session.left_s < 12 * session.args.pace:
            session.say(f"batches of {size} and more are left out")
            break
        for tokens in (6, args.batch_tokens):  # the first has graphs captured
            requests = [llm.engine.add(prompt, params(tokens)) for prompt in several[:size]]
            steps: list[float] = []
            while not all(request.finished for request in requests):
                started = time.perf_counter()
                decodes = all(request.sequences[0].output_ids for request in requests)
                llm.engine.step()
                if decodes and not any(request.finished for request in requests):
                    steps.append(time.perf_counter() - started)
        counts = [request.stats.rungs[last] for request in requests]
        one = {
            "batch": size,
            "step_ms": 1e3 * median(steps),
            "read_bytes": sum(c.bytes_read for c in counts) / (args.batch_tokens - 1),
        }
        session.say(f"batch {size:2}, {what}: {one['step_ms']:.2f} ms a step, {one['read_bytes'] / 1e9:.2f} GB a rank and step")
        found.append(one)
    return found


def kill(session: Session, llm: LLM) -> dict[str, Any]:
    """A rank's process is killed in mid-generation; what comes then, beside an undisturbed run."""
    args = session.args
    [prompt] = prompts(llm, args, 1, seed=1)
    expected = llm.generate(prompt, params(args.max_tokens))[0].outputs[0].token_ids
    executor = llm.engine._executor
    assert isinstance(executor, GangExecutor) and executor.gang is not None
    failures, tokens, killed_at, back_s = executor.failures, [], 0.0, 0.0
    for chunk in llm.stream(prompt, params(args.max_tokens)):
        if killed_at and chunk.token_ids and not back_s:
            back_s = time.perf_counter() - killed_at
        tokens += chunk.token_ids
        if not killed_at and len(tokens) >= args.max_tokens // 2:
            lost = len(tokens)
            os.kill(executor.gang.pids[-1], signal.SIGKILL)
            killed_at = time.perf_counter()
    same = next((i for i, (a, b) in enumerate(zip(tokens, expected, strict=False)) if a != b), None)
    found: dict[str, Any] = {
        "killed_after": lost,
        "seconds": back_s,
        "failures": executor.failures - failures,
        "tokens": len(tokens),
    }
    found |= {"differs_at": same}
    if same is not None:
        at = llm.generate([*prompt, *expected[:same]], params(1, logprobs=20))[0].outputs[0].logprobs
        assert at is not None
        known = {which: at[0][which].logprob for which in (tokens[same], expected[same]) if which in at[0]}
        found["gap"] = abs(known[tokens[same]] - known[expected[same]]) if len(known) == 2 else None
    session.say(
        f"a rank killed after {lost} of {args.max_tokens} tokens: the next one after {back_s:.1f} s, {len(tokens)} in all, "
        + ("all as undisturbed" if same is None else f"as undisturbed up to number {same}, a tie within {found['gap']}")
    )
    return found


def foretell(session: Session, ladder: str, calibration: Path | None) -> dict[str, Any]:
    """The planner's forecast for as many cards of the datasheet."""
    from rowcast.runtime.plan_for import MachineWish, plan_for

    args = session.args
    plan = plan_for(
        args.model,
        MachineWish(gpus=f"{args.ranks}x{args.card}"),
        ladder=ladder,
        mode="exact" if ladder == "plain" else "approximate",
        calibration=calibration,
        dtype="bfloat16",
        context=args.prompt_tokens + args.max_tokens,
        prompt=args.prompt_tokens,
        tensor_parallel=args.ranks,
    )
    forecast = plan.forecast
    assert forecast is not None
    stages = {stage.name: 1e3 * sum(stage.seconds.values()) for stage in forecast.stages}
    classes = next(each.classes for each in forecast.memory if each.card != "host")
    held = sum(size for name, size in classes.items() if name != "margin")
    session.say(
        f"planned for {args.ranks} x {args.card}, {ladder}: {1e3 * forecast.seconds_per_token:.2f} ms a token, first token after "
        f"{forecast.first_token_s:.2f} s, {held / 1e9:.2f} GB a GPU; " + told(stages, 1, "ms")
    )
    return {"ms_per_token": 1e3 * forecast.seconds_per_token, "first_token_s": forecast.first_token_s, "stages_ms": stages} | {
        "held_bytes": held
    }


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
        ladder = f"self:mlp={mean_kept(layers)},by={by},heads={heads}"
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="opt-175b", help="A well-known model's name, or the path of a config.json.")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--parts", nargs="+", default=list(WHAT), choices=WHAT, help="dense and sparse in this order")
    parser.add_argument(
        "--points", type=int, nargs="+", default=[0, 1, 2], choices=range(len(POINTS)), help="Of the sparse ones."
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--card", default="H200", help="What the plan is for.")
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
    cloudpickle.register_pickle_by_value(opt_175b_ranks)  # type: ignore[no-untyped-call]  # the cluster's processes do not look for modules here
    name = args.device
    if args.device == "cuda":
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # the driver keeps no memory of a GPU
            session.bandwidth = pool.submit(copy_bandwidth).result()
            name = pool.submit(torch.cuda.get_device_name).result()
        asked = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
        session.say(f"{len(asked.stdout.splitlines())} GPUs, torch {torch.__version__}")
    session.found |= {"device": name, "bandwidth": session.bandwidth, "torch": torch.__version__}
    session.say(f"{args.model}, {args.ranks} x {name}, a copy reaches {session.bandwidth / 1e12:.2f} TB/s")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as pool_of_one:
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
                lambda: layers(eager_layers, args.model, args.device, args.prompt_tokens).result(),
            )
        if one := session.found.get("transformers"):
            session.say(f"Transformers, eager: {one['layer_ms']:.2f} ms a layer, x 96 {one['of_96_layers_ms']:.0f} ms; {one}")
    for name, one in session.found.items():
        if name.startswith("sparse") and one and session.found.get("dense"):
            one["speed_up"] = session.found["dense"]["ms_per_token"] / one["ms_per_token"]
            session.say(f"{name}: {one['speed_up']:.2f}x dense")
    session.found["failed"] = session.failed
    print(json.dumps(session.found), flush=True)
    sys.exit(1 if session.failed else 0)


if __name__ == "__main__":
    main()
