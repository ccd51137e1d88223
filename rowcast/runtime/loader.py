"""Reads one rank's share of a checkpoint, tensor by tensor, straight into the place where it stays.

What goes to a GPU, or into another order, is read in the order of its bytes, through a few buffers of some megabytes (`row_blocks`);
it is put into its order, transposed and cut where it stays.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from rowcast.errors import UserError
from rowcast.kernels.linear import Linear, make_linear
from rowcast.kernels.packed import Packed
from rowcast.runtime.checkpoint.safetensors_file import SafetensorsSource
from rowcast.runtime.norm import Norm
from rowcast.runtime.protocols import PackedTensors, Source
from rowcast.runtime.row_blocks import row_blocks
from rowcast.runtime.shard import Shard
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.weight_map import Names, find_prefix, names_for, qkv_pieces

Progress = Callable[[int], None]
"""Called with the number of bytes that were just placed."""

READERS = 8
"""Threads that read plain files for a GPU; other sources have threads of their own. For the CPU one reads while others place."""


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
        self.made = torch.device("cpu")
        """Where values come to be: files are read by the CPU, random weights are made where they stay."""
        if hasattr(source, "device"):
            self.made = source.device or device
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
        """Rows of a matrix of shape `whole` into `out` [n, D], on any device."""
        self.read(self.name(stem) if prefixed else stem, out, rows=rows, whole=whole)

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

        Reads all of it: rows of a seeded permutation lie everywhere.
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
        name = self.name(f"{stem}.weight")
        self.check(name, whole)
        tables = [_Dealt(out, order) for out, order in outs]
        for span, block in self._blocks(name, slice(0, whole[0]), None, whole[1:], [out for out, _ in outs]):
            blocks: dict[torch.device, Tensor] = {}
            for table in tables:
                device = table.out.device
                if device not in blocks:
                    moved = block.to(device, non_blocking=not block.is_cuda)
                    blocks[device] = moved.T.contiguous() if columns else moved
                self._placed(table.columns(span, blocks[device]) if columns else table.rows(span, blocks[device]))

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
        return torch.empty(shape, dtype=self._dtype, device=self._device)

    def place(self, read: Tensor) -> Tensor:
        """Count what has been read."""
        self.elements += read.numel()
        return read

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
        self.check(name, whole or tuple(out.shape))
        if out.device == self.made:
            self._source.read(name, rows, cols, out=out)
        else:
            rows = rows or slice(0, len(out))
            for span, block in self._blocks(name, rows, cols, tuple(out.shape[1:]), [out]):
                out[span.start - rows.start : span.stop - rows.start].copy_(block, non_blocking=not block.is_cuda)
        self._placed(out.nbytes)

    def _blocks(
        self, name: str, rows: slice, cols: slice | None, row_shape: tuple[int, ...], outs: Sequence[Tensor]
    ) -> Iterator[tuple[slice, Tensor]]:
        gpus = {out.device for out in outs if out.is_cuda} if self.made.type == "cpu" else set()
        readers = READERS if gpus and isinstance(self._source, SafetensorsSource) else int(self.made.type == "cpu")
        return row_blocks(
            self._source, name, rows, cols, row_shape, dtype=self._dtype, device=self.made, readers=readers, gpus=gpus
        )

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


class _Dealt:
    """A table whose rows are some of a matrix's rows, or of its columns, in an order of its own."""

    def __init__(self, out: Tensor, order: Tensor) -> None:
        """out [n, D] on any device, order [n]."""
        self.out = out
        ids, places = order.sort()
        self._sorted = ids.tolist()
        self._order, self._ids, self._places = (each.to(out.device) for each in (order, ids, places))

    def rows(self, span: slice, block: Tensor) -> int:
        """The matrix's rows `span` are block [m, D], where the table is: place those that it has. Returns their bytes."""
        low, high = (bisect_left(self._sorted, row) for row in (span.start, span.stop))
        if low < high:
            found = block.index_select(0, self._ids[low:high] - span.start)
            self.out.index_copy_(0, self._places[low:high], found)
        return (high - low) * block[0].nbytes

    def columns(self, span: slice, turned: Tensor) -> int:
        """The same with columns for rows: the matrix's rows `span` are turned [C, m], transposed."""
        self.out[:, span] = turned.index_select(0, self._order)
        return len(self._order) * turned[0].nbytes
