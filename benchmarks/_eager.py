"""What Transformers takes for a layer of a shape, eager: the peer of benchmarks whose shapes one GPU does not hold."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from _figures import release

from rowcast.bench.latency import random_peer
from rowcast.bench.shapes import open_shape
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.device import DTYPES


@torch.inference_mode()
def eager_layers(model: str, device: str, dtype: str, context: int, layers: int = 8, tokens: int = 40) -> dict[str, float]:
    """Milliseconds of a token behind `context` others: of one of so many layers, of the LM head, of all the shape's layers with it."""
    config = open_shape(model).config
    whole = random_peer({**config, "num_hidden_layers": layers}, DTYPES[dtype], device)
    ids = torch.randint(config["vocab_size"], (1, context), device=device)
    cache = whole(ids, use_cache=True).past_key_values
    one = torch.randint(config["vocab_size"], (1, 1), device=device)
    hidden = torch.randn(1, 1, whole.lm_head.in_features, dtype=DTYPES[dtype], device=device)
    token_s = seconds(partial(whole, one, past_key_values=cache, use_cache=True), device, tokens)
    head_s = seconds(partial(whole.lm_head, hidden), device, tokens)
    del whole, cache
    release()
    layer_s, count = (token_s - head_s) / layers, spec_from_config(config).num_layers
    return {"layers": layers, "layer_ms": 1e3 * layer_s, "head_ms": 1e3 * head_s, "token_ms": 1e3 * (layer_s * count + head_s)}


def seconds(call: Callable[[], object], device: str, repeat: int) -> float:
    """Median of calls that the host waits for, a quarter of them before."""
    taken = []
    for _ in range(repeat + repeat // 4):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return median(taken[repeat // 4 :])
