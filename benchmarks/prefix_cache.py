"""Time to the first token of prompts that begin alike, without and with the prefix cache, in one process.

    python benchmarks/prefix_cache.py [--model M] [--prefix-tokens 1024] [--own-tokens 16] [--requests 8]

Both engines get the same prompts in turn, one at a time: one that fills the cache, then `--requests` others of `--own-tokens` more
tokens of their own, whose median counts. Outputs are compared. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
from statistics import median

import torch

from rowcast import LLM, SamplingParams
from rowcast.runtime.checkpoint import DEFAULT_MODEL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prefix-tokens", type=int, default=1024)
    parser.add_argument("--own-tokens", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--requests", type=int, default=8)
    options = parser.parse_args()
    llms = {
        name: LLM(options.model, device=options.device, prefix_cache=cached, max_num_seqs=2, progress=False)
        for name, cached in (("without", False), ("with", True))
    }
    rng, vocabulary = random.Random(0), llms["with"].spec.vocab_size
    prefix = [rng.randrange(vocabulary) for _ in range(options.prefix_tokens)]
    prompts = [prefix + [rng.randrange(vocabulary) for _ in range(options.own_tokens)] for _ in range(options.requests + 1)]
    params = SamplingParams(temperature=0, max_tokens=options.max_tokens, ignore_eos=True, detokenize=False)
    for llm in llms.values():  # kernels are compiled and memory is touched
        llm.generate([rng.randrange(vocabulary) for _ in prompts[0]], params)

    ttft_s: dict[str, list[float]] = {name: [] for name in llms}
    tokens_per_s: dict[str, list[float]] = {name: [] for name in llms}
    differ, cached_tokens = 0, 0
    for number, prompt in enumerate(prompts):
        outputs = {name: llm.generate(prompt, params)[0] for name, llm in llms.items()}
        differ += len({tuple(output.outputs[0].token_ids) for output in outputs.values()}) > 1
        if not number:
            continue
        for name, output in outputs.items():
            ttft_s[name].append(output.metrics.ttft_s or 0.0)
            tokens_per_s[name].append(output.metrics.tokens_per_s or 0.0)
        cached_tokens += outputs["with"].metrics.cached_tokens
    found = {name: median(each) for name, each in ttft_s.items()}
    ratio = found["without"] / found["with"]
    for name in llms:
        print(
            f"{name:8} the cache: {found[name] * 1e3:8.1f} ms to the first token, then {median(tokens_per_s[name]):.1f} tokens/s "
            f"(medians of {options.requests}; {min(ttft_s[name]) * 1e3:.1f} to {max(ttft_s[name]) * 1e3:.1f} ms)"
        )
    print(f"{ratio:.1f} times lower; {differ} of {len(prompts)} outputs differ")
    report = {
        "benchmark": "prefix_cache",
        "model": str(options.model),
        "device": llms["with"].plan.device,
        "dtype": llms["with"].plan.dtype,
        "threads": torch.get_num_threads(),
        "prefix_tokens": options.prefix_tokens,
        "own_tokens": options.own_tokens,
        "requests": options.requests,
        "cached_tokens_per_request": cached_tokens / options.requests,
        "ttft_s": found,
        "tokens_per_s": {name: median(each) for name, each in tokens_per_s.items()},
        "ratio": ratio,
        "outputs_that_differ": differ,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
