"""Reads one rank's share of a checkpoint, tensor by tensor, straight into the place where it stays.

Host memory never holds more than the shard and one tensor's worth of staging on the way to a GPU or to another layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rowcast.errors import UserError
from rowcast.kernels.linear import Linear, make_linear
from rowcast.kernels.packed import Packed
from rowcast.runtime.norm import Norm
from rowcast.runtime.protocols import PackedTensors, Source
from rowcast.runtime.shard import Shard
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.weight_map import Names, find_prefix, names_for, qkv_pieces

Progress = Callable[[int], None]
"""Called with the number of bytes that were just placed."""

STAGING_ELEMENTS = 1 << 22
"""Most elements on their way into rows of another order."""


class Loader:
    """Reads one rank's share of one checkpoint, tensor by tensor."""

    def __init__(
        self, spec: ModelSpec, source: Source, shard: Shard, dtype: torch.dtype, device: torch.device, progress: Progress | None
    ) -> None:
        self.names: Names = names_for(spec)
        self._prefix = find_prefix(self.names, source.names())
        self.shard = shard
        self._spec, self._source = spec, source
        self._dtype, self._device, self._progress = dtype, device, progress
        self.staging = torch.device("cpu")
        if hasattr(source, "device"):  # random weights are made where they stay
            self.staging = source.device or device
        self.elements = 0

    def norm(self, stem: str, size: int | None = None) -> Norm:
        spec, size = self._spec, size or self._spec.hidden_size
        weight = self.vector(f"{stem}.weight", size) if spec.norm_affine else None
        bias = self.vector(f"{stem}.bias", size) if spec.norm_affine and spec.norm_bias else None
        return Norm(weight, bias, spec.norm_eps, spec.norm == "rms")

    def projection(self, stem: str, shape: tuple[int, int]) -> Linear:
        """A small product without bias that every rank holds whole (OPT-350m's projections)."""
        name = self.name(f"{stem}.weight")
        weight = self.empty(shape)
        self.read(name, weight)
        return make_linear(self.place(weight))

    def positions(self) -> Tensor:
        spec = self._spec
        table = self.empty((spec.max_context + spec.position_offset, spec.hidden_size))
        self.read(self.name(f"{self.names.positions}.weight"), table)
        return self.place(table)

    def vocabulary_rows(self, stem: str, *, prefixed: bool = True) -> Tensor:
        spec, rows = self._spec, self.shard.vocabulary(self._spec)
        table = self.empty((rows.stop - rows.start, spec.embed_size))
        name = f"{stem}.weight"
        self.read(self.name(name) if prefixed else name, table, rows=rows, whole=(spec.vocab_size, spec.embed_size))
        return self.place(table)

    def qkv(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Weight [(H + 2 K) d, D] and bias, q above k above v."""
        spec, shard = self._spec, self.shard
        heads, kv_heads = shard.query_heads(spec), shard.kv_heads(spec)
        rows = (heads.stop - heads.start + 2 * (kv_heads.stop - kv_heads.start)) * spec.head_dim
        weight = self.empty((rows, spec.hidden_size))
        bias = self.empty((rows,)) if spec.qkv_bias else None
        for piece in qkv_pieces(spec, self.names, index, shard):
            target = slice(piece.target, piece.target + piece.rows.stop - piece.rows.start)
            whole = piece.whole_rows, spec.hidden_size
            self.read(self.name(f"{piece.stem}.weight"), weight[target], rows=piece.rows, whole=whole)
            if bias is not None:
                self.read(self.name(f"{piece.stem}.bias"), bias[target], rows=piece.rows, whole=whole[:1])
        return self.place(weight), None if bias is None else self.place(bias)

    def qkv_spans(self, index: int, outs: Sequence[tuple[slice, Tensor]]) -> Tensor | None:
        """The weights of `qkv` into tables [n, D] on any devices, each some neighbouring rows of the whole; returns the bias."""
        spec, shard = self._spec, self.shard
        heads, kv_heads = shard.query_heads(spec), shard.kv_heads(spec)
        rows = (heads.stop - heads.start + 2 * (kv_heads.stop - kv_heads.start)) * spec.head_dim
        bias = self.empty((rows,)) if spec.qkv_bias else None
        for piece in qkv_pieces(spec, self.names, index, shard):
            size, whole = piece.rows.stop - piece.rows.start, (piece.whole_rows, spec.hidden_size)
            for span, out in outs:
                low, high = max(span.start, piece.target), min(span.stop, piece.target + size)
                if low < high:
                    source = slice(piece.rows.start + low - piece.target, piece.rows.start + high - piece.target)
                    self.into(f"{piece.stem}.weight", out[low - span.start : high - span.start], source, whole)
            if bias is not None:
                target = bias[piece.target : piece.target + size]
                self.read(self.name(f"{piece.stem}.bias"), target, rows=piece.rows, whole=whole[:1])
        return None if bias is None else self.place(bias)

    def into(self, stem: str, out: Tensor, rows: slice, whole: tuple[int, int], *, prefixed: bool = True) -> None:
        """Rows of a matrix of shape `whole` straight into `out` [n, D]; where that is another memory, some megabytes at a time."""
        name = self.name(stem) if prefixed else stem
        if out.device == self.staging:
            self.read(name, out, rows=rows, whole=whole)
            return
        piece = max(1, STAGING_ELEMENTS // whole[1])
        for start in range(rows.start, rows.stop, piece):
            span = slice(start, min(start + piece, rows.stop))
            staged = self.empty((span.stop - span.start, whole[1]))
            self.read(name, staged, rows=span, whole=whole)
            out[start - rows.start : span.stop - rows.start].copy_(staged)

    def stacked(self, stems: list[str], rows: slice, with_bias: bool) -> Linear:
        """The same rows of several matrices, one below the other: a column-parallel product."""
        size, spec = rows.stop - rows.start, self._spec
        whole = spec.intermediate_size, spec.hidden_size
        weight = self.empty((len(stems) * size, spec.hidden_size))
        bias = self.empty((len(stems) * size,)) if with_bias else None
        for i, stem in enumerate(stems):
            target = slice(i * size, (i + 1) * size)
            self.read(self.name(f"{stem}.weight"), weight[target], rows=rows, whole=whole)
            if bias is not None:
                self.read(self.name(f"{stem}.bias"), bias[target], rows=rows, whole=whole[:1])
        return make_linear(self.place(weight), None if bias is None else self.place(bias))

    def row_parallel(self, stem: str, columns: slice, whole_columns: int, with_bias: bool) -> Linear:
        """Some columns of a matrix; the product is one part of a sum over ranks, to which rank 0 adds the bias."""
        weight = self.empty((self._spec.hidden_size, columns.stop - columns.start))
        self.read(self.name(f"{stem}.weight"), weight, cols=columns, whole=(self._spec.hidden_size, whole_columns))
        return make_linear(self.place(weight), self.part_bias(stem) if with_bias else None)

    def part_bias(self, stem: str) -> Tensor | None:
        """The bias [D] of a sum over ranks: rank 0 adds it."""
        return self.vector(f"{stem}.bias", self._spec.hidden_size) if self.shard.rank == 0 else None

    def rows(self, stem: str, out: Tensor, order: Tensor, whole: tuple[int, int], *, columns: bool = False) -> None:
        """Fill `out` [n, D], on the device, with the rows `order` [n] of a matrix of shape `whole`; of its transpose with `columns`.

        Reads all of it, some megabytes at a time: rows of a seeded permutation lie everywhere.
        """
        self.deal(stem, [(out, order)], whole, columns=columns)
        self.elements += out.numel()

    def columns(self, stem: str, order: Tensor, whole: tuple[int, int]) -> Tensor:
        """The columns `order` [n] of a matrix of shape `whole`, [R, n], on the device: rows of its transpose, as `rows` reads them."""
        turned = torch.empty((len(order), whole[0]), dtype=self._dtype, device=self._device)
        self.deal(stem, [(turned, order)], whole, columns=True)
        return turned.T

    def deal(self, stem: str, outs: Sequence[tuple[Tensor, Tensor]], whole: tuple[int, int], *, columns: bool = False) -> None:
        """`rows` of several tables [n, D], on any devices, each with its own `order` [n], in one reading of the matrix."""
        name, total = self.name(f"{stem}.weight"), whole[1] if columns else whole[0]
        targets = [torch.full((total,), -1).index_copy_(0, order, torch.arange(len(order))) for _, order in outs]
        width = whole[0] if columns else whole[1]
        piece = max(1, STAGING_ELEMENTS // width)
        for start in range(0, total, piece):
            span = slice(start, min(start + piece, total))
            staged = self.empty((span.stop - start, width))
            if columns:
                self._read(name, staged.T, cols=span, whole=whole)
            else:
                self._read(name, staged, rows=span, whole=whole)
            for (out, _), target in zip(outs, targets, strict=True):
                ours = (target[span] >= 0).nonzero()[:, 0]
                out[target[span][ours].to(out.device)] = staged[ours].to(out.device)
                self._placed(len(ours) * staged[0].nbytes)

    def matrix(self, stem: str) -> Tensor:
        """A whole matrix as the checkpoint has it, on the device. `stem` has its prefix."""
        name = f"{stem}.weight"
        if name not in self._source:
            self.check(name, ())
        found = self._source.read(name)
        self._placed(found.numel() * self._dtype.itemsize)
        return found.to(self._device)

    def packed(
        self, name: str, rows: slice, columns: slice, whole: tuple[int, int], device: torch.device | None = None
    ) -> Packed:
        """A part of a matrix of shape `whole` as the checkpoint packs it, on `device` (None: the loader's). `name` has its prefix;
        columns are whole groups."""
        assert isinstance(self._source, PackedTensors)
        self.check(f"{name}.weight", whole)
        found = self._source.packed(f"{name}.weight", rows, columns).to(device or self._device)
        self._placed(found.rows * found.columns * self._dtype.itemsize)  # what it stands for: that is what is to come
        return found

    def vector(self, stem: str, size: int) -> Tensor:
        vector = self.empty((size,))
        self.read(self.name(stem), vector)
        return self.place(vector)

    def name(self, name: str) -> str:
        return self._prefix + name

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=self._dtype, device=self.staging)

    def place(self, staged: Tensor) -> Tensor:
        self.elements += staged.numel()
        return staged.to(self._device)

    def read(
        self,
        name: str,
        out: Tensor,
        *,
        rows: slice | None = None,
        cols: slice | None = None,
        whole: tuple[int, ...] | None = None,
    ) -> None:
        """Fill `out`, in its place, from a slice of a tensor of shape `whole` (that of `out` if not given)."""
        self._read(name, out, rows=rows, cols=cols, whole=whole)
        self._placed(out.nbytes)

    def _read(
        self,
        name: str,
        out: Tensor,
        *,
        rows: slice | None = None,
        cols: slice | None = None,
        whole: tuple[int, ...] | None = None,
    ) -> None:
        self.check(name, whole or tuple(out.shape))
        self._source.read(name, rows, cols, out=out)

    def check(self, name: str, wanted: tuple[int, ...]) -> None:
        """Raise UserError where there is no such tensor of that shape."""
        if name not in self._source:
            raise UserError(f"the checkpoint has no tensor {name}, which its config calls for: use a complete copy of the model")
        shape = self._source.shape(name)
        if shape != wanted:
            raise UserError(
                f"tensor {name} has shape {list(shape)}, but the model's config calls for {list(wanted)}: "
                "take config.json and weights from the same copy of the model"
            )

    def _placed(self, count: int) -> None:
        if self._progress is not None:
            self._progress(count)
