"""The work space of `gpu.retrieval.chunk_scores`. Torch-free."""

from __future__ import annotations

SPLIT = 1024
"""Chunks that a program scores."""
LEAST_ROWS = 16
_MOST_ROWS = 32


def tile_rows(rows: int, width: int) -> int:
    """Rows of a tile, where a KV head has `rows` queries: tokens times the query heads of its group. `width`: bytes of an element."""
    return LEAST_ROWS if width == 4 else min(_MOST_ROWS, max(LEAST_ROWS, 1 << (rows - 1).bit_length()))


def layer_bytes(kv_heads: int, rows: int, chunks: int, width: int, split: int = SPLIT) -> int:
    """Of one sequence in one layer: each row's scores, and the largest of each split with its sum, in float32."""
    tile = tile_rows(rows, width)
    return 4 * kv_heads * -(-rows // tile) * tile * (chunks + 2 * max(1, -(-chunks // split)))
