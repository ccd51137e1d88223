"""Models that exist as a shape only: a config, random weights, no tokenizer, and acceptance at given rates."""

from __future__ import annotations

from typing import Any

import torch

from rowcast import LLM
from rowcast.runtime.checkpoint import Checkpoint
from rowcast.runtime.checkpoint.opening import open_random
from rowcast.runtime.ladder.rule import Rule
from rowcast.runtime.ladder.simulated import Simulated
from rowcast.runtime.sampler import Sampler


class ShapeLLM(LLM):
    """A model of random weights whose proposals stand at given rates, all verification done. For timing only."""

    def __init__(self, shape: str, *, draft: str | None, rates: tuple[float, float], **options: Any) -> None:
        """`rates`: acceptance by the last rung, and by each rung below it. `draft`: a shape, too."""
        self._rates = rates
        super().__init__(open_shape(shape), draft=draft if draft in (None, "ngram") else open_shape(draft), **options)

    def _rule(self, sampler: Sampler) -> Rule:
        (outer, inner), last = self._rates, len(self.plan.ladder) - 1
        return Simulated(super()._rule(sampler), {**dict.fromkeys(range(last), inner), last: outer})


def open_shape(shape: str, seed: int = 0, device: torch.device | None = None) -> Checkpoint:
    """The checkpoint of random weights for a well-known model's hub id or short name or the path of a config.json: `open_random`."""
    return open_random(shape, seed, device)
