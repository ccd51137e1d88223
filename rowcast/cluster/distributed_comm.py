"""`Comm` over torch.distributed: gloo between CPUs, NCCL between GPUs, and one shot for the few KiB of a decode step.

Sums are made on every rank, of all ranks' parts in rank order: the same bits everywhere, whatever the backend, the number of
elements and the number of tokens in a call. Calls give up after the group's time-out, but for one shot, which waits until the gang is
ended. All can be captured in a CUDA graph, by all ranks at the same time, once each has been made.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from rowcast.kernels.gpu.all_reduce import FastAllReduce
from rowcast.runtime.norm import Norm

_GATHER_BYTES = 1 << 18
"""Up to so many bytes all parts go to all ranks; above, each rank sums a piece, which halves the traffic of many ranks and more."""

Store: TypeAlias = Any
"""torch.distributed's, which has no types."""

_all_gather: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its later name


class DistributedComm:
    """Implements `Comm` and `Decisions` for the ranks of the default process group; rank 0 decides."""

    def __init__(self) -> None:
        """Precondition: `join` has returned."""
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        self.leads = self.rank == 0
        self._fast: FastAllReduce | None = None

    def sum_in_one_shot(self, most_elements: int, dtype: torch.dtype, device: torch.device) -> None:
        """From now on add up to so many elements of this kind in one shot, where GPUs reach each other. A collective call."""
        group = dist.group.WORLD
        assert group is not None
        fast = FastAllReduce(group, most_elements, dtype, device)
        self._fast = fast if fast.one_shot else None

    def all_reduce(self, x: Tensor) -> Tensor:
        if self._fast is not None and self._fast.takes(x):
            return self._fast(x)
        if self.world == 2 and x.is_cuda and x.is_contiguous():
            dist.all_reduce(x)  # of two parts there is one sum
            return x
        if self.world == 2 or x.numel() * x.element_size() <= _GATHER_BYTES:
            return _sum(self.exchange(x))
        piece = -(-x.numel() // self.world)
        flat = torch.nn.functional.pad(x.reshape(-1), (0, piece * self.world - x.numel()))
        parts = torch.empty_like(flat)
        dist.all_to_all_single(parts, flat)
        _all_gather(flat, _sum(parts.view(self.world, piece)))
        return flat[: x.numel()].view(x.shape)

    def all_reduce_norm(self, x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        if self._fast is not None and self._fast.takes_norm(x):
            return self._fast.sum_norm(x, norm.weight, norm.bias, norm.eps, norm.rms, norm.keep)
        x = self.all_reduce(x)
        return x, norm(x)

    def exchange(self, x: Tensor) -> Tensor:  # [...] -> [world, ...]
        gathered = x.new_empty((self.world, *x.shape))
        _all_gather(gathered.view(-1), x.reshape(-1))
        return gathered

    def share(self, numbers: Sequence[int]) -> list[int]:
        """Over the CPU: see `Decisions`."""
        shared = torch.tensor(list(numbers), dtype=torch.int64)
        if len(numbers):
            dist.broadcast(shared, src=0)
        return [int(number) for number in shared.tolist()]

    def share_tensor(self, x: Tensor) -> Tensor:
        dist.broadcast(x, src=0)
        return x


def keep_store(host: str, timeout_s: float) -> tuple[Store, int]:
    """A store by which ranks find each other, and its port, which the system chooses. It lives as long as it is kept."""
    store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))  # type: ignore[attr-defined]
    return store, int(store.port)


def find_store(host: str, port: int, timeout_s: float) -> Store:
    """The store that another rank keeps."""
    return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s))  # type: ignore[attr-defined]


def join(store: Store, rank: int, world: int, *, timeout_s: float, device: torch.device) -> None:
    """Become a rank of the default process group. Waits for the others, at most `timeout_s`.

    Tensors on a GPU go over NCCL, those on the CPU over gloo.
    """
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=dist.PrefixStore("ranks", store),  # type: ignore[attr-defined]
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout_s),
    )
    synchronise()


def synchronise() -> None:
    """Wait until all ranks are here."""
    dist.all_reduce(torch.zeros(1))


def _sum(parts: Tensor) -> Tensor:
    """[world, ...] -> [...], in rank order; 16 bits are summed in float32 and rounded once. Overwrites `parts`."""
    total = parts[0] if parts.dtype in (torch.float32, torch.float64) else parts[0].float()
    for part in parts[1:]:
        total.add_(part)
    return total.to(parts.dtype)
