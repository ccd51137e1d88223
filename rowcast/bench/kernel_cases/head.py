"""The LM head with a certificate and the draw behind it.

The head is random with a stated structure, since the bounds bite on nothing else: hidden states have six tenths of their length along a
mean and three tenths across 64 directions; rows are normal, and 64 of them stand out along the mean, as frequent tokens do, by 6 to 8
standard deviations of the others' logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from rowcast.bench.kernel_cases.case import Case
from rowcast.kernels.gpu import drawing, lm_head
from rowcast.runtime.sparse.lm_head import CertifiedHead

_VOCABULARY, _WIDTH, _DIRECTIONS, _STAND_OUT = 128_256, 4096, 64, 64
_ALONG_MEAN, _ACROSS = 0.6, 0.3
_ROTATED = 8
"""Calls in a graph; each reads far more than the L2."""


def cases(device_name: str) -> Iterator[Case]:
    yield from _heads()
    for vocabulary in (32_000, 128_256):
        for many in (1, 7, 64):
            yield _draw(many, vocabulary)


def _heads() -> Iterator[Case]:
    basis, rows, draw = structured_head(_VOCABULARY, _WIDTH)
    built = CertifiedHead(rows, bits=(4, 3), directions=basis)
    stages = [lm_head.Stage(stage.proxy, stage.correction, stage.radii) for stage in built.stages]
    for tokens, k in ((1, 1), (8, 1), (1, 64)):
        inputs = [draw(tokens) for _ in range(_ROTATED)]
        found = [lm_head.top(rows, stages, basis, x, k) for x in inputs]
        rescored = torch.cat([f.rescored for f in found]).double().mean().item()
        fallbacks = sum(int(f.fallback.any()) for f in found)
        differ = sum(int((f.ids[:, 0] != F.linear(x, rows).argmax(1)).sum()) for f, x in zip(found, inputs, strict=True))
        yield Case(
            "certified head",
            f"{_VOCABULARY} x {_WIDTH}, bf16, 4 + 3 bits, {_DIRECTIONS} directions, top {k}, {tokens} tokens",
            built.bytes + int(rescored * tokens) * rows[0].nbytes,
            [partial(lm_head.top, rows, stages, basis, x, k) for x in inputs],
            {"dense cuBLAS": [partial(F.linear, x, rows) for x in inputs]},
            f"a token rescores {rescored / _VOCABULARY:.3%} of the rows; {fallbacks} of {len(inputs)} calls read all rows; "
            f"{differ} of {tokens * len(inputs)} best ids differ from the dense product's",
        )


def structured_head(vocabulary: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Callable[[int], Tensor]]:
    """Directions float32 [64, E], rows bfloat16 [V, E], and a function from a number of tokens T to hidden states bfloat16 [T, E]."""
    g = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=g)

    basis = torch.linalg.qr(normal(width, _DIRECTIONS)).Q.T.contiguous()
    rows = normal(vocabulary, width).div_(width**0.5)
    often = torch.randperm(vocabulary, device="cuda", generator=g)[:_STAND_OUT]
    stands_out = torch.linspace(6, 8, _STAND_OUT, device="cuda") / (_ALONG_MEAN * width**0.5)
    rows[often] += stands_out[:, None] * basis[0]
    return basis, rows.bfloat16(), partial(_hidden, basis, g)


def _hidden(basis: Tensor, g: torch.Generator, tokens: int) -> Tensor:
    width = basis.shape[1]
    along = torch.randn(tokens, _DIRECTIONS, device="cuda", generator=g) * torch.linspace(1, 0.3, _DIRECTIONS, device="cuda")
    along = F.normalize(along, dim=1) * math.sqrt(1 - _ALONG_MEAN**2 - _ACROSS**2)
    along[:, 0] = _ALONG_MEAN
    across = torch.randn(tokens, width, device="cuda", generator=g)
    across = F.normalize(across - (across @ basis.T) @ basis, dim=1) * _ACROSS
    hidden: Tensor = (along @ basis + across) * width**0.5
    return hidden.bfloat16()


def _draw(many: int, vocabulary: int) -> Case:
    logits_bytes = many * vocabulary * 2
    rotated = max(2, min(64, (240 << 20) // logits_bytes))
    temperature, greedy = torch.full((many,), 0.8, device="cuda"), torch.zeros(many, device="cuda")
    seeds = torch.randint(2**62, (many,), device="cuda")
    samples, positions = torch.zeros_like(seeds), torch.arange(many, device="cuda")
    inputs = [(torch.randn(many, vocabulary, device="cuda") * 3).bfloat16() for _ in range(rotated)]
    return Case(
        "draw",
        f"{many} rows of {vocabulary}, bf16",
        logits_bytes,
        [partial(drawing.draw, x, temperature, None, seeds, samples, positions) for x in inputs],
        {
            "greedy rows": [partial(drawing.draw, x, greedy, None, seeds, samples, positions) for x in inputs],
            "torch argmax": [partial(torch.argmax, x, -1) for x in inputs],
        },
        "Gumbel noise by Philox in every token; torch only takes the maximum",
    )
