"""The parts of `opt_175b.py` beside decoding of one sequence: memory, a token's time by part, batches, a lost rank, the plan."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from opt_175b_floors import Bytes
from opt_175b_ranks import PARTS, ask, by_part

from rowcast import LLM, SamplingParams
from rowcast.cluster.executor import GangExecutor


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


def prompts(llm: LLM, args: argparse.Namespace, count: int, seed: int = 0) -> list[list[int]]:
    drawn = torch.randint(llm.spec.vocab_size, (count, args.prompt_tokens), generator=torch.Generator().manual_seed(seed))
    return [[int(token) for token in row] for row in drawn]


def params(tokens: int, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, **more)


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
