"""The packed weight view: a quantised checkpoint's matrices as they are stored, multiplied without ever being unpacked whole.

Its weights are the numbers that the codes stand for, so that it is the model that the unpacked views are, within rounding: those round
a weight to the number format of a pass, this one does not. Neurons keep the checkpoint's order. A rank whose share of the heads or of
the neurons cuts a group holds the whole group, and inputs that are another's count as 0. Matrices that `Form`s do not fit are held
unpacked, as `DenseWeights` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rowcast.kernels import packed
from rowcast.kernels.codes import activated
from rowcast.kernels.linear import Linear, make_linear
from rowcast.kernels.packed import Packed
from rowcast.kernels.packed_sizes import Form
from rowcast.runtime.loader import Loader, Progress
from rowcast.runtime.packed_sizes import Held, PackedForms, one_form, whole_groups
from rowcast.runtime.protocols import ALL_HEADS, Comm, Heads, KVView, Reads, Source, Tokens
from rowcast.runtime.shard import Shard
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.weight_map import qkv_pieces
from rowcast.runtime.weights import HeadSplit, Outer, plus


@dataclass(frozen=True, slots=True)
class PackedProduct:
    """x W^T + b with a packed weight."""

    weight: Packed
    bias: Tensor | None
    before: int = 0
    """Columns before and behind those of this rank's inputs, which fill its first and its last group."""
    behind: int = 0

    @property
    def bytes(self) -> int:
        return self.weight.bytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:  # [T, K] -> [T, N]
        if self.before or self.behind:
            x = F.pad(x, (self.before, self.behind))
        return packed.product(self.weight, x, self.bias, residual, x.dtype)

    def hidden(self, x: Tensor, activation: str, gated: bool) -> Tensor:
        """What an MLP's neurons hand on; with rows [gate; up] where it is gated."""
        return packed.ffn_hidden(self.weight, self.bias, x, activation, gated)


class UnpackedProduct:
    """The same with a weight in the model's own format."""

    def __init__(self, linear: Linear) -> None:
        self._linear = linear
        self._bytes = linear.weight.numel() * linear.weight.itemsize + (0 if linear.bias is None else linear.bias.nbytes)

    @property
    def bytes(self) -> int:
        return self._bytes

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return plus(self._linear(x), residual)

    def hidden(self, x: Tensor, activation: str, gated: bool) -> Tensor:
        return activated(self._linear(x), activation, gated)


class SeveralProducts:
    """The same with parts, one below the other, that are packed in several ways."""

    def __init__(self, parts: Sequence[Product]) -> None:
        self.parts = tuple(parts)

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return plus(torch.cat([part(x) for part in self.parts], dim=-1), residual)

    def hidden(self, x: Tensor, activation: str, gated: bool) -> Tensor:
        return activated(self(x), activation, gated)


class Product(Protocol):
    """One of a layer's."""

    @property
    def bytes(self) -> int: ...

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor: ...

    def hidden(self, x: Tensor, activation: str, gated: bool) -> Tensor: ...


@dataclass(slots=True)
class PackedLayer:
    """One layer's share of the products."""

    qkv: Product
    out: Product
    up: Product
    """With a gated MLP: rows [gate; up]."""
    down: Product

    @property
    def bytes(self) -> int:
        return self.qkv.bytes + self.out.bytes + self.up.bytes + self.down.bytes


class PackedWeights:
    """One rank's share of all weights as a checkpoint packs them. Implements `WeightView`."""

    on_device = True

    def __init__(
        self,
        spec: ModelSpec,
        source: Source,
        comm: Comm,
        forms: PackedForms,
        *,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress | None = None,
    ) -> None:
        """`dtype`: of what is not packed, and of passes. Raises UserError as `DenseWeights` does. Precondition: `source` implements
        `PackedTensors`, `forms` are its."""
        self.spec = spec
        shard = Shard(comm.rank, comm.world)
        shard.check(spec)
        load = Loader(spec, source, shard, dtype, device, progress)
        self.outer = self._outer(load, comm, forms)
        self._head: Packed | None = None
        if forms.head is not None:
            stem = load.name(load.names.embed) if spec.tied_embeddings else load.names.head
            self._head = load.packed(stem, shard.vocabulary(spec), slice(0, spec.embed_size), (spec.vocab_size, spec.embed_size))
        self.split = HeadSplit(spec, load)
        self.layers = [self._layer(load, forms, i) for i in range(spec.num_layers)]
        others = self.outer.elements
        if spec.qk_norm == "head":
            others += 2 * spec.num_layers * spec.head_dim
        self.bytes = others * dtype.itemsize + sum(layer.bytes for layer in self.layers)
        """Bytes of weights that a pass reads."""
        if self._head is not None:
            self.bytes += self._head.bytes
        self._passes = 0
        self.embed, self.norm_of = self.outer.embed, self.outer.norm_of

    def begin(self, tokens: Tokens, kv: KVView) -> None:
        self._passes += 1

    def reads(self) -> Reads:
        passes, self._passes = self._passes, 0
        return Reads(bytes=passes * self.bytes)

    def qkv(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [T, D] -> [T, H, d], [T, K, d], [T, K, d]
        return self.split.apart(layer, self.layers[layer].qkv(x))

    def heads(self, layer: int) -> Heads:
        return ALL_HEADS

    def out(self, layer: int, heads: Tensor, residual: Tensor | None = None) -> Tensor:  # [T, H, d] -> [T, D]
        return self.layers[layer].out(heads.flatten(1), residual)

    def mlp(self, layer: int, x: Tensor, residual: Tensor | None = None) -> Tensor:  # [T, D] -> [T, D]
        weights, spec = self.layers[layer], self.spec
        return weights.down(weights.up.hidden(x, spec.activation, spec.gated), residual)

    def head(self, x: Tensor) -> Tensor:  # [T, D] -> [T, V_local]
        if self._head is None:
            return self.outer.head(x)
        return self.outer.pad(packed.product(self._head, self.outer.head_input(x), dtype=x.dtype))

    def _outer(self, load: Loader, comm: Comm, forms: PackedForms) -> Outer:
        return Outer(self.spec, load, comm, head=forms.head is None)

    def _layer(self, load: Loader, forms: PackedForms, index: int) -> PackedLayer:
        return PackedLayer(*attention_products(load, self.spec, forms, index), *mlp_products(load, self.spec, forms, index))


def attention_products(
    load: Loader, spec: ModelSpec, forms: PackedForms, index: int, device: torch.device | None = None
) -> tuple[Product, Product]:
    """qkv and out of a layer, packed weights on `device` (None: the loader's)."""
    form, out = forms.layers[index][:2]
    heads = load.shard.query_heads(spec)
    columns = slice(heads.start * spec.head_dim, heads.stop * spec.head_dim)
    whole = spec.hidden_size, spec.num_heads * spec.head_dim
    last = _row_parallel(load, load.names.out.format(index), columns, whole, spec.out_bias, out, device)
    if form is None:
        return UnpackedProduct(make_linear(*load.qkv(index))), last
    pieces = sorted(qkv_pieces(spec, load.names, index, load.shard), key=lambda piece: piece.target)
    every = slice(0, spec.hidden_size)
    form_of = dict(zip((stem.format(index) for stem in load.names.qkv), _of_parts(form, len(load.names.qkv)), strict=True))
    parts = [
        (
            form_of[piece.stem],
            load.packed(load.name(piece.stem), piece.rows, every, (piece.whole_rows, spec.hidden_size), device),
        )
        for piece in pieces
    ]
    return _product(parts, load.qkv_spans(index, ())), last


def mlp_products(
    load: Loader, spec: ModelSpec, forms: PackedForms, index: int, device: torch.device | None = None
) -> tuple[Product, Product]:
    """up, with gate above where there is one, and down."""
    form, down = forms.layers[index][2:]
    names, neurons = load.names, load.shard.span(spec.intermediate_size)
    whole = spec.intermediate_size, spec.hidden_size
    stems = [stem.format(index) for stem in ((names.gate, names.up) if spec.gated else (names.up,))]
    last = _row_parallel(load, names.down.format(index), neurons, whole[::-1], spec.mlp_bias, down, device)
    if form is None:
        return UnpackedProduct(load.stacked(stems, neurons, spec.mlp_bias)), last
    parts = [
        (each, load.packed(load.name(stem), neurons, slice(0, whole[1]), whole, device))
        for stem, each in zip(stems, _of_parts(form, len(stems)), strict=True)
    ]
    bias = torch.cat([load.vector(f"{stem}.bias", whole[0])[neurons] for stem in stems]) if spec.mlp_bias else None
    return _product(parts, bias), last


def _of_parts(form: Form | tuple[Form, ...], parts: int) -> tuple[Form, ...]:
    return form if isinstance(form, tuple) else (form,) * parts


def _product(parts: Sequence[tuple[Form, Packed]], bias: Tensor | None) -> Product:
    """Neighbours of one form are one product."""
    found: list[PackedProduct] = []
    row = 0
    for _, run in groupby(parts, key=lambda part: part[0]):
        weight = packed.stacked([each for _, each in run])
        found.append(PackedProduct(weight, None if bias is None else bias[row : row + weight.rows]))
        row += weight.rows
    return found[0] if len(found) == 1 else SeveralProducts(found)


def _row_parallel(
    load: Loader,
    stem: str,
    columns: slice,
    whole: tuple[int, int],
    with_bias: bool,
    form: Held,
    device: torch.device | None,
) -> Product:
    if form is None:
        return UnpackedProduct(load.row_parallel(stem, columns, whole[1], with_bias))
    held = whole_groups(columns, whole[1], one_form(form))
    weight = load.packed(load.name(stem), slice(0, whole[0]), held, whole, device)
    bias = load.part_bias(stem) if with_bias else None
    return PackedProduct(weight, bias, columns.start - held.start, held.stop - columns.stop)
