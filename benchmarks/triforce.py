"""TriForce's ladder on one GPU: a long prompt's KV beside the weights, plain decoding against its floor, ladders against it.

    python benchmarks/triforce.py                                  # all cases: needs 141 GB
    python benchmarks/triforce.py --case llama-3.1-8b
    python benchmarks/triforce.py --case llama-3.1-8b --profile 8  # then lists the kernels outside of passes, of 8 rounds more
    python benchmarks/triforce.py --case batches --model PATH/config.json --scale 0.01      # a rehearsal

Shapes with random weights; acceptance is simulated: each proposal stands with --outer before the whole model and --inner before the
rungs below, under the rule coupled, all verification done. Of a prompt its last tokens are run, the other entries are random numbers:
decoding reads as many as if they had been. Cases:

    on-chip        Llama-2-7B-128K, 124,928 tokens; the ladder of the paper (arXiv 2404.11912), then with a 4-bit or sparse middle rung
    llama-3.1-8b   129,024 tokens, 8 KV heads; the draft is a 68M shape with its vocabulary
    batches        2 x 56K, 6 x 19K and 10 x 12K tokens of Llama-2-7B-128K

A round's tokens vary by chance: a ladder's time is that of a round over the tokens that its acceptances give on average, so that few
rounds are enough; `as run` is what was seen. Rounds are timed once several in a row have needed no new graph. `between` is a round's
time less that of its passes, `new_graphs` counts those that were new all the same, `warm_rounds` the rounds before. Where the device
runs rounds by itself `between` is its own way from one pass of a round to the next (`gaps`), what it does behind the last one, mainly
to choose chunks (`chunks`), and its waiting for the next round (`waits`). `host` is the host's time from a round's result to the launch
of the next one, which passes beside `chunks`. A table on standard error, one line of JSON on standard output.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from _figures import Figure, Session, bandwidth, planned, release, variant
from _simulated import SimulatedLLM, skip_prompts
from _timeline import Kernel, Timeline, profiled

from rowcast import SamplingParams
from rowcast.bench.shapes import open_shape
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.step import RungCounts

MODEL, OTHER, DRAFT = "yarn-llama-2-7b-128k", "llama-3.1-8b", "llama-68m"
CASES = ("on-chip", "llama-3.1-8b", "batches")
BATCHES = ((2, 57_344, 1024), (6, 19_456, 768), (10, 12_288, 768))
"""Sequences, tokens of each prompt, entries of the retrieval rung (table 4)."""
SEQUENCES = tuple(batch[0] for batch in BATCHES)
ROUNDS, WARM_ROUNDS, MOST_WARM_ROUNDS = 48, 8, 64
"""WARM_ROUNDS: in a row, none of which has a pass that was not captured before; MOST_WARM_ROUNDS: with or without."""
BUDGET = 4096


@dataclass(frozen=True, slots=True)
class Case:
    """One prompt length and the ladders beside plain decoding."""

    name: str
    model: str
    draft: str
    sequences: int
    prompt: int
    ladders: dict[str, str]
    """By name; `DRAFT` in their text is the draft's."""
    bounds: dict[str, float]
    """Least speed-up of the fastest ladder whose name begins so."""


def ladders(budget: int, gammas: Sequence[str], middles: dict[str, str]) -> dict[str, str]:
    """By middle rung and pair of gammas. `middles`: what it reads of the weights, as a rung's settings."""
    found = {}
    for name, settings in middles.items():
        for pair in gammas:
            inner, outer = pair.split(",")
            own = f"{settings}," if settings else ""
            found[f"{name} {pair}"] = (
                f"draft:model=DRAFT,kv=256,gamma={inner} / self:{own}kv={budget},score=mean,gamma={outer} / plain"
            )
    return found


def cases(args: argparse.Namespace, folder: Path) -> list[Case]:
    """Those asked for."""

    scale: float = args.scale

    def scaled(tokens: int) -> int:
        return max(256, round(tokens * scale) // 16 * 16)

    model = args.model or MODEL
    draft = variant(DRAFT, folder, "draft", vocab_size=_vocabulary(model))
    found = []
    if "on-chip" in args.case:
        budget = min(BUDGET, scaled(args.prompt) // 2)
        middles = {"triforce": ""} | {f"middle {each}": each for each in args.middle}
        bounds = {"triforce": 2.6, "middle": 3.2}
        found.append(Case("on-chip", model, draft, 1, scaled(args.prompt), ladders(budget, args.gammas, middles), bounds))
    if "llama-3.1-8b" in args.case:
        other = args.model or OTHER
        small = variant(DRAFT, folder, "draft-for-8b", vocab_size=_vocabulary(other))
        prompt = scaled(129_024)
        chosen = ladders(min(BUDGET, prompt // 2), args.gammas, {"triforce": "", "middle bits=4": "bits=4"})
        found.append(Case("llama-3.1-8b", other, small, 1, prompt, chosen, {"triforce": 1.9}))
    if "batches" in args.case:
        for sequences, tokens, budget in (batch for batch in BATCHES if batch[0] in args.sequences):
            prompt = scaled(tokens)
            chosen = ladders(min(budget, prompt // 2), args.batch_gammas, {"triforce": ""})
            found.append(Case(f"{sequences} x {prompt}", model, draft, sequences, prompt, chosen, {"triforce": 1.9}))
    return found


def _vocabulary(model: str) -> int:
    vocabulary: int = spec_from_config(open_shape(model).config).vocab_size
    return vocabulary


def measure(session: Session, args: argparse.Namespace, case: Case, rate: float) -> None:
    """Plain decoding, then the ladders."""
    plain = None
    speed_ups: dict[str, float] = {}
    for name, text in {"plain": "plain", **case.ladders}.items():
        if not session.time_for(f"{case.name}, {name}", 12 * args.pace):
            continue
        try:
            found = timed(args, case, name, text.replace("DRAFT", f"random:{case.draft}"), rate)
        except Exception as error:  # of memory, say: the others may run
            session.fail(f"{case.name}, {name}", error)
            release()
            continue
        session.add(found)
        if name == "plain":
            plain = found
            if case.name == "on-chip":
                session.claim("on-chip, plain decoding over its floor", found.floor_s / found.s_per_token, 0.8)
        elif plain is not None:
            speed_ups[name] = plain.s_per_token / found.s_per_token
    for start, bound in case.bounds.items():
        mine = {name: value for name, value in speed_ups.items() if name.startswith(start)}
        if mine:
            best = max(mine, key=lambda name: mine[name])
            session.claim(f"{case.name}, {best} over plain decoding", mine[best], bound)


def timed(args: argparse.Namespace, case: Case, name: str, ladder: str, rate: float) -> Figure:
    """One ladder, loaded anew."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gammas = [int(pair.split(",")[1]) for pair in (*args.gammas, *args.batch_gammas)]
    most = (MOST_WARM_ROUNDS + args.rounds + args.profile) * (1 if name == "plain" else 1 + max(gammas))
    common: dict[str, Any] = {"dtype": args.dtype, "max_num_seqs": case.sequences, "max_model_len": case.prompt + most + 64}
    llm = SimulatedLLM(
        open_shape(case.model, device=device), ladder=ladder, prefix_cache=False, progress=False, device=device.type, **common
    )
    llm.rates(args.outer, args.inner)
    skip_prompts(llm)
    draw = random.Random(0)
    prompts = [draw.choices(range(llm.spec.vocab_size), k=case.prompt) for _ in range(case.sequences)]
    counted = run(llm, prompts, most, args.rounds, 0 if name == "plain" else args.profile)
    names = list(counted.rungs)
    proposals = counted.rungs[names[-2]].proposed if name != "plain" else []
    # Each proposal stands with the outer rate where all before it did.
    mean = 1 + sum(args.outer ** (place + 1) * each / counted.rounds for place, each in enumerate(proposals))
    read = sum(each.bytes_read for each in counted.rungs.values()) / counted.rounds / mean
    more: dict[str, Any] = {"load_s": llm.load_stats["seconds"], "first_s": counted.first_s}
    more |= {"warm_rounds": counted.warm_rounds, "new_graphs": counted.new_graphs}
    if name != "plain":
        more |= {"tokens_per_round": counted.tokens / counted.rounds, "on_average": mean, "ms_per_round": 1e3 * counted.step_s}
        steps = counted.rounds / case.sequences
        passes = {f"ms_per_round {rung}": 1e3 * each.seconds / steps for rung, each in counted.rungs.items()}
        more |= passes | {"ms_per_round between": 1e3 * counted.step_s - sum(passes.values())}
        more |= {"ms between, median": 1e3 * median(counted.between_s), "ms between, most": 1e3 * max(counted.between_s)}
        more |= {f"ms_per_round {part}": 1e3 * seconds for part, seconds in counted.parts_s.items()}
        if counted.kernels:
            print(f"{case.name}, {name}: outside of passes, a round\n{listed(counted.kernels)}", file=sys.stderr, flush=True)
    chances = {} if name == "plain" else {"acceptance": f"self={args.outer},draft={args.inner}"}
    wish: dict[str, Any] = {"context": case.prompt + most, "prompt": case.prompt, "batch": case.sequences, **chances}
    foretold = planned(f"random:{case.model}", ladder, dtype=args.dtype, **wish)
    del llm
    release()
    return Figure(
        name=f"{case.name}, {name}",
        ladder=ladder.replace(f"random:{case.draft}", "DRAFT"),
        s_per_token=counted.step_s / mean / case.sequences,
        bytes=read,
        floor_s=read / rate,
        planned_s=None if foretold is None else foretold / case.sequences,
        more=more,
    )


@dataclass(frozen=True, slots=True)
class Counted:
    """Rounds of all sequences together."""

    step_s: float
    """Mean time of a step, in which each sequence has a round."""
    first_s: float
    """Until each has its first token."""
    rounds: int
    """Of the sequences, as are `tokens` and `rungs`."""
    tokens: int
    rungs: dict[str, RungCounts]
    warm_rounds: int
    """Before those."""
    new_graphs: int
    """Passes in them that were made for the first time, or captured."""
    between_s: list[float]
    """Of each step, less its passes."""
    parts_s: dict[str, float]
    """Of that, as `Timeline.seconds` has them; empty where the host drives rounds."""
    kernels: list[Kernel]
    """Outside of passes, where they were asked for."""


def listed(kernels: Sequence[Kernel], most: int = 30) -> str:
    """A table of the longest."""
    lines = [f"{1e6 * each.seconds:9.1f} us {each.calls:6.1f} calls  {each.name:.90}" for each in kernels[:most]]
    total = sum(each.seconds for each in kernels)
    return "\n".join([*lines, f"{1e6 * total:9.1f} us {sum(each.calls for each in kernels):6.1f} calls  all of them"])


def new_graphs(llm: SimulatedLLM) -> int:
    """Passes that were made for the first time, or captured, so far; 0 where the host drives rounds."""
    rounds = llm.engine._executor._rounds  # type: ignore[attr-defined]
    return 0 if rounds is None else rounds._graphs.first_calls + rounds._graphs.captured


def run(llm: SimulatedLLM, prompts: Sequence[list[int]], tokens: int, rounds: int, profile: int = 0) -> Counted:
    """Decode for so many steps, after those in which kernels are compiled, graphs captured, and the draft reads the prompts.
    `profile`: steps more, of which the kernels outside of passes are told."""
    engine = llm.engine
    on_device = engine._executor._rounds  # type: ignore[attr-defined]
    timeline = Timeline(on_device) if on_device is not None and len(llm.plan.ladder) > 1 else None
    params = SamplingParams(temperature=0.8, max_tokens=tokens, ignore_eos=True, detokenize=False)
    started = time.perf_counter()
    requests = [engine.add(ids, replace(params, seed=i)) for i, ids in enumerate(prompts)]
    while not all(request.stats.generated_tokens for request in requests):
        engine.step()
    first_s = time.perf_counter() - started
    warm = newest = 0
    while warm < MOST_WARM_ROUNDS and warm - newest < WARM_ROUNDS:
        before = new_graphs(llm)
        engine.step()
        warm += 1
        newest = warm if new_graphs(llm) > before else newest
    before = new_graphs(llm)
    for request in requests:  # what follows is counted
        request.stats.rungs = {}
        request.stats.rounds = request.stats.round_tokens = 0
    steps, between, passes_s = [], [], 0.0
    if timeline is not None:
        timeline.clear()
    for _ in range(rounds):
        started = time.perf_counter()
        engine.step()
        steps.append(time.perf_counter() - started)
        before_s, passes_s = passes_s, sum(each.seconds for request in requests for each in request.stats.rungs.values())
        between.append(steps[-1] - (passes_s - before_s))
    parts_s = {} if timeline is None else timeline.seconds()
    rungs: dict[str, RungCounts] = {}
    for request in requests:
        for name, each in request.stats.rungs.items():
            rungs.setdefault(name, RungCounts()).add(each)
    done, written = (sum(getattr(request.stats, what) for request in requests) for what in ("rounds", "round_tokens"))
    graphs = new_graphs(llm) - before
    kernels = profiled(on_device, engine.step, profile) if profile and on_device is not None else []
    for request in requests:
        engine.abort(request)
    return Counted(fmean(steps), first_s, done, written, rungs, warm, graphs, between, parts_s, kernels)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--model", help="another shape for all cases")
    parser.add_argument("--prompt", type=int, default=124_928, help="of on-chip, tokens")
    parser.add_argument("--scale", type=float, default=1.0, help="of all prompts")
    parser.add_argument("--gammas", nargs="+", default=["2,6", "2,10"], help="of the draft and of the middle rung")
    parser.add_argument("--batch-gammas", nargs="+", default=["2,6"])
    parser.add_argument(
        "--sequences", nargs="+", type=int, choices=SEQUENCES, default=list(SEQUENCES), help="of batches: those of so many"
    )
    parser.add_argument("--middle", nargs="*", default=["bits=4", "mlp=0.3,by=q4"], help="middle rungs that read fewer weights")
    parser.add_argument("--outer", type=float, default=0.92)
    parser.add_argument("--inner", type=float, default=0.6)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timed ones of each way")
    parser.add_argument("--profile", type=int, default=0, help="rounds of each ladder that are profiled once it was timed")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seconds", type=float, default=1e6, help="after which nothing more is begun")
    parser.add_argument("--pace", type=float, default=1.0, help="times what a part is thought to take")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = sorted({args.model or (OTHER if case == "llama-3.1-8b" else MODEL) for case in args.case})
    session = Session("triforce", ", ".join(models), device, args.seconds, outer=args.outer, inner=args.inner, rule="coupled")
    session.head["note"] = (
        f"Acceptance is simulated: each proposal stands with {args.outer:g} before the whole model and {args.inner:g} before the rungs "
        "below it (rule coupled), all verification done; a token's time is a round's over the tokens that it has on average. Weights "
        "are random, and so is the KV of the prompts but for their last 64 tokens"
    )
    rate = bandwidth(device)
    session.head["bandwidth"] = rate
    session.say(
        f"a copy reaches {rate / 1e12:.2f} TB/s; acceptance is simulated: outer {args.outer}, inner {args.inner}, coupled"
    )
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(args, Path(folder)):
            measure(session, args, case, rate)
    return session.end()


if __name__ == "__main__":
    sys.exit(main())
