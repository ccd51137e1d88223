"""One score for all layers above which neurons are used, by mean density: a token's neurons go to the layers where they count."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rowcast.calibration.curves import thresholds
from rowcast.calibration.recording import OneLayerKV, window_steps
from rowcast.runtime.banks import BankWeights
from rowcast.runtime.comm import SoloComm
from rowcast.runtime.decoder import Decoder
from rowcast.runtime.ladder.spec import ScorerName
from rowcast.runtime.sparse.artefact import Calibration
from rowcast.runtime.sparse.build import scorer
from rowcast.runtime.sparse.scorers import Reads, Scored, Scorer
from rowcast.runtime.sparse.selection import Selector
from rowcast.runtime.sparse.weights import SparseWeights

LEVELLED: tuple[ScorerName, ...] = ("oracle", "q4")
"""Scorers that levels are found of."""
FOUND_AT = (0.05, 0.15, 0.3, 0.6)
"""Densities that sparse passes run at."""
LEVEL_TOKENS = 512
SAMPLE = 1 << 21
"""Scores that levels are found on, of all layers and tokens."""


@dataclass(frozen=True, slots=True)
class Levels:
    """By the grid's densities, G of them, of L layers."""

    scores: Tensor
    """[G] float32: the score that this mean density of all layers' neurons exceeds in passes that use these neurons alone."""
    shares: Tensor
    """[G, L] float32: each layer's part of them."""


@torch.inference_mode()
def find_levels(
    banks: BankWeights, calibration: Calibration, by: ScorerName, windows: Tensor, *, dtype: torch.dtype, device: torch.device
) -> Levels:
    """Over windows [W, n] of token ids, of which the first `LEVEL_TOKENS` count, each window's first token a prompt.

    Scores shift where all layers leave neurons out: at `FOUND_AT`, from the highest on, the level is that quantile of the scores of
    sparse passes, at the level that the dense pass's scores and the shift so far give. For other densities the ratio of densities
    above one level, dense over sparse, is found between them by logarithms of both, and each layer's share by the density.
    """
    windows = windows[:, : max(2, LEVEL_TOKENS // len(windows))]
    passes = _Passes(banks, calibration, by, windows, dtype, device)
    dense = passes.scores(-math.inf)
    pooled = torch.cat(dense)
    ratio, ratios, shares = 1.0, [1.0], [torch.ones(len(dense))]
    for density in reversed(FOUND_AT):
        found = passes.scores(float(thresholds(pooled, [min(1.0, density * ratio)])))
        level = float(thresholds(torch.cat(found), [density]))
        ratio = max(1, int((pooled > level).sum())) / len(pooled) / density
        ratios.append(ratio)
        shares.append(torch.stack([(scores > level).float().mean() for scores in found]).cpu())
    grid, at = np.array(calibration.densities), np.array([*FOUND_AT, 1.0])
    above = grid * np.exp(np.interp(np.log(grid), np.log(at), np.log(ratios[::-1])))
    above = np.maximum.accumulate(above).clip(0, 1)  # should they cross
    known = torch.stack([torch.zeros(len(dense)), *reversed(shares)]).numpy()
    by_layer = [np.interp(grid, [0.0, *at], layer) for layer in known.T]
    return Levels(thresholds(pooled, above.tolist()).float().cpu(), torch.from_numpy(np.stack(by_layer, 1)).float().contiguous())


class _Passes:
    """Sparse passes over windows whose scores are kept."""

    def __init__(
        self,
        banks: BankWeights,
        calibration: Calibration,
        by: ScorerName,
        windows: Tensor,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._banks, self._windows, self._device = banks, windows, device
        neurons = banks.spec.intermediate_size
        step = max(1, windows.numel() * neurons * banks.spec.num_layers // SAMPLE)
        while math.gcd(step, neurons) > 1:  # so that all neurons are among them
            step += 1
        self._watched = [_Watched(scorer(by, bank, layer, calibration, neurons), step) for layer, bank in enumerate(banks.ffn)]
        self._kv = OneLayerKV(banks.spec, 1, windows.shape[1], dtype=dtype, device=device)

    def scores(self, level: float) -> list[Tensor]:
        """Of a part of all tokens and neurons, by layer, in passes that use the neurons above `level`."""
        neurons = self._banks.spec.intermediate_size
        selectors = [Selector(watched, neurons, keep=neurons, threshold=level) for watched in self._watched]
        decoder = Decoder(SparseWeights(self._banks, selectors), SoloComm(), self._device)
        for window in self._windows:
            decoder.run(window_steps(window[None], prompt_length=1), self._kv)
            self._kv.free(0)
        return [watched.take() for watched in self._watched]


class _Watched:
    """A scorer whose scores are kept, of all tokens of a pass but its first."""

    def __init__(self, inner: Scorer, step: int) -> None:
        self._inner, self._step = inner, step
        self._kept: list[Tensor] = []

    @property
    def reads(self) -> Reads:
        return self._inner.reads

    @property
    def bytes(self) -> int:
        return self._inner.bytes

    def __call__(self, x: Tensor) -> Scored:
        scored = self._inner(x)
        self._kept.append(scored.values[1:].flatten()[:: self._step].clone())
        return scored

    def take(self) -> Tensor:
        kept, self._kept = torch.cat(self._kept), []
        return kept
