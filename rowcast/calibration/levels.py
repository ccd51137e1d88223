"""One score for all layers above which neurons are used, by mean density: a token's neurons go to the layers where they count."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rowcast.calibration.curves import thresholds
from rowcast.calibration.recording import OneLayerKV, window_steps
from rowcast.calibration.text import begun, spread
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
FOUND_AT = (0.02, 0.04, 0.08, 0.15, 0.3)
"""Densities that sparse passes run at."""
LEVEL_TOKENS = 1536
PIECE = 64
"""Tokens of a piece of text. Neighbours have alike many neurons above a level, so that short pieces of many places tell more of it."""
FEW = 4
"""Sparse passes run over one in so many windows: how much scores shift differs little."""
CONTEXT = 16
"""A window's first tokens, which only give context: they have fewer neurons above a level than all that follow."""
SAMPLE = 1 << 22
"""Scores that levels are found on, of all layers and tokens."""


@dataclass(frozen=True, slots=True)
class Levels:
    """By the grid's densities, G of them, of L layers."""

    scores: Tensor
    """[G] float32: the score that this mean density of all layers' neurons exceeds in passes that use these neurons alone."""
    shares: Tensor
    """[G, L] float32: each layer's part of them."""


def pieces(windows: Tensor, begins: Sequence[int] = ()) -> Tensor:
    """Of windows [W, n] that begin with `begins`, pieces that begin so, too, evenly spread over them, `LEVEL_TOKENS` in all."""
    body = windows[:, len(begins) :]
    size = min(PIECE, body.shape[1])
    found = body[:, : body.shape[1] // size * size].reshape(-1, size)
    return begun(spread(found, min(len(found), LEVEL_TOKENS // size)), begins)


@torch.inference_mode()
def find_levels(
    banks: BankWeights, calibration: Calibration, by: ScorerName, windows: Tensor, *, dtype: torch.dtype, device: torch.device
) -> Levels:
    """Over windows [W, n] of token ids, of which the first `LEVEL_TOKENS` count, each window's first token a prompt.

    Scores shift where all layers leave neurons out: at `FOUND_AT`, from the highest on, the level is that quantile of the scores of
    sparse passes, at the level that the dense pass's scores and the shift so far give. For other densities the ratio of densities
    above one level, dense over sparse, is found between them by logarithms of both, and each layer's share by the density. Dense
    passes run over all windows, sparse ones over one in `FEW`.
    """
    windows = windows[:, : max(2, LEVEL_TOKENS // len(windows))]
    some = torch.arange(len(windows)) % FEW == 0
    few, others = windows[some], windows[~some]
    passes = _Passes(banks, calibration, by, windows, dtype, device)
    whole = passes.scores(few, -math.inf)
    dense = torch.cat(whole)
    pooled = torch.cat([dense, *(passes.scores(others, -math.inf) if len(others) else [])])
    ratio, ratios, shares = 1.0, [1.0], [torch.ones(len(whole))]
    for density in reversed(FOUND_AT):
        found = passes.scores(few, float(thresholds(dense, [min(1.0, density * ratio)])))
        level = float(thresholds(torch.cat(found), [density]))
        ratio = max(1, int((dense > level).sum())) / len(dense) / density
        ratios.append(ratio)
        shares.append(torch.stack([(scores > level).float().mean() for scores in found]).cpu())
    grid, at = np.array(calibration.densities), np.array([*FOUND_AT, 1.0])
    above = grid * np.exp(np.interp(np.log(grid), np.log(at), np.log(ratios[::-1])))
    above = np.maximum.accumulate(above).clip(0, 1)  # should they cross
    known = torch.stack([torch.zeros(len(whole)), *reversed(shares)]).numpy()
    by_layer = [np.interp(grid, [0.0, *at], layer) for layer in known.T]
    return Levels(thresholds(pooled, above.tolist()).float().cpu(), torch.from_numpy(np.stack(by_layer, 1)).float().contiguous())


class _Passes:
    """Passes over windows whose scores are kept."""

    def __init__(
        self,
        banks: BankWeights,
        calibration: Calibration,
        by: ScorerName,
        windows: Tensor,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._banks, self._device = banks, device
        neurons, length = banks.spec.intermediate_size, windows.shape[1]
        step = max(1, windows.numel() * neurons * banks.spec.num_layers // SAMPLE)
        while math.gcd(step, neurons) > 1:  # so that all neurons are among them
            step += 1
        skipped = max(1, min(CONTEXT, length // 4))
        self._watched = [
            _Watched(scorer(by, bank, layer, calibration, neurons), skipped, step) for layer, bank in enumerate(banks.ffn)
        ]
        self._kv = OneLayerKV(banks.spec, 1, length, dtype=dtype, device=device)

    def scores(self, windows: Tensor, level: float) -> list[Tensor]:
        """Of a part of all tokens and neurons, by layer, in passes over these windows that use the neurons above `level`."""
        neurons = self._banks.spec.intermediate_size
        selectors = [Selector(watched, neurons, keep=neurons, threshold=level) for watched in self._watched]
        decoder = Decoder(SparseWeights(self._banks, selectors), SoloComm(), self._device)
        for window in windows:
            decoder.run(window_steps(window[None], prompt_length=1), self._kv)
            self._kv.free(0)
        return [watched.take() for watched in self._watched]


class _Watched:
    """A scorer whose scores are kept, of all tokens of a pass but its first ones."""

    def __init__(self, inner: Scorer, skipped: int, step: int) -> None:
        self._inner, self._skipped, self._step = inner, skipped, step
        self._kept: list[Tensor] = []

    @property
    def reads(self) -> Reads:
        return self._inner.reads

    @property
    def bytes(self) -> int:
        return self._inner.bytes

    def __call__(self, x: Tensor) -> Scored:
        scored = self._inner(x)
        self._kept.append(scored.values[self._skipped :].flatten()[:: self._step].clone())
        return scored

    def take(self) -> Tensor:
        kept, self._kept = torch.cat(self._kept), []
        return kept
