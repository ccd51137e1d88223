"""Communication of a single rank with itself."""

from __future__ import annotations

from torch import Tensor

from rowcast.runtime.norm import Norm


class SoloComm:
    """The `Comm` of world size 1: sums of one part, gatherings of one."""

    rank = 0
    world = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_reduce_norm(self, x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        return x, norm(x)

    def exchange(self, x: Tensor) -> Tensor:  # [...] -> [1, ...]
        return x[None]
