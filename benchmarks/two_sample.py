"""Does a ladder under the rule `maximal` write from plain decoding's law? A two-sample test on a real model at a temperature.

    python benchmarks/two_sample.py FILE [--ladder SPEC]... [--seeds 256] [--prompts 6] [--tokens 12] [--temperature 0.8]

For each prompt, a piece of FILE: `--seeds` continuations by plain decoding, as many by plain decoding with other seeds (the control),
and as many by each ladder. Two statistics, each with a p-value by permutation: the energy distance (Szekely and Rizzo, 2013) of whole
continuations under the root of the Hamming distance, and chi-square of the tokens position by position, rare ones together. The
ladder passes where its p-values look like the control's; `smallest` is Holm-corrected over the prompts. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rowcast import LLM, SamplingParams

Ids = NDArray[np.int64]
LADDERS = ["ngram:gamma=4 / self:kv=48,sinks=4,recent=16,gamma=4 / plain"]
RARE = 5
"""Tokens seen less often than this in both samples together form one class."""


def continuations(
    llm: LLM, prompts: list[list[int]], first_seed: int, args: argparse.Namespace
) -> tuple[list[Ids], dict[str, float]]:
    """For each prompt [seeds, tokens]; acceptance by rung."""
    seeds = range(first_seed, first_seed + args.seeds)
    each = [(prompt, seed) for prompt in prompts for seed in seeds]
    params = [
        SamplingParams(temperature=args.temperature, seed=seed, max_tokens=args.tokens, ignore_eos=True, detokenize=False)
        for _, seed in each
    ]
    outputs = llm.generate([prompt for prompt, _ in each], params)
    ids = np.array([output.outputs[0].token_ids for output in outputs])
    shares: dict[str, list[float]] = {}
    for output in outputs:
        for name, share in output.metrics.acceptance.items():
            shares.setdefault(name, []).append(share)
    return np.split(ids, len(prompts)), {name: float(np.mean(values)) for name, values in shares.items()}


def p_values(a: Ids, b: Ids, permutations: int, draw: np.random.Generator) -> dict[str, float]:
    """Permutation p-values that samples a, b [N, n] have one law."""
    both = np.concatenate((a, b))
    labels = np.concatenate((np.ones(len(a)), -np.ones(len(b))))
    signs = np.stack([labels] + [draw.permutation(labels) for _ in range(permutations)])  # [P + 1, 2 N]
    # The root makes it see joint laws: Hamming itself is a sum over positions, and so blind to how they depend on each other.
    distances = np.sqrt((both[:, None] != both[None]).mean(-1))  # [2 N, 2 N]
    energy = -np.einsum("pi,ij,pj->p", signs, distances, signs, optimize=True)
    chi = np.zeros(len(signs))
    for column in both.T:
        classes = np.unique(column, return_inverse=True)[1]
        counts = np.bincount(classes)
        rare = counts[classes] < RARE
        member = np.eye(len(counts) + 1)[np.where(rare, len(counts), classes)]  # [2 N, classes]
        total = member.sum(0)
        chi += ((signs @ member) ** 2 / np.maximum(total, 1)).sum(-1)
    return {name: float((values >= values[0] - 1e-9).mean()) for name, values in (("energy", energy), ("chi_square", chi))}


def compare(ours: list[Ids], plain: list[Ids], permutations: int, seed: int) -> dict[str, Any]:
    """By statistic: the p-values of all prompts, and the smallest, Holm-corrected."""
    draw = np.random.default_rng(seed)
    found = [p_values(a, b, permutations, draw) for a, b in zip(ours, plain, strict=True)]
    report: dict[str, Any] = {}
    for name in found[0]:
        values = [one[name] for one in found]
        report[name] = {"p": [round(value, 4) for value in values], "smallest": round(min(1.0, min(values) * len(values)), 4)}
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--ladder", action="append")
    parser.add_argument("--seeds", type=int, default=256)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--permutations", type=int, default=1999)
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()

    samples: dict[str, list[Ids]] = {}
    acceptance: dict[str, dict[str, float]] = {}
    prompts: list[list[int]] = []
    for number, ladder in enumerate(["plain", *(args.ladder or LADDERS)]):
        llm = LLM(
            args.model,
            ladder=ladder,
            verification="maximal",
            dtype="float32",
            max_num_seqs=args.batch,
            max_model_len=args.prompt_tokens + args.tokens,
            progress=False,
        )
        if not prompts:
            ids = llm.tokenizer.encode(args.file.read_text(encoding="utf-8"))
            step = len(ids) // args.prompts
            prompts = [ids[i * step : i * step + args.prompt_tokens] for i in range(args.prompts)]
            samples["control"], _ = continuations(llm, prompts, 10**6, args)
        samples[ladder], acceptance[ladder] = continuations(llm, prompts, number * 10**4, args)
        del llm
        gc.collect()

    report = {
        "settings": {key: value for key, value in vars(args).items() if key not in ("file", "ladder")},
        "tests": {
            name: {**compare(ours, samples["plain"], args.permutations, 0), "acceptance": acceptance.get(name, {})}
            for name, ours in samples.items()
            if name != "plain"
        },
    }
    for name, found in report["tests"].items():
        print(name, found)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
