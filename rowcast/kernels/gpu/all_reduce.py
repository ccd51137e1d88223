"""Sums of small messages over GPUs that reach each other's memory: one shot, in which each GPU reads all the others' parts.

A library's all-reduce of the few KiB of a decode step is bound by its protocol, not by bytes. One shot is a single kernel: put the own
part where peers can read it, meet them at a barrier, read and add all parts in the order of ranks. That is torch's, over its symmetric
memory, without NVLink multicast. Where it cannot be used the process group's own all-reduce does the work.
"""

from __future__ import annotations

import logging
import os
import socket
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

log = logging.getLogger("rowcast")

_DTYPES: Final = (torch.float32, torch.bfloat16)
"""What torch's one-shot kernel adds."""
_UNIT: Final = 16
"""Messages of multiples of this many bytes are added by the widest loads."""


class FastAllReduce:
    """Sums tensors in place over the ranks of a group. Every rank makes the same calls in the same order, on one stream at a time.

    Which way is decided once, by all ranks together: `one_shot`, and `reason` says why or why not. Both ways can be captured in a CUDA
    graph, once each has been called, and give the same bits on every rank. In one shot an element's bits depend on nothing but the
    ranks' own values for it: not on the size of the message, as a library's may.
    """

    def __init__(self, group: dist.ProcessGroup, most_elements: int, dtype: torch.dtype, device: torch.device) -> None:
        """`most_elements` of `dtype` is the largest message for one shot, for which memory is kept; larger ones go through the library.

        A collective call: all ranks of `group` make it with the same arguments but for the device.
        """
        self.group, self.most_elements, self.dtype, self.device = group, most_elements, dtype, device
        self._buffer: Tensor | None = None
        reason = None
        for step in (self._obstacle, self._share, self._try):  # All ranks go on, or none: a barrier waits for everyone.
            reason = reason or _first_obstacle(group, step())
        self.one_shot = reason is None
        self.reason = (
            f"all-reduce by {dist.get_backend(group)}: {reason}" if reason else "one-shot all-reduce: peers are reachable"
        )
        if not self.one_shot:
            self._buffer = None
        log.info("%s", self.reason)

    def __call__(self, x: Tensor) -> Tensor:
        """`x`, contiguous, now the sum over all ranks."""
        count = x.numel()
        if self._buffer is None or count > self.most_elements or x.nbytes % _UNIT or x.data_ptr() % _UNIT or not count:
            dist.all_reduce(x, group=self.group)
            return x
        assert x.dtype == self.dtype and x.is_contiguous()
        return _one_shot(self._buffer[:count], x.view(-1), self.group).view(x.shape)

    def _obstacle(self) -> str | None:
        """Why this rank cannot take part, as far as it knows without the others."""
        if self.device.type != "cuda":
            return f"the device is {self.device.type}"
        if self.dtype not in _DTYPES:
            return f"torch adds float32 and bfloat16 in one shot, not {str(self.dtype).removeprefix('torch.')}"
        return "there is one rank" if self.group.size() == 1 else None

    def _share(self) -> str | None:
        """Keep memory that the peers can read; what went wrong, if anything did."""
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # Of no use here.
        try:
            import torch.distributed._symmetric_memory as symmetric_memory

            _ = torch.ops.symm_mem.one_shot_all_reduce_copy_out
            with torch.cuda.device(self.device):
                most = max(self.most_elements, _UNIT // self.dtype.itemsize)
                buffer = symmetric_memory.empty(most, dtype=self.dtype, device=self.device)
                symmetric_memory.rendezvous(buffer, self.group)
        except (RuntimeError, AttributeError, ImportError) as error:
            return f"peers' memory cannot be shared ({_first_line(error)})"
        self._buffer = buffer
        return None

    def _try(self) -> str | None:
        """Add once, in one shot, what has a known sum."""
        assert self._buffer is not None
        count, ranks = _UNIT // self.dtype.itemsize, self.group.size()
        try:
            with torch.cuda.device(self.device):
                trial = torch.full((count,), self.group.rank() + 1.0, dtype=self.dtype, device=self.device)
                found = _one_shot(self._buffer[:count], trial, self.group).tolist()
        except RuntimeError as error:
            return f"one shot does not run ({_first_line(error)})"
        return None if found == [ranks * (ranks + 1) / 2] * count else "a trial in one shot gave a wrong sum"


def _one_shot(buffer: Tensor, x: Tensor, group: dist.ProcessGroup) -> Tensor:  # [N], [N] -> [N]
    """x, summed in place. `buffer` is shared memory."""
    return torch.ops.symm_mem.one_shot_all_reduce_copy_out(buffer, x, "sum", group.group_name, x)  # type: ignore[no-any-return]


def _first_obstacle(group: dist.ProcessGroup, own: str | None) -> str | None:
    """Of the first rank that has one. Ranks on several hosts are one, too."""
    found: list[Any] = [None] * group.size()
    dist.all_gather_object(found, (own, socket.gethostname()), group=group)
    several = "the ranks are on several hosts" if len({host for _, host in found}) > 1 else None
    return next((obstacle for obstacle, _ in found if obstacle), several)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
