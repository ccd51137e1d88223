"""How long those who decode wait for others' prompts, and short prompts for long ones: with a limit on prefills and without.

    python benchmarks/prefill_stall.py [--model M] [--prompt-tokens 4096] [--stall-s 0.25]

Two requests decode when a long prompt comes, and, right behind it, a short one. Told are the longest time between two tokens of those
who decode, until the long prompt has its first, and the time to the first token of both prompts. Outputs are compared. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from typing import Any

import torch

from rowcast import LLM, SamplingParams
from rowcast.runtime.checkpoint import DEFAULT_MODEL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prompt-tokens", type=int, default=4096)
    parser.add_argument("--short-tokens", type=int, default=32)
    parser.add_argument("--stall-s", type=float, default=0.25)
    options = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    for name, stall_s in (("without", None), ("with", options.stall_s)):
        llm = LLM(
            options.model, device=options.device, ladder="plain", prefix_cache=False, prefill_stall_s=stall_s, max_num_seqs=8,
            progress=False,
        )  # fmt: skip
        found[name] = measure(llm, options)
        each = found[name]
        print(
            f"{name:8} a limit: {each['longest_gap_s']:.2f} s between two tokens at most, {each['median_gap_s']:.3f} s before; "
            f"first token of the short prompt after {each['short_ttft_s']:.2f} s, of the long one after {each['long_ttft_s']:.2f} s"
        )
    same = found["with"].pop("outputs") == found["without"].pop("outputs")
    print(f"outputs are {'the same' if same else 'not the same'}")
    report = {"benchmark": "prefill_stall", "threads": torch.get_num_threads(), **vars(options), **found, "outputs_equal": same}
    print(json.dumps(report))


def measure(llm: LLM, options: argparse.Namespace) -> dict[str, Any]:
    engine, vocabulary, rng = llm.engine, llm.spec.vocab_size, random.Random(0)

    def add(tokens: int, most: int) -> Any:
        params = SamplingParams(temperature=0, max_tokens=most, ignore_eos=True, detokenize=False)
        return engine.add([rng.randrange(vocabulary) for _ in range(tokens)], params)

    warm = [add(300, 4) for _ in range(2)]
    while not all(request.finished for request in warm):
        engine.step()
    decoding = [add(16, 4096) for _ in range(2)]
    gaps: list[float] = []

    def step() -> None:
        started = time.perf_counter()
        engine.step()
        gaps.append(time.perf_counter() - started)

    while len(gaps) < 12:
        step()
    before = sorted(gaps[2:])[len(gaps[2:]) // 2]
    gaps.clear()
    long, short = add(options.prompt_tokens, 8), add(options.short_tokens, 8)
    while long.stats.ttft_s is None or short.stats.ttft_s is None:
        step()
    worst = max(gaps)
    while not (long.finished and short.finished):
        engine.step()
    for request in decoding:
        engine.abort(request)
    outputs = [request.sequences[0].output_ids for request in (long, short)]
    outputs += [request.sequences[0].output_ids[:16] for request in decoding]
    return {
        "longest_gap_s": worst,
        "median_gap_s": before,
        "short_ttft_s": short.stats.ttft_s,
        "long_ttft_s": long.stats.ttft_s,
        "outputs": outputs,
    }


if __name__ == "__main__":
    main()
