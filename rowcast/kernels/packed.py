"""Weights as quantised checkpoints hold them: codes of 2 to 8 bits, and for each group of columns a scale and a level of 0.

A weight is scale * (code - zero), with one zero point for all or one for each group (GPTQ, AWQ, compressed-tensors, GGUF's Q4_0, Q5_0
and Q8_0), or scale * code + minimum (Q4_1, Q5_1). A group is 32 columns, whole blocks of 64, or a whole row. Codes lie as `codes` packs
them, and nothing is rounded: scales and minima keep the number format that they are stored in.

GGUF's K-quants have super-blocks of 256 columns: a group's scale is a byte times the super-block's float16 number, and so is what is
taken off, where they have minima. Q4_K and Q5_K, in groups of 32, are d s code - e m, Q6_K, in groups of 16, is d s (code - 32). The
products d s and e m have at most 18 bits: float16 would round them, float32 holds them and takes 2 bits a weight for groups of 32. So
the bytes stay bytes, the two scales and minima of 6 bits that a block of 64 has in one word, as are Q6_K's four scales: 4.625, 5.625
and 6.5625 bits a weight, of which the file has 4.5, 5.5 and 6.5625.

On a GPU products go to `kernels/gpu/packed.py`, some tokens at a time; on a CPU to `lowbit`'s, whose levels are symmetric, with what
the other level of 0 adds: for each group a number times the sum of its inputs. With groups of 32, with scales that are not float16, and
with many tokens on a GPU, a block of rows at a time is unpacked for torch's product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rowcast.kernels import lowbit
from rowcast.kernels.codes import activated, by_torch, dequantised, finished, in_parts, on_gpu, row_blocks
from rowcast.kernels.codes import pack as pack_codes
from rowcast.kernels.lowbit import BLOCK, LowBit
from rowcast.kernels.packed_sizes import SUPER_BLOCK, padded_columns


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight [rows, columns]. codes uint8 [rows, padded * bits / 8]; G = padded / group."""

    codes: Tensor
    scales: Tensor
    """[rows, G], any floating dtype. With super-blocks [rows, padded / 64, 4], for each block: int8, scales of its groups of 16; or
    uint8, two scales and then two minima of its groups of 32."""
    zeros: Tensor | None
    """uint8 [rows, G]: of each group; None: `zero`."""
    minima: Tensor | None
    """[rows, G], dtype of the scales: what code 0 stands for, in place of zero points."""
    zero: int
    bits: int
    group: int
    columns: int
    over: Tensor | None = None
    """float16 [rows, padded / 256, 1 or 2]: what a super-block's scales are times, and what its minima, which are taken off, are."""

    @property
    def rows(self) -> int:
        return self.codes.shape[0]

    @property
    def padded(self) -> int:
        """Columns with the padding."""
        return self.codes.shape[1] * 8 // self.bits

    @property
    def bytes(self) -> int:
        return sum(part.nbytes for part in self.tensors)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that it consists of."""
        return tuple(part for part in (self.codes, self.scales, self.zeros, self.minima, self.over) if part is not None)

    def with_tensors(self, tensors: Sequence[Tensor]) -> Packed:
        """The same weight from copies of `tensors`, in their order."""
        codes, scales, *others = tensors
        zeros = others.pop(0) if self.zeros is not None else None
        minima = others.pop(0) if self.minima is not None else None
        over = others.pop(0) if self.over is not None else None
        return Packed(codes, scales, zeros, minima, self.zero, self.bits, self.group, self.columns, over)

    def to(self, device: torch.device) -> Packed:
        return self.with_tensors([part.to(device) for part in self.tensors])


def pack(
    codes: Tensor,
    scales: Tensor,
    bits: int,
    group: int,
    *,
    zeros: Tensor | None = None,
    minima: Tensor | None = None,
    zero: int = 0,
) -> Packed:
    """Of codes uint8 [R, K], and scales, zero points or minima [R, ceil(K / group)]; group -1: the whole row.

    Precondition: a group that `packed_sizes.fits`.
    """
    columns = codes.shape[1]
    padded, group = padded_columns(columns, group)
    missing = padded // group - scales.shape[1]

    def whole(part: Tensor | None) -> Tensor | None:
        return None if part is None else F.pad(part, (0, missing)).contiguous()

    found = whole(scales)
    assert found is not None
    packed = pack_codes(F.pad(codes, (0, padded - columns)), bits)
    return Packed(packed, found, whole(zeros), whole(minima), zero, bits, group, columns)


def pack_super(codes: Tensor, scales: Tensor, minima: Tensor | None, over: Tensor, bits: int, zero: int = 0) -> Packed:
    """With super-blocks, of K columns, a multiple of 256: codes as `codes.pack` packs them, over float16 [R, K / 256, 1 or 2]; either
    int8 scales [R, K / 16], or uint8 scales and minima [R, K / 32]."""
    rows, columns = codes.shape[0], codes.shape[1] * 8 // bits
    assert columns % SUPER_BLOCK == 0 and scales.dtype == (torch.int8 if minima is None else torch.uint8)
    parts = [each.reshape(rows, columns // BLOCK, -1) for each in (scales, minima) if each is not None]
    group = columns // scales[0].numel()
    return Packed(codes.contiguous(), torch.cat(parts, -1), None, None, zero, bits, group, columns, over.contiguous())


def stacked(parts: Sequence[Packed]) -> Packed:
    """Their rows, one below the other; all but the tensors is the same."""
    if len(parts) == 1:
        return parts[0]
    return parts[0].with_tensors([torch.cat(each) for each in zip(*(part.tensors for part in parts), strict=True)])


def dequantise(q: Packed) -> Tensor:
    """The weight that the codes stand for: float32 [R, K]."""
    return torch.cat([part for _, part in _dequantised(q)])


def product(
    q: Packed, x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """x W^T, plus a bias [R] and a residual [T, R], which is not modified: [T, K] -> [T, R] in `dtype`; as exact as `lowbit`."""
    if on_gpu(x):
        from rowcast.kernels.gpu import packed

        return in_parts(lambda part, added: packed.product(q, part, bias, residual=added, dtype=dtype), x, residual)
    near = _symmetric(q)
    if near is not None and lowbit.library_for(near, x) is not None:
        out = lowbit.product(near, x).addmm_(_group_sums(q, x), _shifts(q).T)
    else:
        out = by_torch(_dequantised(q), q.rows, x, dtype)
    return finished(out, bias, residual, dtype)


def ffn_hidden(q: Packed, bias: Tensor | None, x: Tensor, activation: str, gated: bool) -> Tensor:
    """As `lowbit.ffn_hidden`: act(g) * u with the N rows of g and then the N of u in `q` where it is gated, else act(q x)."""
    if on_gpu(x):
        from rowcast.kernels.gpu import packed

        return in_parts(lambda part, _: packed.ffn_hidden(q, part, activation, bias, gated), x)
    return activated(product(q, x, bias, dtype=x.dtype), activation, gated)


def _symmetric(q: Packed) -> LowBit | None:
    """The weight with 0 in the middle of its levels; None where `lowbit` has no such."""
    if q.group % BLOCK or q.scales.dtype != torch.float16:
        return None
    return LowBit(q.codes, q.scales, q.bits, q.group, q.columns)


def _shifts(q: Packed) -> Tensor:
    """What is added to each weight of a group in `_symmetric`: float32 [R, G]."""
    middle, scales = ((1 << q.bits) - 1) / 2, q.scales.float()
    if q.minima is not None:
        return scales.mul_(middle).add_(q.minima)
    return scales.mul_(middle - (q.zero if q.zeros is None else q.zeros.float()))


def _group_sums(q: Packed, x: Tensor) -> Tensor:  # [T, K] -> float32 [T, G]
    return F.pad(x.float(), (0, q.padded - q.columns)).view(x.shape[0], -1, q.group).sum(-1)


def _dequantised(q: Packed) -> Iterator[tuple[slice, Tensor]]:
    if q.over is not None:
        return _of_super_blocks(q, q.over)
    return dequantised(q.codes, q.scales, q.bits, q.group, q.columns, q.zero if q.zeros is None else q.zeros, q.minima)


def _of_super_blocks(q: Packed, over: Tensor) -> Iterator[tuple[slice, Tensor]]:
    for rows in row_blocks(q.rows, q.padded):
        counts, numbers = q.scales[rows].view(rows.stop - rows.start, -1, SUPER_BLOCK // BLOCK, 4).float(), over[rows].float()
        counts.mul_(numbers.repeat_interleave(4 // numbers.shape[-1], -1)[:, :, None])
        minima = None if numbers.shape[-1] == 1 else counts[..., 2:].flatten(1).neg_()
        scales = (counts if minima is None else counts[..., :2]).flatten(1)
        for _, part in dequantised(q.codes[rows], scales, q.bits, q.group, q.columns, q.zero, minima):
            yield rows, part
