"""Safetensors files, one or sharded by an index, as a `Source`.

The format (huggingface.co/docs/safetensors): 8 bytes of header length, a JSON header, the tensors' bytes without holes. The
header is not trusted: everything is checked against the file's size before a tensor is read.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from rowcast.errors import UserError
from rowcast.runtime.checkpoint.ranged_file import RangedFile, fingerprint, read_dense

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
"""The bound that the format's own library sets."""
MAX_EMPTY = 1 << 60
"""Product of the other dimensions of a tensor with a dimension of 0; torch computes with it. Other shapes are bounded by the file."""

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies."""

    file: RangedFile
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsSource:
    """Tensors of one or many safetensors files under one set of names. Implements `Source`."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = dict(tensors)

    @classmethod
    def open(cls, directory: Path) -> SafetensorsSource:
        """model.safetensors, else the shards that model.safetensors.index.json names.

        Reads headers only. Raises UserError for a damaged file and OSError for one that cannot be opened.
        """
        single = directory / SINGLE_FILE
        return cls(read_header(single) if os.path.lexists(single) else _read_shards(directory / INDEX_FILE))

    def names(self) -> Sequence[str]:
        return list(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def read(self, name: str, rows: slice | None = None, cols: slice | None = None, *, out: Tensor | None = None) -> Tensor:
        tensor = self._tensors[name]
        return read_dense(tensor.file, tensor.offset, tensor.dtype, tensor.shape, rows, cols, out)

    def fingerprint(self) -> str:
        return fingerprint((name, t.shape, str(t.dtype), t.file, t.offset, t.nbytes) for name, t in self._tensors.items())

    def stored_dtype(self) -> str:
        """The floating dtype that holds the most bytes, e.g. bfloat16; float32 when there is none."""
        sizes: Counter[str] = Counter()
        for tensor in self._tensors.values():
            if tensor.dtype.is_floating_point:
                sizes[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
        return max(sizes, key=sizes.__getitem__, default="float32")


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, in file order. Raises UserError naming what is wrong with the file, OSError if it cannot be opened."""
    return _read(path)[0]


def read_metadata(path: Path) -> Mapping[str, Any]:
    """What a file says beside its tensors; empty where it says nothing. Raises as `read_header` does."""
    return _read(path)[1]


def _read(path: Path) -> tuple[dict[str, StoredTensor], Mapping[str, Any]]:
    file = RangedFile(path)

    def damage(what: str) -> UserError:
        return UserError(f"{path} is truncated or corrupt: {what}; fetch the file again.")

    if file.size < 8:
        raise damage(f"a safetensors file has at least 8 bytes, this one has {file.size}")
    length = int.from_bytes(file.read(0, 8), "little")
    if length > min(file.size - 8, MAX_HEADER_BYTES):
        raise damage(f"its header claims {length} bytes of a file of {file.size}")
    try:
        header = json.loads(file.read(8, length), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise damage(f"its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise damage("its header is not a JSON object")
    metadata = header.pop("__metadata__", None)

    tensors: dict[str, StoredTensor] = {}
    start = end = 8 + length
    for name, entry in sorted(header.items(), key=lambda item: _begin(item[1])):
        shape, offsets = (_sizes(entry, key) for key in ("shape", "data_offsets"))
        if shape is None or offsets is None or len(offsets) != 2 or not isinstance(entry.get("dtype"), str):
            raise damage(f"its header's entry for {name!r} is malformed")
        if not _is_unicode(name):
            raise damage(f"the tensor name {name!r} is not valid Unicode")
        if entry["dtype"] not in DTYPES:
            raise UserError(f"{path} stores {name!r} as {entry['dtype']}, not one of the types read: {', '.join(DTYPES)}.")
        tensor = StoredTensor(file, start + offsets[0], shape, DTYPES[entry["dtype"]])
        if tensor.offset != end or tensor.nbytes != offsets[1] - offsets[0]:
            raise damage(f"bytes {offsets[0]} to {offsets[1]} of {name!r} do not fit its shape {list(shape)} or its neighbour")
        if math.prod(filter(None, shape)) > MAX_EMPTY:
            raise damage(f"{name!r} has no elements, yet the shape {list(shape)}")
        end = tensor.offset + tensor.nbytes
        tensors[name] = tensor
    if end != file.size:
        raise damage(f"its tensors end at byte {end}, the file at byte {file.size}")
    return tensors, metadata if isinstance(metadata, dict) else {}


def _read_shards(index: Path) -> dict[str, StoredTensor]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        files = dict.fromkeys(weight_map.values())
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is no index: it needs a JSON object with a weight_map; fetch the file again.") from error
    shards: dict[str, dict[str, StoredTensor]] = {}
    for file in files:
        if not isinstance(file, str) or PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            raise UserError(f"{index} names {file!r}, which is not a file of its own directory; use a checkpoint that you trust.")
        if not (index.parent / file).is_file():
            raise UserError(f"{index} names {file!r}, which is missing from {index.parent}; fetch the missing file.")
        shards[file] = read_header(index.parent / file)
    for name, file in weight_map.items():
        if name not in shards[file]:
            raise UserError(f"{index} places tensor {name!r} in {file!r}, which does not hold it; fetch both files again.")
    placed = ((name, file, tensor) for file, tensors in shards.items() for name, tensor in tensors.items())
    return {name: tensor for name, file, tensor in placed if weight_map.get(name) == file}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _sizes(entry: object, key: str) -> tuple[int, ...] | None:
    """A list of non-negative integers, or None."""
    values = entry.get(key) if isinstance(entry, dict) else None
    if isinstance(values, list) and all(type(value) is int and value >= 0 for value in values):
        return tuple(values)
    return None


def _is_unicode(name: str) -> bool:
    """JSON can escape halves of surrogate pairs."""
    return not any("\ud800" <= char <= "\udfff" for char in name)


def _begin(entry: object) -> tuple[int, ...]:
    return _sizes(entry, "data_offsets") or ()
