"""How products are cut into tiles, from the shapes of tables and the GPU's size alone; docs/experiments.md has the sweeps.

What decides: enough bytes under way, about 50 to 100 KB a multiprocessor; all programs in one wave or in very many; few programs that
share a sum, since adding their parts takes 1 to 2 us at the end.
"""

from __future__ import annotations

from typing import Final, NamedTuple

_NO_LIMIT: Final = 1 << 30


class Tiles(NamedTuple):
    """How a product is cut. For `rows_out`, `rows` are columns of the table and `depth` is a number of its rows."""

    rows: int
    """Of the result that a program computes at a time."""
    depth: int
    """Of a step along the sum."""
    splits: int
    """Programs that share a sum."""
    stages: int
    """Steps that are under way at once, the one being multiplied included."""
    warps: int = 4
    programs: int = _NO_LIMIT
    """Most of them, where the number of tiles is known to the device alone."""
    parts: int = 1
    """Of a sum of `rows_in`, which are added in order, whether one program computes them or as many as there are parts."""


def tiles_in(capacity: int, columns: int, width: int, tables: int, chosen: bool, counted: bool, units: int) -> Tiles:
    """For `rows_in` and `ffn_hidden`. width: bytes of an element; tables: 2 with a gate; units: the GPU's multiprocessors.

    The order of addition follows from `columns` and `width` alone: tiles have 64 rows of one or two tables, so that one instruction
    multiplies them, and the same parts of the sum.
    """
    if width == 4:  # Without matrix units.
        return Tiles(16, 32, 1, 2)
    rows = 64 // tables
    parts = max(1, min(4, columns // 512)) if columns < 9216 else columns // 3072
    if chosen or capacity * 3 < 64 * units:  # Rows alone make too few programs.
        programs = -(-capacity // rows) * parts
        # The more of them share a multiprocessor, the fewer steps each has under way.
        stages = 3 if programs > 2 * units else 5 if programs <= units and columns >= 1536 * parts else 4
        return Tiles(rows, 128, parts, stages, 4, 3 * units, parts)
    if columns < 1024 and tables == 1:
        return Tiles(rows, 64, 1, 6, parts=parts)
    # Two programs a multiprocessor, since one that adds parts up waits for its products; one with more under way for short tables.
    stages = 4 if capacity * tables > 64 * units else 6
    return Tiles(rows, 128, 1, stages, 4, 2 * units if counted else _NO_LIMIT, parts)


def tiles_out(capacity: int, columns: int, width: int, chosen: bool, units: int) -> Tiles:
    """For `rows_out`."""
    if width == 4:
        return Tiles(64, 32, 4, 2)
    narrow, wide = -(-columns // 64), -(-columns // 128)
    if chosen:  # How many rows is known to the device alone: up to two programs a multiprocessor.
        if capacity < 1024 and 4 * narrow > 3 * units:
            return Tiles(64, 128, 1, 3)
        if capacity < 2048 and narrow > units:
            return Tiles(64, 128, 2, 3)
        if 2 * wide > units:
            return Tiles(128, 128, max(1, 2 * units // wide), 3)
        if 8 * wide <= units:  # One wave of programs with short steps, of which more are under way.
            return Tiles(128, 32, 8, 5, 8)
        splits = min(8, 2 * units // narrow)
        # Of few rows each split has few steps, so that more of them wait less.
        return Tiles(64, 64, 4, 3) if splits == 2 and capacity <= 2048 else Tiles(64, 64, splits, 4)
    most = max(1, min(16, capacity // 384))
    narrow_splits, wide_splits = (max(1, min(most, units // tiles)) for tiles in (narrow, wide))
    if narrow > units or wide * wide_splits > narrow * narrow_splits:  # The one with more programs in a single wave.
        return Tiles(128, 64, wide_splits, 6)
    return Tiles(64, 256, narrow_splits, 3) if capacity >= 1024 * narrow_splits else Tiles(64, 128, narrow_splits, 4)
