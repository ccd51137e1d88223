"""Whether a GPU gives the CPU's tokens: greedy, float32, captured rounds, with and without drafts, on real text.

    python benchmarks/gpu_equals_cpu.py --ladder plain --ladder "ngram / self:kv=128,recent=32 / plain"

Each prompt runs alone on the CPU by plain decoding. Where an output of the GPU differs, the gap between the two tokens' logits there
at the first difference is printed: below 1e-4 it is a tie that two ways of summing may break differently.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
from pathlib import Path

import torch

from rowcast import LLM, SamplingParams

TEXT = Path(__file__).parents[1] / "tests/data/news-from-nowhere.txt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--ladder", action="append", help="repeatable; plain")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU to compare with")

    cpu = LLM(options.model, ladder="plain", dtype="float32", device="cpu", progress=False)
    ids = cpu.tokenizer.encode(TEXT.read_text())
    rng = random.Random(0)
    starts = [rng.randrange(len(ids) - 700) for _ in range(options.prompts)]
    prompts = [ids[start : start + rng.randint(8, 600)] for start in starts]
    params = SamplingParams(temperature=0, max_tokens=options.max_tokens, ignore_eos=True, detokenize=False)
    expected = [cpu.generate(prompt, params)[0].outputs[0].token_ids for prompt in prompts]
    report = {}
    for ladder in options.ladder or ["plain"]:
        gpu = LLM(
            options.model,
            ladder=ladder,
            dtype="float32",
            device="cuda",
            max_model_len=1024,
            max_num_seqs=16,
            prefix_cache=False,  # else the second time prompts are not run
            progress=False,
        )
        for how, found in (
            ("alone", [gpu.generate(prompt, params)[0] for prompt in prompts]),
            ("in a batch", gpu.generate(prompts, params)),
        ):
            gaps = []
            for prompt, ours, output in zip(prompts, expected, found, strict=True):
                theirs = output.outputs[0].token_ids
                place = next((i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), None)
                if place is not None:
                    gaps.append(gap(cpu, prompt + ours[:place], ours[place], theirs[place]))
            report[f"{ladder}, {how}"] = {"outputs": len(prompts), "equal": len(prompts) - len(gaps), "gaps": gaps}
            print(f"{ladder}, {how}: {len(prompts) - len(gaps)} of {len(prompts)} equal; gaps at first differences: {gaps}")
        del gpu
        gc.collect()
        torch.cuda.empty_cache()
    print(json.dumps({"benchmark": "gpu_equals_cpu", "device": torch.cuda.get_device_name(), "ladders": report}))


def gap(llm: LLM, ids: list[int], one: int, other: int) -> float:
    """By how much the model prefers a token to another behind `ids`."""
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=-1, ignore_eos=True)
    [entry] = llm.generate(ids, params)[0].outputs[0].logprobs or []
    return abs(entry[one].logprob - entry[other].logprob)


if __name__ == "__main__":
    main()
