"""The LM head with a certificate on real hidden states: bytes read, rows rescored, and whether the argmax is the dense one.

    python benchmarks/certified_head.py FILE [--calibrate FILE2] [--tokens 10000] [--bits 4,3 8] [--directions 0 64] [--top 1 64]
    python benchmarks/certified_head.py FILE --calibrate FILE2 --choose

Hidden states are those of the model over windows of FILE; directions come from FILE2, another text, and without one there are none.
`bytes` and `rescored` are what a token alone reads, as shares of the whole head; `wrong` counts tokens whose best id is not the dense
product's, with the largest gap between the two in the dense logits. Times are of single tokens, dense and certified in turn. With
--choose the setting is the one that reads fewest bytes on a sample of FILE2. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rowcast.errors import UserError
from rowcast.kernels import lowbit
from rowcast.runtime.checkpoint import open_checkpoint
from rowcast.runtime.comm import SoloComm
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.decoder import Decoder
from rowcast.runtime.kv import PagedKV
from rowcast.runtime.shard import Shard
from rowcast.runtime.sparse.lm_head import CertifiedHead, choose, directions
from rowcast.runtime.step import SeqStep
from rowcast.runtime.tokenizer import load_tokenizer
from rowcast.runtime.weights import DenseWeights

BLOCK = 16
BATCH = 64
CPU = torch.device("cpu")


@torch.inference_mode()
def head_inputs(weights: DenseWeights, ids: list[int], window: int) -> Tensor:
    """What the LM head's rows meet over windows of a text: [tokens, E]."""
    decoder, found = Decoder(weights, SoloComm(), CPU), []
    blocks = list(range(-(-window // BLOCK)))
    for start in range(0, len(ids), window):
        part = ids[start : start + window]
        kv = PagedKV(weights.spec, Shard(), num_blocks=len(blocks), block_size=BLOCK, dtype=torch.float32, device=CPU)
        hidden = decoder.run([SeqStep(0, part, 0, blocks, 1, sample=False)], kv)
        if weights.spec.final_norm:
            hidden = weights.norm_of(0, "final")(hidden)
        found.append(weights.outer.head_input(hidden))
    return torch.cat(found)


def microseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6


@torch.inference_mode()
def measure(head: CertifiedHead, dense: Callable[[Tensor], Tensor], hidden: Tensor, k: int, timed: int) -> dict[str, Any]:
    """One setting over all hidden states [tokens, E]."""
    read = rescored = fallbacks = wrong = vocabulary = 0
    gap = 0.0
    for h in hidden.split(BATCH):  # type: ignore[no-untyped-call]
        top, logits = head.top(h, k), dense(h)
        vocabulary = logits.shape[1]
        best, ids = logits.max(1)
        missed = top.ids[:, 0] != ids
        read += int(top.bytes.sum())
        rescored += int(top.rescored.sum())
        fallbacks += int(top.fallback.sum())
        wrong += int(missed.sum())
        gap = max([gap, *(best - logits.gather(1, top.ids[:, :1])[:, 0])[missed].tolist()])
    tokens, row_bytes = len(hidden), hidden.shape[1] * hidden.element_size()
    found: dict[str, Any] = {
        "bytes": read / tokens / (vocabulary * row_bytes),
        "fixed_bytes": head.bytes / (vocabulary * row_bytes),
        "rescored": rescored / tokens / vocabulary,
        "fallbacks": fallbacks,
        "wrong": wrong,
        "gap": gap,
    }
    if timed:
        singles = hidden[:timed].split(1)  # type: ignore[no-untyped-call]
        times = [(microseconds(partial(dense, h)), microseconds(partial(head.top, h, k))) for h in singles]
        found["dense_us"], found["top_us"] = (statistics.median(column) for column in zip(*times, strict=True))
    return found


def widths(text: str) -> tuple[int, ...]:
    """Such as "4,3"."""
    found = tuple(int(part) for part in text.split(",") if part.isdigit())
    if len(found) != text.count(",") + 1 or not set(found) <= set(lowbit.BITS):
        raise argparse.ArgumentTypeError(f"{text} is not made of {', '.join(map(str, lowbit.BITS))}, such as 4,3")
    return found


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 up")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--tokens", type=positive, default=10_000)
    parser.add_argument("--window", type=positive, default=512)
    parser.add_argument("--calibrate", type=Path, metavar="FILE2")
    parser.add_argument("--calibrate-tokens", type=positive, default=4096)
    parser.add_argument("--bits", type=widths, nargs="+", default=[(4, 3), (4,), (8,)], help="of each proxy, such as 4,3")
    parser.add_argument("--directions", type=int, nargs="+", default=[0, 64])
    parser.add_argument("--top", type=positive, nargs="+", default=[1, 64])
    parser.add_argument(
        "--choose", action="store_true", help="by FILE2, for the first of --top, in place of --bits and --directions"
    )
    parser.add_argument("--timed", type=int, default=0, metavar="N", help="time N single tokens")
    args = parser.parse_args()
    if args.choose and args.calibrate is None:
        parser.error("--choose needs --calibrate FILE2")
    if min(args.directions) < 0:
        parser.error(f"--directions {min(args.directions)} is less than 0")
    for file in (args.file, args.calibrate):
        if file is not None and not file.is_file():
            parser.error(f"{file} is not a file")

    try:
        checkpoint = open_checkpoint(args.model)
    except UserError as error:
        parser.error(str(error))
    weights = DenseWeights(spec_from_config(checkpoint.config), checkpoint.source, SoloComm(), dtype=torch.float32, device=CPU)
    rows = weights.outer.head_rows
    if rows is None:
        parser.error(f"{args.model} has no LM head in rows")
    if max(args.top) > len(rows):
        parser.error(f"--top {max(args.top)} is more than the {len(rows)} rows of the LM head")
    if args.window > weights.spec.max_context:
        parser.error(f"--window {args.window} is more than the model's context of {weights.spec.max_context}")
    tokenizer = load_tokenizer(checkpoint)

    def states(file: Path, tokens: int) -> Tensor:
        return head_inputs(weights, tokenizer.encode(file.read_text(encoding="utf-8"))[:tokens], args.window)

    basis = torch.empty(0, rows.shape[1])
    settings = [(bits, count) for bits in args.bits for count in args.directions]
    if args.calibrate is not None:
        sample = states(args.calibrate, args.calibrate_tokens)
        most = min(rows.shape[1], max(128, *args.directions) if args.choose else max(args.directions, default=0))
        if most:
            basis = directions(sample.T @ sample / len(sample), sample.mean(0), most)
        if args.choose:
            chosen = choose(rows, sample[:: -(-len(sample) // BATCH)], basis, k=args.top[0])
            print(f"chosen: {chosen}", flush=True)
            settings = [(chosen.bits, chosen.directions)]
    settings = sorted({(bits, min(count, len(basis))) for bits, count in settings})

    hidden = states(args.file, args.tokens)
    results = []
    for bits, count in settings:
        head = CertifiedHead(rows, bits=bits, directions=basis[:count])
        for k in args.top:
            found = {
                "bits": list(bits),
                "directions": count,
                "top": k,
                **measure(head, weights.outer.head, hidden, k, args.timed),
            }
            results.append(found)
            timing = f"  dense {found['dense_us']:.0f} us  top {found['top_us']:.0f} us" if args.timed else ""
            print(
                f"bits {'+'.join(map(str, bits)):5} directions {count:3}  top {k:3}  bytes {found['bytes']:.4f}  rescored "
                f"{found['rescored']:.5f}  fallbacks {found['fallbacks']:5}  wrong {found['wrong']} (gap {found['gap']:.2g}){timing}",
                flush=True,
            )
    print(json.dumps({"model": args.model, "tokens": len(hidden), "rows": len(rows), "results": results}))


if __name__ == "__main__":
    main()
