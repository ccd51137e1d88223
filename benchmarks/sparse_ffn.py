"""A gated FFN that reads only the neurons it is told to, against the dense one: batch 1, over weights that no cache holds.

    python benchmarks/sparse_ffn.py [--width 576] [--neurons 1536] [--layers 30] [--passes 20] [--threads N]

Dense is two oneDNN-packed products (kernels/linear.py). Sparse is scores of all neurons by a proxy of few bits, selection by shards,
and the products with the chosen rows: as one call, and as three, whose shares of their time are given. In each pass every
variant in turn runs through all layers; the table has medians a layer, the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from rowcast.kernels import lowbit, native, rows, select
from rowcast.kernels.linear import Linear, make_linear
from rowcast.kernels.lowbit import LowBit

DENSITIES = (0.7, 0.5, 0.35, 0.25)
BITS = (2, 4)
WARM_UP = 2
PARTS = ("scores", "selection", "rows")


@dataclass(frozen=True)
class Layer:
    """Dense weights and the same as banks: gate [N, D], up and down [N, 2, D]."""

    gate_up: Linear
    down: Linear
    gate: Tensor
    bank: Tensor
    proxies: dict[int, LowBit]
    norms: Tensor

    def dense(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)

    def fused(self, x: Tensor, bits: int, keep: int) -> Tensor:
        proxy, up, down = self.proxies[bits], self.bank[:, 0], self.bank[:, 1]
        return lowbit.gated_ffn(proxy, self.norms, keep, self.gate, up, down, x, "silu")

    def sparse(self, x: Tensor, bits: int, keep: int, clock: list[float]) -> Tensor:
        """Appends to `clock` the time at the end of each of PARTS."""
        scores = lowbit.gated_scores(self.proxies[bits], x, self.norms, "silu")
        clock.append(time.perf_counter())
        ids, own = select.top_union(scores, keep)
        clock.append(time.perf_counter())
        out = rows.ffn(self.gate, self.bank[:, 0], None, self.bank[:, 1], x, ids, own, "silu")
        clock.append(time.perf_counter())
        return out


def make_layer(width: int, neurons: int) -> Layer:
    gate, up, down = (torch.randn(neurons, width) / width**0.5 for _ in range(3))
    both = torch.cat([gate, up])
    return Layer(
        gate_up=make_linear(both.clone()),
        down=make_linear(down.T.contiguous()),
        gate=gate,
        bank=torch.stack([up, down], dim=1),
        proxies={bits: lowbit.quantise(both, bits) for bits in BITS},
        norms=down.norm(dim=1),
    )


def timed(run: Callable[[list[float]], object]) -> list[float]:
    """Seconds of each part of a call, then of the whole."""
    clock = [time.perf_counter()]
    run(clock)
    end = time.perf_counter()
    return [after - before for before, after in pairwise(clock)] + [end - clock[0]]


def measure(layers: list[Layer], x: Tensor, passes: int) -> tuple[float, dict[tuple[float, int], list[float]]]:
    """Median seconds a layer: dense, and for each density and bits those of PARTS, of these together and of the single call."""
    dense: list[float] = []
    sparse: dict[tuple[float, int], list[list[float]]] = {(density, bits): [] for density in DENSITIES for bits in BITS}
    for turn in range(passes + WARM_UP):
        times = [timed(lambda _, layer=layer: layer.dense(x)) for layer in layers]  # type: ignore[misc]
        dense += [whole for (whole,) in times] if turn >= WARM_UP else []
        for (density, bits), found in sparse.items():
            keep = round(len(layers[0].norms) * density)
            by_parts = partial(Layer.sparse, x=x, bits=bits, keep=keep)
            fused = partial(Layer.fused, x=x, bits=bits, keep=keep)
            parts = [timed(lambda clock, layer=layer, run=by_parts: run(layer, clock=clock)) for layer in layers]  # type: ignore[misc]
            whole = [timed(lambda _, layer=layer, run=fused: run(layer)) for layer in layers]  # type: ignore[misc]
            found += [a + b for a, b in zip(parts, whole, strict=True)] if turn >= WARM_UP else []
    return median(dense), {setting: [median(part) for part in zip(*found, strict=True)] for setting, found in sparse.items()}


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 up")
    return int(text)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=positive, default=576)
    parser.add_argument("--neurons", type=positive, default=1536)
    parser.add_argument("--layers", type=positive, default=30)
    parser.add_argument("--passes", type=positive, default=20)
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    layers = [make_layer(args.width, args.neurons) for _ in range(args.layers)]
    x = torch.randn(1, args.width)
    dense_s, sparse_s = measure(layers, x, args.passes)

    row_bytes = 3 * args.width * 4
    dense_bytes = args.neurons * row_bytes
    print(f"kernels {native.describe()}, {args.threads} threads, {args.layers} layers of {args.neurons} x {args.width}, float32")
    print(
        f"{'neurons':>8} {'proxy':>6} {'us':>8} {'MB':>7} {'GB/s':>6} {'speed-up':>9} {'3 calls, us':>12}   share of {', '.join(PARTS)}"
    )
    print(f"{'dense':>8} {'':>6} {dense_s * 1e6:8.1f} {dense_bytes / 1e6:7.2f} {dense_bytes / dense_s / 1e9:6.1f} {1:8.2f}x")
    report = []
    for (density, bits), (*parts, together, total) in sparse_s.items():
        read = round(args.neurons * density) * row_bytes + layers[0].proxies[bits].bytes
        shares = {name: part / together for name, part in zip(PARTS, parts, strict=True)}
        print(
            f"{density:8.0%} {f'q{bits}':>6} {total * 1e6:8.1f} {read / 1e6:7.2f} {read / total / 1e9:6.1f} {dense_s / total:8.2f}x "
            f"{together * 1e6:12.1f}   " + ", ".join(f"{share:.0%}" for share in shares.values())
        )
        times = {"us": total * 1e6, "three_calls_us": together * 1e6}
        report.append({"density": density, "bits": bits, **times, "bytes": read, "shares": shares})
    summary = {"kernels": native.describe(), "threads": args.threads, "width": args.width, "neurons": args.neurons}
    print(json.dumps({**summary, "dense_us": dense_s * 1e6, "dense_bytes": dense_bytes, "sparse": report}))


if __name__ == "__main__":
    main()
