"""How many neurons and heads a pruned model keeps. One number for all layers, as the families' configs have one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from rowcast.errors import UserError
from rowcast.runtime.spec import ModelSpec, layer_parameters

NEURON_UNIT = 64
"""Of most kernels' tiles, and of the groups that low bits are scaled by."""

NEURONS_KEY = {
    "falcon": "ffn_hidden_size",
    "llama": "intermediate_size",
    "mistral": "intermediate_size",
    "opt": "ffn_dim",
    "qwen2": "intermediate_size",
    "qwen3": "intermediate_size",
}
"""What a family's config calls the number of neurons. Transformers' modules of the others always have 4 times the hidden size."""
HEADS_FREE = ("llama", "mistral", "qwen2", "qwen3")
"""Families whose config says how large a head is. The others take the hidden size over the number of heads."""


@dataclass(frozen=True, slots=True)
class Target:
    """What to keep: of the parameters outside embeddings, or of neurons and heads one by one; shares above 0 and up to 1."""

    keep: float | None = None
    neurons: float | None = None
    heads: float | None = None
    tp: int = 1
    """Ranks that the pruned model's KV heads and neurons have to divide among."""

    def check(self, spec: ModelSpec) -> None:
        """Raise UserError for what cannot be, of a model like this."""
        if self.keep is not None and (self.neurons is not None or self.heads is not None):
            raise UserError("--keep chooses neurons and heads by itself: give it alone, or --neurons and --heads")
        if self.keep is None and self.neurons is None and self.heads is None:
            raise UserError("nothing to prune: give --keep, --neurons or --heads")
        for name, value in (("keep", self.keep), ("neurons", self.neurons), ("heads", self.heads)):
            if value is not None and not 0 < value <= 1:
                raise UserError(f"--{name} {value} is not a share: give a number above 0 and up to 1")
        if self.tp < 1:
            raise UserError(f"--tp {self.tp} is too low: give 1 or more")
        if spec.num_kv_heads % self.tp:
            raise UserError(f"--tp {self.tp} does not divide the model's {spec.num_kv_heads} KV heads: give a number that does")
        if spec.family not in NEURONS_KEY:
            raise UserError(
                f"a model of type {spec.family} has 4 neurons for each hidden dimension and heads of hidden size / heads, which no "
                f"config changes: prune a model of type {', '.join(NEURONS_KEY)}"
            )
        if self.heads is not None and self.heads < 1 and spec.family not in HEADS_FREE:
            raise UserError(
                f"the heads of a model of type {spec.family} are hidden size / heads large, so that none can go: leave --heads out, "
                f"or prune a model of type {', '.join(HEADS_FREE)}"
            )


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of each layer."""

    neurons: int
    kv_heads: int
    group: int
    """Query heads to each KV head."""

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @classmethod
    def of(cls, spec: ModelSpec) -> Sizes:
        """Those of a model."""
        return cls(spec.intermediate_size, spec.num_kv_heads, spec.group_size)

    def parameters(self, spec: ModelSpec) -> int:
        """Of a layer's products in a model like this, but of these sizes."""
        sized = replace(spec, intermediate_size=self.neurons, num_heads=self.heads, num_kv_heads=self.kv_heads)
        return layer_parameters(sized)

    def share(self, spec: ModelSpec) -> float:
        """Of the model's parameters outside embeddings and norms that these sizes leave."""
        return self.parameters(spec) / layer_parameters(spec)


def neuron_unit(spec: ModelSpec, tp: int = 1) -> int:
    """Neurons are kept in multiples of this: `NEURON_UNIT` a rank, less in models with fewer than 16 times as many."""
    unit = NEURON_UNIT
    while unit > 1 and spec.intermediate_size < 16 * unit:
        unit //= 2
    return unit * tp


def candidates(spec: ModelSpec, target: Target) -> list[Sizes]:
    """What may be kept: the most neurons that each choice of heads leaves room for. Raises UserError where nothing is left."""
    unit = neuron_unit(spec, target.tp)
    found = []
    if target.keep is not None:
        budget = target.keep * layer_parameters(spec)
        for kv_heads, group in _heads(spec, target.tp):
            empty = Sizes(0, kv_heads, group)
            each = Sizes(1, kv_heads, group).parameters(spec) - empty.parameters(spec)
            room = int((budget - empty.parameters(spec)) // each)
            neurons = spec.intermediate_size if room >= spec.intermediate_size else room // unit * unit
            if neurons > 0:
                found.append(Sizes(neurons, kv_heads, group))
        # With neurons that all stay, fewer heads than there is room for gain nothing.
        most = max((sizes.heads for sizes in found if sizes.neurons == spec.intermediate_size), default=0)
        found = [sizes for sizes in found if sizes.neurons < spec.intermediate_size or sizes.heads == most]
    else:
        neurons = _rounded(spec.intermediate_size, target.neurons, unit)
        wanted = spec.num_heads * (1.0 if target.heads is None else target.heads)
        fitting = [pair for pair in _heads(spec, target.tp) if pair[0] * pair[1] <= wanted + 1e-9]
        most = max((kv_heads * group for kv_heads, group in fitting), default=0)
        found = [Sizes(neurons, *pair) for pair in fitting if pair[0] * pair[1] == most and neurons > 0]
    if not found:
        least = Sizes(unit, target.tp, 1)
        raise UserError(
            f"that share leaves nothing of the model's {spec.intermediate_size} neurons or {spec.num_heads} heads a layer: keep more; "
            f"the least is {least.neurons} and {least.heads if spec.family in HEADS_FREE else spec.num_heads}"
        )
    return found


def _heads(spec: ModelSpec, tp: int) -> Iterator[tuple[int, int]]:
    """KV heads, and query heads to each: whole groups go, or as many query heads of every group.

    Transformers refuses a Llama whose heads do not divide its hidden size, although its config says how large a head is.
    """
    if spec.family not in HEADS_FREE:
        yield spec.num_kv_heads, spec.group_size
        return
    for kv_heads in range(tp, spec.num_kv_heads + 1, tp):
        for group in range(1, spec.group_size + 1):
            if spec.family != "llama" or spec.hidden_size % (kv_heads * group) == 0:
                yield kv_heads, group


def _rounded(total: int, share: float | None, unit: int) -> int:
    if share is None or share == 1:
        return total
    return int(total * share + 1e-9) // unit * unit


def tensor_parallel(spec: ModelSpec) -> list[int]:
    """Numbers of ranks that a model's heads can be dealt out to, up to one for each KV head."""
    return [ranks for ranks in range(1, spec.num_kv_heads + 1) if spec.num_kv_heads % ranks == 0]
