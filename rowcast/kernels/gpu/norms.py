"""RMS and layer norms over the last dimension, alone or behind the addition that precedes them. One launch, one program a row.

The reference is torch's `F.rms_norm` and `F.layer_norm`: mean and variance in float32, of the sum as it is rounded; one rounding at the
end. A row's bits do not depend on the other rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rowcast.kernels.gpu.late import RING, Ring
from rowcast.kernels.gpu.overlap import overlap


@triton.jit
def _norm_kernel(
    x_ptr,  # [T, heads, size] at strides x_token, x_head
    delta_ptr,  # the same at its own strides, or None
    weight_ptr,  # [size] or None
    bias_ptr,  # [size] or None
    sum_ptr,  # [T, heads, size]; None without delta
    out_ptr,  # [T, heads, size]
    ring_ptr,  # [16, size] or None
    ring_starts_ptr,  # int32 [1]
    ring_counts_ptr,  # int32 [1]
    heads,
    x_token,
    x_head,
    delta_token,
    delta_head,
    size,
    eps,
    RMS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,  # see overlap.py
):
    row = tl.program_id(0)
    token = (row // heads).to(tl.int64)
    head = (row % heads).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    weight = column
    bias = column
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, mask=inside, other=0.0)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(x_ptr + token * x_token + head * x_head + column, mask=inside, other=0.0).to(tl.float32)
    at = row.to(tl.int64) * size + column
    if delta_ptr is not None:
        x += tl.load(delta_ptr + token * delta_token + head * delta_head + column, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, rounded, mask=inside)
        x = rounded.to(tl.float32)
    if not RMS:
        x = tl.where(inside, x - tl.sum(x, 0) / size, 0.0)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / size + eps)
    if weight_ptr is not None:
        y *= weight.to(tl.float32)
    if bias_ptr is not None:
        y += bias.to(tl.float32)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)
    if ring_ptr is not None:
        place = (tl.load(ring_starts_ptr) + row) % 16
        kept = inside & (row < tl.load(ring_counts_ptr))
        tl.store(ring_ptr + place * size + column, y.to(out_ptr.dtype.element_ty), mask=kept)


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool, keep: Ring | None = None) -> Tensor:
    """x [T, D] or [T, H, d], rows contiguous at any stride; weight, bias [D] or [d] -> the same shape.

    `keep`: where what comes of a single sequence's tokens is kept, too; x [T, D], T <= 16.
    """
    return _run(x, None, weight, bias, eps, rms, keep)[1]


def add_norm(
    x: Tensor, delta: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, Tensor]:
    """(x + delta, its norm): the sum is rounded to x's dtype before it is normed. Shapes as in `norm`."""
    total, normed = _run(x, delta, weight, bias, eps, rms)
    assert total is not None
    return total, normed


def _run(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    keep: Ring | None = None,
) -> tuple[Tensor | None, Tensor]:
    assert x.dim() in (2, 3) and (delta is None or delta.shape == x.shape)
    size = x.shape[-1]
    assert keep is None or (x.dim() == 2 and len(x) <= RING and keep.rows.shape == (RING, size) and keep.rows.is_contiguous())
    assert all(each is None or each.shape == (size,) for each in (weight, bias))
    x = _with_contiguous_rows(x)
    delta = None if delta is None else _with_contiguous_rows(delta)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if delta is None else torch.empty_like(out)
    heads = x.shape[1] if x.dim() == 3 else 1
    block = triton.next_power_of_2(size)
    _norm_kernel[(x.shape[0] * heads,)](
        x,
        delta,
        weight,
        bias,
        total,
        out,
        None if keep is None else keep.rows,
        None if keep is None else keep.starts,
        None if keep is None else keep.counts,
        heads,
        *_strides(x),
        *(_strides(x) if delta is None else _strides(delta)),
        size,
        eps,
        RMS=rms,
        BLOCK=block,
        num_warps=max(1, min(16, block // 256)),
        **overlap(x),
    )
    return total, out


def _with_contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int]:
    """Of tokens and of heads. A single token's is set, since torch leaves it open and kernels are compiled by its divisors."""
    return x.stride(0) if x.shape[0] > 1 else x.shape[1:].numel(), x.stride(1) if x.dim() == 3 else 0
