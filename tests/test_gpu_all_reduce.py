"""All-reduce of small messages: one shot where two GPUs reach each other, the process group's own everywhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from rowcast.kernels.gpu import norms
from rowcast.kernels.gpu.all_reduce import FastAllReduce
from rowcast.kernels.gpu.late import RING, Ring
from rowcast.kernels.gpu.one_shot import CHUNK, Shared, sum_, sum_norm

RANKS = 2
HIDDEN = 12288
"""A message of 24 KiB in bf16."""

Work = Callable[[dist.ProcessGroup, int], dict[str, Any]]


def _rank(rank: int, folder: str, backend: str, work: Work) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    group = dist.group.WORLD
    assert group is not None
    torch.save(work(group, rank), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _run(folder: Path, backend: str, work: Work) -> list[dict[str, Any]]:
    """What each rank's `work` returns."""
    spawn(_rank, (str(folder), backend, work), nprocs=RANKS)  # type: ignore[no-untyped-call]
    return [torch.load(folder / f"{rank}.pt", map_location="cpu") for rank in range(RANKS)]


def _part(rank: int, tokens: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(10 * seed + rank)).to(dtype)


class _Unreachable(FastAllReduce):
    """Rank 1's memory cannot be shared, which it alone finds out."""

    def _obstacle(self) -> str | None:
        return None

    def _share(self) -> str | None:
        self._memory = torch.zeros(self.most_elements)
        return "no way to rank 1" if self.group.rank() == 1 else None

    def _try(self) -> str | None:
        raise AssertionError("rank 0 would wait for ever")


def _by_gloo(group: dist.ProcessGroup, rank: int) -> dict[str, Any]:
    reduce = FastAllReduce(group, HIDDEN, torch.float32, torch.device("cpu"))
    x = _part(rank, 2, 0, torch.float32)
    result = reduce(x)
    unreachable = _Unreachable(group, HIDDEN, torch.float32, torch.device("cpu"))
    return {
        "one_shot": reduce.one_shot,
        "reason": reduce.reason,
        "sum": result,
        "in_place": result.data_ptr() == x.data_ptr(),
        "unreachable": unreachable.reason,
        "ones": unreachable(torch.ones(3)).tolist(),
    }


def test_without_gpus_the_group_adds(tmp_path: Path) -> None:
    expected = _part(0, 2, 0, torch.float32) + _part(1, 2, 0, torch.float32)
    for found in _run(tmp_path, "gloo", _by_gloo):
        assert not found["one_shot"] and found["reason"] == "all-reduce by gloo: the device is cpu"
        assert torch.equal(found["sum"], expected) and found["in_place"]
        assert found["unreachable"] == "all-reduce by gloo: no way to rank 1" and found["ones"] == [2.0] * 3


def _ranks(most: int, world: int, dtype: torch.dtype) -> list[Shared]:
    memory = [torch.zeros(Shared.size(most, world, dtype), dtype=torch.uint8) for _ in range(world)]
    _kept.extend(memory)
    return [Shared([each.data_ptr() for each in memory], rank, most, dtype, torch.device("cpu")) for rank in range(world)]


_kept: list[Tensor] = []
"""Memory that is known by its address alone."""


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory of one device stands for several")
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernel_adds_in_the_order_of_ranks(world: int, dtype: torch.dtype) -> None:
    """Ranks one after another: each first puts its part and does not wait, then adds."""
    most = 2 * CHUNK + 40
    shared = _ranks(most, world, dtype)
    for call, count in enumerate((1, CHUNK, most, most, 7)):
        parts = [(_part(rank, 1, call, torch.float32)[0, :count] * 10.0**rank).to(dtype) for rank in range(world)]
        total = torch.zeros(count)
        for part in parts:
            total += part.float()
        for part, rank in zip(parts, shared, strict=True):
            sum_(part.clone(), rank, looks=0)
            rank.calls[: -(-count // CHUNK)] -= 1
        for part, rank in zip(parts, shared, strict=True):
            assert torch.equal(sum_(part, rank, looks=0), total.to(dtype))


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory of one device stands for several")
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("pieces", [1, 3])
def test_the_kernel_norms_what_it_added(pieces: int, rms: bool) -> None:
    """Without waiting: once for the parts, once for the chunks' statistics, once for the norm."""
    world, tokens, size, dtype = 2, 3, pieces * CHUNK, torch.float32
    shared = _ranks(4 * size, world, dtype)
    draws = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(size, generator=draws) for _ in range(2))
    rows = torch.zeros(RING, size)
    keep = Ring(rows, torch.tensor([14], dtype=torch.int32), torch.tensor([tokens - 1], dtype=torch.int32))
    for _ in range(2):
        parts = [3 + torch.randn(tokens, size, generator=draws) for _ in range(world)]
        for _ in range(2):
            for part, rank in zip(parts, shared, strict=True):
                sum_norm(part.clone(), rank, weight, bias, 1e-5, rms, looks=0)
                rank.calls[: tokens * pieces] -= 1
        added = parts[0] + parts[1]
        wanted = norms.norm(added, weight, bias, 1e-5, rms)
        for part, rank in zip(parts, shared, strict=True):
            total, normed = sum_norm(part, rank, weight, bias, 1e-5, rms, keep, looks=0)
            assert torch.equal(total, added) and total.data_ptr() == part.data_ptr() != normed.data_ptr()
            torch.testing.assert_close(normed, wanted, atol=2e-6, rtol=2e-6)
            assert torch.equal(rows[[14, 15]], normed[:2]) and not rows[0].any()


def _by_gpu(group: dist.ProcessGroup, rank: int) -> dict[str, Any]:
    device = torch.device("cuda", rank)
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        reduce = FastAllReduce(group, 16 * HIDDEN, dtype, device)
        sums = [reduce(_part(rank, tokens, tokens, dtype).to(device)) for tokens in (1, 7, 16, 40)]
        some = _part(rank, 7, 7, dtype).to(device)
        alone = torch.cat([reduce(some[token : token + 1].clone()) for token in range(7)])
        weight, bias = (_part(5 + which, 1, 0, dtype)[0].to(device) for which in range(2))
        assert reduce.takes_norm(some) == reduce.one_shot
        ring = Ring(torch.zeros(RING, HIDDEN, dtype=dtype, device=device), *torch.tensor([[14], [7]], device=device).int())
        normed = {}
        for rms in (False, True) if reduce.one_shot else ():
            total, together = reduce.sum_norm(some.clone(), weight, bias, 1e-5, rms, ring)
            assert torch.equal(ring.rows[(torch.arange(7) + 14) % RING], together)
            apart = []
            for t in range(7):  # with others in between, of another size and of more tokens
                apart.append(reduce.sum_norm(some[t : t + 1].clone(), weight, bias, 1e-5, rms, None)[1])
                reduce.sum_norm(some[:, : CHUNK * (1 + t % 2)].contiguous(), None, None, 1e-5, rms, None)
                reduce.sum_norm(some[:1].expand(16, -1).contiguous(), weight, bias, 1e-5, rms, None)
            normed[rms] = together, torch.cat(apart), norms.norm(total, weight, bias, 1e-5, rms)
        x, y = torch.zeros(1, HIDDEN, dtype=dtype, device=device), torch.zeros(7, HIDDEN, dtype=dtype, device=device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            reduce(x)
            reduce(y)
            if reduce.one_shot:
                once = reduce.sum_norm(x.clone(), weight, bias, 1e-5, False, None)
        replayed = []
        for seed in range(50):
            x.copy_(_part(rank, 1, seed, dtype))
            y.copy_(_part(rank, 7, seed, dtype))
            graph.replay()
            replayed.append((x.clone(), y.clone()))
            if reduce.one_shot:
                doubled = norms.norm(once[0], weight, bias, 1e-5, False).float()
                assert (once[0] == 2 * x).all() and (once[1].float() - doubled).norm() <= 0.01 * doubled.norm()
        found[str(dtype)] = {
            "one_shot": reduce.one_shot,
            "reason": reduce.reason,
            "sums": sums,
            "alone": alone,
            "normed": normed,
            "odd": reduce(torch.full((3,), rank + 1.0, dtype=dtype, device=device)),
            "replayed": replayed,
        }
    return found


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs two GPUs")
def test_two_gpus(tmp_path: Path) -> None:
    first, second = _run(tmp_path, "nccl", _by_gpu)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ours, theirs = first[str(dtype)], second[str(dtype)]
        assert ours["reason"] == theirs["reason"]
        if not ours["one_shot"]:
            assert "cannot be shared" in ours["reason"], ours["reason"]
        for tokens, a, b in zip((1, 7, 16, 40), ours["sums"], theirs["sums"], strict=True):
            assert torch.equal(a, _part(0, tokens, tokens, dtype) + _part(1, tokens, tokens, dtype))
            assert torch.equal(a, b)
        assert torch.equal(ours["alone"], ours["sums"][1])
        for rms, (together, apart, wanted) in ours["normed"].items():
            assert torch.equal(together, apart) and torch.equal(together, theirs["normed"][rms][0])
            torch.testing.assert_close(together, wanted)
        assert ours["odd"].tolist() == [3.0] * 3
        for seed, (a, b) in enumerate(zip(ours["replayed"], theirs["replayed"], strict=True)):
            for tokens, x, y in zip((1, 7), a, b, strict=True):
                assert torch.equal(x, _part(0, tokens, seed, dtype) + _part(1, tokens, seed, dtype))
                assert torch.equal(x, y)


@pytest.mark.parametrize(("world", "tokens", "taken"), [(4, 64, True), (8, 16, True), (8, 64, False)])
def test_what_many_ranks_would_write_to_all_is_left_to_the_library(world: int, tokens: int, taken: bool) -> None:
    """By bytes alone, so that all ranks agree; 16 tokens of OPT-175B, whose bits must not depend on their number, go one way."""
    reduce = FastAllReduce.__new__(FastAllReduce)
    reduce.group, reduce.most_elements, reduce.dtype = SimpleNamespace(size=lambda: world), 64 * HIDDEN, torch.bfloat16  # type: ignore[assignment]
    reduce._shared = SimpleNamespace()  # type: ignore[assignment]
    x = torch.empty(tokens, HIDDEN, dtype=torch.bfloat16)
    assert reduce.takes(x) == taken and reduce.takes_norm(x) == (taken and tokens <= 16)
