"""GPTQ (arXiv 2210.17323, algorithm 1): a matrix to few bits, so that its products with what a text brings change least.

Columns are rounded one after another, the one that inputs weigh most first, and what each is off by is taken from those behind it.
Scales and zero points are chosen beforehand, group by group in the columns' own order ("static groups"), so that groups stay neighbours
and no order needs to be stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128
"""Columns whose errors reach the columns behind them in one product."""
DAMP = 0.01
"""Of the mean of the Hessian's diagonal, added to it (the paper's)."""
_SHRINK = torch.linspace(0.6, 1.0, 21).tolist()
"""Shares of a group's range that are tried as its range."""


@dataclass(frozen=True, slots=True)
class Rounded:
    """A weight [N, K]: scale * (code - zero)."""

    codes: Tensor
    """uint8 [N, K]."""
    scales: Tensor
    """[N, K / group], in the dtype that they are stored in."""
    zeros: Tensor
    """uint8 [N, K / group]."""
    bits: int
    group: int

    def weight(self) -> Tensor:
        """float32 [N, K]."""
        return _at(self.codes.float(), self.scales.float(), self.zeros.float())


def gptq(weight: Tensor, hessian: Tensor, bits: int, group: int, scale_dtype: torch.dtype) -> Rounded:
    """Round a weight [N, K] for inputs of which `hessian` [K, K] is the sum of x x^T. Precondition: `group` divides K."""
    weight, columns = weight.float(), weight.shape[1]
    hessian = hessian.double().clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = DAMP * diagonal.mean() + 1e-30  # an input that was always 0: its column is rounded alone
    importance = diagonal.float()
    scales, zeros = _ranges(weight, importance, bits, group, scale_dtype)
    order = importance.argsort(descending=True, stable=True)
    diagonal += DAMP * diagonal.mean()
    upper = _inverse_factor(hessian[order][:, order]).float()
    rest, most = weight.T[order].contiguous(), float((1 << bits) - 1)  # [K, N]: a column is a row of memory
    codes = torch.empty_like(rest)
    wide_scales, wide_zeros = scales.float().T.contiguous(), zeros.float().T.contiguous()
    of = (order // group).tolist()
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        part, errors = rest[start:stop], torch.empty_like(rest[start:stop])
        factor = upper[start:stop, start:stop]
        with _alone(weight):
            for i, divisor in enumerate(factor.diagonal().tolist()):
                scale, zero, column = wide_scales[of[start + i]], wide_zeros[of[start + i]], part[i]
                code = torch.div(column, scale, out=codes[start + i]).add_(zero).round_().clamp_(0, most)
                error = torch.addcmul(column, scale, code - zero, value=-1, out=errors[i]).div_(divisor)
                part[i + 1 :].addr_(factor[i, i + 1 :], error, alpha=-1)
        rest[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    places = torch.empty_like(order)
    places[order] = torch.arange(columns, device=order.device)
    codes = codes[places].T.to(torch.uint8).contiguous()
    return Rounded(codes, scales, zeros, bits, group)


@contextmanager
def _alone(weight: Tensor) -> Iterator[None]:
    """On a CPU one thread: for a column's few numbers, waiting for a second one takes longer than its work, and where another process
    wants the core, 60 times as long."""
    threads = torch.get_num_threads()
    if weight.device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def nearest(weight: Tensor, bits: int, group: int, scale_dtype: torch.dtype, importance: Tensor | None = None) -> Rounded:
    """Each weight [N, K] to its nearest level, in the groups and with the search for ranges of `gptq`. `importance` [K]: how much each
    input weighs; None: all the same."""
    weight = weight.float()
    weigh = torch.ones(weight.shape[1], device=weight.device) if importance is None else importance
    scales, zeros = _ranges(weight, weigh, bits, group, scale_dtype)
    grouped = weight.view(len(weight), -1, group) / scales.float()[..., None] + zeros.float()[..., None]
    codes = grouped.round_().clamp_(0, (1 << bits) - 1).to(torch.uint8).view(weight.shape)
    return Rounded(codes, scales, zeros, bits, group)


def _ranges(weight: Tensor, importance: Tensor, bits: int, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales and zero points [N, G] of least weighted squared error, among a group's range with 0 in it and some shares of that."""
    most = (1 << bits) - 1
    grouped, weigh = weight.view(len(weight), -1, group), importance.view(-1, group)
    low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
    least = torch.full_like(low, torch.inf)
    scales, zeros = torch.ones_like(low).to(dtype), torch.zeros_like(low).to(torch.uint8)
    for share in _SHRINK:
        scale = ((high - low) * (share / most)).to(dtype)
        wide = scale.float()
        scale = torch.where(wide == 0, torch.ones_like(scale), scale)
        wide = scale.float()
        zero = (-low * share / wide).round_().clamp_(0, most)
        codes = (grouped / wide[..., None]).add_(zero[..., None]).round_().clamp_(0, most)
        off = codes.sub_(zero[..., None]).mul_(wide[..., None]).sub_(grouped)
        error = (off.square_() * weigh).sum(-1)
        better = error < least
        scales, zeros = torch.where(better, scale, scales), torch.where(better, zero.to(torch.uint8), zeros)
        least = torch.minimum(error, least)
    return scales, zeros


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper U with U^T U = H^-1, float64; H is damped more where it is not positive definite."""
    extra = float(hessian.diagonal().mean())
    for times in range(8):
        damped = hessian if not times else hessian + extra * 10.0 ** (times - 6) * torch.eye(len(hessian)).to(hessian)
        factor, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            inverse = torch.cholesky_inverse(factor)
            upper, info = torch.linalg.cholesky_ex(inverse, upper=True)
            if int(info) == 0:
                found: Tensor = upper
                return found
    raise ArithmeticError("the inputs' second moments are not finite")


def _at(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    grouped = codes.view(*scales.shape, -1)
    return ((grouped - zeros[..., None]) * scales[..., None]).view(codes.shape)
