"""Products with weights of 2, 3, 4 or 8 bits, for 1 to 16 tokens. The reference is `rowcast.kernels.lowbit`.

Precision and tiles: `codes.py`. A row's result does not depend on the number of tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rowcast.kernels.gpu.codes import Tiles, launch_for
from rowcast.kernels.gpu.lowbit_kernels import lowbit_kernel
from rowcast.kernels.lowbit import BLOCK, LowBit


def product(
    q: LowBit,
    x: Tensor,
    bias: Tensor | None = None,
    ids: Tensor | None = None,
    count: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    residual: Tensor | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """x W^T with the dequantised weight, plus bias[row] and residual: x [T, D], bias [R], residual [T, C] -> [T, C] of `dtype`.

    ids: int32 [C], the rows; None: all. count: int32 [1] on the device, how many of the places are valid (None: all); what the others
    hold is undefined. tiles: None for those of `codes.tiles_for`.
    """
    places = q.rows if ids is None else ids.shape[0]
    return _run(q, x, places, bias=bias, ids=ids, count=count, dtype=dtype, residual=residual, tiles=tiles)


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
    assert not gated or (ids is None and q.rows == 2 * places)
    assert q.codes.stride(1) == q.scales.stride(1) == 1
    block_bytes = BLOCK * q.bits // 8
    assert q.codes.stride(0) % block_bytes == 0
    launch = launch_for(q, x, places, gated=gated, activation=activation, dtype=dtype, residual=residual, tiles=tiles)
    lowbit_kernel[launch.grid](
        q.codes,
        q.scales,
        launch.x,
        ids,
        count,
        bias,
        norms,
        launch.residual,
        launch.out,
        launch.partial,
        launch.counters,
        len(x),
        places,
        launch.x.shape[1],
        q.codes.stride(0) // block_bytes,
        q.scales.stride(0),
        launch.blocks,
        WORD=_word(q, launch.tiles.unroll),
        SIGNED=signed,
        AHEAD=launch.tiles.ahead,
        GROUP=q.group // BLOCK,
        **launch.constants,
    )
    return launch.out


def _word(q: LowBit, unroll: int) -> int:
    """How many neighbouring scales of a row the kernel may read at once."""
    if q.group == BLOCK:
        for word in (4, 2):
            whole = q.scales.shape[1] % word == q.scales.stride(0) % word == unroll % word == 0
            if whole and q.scales.data_ptr() % (2 * word) == 0:
                return word
    return 1
