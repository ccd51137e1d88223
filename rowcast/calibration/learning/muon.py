"""Muon: momentum, made orthogonal, for the matrices of hidden layers (kellerjordan.github.io/posts/muon; its scale: arXiv 2502.16982).

Momentum U S V^T moves weights by U V^T: in all its directions alike, those that few tokens ask for, too. torch.optim.Muon goes from
matrix to matrix, 4,830 operations a step for the 210 of SmolLM2; here those of one shape are one batch, some hundred operations in all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of x, x^3 and x^5 in an iteration, as in the post: singular values come near 1 fast, and no nearer."""
ITERATIONS = 5
SCALE = 0.2
"""Root mean square of a step, in learning rates, as AdamW's comes to."""
BATCH_ELEMENTS = 1 << 26
"""Of matrices that are made orthogonal at once, at most, where one has not more."""


def orthogonal(x: Tensor) -> Tensor:
    """About U V^T of matrices U S V^T, [n, A, B], by a Newton-Schulz iteration: singular values between .68 and 1.21, but for those
    that are below a 500th of the matrix's length. In the number format of `x`."""
    a, b, c = COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def hidden_matrices(module: nn.Module) -> list[Tensor]:
    """What Muon is for, of the parameters that want gradients: matrices that are neither embeddings nor the LM head."""
    head: Any = getattr(module, "get_output_embeddings", lambda: None)()
    outer = {id(inner.weight) for inner in module.modules() if isinstance(inner, nn.Embedding) or inner is head}
    return [value for value in module.parameters() if value.requires_grad and value.dim() == 2 and id(value) not in outer]


@dataclass(frozen=True, slots=True)
class _Alike:
    """Matrices of one shape that move together."""

    matrices: list[Tensor]
    momentum: Tensor
    """[n, A, B] float32."""


class Muon:
    """Moves matrices by their gradients, which all have to have."""

    def __init__(self, matrices: Sequence[Tensor], weight_decay: float) -> None:
        """float32 matrices on one device."""
        self._weight_decay = weight_decay
        self._groups: list[_Alike] = []
        shapes: dict[torch.Size, list[Tensor]] = {}
        for matrix in matrices:
            shapes.setdefault(matrix.shape, []).append(matrix)
        for shape, alike in shapes.items():
            most = max(1, BATCH_ELEMENTS // shape.numel())
            for start in range(0, len(alike), most):
                part = alike[start : start + most]
                self._groups.append(_Alike(part, torch.zeros(len(part), *shape, device=part[0].device)))
        self.momentum = {
            matrix: momentum for group in self._groups for matrix, momentum in zip(group.matrices, group.momentum, strict=True)
        }
        """By matrix, in place: all that is kept from step to step."""

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """A matrix [A, B] moves by `rate` * SCALE, root mean square over its entries, where its gradients reach all directions."""
        for group in self._groups:
            gradient = torch.stack([matrix.grad for matrix in group.matrices if matrix.grad is not None])
            group.momentum.lerp_(gradient, 1 - MOMENTUM)
            wanted = gradient.lerp_(group.momentum, MOMENTUM)
            if wanted.is_cuda:  # processors multiply 16 bits slowly, many of them
                wanted = wanted.bfloat16()
            steps = orthogonal(wanted).float().contiguous().unbind()  # foreach wants the weights' strides
            torch._foreach_mul_(group.matrices, 1 - rate * self._weight_decay)
            torch._foreach_add_(group.matrices, steps, alpha=-rate * SCALE * math.sqrt(max(group.momentum.shape[1:])))
