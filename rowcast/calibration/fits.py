"""Closed-form fits from moments: linear maps by ridge least squares, low-rank factors by the singular vectors of W C^(1/2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rowcast.calibration.moments import Moments

RIDGE = 1e-5
"""Added to the diagonal of a covariance, as a share of its mean variance."""


@dataclass(frozen=True, slots=True)
class Affine:
    """y ~ weight x + bias. float32."""

    weight: Tensor
    """[E, D]."""
    bias: Tensor
    """[E]."""

    def __call__(self, x: Tensor) -> Tensor:  # [T, D] -> [T, E]
        return torch.nn.functional.linear(x.float(), self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class Factors:
    """y ~ b (a x) + bias of rank r. float32."""

    a: Tensor
    """[r, D]: its products have unit variance and are uncorrelated on the text that it was fitted on."""
    b: Tensor
    """[E, r]."""
    bias: Tensor
    """[E]."""


def least_squares(moments: Moments) -> Affine:
    """The map from x to y, with intercept."""
    weight = torch.linalg.solve(_ridged(moments.x_covariance), moments.yx_covariance, left=False)
    return Affine(weight.float(), (moments.y_mean - weight @ moments.x_mean).float())


def linear_map(moments: Moments) -> Tensor:
    """The map from x to y through the origin, [E, D] float32: E[y x^T] E[x x^T]^-1."""
    second, cross = moments.xx / moments.count, moments.yx / moments.count
    found: Tensor = torch.linalg.solve(_ridged(second), cross, left=False).float()
    return found


def low_rank(weight: Tensor, bias: Tensor, covariance: Tensor, mean: Tensor, rank: int) -> Factors:
    """Factors of an affine map y = weight x + bias, [E, D] and [E], that lose least of y where x has these moments, [D, D] and [D].

    HiRE-LR fitted on activations (arXiv 2402.09360, section 3.1): with C = `covariance` and V the first right singular vectors of
    weight C^(1/2), b a = weight C^(1/2) V V^T C^(-1/2). What is lost of the mean stands in the bias.
    """
    weight, bias, mean = weight.double(), bias.double(), mean.double()
    variances, axes = torch.linalg.eigh(_ridged(covariance.double()))
    root = axes * variances.clamp_min(torch.finfo(torch.float64).tiny).sqrt() @ axes.T
    scaled = weight @ root
    main = torch.linalg.eigh(scaled.T @ scaled).eigenvectors.flip(1)[:, : min(rank, *weight.shape)]
    a = torch.linalg.solve(root, main).T
    b = scaled @ main
    return Factors(a.float(), b.float(), (bias + weight @ mean - b @ (a @ mean)).float())


def compose(outer: Tensor, outer_bias: Tensor, inner: Affine) -> tuple[Tensor, Tensor]:
    """The affine map that `outer` [E, D] with its bias [E] is of what `inner` gives: weight and bias."""
    weight = outer.double()
    return weight @ inner.weight.double(), weight @ inner.bias.double() + outer_bias.double()


def _ridged(covariance: Tensor) -> Tensor:
    small = RIDGE * covariance.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    return covariance + small * torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
