"""Selection: from scores of neurons to each token's own set, and the union that is read.

The best of each of a fixed number of virtual shards (DA-TOP-k; HiRE, arXiv 2402.09360, section 4), never of each rank, so that a
token's set does not depend on how many ranks share the work. Scores hold no NaN. The torch versions are the reference; on a CPU,
float32 scores go to the native part (`kernels/native.py`).
"""

from __future__ import annotations

from ctypes import CDLL

import torch
from torch import Tensor

from rowcast.errors import UserError
from rowcast.kernels import native


def check_keep(total: int, keep: int, shards: int) -> None:
    """Raise UserError unless 0 <= keep <= total and shards >= 1."""
    if shards < 1:
        raise UserError(f"shards is {shards}, it must be at least 1")
    if not 0 <= keep <= total:
        raise UserError(f"keep is {keep}, it must lie between 0 and {total}, the number of scores")


def shard_spans(total: int, keep: int, shards: int) -> list[tuple[slice, int]]:
    """The contiguous shards of `total` items, sizes at most 1 apart, and how many of `keep` each one keeps.

    In proportion to the sizes, so that no shard keeps more than it has; where `shards` divides `total` this is `Shard.span`'s split.
    """
    check_keep(total, keep, shards)
    bounds = [total * shard // shards for shard in range(shards + 1)]
    kept = [bound * keep // max(total, 1) for bound in bounds]
    return [(slice(bounds[s], bounds[s + 1]), kept[s + 1] - kept[s]) for s in range(shards)]


def top_mask(scores: Tensor, keep: int, shards: int = 8) -> Tensor:  # [T, N] -> bool [T, N]
    """Each token's best `keep` scores, chosen shard by shard (`shard_spans`); of equal scores the lower index wins."""
    lib = _library(scores)
    if lib is not None:
        return _native_top(lib, scores, keep, shards, None)[0]
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    for span, count in shard_spans(scores.shape[1], keep, shards):
        best = scores[:, span].sort(dim=-1, descending=True, stable=True).indices[:, :count]
        mask[:, span].scatter_(1, best, True)
    return mask


def above(scores: Tensor, threshold: Tensor | float) -> Tensor:  # [T, N], [N] or scalar -> bool [T, N]
    """Which scores exceed their threshold."""
    return scores > threshold


def union(mask: Tensor) -> tuple[Tensor, Tensor | None]:  # bool [T, N] -> int64 [C], bool [T, C]
    """The ids that any token chose, ascending, and which of them each token chose: None for a single token, which chose them all."""
    lib = native.library_for(mask)
    if lib is None:
        ids = mask.any(0).nonzero().squeeze(1)
    else:
        mask = mask.contiguous()
        ids = torch.empty(mask.shape[1], dtype=torch.int64)
        ids = ids[: lib.rowcast_union(mask.data_ptr(), *mask.shape, ids.data_ptr())]
    return ids, _own(mask, ids)


def top_union(scores: Tensor, keep: int, shards: int = 8) -> tuple[Tensor, Tensor | None]:
    """`union(top_mask(scores, keep, shards))`, in one native call."""
    lib = _library(scores)
    if lib is None:
        return union(top_mask(scores, keep, shards))
    ids = torch.empty(scores.shape[1], dtype=torch.int64)
    mask, count = _native_top(lib, scores, keep, shards, ids)
    ids = ids[:count]
    return ids, _own(mask, ids)


def _own(mask: Tensor, ids: Tensor) -> Tensor | None:
    return mask.index_select(1, ids) if mask.shape[0] > 1 else None


def _library(scores: Tensor) -> CDLL | None:
    native_scores = scores.device.type == "cpu" and scores.dtype == torch.float32 and scores.shape[0] > 0
    return native.library() if native_scores else None


def _native_top(lib: CDLL, scores: Tensor, keep: int, shards: int, ids: Tensor | None) -> tuple[Tensor, int]:
    """The mask, and how many `ids` of its union were written: none without `ids`."""
    tokens, total = scores.shape
    check_keep(total, keep, shards)
    scores = scores.contiguous()
    mask = torch.empty(tokens, total, dtype=torch.bool)
    at = native.address(ids)
    return mask, lib.rowcast_top(scores.data_ptr(), tokens, total, keep, shards, mask.data_ptr(), at, native.threads())
