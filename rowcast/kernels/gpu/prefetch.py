"""Chosen rows on their way to the GPU's second-level cache, before the product that reads them may start. It changes no result."""

from __future__ import annotations

from functools import cache
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from rowcast.kernels.gpu.overlap import overlap
from rowcast.settings import settings

_LINE: Final = tl.constexpr(128)
_SHARE: Final = 0.6
"""Of the cache; the rest is for what other kernels read in between."""


@cache
def room(device: torch.device) -> int:
    """Bytes that may be fetched ahead; 0 without a GPU or with ROWCAST_GPU_PREFETCH=0. Asked once a device."""
    if device.type != "cuda" or not settings().gpu_prefetch:
        return 0
    return int(_SHARE * torch.cuda.get_device_properties(device).L2_cache_size)


def prefetch_rows(table: Tensor, ids: Tensor, count: Tensor | None) -> None:
    """Begin to fetch rows `ids` (int32 [C], the first `count` (int32 [1]) are valid; None: all) of table [R, D], whose rows are
    contiguous: as many of the first ones as `room` has space for. Does not wait for them."""
    row_bytes = table.shape[1] * table.element_size()
    rows = min(len(ids), room(table.device) // row_bytes)
    if rows == 0:
        return
    assert table.stride(1) == 1
    lines = triton.cdiv(row_bytes, _LINE.value)
    _prefetch[(rows,)](
        table,
        ids,
        count,
        table.stride(0),
        lines,
        LINES=triton.next_power_of_2(lines),
        WIDTH=_LINE.value // table.element_size(),
        num_warps=1,
        **overlap(table),
    )


@triton.jit
def _prefetch(
    table_ptr,
    ids_ptr,  # int32
    count_ptr,  # int32 [1] or None
    stride,
    lines,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,  # elements of a line
    OVERLAP: tl.constexpr,  # see overlap.py
):
    """A row. What lies beyond the count is some row's id, or an old one, and no harm: it is not fetched."""
    place = tl.program_id(0)
    if OVERLAP:
        gdc_wait()
    there = True
    if count_ptr is not None:
        there = place < tl.load(count_ptr)
    if there:
        line = tl.arange(0, LINES)
        row = tl.load(ids_ptr + place).to(tl.int64)
        at = table_ptr + row * stride + tl.minimum(line, lines - 1) * WIDTH
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
        )
