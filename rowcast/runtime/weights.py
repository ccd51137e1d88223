"""The plain rung's weight view: one rank's share of all weights, resident on one device, and what every view has around its layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rowcast.kernels.linear import Linear, make_linear
from rowcast.kernels.rows import ACTIVATIONS
from rowcast.runtime.loader import Loader, Progress
from rowcast.runtime.norm import Norm
from rowcast.runtime.protocols import ALL_HEADS, Comm, Heads, KVView, Reads, Source, Tokens
from rowcast.runtime.shard import Shard
from rowcast.runtime.spec import ModelSpec


class VocabularyRows(Protocol):
    """Embedding and LM head: one rank's rows of the vocabulary."""

    rows: Tensor | None
    """The LM head's, [V_local, E], on the device; None where they are held in another layout or place, or not at all."""
    looked_up: int
    """Elements that are looked up and never multiplied with."""
    head_elements: int
    """Read by a pass for its logits."""

    def lookup(self, ids: Tensor) -> Tensor:
        """Rows of the embedding, [T] int64 from 0 to V_local - 1 -> [T, E]."""
        ...

    def product(self, x: Tensor) -> Tensor:
        """x [T, E] times the LM head's rows -> [T, V_local]."""
        ...


class Vocabulary:
    """Implements `VocabularyRows`, all on the device."""

    def __init__(self, spec: ModelSpec, load: Loader, head: bool) -> None:
        """`head`: with the LM head."""
        self._embedding = load.vocabulary_rows(load.names.embed)
        self.rows: Tensor | None = self._embedding if spec.tied_embeddings else None
        self._head: Linear | None = None
        self.head_elements = 0
        if head:
            rows = self._embedding if spec.tied_embeddings else load.vocabulary_rows(load.names.head, prefixed=False)
            self._head = make_linear(rows, shared=spec.tied_embeddings or rows.dtype == torch.float32)
            if self._head.weight is rows:
                self.rows = rows
            self.head_elements = rows.numel()
        self.looked_up = 0 if spec.tied_embeddings and head else self._embedding.numel()

    def lookup(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self._embedding)

    def product(self, x: Tensor) -> Tensor:
        assert self._head is not None
        return self._head(x)


class Outer:
    """What lies around the layers' products: embeddings, norms, LM head. Views of one model share it."""

    def __init__(
        self, spec: ModelSpec, load: Loader, comm: Comm, *, head: bool = True, vocabulary: VocabularyRows | None = None
    ) -> None:
        """`head`: with the LM head; else none of the views that share it may ask for `head`, and rows that only it has are not read.
        `vocabulary`: its rows, where they have been read already, by `load`."""
        self.spec = spec
        self._comm = comm
        before = load.elements - (0 if vocabulary is None else vocabulary.looked_up + vocabulary.head_elements)
        self._span = load.shard.vocabulary(spec)
        self._vocabulary_rows = -(-spec.vocab_size // comm.world)
        self.vocabulary = vocabulary or Vocabulary(spec, load, head)
        self._positions = load.positions() if spec.learned_positions else None
        self._project_in = self._project_out = None
        if spec.embed_size != spec.hidden_size:
            self._project_in = load.projection(load.names.project_in, (spec.hidden_size, spec.embed_size))
            self._project_out = load.projection(load.names.project_out, (spec.embed_size, spec.hidden_size))
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
        self.head_rows = self.vocabulary.rows
        """The LM head's rows of this rank, [V_local, E]; None where they are held elsewhere or in a library's layout only."""
        self.head_elements = self.vocabulary.head_elements
        """Read by a pass for its logits."""
        looked_up = self.vocabulary.looked_up + (0 if self._positions is None else self._positions.numel())
        self.elements = load.elements - before - looked_up
        """Read by a pass: all but rows that are looked up."""

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:  # [T], [T] -> [T, D]
        if self._comm.world == 1:
            x = self.vocabulary.lookup(ids)
        else:
            local = ids - self._span.start
            ours = (local >= 0) & (local < self._span.stop - self._span.start)
            x = self.vocabulary.lookup(torch.where(ours, local, 0)) * ours[:, None]
            x = self._comm.all_reduce(x)
        if self._project_in is not None:
            x = self._project_in(x)
        if self._positions is not None:
            x = x + F.embedding(positions + self.spec.position_offset, self._positions)
        return x

    def norm_of(self, layer: int, which: str) -> Norm:
        """As `WeightView`."""
        return self._norms[layer, which]

    def head_input(self, x: Tensor) -> Tensor:
        """Hidden states after the final norm as the LM head's rows take them: [T, D] -> [T, E]."""
        return x if self._project_out is None else self._project_out(x)

    def head(self, x: Tensor) -> Tensor:  # [T, D] -> [T, V_local]
        return self.pad(self.vocabulary.product(self.head_input(x)))

    def pad(self, logits: Tensor) -> Tensor:
        """Logits of this rank's rows -> as many as every rank has."""
        missing = self._vocabulary_rows - logits.shape[1]
        return F.pad(logits, (0, missing), value=float("-inf")) if missing else logits


@dataclass(slots=True)
class _Layer:
    """One layer's share of the products, each a map [in] -> [out]."""

    qkv: Linear
    out: Linear
    up: Linear
    """With a gated MLP: rows [gate; up]."""
    down: Linear


class DenseWeights:
    """All products over all rows. Implements `WeightView`."""

    on_device = True

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
        shard = Shard(comm.rank, comm.world)
        shard.check(spec)
        load = Loader(spec, source, shard, dtype, device, progress)
        self.outer = Outer(spec, load, comm)
        inside = load.elements
        self.split = HeadSplit(spec, load)
        self._layers = [self._layer(load, i) for i in range(spec.num_layers)]
        self.bytes = (self.outer.elements + load.elements - inside) * dtype.itemsize
        """Bytes of weights that one pass over all layers and the head reads."""
        self._passes = 0
        self.embed, self.norm_of, self.head = self.outer.embed, self.outer.norm_of, self.outer.head

    def begin(self, tokens: Tokens, kv: KVView) -> None:
        self._passes += 1

    def reads(self) -> Reads:
        passes, self._passes = self._passes, 0
        return Reads(bytes=passes * self.bytes)

    def qkv(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [T, D] -> [T, H, d], [T, K, d], [T, K, d]
        return self.split.apart(layer, self._layers[layer].qkv(x))

    def heads(self, layer: int) -> Heads:
        return ALL_HEADS

    def out(self, layer: int, heads: Tensor, residual: Tensor | None = None) -> Tensor:  # [T, H, d] -> [T, D]
        return plus(self._layers[layer].out(heads.flatten(1)), residual)

    def mlp(self, layer: int, x: Tensor, residual: Tensor | None = None) -> Tensor:  # [T, D] -> [T, D]
        weights = self._layers[layer]
        hidden = weights.up(x)
        act = ACTIVATIONS[self.spec.activation]
        if self.spec.gated:
            gate, up = hidden.chunk(2, dim=-1)
            return plus(weights.down(act(gate) * up), residual)
        return plus(weights.down(act(hidden)), residual)

    def _layer(self, load: Loader, index: int) -> _Layer:
        spec, names, shard = self.spec, load.names, load.shard
        heads = shard.query_heads(spec)
        head_columns = slice(heads.start * spec.head_dim, heads.stop * spec.head_dim)
        neurons = shard.span(spec.intermediate_size)
        ups = [names.gate, names.up] if spec.gated else [names.up]
        return _Layer(
            qkv=make_linear(*load.qkv(index)),
            out=load.row_parallel(names.out.format(index), head_columns, spec.num_heads * spec.head_dim, spec.out_bias),
            up=load.stacked([stem.format(index) for stem in ups], neurons, spec.mlp_bias),
            down=load.row_parallel(names.down.format(index), neurons, spec.intermediate_size, spec.mlp_bias),
        )


def plus(y: Tensor, residual: Tensor | None) -> Tensor:
    """y + residual, in the place of y."""
    return y if residual is None else y.add_(residual)


class HeadSplit:
    """From fused products to heads: clip, split, norms of q and k."""

    def __init__(self, spec: ModelSpec, load: Loader) -> None:
        self._spec = spec
        heads, kv_heads = load.shard.query_heads(spec), load.shard.kv_heads(spec)
        self.heads, self.kv_heads = heads.stop - heads.start, kv_heads.stop - kv_heads.start
        normed = range(spec.num_layers) if spec.qk_norm == "head" else ()
        self._q_norms = [load.norm(load.names.q_norm.format(i), spec.head_dim) for i in normed]
        self._k_norms = [load.norm(load.names.k_norm.format(i), spec.head_dim) for i in normed]

    def apart(self, layer: int, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Products [T, (H + 2 K) d], which may be written to -> q [T, H, d], k [T, K, d], v [T, K, d]."""
        sizes = tuple(count * self._spec.head_dim for count in (self.heads, self.kv_heads, self.kv_heads))
        q, k, v = fused.split(sizes, 1)  # type: ignore[no-untyped-call]
        return self.queries(layer, q), self.keys(layer, k), self.values(v)

    def queries(self, layer: int, q: Tensor) -> Tensor:  # [T, n d] -> [T, n, d]
        q = self.values(q)
        return self._q_norms[layer](q) if self._q_norms else q

    def keys(self, layer: int, k: Tensor) -> Tensor:  # [T, n d] -> [T, n, d]
        k = self.values(k)
        return self._k_norms[layer](k) if self._k_norms else k

    def values(self, v: Tensor) -> Tensor:  # [T, n d] -> [T, n, d]
        clip = self._spec.qkv_clip
        return (v if clip is None else v.clamp_(-clip, clip)).view(v.shape[0], -1, self._spec.head_dim)
