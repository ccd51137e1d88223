"""Ranks as threads of one process: `Comm` without a network, for tests."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from rowcast.runtime.norm import Norm

T = TypeVar("T")

TIMEOUT_S = 60.0


class ThreadComm:
    """Rank `rank` of a group that shares `slots` (one a rank) and `barrier`."""

    def __init__(self, rank: int, slots: list[Tensor], barrier: threading.Barrier) -> None:
        self.rank = rank
        self.world = len(slots)
        self._slots = slots
        self._barrier = barrier

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum in rank order, so the same bits on every rank."""
        return self.exchange(x).sum(0)

    def all_reduce_norm(self, x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """The sum, and its norm."""
        x = self.all_reduce(x)
        return x, norm(x)

    def exchange(self, x: Tensor) -> Tensor:
        """[...] -> [world, ...]."""
        self._slots[self.rank] = x
        self._barrier.wait(TIMEOUT_S)
        gathered = torch.stack(self._slots)
        self._barrier.wait(TIMEOUT_S)
        return gathered


def run_ranks(world: int, work: Callable[[ThreadComm], T]) -> list[T]:
    """Call `work` once a rank, at the same time; results in rank order. A rank's error ends all of them and is raised."""
    slots = [torch.empty(0)] * world
    barrier = threading.Barrier(world)

    def rank(index: int) -> T:
        try:
            return work(ThreadComm(index, slots, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(world) as pool:
        futures = [pool.submit(rank, index) for index in range(world)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
    return [future.result() for future in futures]
