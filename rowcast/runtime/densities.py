"""What share of each layer the rungs used of late, for whoever watches an engine. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from rowcast.runtime.step import RungCounts, SeqResult

HALF_LIFE_TOKENS = 64
"""A token's use counts half as much once its rung has run so many more."""


@dataclass(slots=True)
class _Used:
    """Sums that fade."""

    by_layer: list[float]
    of_layer: float = 0.0
    """What a dense model's layer would have used."""

    def add(self, by_layer: list[int], of: int, fade: float) -> None:
        self.of_layer = self.of_layer * fade + of / len(self.by_layer)
        for layer in range(len(self.by_layer)):
            self.by_layer[layer] = self.by_layer[layer] * fade + (by_layer[layer] if layer < len(by_layer) else 0)

    @property
    def shares(self) -> list[float]:
        return [used / self.of_layer for used in self.by_layer]


@dataclass(slots=True)
class Densities:
    """Grows with every step. Of a gang, what rank 0 used of its share of the model."""

    layers: int
    """Of the model."""
    _neurons: dict[str, _Used] = field(default_factory=dict)
    _heads: dict[str, _Used] = field(default_factory=dict)

    @property
    def neurons(self) -> dict[str, list[float]]:
        """By rung that leaves neurons out, once it has run: for each layer, neurons that generated tokens used over all, 0 to 1."""
        return {rung: used.shares for rung, used in self._neurons.items()}

    @property
    def heads(self) -> dict[str, list[float]]:
        """Likewise, query heads."""
        return {rung: used.shares for rung, used in self._heads.items()}

    def step(self, results: Iterable[SeqResult]) -> None:
        """Note what the sequences of a step used."""
        by_rung: dict[str, RungCounts] = {}
        for result in results:
            for name, counts in result.rungs.items():
                if counts.neurons_by_layer or counts.heads_by_layer:
                    by_rung.setdefault(name, RungCounts()).add(counts)
        for name, counts in by_rung.items():
            fade = 0.5 ** (counts.tokens / HALF_LIFE_TOKENS)
            for kept, by_layer, of in (
                (self._neurons, counts.neurons_by_layer, counts.neurons_of),
                (self._heads, counts.heads_by_layer, counts.heads_of),
            ):
                if by_layer and of:
                    kept.setdefault(name, _Used([0.0] * self.layers)).add(by_layer, of, fade)
