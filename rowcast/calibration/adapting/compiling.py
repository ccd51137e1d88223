"""torch.compile of a module's layers, once for all of them; a GPU then takes fewer and larger kernels."""

from __future__ import annotations

from typing import Any

from rowcast.calibration.adapting.streams import layers_of
from rowcast.runtime.spec import ModelSpec


def compile_layers(module: Any, spec: ModelSpec) -> None:
    """In place. A frame that the compiler fails on runs as it is. Hooks on the layers themselves stay outside."""
    import torch
    import torch._dynamo

    torch._dynamo.config.suppress_errors = True
    for layer in layers_of(module, spec):
        layer.forward = torch.compile(layer.forward, dynamic=False)
