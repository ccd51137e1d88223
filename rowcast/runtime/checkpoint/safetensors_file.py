"""Safetensors files, one or sharded by an index, as a `Source`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rowcast.runtime.checkpoint.safetensors_header import INDEX_FILE as INDEX_FILE
from rowcast.runtime.checkpoint.safetensors_header import SINGLE_FILE as SINGLE_FILE
from rowcast.runtime.checkpoint.safetensors_header import TYPE_NAMES, StoredTensor, read_directory, tensors_fingerprint
from rowcast.runtime.checkpoint.slices import read_dense

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
        return cls(read_directory(directory))

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
