"""Products with weights as quantised checkpoints hold them, for 1 to 16 tokens. The reference is `rowcast.kernels.packed`.

Precision, order of addition and tiles are those of `lowbit.py`; only where 0 lies among the levels is another's business.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from rowcast.kernels.gpu import MOST_TOKENS, multiprocessors
from rowcast.kernels.gpu.lowbit import Tiles, tiles_for
from rowcast.kernels.gpu.overlap import overlap
from rowcast.kernels.gpu.packed_kernels import packed_kernel
from rowcast.kernels.gpu.scratch import partial_sums
from rowcast.kernels.lowbit import BLOCK
from rowcast.kernels.packed import Packed


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
    tokens = x.shape[0]
    assert 0 < tokens <= MOST_TOKENS and x.shape[1] == q.columns
    assert all(part.is_contiguous() for part in q.tensors)
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    assert residual is None or residual.shape == (tokens, places)
    if q.columns % 2:  # The kernel reads pairs, as words.
        x = F.pad(x, (0, 1))
    elif x.data_ptr() % 4:
        x = x.clone()
    blocks = q.padded // BLOCK
    assert q.codes.data_ptr() % 16 == 0
    tiles = tiles or tiles_for(places, blocks, q.bits, gated, multiprocessors(x.device))
    step = tiles.warps * tiles.unroll
    splits = min(tiles.splits, triton.cdiv(blocks, step))
    out = torch.empty(tokens, places, dtype=dtype, device=x.device)
    row_tiles = triton.cdiv(places, tiles.rows)
    partial, counters = partial_sums(x.device, splits, (2 if gated else 1) * tokens * places, row_tiles)
    packed_kernel[(splits, row_tiles)](
        q.codes,
        q.scales,
        q.zeros,
        q.minima,
        x,
        bias,
        residual,
        out,
        partial,
        counters,
        tokens,
        places,
        x.shape[1],
        q.scales.stride(0),
        blocks,
        BITS=q.bits,
        GROUP=q.group // BLOCK,
        ZERO=q.zero,
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
    return out
