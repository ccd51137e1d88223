"""Decoding with a sparse last rung against plain decoding, batch 1, in turns in one process.

    python benchmarks/sparse_decode.py [--ladder "self:mlp=0.5,by=q2" ...] [--calibration DIR] [--tokens 128] [--repeat 5]

Time of a token behind the first, median over turns; the ratio is the median of each turn's ratio to the plain run beside it. The output
of an approximate ladder is another than plain's: `rowcast eval` says how good. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median

from rowcast import LLM, SamplingParams, UserError

PROMPT = "The history of the town begins with"


def seconds_a_token(llm: LLM, params: SamplingParams) -> tuple[float, float]:
    """And the bytes that a token read."""
    [output] = llm.generate(PROMPT, params)
    rate = output.metrics.tokens_per_s
    assert rate is not None
    return 1 / rate, sum(output.metrics.bytes_read.values()) / output.metrics.generated_tokens


def measure(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    params = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True, detokenize=False)
    common = {"dtype": args.dtype, "max_model_len": 2048, "max_num_seqs": 2, "progress": False}
    plain = LLM(args.model, ladder="plain", **common)
    found = {}
    for ladder in args.ladder:
        sparse = LLM(args.model, ladder=ladder, mode="approximate", calibration=args.calibration, **common)
        for llm in (plain, sparse):
            seconds_a_token(llm, params)
        turns = [(seconds_a_token(plain, params), seconds_a_token(sparse, params)) for _ in range(args.repeat)]
        found[ladder] = {
            "plain_ms": 1e3 * median(dense[0] for dense, _ in turns),
            "sparse_ms": 1e3 * median(few[0] for _, few in turns),
            "speed_up": median(dense[0] / few[0] for dense, few in turns),
            "bytes_share": median(few[1] / dense[1] for dense, few in turns),
        }
        print(f"{ladder:40}" + "".join(f"  {name} {value:.3f}" for name, value in found[ladder].items()), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--ladder", action="append")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    args.ladder = args.ladder or ["self:mlp=0.5,by=q2", "self:mlp=0.5,by=q4", "self:mlp=0.5,by=q4,lm=hire"]
    try:
        print(json.dumps({"model": args.model, "dtype": args.dtype, "tokens": args.tokens, "ladders": measure(args)}))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
