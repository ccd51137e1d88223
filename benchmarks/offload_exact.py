"""A real model under a memory cap: the same tokens as without, in float32, and no growth over many requests.

    python benchmarks/offload_exact.py --gpu-memory 1100MiB 1350MiB 1500MiB      # of each ladder
    python benchmarks/offload_exact.py --gpu-memory 1100MiB --ranks 2 --requests 0
    ROWCAST_CPU_AS_GPU=1 python benchmarks/offload_exact.py --gpu-memory 400MiB --requests 20       # a CPU stands in for a card

With the cap, the planner has weights, and KV where that is short, in host memory; its own words on what lies where are told. Greedy and
seeded requests, one by one, under each ladder. Then --requests short ones: resident memory of this process and the GPU's after a third
of them and at the end. One line of JSON on standard output; exit code 1 where an output differs.
"""

from __future__ import annotations

import argparse
import random
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from _figures import Session, release

from rowcast import LLM, SamplingParams
from rowcast.runtime.checkpoint import DEFAULT_MODEL

LADDERS = ("plain", "ngram:gamma=3 / self:kv=128,gamma=4 / plain", "self:mlp=0.5,by=q4,gamma=2 / plain")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--gpu-memory", nargs="+", required=True, help="of each rank: one for all ladders, or one for each")
    parser.add_argument("--ladder", nargs="+", default=list(LADDERS))
    parser.add_argument("--prompt", type=int, default=600, help="tokens of the longest prompt")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--requests", type=int, default=1000, help="short ones; 0: none")
    args = parser.parse_args()
    caps = args.gpu_memory * len(args.ladder) if len(args.gpu_memory) == 1 else args.gpu_memory
    if len(caps) != len(args.ladder):
        parser.error(f"--gpu-memory has {len(caps)} values for {len(args.ladder)} ladders: give one for all, or one for each")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    session = Session("offload_exact", args.model, device, ranks=args.ranks, gpu_memory=", ".join(args.gpu_memory))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # which leaves nothing on the GPU
        expected = pool.submit(without_cap, args).result()
    session.head["places"] = {}
    for number, (ladder, cap) in enumerate(zip(args.ladder, caps, strict=True)):
        try:
            capped = LLM(args.model, ladder=ladder, gpu_memory=cap, **common(args))
            session.head["places"][ladder] = places = capped.plan.places_text()
            session.say(f"{ladder}, {cap}: {places}")
            if args.ranks == 1:
                away = capped.engine._executor.elsewhere  # type: ignore[attr-defined]
                session.claim(f"{ladder}: MiB in host memory", 0 if away is None else away.host_bytes / 2**20, 1)
            found = outputs(capped, args)
            equal = sum(a == b for a, b in zip(found, expected, strict=True))
            session.claim(f"{ladder}: outputs equal to those without a cap, of {len(expected)}", equal, len(expected))
            if not number and args.requests:
                grown(session, capped, args.requests)
            capped.shutdown()
            del capped
        except Exception as error:
            session.fail(ladder, error)
        release()
    wrong = any(not claim.met for claim in session.claims)
    return session.end() or int(wrong)


def common(args: argparse.Namespace) -> dict[str, Any]:
    given: dict[str, Any] = {"dtype": "float32", "max_model_len": args.max_model_len, "max_num_seqs": 1, "progress": False}
    return given | {"tensor_parallel_size": args.ranks, "launcher": "local"}


def without_cap(args: argparse.Namespace) -> list[list[int]]:
    with LLM(args.model, ladder="plain", **common(args)) as llm:
        return outputs(llm, args)


def outputs(llm: LLM, args: argparse.Namespace) -> list[list[int]]:
    """Of prompts of three lengths, greedy and seeded."""
    draw, found = random.Random(0), []
    for size in (12, args.prompt // 4, args.prompt):
        prompt = draw.choices(range(llm.spec.vocab_size), k=size)
        for heat in (0.0, 0.8):
            params = SamplingParams(temperature=heat, seed=5, max_tokens=args.tokens, ignore_eos=True, detokenize=False)
            found.append(llm.generate(prompt, params)[0].outputs[0].token_ids)
    return found


def grown(session: Session, llm: LLM, count: int) -> None:
    """What memory more is taken after all of the requests than after a third of them."""
    draw, before, after = random.Random(1), None, (0.0, 0.0)
    for number in range(count):
        prompt = draw.choices(range(llm.spec.vocab_size), k=draw.randint(4, 60))
        params = SamplingParams(temperature=0.8, seed=number, max_tokens=draw.randint(1, 3), ignore_eos=True, detokenize=False)
        [output] = llm.generate(prompt, params)
        assert len(output.outputs[0].token_ids) == params.max_tokens
        if number + 1 in (max(1, count // 3), count):
            after = memory_mib()
            before = before or after
    assert before is not None
    for what, old, new in zip(("host", "GPU"), before, after, strict=True):
        session.claim(f"MiB of {what} memory more after {count} requests than after a third", new - old, 16, at_most=True)


def memory_mib() -> tuple[float, float]:
    """Resident, and allocated on the GPU."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) / 1024, torch.cuda.memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0


if __name__ == "__main__":
    sys.exit(main())
