"""Rotary embeddings against Transformers' own modules, on the settings of real models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from rowcast.runtime.config import spec_from_config
from rowcast.runtime.rope import Rope, apply_rope

SCALINGS: dict[str, dict[str, Any]] = {
    "llama-2": {},
    "vicuna-16k": {"rope_type": "linear", "factor": 4.0},
    "yarn-llama-2-128k": {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096},
    "qwen2.5": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6},
    "deepseek": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 0.707,
        "mscale_all_dim": 1.0,
    },
    "yarn-tuned": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 2048,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "truncate": False,
        "attention_factor": 1.1,
    },
    "llama-3.1": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 5e5,
    },
}


def make(head_dim: int = 128, context: int = 4096, **parameters: Any) -> tuple[Rope, LlamaRotaryEmbedding]:
    """Our Rope and a fresh module of Transformers, from one config."""
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=context,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, **parameters},
    )
    spec = spec_from_config(config.to_dict())
    assert spec.rope is not None
    return Rope(spec.rope, spec.head_dim, "cpu"), LlamaRotaryEmbedding(config)


def rotate(rope: Rope, x: Tensor, positions: Tensor, prompt_length: int) -> Tensor:
    return apply_rope(x, *rope.cos_sin(positions, torch.full_like(positions, prompt_length)))


def rotate_theirs(module: LlamaRotaryEmbedding, x: Tensor, positions: Tensor) -> Tensor:
    cos, sin = module(x[None], positions[None])
    rotated: Tensor = apply_rotary_pos_emb(x[None], x[None], cos, sin, unsqueeze_dim=2)[0][0]
    return rotated


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_frequencies_equal_transformers(name: str, head_dim: int) -> None:
    ours, theirs = make(head_dim, **SCALINGS[name])
    torch.testing.assert_close(ours.frequencies, theirs.inv_freq, rtol=1e-6, atol=0)
    assert ours.spec.attention_factor == pytest.approx(theirs.attention_scaling)


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_equals_transformers(name: str, dtype: torch.dtype) -> None:
    ours, theirs = make(**SCALINGS[name])
    positions = torch.tensor([0, 1, 2, 100, 1000, 4095])
    x = torch.randn(len(positions), 3, 128).to(dtype)
    cos, sin = ours.cos_sin(positions, torch.ones_like(positions))
    rotated = apply_rope(x, cos.to(dtype), sin.to(dtype))
    tolerance = 1e-3 if dtype == torch.float32 else 0.05  # an ulp of a frequency is 4095 ulps of the angle
    torch.testing.assert_close(rotated, rotate_theirs(theirs, x, positions), atol=tolerance, rtol=0)


@pytest.mark.parametrize("prompt_length", [10, 64, 65, 150])
def test_dynamic_scaling_equals_transformers(prompt_length: int) -> None:
    """A prompt in one pass, then single tokens, within, up to and beyond the original context of 64."""
    ours, theirs = make(context=64, rope_type="dynamic", factor=4.0)
    x = torch.randn(prompt_length + 80, 3, 128)
    positions = torch.arange(len(x))
    expected = [rotate_theirs(theirs, x[:prompt_length], positions[:prompt_length])]
    expected += [rotate_theirs(theirs, x[i : i + 1], positions[i : i + 1]) for i in range(prompt_length, len(x))]
    torch.testing.assert_close(rotate(ours, x, positions, prompt_length), torch.cat(expected), atol=1e-4, rtol=0)


def test_dynamic_scaling_of_transformers_remembers_and_ours_does_not() -> None:
    """After a long sequence Transformers rotates a shorter one (still beyond the original context) for the long one's length."""
    ours, theirs = make(context=64, rope_type="dynamic", factor=4.0)
    x, positions = torch.randn(100, 3, 128), torch.arange(100)
    fresh = rotate_theirs(theirs, x, positions)
    theirs(x[None], torch.arange(200)[None])
    assert (rotate_theirs(theirs, x, positions) - fresh).abs().max() > 0.1
    rotate(ours, torch.randn(200, 3, 128), torch.arange(200), 200)
    torch.testing.assert_close(rotate(ours, x, positions, 100), fresh, atol=1e-4, rtol=0)


def test_chunks_and_batches_do_not_change_the_angles() -> None:
    ours, _ = make(context=64, rope_type="dynamic", factor=4.0)
    positions, lengths = torch.arange(120), torch.full((120,), 100)
    whole = ours.cos_sin(positions, lengths)
    # Whole vectors of any CPU: what is left of one may be rounded by other code, which changes a power's last bit.
    chunks = [ours.cos_sin(positions[i : i + 16], lengths[i : i + 16]) for i in range(0, 120, 16)]
    for part, one in enumerate(whole):
        assert torch.equal(torch.cat([chunk[part] for chunk in chunks]), one)


def test_scores_depend_on_distance_only() -> None:
    ours, _ = make(64)
    q, k = torch.randn(1, 1, 64), torch.randn(1, 1, 64)

    def score(i: int, j: int) -> float:
        return float((rotate(ours, q, torch.tensor([i]), 1) * rotate(ours, k, torch.tensor([j]), 1)).sum())

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert score(7, 3) != pytest.approx(score(8, 3), abs=1e-4)
