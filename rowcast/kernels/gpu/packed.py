"""Products with weights as quantised checkpoints hold them, for 1 to 16 tokens. The reference is `rowcast.kernels.packed`.

Precision, order of addition and tiles are those of `lowbit.py`: see `codes.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rowcast.kernels.gpu.codes import Tiles, launch_for
from rowcast.kernels.gpu.packed_kernels import packed_kernel
from rowcast.kernels.gpu.super_kernels import super_kernel
from rowcast.kernels.lowbit import BLOCK
from rowcast.kernels.packed import Packed
from rowcast.kernels.packed_sizes import HALF


def product(
    q: Packed, x: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.float32, residual: Tensor | None = None
) -> Tensor:
    """x W^T plus bias [R] and residual [T, R]: x [T, K] -> [T, R] of `dtype`."""
    return _run(q, x, q.rows, bias=bias, dtype=dtype, residual=residual)


def ffn_hidden(q: Packed, x: Tensor, activation: str, bias: Tensor | None = None, gated: bool = True) -> Tensor:
    """act(g) * u, with the N rows of g and then the N of u in `q`, or act(u) where not gated: x [T, K] -> [T, N] of x's dtype."""
    return _run(q, x, q.rows // 2 if gated else q.rows, bias=bias, gated=gated, activation=activation, dtype=x.dtype)


def _run(
    q: Packed,
    x: Tensor,
    places: int,
    *,
    bias: Tensor | None = None,
    gated: bool = False,
    activation: str = "none",
    dtype: torch.dtype = torch.float32,
    residual: Tensor | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    assert all(part.is_contiguous() for part in q.tensors)
    launch = launch_for(q, x, places, gated=gated, activation=activation, dtype=dtype, residual=residual, tiles=tiles)
    if q.over is not None or q.bits == 5:
        assert q.over is not None or (q.group == HALF and q.zeros is None and q.scales.dtype == torch.float16)
        super_kernel[launch.grid](
            q.codes,
            q.scales,
            q.over,
            q.minima,
            launch.x,
            bias,
            launch.residual,
            launch.out,
            launch.partial,
            launch.counters,
            len(x),
            places,
            launch.x.shape[1],
            launch.blocks,
            ZERO=0 if q.minima is not None else q.zero,
            **launch.constants,
        )
        return launch.out
    packed_kernel[launch.grid](
        q.codes,
        q.scales,
        q.zeros,
        q.minima,
        launch.x,
        bias,
        launch.residual,
        launch.out,
        launch.partial,
        launch.counters,
        len(x),
        places,
        launch.x.shape[1],
        q.scales.stride(0),
        launch.blocks,
        ZERO=q.zero,
        GROUP=q.group // BLOCK,
        **launch.constants,
    )
    return launch.out
