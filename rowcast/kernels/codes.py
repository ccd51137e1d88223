"""Weights as codes of 2, 3, 4, 5, 6 or 8 bits: how they lie in memory, and what products with those of `lowbit` and of `packed` share.

Packing, for each block of 64 columns: byte j of 2 bits holds columns j, j + 16, j + 32, j + 48 from its low bits up; of 4 bits
columns j and j + 32; of 8 bits column j. 3 bits are the 16 bytes of the low 2 bits, then 8 bytes with the high bits, column 8 i + k
in bit k of byte i.

5 and 6 bits are made for a GPU's lanes, of which the q-th of four multiplies columns 4 q to 4 q + 3 of 16. First the low 4 bits: byte
8 q + 4 w + i holds columns 32 w + 4 q + i and 16 more. Then the others: of 6 bits 16 bytes, as 2 bits are packed; of 5 bits 8 bytes,
column 16 c + 4 (2 m + s) + i in bit 4 s + c of byte 4 m + i.

On a GPU products go to kernels, some tokens at a time; with many tokens, and where there is neither a kernel nor the native part, a
block of rows at a time is dequantised for torch's product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from rowcast.kernels import gpu
from rowcast.kernels.lowbit_sizes import BLOCK, ELEMENTS_AT_ONCE
from rowcast.kernels.rows import ACTIVATIONS

_ROWS_AT_ONCE = 2048
"""In float32 at the same time, at most, beside the elements."""
_MOST_GPU_TOKENS = 256
"""With more, dequantising the weight once takes less time than reading its codes once for every `gpu.MOST_TOKENS` of them."""


def pack(codes: Tensor, bits: int) -> Tensor:  # uint8 [R, padded] -> uint8 [R, padded * bits / 8]
    """Precondition: whole blocks of columns, codes below 2^bits."""
    blocks = codes.view(codes.shape[0], -1, BLOCK)
    if bits == 3:
        high = (blocks >> 2).view(*blocks.shape[:2], 8, 8) << torch.arange(8, dtype=torch.uint8, device=codes.device)
        packed = torch.cat([_fold(blocks & 3, 2), high.sum(-1, dtype=torch.uint8)], dim=-1)
    elif bits in (5, 6):
        halves = (blocks & 15).contiguous().view(*blocks.shape[:2], 2, 2, 16)  # [w, half, 4 q + i]
        words = (halves[:, :, :, 0] | halves[:, :, :, 1] << 4).view(torch.int32)
        low = words.swapaxes(2, 3).contiguous().view(torch.uint8).flatten(2)
        packed = torch.cat([low, _fold(blocks >> 4, 2) if bits == 6 else _fold_fifth(blocks >> 4)], dim=-1)
    else:
        packed = _fold(blocks, bits)
    return packed.flatten(1)


def unpack(packed: Tensor, bits: int) -> Tensor:  # uint8 [R, padded * bits / 8] -> uint8 [R, padded]
    """The codes that `pack` was given."""
    blocks = packed.view(packed.shape[0], -1, BLOCK * bits // 8)
    if bits == 3:
        high = (blocks[..., 16:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
        return (_unfold(blocks[..., :16], 2) | (high.flatten(2) << 2)).flatten(1)
    if bits in (5, 6):
        lanes = blocks[..., :32].view(*blocks.shape[:2], 4, 2, 4)
        low = torch.stack([lanes & 15, lanes >> 4], dim=-1).permute(0, 1, 3, 5, 2, 4).flatten(2)
        high = _unfold(blocks[..., 32:], 2) if bits == 6 else _unfold_fifth(blocks[..., 32:])
        return (low | high << 4).flatten(1)
    return _unfold(blocks, bits).flatten(1)


def row_blocks(rows: int, columns: int, elements: int = ELEMENTS_AT_ONCE) -> Iterator[slice]:
    """All rows of a weight, so many at a time that their float32 copy has at most `elements`, though no fewer than one."""
    piece = max(1, min(_ROWS_AT_ONCE, elements // max(1, columns)))
    for start in range(0, rows, piece):
        yield slice(start, min(start + piece, rows))


def dequantised(
    packed: Tensor, scales: Tensor, bits: int, group: int, columns: int, zero: float | Tensor, minima: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows as float32 [rows, columns], so that no second weight is ever whole in memory.

    scale * (code - zero), or scale * code + minimum: packed uint8 [R, padded * bits / 8]; scales, minima and zeros, where these are not
    the same for all, [R, padded / group].
    """
    for rows in row_blocks(packed.shape[0], scales.shape[1] * group):
        levels = unpack(packed[rows], bits).float().view(rows.stop - rows.start, -1, group)
        if minima is None:
            levels.sub_(zero[rows, :, None] if isinstance(zero, Tensor) else zero)
        levels.mul_(scales[rows, :, None])
        if minima is not None:
            levels.add_(minima[rows, :, None])
        yield rows, levels.flatten(1)[:, :columns]


def on_gpu(x: Tensor) -> bool:
    """Whether products with x [T, K] are for a GPU's kernels, by `in_parts`."""
    return x.shape[0] <= _MOST_GPU_TOKENS and gpu.takes(x[: gpu.MOST_TOKENS])


def in_parts(product: Callable[[Tensor, Tensor | None], Tensor], x: Tensor, residual: Tensor | None = None) -> Tensor:
    """A kernel's product for x [T, K] and a residual [T, R], of which it takes `gpu.MOST_TOKENS` tokens at a time: [T, R]."""
    xs = torch.split(x, gpu.MOST_TOKENS)
    residuals = [None] * len(xs) if residual is None else torch.split(residual, gpu.MOST_TOKENS)
    parts = [product(each, added) for each, added in zip(xs, residuals, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def by_torch(weight: Iterable[tuple[slice, Tensor]], rows: int, x: Tensor, dtype: torch.dtype) -> Tensor:
    """x W^T for a weight [R, K] by blocks of its R `rows`: [T, K] -> [T, R], in float32, or in the dtype of x where `dtype` is that."""
    x = x.to(dtype if dtype == x.dtype else torch.float32)
    out = torch.empty(x.shape[0], rows, dtype=x.dtype, device=x.device)
    for block, part in weight:
        out[:, block] = F.linear(x, part.to(x.dtype))
    return out


def finished(out: Tensor, bias: Tensor | None, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A product [T, R], which is modified, plus a bias [R] and a residual [T, R], in `dtype`."""
    for term in (bias, residual):
        if term is not None:
            out.add_(term)
    return out.to(dtype)


def activated(pre: Tensor, activation: str, gated: bool) -> Tensor:
    """act(g) * u of a product [T, 2 N] whose first half is g, or else act of it: [T, N]."""
    act = ACTIVATIONS[activation]
    if not gated:
        return act(pre)
    gate, up = pre.chunk(2, dim=1)
    return act(gate).mul_(up)


def _fold(blocks: Tensor, bits: int) -> Tensor:  # uint8 [R, B, 64] -> uint8 [R, B, 8 * bits]
    first, *others = blocks.view(*blocks.shape[:2], 8 // bits, -1).unbind(2)
    folded = first.clone(memory_format=torch.contiguous_format)
    for place, part in enumerate(others, 1):
        folded |= part << bits * place
    return folded


def _unfold(packed: Tensor, bits: int) -> Tensor:  # uint8 [R, B, 8 * bits] -> uint8 [R, B, 64]
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed[:, :, None] >> shifts[:, None]) & ((1 << bits) - 1)).flatten(2)


def _fold_fifth(blocks: Tensor) -> Tensor:  # uint8 [R, B, 64], 0 or 1 -> uint8 [R, B, 8]
    parts = blocks.view(*blocks.shape[:2], 4, 2, 2, 4)  # [c, m, s, i]
    folded = torch.zeros_like(parts[:, :, 0, :, 0])
    for s in range(2):
        for c in range(4):
            folded |= parts[:, :, c, :, s] << 4 * s + c
    return folded.flatten(2)


def _unfold_fifth(packed: Tensor) -> Tensor:  # uint8 [R, B, 8] -> uint8 [R, B, 64]
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    parts = (packed[..., None] >> shifts & 1).view(*packed.shape[:2], 2, 4, 2, 4)  # [m, i, s, c]
    return parts.permute(0, 1, 5, 2, 4, 3).flatten(2)
