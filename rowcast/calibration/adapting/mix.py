"""Which share of its neurons each sequence of a step uses: low ones, the dense end and what lies between, in every batch.

As the sandwich rule of slimmable networks (arXiv 1903.05134) has it, both ends are always among them: training at one density alone
costs the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

DENSE = 1.0
_HALF = 0.5
_CYCLE = (0, 3, 2, 0, 4, 3, 1, 2, 0, 3, 5, 2, 0, 3, 4, 2)
"""Places of `Mix.densities`: of 16 sequences that follow each other so many use each, the ends early."""


@dataclass(frozen=True, slots=True)
class Mix:
    """Densities around the one that the model is adapted to, the densest first."""

    densities: tuple[float, ...]
    """All; half, or one and a half times the next; 4/3 and 1 times the target; 5/3 and 2/3 of it."""

    @classmethod
    def around(cls, target: float) -> Mix:
        """`target`: 0 < target < 1."""
        wide = min((1 + target) / 2, max(_HALF, 2 * target))
        steps = (4 / 3, 1.0, 5 / 3, 2 / 3)
        return cls((DENSE, wide, *(round(min(wide, target * step), 4) for step in steps)))

    def of(self, first: int, count: int) -> list[float]:
        """Of `count` sequences from the `first` one ever trained on, the densest first."""
        return sorted((self.densities[_CYCLE[(first + i) % len(_CYCLE)]] for i in range(count)), reverse=True)

    def shown(self, target: float) -> Sequence[float]:
        """What is measured on the way: all neurons, the target, and the least."""
        return DENSE, target, min(self.densities)
