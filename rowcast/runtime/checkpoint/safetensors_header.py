"""What a safetensors file says of its tensors: where they lie, in what shape and type. Torch-free.

The format (huggingface.co/docs/safetensors): 8 bytes of header length, a JSON header, the tensors' bytes without holes. The
header is not trusted: everything is checked against the file's size before a tensor is read.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from rowcast.errors import UserError
from rowcast.runtime.checkpoint.ranged_file import RangedFile, fingerprint

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
"""The bound that the format's own library sets."""
MAX_EMPTY = 1 << 60
"""Product of the other dimensions of a tensor with a dimension of 0; torch computes with it. Other shapes are bounded by the file."""

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1,
    "BOOL": 1,
}  # fmt: skip
"""Of the types that are read, by their names in the file."""

TYPE_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    "BOOL": "bool",
}  # fmt: skip
"""What torch and NumPy call them."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies."""

    file: RangedFile
    offset: int
    shape: tuple[int, ...]
    kind: str
    """Of `ITEM_BYTES`."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.kind]


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, in file order. Raises UserError naming what is wrong with the file, OSError if it cannot be opened."""
    return _read(path)[0]


def read_directory(directory: Path) -> dict[str, StoredTensor]:
    """Of model.safetensors, else of the shards that model.safetensors.index.json names. Raises as `read_header` does."""
    single = directory / SINGLE_FILE
    return read_header(single) if os.path.lexists(single) else _read_shards(directory / INDEX_FILE)


def read_metadata(path: Path) -> Mapping[str, Any]:
    """What a file says beside its tensors; empty where it says nothing. Raises as `read_header` does."""
    return _read(path)[1]


def tensors_fingerprint(tensors: Mapping[str, StoredTensor]) -> str:
    """`fingerprint` of them. Types are named as torch writes them, as in all fingerprints that files already hold."""
    return fingerprint((name, t.shape, f"torch.{TYPE_NAMES[t.kind]}", t.file, t.offset, t.nbytes) for name, t in tensors.items())


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
        if entry["dtype"] not in ITEM_BYTES:
            raise UserError(f"{path} stores {name!r} as {entry['dtype']}, not one of the types read: {', '.join(ITEM_BYTES)}.")
        tensor = StoredTensor(file, start + offsets[0], shape, entry["dtype"])
        if tensor.offset != end or tensor.nbytes != offsets[1] - offsets[0]:
            raise damage(f"bytes {offsets[0]} to {offsets[1]} of {name!r} do not fit its shape {list(shape)} or its neighbour")
        if math.prod(filter(None, shape)) > MAX_EMPTY:
            raise damage(f"{name!r} has no elements, yet the shape {list(shape)}")
        end = tensor.offset + tensor.nbytes
        tensors[name] = tensor
    if end != file.size:
        raise damage(f"its tensors end at byte {end}, the file at byte {file.size}")
    return tensors, metadata if isinstance(metadata, dict) else {}


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
