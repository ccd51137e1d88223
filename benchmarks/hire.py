"""HiRE end to end: 1 B gated parameters at 5% of the neurons, a vocabulary of 256,000, against our own captured dense passes.

    python benchmarks/hire.py
    python benchmarks/hire.py --config PATH/config.json --density 0.2 --tokens 8        # a rehearsal

The shape (hidden 2048, 16,384 gated neurons, 9 layers, 1.0 B parameters beside embeddings and head) has random weights, but for what
the head's certificate needs: hidden states have six tenths of their length along a mean and three tenths across 64 directions, which a
calibration knows; rows of the head are normal, and 64 of them stand out along the mean, as frequent tokens do. On weights without such
structure every token would read the whole head. Neurons are found by 4 bits of the gate and up weights, in the last way with half as
many candidates more, ranked again. Says nothing of quality. A table on standard error, one line of JSON on standard output.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _figures import Figure, Session, bandwidth, planned, release
from safetensors.torch import save_file
from torch import Tensor

from rowcast import LLM, SamplingParams
from rowcast.bench.latency import Transformers
from rowcast.bench.shapes import open_shape
from rowcast.runtime.checkpoint import Checkpoint
from rowcast.runtime.checkpoint.random_source import RandomSource
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.device import DTYPES
from rowcast.runtime.sparse.artefact import DESCRIPTION, FORMAT, TENSORS
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.weight_map import names_for

SHAPE: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 256_000,
    "hidden_size": 2048,
    "intermediate_size": 16_384,
    "num_hidden_layers": 9,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
WAYS = {
    "plain": "plain",
    "neurons": "self:mlp={density},by=q4",
    "neurons and head": "self:mlp={density},by=q4,lm=hire",
    "neurons ranked again, and head": "self:mlp={density},by=q4,over=1.5,lm=hire",
}
DIRECTIONS, STAND_OUT = 64, 64
ALONG_MEAN, ACROSS = 0.6, 0.3
LOUD = 1024.0
"""Length of embeddings, so that the last hidden state lies where the token's does: layers add some 200."""


class Structured(RandomSource):
    """As `RandomSource`, but for embeddings and head."""

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        super().__init__(spec, 0, device)
        names = names_for(spec)
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, generator=generator)

        vocabulary, width = spec.vocab_size, spec.embed_size
        count = min(DIRECTIONS, width // 2)
        self.basis = torch.linalg.qr(normal(width, count)).Q.T.contiguous()  # [m, E]
        along = F.normalize(normal(vocabulary, count), dim=1) * math.sqrt(1 - ALONG_MEAN**2 - ACROSS**2)
        along[:, 0] = ALONG_MEAN
        across = normal(vocabulary, width)
        across = F.normalize(across - (across @ self.basis.T) @ self.basis, dim=1) * ACROSS
        head = normal(vocabulary, width).div_(width**0.5)
        often = torch.randperm(vocabulary, device=device, generator=generator)[:STAND_OUT]
        stands_out = torch.linspace(6, 8, len(often), device=device) / (ALONG_MEAN * width**0.5)
        head[often] += stands_out[:, None] * self.basis[0]
        self._made = {self._name(names.embed): (along @ self.basis + across) * LOUD, self._name(names.head): head}

    def _name(self, stem: str) -> str:
        return next(name for name in self.names() if name.endswith(f"{stem}.weight"))

    def read(self, name: str, rows: slice | None = None, cols: slice | None = None, *, out: Tensor | None = None) -> Tensor:
        made = self._made.get(name)
        if made is None:
            return super().read(name, rows, cols, out=out)
        found = made[rows or slice(None), cols or slice(None)]
        return found.clone() if out is None else out.copy_(found)


def write_directions(folder: Path, checkpoint: Checkpoint, basis: Tensor, density: float) -> Path:
    """A calibration that knows the head's directions, and that all layers are alike."""
    spec = spec_from_config(checkpoint.config)
    table = torch.tensor([[density] * spec.num_layers, [1.0] * spec.num_layers])
    fingerprint = checkpoint.source.fingerprint()
    save_file({"densities": table, "head.directions": basis.cpu()}, folder / TENSORS, {"fingerprint": fingerprint})
    known = {"format": FORMAT, "fingerprint": fingerprint, "model": "a shape", "density": density, "densities": [density, 1.0]}
    (folder / DESCRIPTION).write_text(json.dumps({**known, "quality": {}, "scorers": {}, "lm_head_share": None}))
    return folder


def timed(args: argparse.Namespace, checkpoint: Checkpoint, name: str, ladder: str, calibration: Path, rate: float) -> Figure:
    """One way, loaded anew."""
    spec = spec_from_config(checkpoint.config)
    exact = ladder == "plain"
    given: dict[str, Any] = {} if exact else {"mode": "approximate", "calibration": calibration}
    context = args.prompt + args.tokens + 8
    common: dict[str, Any] = {"dtype": args.dtype, "device": args.device, "max_model_len": context, "max_num_seqs": 1}
    llm = LLM(checkpoint, ladder=ladder, progress=False, prefix_cache=False, **common, **given)
    draw = random.Random(1)
    params = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True, detokenize=False)
    runs = [llm.generate(draw.choices(range(spec.vocab_size), k=args.prompt), params)[0].metrics for _ in range(1 + args.repeat)]
    rung = "plain" if exact else "self"
    last = min(runs[1:], key=lambda run: 1 / (run.tokens_per_s or 1e-9))
    counts = last.rungs[rung]
    read = counts.bytes_read / counts.tokens
    rounds = llm.engine._executor._rounds  # type: ignore[attr-defined]
    more: dict[str, Any] = {
        "load_s": llm.load_stats["seconds"],
        "driven_by": "the host" if rounds is None else "the device",
        "on_device_ms": 1e3 * counts.seconds / counts.tokens,
        "fallbacks": counts.fallbacks,
        "density": last.density.get(rung, 1.0),
    }
    foretold = planned(f"random:{args.config}", ladder, dtype=args.dtype, context=context, prompt=args.prompt)
    del llm
    release()
    took = sorted(1 / run.tokens_per_s for run in runs[1:] if run.tokens_per_s)[args.repeat // 2]
    return Figure(name=name, ladder=ladder, s_per_token=took, bytes=read, floor_s=read / rate, planned_s=foretold, more=more)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="another gated shape: a config.json")
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--way", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--no-peer", action="store_true", help="without Transformers")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.device = device.type
    session = Session("hire", args.config or "1 B parameters, gated, vocabulary of 256,000", device, density=args.density)
    rate = session.head["bandwidth"] = bandwidth(device)
    session.head["note"] = (
        "Weights are random. Embeddings and head have the structure that the head's certificate needs, by construction, and the "
        "density is given: speed for a model that is like that, nothing of quality"
    )
    with tempfile.TemporaryDirectory() as folder:
        if args.config is None:
            args.config = str(Path(folder, "config.json"))
            Path(args.config).write_text(json.dumps(SHAPE))
        opened = open_shape(args.config, device=device)
        source = Structured(spec_from_config(opened.config), device)
        checkpoint = replace(opened, source=source)
        calibration = write_directions(Path(folder), checkpoint, source.basis, args.density)
        peers = {} if args.no_peer else transformers(args, opened)
        found: dict[str, Figure] = {}
        for name in args.way:
            try:
                one = timed(args, checkpoint, name, WAYS[name].format(density=args.density), calibration, rate)
                found[name] = session.add(replace(one, peers=peers if name == "plain" else {}))
            except Exception as error:  # the others may run
                session.fail(name, error)
                release()
    if plain := found.get("plain"):
        for name, one in found.items():
            if "head" in name:
                session.claim(f"{name} over our captured dense", plain.s_per_token / one.s_per_token, 1.6)
    return session.end()


def transformers(args: argparse.Namespace, checkpoint: Checkpoint) -> dict[str, float]:
    """Its eager decoding of the same shape."""
    peer = Transformers(checkpoint, DTYPES[args.dtype], args.device, shape=True)
    ids = random.Random(0).choices(range(checkpoint.config["vocab_size"]), k=args.prompt)
    times = peer.decode(ids, 8 + min(40, args.tokens))[8:]
    del peer
    release()
    return {"Transformers, eager": (times[-1] - times[0]) / (len(times) - 1)}


if __name__ == "__main__":
    sys.exit(main())
