"""The peer of `offload.py`: Accelerate's device_map, layers in CPU memory that hooks bring to the GPU one after the other."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
from _figures import release
from torch import nn

from rowcast.bench.shapes import open_shape
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.spec import layer_parameters, parameter_count


def layers_at_a_time(model: str, device: torch.device, cap_bytes: int, context: int, layers: int, tokens: int) -> dict[str, Any]:
    """Seconds a token of the whole shape with `cap_bytes` of GPU, from those of `layers` of its layers, all in CPU memory, and of as
    many on the GPU: each token walks through the former for each layer that does not fit, and through the latter for those that do."""
    from accelerate import dispatch_model  # type: ignore[import-untyped]
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {**open_shape(model).config, "num_hidden_layers": layers}
    spec = spec_from_config(open_shape(model).config)
    width = 2 if device.type == "cuda" else 4
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    outer = parameter_count(spec) - spec.num_layers * layer_parameters(spec)
    fit = int(max(0, cap_bytes - outer * width) // (layer_parameters(spec) * width))
    fit = min(fit, spec.num_layers)
    times = {}
    for where in ("cpu", "gpu"):
        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=dtype).eval()
        names = [name for name, each in whole.named_modules() if isinstance(each, nn.ModuleList) and name.endswith("layers")]
        whole.to_empty(device=device)
        for parameter in whole.parameters():
            parameter.data.normal_(0, 0.02)
        whole.tie_weights()
        if where == "cpu" and device.type == "cuda":
            whole.to("cpu")
            release()
            dispatch_model(whole, device_map_of(whole, names[0], layers, device), main_device=device)
        times[where] = token_seconds(whole, config["vocab_size"], device, context, tokens) / layers
        del whole
        release()
    layer_bytes = layer_parameters(spec) * width
    return {
        "model": model,
        "layers_run": layers,
        "s_per_layer_in_cpu_memory": times["cpu"],
        "s_per_layer_on_gpu": times["gpu"],
        "bytes_per_s": layer_bytes / times["cpu"],
        "layers_that_fit": fit,
        "s_per_token": (spec.num_layers - fit) * times["cpu"] + fit * times["gpu"],
    }


def device_map_of(whole: Any, stack: str, layers: int, device: torch.device) -> dict[str, Any]:
    """Layers in CPU memory, all else on the GPU."""
    gpu = device.index or 0
    others = {name.rpartition(".")[0] for name, _ in [*whole.named_parameters(), *whole.named_buffers()]}
    found: dict[str, Any] = {name: gpu for name in others if not name.startswith(f"{stack}.")} | {"lm_head": gpu}
    return found | {f"{stack}.{layer}": "cpu" for layer in range(layers)}


@torch.inference_mode()
def token_seconds(whole: Any, vocabulary: int, device: torch.device, context: int, tokens: int) -> float:
    """Median of a token's time behind so many others."""
    ids = torch.randint(vocabulary, (1, context), device=device)
    cache = whole(ids, use_cache=True).past_key_values
    taken = []
    for _ in range(1 + tokens):
        started = time.perf_counter()
        out = whole(torch.randint(vocabulary, (1, 1), device=device), past_key_values=cache, use_cache=True)
        out.logits[0, -1].argmax().item()  # the host waits for it
        taken.append(time.perf_counter() - started)
    return median(taken[1:])
