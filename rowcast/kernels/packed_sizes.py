"""Which groups of a quantised checkpoint `packed` holds as they are, and what they take. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rowcast.kernels.lowbit_sizes import BLOCK

HALF = BLOCK // 2
"""Columns of the smallest group."""


@dataclass(frozen=True, slots=True)
class Form:
    """How a matrix is packed."""

    bits: int
    group: int
    """Columns that share a scale; -1: all."""
    level: Literal["zero", "zeros", "minima"]
    """Where 0 lies: one zero point for all, one for each group, or a least value for each group."""
    scale_bytes: int = 2

    def stored_bytes(self, rows: int, columns: int) -> int:
        """`Packed.bytes` of a weight of this shape."""
        padded, group = padded_columns(columns, self.group)
        each = self.scale_bytes + {"zero": 0, "zeros": 1, "minima": self.scale_bytes}[self.level]
        return rows * (padded * self.bits // 8 + padded // group * each)


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
