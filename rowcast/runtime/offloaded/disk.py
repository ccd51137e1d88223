"""Layers that neither GPU nor host memory has room for: their matrices stay in the checkpoint's files, as these have them.

A pass reads each once, by rows, ahead of their use. Every token uses all of them: nothing is chosen of what lies on disk.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import accumulate, chain

import torch
from torch import Tensor

from rowcast.errors import UserError
from rowcast.kernels.rows import ACTIVATIONS
from rowcast.offload.disk import DiskPiece, DiskReader, sequential_rate
from rowcast.runtime.banks import product
from rowcast.runtime.checkpoint.ranged_file import RangedFile
from rowcast.runtime.checkpoint.safetensors_file import DTYPES, SafetensorsSource
from rowcast.runtime.checkpoint.safetensors_header import StoredTensor
from rowcast.runtime.loader import Loader
from rowcast.runtime.offloaded.parts import Ring
from rowcast.runtime.protocols import Source
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.weight_map import find_prefix, names_for, qkv_pieces
from rowcast.runtime.weights import plus


class UnchangedFile:
    """Implements `offload.disk.Readable`: a file that has to stay as it is while it is read again and again."""

    def __init__(self, file: RangedFile) -> None:
        self._file = file
        self._stamp = self._now()

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Raises UserError where the file has changed since this object was made, and where it cannot be read."""
        failed: Exception | None = None
        try:
            self._file.read_into(buffer, offset)
        except (OSError, UserError) as error:
            failed = error
        try:
            changed = self._now() != self._stamp
        except OSError as error:
            changed, failed = False, failed or error
        if changed:
            raise UserError(
                f"{self._file.path} was changed while the model reads its weights from it: start again, and leave the file as it is"
            ) from failed
        if isinstance(failed, OSError):
            raise UserError(
                f"{self._file.path} cannot be read any more ({failed.strerror}): check the disk and start again"
            ) from failed
        if failed is not None:
            raise failed

    def _now(self) -> tuple[int, int]:
        found = os.fstat(self._file.fileno())
        return found.st_size, found.st_mtime_ns


def stored(source: Source, name: str, dtype: torch.dtype) -> StoredTensor:
    """Where a tensor lies. Raises UserError where its bytes are not those that a pass computes with."""
    if not isinstance(source, SafetensorsSource):
        raise UserError(
            "only weights in safetensors files can be read from disk while the model runs: use such a copy of the model"
        )
    if name not in source:
        raise UserError(f"the checkpoint has no tensor {name}, which its config calls for: use a complete copy of the model")
    tensor = source.stored(name)
    if DTYPES[tensor.kind] != dtype:
        kept, wanted = (str(each).removeprefix("torch.") for each in (DTYPES[tensor.kind], dtype))
        raise UserError(
            f"{name} is stored as {kept} and would have to be converted to {wanted} in every pass, which is not done for weights on "
            f"disk: use --dtype {kept}"
        )
    return tensor


def disk_rate(source: Source, spec: ModelSpec, dtype: torch.dtype) -> float:
    """Bytes/s at which the layers' matrices can be read from disk, measured in half a second. Raises UserError where they cannot be."""
    names = names_for(spec)
    stems = {*names.qkv, names.out, names.up, names.down} | ({names.gate} if spec.gated else set())
    prefix = find_prefix(names, source.names())
    tensors = [
        stored(source, f"{prefix}{stem.format(i)}.weight", dtype) for i in range(spec.num_layers) for stem in sorted(stems)
    ]
    try:
        return sequential_rate(tensors[-1].file.path)
    except OSError as error:
        raise UserError(f"{tensors[-1].file.path} cannot be read ({error.strerror}): check the disk") from error


class DiskSource:
    """What the tables of one model have in common."""

    def __init__(self, source: Source, load: Loader, reader: DiskReader, ring: Ring) -> None:
        """Precondition: one rank holds it all."""
        self.ring = ring
        self._source, self._load, self._reader = source, load, reader
        self._files: dict[int, UnchangedFile] = {}

    def table(self, stem: str, whole: tuple[int, int]) -> DiskTable:
        """All rows of a matrix of that shape. Raises UserError as `stored`, and for another shape."""
        name = self._load.name(f"{stem}.weight")
        self._load.check(name, whole)
        tensor = stored(self._source, name, self.ring.dtype)
        file = self._files.setdefault(id(tensor.file), UnchangedFile(tensor.file))
        row_bytes = whole[1] * self.ring.dtype.itemsize
        each = max(1, self.ring.streamer.slot_bytes // row_bytes)
        pieces: list[tuple[slice, DiskPiece]] = []
        for start in range(0, whole[0], each):
            rows = slice(start, min(start + each, whole[0]))
            size = (rows.stop - rows.start) * row_bytes
            pieces.append((rows, DiskPiece((name, start), file, tensor.offset + start * row_bytes, size, self._reader)))
        return DiskTable(pieces, self.ring)


class DiskTable:
    """A matrix [R, C] on disk."""

    def __init__(self, pieces: Sequence[tuple[slice, DiskPiece]], ring: Ring) -> None:
        self._pieces, self._ring = pieces, ring

    @property
    def pieces(self) -> list[DiskPiece]:
        """In the order of their use."""
        return [piece for _, piece in self._pieces]

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:  # [T, C] -> [T, R]
        found, ring = [], self._ring
        for rows, piece in self._pieces:
            table = ring.streamer.take(piece).view(ring.dtype).view(-1, x.shape[1])
            found.append(product(table, x, None if bias is None else bias[rows]))
            ring.streamer.release(piece)
        return found[0] if len(found) == 1 else torch.cat(found, 1)


class DiskAttention:
    """As `PlacedAttention`, all of it on disk."""

    def __init__(self, load: Loader, spec: ModelSpec, index: int, disk: DiskSource) -> None:
        pieces = list(qkv_pieces(spec, load.names, index, load.shard))
        wholes = {piece.stem: piece.whole_rows for piece in pieces}  # in the order of first use
        firsts = dict(zip(wholes, accumulate(wholes.values(), initial=0), strict=False))
        self._tables = [disk.table(stem, (rows, spec.hidden_size)) for stem, rows in wholes.items()]
        order = torch.empty(sum(wholes.values()), dtype=torch.int64)
        for piece in pieces:
            rows = torch.arange(piece.rows.start, piece.rows.stop) + firsts[piece.stem]
            order[piece.target : piece.target + len(rows)] = rows
        self._order = None if torch.equal(order, torch.arange(len(order))) else order.to(disk.ring.streamer.device)
        """Of products by the files' rows, those of q, k and v."""
        self._qkv_bias = load.qkv_spans(index, [])
        stem = load.names.out.format(index)
        self._out = disk.table(stem, (spec.hidden_size, spec.num_heads * spec.head_dim))
        self._out_bias = load.part_bias(stem) if spec.out_bias else None

    @property
    def pieces(self) -> list[DiskPiece]:
        """In the order of their use."""
        return [*chain.from_iterable(table.pieces for table in self._tables), *self._out.pieces]

    @property
    def nbytes(self) -> int:
        """Of the weights."""
        return sum(table.nbytes for table in (*self._tables, self._out))

    def qkv(self, x: Tensor) -> Tensor:  # [T, D] -> [T, (H + 2 K) d]
        found = torch.cat([table.product(x) for table in self._tables], 1)
        found = found if self._order is None else found.index_select(1, self._order)
        return found if self._qkv_bias is None else found.add_(self._qkv_bias)

    def out(self, heads: Tensor, residual: Tensor | None = None) -> Tensor:
        """heads [T, H d], plus a residual [T, D] -> [T, D]."""
        return plus(self._out.product(heads, self._out_bias), residual)


class DiskFfn:
    """One layer's neurons, all of them on disk."""

    def __init__(self, load: Loader, spec: ModelSpec, index: int, disk: DiskSource) -> None:
        names, inner, hidden = load.names, spec.intermediate_size, spec.hidden_size
        stems = [names.gate, names.up] if spec.gated else [names.up]
        self._activation, self._gated = ACTIVATIONS[spec.activation], spec.gated
        self._in = [disk.table(stem.format(index), (inner, hidden)) for stem in stems]
        self._in_biases = [load.vector(f"{stem.format(index)}.bias", inner) if spec.mlp_bias else None for stem in stems]
        self._down = disk.table(names.down.format(index), (hidden, inner))
        self._down_bias = load.part_bias(names.down.format(index)) if spec.mlp_bias else None

    @property
    def pieces(self) -> list[DiskPiece]:
        """In the order of their use."""
        return [*chain.from_iterable(table.pieces for table in self._in), *self._down.pieces]

    @property
    def nbytes(self) -> int:
        """Of the weights."""
        return sum(table.nbytes for table in (*self._in, self._down))

    def mlp(self, x: Tensor, residual: Tensor | None = None) -> Tensor:  # [T, D] -> [T, D]
        first, *up = [table.product(x, bias) for table, bias in zip(self._in, self._in_biases, strict=True)]
        hidden = self._activation(first) * up[0] if self._gated else self._activation(first)
        return plus(self._down.product(hidden, self._down_bias), residual)
