"""Norms as the decoder applies them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from rowcast.kernels import gpu

if TYPE_CHECKING:
    from rowcast.kernels.gpu.late import Ring


@dataclass(slots=True)
class Norm:
    """An RMS or layer norm over the last dimension; weight and bias [D] or None."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    rms: bool
    keep: Ring | None = None
    """Where a GPU puts what comes of it, too: of up to 16 tokens of a single sequence."""

    def __call__(self, x: Tensor) -> Tensor:  # [..., D] -> [..., D]
        if gpu.takes(x):
            from rowcast.kernels.gpu import norms

            return norms.norm(x, self.weight, self.bias, self.eps, self.rms, self.keep)
        assert self.keep is None
        if self.rms:
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
