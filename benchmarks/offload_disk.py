"""Layers that are read from disk at every pass: seconds a token, first with files that no cache holds, then from the page cache.

    python benchmarks/offload_disk.py --folder /tmp/disk
    ROWCAST_CPU_AS_GPU=1 python benchmarks/offload_disk.py --folder /tmp/disk --model llama-68m --layers 12 --gpu-memory 300MiB \\
        --host-memory 200MiB                                                                  # a rehearsal

A shape's random weights are written to the folder, where they stay. With both memories capped, the layers that have no room anywhere
are read from the files; what was foretold for that is the plan's. The files' own rates are those of plain reading. Emptying the page
cache takes root. Where a token is not the one of a run without caps, the gap says by how much that run prefers its own: products
are cut in other places, and in 16 bits near-ties fall differently. A table on standard error, one line of JSON on standard output.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _figures import Figure, Session, release, variant
from loading import drop_caches, read_all, write

from rowcast import LLM, SamplingParams


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", default="llama-2-7b")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--gpu-memory", default="2600MiB")
    parser.add_argument("--host-memory", default="6GiB")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=8)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    session = Session("offload_disk", f"{args.model}, {args.layers} layers", device)
    args.folder.mkdir(parents=True, exist_ok=True)
    place = write(
        variant(args.model, args.folder, f"{args.model}-{args.layers}", num_hidden_layers=args.layers), args.folder / "models"
    )
    files = sorted(place.glob("*.safetensors"))
    total = sum(file.stat().st_size for file in files)
    cold = total / read_all(files, 4) if drop_caches() else None
    warm = total / read_all(files, 4)
    session.head |= {"bytes": total, "disk_bytes_per_s": cold, "page_cache_bytes_per_s": warm}
    session.say(f"{total / 1e9:.2f} GB: disk {(cold or 0) / 1e9:.2f} GB/s, page cache {warm / 1e9:.2f} GB/s")
    common: dict[str, Any] = {"dtype": args.dtype, "ladder": "plain", "max_model_len": 256, "max_num_seqs": 1, "progress": False}
    free = LLM(place, **common)
    ids = random.Random(0).choices(range(free.spec.vocab_size), k=16)
    params = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True, detokenize=False)
    whole = free.generate(ids, replace(params, logprobs=-1))[0].outputs[0]
    expected, laws = whole.token_ids, whole.logprobs or []
    del free
    release()
    llm = LLM(place, gpu_memory=args.gpu_memory, host_memory=args.host_memory, **common)
    session.say(llm.plan.places_text())
    assert llm.plan.forecast is not None
    away = sum(share.bytes for share in llm.plan.forecast.shares if share.tier == "disk")
    llm.generate(ids, params)
    for name, rate in (("cold", cold), ("page cache", warm)):
        if rate is None or (name == "cold" and not drop_caches()):
            continue
        started = time.perf_counter()
        found = (
            llm.generate(ids, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False))[0]
            .outputs[0]
            .token_ids
        )
        took = time.perf_counter() - started
        if name != "cold":
            [output] = llm.generate(ids, params)
            found, took = output.outputs[0].token_ids, 1 / (output.metrics.tokens_per_s or 1e-9)
        places = [place for place, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]]
        gaps = [laws[place][expected[place]].logprob - laws[place][found[place]].logprob for place in places[:1]]
        session.add(
            Figure(
                name=name,
                ladder="plain",
                s_per_token=took,
                bytes=away,
                floor_s=away / rate,
                planned_s=llm.plan.forecast.seconds_per_token,
                more={"tokens": len(found), "gaps_at_first_difference": gaps},
            )
        )
    return session.end()


if __name__ == "__main__":
    sys.exit(main())
