"""Products with weights of 2, 3, 4 or 8 bits, for 1 to 16 tokens. The reference is `rowcast.kernels.lowbit`.

Inputs are multiplied as they are in bfloat16 and float16, and within 2^-17 in float32 (two bfloat16 parts), which keeps
`rowcast.kernels.lowbit.INPUT_ROUNDING`; levels are exact and sums float32. A row's result does not depend on the number of tokens.
Scratch: `scratch.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from rowcast.kernels.gpu import MOST_TOKENS, multiprocessors
from rowcast.kernels.gpu.lowbit_kernels import lowbit_kernel
from rowcast.kernels.gpu.overlap import overlap
from rowcast.kernels.gpu.scratch import partial_sums
from rowcast.kernels.lowbit import BLOCK, LowBit


class Tiles(NamedTuple):
    """How a product is cut: tiles of `rows` with `splits` of their columns; in a step each of `warps` takes `unroll` blocks of 64."""

    rows: int
    warps: int
    unroll: int
    splits: int
    ahead: int = 1
    """Steps whose weights are on their way while one is multiplied: 1 or 2."""
    early: bool = False
    """Whether a program of the next kernel may take the place of one that has ended, rather than wait until all have read."""


def product(
    q: LowBit,
    x: Tensor,
    bias: Tensor | None = None,
    ids: Tensor | None = None,
    count: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    residual: Tensor | None = None,
) -> Tensor:
    """x W^T with the dequantised weight, plus bias[row] and residual: x [T, D], bias [R], residual [T, C] -> [T, C] of `dtype`.

    ids: int32 [C], the rows; None: all. count: int32 [1] on the device, how many of the places are valid (None: all); what the others
    hold is undefined.
    """
    return _run(q, x, q.rows if ids is None else ids.shape[0], bias=bias, ids=ids, count=count, dtype=dtype, residual=residual)


def gated_scores(q: LowBit, x: Tensor, norms: Tensor, activation: str) -> Tensor:
    """|act(g) * u| * norms, with the N rows of g and then the N of u in `q`: x [T, D], norms float32 [N] -> float32 [T, N]."""
    return _run(q, x, norms.shape[0], gated=True, activation=activation, norms=norms)


def scores(q: LowBit, x: Tensor, norms: Tensor, activation: str, bias: Tensor | None = None, gated: bool = False) -> Tensor:
    """Each neuron's contribution by its estimated pre-activation x W^T + bias: |act| * norms, with ReLU the signed pre-activation times
    the norms; gated as `gated_scores`. x [T, D], norms float32 [N], bias [R] -> float32 [T, N]."""
    signed = activation == "relu" and not gated
    return _run(q, x, norms.shape[0], bias=bias, gated=gated, activation=activation, norms=norms, signed=signed)


def ffn_hidden(q: LowBit, x: Tensor, activation: str, bias: Tensor | None = None, gated: bool = True) -> Tensor:
    """act(g) * u, with the N rows of g and then the N of u in `q`, or act(u) where not gated: x [T, D] -> [T, N] of x's dtype."""
    return _run(q, x, q.rows // 2 if gated else q.rows, bias=bias, gated=gated, activation=activation, dtype=x.dtype)


def _run(
    q: LowBit,
    x: Tensor,
    places: int,
    *,
    bias: Tensor | None = None,
    ids: Tensor | None = None,
    count: Tensor | None = None,
    gated: bool = False,
    activation: str = "none",
    norms: Tensor | None = None,
    signed: bool = False,
    dtype: torch.dtype = torch.float32,
    residual: Tensor | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    tokens = x.shape[0]
    assert 0 < tokens <= MOST_TOKENS and x.shape[1] == q.columns
    assert not gated or (ids is None and q.rows == 2 * places)
    assert q.codes.stride(1) == q.scales.stride(1) == 1
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    assert residual is None or residual.shape == (tokens, places)
    if q.columns % 2:  # The kernel reads pairs, as words.
        x = F.pad(x, (0, 1))
    elif x.data_ptr() % 4:
        x = x.clone()
    blocks, block_bytes = q.padded // BLOCK, BLOCK * q.bits // 8
    assert q.codes.stride(0) % block_bytes == 0 and q.codes.data_ptr() % 16 == 0
    tiles = tiles or tiles_for(places, blocks, q.bits, gated, multiprocessors(x.device))
    step = tiles.warps * tiles.unroll
    splits = min(tiles.splits, triton.cdiv(blocks, step))
    out = torch.empty(tokens, places, dtype=dtype, device=x.device)
    row_tiles = triton.cdiv(places, tiles.rows)
    partial, counters = partial_sums(x.device, splits, (2 if gated else 1) * tokens * places, row_tiles)
    lowbit_kernel[(splits, row_tiles)](
        q.codes,
        q.scales,
        x,
        ids,
        count,
        bias,
        norms,
        residual,
        out,
        partial,
        counters,
        tokens,
        places,
        x.shape[1],
        q.codes.stride(0) // block_bytes,
        q.scales.stride(0),
        blocks,
        WORD=_word(q, tiles.unroll),
        BITS=q.bits,
        GROUP=q.group // BLOCK,
        GATED=gated,
        ACTIVATION=activation,
        SIGNED=signed,
        WHOLE=q.columns == q.padded and blocks % step == 0,
        SPLITS=splits,
        WARPS=tiles.warps,
        UNROLL=tiles.unroll,
        AHEAD=tiles.ahead,
        EARLY=tiles.early,
        ROWS=tiles.rows,
        TOKENS=8 if tokens <= 8 and x.is_cuda else MOST_TOKENS,
        ASM=x.is_cuda,
        num_warps=tiles.warps,
        num_stages=1,
        **overlap(x),
    )
    return out


def tiles_for(places: int, blocks: int, bits: int, gated: bool, units: int) -> Tiles:
    """For a product with `places` rows of `blocks` blocks; units: the GPU's multiprocessors. As measured on an H100.

    What decides: all programs in one wave, with 15 to 25 warps a multiprocessor. Fewer rows make inputs dear where tokens are many.
    The next kernel's weights may come early where the wave leaves no room: elsewhere its programs crowd on some multiprocessors.
    """
    narrow, wide = triton.cdiv(places, 16), triton.cdiv(places, 32)
    if gated:
        return Tiles(16, 1, 4, 1) if narrow > 6 * units and bits in (3, 8) else Tiles(16, 2, 2, 1)
    if blocks <= 8:
        return Tiles(16, 2, 2, 1)
    if 3 * units < narrow <= 8 * units:
        return Tiles(16, 4, 2, 1)
    if wide < units // 2:
        return Tiles(16, 4, 2, max(1, min(16, 3 * units // narrow, blocks // 16)))
    splits = max(1, min(round(8 * units / wide), blocks // 16))
    return Tiles(32, 2, 2, splits, early=splits > 1 and splits * wide > 7 * units)


def _word(q: LowBit, unroll: int) -> int:
    """How many neighbouring scales of a row the kernel may read at once."""
    if q.group == BLOCK:
        for word in (4, 2):
            whole = q.scales.shape[1] % word == q.scales.stride(0) % word == unroll % word == 0
            if whole and q.scales.data_ptr() % (2 * word) == 0:
                return word
    return 1
