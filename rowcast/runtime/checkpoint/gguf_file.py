"""The GGUF container, versions 2 and 3, little endian: metadata and where each tensor lies. Reads no weights.

Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md. The file is not trusted: every count and offset is checked against its
size before anything is allocated. gguf's own GGUFReader builds a NumPy view for each token and each merge, 2.7 s for SmolLM2's
vocabulary of 49,152; this parser takes 0.05 s.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from rowcast.errors import UserError
from rowcast.runtime.checkpoint.gguf_quants import GGML_TYPES, GGMLType, type_name
from rowcast.runtime.checkpoint.ranged_file import RangedFile

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_ARRAY = 1 << 24
"""Entries of a metadata array; vocabularies stay far below."""
MAX_DIMENSIONS = 4

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where a tensor lies. The shape is in row-major order, the reverse of the file's."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLType
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.kind.block * self.kind.block_bytes


@dataclass(frozen=True, slots=True)
class GGUFFile:
    file: RangedFile
    metadata: dict[str, Any]
    """Numbers, booleans, strings and lists of them."""
    tensors: dict[str, GGUFTensor]
    """By name, in file order."""


class _Damage(Exception):
    """What is wrong with the file, as a clause."""


class _Cursor:
    """Reads values from a position that moves forward. Past the end it raises struct.error or _Damage."""

    def __init__(self, data: mmap.mmap, at: int) -> None:
        self.data = data
        self.at = at

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def strings(self, count: int) -> list[str]:
        data, at, size, length_of = self.data, self.at, len(self.data), struct.Struct("<Q").unpack_from
        values = []
        for _ in range(count):
            end = at + 8 + length_of(data, at)[0]
            if end > size:
                raise _Damage("a string runs past its end")
            values.append(str(data[at + 8 : end], "utf-8"))
            at = end
        self.at = at
        return values

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.strings(1)[0]
        if kind != _ARRAY:
            raise _Damage(f"a metadata value has the unknown type {kind}")
        kind, count = self.number("I"), self.number("Q")
        if count > MAX_ARRAY:
            raise _Damage(f"a metadata array claims {count} entries")
        if kind == _STRING:
            return self.strings(count)
        if kind not in _SCALARS:
            raise _Damage(f"a metadata array has entries of the unknown type {kind}")
        dtype = np.dtype("<" + _SCALARS[kind])
        end = self.at + count * dtype.itemsize
        if end > len(self.data):
            raise _Damage("a metadata array runs past its end")
        values = np.frombuffer(self.data[self.at : end], dtype).tolist()
        self.at = end
        return values


def read_gguf(file: RangedFile) -> GGUFFile:
    """Parse the header. Raises UserError for a damaged file, another version, or a tensor type that cannot be dequantised."""
    cause: Exception
    try:
        if file.size < 24 or file.read(0, 4) != MAGIC:
            raise _Damage("it does not start with a GGUF header")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(file, _Cursor(data, 4))
    except struct.error as error:
        reason, cause = "its header runs past its end", error
    except UnicodeDecodeError as error:
        reason, cause = "a string in its header is not UTF-8", error
    except _Damage as error:
        reason, cause = str(error), error
    raise UserError(f"{file.path} is truncated or corrupt: {reason}; fetch the file again.") from cause


def _parse(file: RangedFile, cursor: _Cursor) -> GGUFFile:
    version = cursor.number("I")
    if version not in VERSIONS:
        known = " or ".join(map(str, VERSIONS))
        raise UserError(f"{file.path} is GGUF version {version}, or big-endian; convert it to little-endian version {known}.")
    tensor_count, value_count = cursor.number("Q"), cursor.number("Q")

    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key = cursor.strings(1)[0]
        if key in metadata:
            raise _Damage(f"the metadata key {key!r} occurs twice")
        metadata[key] = cursor.value(cursor.number("I"))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0:
        raise _Damage(f"the alignment {alignment!r} is not a positive number")

    entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(tensor_count):
        name = cursor.strings(1)[0]
        if name in entries:
            raise _Damage(f"tensor {name!r} occurs twice")
        dimensions = cursor.number("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise _Damage(f"tensor {name!r} claims {dimensions} dimensions")
        shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
        if 0 in shape:
            raise _Damage(f"tensor {name!r} has the shape {list(shape)}, which holds nothing")
        entries[name] = (shape, cursor.number("I"), cursor.number("Q"))
    start = -(-cursor.at // alignment) * alignment

    tensors: dict[str, GGUFTensor] = {}
    for name, (shape, code, offset) in entries.items():
        if code not in GGML_TYPES:
            known = ", ".join(kind.name for kind in GGML_TYPES.values())
            raise UserError(f"{file.path} stores {name!r} as {type_name(code)}, not one of the types read: {known}.")
        tensor = GGUFTensor(name, shape, GGML_TYPES[code], start + offset)
        if shape[-1] % tensor.kind.block:
            raise _Damage(f"tensor {name!r} has rows of {shape[-1]}, not a multiple of {tensor.kind.name}'s {tensor.kind.block}")
        if tensor.offset + tensor.nbytes > file.size:
            raise _Damage(f"tensor {name!r} ends at byte {tensor.offset + tensor.nbytes}, the file at byte {file.size}")
        tensors[name] = tensor
    for one, following in pairwise(sorted(tensors.values(), key=lambda tensor: tensor.offset)):
        if one.offset + one.nbytes > following.offset:
            raise _Damage(f"tensors {one.name!r} and {following.name!r} overlap")
    return GGUFFile(file, metadata, tensors)
