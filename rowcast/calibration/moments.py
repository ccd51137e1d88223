"""First and second moments of hidden states, summed over a stream in double precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class Moments:
    """Of pairs (x [D], y [E]). Sums, so that parts of a stream add up."""

    count: int
    x: Tensor
    """[D]: sum of x."""
    y: Tensor
    """[E]: sum of y."""
    xx: Tensor
    """[D, D]: sum of x x^T."""
    yx: Tensor
    """[E, D]: sum of y x^T."""
    yy: Tensor
    """[E, E]: sum of y y^T."""

    @classmethod
    def zero(cls, inputs: int, outputs: int, device: torch.device) -> Moments:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(0, zeros(inputs), zeros(outputs), zeros(inputs, inputs), zeros(outputs, inputs), zeros(outputs, outputs))

    def add(self, x: Tensor, y: Tensor) -> None:
        """x [T, D], y [T, E] of T more tokens; products of one call are in single precision."""
        x, y = x.float(), y.float()
        self.count += len(x)
        self.x += x.sum(0, dtype=torch.float64)
        self.y += y.sum(0, dtype=torch.float64)
        self.xx += x.T @ x
        self.yx += y.T @ x
        self.yy += y.T @ y

    @property
    def x_covariance(self) -> Tensor:
        """[D, D]."""
        return self.xx / self.count - torch.outer(self.x_mean, self.x_mean)

    @property
    def y_covariance(self) -> Tensor:
        """[E, E]."""
        return self.yy / self.count - torch.outer(self.y_mean, self.y_mean)

    @property
    def yx_covariance(self) -> Tensor:
        """[E, D]."""
        return self.yx / self.count - torch.outer(self.y_mean, self.x_mean)

    @property
    def x_mean(self) -> Tensor:
        """[D]."""
        return self.x / self.count

    @property
    def y_mean(self) -> Tensor:
        """[E]."""
        return self.y / self.count
