"""Which product for a decode step on a CPU: torch's linear, MKL's or oneDNN's packed weight, over weights that no cache holds.

    python benchmarks/linear.py [--rows 3072] [--columns 576] [--tokens 1]

Prints microseconds a product and bytes of weights a second, median of 20 passes; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor

from rowcast.kernels.linear import Linear, OneDnnLinear

WORKING_SET_BYTES = 200 << 20


def seconds(run: Callable[[], object], passes: int = 20) -> float:
    """Median time of a call, warmed up."""
    for _ in range(3):
        run()
    times = []
    for _ in range(passes):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return median(times)


def mkl_packed(weight: Tensor, tokens: int) -> Callable[[Tensor], Tensor]:
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, tokens)
    return lambda x: torch.ops.mkl._mkl_linear(x, packed, weight, None, tokens)


def candidates(weights: Sequence[Tensor], tokens: int) -> dict[str, list[Callable[[Tensor], Tensor]]]:
    found: dict[str, list[Callable[[Tensor], Tensor]]] = {
        "torch": [Linear(w, None) for w in weights],
        "onednn": [OneDnnLinear(w, None, pack=False) for w in weights],
        "onednn-packed": [OneDnnLinear(w, None, pack=True) for w in weights],
    }
    if weights[0].dtype == torch.float32 and torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        found["mkl-packed"] = [mkl_packed(w, tokens) for w in weights]
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3072)
    parser.add_argument("--columns", type=int, default=576)
    parser.add_argument("--tokens", type=int, default=1)
    args = parser.parse_args()

    report: dict[str, dict[str, float]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        bytes_each = args.rows * args.columns * dtype.itemsize
        count = max(1, WORKING_SET_BYTES // bytes_each)
        weights = [torch.randn(args.rows, args.columns, dtype=dtype) for _ in range(count)]
        x = torch.randn(args.tokens, args.columns, dtype=dtype)
        name = str(dtype).removeprefix("torch.")
        for kind, products in candidates(weights, args.tokens).items():
            each = seconds(lambda products=products, x=x: [product(x) for product in products]) / count  # type: ignore[misc]
            gflops = 2 * args.tokens * args.rows * args.columns / each / 1e9
            print(f"{name:9} {kind:14} {each * 1e6:8.0f} us {bytes_each / each / 1e9:6.1f} GB/s {gflops:6.0f} GFLOP/s")
            report.setdefault(name, {})[kind] = each
    print(json.dumps({"rows": args.rows, "columns": args.columns, "tokens": args.tokens, "seconds": report}))


if __name__ == "__main__":
    main()
