"""How products with `lowbit`'s and with `packed`'s weights are cut and launched, for 1 to 16 tokens; their kernels: `code_kernels`.

Inputs are multiplied as they are in bfloat16 and float16, and within 2^-17 in float32 (two bfloat16 parts), which keeps
`rowcast.kernels.lowbit.INPUT_ROUNDING`; levels are exact and sums float32. A row's result does not depend on the number of tokens.
Scratch: `scratch.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from rowcast.kernels.gpu import MOST_TOKENS, multiprocessors
from rowcast.kernels.gpu.overlap import overlap
from rowcast.kernels.gpu.scratch import partial_sums
from rowcast.kernels.lowbit import BLOCK, LowBit
from rowcast.kernels.packed import Packed


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


class Launch(NamedTuple):
    """What either kernel is launched with, beside the weight."""

    grid: tuple[int, int]
    """Splits, tiles of rows."""
    tiles: Tiles
    x: Tensor
    """[T, columns], contiguous, whole words: one column more where they were odd."""
    residual: Tensor | None
    """[T, places], contiguous."""
    out: Tensor
    """[T, places], not initialised."""
    partial: Tensor | None
    counters: Tensor | None
    blocks: int
    """Of 64 columns, with the padding."""
    constants: dict[str, Any]
    """Of the kernel, and the launch's own options."""


def launch_for(
    q: LowBit | Packed,
    x: Tensor,
    places: int,
    *,
    gated: bool,
    activation: str,
    dtype: torch.dtype,
    residual: Tensor | None,
    tiles: Tiles | None,
) -> Launch:
    """For x [T, columns of q] and a residual [T, places]: results [T, places] of `dtype`. tiles: None for those of `tiles_for`."""
    tokens = x.shape[0]
    assert 0 < tokens <= MOST_TOKENS and x.shape[1] == q.columns
    assert q.codes.data_ptr() % 16 == 0
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    assert residual is None or residual.shape == (tokens, places)
    if q.columns % 2:  # The kernels read pairs, as words.
        x = F.pad(x, (0, 1))
    elif x.data_ptr() % 4:
        x = x.clone()
    blocks = q.padded // BLOCK
    tiles = tiles or tiles_for(places, blocks, q.bits, gated, multiprocessors(x.device))
    step = tiles.warps * tiles.unroll
    splits = min(tiles.splits, triton.cdiv(blocks, step))
    row_tiles = triton.cdiv(places, tiles.rows)
    partial, counters = partial_sums(x.device, splits, (2 if gated else 1) * tokens * places, row_tiles)
    constants = dict(
        BITS=q.bits,
        GATED=gated,
        ACTIVATION=activation,
        WHOLE=q.columns == q.padded and blocks % step == 0,
        SPLITS=splits,
        WARPS=tiles.warps,
        UNROLL=tiles.unroll,
        EARLY=tiles.early,
        ROWS=tiles.rows,
        TOKENS=8 if tokens <= 8 and x.is_cuda else MOST_TOKENS,
        ASM=x.is_cuda,
        num_warps=tiles.warps,
        num_stages=1,
        **overlap(x),
    )
    out = torch.empty(tokens, places, dtype=dtype, device=x.device)
    return Launch((splits, row_tiles), tiles, x, residual, out, partial, counters, blocks, constants)


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
