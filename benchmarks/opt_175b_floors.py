"""What `opt_175b.py` holds its figures against: a token's bytes by part, and Transformers' layers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import torch

from rowcast.calibration.fitting import default_rank
from rowcast.runtime.spec import ModelSpec

DENSE_SHARE = 10 / 96
"""Of the layers, the last ones, that keep all neurons."""
NEURONS = 5000 / 49152
WIDTH = 2


class Bytes:
    """What a rank reads for a token, by part; of one sequence."""

    def __init__(self, spec: ModelSpec, ranks: int, context: int, kept: Sequence[float] | None, heads: float) -> None:
        """`kept`: share of the neurons by layer; None: dense."""
        hidden, layers = spec.hidden_size, spec.num_layers
        rank = default_rank(hidden, spec.activation == "relu")
        neurons = sum(kept) if kept is not None else layers
        kv = 2 * layers * spec.num_kv_heads * spec.head_dim * WIDTH * context
        own = 0.0 if kept is None else sum(share < 1 for share in kept) * (rank * hidden + rank * spec.intermediate_size / ranks)
        chooses = 0.0 if kept is None else 4 * layers * hidden * spec.num_heads / ranks
        self.parts = {
            "attention": (4 * layers * hidden * hidden * WIDTH + kv) * heads / ranks,
            "MLP": 2 * hidden * spec.intermediate_size * WIDTH * neurons / ranks,
            "predictors": own + chooses,
            "all-reduce": 0.0,
            "LM head": spec.vocab_size * spec.embed_size * WIDTH / ranks,
            "gaps": 0.0,
        }

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def kept(layers: int) -> list[float]:
    """By layer, the share of its neurons."""
    whole = max(1, round(DENSE_SHARE * layers))
    return [NEURONS] * (layers - whole) + [1.0] * whole


def mean_kept(layers: int) -> float:
    return round(sum(kept(layers)) / layers, 4)


def eager_layers(model: str, device: str, context: int) -> dict[str, float]:
    """Milliseconds of one of Transformers' decoder layers, one token over `context`: two depths, and what a layer more takes."""
    from transformers import OPTConfig, OPTForCausalLM

    from rowcast.runtime.checkpoint import open_checkpoint

    config = OPTConfig(**{key: value for key, value in open_checkpoint(f"random:{model}").config.items() if key != "model_type"})
    times: dict[int, float] = {}
    torch.set_default_dtype(torch.bfloat16)
    for layers in (2, 6, 2, 6):
        config.num_hidden_layers = layers
        with torch.device(device), torch.inference_mode():
            whole = OPTForCausalLM(config).eval()
            cache = whole(torch.randint(config.vocab_size, (1, context)), use_cache=True).past_key_values
            taken = []
            for _ in range(60):
                ids = torch.randint(config.vocab_size, (1, 1))
                if device == "cuda":
                    torch.cuda.synchronize()
                started = time.perf_counter()
                whole(ids, past_key_values=cache, use_cache=True)
                if device == "cuda":
                    torch.cuda.synchronize()
                taken.append(time.perf_counter() - started)
        times[layers] = min(times.get(layers, 1e9), median(taken[20:]))
        del whole, cache
    layer_ms = 1e3 * (times[6] - times[2]) / 4
    return {"layer_ms": layer_ms, "of_96_layers_ms": layer_ms * 96, "ms_with_2": 1e3 * times[2], "ms_with_6": 1e3 * times[6]}
