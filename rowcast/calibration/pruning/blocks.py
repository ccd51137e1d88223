"""Where the products of a Transformers module are, and how its layers run one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.weight_map import names_for


@dataclass(frozen=True, slots=True)
class Block:
    """One layer. H query heads of d dimensions, N neurons."""

    layer: nn.Module
    qkv: tuple[nn.Linear, ...]
    """q, k and v; one where they are fused."""
    out: nn.Linear
    """[D, H d]."""
    inner: tuple[nn.Linear, ...]
    """[N, D] each: gate and up, or up."""
    down: nn.Linear
    """[D, N]."""


def blocks_of(module: Any, spec: ModelSpec) -> list[Block]:
    """The layers of a Transformers model of this spec."""
    names = names_for(spec)
    prefix = names.prefixes[0]

    def found(stem: str, layer: int) -> nn.Linear:
        linear = module.get_submodule(prefix + stem.format(layer))
        assert isinstance(linear, nn.Linear)
        return linear

    layers = prefix + names.down.partition("{}")[0] + "{}"
    return [
        Block(
            layer=module.get_submodule(layers.format(i)),
            qkv=tuple(found(stem, i) for stem in names.qkv),
            out=found(names.out, i),
            inner=tuple(found(stem, i) for stem in (names.gate, names.up) if stem),
            down=found(names.down, i),
        )
        for i in range(spec.num_layers)
    ]


Run = Callable[[Tensor], Tensor]
"""One layer: [B, T, D] -> [B, T, D]."""


@dataclass(slots=True)
class Calls:
    """What the layers of a model are given beside the hidden states, the same for all batches of one shape."""

    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]
    """Of each layer."""

    @classmethod
    @torch.no_grad()
    def of(cls, module: Any, blocks: list[Block], ids: Tensor) -> Calls:
        """As the model calls them for ids [B, T]."""
        arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def take(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            arguments.append((args[1:], {key: value for key, value in kwargs.items() if key != "hidden_states"}))

        handles = [block.layer.register_forward_pre_hook(take, with_kwargs=True) for block in blocks]
        try:
            module.base_model(input_ids=ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return cls(arguments)

    def of_layer(self, block: Block, layer: int) -> Run:
        """`block`, the model's layer `layer`, called as the model does."""
        args, kwargs = self.arguments[layer]

        def run(x: Tensor) -> Tensor:
            found = block.layer(x, *args, **kwargs)
            result: Tensor = found[0] if isinstance(found, tuple) else found
            return result

        return run


@torch.no_grad()
def entering(module: Any, block: Block, ids: Tensor) -> Tensor:
    """The hidden states that `block`, the first, is given: ids [B, T] -> [B, T, D]."""
    seen: list[Tensor] = []

    class Enough(Exception):
        pass

    def take(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])
        raise Enough

    handle = block.layer.register_forward_pre_hook(take, with_kwargs=True)
    try:
        module.base_model(input_ids=ids, use_cache=False)
    except Enough:
        pass
    finally:
        handle.remove()
    return seen[0]


@contextmanager
def watching(linear: nn.Linear, see: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
    """Within it `see` gets what the product is given and what it gives, [T, in] and [T, out], each time that it runs."""

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        see(args[0].reshape(-1, args[0].shape[-1]), output.reshape(-1, output.shape[-1]))

    handle = linear.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def gradients_of_activations(module: nn.Module) -> Iterator[None]:
    """Within it a pass's graph begins at the embeddings of a Transformers model, and the weights get no gradients."""
    parameters = list(module.parameters())
    wanted = [parameter.requires_grad for parameter in parameters]
    module.requires_grad_(False)
    embeddings: nn.Module = module.get_input_embeddings()  # type: ignore[operator]
    begin = embeddings.register_forward_hook(lambda _, args, output: output.requires_grad_())
    try:
        yield
    finally:
        begin.remove()
        for parameter, want in zip(parameters, wanted, strict=True):
            parameter.requires_grad_(want)
