"""One layer of a model at a time, its matrices as the checkpoint names them, and the second moments of what they read."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rowcast.kernels.rows import ACTIVATIONS
from rowcast.runtime.comm import SoloComm
from rowcast.runtime.loader import Loader
from rowcast.runtime.protocols import ALL_HEADS, Heads, KVView, Reads, Source, Tokens
from rowcast.runtime.shard import Shard
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.weight_map import qkv_pieces
from rowcast.runtime.weights import HeadSplit, Outer, plus

PRODUCTS = ("qkv", "out", "up", "down")


@dataclass(slots=True)
class LayerMatrices:
    """Of one layer, [N, K] each, by product and stem, with the prefix that the checkpoint has. Products read one input each."""

    by_product: dict[str, dict[str, Tensor]]
    biases: dict[str, Tensor | None]
    """By product; of qkv and up those of the whole product."""
    moments: dict[str, Tensor] = field(default_factory=dict)
    """By product: the sum of x x^T of what it read, [K, K] float64, where they are collected."""


class OpenLayers:
    """All products of a model, of which one layer's matrices are there. Implements `WeightView`."""

    on_device = False

    def __init__(self, spec: ModelSpec, source: Source, dtype: torch.dtype, device: torch.device) -> None:
        """Loads what is around the layers. Raises UserError as `DenseWeights` does."""
        self.spec = spec
        self._load = Loader(spec, source, Shard(), dtype, device, None)
        self.outer = Outer(spec, self._load, SoloComm())
        self._split = HeadSplit(spec, self._load)
        self._dtype, self._device = dtype, device
        self._layer: LayerMatrices | None = None
        self._fused: dict[str, Tensor] = {}
        self.collect = False
        """Whether passes add to the layer's moments."""
        self.embed, self.norm_of, self.head = self.outer.embed, self.outer.norm_of, self.outer.head

    def stems(self, layer: int) -> dict[str, list[str]]:
        """Of a layer's matrices, by product."""
        names, name = self._load.names, self._load.name
        ups = (names.gate, names.up) if self.spec.gated else (names.up,)
        stems = {"qkv": names.qkv, "out": (names.out,), "up": ups, "down": (names.down,)}
        return {product: [name(stem.format(layer)) for stem in each] for product, each in stems.items()}

    def read(self, layer: int) -> LayerMatrices:
        """A layer from the checkpoint."""
        load, spec, names = self._load, self.spec, self._load.names
        found = {product: {stem: load.matrix(stem) for stem in stems} for product, stems in self.stems(layer).items()}
        ups = [stem.format(layer) for stem in ((names.gate, names.up) if spec.gated else (names.up,))]
        biases = {
            "qkv": load.qkv_spans(layer, ()),
            "out": load.part_bias(names.out.format(layer)) if spec.out_bias else None,
            "up": torch.cat([load.vector(f"{stem}.bias", spec.intermediate_size) for stem in ups]) if spec.mlp_bias else None,
            "down": load.part_bias(names.down.format(layer)) if spec.mlp_bias else None,
        }
        return LayerMatrices(found, biases)

    def use(self, layer: int, matrices: LayerMatrices) -> None:
        """Passes through this layer take these matrices."""
        self._layer, self._fused = matrices, {}
        stored = matrices.by_product["qkv"]
        stems = self.stems(layer)["qkv"]
        rows = (self.spec.num_heads + 2 * self.spec.num_kv_heads) * self.spec.head_dim
        fused = torch.empty((rows, self.spec.hidden_size), dtype=self._dtype, device=self._device)
        for piece in qkv_pieces(self.spec, self._load.names, layer, Shard()):
            size = piece.rows.stop - piece.rows.start
            fused[piece.target : piece.target + size] = stored[self._load.name(piece.stem)][piece.rows]
        assert set(stored) == set(stems)
        self._fused["qkv"] = fused
        self._fused["up"] = torch.cat(list(matrices.by_product["up"].values())).to(self._dtype)
        for product in ("out", "down"):
            [matrix] = matrices.by_product[product].values()
            self._fused[product] = matrix.to(self._dtype)

    def begin(self, tokens: Tokens, kv: KVView) -> None:
        """Nothing is kept from pass to pass."""

    def reads(self) -> Reads:
        return Reads()

    def qkv(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._split.apart(layer, self._product("qkv", x))

    def heads(self, layer: int) -> Heads:
        return ALL_HEADS

    def out(self, layer: int, heads: Tensor, residual: Tensor | None = None) -> Tensor:
        return plus(self._product("out", heads.flatten(1)), residual)

    def mlp(self, layer: int, x: Tensor, residual: Tensor | None = None) -> Tensor:
        act, hidden = ACTIVATIONS[self.spec.activation], self._product("up", x)
        if self.spec.gated:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = act(gate) * up
        else:
            hidden = act(hidden)
        return plus(self._product("down", hidden), residual)

    def _product(self, product: str, x: Tensor) -> Tensor:
        assert self._layer is not None
        if self.collect:
            wide = x.float()
            seen = (wide.T @ wide).double()
            moments = self._layer.moments
            moments[product] = moments[product] + seen if product in moments else seen
        return torch.nn.functional.linear(x, self._fused[product], self._layer.biases[product])
