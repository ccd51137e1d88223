"""Sums over processes: in rank order, whatever the size, and the same bits everywhere."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from rowcast.cluster import distributed_comm
from rowcast.cluster.distributed_comm import DistributedComm, find_store, join, keep_store


def part(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Numbers of very different size: their sum depends on its order."""
    generator = torch.Generator().manual_seed(rank)
    return (torch.randn(shape, generator=generator) * 10.0 ** (3 * ((rank % 3) - 1))).to(dtype)


def on_ranks(world: int, work: Callable[[DistributedComm], Any], timeout_s: float = 20) -> list[Any]:
    """Results of forked ranks, in order."""
    store, port = keep_store("127.0.0.1", timeout_s)

    def rank(index: int, answer: Connection) -> None:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        theirs = find_store("127.0.0.1", port, timeout_s)
        join(theirs, index, world, timeout_s=timeout_s, device=torch.device("cpu"))
        try:
            answer.send(work(DistributedComm()))
        except Exception as error:
            answer.send(f"{type(error).__name__}: {error}")
        os._exit(0)

    forked = multiprocessing.get_context("fork")
    pipes = [forked.Pipe() for _ in range(world)]
    ranks = [forked.Process(target=rank, args=(index, pipe[1])) for index, pipe in enumerate(pipes)]
    for process in ranks:
        process.start()
    found = [pipe[0].recv() for pipe in pipes if pipe[0].poll(30)]
    for process in ranks:
        process.join(10)
    assert len(found) == world
    del store
    return found


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_in_rank_order_whatever_their_size(world: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (7, 5)
    parts = [part(rank, shape, dtype) for rank in range(world)]
    total = parts[0].float()
    for each in parts[1:]:
        total = total + each.float()

    def work(comm: DistributedComm) -> list[list[float]]:
        own = part(comm.rank, shape, dtype)
        found = []
        for most in (1 << 18, 0):  # at once, and piece by piece
            distributed_comm._GATHER_BYTES = most
            found.append(comm.all_reduce(own.clone()).float().flatten().tolist())
        assert torch.equal(comm.exchange(own), torch.stack(parts))
        assert own.equal(part(comm.rank, shape, dtype))
        return found

    for both in on_ranks(world, work):
        assert both == [total.to(dtype).float().flatten().tolist()] * 2


def test_the_first_rank_decides() -> None:
    def work(comm: DistributedComm) -> tuple[bool, list[int], list[int]]:
        return comm.leads, comm.share([comm.rank + 5, 2**40]), comm.share([])

    assert on_ranks(2, work) == [(True, [5, 2**40], []), (False, [5, 2**40], [])]


def test_a_rank_that_does_not_come_is_not_waited_for_for_ever() -> None:
    def work(comm: DistributedComm) -> str:
        if comm.rank == 1:
            import time

            time.sleep(3)
            return "late"
        comm.all_reduce(torch.zeros(3))
        return "never"

    first, second = on_ranks(2, work, timeout_s=1.0)
    assert "Error" in first and second == "late"
