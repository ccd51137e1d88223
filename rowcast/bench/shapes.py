"""Models that exist as a shape only: a config, random weights, no tokenizer, and acceptance at given rates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from rowcast import LLM
from rowcast.bench.random_source import CPU, RandomSource
from rowcast.errors import UserError
from rowcast.placement.models import known_config
from rowcast.runtime.checkpoint import Checkpoint
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.ladder.rule import Rule
from rowcast.runtime.ladder.simulated import Simulated
from rowcast.runtime.sampler import Sampler

_EXAMPLES = ("llama-2-7b", "yarn-llama-2-7b-128k", "llama-3.1-8b", "llama-68m", "opt-66b")
"""Of shapes. yarn-llama-2-7b-128k and llama-68m are the pair that TriForce is measured with (arXiv 2404.11912, section 5)."""


class ShapeLLM(LLM):
    """A model of random weights whose proposals stand at given rates, all verification done. For timing only."""

    def __init__(self, shape: str, *, draft: str | None, rates: tuple[float, float], **options: Any) -> None:
        """`rates`: acceptance by the last rung, and by each rung below it. `draft`: a shape, too."""
        self._rates = rates
        super().__init__(open_shape(shape), draft=draft if draft in (None, "ngram") else open_shape(draft), **options)

    def _rule(self, sampler: Sampler) -> Rule:
        (outer, inner), last = self._rates, len(self.plan.ladder) - 1
        return Simulated(super()._rule(sampler), {**dict.fromkeys(range(last), inner), last: outer})


def open_shape(shape: str, seed: int = 0, device: torch.device = CPU) -> Checkpoint:
    """The checkpoint of random weights, made on `device`, for a well-known model's hub id or short name or the path of a config.json.

    Raises UserError in one sentence.
    """
    config = known_config(shape) or _read(shape)
    return Checkpoint(Path(shape), "safetensors", config, {}, RandomSource(spec_from_config(config), seed, device), "bfloat16")


def _read(shape: str) -> dict[str, Any]:
    try:
        config = json.loads(Path(shape).read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"no shape {shape!r}, and no such file: give the path of a config.json, or a model such as {', '.join(_EXAMPLES)}"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"no shape {shape!r} ({error}): give the path of a config.json, or a model such as {_EXAMPLES[0]}") from error
    if not isinstance(config, dict):
        raise UserError(f"{shape} holds a JSON {type(config).__name__} where an object belongs: give a model's config.json")
    return config
