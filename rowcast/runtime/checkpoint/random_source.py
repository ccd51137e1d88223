"""Random weights for a shape: tensors that are made where they are read and never stored."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from rowcast.runtime.checkpoint.called_for import called_for
from rowcast.runtime.shard import Shard
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.weight_map import names_for, qkv_pieces

PERIOD = (1 << 22) - 3
"""A prime: rows of a matrix do not repeat after a few."""
RUN = 1 << 20
"""Most consecutive values taken at once; a row must fit."""


class RandomSource:
    """Implements `Source`: normal values of variance 1 / fan in, norm weights 1, biases 0.

    A tensor is a cut, placed by its name, of one periodic sequence of noise, so a slice costs a copy and no generator. It is made
    where `out` is, on a GPU, too.
    """

    def __init__(self, spec: ModelSpec, seed: int = 0, device: torch.device | None = None) -> None:
        """`device`: where a loader had better have tensors made, and where they are if no `out` is given. None: where they will
        stay, and the CPU."""
        self.device = device
        self._shapes = tensor_shapes(spec)
        self._seed = seed
        noise = torch.randn(PERIOD, generator=torch.Generator().manual_seed(seed))
        self._noise = torch.cat((noise, noise[:RUN]))
        self._scaled: dict[tuple[float, torch.dtype, torch.device], Tensor] = {}

    def names(self) -> Sequence[str]:
        return list(self._shapes)

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str, rows: slice | None = None, cols: slice | None = None, *, out: Tensor | None = None) -> Tensor:
        shape = self._shapes[name]
        first, last, _ = (rows or slice(None)).indices(shape[0])
        if len(shape) == 1:
            value = 0.0 if name.endswith(".bias") else 1.0
            return torch.full((last - first,), value, device=self.device) if out is None else out.fill_(value)
        columns = range(shape[1])[cols or slice(None)]
        found = torch.empty(last - first, len(columns), device=self.device) if out is None else out
        place, noise = zlib.crc32(name.encode()), self._noise_for(shape[1] ** -0.5, found)
        if found.is_cuda and len(columns) < shape[1]:  # a launch for all rows, not one for some
            starts = (place + shape[1] * torch.arange(first, last, device=found.device)) % PERIOD
            return found.copy_(noise[starts[:, None] + torch.arange(columns.start, columns.stop, device=found.device)])
        step = RUN // shape[1]
        for row in range(first, last, step):
            count = min(step, last - row)
            start = (place + row * shape[1]) % PERIOD
            block = noise[start : start + count * shape[1]].view(count, shape[1])
            found[row - first : row - first + count] = block[:, columns.start : columns.stop]
        return found

    def _noise_for(self, scale: float, out: Tensor) -> Tensor:
        """The noise times `scale`, as `out` has it: a model's matrices have two or three scales."""
        key = scale, out.dtype, out.device
        if key not in self._scaled:
            self._scaled[key] = (self._noise * scale).to(out.device, out.dtype)
        return self._scaled[key]

    def fingerprint(self) -> str:
        return f"{zlib.crc32(repr(sorted(self._shapes.items())).encode()):08x}{self._seed & 0xFFFFFFFF:08x}"


def tensor_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a whole checkpoint."""
    names, hidden, neurons = names_for(spec), spec.hidden_size, spec.intermediate_size
    matrices = {
        names.embed: (spec.vocab_size, spec.embed_size),
        names.head: (spec.vocab_size, spec.embed_size),
        names.positions: (spec.max_context + spec.position_offset, hidden),
        names.project_in: (hidden, spec.embed_size),
        names.project_out: (spec.embed_size, hidden),
    }
    heads: set[str] = set()
    for layer in range(spec.num_layers):
        matrices |= {piece.stem: (piece.whole_rows, hidden) for piece in qkv_pieces(spec, names, layer, Shard())}
        matrices[names.out.format(layer)] = (hidden, spec.num_heads * spec.head_dim)
        matrices |= {stem.format(layer): (neurons, hidden) for stem in (names.gate, names.up)}
        matrices[names.down.format(layer)] = (hidden, neurons)
        heads |= {names.q_norm.format(layer), names.k_norm.format(layer)}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in sorted(called_for(spec)):
        stem, _, kind = name.removeprefix(names.prefixes[0]).rpartition(".")
        if stem in matrices:
            shapes[name] = matrices[stem] if kind == "weight" else matrices[stem][:1]
        else:
            shapes[name] = (spec.head_dim,) if stem in heads else (hidden,)
    return shapes
