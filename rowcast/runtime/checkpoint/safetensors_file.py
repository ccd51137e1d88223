"""Safetensors files, one or sharded by an index, as a `Source`."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from rowcast.errors import UserError
from rowcast.runtime.checkpoint.safetensors_header import TYPE_NAMES, StoredTensor, read_header, tensors_fingerprint
from rowcast.runtime.checkpoint.slices import read_dense

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES: dict[str, torch.dtype] = {kind: getattr(torch, name) for kind, name in TYPE_NAMES.items()}


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
        return read_dense(tensor.file, tensor.offset, DTYPES[tensor.kind], tensor.shape, rows, cols, out)

    def stored(self, name: str) -> StoredTensor:
        """Where a tensor lies. Raises KeyError for an unknown name."""
        return self._tensors[name]

    def fingerprint(self) -> str:
        return tensors_fingerprint(self._tensors)

    def stored_dtype(self) -> str:
        """The floating dtype that holds the most bytes, e.g. bfloat16; float32 when there is none."""
        sizes: Counter[str] = Counter()
        for tensor in self._tensors.values():
            if DTYPES[tensor.kind].is_floating_point:
                sizes[str(DTYPES[tensor.kind]).removeprefix("torch.")] += tensor.nbytes
        return max(sizes, key=sizes.__getitem__, default="float32")


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
