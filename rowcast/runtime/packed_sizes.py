"""Which of a model's matrices a quantised checkpoint lets us hold as they are packed, and what that takes. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from rowcast.kernels.packed_sizes import Form
from rowcast.placement.resident import pass_bytes
from rowcast.runtime.checkpoint.packing import Packing
from rowcast.runtime.lowbit_sizes import replaced_bytes
from rowcast.runtime.shard import Shard
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.weight_map import find_prefix, names_for

PRODUCTS = ("qkv", "out", "up", "down")
Held = Form | tuple[Form, ...] | None
"""How a product's matrix is packed; several: each of its parts, the tensors that lie one below the other in it, where these differ, as
value and query do in many GGUF files; None: it is unpacked."""


@dataclass(frozen=True, slots=True)
class PackedSizes:
    """Of one rank, the fullest; bytes."""

    bits: int
    """Of most matrices."""
    layer_bytes: int
    """The matrices of all layers, each as it is held."""
    replaced_layer_bytes: int
    """The same in the model's own format."""
    head_bytes: int
    """The LM head; 0: it is not packed."""
    replaced_head_bytes: int
    """The same in the model's own format."""
    own_head: bool
    """It is packed beside rows of embeddings that are the same matrix."""

    @property
    def held_bytes(self) -> int:
        """What is held in place of matrices in the model's own format."""
        return self.layer_bytes + self.head_bytes

    @property
    def spared_bytes(self) -> int:
        """By how much that is less."""
        replaced = 0 if self.own_head or not self.head_bytes else self.replaced_head_bytes
        return self.replaced_layer_bytes + replaced - self.held_bytes

    @property
    def products_bytes(self) -> int:
        """All that products with the layers' matrices and the LM head read."""
        return self.layer_bytes + (self.head_bytes or self.replaced_head_bytes)

    def pass_bytes(self, spec: ModelSpec, width: int) -> int:
        """Weights that a pass reads; `spec`: the rank's share."""
        return pass_bytes(spec, width) - replaced_bytes(spec, width) + self.products_bytes


@dataclass(frozen=True, slots=True)
class PackedForms:
    """How a model's matrices are held."""

    layers: tuple[tuple[Held, ...], ...]
    """For each layer `PRODUCTS`."""
    head: Form | None
    why: tuple[str, ...] = ()
    """Why some are unpacked, a clause for each reason."""
    unasked: bool = True
    """Whether a GPU takes them so without being asked: not a GGUF file's, with which rungs that choose rows are used."""

    @property
    def all(self) -> bool:
        """Whether all layers' matrices are packed."""
        return all(form is not None for layer in self.layers for form in layer)

    @property
    def any(self) -> bool:
        """Whether some are."""
        return any(form is not None for layer in self.layers for form in layer)

    def sizes(self, spec: ModelSpec, width: int, world: int = 1) -> PackedSizes:
        """On the fullest of `world` ranks; `spec` is the whole model, `width` bytes of an element in the model's own format."""
        found = [self._sizes(spec, width, Shard(rank, world)) for rank in range(world)]
        return max(found, key=lambda sizes: sizes.held_bytes)

    def largest_bytes(self, spec: ModelSpec, shard: Shard) -> int:
        """Of one rank's packed products."""
        return max(
            _stored_bytes(form, rows, columns)
            for layer in self.layers
            for form, (rows, _, columns) in zip(layer, _shapes(spec, shard, layer), strict=True)
            if form is not None
        )

    def _sizes(self, spec: ModelSpec, width: int, shard: Shard) -> PackedSizes:
        held = replaced = 0
        for layer in self.layers:
            for form, (rows, own, columns) in zip(layer, _shapes(spec, shard, layer), strict=True):
                whole = sum(rows) * own * width
                held += whole if form is None else _stored_bytes(form, rows, columns)
                replaced += whole
        rows_here = shard.vocabulary(spec)
        vocabulary = rows_here.stop - rows_here.start
        head = 0 if self.head is None else self.head.stored_bytes(vocabulary, spec.embed_size)
        bits = Counter(form.bits for layer in self.layers for each in layer for form in _parts(each))
        most = bits.most_common(1)[0][0] if bits else 8 * width
        own_head = self.head is not None and spec.tied_embeddings
        return PackedSizes(most, held, replaced, head, vocabulary * spec.embed_size * width, own_head)


def whole_groups(span: slice, total: int, form: Form | None) -> slice:
    """The columns of whole groups, or super-blocks, that hold those of `span`, of `total`."""
    if form is None or form.group == -1 or form.group >= total:
        return span
    return slice(span.start // form.unit * form.unit, min(total, -(-span.stop // form.unit) * form.unit))


def forms_of_packing(packing: Packing, spec: ModelSpec) -> PackedForms:
    """As a config says it. Its LM head is taken for one that is not packed."""
    inputs = (spec.hidden_size, spec.num_heads * spec.head_dim, spec.hidden_size, spec.intermediate_size)
    return PackedForms((tuple(packing.form(size) for size in inputs),) * spec.num_layers, None)


def packed_forms(source: object, spec: ModelSpec) -> PackedForms | None:
    """Of an opened checkpoint; None: it is not a quantised one."""
    form, names = getattr(source, "form", None), getattr(source, "names", None)
    if form is None or names is None:
        return None
    found = forms_of_tensors(form, list(names()), spec)
    return replace(found, unasked=getattr(source, "packed_unasked", True))


def forms_of_tensors(form_of: Callable[[str], Form | str], tensors: list[str], spec: ModelSpec) -> PackedForms:
    """As a checkpoint's tensors are. `form_of`: of `PackedTensors`; `tensors`: all names."""
    names, known = names_for(spec), frozenset(tensors)
    prefix, why = find_prefix(names, tensors), Counter[str]()

    def form(stems: tuple[str, ...]) -> Held:
        found = [form_of(f"{prefix}{stem}.weight") if f"{prefix}{stem}.weight" in known else "it is missing" for stem in stems]
        reasons = [each for each in found if isinstance(each, str)]
        forms = tuple(each for each in found if isinstance(each, Form))
        if not reasons:
            return forms[0] if len(set(forms)) == 1 else forms
        why[reasons[0]] += len(stems)
        return None

    layers = []
    for i in range(spec.num_layers):
        ups = (names.gate, names.up) if spec.gated else (names.up,)
        stems = (names.qkv, (names.out,), ups, (names.down,))
        layers.append(tuple(form(tuple(stem.format(i) for stem in each)) for each in stems))
    head_name = f"{prefix}{names.embed}.weight" if spec.tied_embeddings else f"{names.head}.weight"
    head = form_of(head_name) if head_name in known else ""
    told = tuple(f"{count} matrices are unpacked: {reason}" for reason, count in why.items())
    return PackedForms(tuple(layers), head if isinstance(head, Form) else None, told)


def _parts(form: Held) -> tuple[Form, ...]:
    return form if isinstance(form, tuple) else () if form is None else (form,)


def _stored_bytes(form: Form | tuple[Form, ...], rows: tuple[int, ...], columns: int) -> int:
    if isinstance(form, Form):
        return form.stored_bytes(sum(rows), columns)
    return sum(each.stored_bytes(size, columns) for each, size in zip(form, rows, strict=True))


def _shapes(spec: ModelSpec, shard: Shard, forms: tuple[Held, ...]) -> list[tuple[tuple[int, ...], int, int]]:
    """Of a rank's products: rows of each part, columns without those that fill groups, columns with them."""
    heads, kv_heads = shard.query_heads(spec), shard.kv_heads(spec)
    queries, keys = (heads.stop - heads.start) * spec.head_dim, (kv_heads.stop - kv_heads.start) * spec.head_dim
    width = slice(heads.start * spec.head_dim, heads.stop * spec.head_dim)
    neurons = shard.span(spec.intermediate_size)
    inner = neurons.stop - neurons.start
    out = whole_groups(width, spec.num_heads * spec.head_dim, one_form(forms[1]))
    down = whole_groups(neurons, spec.intermediate_size, one_form(forms[3]))
    hidden = spec.hidden_size
    return [
        ((queries, keys, keys), hidden, hidden),
        ((hidden,), width.stop - width.start, out.stop - out.start),
        ((inner, inner) if spec.gated else (inner,), hidden, hidden),
        ((hidden,), inner, down.stop - down.start),
    ]


def one_form(form: Held) -> Form | None:
    """Of a product that has one part."""
    assert not isinstance(form, tuple)
    return form
