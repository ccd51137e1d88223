"""Which groups of a quantised checkpoint `packed` holds as they are, and what they take. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rowcast.kernels.lowbit_sizes import BLOCK

HALF = BLOCK // 2
"""Columns of the smallest group of a weight that has no super-blocks."""
SUPER_BLOCK = 256
"""Columns of GGUF's K-quants whose groups' bytes count in numbers of theirs."""


@dataclass(frozen=True, slots=True)
class Form:
    """How a matrix is packed."""

    bits: int
    group: int
    """Columns that share a scale; -1: all."""
    level: Literal["zero", "zeros", "minima"]
    """Where 0 lies: one zero point for all, one for each group, or a least value for each group."""
    scale_bytes: int = 2
    super_block: int = 0
    """Columns whose groups' scales, and minima, of a byte each, count in float16 numbers of theirs; 0: groups have their own."""

    @property
    def unit(self) -> int:
        """Columns that are not parted; -1: all."""
        return self.super_block or self.group

    def stored_bytes(self, rows: int, columns: int) -> int:
        """`Packed.bytes` of a weight of this shape."""
        padded, group = padded_columns(columns, self.unit)
        each = self.scale_bytes * (2 if self.level == "minima" else 1) + (self.level == "zeros")
        stored = padded * self.bits // 8 + padded // (self.group if self.super_block else group) * each
        if self.super_block:
            stored += padded // self.super_block * (4 if self.level == "minima" else 2)
        return rows * stored


def fits(group: int, columns: int) -> bool:
    """Whether rows of so many columns can be held in groups of this size."""
    return group == HALF or group == -1 or group >= columns or group % BLOCK == 0


def padded_columns(columns: int, group: int) -> tuple[int, int]:
    """Columns with what fills the last block or group, and the size of the groups."""
    blocks = -(-columns // BLOCK) * BLOCK
    if group == -1 or group >= columns:
        return blocks, blocks
    group_or_block = max(group, BLOCK)
    return -(-columns // group_or_block) * group_or_block, group
