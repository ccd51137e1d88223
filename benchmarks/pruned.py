"""A pruned model beside its original: perplexity as cut, as fitted and recovered, on a text that neither has seen, and decode speed.

    python benchmarks/pruned.py SmolLM2-135M-Instruct --text a.txt --held-out b.txt --keep 0.8 [--steps 500] [-o DIR]

The pruned model is made anew, or taken from DIR, if it stands there with the same settings. Then both decode in turns in one process,
batch 1, from the same prompt: time of a token behind the first, median over turns; the ratio is the median of the turns' ratios. The
original's weights are held as the pruned one's are, unpacked. Prints a table, then one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from rowcast import LLM, SamplingParams, UserError
from rowcast.calibration.learning.job import How
from rowcast.calibration.pruning import Settings, default_batch, prune

PROMPT = "The history of the town begins with"


def seconds_a_token(llm: LLM, params: SamplingParams) -> float:
    [output] = llm.generate(PROMPT, params)
    assert output.metrics.tokens_per_s is not None
    return 1 / output.metrics.tokens_per_s


def speed(original: str, pruned: Path, args: argparse.Namespace) -> dict[str, float]:
    params = SamplingParams(temperature=0, max_tokens=args.max_tokens, ignore_eos=True, detokenize=False)
    common: dict[str, Any] = {
        "ladder": "plain",
        "dtype": args.dtype,
        "max_model_len": args.max_tokens + 64,
        "max_num_seqs": 2,
        "progress": False,
    }
    both = LLM(original, weights="unpacked", **common), LLM(str(pruned), **common)
    for llm in both:
        seconds_a_token(llm, params)
    turns = [[seconds_a_token(llm, params) for llm in both] for _ in range(args.repeat)]
    return {
        "original_ms": 1e3 * median(whole for whole, _ in turns),
        "pruned_ms": 1e3 * median(small for _, small in turns),
        "speed_up": median(whole / small for whole, small in turns),
    }


def measure(args: argparse.Namespace, output: Path) -> dict[str, Any]:
    settings = Settings(
        keep=args.keep, neurons=args.neurons, heads=args.heads, by=args.by, tokens=args.tokens, refit_tokens=args.refit_tokens,
        batch=default_batch(args.device), steps=args.steps, judged_tokens=args.judged, window=args.window,
    )  # fmt: skip
    found = prune(args.model, args.text, output, settings, How(args.dtype, args.device), held_out=args.held_out)
    sizes = ", ".join(f"{kind} {found[kind][0]} -> {found[kind][1]}" for kind in ("neurons", "heads", "kv_heads"))
    print(f"{found['kept']:.3f} of the parameters outside embeddings: {sizes}")
    print(f"{'':10} {'perplexity':>10} {'T=1':>6} {'T=0':>6} {'KL':>6}")
    print(f"{'original':10} {found['held_out']['cut']['original_perplexity']:10.2f}")
    for stage, held in found["held_out"].items():
        accepted = held["acceptance"]
        print(
            f"{stage:10} {held['perplexity']:10.2f} {accepted['1']['maximal']:6.3f} {accepted['0']:6.3f} {held['kl']:6.3f}",
            flush=True,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="SmolLM2-135M-Instruct")
    parser.add_argument("--text", action="append", required=True, type=Path, help="what is calibrated and trained on")
    parser.add_argument("--held-out", action="append", required=True, type=Path, help="what is judged on")
    parser.add_argument("--keep", type=float)
    parser.add_argument("--neurons", type=float)
    parser.add_argument("--heads", type=float)
    parser.add_argument("--by", choices=["taylor", "activation"], default="taylor")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--refit-tokens", type=int, default=65536)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--judged", type=int, default=16384)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    if args.keep is None and args.neurons is None and args.heads is None:
        args.keep = 0.8
    with tempfile.TemporaryDirectory() as folder:
        output = args.output or Path(folder) / "pruned"
        try:
            found = measure(args, output)
            found["decoding"] = speed(args.model, output, args)
        except UserError as error:
            sys.exit(str(error))
    print("decoding: " + ", ".join(f"{name} {value:.3f}" for name, value in found["decoding"].items()))
    print(json.dumps({name: value for name, value in found.items() if name != "fit_left"}))


if __name__ == "__main__":
    main()
