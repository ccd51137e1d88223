"""What kernels need beside their results: partial sums, and counters by which the last CTA to arrive is found.

Sums that several CTAs share are written as float32 partial sums; the last CTA to arrive adds them in the order of the splits. Partial
sums are allocated by the call. Counters are at 0 between calls. Calls can be captured; the first must not be.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

_COUNTERS: Final = 1 << 16
_LINE: Final = 32
"""Counters of a cache line."""


class _Counters:
    """Zeros, which every call that takes some leaves at 0. Calls take them in turn, so that those of several streams do not meet."""

    def __init__(self, device: torch.device) -> None:
        assert device.type != "cuda" or not torch.cuda.is_current_stream_capturing(), "the first call must not be captured"
        self._zeros = torch.zeros(_COUNTERS, dtype=torch.int32, device=device)
        self._next = 0

    def take(self, number: int) -> Tensor:
        number = -(-number // _LINE) * _LINE  # Kernels are compiled by the alignment of their pointers, too.
        assert number <= _COUNTERS
        if self._next + number > _COUNTERS:
            self._next = 0
        taken = self._zeros[self._next : self._next + number]
        self._next += number
        return taken


_made: dict[torch.device, _Counters] = {}


def counters(device: torch.device, number: int) -> Tensor:
    """int32, at 0; the kernel has to leave them so."""
    if device not in _made:
        _made[device] = _Counters(device)
    return _made[device].take(number)


def partial_sums(device: torch.device, splits: int, values: int, tiles: int) -> tuple[Tensor | None, Tensor | None]:
    """float32 for each split, and a counter for each tile; None, None for a sum that is not split."""
    if splits == 1:
        return None, None
    return torch.empty(splits * values, dtype=torch.float32, device=device), counters(device, tiles)


@triton.jit
def arrive(counter_ptr, programs):
    """Whether this CTA is the last of so many to get here. All that the others wrote before is then visible to it, the counter is 0."""
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def sum_partials(partial_ptr, at, mask, step, SPLITS: tl.constexpr):
    """The partial sums at `at`, `at + step`, ... added in order."""
    total = tl.load(partial_ptr + at, mask=mask, other=0.0, cache_modifier=".cg")
    for split in tl.static_range(1, SPLITS):
        total += tl.load(partial_ptr + split * step + at, mask=mask, other=0.0, cache_modifier=".cg")
    return total
