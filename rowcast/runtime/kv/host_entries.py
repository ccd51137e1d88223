"""Neighbouring K/V entries in host memory: those that a pass reads, piece by piece, and where those go that it makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ONE_THREAD_BYTES = 1 << 20
"""Of new entries of a layer, written by the calling thread: torch's threads cost a millisecond and more where other work runs, each
time, and a verification writes every layer."""


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring entries, and where they go: of the host, which a pass reads, in a buffer; of a pass, in host memory."""

    source: slice
    target: slice


@dataclass(frozen=True, slots=True, eq=False)
class KvPiece:
    """Entries of some KV heads of one layer, for the bound pass: [2, heads, entries, d] in a buffer, keys and values."""

    key: tuple[int, int]
    """Layer, group of heads."""
    host: Tensor
    """[2, heads, entries, d]."""
    runs: Sequence[Run]
    entries: int
    """That the buffer holds, those of the pass itself included."""

    @property
    def nbytes(self) -> int:
        two, heads, _, size = self.host.shape
        return two * heads * self.entries * size * self.host.element_size()

    def view(self, buffer: Tensor) -> Tensor:
        """A buffer as these entries."""
        two, heads, _, size = self.host.shape
        return buffer.view(self.host.dtype).view(two, heads, self.entries, size)

    def load(self, out: Tensor) -> int:
        target = self.view(out)
        for run in self.runs:
            if out.device.type == "cpu":
                target[:, :, run.target].copy_(self.host[:, :, run.source])
                continue
            # One transfer for each head: torch would gather strided ones on the CPU first.
            for to_heads, from_heads in zip(target, self.host, strict=True):
                for to, source in zip(to_heads, from_heads, strict=True):
                    to[run.target].copy_(source[run.source], non_blocking=True)
        two, heads, _, size = self.host.shape
        entries = sum(int(run.source.stop - run.source.start) for run in self.runs)
        return two * heads * size * self.host.element_size() * entries


def runs_of(blocks: Sequence[int], entries: int, size: int, first: int) -> list[Run]:
    """The first `entries` of a sequence with these blocks, which stand in a buffer from `first` on: neighbouring blocks together."""
    used = np.asarray(blocks[: -(-entries // size)], dtype=np.int64)
    if not len(used):
        return []
    starts = [0, *(np.flatnonzero(np.diff(used) != 1) + 1).tolist()]
    found = []
    for start, stop in zip(starts, [*starts[1:], len(used)], strict=True):
        source, tokens = int(used[start]) * size, min(stop * size, entries) - start * size
        found.append(Run(slice(source, source + tokens), slice(first + start * size, first + start * size + tokens)))
    return found


def together(slots: Sequence[int]) -> list[Run]:
    """From the bound tokens' places in turn to where they go: neighbours together."""
    found: list[Run] = []
    for place, slot in enumerate(slots):
        if found and found[-1].target.stop == slot:
            found[-1] = Run(slice(found[-1].source.start, place + 1), slice(found[-1].target.start, slot + 1))
        else:
            found.append(Run(slice(place, place + 1), slice(slot, slot + 1)))
    return found


def write(host: Tensor, runs: Sequence[Run], new: Tensor) -> None:
    """New entries [2, K, T, d] to their places in host memory [2, K, entries, d]."""
    if new.nbytes > ONE_THREAD_BYTES:
        for run in runs:
            host[:, :, run.target].copy_(new[:, :, run.source])
        return
    to, of = host.view(torch.uint8).numpy(), new.view(torch.uint8).numpy()
    for run in runs:
        to[:, :, run.target] = of[:, :, run.source]
