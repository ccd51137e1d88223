"""Weights as quantised checkpoints hold them: codes of 2, 3, 4 or 8 bits, and for each group of columns a scale and a level of 0.

A weight is scale * (code - zero), with one zero point for all or one for each group (GPTQ, AWQ, compressed-tensors, GGUF's Q4_0 and
Q8_0), or scale * code + minimum (Q4_1). A group is 32 columns, whole blocks of 64, or a whole row. Codes lie as `codes` packs them,
and nothing is rounded: scales and minima keep the number format that they are stored in.

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
from rowcast.kernels.codes import activated, by_torch, dequantised, finished, in_parts, on_gpu
from rowcast.kernels.codes import pack as pack_codes
from rowcast.kernels.lowbit import BLOCK, LowBit
from rowcast.kernels.packed_sizes import padded_columns


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight [rows, columns]. codes uint8 [rows, padded * bits / 8]; G = padded / group."""

    codes: Tensor
    scales: Tensor
    """[rows, G], any floating dtype."""
    zeros: Tensor | None
    """uint8 [rows, G]: of each group; None: `zero`."""
    minima: Tensor | None
    """[rows, G], dtype of the scales: what code 0 stands for, in place of zero points."""
    zero: int
    bits: int
    group: int
    columns: int

    @property
    def rows(self) -> int:
        return self.codes.shape[0]

    @property
    def padded(self) -> int:
        """Columns with the padding."""
        return self.scales.shape[1] * self.group

    @property
    def bytes(self) -> int:
        return sum(part.nbytes for part in self.tensors)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that it consists of."""
        return tuple(part for part in (self.codes, self.scales, self.zeros, self.minima) if part is not None)

    def with_tensors(self, tensors: Sequence[Tensor]) -> Packed:
        """The same weight from copies of `tensors`, in their order."""
        codes, scales, *others = tensors
        zeros = others.pop(0) if self.zeros is not None else None
        minima = others.pop(0) if self.minima is not None else None
        return Packed(codes, scales, zeros, minima, self.zero, self.bits, self.group, self.columns)

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
    return dequantised(q.codes, q.scales, q.bits, q.group, q.columns, q.zero if q.zeros is None else q.zeros, q.minima)
