"""How often each neuron is needed, from a calibration. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence

from rowcast.placement.workload import Hotness, assumed_hotness
from rowcast.runtime.sparse.artefact import Calibration
from rowcast.runtime.spec import ModelSpec

LEAST = 1e-4
"""Probabilities are cut at this and at 1 less this: a calibration's text is not all text."""


def hotness(
    spec: ModelSpec, calibration: Calibration | None, density: float, groups: int, shares: Sequence[float] | None = None
) -> Hotness:
    """Of neurons in `groups` groups of equal size, most frequent first, where a token needs `density` of a layer's on average.

    A calibration counts how often a neuron is among a token's most contributing half (ReLU: active); for another density all
    frequencies are shifted by the same log-odds. `shares`: that density by layer; None: the same for all. Raises UserError for a
    calibration of another model's shape.
    """
    if calibration is None or density >= 1 or "layers.0.frequency" not in calibration:
        return assumed_hotness(spec, density, groups)
    by_layer = [density] * spec.num_layers if shares is None else shares
    layers = tuple(_layer(spec, calibration, i, share, groups) for i, share in enumerate(by_layer))
    return Hotness(layers, "measured", f"calibration {calibration.path}")


def _layer(spec: ModelSpec, calibration: Calibration, layer: int, density: float, groups: int) -> tuple[float, ...]:
    import numpy as np

    frequency = calibration.array(f"layers.{layer}.frequency", (spec.intermediate_size,)).astype(np.float64)
    ordered = np.clip(np.sort(frequency)[::-1], LEAST, 1 - LEAST)
    odds, low, high = np.log(ordered / (1 - ordered)), -40.0, 40.0
    for _ in range(60):
        middle = (low + high) / 2
        if np.clip(1 / (1 + np.exp(-(odds + middle))), LEAST, 1 - LEAST).mean() < density:
            low = middle
        else:
            high = middle
    shifted = np.clip(1 / (1 + np.exp(-(odds + high))), LEAST, 1 - LEAST)
    # Groups of equal size, also where they do not divide the neurons: a neuron at a border counts for both in part.
    borders = np.linspace(0, len(shifted), groups + 1)
    sums = np.interp(borders, np.arange(len(shifted) + 1), np.concatenate(([0.0], np.cumsum(shifted))))
    return tuple((np.diff(sums) * groups / len(shifted)).tolist())
