"""What weights in few bits take, before any are rounded. Torch-free."""

from __future__ import annotations

BLOCK = 64
"""Columns that are packed together; a group is one or more of these."""
ELEMENTS_AT_ONCE = 1 << 23
"""In float32 at the same time, at most, while a weight is rounded or dequantised."""
_WORK_BYTES = 16
"""For each of these, in copies."""


def stored_bytes(rows: int, columns: int, bits: int, group: int = BLOCK) -> int:
    """`LowBit.bytes` of a weight [rows, columns]: codes, and a float16 scale for each group."""
    groups = -(-columns // group)
    return rows * groups * (group * bits // 8 + 2)


def work_bytes(elements: int) -> int:
    """Most that it takes, for a while, to round a weight of so many elements or to dequantise it for a product."""
    return _WORK_BYTES * min(elements, ELEMENTS_AT_ONCE)
