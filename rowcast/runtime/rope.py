"""Rotary position embedding: the angles of a step, and the rotation (Su et al., arXiv 2104.09864, section 3.2.2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rowcast.runtime.spec import RopeSpec


class Rope:
    """Computes, once a step, what `apply_rope` needs in every layer. Holds head_dim / 2 frequencies, no tables."""

    def __init__(self, spec: RopeSpec, head_dim: int, device: torch.device | str) -> None:
        self.spec = spec
        self.head_dim = head_dim
        self.exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim  # [d/2]
        self.frequencies = _frequencies(spec, self.exponents)  # [d/2]

    def cos_sin(self, positions: Tensor, prompt_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """positions [T], prompt_lengths [T] (int64) -> cos, sin [T, 1, d] (float32), the first half of sin negated.

        Only dynamic scaling reads the prompt lengths: token i is rotated as in a sequence of max(i + 1, prompt length) tokens. So
        its key does not depend on how the prompt was chunked.
        """
        frequencies = self.frequencies
        if self.spec.scaling == "dynamic":
            frequencies = self._dynamic(torch.maximum(positions + 1, prompt_lengths))
        angles = positions[:, None].float() * frequencies  # [T, d/2]
        cos, sin = angles.cos(), angles.sin()
        if self.spec.attention_factor != 1.0:
            cos, sin = cos * self.spec.attention_factor, sin * self.spec.attention_factor
        return torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]

    def _dynamic(self, lengths: Tensor) -> Tensor:
        """NTK-aware base for each token's sequence length: lengths [T] -> frequencies [T, d/2]."""
        factor, original = self.spec.factor, self.spec.original_context
        stretch = factor * lengths.clamp(min=original) / original - (factor - 1)  # [T], 1 within the original context
        base = self.spec.theta * stretch ** (self.head_dim / (self.head_dim - 2))
        return 1.0 / base[:, None] ** self.exponents


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads x [T, H, d] by the angles of `Rope.cos_sin`, all of one dtype -> [T, H, d]: element j pairs with j + d/2.

    Three operations, as a decoded token pays for their number: with (a, b) the halves of x, roll gives (b, a) and
    x cos + (b, a) (-sin, sin) is (a cos - b sin, b cos + a sin).
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def _frequencies(spec: RopeSpec, exponents: Tensor) -> Tensor:
    """Radians a position, exponents [d/2] -> [d/2]. Dynamic scaling replaces them beyond the original context."""
    frequencies = 1.0 / spec.theta**exponents
    if spec.scaling == "linear":
        return frequencies / spec.factor
    if spec.scaling == "yarn":
        return _yarn(spec, frequencies)
    if spec.scaling == "llama3":
        return _llama3(spec, frequencies)
    return frequencies


def _yarn(spec: RopeSpec, frequencies: Tensor) -> Tensor:
    """Interpolate slow dimensions, keep fast ones, a linear ramp between (arXiv 2309.00071, section 3.2). [d/2] -> [d/2]."""
    half = len(frequencies)

    def dimension(rotations: float) -> float:
        """The dimension that turns `rotations` times within the original context."""
        return half * math.log(spec.original_context / (rotations * 2 * math.pi)) / math.log(spec.theta)

    low, high = dimension(spec.beta_fast), dimension(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(half, dtype=torch.float32, device=frequencies.device) - low) / (high - low)).clamp(0, 1)
    return frequencies / spec.factor * ramp + frequencies * (1 - ramp)


def _llama3(spec: RopeSpec, frequencies: Tensor) -> Tensor:
    """Llama 3.1: divide frequencies below low_freq_factor turns a context, keep those above high_freq_factor. [d/2] -> [d/2]."""
    turns = frequencies * spec.original_context / (2 * math.pi)
    keep = ((turns - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)).clamp(0, 1)
    return frequencies / spec.factor * (1 - keep) + frequencies * keep
