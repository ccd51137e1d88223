"""A calibration of random predictors for a shape, with a hot set: for `offload.py`, where nothing was calibrated."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from rowcast.runtime.checkpoint.random_source import RandomSource
from rowcast.runtime.sparse.artefact import DESCRIPTION, FORMAT, TENSORS
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.weight_map import names_for

HOT, TAKEN = 0.26, 0.80
"""So much of the neurons takes so much of the activations (PowerInfer, arXiv 2312.12456, section 2, OPT-30B)."""
_SAMPLE = 1 << 17


class Varied(RandomSource):
    """As `RandomSource`, with larger embeddings: else hidden states of neighbouring tokens are nearly the same, as they are means over
    the context, and so are the neurons that they choose."""

    def __init__(self, spec: ModelSpec, seed: int, device: torch.device) -> None:
        super().__init__(spec, seed, device)
        names = names_for(spec)
        loud = names.embed if spec.rope is not None else names.positions
        self._loud = {name for name in self.names() if name.endswith(f"{loud}.weight")}

    def read(self, name: str, rows: slice | None = None, cols: slice | None = None, *, out: Tensor | None = None) -> Tensor:
        found = super().read(name, rows, cols, out=out)
        return found.mul_(LOUD) if name in self._loud else found


LOUD = 64.0


def spread(density: float) -> float:
    """Standard deviation of neurons' biases, over that of a token's scores, with which the hot ones take their share."""
    generator = torch.Generator().manual_seed(0)
    bias, token = torch.randn(2, _SAMPLE, generator=generator)
    hot = bias >= bias.kthvalue(round((1 - HOT) * _SAMPLE)).values
    low, high = 0.0, 16.0
    for _ in range(24):
        middle = (low + high) / 2
        score = middle * bias + token
        active = score >= score.kthvalue(round((1 - density) * _SAMPLE)).values
        low, high = (middle, high) if float(hot[active].float().mean()) < TAKEN else (low, middle)
    return (low + high) / 2


def write_profile(
    folder: Path, spec: ModelSpec, fingerprint: str, by: str, density: float, rank: int, heads: float | None
) -> float:
    """Predictors `by` of all layers' neurons, and, where `heads` are chosen, of heads. Float16.

    Returns the share of a token's neurons that another token's are, too, where tokens have nothing in common but the hot set.
    """
    hidden, neurons, generator = spec.hidden_size, spec.intermediate_size, torch.Generator().manual_seed(1)
    ratio = spread(density)
    a = (torch.randn(rank, hidden, generator=generator) * hidden**-0.5).half()
    b = (torch.randn(neurons, rank, generator=generator) * rank**-0.5).half()
    level = torch.randn(neurons, generator=generator)
    chance = torch.special.ndtr(
        ratio * level - torch.sqrt(torch.tensor(1 + ratio**2)) * torch.special.ndtri(torch.tensor(1 - density))
    )
    tensors: dict[str, Tensor] = {"densities": torch.full((2, spec.num_layers), density)}
    tensors["densities"][1] = 1.0
    for layer in range(spec.num_layers):
        # Cuts of the same noise: what differs is which neuron has which row.
        bias = level.roll(layer * 97) * ratio
        tensors[f"layers.{layer}.{by}.a"] = a.roll(layer, 0)
        tensors[f"layers.{layer}.{by}.b"] = b.roll(layer * 131, 0)
        tensors[f"layers.{layer}.{by}.bias"] = bias.half()
        tensors[f"layers.{layer}.frequency"] = chance.roll(layer * 97).half()
        if heads is not None:
            weight = torch.randn(spec.num_heads, hidden, generator=generator) * hidden**-0.5
            tensors[f"layers.{layer}.heads.own.weight"] = weight.half()
            tensors[f"layers.{layer}.heads.own.bias"] = torch.zeros(spec.num_heads).half()
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / TENSORS, {"fingerprint": fingerprint})
    description = {
        "format": FORMAT, "fingerprint": fingerprint, "model": "a shape", "density": density, "densities": [density, 1.0],
        "quality": {}, "scorers": {by: {}}, "lm_head_share": None,
    }  # fmt: skip
    (folder / DESCRIPTION).write_text(json.dumps(description))
    return float((chance**2).sum() / chance.sum())
