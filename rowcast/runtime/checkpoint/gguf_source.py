"""A GGUF file's tensors as a `Source`: Hugging Face's names and row order, dequantised slice by slice.

Knows nothing of configs beyond the head counts that the row orders need.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from rowcast.errors import UserError
from rowcast.kernels.packed import Packed, stacked
from rowcast.kernels.packed_sizes import Form
from rowcast.runtime.checkpoint.gguf_config import ROPE_FACTORS
from rowcast.runtime.checkpoint.gguf_file import GGUFFile, GGUFTensor
from rowcast.runtime.checkpoint.gguf_names import NameMap, Rows, translate
from rowcast.runtime.checkpoint.gguf_quants import FORMS, decode, repack
from rowcast.runtime.checkpoint.ranged_file import fingerprint
from rowcast.runtime.checkpoint.slices import Window, read_dense, read_rows

CHUNK_VALUES = 1 << 18
"""Values that one thread dequantises at a time, 1 MiB of float32: they stay in the second-level cache."""
MAX_THREADS = 4

Part = TypeVar("Part")


@dataclass(frozen=True, slots=True)
class _Entry:
    tensor: GGUFTensor
    order: Rows | None
    """None: the file's own order."""


class GGUFSource:
    """Implements `Source` and `PackedTensors`. Long reads are shared by a few threads."""

    packed_unasked = False
    """As `PackedForms.unasked`."""

    def __init__(self, gguf: GGUFFile, names: NameMap, config: dict[str, Any], called_for: Collection[str]) -> None:
        """Raises UserError for a tensor whose name is not among those `called_for`: the model would be another one without it."""
        self._gguf = gguf
        self._entries: dict[str, _Entry] = {}
        for tensor in gguf.tensors.values():
            if tensor.name == ROPE_FACTORS:
                continue
            found = translate(names, tensor.name)
            if found is None or found[0] not in called_for or len(tensor.shape) > 2:
                raise UserError(
                    f"{gguf.file.path} holds a tensor {tensor.name!r} of shape {list(tensor.shape)}, which is not part of a "
                    f"{config['model_type']} model as we run it; use another model."
                )
            name, reorder = found
            try:
                order = reorder(tensor.shape[0], config) if reorder else None
            except ValueError as error:
                raise UserError(
                    f"{gguf.file.path} is corrupt: the {tensor.shape[0]} rows of {tensor.name!r} do not divide into the heads "
                    "of its metadata; fetch the file again."
                ) from error
            self._entries[name] = _Entry(tensor, order)

    def names(self) -> Sequence[str]:
        return list(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].tensor.shape

    def read(self, name: str, rows: slice | None = None, cols: slice | None = None, *, out: Tensor | None = None) -> Tensor:
        tensor, order = self._entries[name].tensor, self._entries[name].order
        if tensor.kind.dtype is not None and order is None:
            return read_dense(self._gguf.file, tensor.offset, tensor.kind.dtype, tensor.shape, rows, cols, out)
        window = Window.of(tensor.shape, rows, cols)
        result, target = window.target(out, tensor.kind.dtype or torch.float32)
        if target.numel() == 0:
            return result
        if order is not None and len(tensor.shape) == 1:  # a bias: one short row whose columns are in the file's order
            whole = torch.empty(1, tensor.shape[0], dtype=tensor.kind.dtype or torch.float32)
            self._fill(whole, tensor, Window.of(tensor.shape, None, None), None)
            target.copy_(whole[:, torch.from_numpy(order[rows or slice(None)])])
        else:
            self._fill(target, tensor, window, order)
        return result

    def form(self, name: str) -> Form | str:
        kind = self._entries[name].tensor.kind
        return FORMS.get(kind.name) or (f"no kernel reads {kind.name} as it is" if kind.dtype is None else "it is not quantised")

    def packed(self, name: str, rows: slice, cols: slice) -> Packed:
        tensor, order = self._entries[name].tensor, self._entries[name].order
        kind = tensor.kind
        pitch = tensor.shape[1] // kind.block * kind.block_bytes
        start, stop = (column // kind.block * kind.block_bytes for column in (cols.start, cols.stop))
        height, parts = max(1, CHUNK_VALUES // (cols.stop - cols.start)), []
        for top in range(rows.start, rows.stop, height):
            last = min(top + height, rows.stop)
            wanted = np.arange(top, last) if order is None else order[top:last]
            first = int(wanted.min())
            raw = torch.empty(int(wanted.max()) + 1 - first, stop - start, dtype=torch.uint8)
            read_rows(self._gguf.file, tensor.offset + first * pitch + start, pitch, raw)
            parts.append(repack(raw[torch.from_numpy(wanted - first)], kind))
        return stacked(parts)

    def fingerprint(self) -> str:
        stored = ((name, entry.tensor) for name, entry in self._entries.items())
        return fingerprint((name, t.shape, t.kind.name, self._gguf.file, t.offset, t.nbytes) for name, t in stored)

    def _fill(self, target: Tensor, tensor: GGUFTensor, window: Window, order: Rows | None) -> None:
        """Write the window's values into target [rows, columns]."""
        kind = tensor.kind
        pitch = window.total_columns // kind.block * kind.block_bytes
        first_block = window.column // kind.block
        blocks = -(-(window.column + window.columns) // kind.block) - first_block
        left = window.column - first_block * kind.block
        height = max(1, CHUNK_VALUES // (blocks * kind.block))
        in_place = order is None and blocks * kind.block == window.columns and target.is_contiguous() and _is_host_float32(target)

        def load(first: int, last: int, out: Tensor | None = None) -> Tensor:
            """The window's columns of file rows first..last."""
            raw = torch.empty(last - first + 1, blocks * kind.block_bytes, dtype=torch.uint8)
            read_rows(self._gguf.file, tensor.offset + first * pitch + first_block * kind.block_bytes, pitch, raw)
            return decode(raw, kind, out)[:, left : left + window.columns]

        def in_file_order(top: int) -> None:
            part = target[top : top + height]
            values = load(window.row + top, window.row + top + len(part) - 1, part if in_place else None)
            if not in_place:
                part.copy_(values)

        if order is None:
            self._run(in_file_order, range(0, window.rows, height))
            return

        wanted = order[window.row : window.row + window.rows]
        places = np.argsort(wanted)
        ascending = wanted[places]

        def reordered(part: slice) -> None:
            first = int(ascending[part][0])
            values = load(first, int(ascending[part][-1]))
            picked = values[torch.from_numpy(ascending[part] - first)]
            target[torch.from_numpy(places[part])] = picked.to(target)

        self._run(reordered, _close_runs(ascending, height))

    def _run(self, job: Callable[[Part], None], parts: Iterable[Part]) -> None:
        """job(part) for every part, by several threads when there is more than one part.

        The threads end with the read. As long as they live, so do the OpenMP teams that torch gave them, and OpenMP, counting more
        threads than cores, makes every later product of the main thread sleep and wake: a decode step takes twice as long.
        """
        jobs = list(parts)
        if len(jobs) == 1:
            job(jobs[0])
            return
        with ThreadPoolExecutor(min(MAX_THREADS, len(jobs), os.cpu_count() or 1)) as pool:
            list(pool.map(job, jobs))


def _is_host_float32(target: Tensor) -> bool:
    return target.dtype == torch.float32 and target.device.type == "cpu"


def _close_runs(rows: Rows, height: int) -> Iterator[slice]:
    """Cut ascending rows where more than one row would be read in vain, and after `height` rows.

    Half a head in Hugging Face's order is every second row of the head in the file's: one read for both beats a read for each.
    """
    edges = [0, *(np.flatnonzero(np.diff(rows) > 2) + 1).tolist(), len(rows)]
    for start, stop in pairwise(edges):
        for cut in range(start, stop, height):
            yield slice(cut, min(cut + height, stop))
