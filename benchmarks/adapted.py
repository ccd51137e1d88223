"""An adapted model beside the one that it was: quality by density, and the speed of decoding at each.

    python benchmarks/adapted.py ADAPTED [--original MODEL] --text FILE [--density 0.15 ...] [--device cpu] [--tokens 128]

Quality: every text in windows of `--window` tokens, teacher-forced, all tokens but a window's first sparse. Perplexity; acceptance,
the mean of sum(min(p, q)) with the law of all of the *original's* neurons, by itself; and with that of the model's own, in runs of four
behind K/V of its dense passes ("as a draft"), which is what its rung is worth. By the oracle and by q4, before (original) and after
(adapted; neurons above the levels of the calibration that it carries, if it does, and `used` says what share that was).

Speed: greedy, one sequence; time of a token behind the first, median over `--repeat` turns, each density beside plain decoding of the
same model in turns. `sparse`: the density has the last word (approximate). `ladder`: it drafts for plain, so that the output is
plain's. The last line is JSON. Give texts that the model was not adapted on.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

from rowcast import LLM, SamplingParams, UserError
from rowcast.calibration.adapting.table import lines, measure, to_json
from rowcast.calibration.quality import cut
from rowcast.calibration.text import read_text
from rowcast.runtime.checkpoint import open_checkpoint
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.device import DTYPES, choose_device, choose_dtype
from rowcast.runtime.sparse.artefact import Calibration, beside
from rowcast.runtime.tokenizer import load_tokenizer

PROMPT = "The history of the town begins with"
DENSITIES = (1.0, 0.5, 0.25, 0.2, 0.15, 0.1)


def quality(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    original, adapted = open_checkpoint(args.original), open_checkpoint(args.adapted)
    encoder = load_tokenizer(adapted)
    device, _ = choose_device(args.device)
    dtype, _ = choose_dtype(args.dtype, adapted.stored_dtype, device)
    calibration = Calibration.find(None, adapted.path, adapted.source.fingerprint())
    found = {}
    for path in args.text:
        windows = cut(read_text(path)[0], encoder, args.text_tokens, args.window, path.name)
        rows = measure(
            original, adapted, args.density, windows, dtype=DTYPES[dtype], device=device, bits=args.bits, calibration=calibration
        )
        print(f"{path.name}: {sum(map(len, windows))} tokens, {dtype} on {device}")
        print("\n".join(lines(rows)), flush=True)
        found[path.name] = to_json(rows)
    return found


def speed(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    params = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True, detokenize=False)
    context = min(1024, spec_from_config(open_checkpoint(args.adapted).config).max_context)

    def made(ladder: str, mode: str = "exact") -> LLM:
        return LLM(
            args.adapted, ladder=ladder, mode=mode, dtype=args.dtype, device=args.device, max_model_len=context, max_num_seqs=1,
            gpu_memory=args.gpu_memory, progress=False,
        )  # fmt: skip

    plain, found = made("plain"), {}
    cut = "" if beside(args.adapted) is None else ",cut=threshold"
    rungs = [f"self:mlp={density:g},by=q4{cut}" for density in args.density if density < 1]
    for rung in [*rungs, *([f"self:bits={args.bits}"] if args.bits else [])]:
        sides = {"sparse": made(rung, "approximate"), "ladder": made(f"{rung} / plain")}
        for llm in (plain, *sides.values()):
            _seconds(llm, params)
        turns = [{name: _seconds(llm, params) for name, llm in {"plain": plain, **sides}.items()} for _ in range(args.repeat)]
        found[rung] = {f"{name}_ms": 1e3 * median(turn[name][0] for turn in turns) for name in turns[0]}
        found[rung] |= {f"{name}_speed_up": median(turn["plain"][0] / turn[name][0] for turn in turns) for name in sides}
        found[rung] |= {
            "sparse_bytes_share": median(turn["sparse"][1] / turn["plain"][1] for turn in turns),
            "ladder_tokens_a_round": median(turn["ladder"][2] for turn in turns),
        }
        print(f"{rung:38}" + "".join(f"  {name} {value:.3f}" for name, value in found[rung].items()), flush=True)
        del sides
    return found


def _seconds(llm: LLM, params: SamplingParams) -> tuple[float, float, float]:
    """Of a token; the bytes that it read; tokens a round."""
    stats = llm.generate(PROMPT, params)[0].metrics
    assert stats.tokens_per_s is not None
    return 1 / stats.tokens_per_s, sum(stats.bytes_read.values()) / stats.generated_tokens, stats.tokens_per_round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapted")
    parser.add_argument("--original", default="SmolLM2-135M-Instruct")
    parser.add_argument("--text", type=Path, action="append", default=[])
    parser.add_argument("--density", type=float, action="append")
    parser.add_argument("--bits", type=int)
    parser.add_argument("--text-tokens", type=int, default=8192, help="of each text, evenly spread")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--gpu-memory")
    parser.add_argument("--tokens", type=int, default=128, help="decoded in each run; 0: no speed")
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    args.density = args.density or list(DENSITIES)
    try:
        found = {"adapted": args.adapted, "quality": quality(args), "speed": speed(args) if args.tokens else {}}
    except UserError as error:
        print(f"adapted.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
