"""Slices of stored tensors, read with `preadv` straight into the memory where they are wanted.

This module knows bytes, rows and element types, not file formats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rowcast.runtime.checkpoint.ranged_file import RangedFile

STAGE_BYTES = 4 << 20
"""Size of the buffer through which converted values pass."""


def read_rows(file: RangedFile, offset: int, pitch: int, matrix: Tensor) -> None:
    """Fill matrix [r, c] (CPU, last stride 1): row i holds the bytes from offset + i * pitch."""
    view = matrix.view(torch.uint8).numpy()
    if view.shape[1] == pitch and view.flags.c_contiguous:
        file.read_into(view.reshape(-1).data, offset)
    else:
        for i, row in enumerate(view):
            file.read_into(row.data, offset + i * pitch)


@dataclass(frozen=True, slots=True)
class Window:
    """The part of a tensor that is wanted, as a matrix: one dimension is one row, inner dimensions are columns."""

    shape: tuple[int, ...]
    """Shape of the slice, as the caller sees it."""
    row: int
    rows: int
    column: int
    columns: int
    total_columns: int

    @staticmethod
    def of(shape: tuple[int, ...], rows: slice | None, cols: slice | None) -> Window:
        """Raises ValueError for a step other than 1 or a slice of a dimension that the tensor has not."""
        wanted = (rows, cols)
        if any(part is not None and part.step not in (None, 1) for part in wanted):
            raise ValueError(f"rows={rows}, cols={cols}: only slices of step 1 can be read")
        if any(part is not None for part in wanted[len(shape) :]):
            raise ValueError(f"rows={rows}, cols={cols}: the tensor has {len(shape)} dimensions")
        spans = [range(size) for size in shape]
        for axis, part in enumerate(wanted):
            if part is not None:
                spans[axis] = spans[axis][part]
        result = tuple(len(span) for span in spans)
        lead = spans[0] if len(shape) > 1 else range(1)
        across = spans[min(len(shape), 2) - 1] if shape else range(1)
        inner = math.prod(shape[2:])
        total = (shape[min(len(shape), 2) - 1] if shape else 1) * inner
        return Window(result, lead.start, len(lead), across.start * inner, len(across) * inner, total)

    def target(self, out: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`out`, or a new tensor of `dtype`, and its memory as a matrix [rows, columns].

        Raises ValueError when `out` has another shape. With three or more dimensions `out` must be contiguous.
        """
        result = torch.empty(self.shape, dtype=dtype) if out is None else out
        if tuple(result.shape) != self.shape:
            raise ValueError(f"out has shape {tuple(result.shape)}, the slice has {self.shape}")
        return result, result.detach().view(self.rows, self.columns)


def read_dense(
    file: RangedFile,
    offset: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    rows: slice | None,
    cols: slice | None,
    out: Tensor | None,
) -> Tensor:
    """The slice of a row-major tensor that starts at byte `offset`, as `Source.read` describes it."""
    window = Window.of(shape, rows, cols)
    if out is not None and out.dim() > 2 and tuple(out.shape) == window.shape and not out.is_contiguous():
        for i, row in enumerate(out, window.row):
            row.copy_(read_dense(file, offset, dtype, shape, slice(i, i + 1), cols, None)[0])
        return out
    result, matrix = window.target(out, dtype)
    if matrix.numel() == 0:
        return result
    size = dtype.itemsize
    pitch = window.total_columns * size
    start = offset + window.row * pitch + window.column * size
    if matrix.dtype == dtype and matrix.device.type == "cpu" and matrix.stride(1) == 1:
        read_rows(file, start, pitch, matrix)
        return result
    width = min(window.columns, STAGE_BYTES // size)
    height = max(1, STAGE_BYTES // (width * size))
    for top in range(0, window.rows, height):
        for left in range(0, window.columns, width):
            target = matrix[top : top + height, left : left + width]
            stage = torch.empty(target.shape, dtype=dtype)
            read_rows(file, start + top * pitch + left * size, pitch, stage)
            target.copy_(stage)
    return result
