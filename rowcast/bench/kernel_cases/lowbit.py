"""Products with weights of 4 and 8 bits, beside cuBLAS with the same weights in bf16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from rowcast.bench.kernel_cases.case import Case
from rowcast.kernels.gpu import lowbit
from rowcast.kernels.lowbit import BLOCK, LowBit

_READ_BYTES: Final = 260_000_000
_SIZES: Final = ((4096, 11008), (11008, 4096))
_BITS: Final = (4, 8)
_TOKENS: Final = (1, 4, 8)


def cases(device_name: str) -> Iterator[Case]:
    """Llama-2-7B's MLP for 1, 4 and 8 tokens, and its gated pair of products in 4 bits."""
    for rows, columns in _SIZES:
        dense = [_random(rows, columns) for _ in range(max(2, -(-_READ_BYTES // (rows * columns * 2))))]
        for bits in _BITS:
            weights = copies(rows, columns, bits)
            for tokens in _TOKENS:
                yield _product(weights, dense, tokens)
    yield _gated(copies(2 * 11008, 4096, 4), 1)


def random_weight(rows: int, columns: int, bits: int) -> LowBit:
    """Random codes, in groups of 64 columns; products of about the size of their inputs."""
    codes = torch.randint(256, (rows, columns * bits // 8), dtype=torch.uint8, device="cuda")
    scales = torch.rand(rows, columns // BLOCK, device="cuda").mul_(columns**-0.5 / (1 << bits - 2)).half()
    return LowBit(codes, scales, bits, BLOCK, columns)


def copies(rows: int, columns: int, bits: int) -> list[LowBit]:
    """As many weights as together exceed several times the L2."""
    first = random_weight(rows, columns, bits)
    return [first, *(random_weight(rows, columns, bits) for _ in range(-(-_READ_BYTES // first.bytes) - 1))]


def _random(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)


def _product(weights: list[LowBit], dense: list[Tensor], tokens: int) -> Case:
    def ours(weight: LowBit, x: Tensor) -> Callable[[], object]:
        return lambda: lowbit.product(weight, x, dtype=torch.bfloat16)

    def cublas(table: Tensor, x: Tensor) -> Callable[[], object]:
        return lambda: F.linear(x, table)

    rows, columns, bits = weights[0].rows, weights[0].columns, weights[0].bits
    shape = f"{rows} x {columns}, {bits} bits, {tokens} token{'s' if tokens > 1 else ''}"
    moved = weights[0].bytes + tokens * 2 * (rows + columns)
    calls = [ours(weight, _random(tokens, columns)) for weight in weights]
    return Case("low bits", shape, moved, calls, {"cublas bf16": [cublas(table, _random(tokens, columns)) for table in dense]})


def _gated(weights: list[LowBit], tokens: int) -> Case:
    def ours(weight: LowBit, x: Tensor) -> Callable[[], object]:
        return lambda: lowbit.ffn_hidden(weight, x, "silu")

    rows, columns = weights[0].rows // 2, weights[0].columns
    moved = weights[0].bytes + tokens * 2 * (rows + columns)
    shape = f"{rows} x {columns} gated, {weights[0].bits} bits, {tokens} token"
    return Case("low bits gated", shape, moved, [ours(weight, _random(tokens, columns)) for weight in weights])
