"""torch.compile of a module's layers, once for all of them; a GPU then takes fewer and larger kernels."""

from __future__ import annotations

from typing import Any

from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.weight_map import names_for


def compile_layers(module: Any, spec: ModelSpec) -> None:
    """In place. A frame that the compiler fails on runs as it is."""
    import torch._dynamo

    torch._dynamo.config.suppress_errors = True
    names = names_for(spec)
    for layer in module.get_submodule(names.prefixes[0] + names.down.split(".{}")[0]):
        layer.compile(dynamic=False)
