"""Models that exist as a shape only: a config, random weights, no tokenizer, and acceptance at given rates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from rowcast import LLM
from rowcast.bench.random_source import CPU, RandomSource
from rowcast.errors import UserError
from rowcast.runtime.checkpoint import Checkpoint
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.ladder.rule import Rule
from rowcast.runtime.ladder.simulated import Simulated
from rowcast.runtime.sampler import Sampler

_LLAMA = {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False}

SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        **_LLAMA,
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
    },
    "yarn-llama-2-7b-128k": {
        **_LLAMA,
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 131072,
        "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096},
    },
    "llama-3.1-8b": {
        **_LLAMA,
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "llama-68m": {
        **_LLAMA,
        "vocab_size": 32000,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 2,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "max_position_embeddings": 2048,
    },
}
"""Known by name. yarn-llama-2-7b-128k and llama-68m are the pair that TriForce is measured with (arXiv 2404.11912, section 5)."""


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
    """The checkpoint of random weights, made on `device`, for a known name or the path of a config.json.

    Raises UserError in one sentence.
    """
    config = SHAPES.get(shape)
    if config is None:
        config = _read(shape)
    return Checkpoint(Path(shape), "safetensors", config, {}, RandomSource(spec_from_config(config), seed, device), "bfloat16")


def _read(shape: str) -> dict[str, Any]:
    try:
        config = json.loads(Path(shape).read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"no shape {shape!r}, and no such file: give the path of a config.json, or one of {', '.join(SHAPES)}"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"no shape {shape!r} ({error}): give the path of a config.json, or one of {', '.join(SHAPES)}") from error
    if not isinstance(config, dict):
        raise UserError(f"{shape} holds a JSON {type(config).__name__} where an object belongs: give a model's config.json")
    return config
