"""Blocks of a paged store as an index, so that neighbouring ones are read in place."""

from __future__ import annotations

import torch
from torch import Tensor


def places(blocks: list[int], device: torch.device) -> slice | Tensor:
    """A block table as an index: a slice where its blocks are neighbours."""
    first = blocks[0] if blocks else 0
    if blocks == list(range(first, first + len(blocks))):
        return slice(first, first + len(blocks))
    return torch.tensor(blocks, device=device)


def take(store: Tensor, dim: int, where: slice | Tensor) -> Tensor:
    """The blocks `where` along `dim`: a view of neighbours, else a copy."""
    if isinstance(where, slice):
        return store.narrow(dim, where.start, where.stop - where.start)
    return store.index_select(dim, where)
