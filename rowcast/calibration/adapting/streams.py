"""The residual stream behind each layer, the student's beside the teacher's: a loss that reaches a layer without those above it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.weight_map import names_for


def layers_of(module: Any, spec: ModelSpec) -> nn.ModuleList:
    """Of a causal language model as Transformers builds it."""
    names = names_for(spec)
    found = module.get_submodule(names.prefixes[0] + names.down.split(".{}")[0])
    assert isinstance(found, nn.ModuleList)
    return found


class Streams:
    """What the layers of both modules gave in their last pass, from `watch` on."""

    def __init__(self, teacher: Any, student: Any, spec: ModelSpec) -> None:
        self._layers = [layers_of(module, spec) for module in (teacher, student)]
        self._seen: list[list[Tensor | None]] = [[None] * spec.num_layers for _ in self._layers]
        self._handles: list[Any] = []

    def watch(self) -> None:
        def keep(seen: list[Tensor | None], layer: int) -> Callable[[nn.Module, Any, Any], None]:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                seen[layer] = output[0] if isinstance(output, tuple) else output

            return hook

        for layers, seen in zip(self._layers, self._seen, strict=True):
            self._handles += [layer.register_forward_hook(keep(seen, i)) for i, layer in enumerate(layers)]

    def unwatch(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def errors(self) -> Tensor:
        """Of the last passes, which are forgotten: mean over a window's tokens of |student - teacher|^2 / |teacher|^2, [L, B] float32,
        with a gradient for the student."""
        found = []
        for theirs, ours in zip(*self._seen, strict=True):
            assert theirs is not None and ours is not None
            wanted = theirs.detach().float()
            found.append(((ours.float() - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-12)).mean(-1))
        for seen in self._seen:
            seen[:] = [None] * len(seen)
        return torch.stack(found)
