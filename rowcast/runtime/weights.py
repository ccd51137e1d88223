"""The plain rung's weight view: one rank's share of all weights, resident on one device.

Tensors are read by slice, straight into the place where they stay (or into one tensor's worth of staging on the way to a GPU or to
oneDNN's layout), so that host memory never holds more than the shard and one tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from rowcast.errors import UserError
from rowcast.kernels.linear import Linear, make_linear
from rowcast.runtime.protocols import Comm, Source
from rowcast.runtime.shard import Shard
from rowcast.runtime.spec import Activation, ModelSpec
from rowcast.runtime.weight_map import Names, find_prefix, names_for, qkv_pieces

Progress = Callable[[int], None]
"""Called with the number of bytes that were just placed."""


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


@dataclass(slots=True)
class Norm:
    """An RMS or layer norm over the last dimension; weight and bias [D] or None."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    rms: bool

    def __call__(self, x: Tensor) -> Tensor:  # [..., D] -> [..., D]
        if self.rms:
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


@dataclass(slots=True)
class Layer:
    """One layer's share of the products, each a map [in] -> [out]."""

    qkv: Linear
    out: Linear
    up: Linear
    """With a gated MLP: rows [gate; up]."""
    down: Linear
    q_norm: Norm | None
    k_norm: Norm | None


class DenseWeights:
    """All products over all rows. Implements `WeightView`."""

    def __init__(
        self,
        spec: ModelSpec,
        source: Source,
        comm: Comm,
        *,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress | None = None,
    ) -> None:
        """Load this rank's share. Raises UserError where the checkpoint lacks a tensor or has one of another shape."""
        self.spec = spec
        self._comm = comm
        shard = Shard(comm.rank, comm.world)
        shard.check(spec)
        load = _Loader(spec, source, shard, dtype, device, progress)
        self.bytes = 0
        """Bytes of weights that one pass over all layers and the head reads."""
        self._vocabulary = shard.vocabulary(spec)
        self._vocabulary_rows = -(-spec.vocab_size // comm.world)
        heads, kv_heads = shard.query_heads(spec), shard.kv_heads(spec)
        self._heads = (heads.stop - heads.start, kv_heads.stop - kv_heads.start)

        self._embedding = load.vocabulary_rows(load.names.embed)
        self._positions = load.positions() if spec.learned_positions else None
        self._project_in = self._project_out = None
        if spec.embed_size != spec.hidden_size:
            self._project_in = load.projection(load.names.project_in, (spec.hidden_size, spec.embed_size))
            self._project_out = load.projection(load.names.project_out, (spec.embed_size, spec.hidden_size))
        self._layers = [load.layer(i) for i in range(spec.num_layers)]
        self._norms: dict[tuple[int, str], Norm] = {}
        """By layer and kind; the embeddings' and the final norm stand at layer 0."""
        for i in range(spec.num_layers):
            self._norms[i, "attn"] = load.norm(load.names.attn_norm.format(i))
            if spec.parallel_norms != 1:
                self._norms[i, "mlp"] = load.norm(load.names.mlp_norm.format(i))
        if spec.embed_norm:
            self._norms[0, "embed"] = load.norm(load.names.embed_norm)
        if spec.final_norm:
            self._norms[0, "final"] = load.norm(load.names.final_norm)
        if spec.tied_embeddings:
            self._head = make_linear(self._embedding, shared=True)
        else:
            self._head = load.head()
        looked_up = (0 if spec.tied_embeddings else self._embedding.numel()) + (
            0 if self._positions is None else self._positions.numel()
        )
        self.bytes = (load.elements - looked_up) * dtype.itemsize

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:  # [T], [T] -> [T, D]
        if self._comm.world == 1:
            x = F.embedding(ids, self._embedding)
        else:
            local = ids - self._vocabulary.start
            ours = (local >= 0) & (local < self._embedding.shape[0])
            x = F.embedding(torch.where(ours, local, 0), self._embedding) * ours[:, None]
            x = self._comm.all_reduce(x)
        if self._project_in is not None:
            x = self._project_in(x)
        if self._positions is not None:
            x = x + F.embedding(positions + self.spec.position_offset, self._positions)
        return x

    def norm(self, layer: int, which: str, x: Tensor) -> Tensor:  # [T, D] -> [T, D]
        return self._norms[layer, which](x)

    def qkv(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [T, D] -> [T, H, d], [T, K, d], [T, K, d]
        weights = self._layers[layer]
        fused = weights.qkv(x)
        if self.spec.qkv_clip is not None:
            fused = fused.clamp_(-self.spec.qkv_clip, self.spec.qkv_clip)
        heads, kv_heads = self._heads
        q, k, v = fused.view(x.shape[0], heads + 2 * kv_heads, self.spec.head_dim).split((heads, kv_heads, kv_heads), 1)  # type: ignore[no-untyped-call]
        if weights.q_norm is not None and weights.k_norm is not None:
            q, k = weights.q_norm(q), weights.k_norm(k)
        return q, k, v

    def out(self, layer: int, heads: Tensor) -> Tensor:  # [T, H, d] -> [T, D]
        return self._layers[layer].out(heads.flatten(1))

    def mlp(self, layer: int, x: Tensor) -> Tensor:  # [T, D] -> [T, D]
        weights = self._layers[layer]
        hidden = weights.up(x)
        act = ACTIVATIONS[self.spec.activation]
        if self.spec.gated:
            gate, up = hidden.chunk(2, dim=-1)
            return weights.down(act(gate) * up)
        return weights.down(act(hidden))

    def head(self, x: Tensor) -> Tensor:  # [T, D] -> [T, V_local]
        if self._project_out is not None:
            x = self._project_out(x)
        logits = self._head(x)
        missing = self._vocabulary_rows - logits.shape[1]
        return F.pad(logits, (0, missing), value=float("-inf")) if missing else logits


class _Loader:
    """Reads one rank's share of one checkpoint, tensor by tensor."""

    def __init__(
        self, spec: ModelSpec, source: Source, shard: Shard, dtype: torch.dtype, device: torch.device, progress: Progress | None
    ) -> None:
        self.names: Names = names_for(spec)
        self._prefix = find_prefix(self.names, source.names())
        self._spec, self._source, self._shard = spec, source, shard
        self._dtype, self._device, self._progress = dtype, device, progress
        self.elements = 0

    def layer(self, index: int) -> Layer:
        spec, names, shard = self._spec, self.names, self._shard
        heads = shard.query_heads(spec)
        head_columns = slice(heads.start * spec.head_dim, heads.stop * spec.head_dim)
        neurons = shard.span(spec.intermediate_size)
        ups = [names.gate, names.up] if spec.gated else [names.up]
        return Layer(
            qkv=self._qkv(index),
            out=self._row_parallel(names.out.format(index), head_columns, spec.num_heads * spec.head_dim, spec.out_bias),
            up=self._stacked([stem.format(index) for stem in ups], neurons, spec.mlp_bias),
            down=self._row_parallel(names.down.format(index), neurons, spec.intermediate_size, spec.mlp_bias),
            q_norm=self.norm(names.q_norm.format(index), spec.head_dim) if spec.qk_norm == "head" else None,
            k_norm=self.norm(names.k_norm.format(index), spec.head_dim) if spec.qk_norm == "head" else None,
        )

    def norm(self, stem: str, size: int | None = None) -> Norm:
        spec, size = self._spec, size or self._spec.hidden_size
        weight = self._vector(f"{stem}.weight", size) if spec.norm_affine else None
        bias = self._vector(f"{stem}.bias", size) if spec.norm_affine and spec.norm_bias else None
        return Norm(weight, bias, spec.norm_eps, spec.norm == "rms")

    def projection(self, stem: str, shape: tuple[int, int]) -> Linear:
        """A small product without bias that every rank holds whole (OPT-350m's projections)."""
        name = self._name(f"{stem}.weight")
        weight = self._empty(shape)
        self._read(name, weight)
        return make_linear(self._place(weight))

    def positions(self) -> Tensor:
        spec = self._spec
        table = self._empty((spec.max_context + spec.position_offset, spec.hidden_size))
        self._read(self._name(f"{self.names.positions}.weight"), table)
        return self._place(table)

    def vocabulary_rows(self, stem: str, *, prefixed: bool = True) -> Tensor:
        spec, rows = self._spec, self._shard.vocabulary(self._spec)
        table = self._empty((rows.stop - rows.start, spec.embed_size))
        name = f"{stem}.weight"
        self._read(self._name(name) if prefixed else name, table, rows=rows, whole=(spec.vocab_size, spec.embed_size))
        return self._place(table)

    def head(self) -> Linear:
        return make_linear(self.vocabulary_rows(self.names.head, prefixed=False))

    def _qkv(self, index: int) -> Linear:
        spec, shard = self._spec, self._shard
        heads, kv_heads = shard.query_heads(spec), shard.kv_heads(spec)
        rows = (heads.stop - heads.start + 2 * (kv_heads.stop - kv_heads.start)) * spec.head_dim
        weight = self._empty((rows, spec.hidden_size))
        bias = self._empty((rows,)) if spec.qkv_bias else None
        for piece in qkv_pieces(spec, self.names, index, shard):
            target = slice(piece.target, piece.target + piece.rows.stop - piece.rows.start)
            whole = piece.whole_rows, spec.hidden_size
            self._read(self._name(f"{piece.stem}.weight"), weight[target], rows=piece.rows, whole=whole)
            if bias is not None:
                self._read(self._name(f"{piece.stem}.bias"), bias[target], rows=piece.rows, whole=whole[:1])
        return make_linear(self._place(weight), None if bias is None else self._place(bias))

    def _stacked(self, stems: list[str], rows: slice, with_bias: bool) -> Linear:
        """The same rows of several matrices, one below the other: a column-parallel product."""
        size, spec = rows.stop - rows.start, self._spec
        whole = spec.intermediate_size, spec.hidden_size
        weight = self._empty((len(stems) * size, spec.hidden_size))
        bias = self._empty((len(stems) * size,)) if with_bias else None
        for i, stem in enumerate(stems):
            target = slice(i * size, (i + 1) * size)
            self._read(self._name(f"{stem}.weight"), weight[target], rows=rows, whole=whole)
            if bias is not None:
                self._read(self._name(f"{stem}.bias"), bias[target], rows=rows, whole=whole[:1])
        return make_linear(self._place(weight), None if bias is None else self._place(bias))

    def _row_parallel(self, stem: str, columns: slice, whole_columns: int, with_bias: bool) -> Linear:
        """Some columns of a matrix; the product is one part of a sum over ranks, to which rank 0 adds the bias."""
        weight = self._empty((self._spec.hidden_size, columns.stop - columns.start))
        self._read(self._name(f"{stem}.weight"), weight, cols=columns, whole=(self._spec.hidden_size, whole_columns))
        bias = self._vector(f"{stem}.bias", self._spec.hidden_size) if with_bias and self._shard.rank == 0 else None
        return make_linear(self._place(weight), bias)

    def _vector(self, stem: str, size: int) -> Tensor:
        vector = self._empty((size,))
        self._read(self._name(stem), vector)
        return self._place(vector)

    def _name(self, name: str) -> str:
        return self._prefix + name

    def _empty(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=self._dtype)

    def _place(self, staged: Tensor) -> Tensor:
        self.elements += staged.numel()
        return staged.to(self._device)

    def _read(
        self,
        name: str,
        out: Tensor,
        *,
        rows: slice | None = None,
        cols: slice | None = None,
        whole: tuple[int, ...] | None = None,
    ) -> None:
        """Fill `out` from a slice of a tensor of shape `whole` (that of `out` if not given)."""
        if name not in self._source:
            raise UserError(f"the checkpoint has no tensor {name}, which its config calls for: use a complete copy of the model")
        shape, wanted = self._source.shape(name), whole or tuple(out.shape)
        if shape != wanted:
            raise UserError(
                f"tensor {name} has shape {list(shape)}, but the model's config calls for {list(wanted)}: "
                "take config.json and weights from the same copy of the model"
            )
        self._source.read(name, rows, cols, out=out)
        if self._progress is not None:
            self._progress(out.numel() * out.element_size())
