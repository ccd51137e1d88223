"""Decoding over several GPUs, batch 1: milliseconds a token against the floor, and sparse ladders against the dense one.

    python benchmarks/tensor_parallel.py [--model opt-30b] [--ranks 2] [--ladder plain "self:mlp=0.1,by=dejavu,heads=0.5" ...]
                                         [--prompt-tokens 512] [--max-tokens 64] [--repeat 3] [--transformers]

A model's shape with random weights, which each rank makes on its GPU. The floor is the bytes that a rank's passes read over what a copy
reaches on GPU 0. A token's time is that between tokens as the driver sees them, "on the GPU" the part of it that rank 0's passes take:
the rest is scheduling. Ladders that end in a sparse rung need a calibration; the one written here has random predictors of the size
that `rowcast calibrate` makes: times are those of a calibrated model, and the output is worth as little as the weights. A ladder that
fails is told, and the next one is run. Ratios are to plain decoding. --transformers: some of the layers on one GPU, eager, times those
of the shape. A table on standard error; the last line, on standard output, is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _eager import eager_layers
from _figures import Figure, Session, planned

from rowcast import LLM, SamplingParams
from rowcast.bench.gpu_timing import copy_bandwidth
from rowcast.calibration.fitting import default_rank
from rowcast.runtime.checkpoint import open_checkpoint
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.sparse.artefact import DESCRIPTION, FORMAT, TENSORS

POINTS = {"opt-66b": [(0.1356, 0.5), (0.1, 0.25)]}
"""Neurons and heads at which a shape is run, as shares. Deja Vu (arXiv 2310.17157, its code) publishes for OPT-66B 5,000 of 36,864 and
half, for OPT-175B a tenth and 24 or 48 of 96, which other shapes are run at."""
OTHERS = [(0.1, 0.5), (0.1, 0.25)]
GRID = [0.05, 1.0]
"""Densities of the written calibration, at all of which layers are alike."""


def write_calibration(
    folder: Path, model: str, *by: str, densities: Mapping[float, Sequence[float]] | None = None, rank: int | None = None
) -> Path:
    """A calibration of random predictors: those of each of `by` for neurons, and those for heads, which layer 0 has none ahead of. One
    layer's stand for all.

    `densities`: by mean density, ascending, the last 1, what each layer keeps; None: layers are alike. `rank`: of the predictors of
    neurons; None: what `rowcast calibrate` takes.
    """
    checkpoint = open_checkpoint(model)
    spec = spec_from_config(checkpoint.config)
    rank = rank or default_rank(spec.hidden_size, spec.activation == "relu")
    rows, grid = spec.intermediate_size * (1 + spec.gated), {share: [share] * spec.num_layers for share in GRID}
    grid = grid if densities is None else {mean: list(shares) for mean, shares in densities.items()}
    shapes: dict[str, tuple[int, ...]] = {}
    for reads in ("own", "ahead"):
        shapes |= {f"heads.{reads}.weight": (spec.num_heads, spec.hidden_size), f"heads.{reads}.bias": (spec.num_heads,)}
    for each in by:
        shapes |= {f"{each}.a": (rank, spec.hidden_size), f"{each}.b": (rows, rank), f"{each}.bias": (rows,)}
    data = {name: (torch.randn(shape) * shape[-1] ** -0.5).half().numpy().tobytes() for name, shape in shapes.items()}
    table = torch.tensor(list(grid.values())).numpy().tobytes()
    header: dict[str, Any] = {"__metadata__": {"fingerprint": checkpoint.source.fingerprint()}}
    header["densities"] = {"dtype": "F32", "shape": [len(grid), spec.num_layers], "data_offsets": [0, len(table)]}
    end = len(table)
    layers = [[name for name in shapes if layer or not name.startswith("heads.ahead")] for layer in range(spec.num_layers)]
    for layer, names in enumerate(layers):
        for name in names:
            span = [end, end + len(data[name])]
            header[f"layers.{layer}.{name}"] = {"dtype": "F16", "shape": list(shapes[name]), "data_offsets": span}
            end = span[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / TENSORS).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + table)
        for names in layers:
            file.writelines(data[name] for name in names)
    fields = {"format": FORMAT, "fingerprint": checkpoint.source.fingerprint(), "densities": list(grid), "density": 0.1}
    (folder / DESCRIPTION).write_text(json.dumps({**fields, "quality": {}, "scorers": {}}))
    return folder


@contextmanager
def calibrated(args: argparse.Namespace, ladder: str) -> Iterator[Path | None]:
    """A calibration for ladders that need one."""
    if "heads=" not in ladder and "dejavu" not in ladder:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        yield write_calibration(Path(folder), args.model, "dejavu-ahead" if "dejavu-ahead" in ladder else "dejavu")


def measure(args: argparse.Namespace, ladder: str, bandwidth: float) -> Figure:
    """One ladder, in ranks of its own."""
    params = SamplingParams(temperature=0, max_tokens=args.max_tokens, ignore_eos=True, detokenize=False)
    common: dict[str, Any] = {"dtype": args.dtype, "device": args.device, "max_num_seqs": 2, "max_model_len": args.max_model_len}
    mode = "exact" if ladder.split("/")[-1].strip() == "plain" else "approximate"
    started = time.perf_counter()
    with (
        calibrated(args, ladder) as calibration,
        LLM(
            args.model,
            tensor_parallel_size=args.ranks,
            launcher=args.launcher,
            ladder=ladder,
            mode=mode,
            calibration=calibration,
            progress=False,
            **common,
        ) as llm,
    ):
        load_s = time.perf_counter() - started
        spec = llm.spec
        prompts = torch.randint(
            spec.vocab_size, (args.repeat + 1, args.prompt_tokens), generator=torch.Generator().manual_seed(0)
        )
        started = time.perf_counter()
        llm.generate(prompts[0].tolist(), params)  # compiles and captures
        warm_s = time.perf_counter() - started
        runs = [llm.generate(prompt.tolist(), params)[0] for prompt in prompts[1:]]
        wish: dict[str, Any] = {"context": args.prompt_tokens + args.max_tokens, "prompt": args.prompt_tokens}
        foretold = planned(args.model, ladder, dtype=args.dtype, tensor_parallel=args.ranks, calibration=calibration, **wish)
    last = llm.plan.ladder[-1].partition(":")[0]
    stats = [run.metrics for run in runs]
    counts = [each.rungs[last] for each in stats]
    wall = median(1 / each.tokens_per_s for each in stats if each.tokens_per_s)
    graphs = median(
        sum(c.seconds for name, c in each.rungs.items() if name != "prefill") / (args.max_tokens - 1) for each in stats
    )
    read = median(c.bytes_read / c.tokens for c in counts)
    more = {
        "on_gpu_ms": 1e3 * graphs,
        "scheduling": wall / graphs - 1,
        "first_token_s": median(each.ttft_s or 0.0 for each in stats),
        "density": median(each.density.get(last, 1.0) for each in stats),
        "head_density": median(each.head_density.get(last, 1.0) for each in stats),
        "load_s": load_s,
        "warm_s": warm_s,
    }
    return Figure(
        name=ladder, ladder=ladder, s_per_token=wall, bytes=read, floor_s=read / bandwidth, planned_s=foretold, more=more
    )


def ladders(shape: str) -> list[str]:
    """What a shape is run with if nobody says."""
    points = POINTS.get(shape, OTHERS)
    return ["plain", *(f"self:mlp={neurons:g},by=dejavu-ahead,heads={heads:g},heads_by=ahead" for neurons, heads in points)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="opt-30b", help="A well-known model's name, or the path of a config.json.")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--ladder", nargs="+", help="by default plain, and a self-draft at each of the shape's points")
    parser.add_argument("--launcher", default="local")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--transformers", action="store_true", help="beside it, on one GPU")
    parser.add_argument("--floor", type=float, default=0.75, help="least share of the floor that plain decoding is to reach")
    parser.add_argument("--speed-up", type=float, default=2.2, help="least one of a sparse ladder")
    args = parser.parse_args()
    args.ladder = args.ladder or ladders(args.model)
    shape, args.model = args.model, f"random:{args.model}"
    bandwidth, name, eager = 1e10, args.device, None
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # the driver keeps no memory of a GPU
        if args.device == "cuda":
            bandwidth, name = pool.submit(copy_bandwidth).result(), pool.submit(torch.cuda.get_device_name).result()
        if args.transformers:
            eager = pool.submit(eager_layers, shape, args.device, args.dtype, args.prompt_tokens).result()
    session = Session("tensor_parallel", shape, name, ranks=args.ranks, bandwidth=bandwidth, transformers=eager)
    session.say(f"{shape}, {args.ranks} x {name}, a copy reaches {bandwidth / 1e12:.2f} TB/s; Transformers, eager: {eager}")
    peers = {} if eager is None else {"Transformers, eager": eager["token_ms"] / 1e3}
    found: dict[str, Figure] = {}
    for ladder in args.ladder:
        try:
            found[ladder] = session.add(replace(measure(args, ladder, bandwidth), peers=peers))
        except Exception as error:  # of a rank, of memory: the others may run
            session.fail(ladder, error)
    plain = found.get("plain")
    sparse = {ladder: one.s_per_token for ladder, one in found.items() if ladder != "plain"}
    if plain is not None:
        session.claim("plain decoding: share of the floor", plain.floor_s / plain.s_per_token, args.floor)
        session.claim("time between steps over that on the GPU", plain.more["scheduling"], 0.05, at_most=True)
    if sparse:
        best = min(sparse, key=lambda ladder: sparse[ladder])
        if plain is not None:
            for ladder, took in sparse.items():
                session.claim(f"{ladder} over plain decoding", plain.s_per_token / took, args.speed_up)
        for peer, took in peers.items():
            session.claim(f"{best} over {peer}", took / sparse[best], 15)
    sys.exit(session.end())


if __name__ == "__main__":
    main()
