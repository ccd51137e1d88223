"""Sums of small messages over GPUs that reach each other's memory: one shot, in which each GPU reads all the others' parts.

A library's all-reduce of the few KiB of a decode step is bound by its protocol, not by bytes. One shot is a single kernel (`one_shot`)
over memory that torch shares between the processes (its symmetric memory), without NVLink multicast. Where it cannot be used the
process group's own all-reduce does the work, and a norm that follows is a launch of its own.
"""

from __future__ import annotations

import logging
import os
import socket
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from rowcast.kernels.gpu import MOST_TOKENS
from rowcast.settings import settings

if TYPE_CHECKING:
    from rowcast.kernels.gpu.late import Ring
    from rowcast.kernels.gpu.one_shot import Shared

log = logging.getLogger("rowcast")

_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
_MOST_SENT: Final = 16 << 20
"""Bytes that a rank writes to its peers for a sum; from there on a library, which sends each peer a piece, takes over. Assumed."""
_TRIALS: Final = 3
"""Both places of a chunk, and the first one again."""
_TRIAL_LOOKS: Final = 1 << 25
"""At a peer: for seconds, as it may have to compile the kernel first."""


class FastAllReduce:
    """Sums tensors in place over the ranks of a group. Every rank makes the same calls in the same order, on one stream at a time.

    Which way is decided once, by all ranks together: `one_shot`, and `reason` says why or why not. Both ways can be captured in a CUDA
    graph, once each has been called, and give the same bits on every rank. In one shot an element's bits depend on nothing but the
    ranks' own values for it, added in the order of ranks: not on the size of the message, as a library's may.
    """

    def __init__(self, group: dist.ProcessGroup, most_elements: int, dtype: torch.dtype, device: torch.device) -> None:
        """`most_elements` of `dtype` is the largest message for one shot, for which memory is kept; larger ones go through the library.

        A collective call: all ranks of `group` make it with the same arguments but for the device.
        """
        self.group, self.most_elements, self.dtype, self.device = group, most_elements, dtype, device
        self._shared: Shared | None = None
        self._memory: Any = None
        """Torch's, shared as long as it is kept."""
        reason = None
        for step in (self._obstacle, self._share, self._try):  # All ranks go on, or none: a barrier waits for everyone.
            reason = reason or _first_obstacle(group, step())
        self.one_shot = reason is None
        self.reason = (
            f"all-reduce by {dist.get_backend(group)}: {reason}" if reason else "one-shot all-reduce: peers are reachable"
        )
        if not self.one_shot:
            self._shared = self._memory = None
        log.info("%s", self.reason)

    def takes(self, x: Tensor) -> bool:
        """Whether `x` is added in one shot. The same on all ranks, whose tensors have the same shape and strides."""
        if self._shared is None or x.dtype != self.dtype or not x.is_contiguous() or not 0 < x.numel() <= self.most_elements:
            return False
        return 2 * x.nbytes * (self.group.size() - 1) <= _MOST_SENT

    def __call__(self, x: Tensor) -> Tensor:
        """`x`, contiguous, now the sum over all ranks."""
        if not self.takes(x):
            dist.all_reduce(x, group=self.group)
            return x
        from rowcast.kernels.gpu.one_shot import sum_

        assert self._shared is not None
        return sum_(x, self._shared)

    def takes_norm(self, x: Tensor) -> bool:
        """Whether `sum_norm` takes x [T, D]. Of one D it takes any number of tokens up to 16, or none."""
        if not self.takes(x) or x.dim() != 2:
            return False
        from rowcast.kernels.gpu.one_shot import CHUNK, MOST_PIECES

        tokens, size = x.shape
        return tokens <= MOST_TOKENS and size % CHUNK == 0 and size <= MOST_PIECES * CHUNK

    def sum_norm(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool, keep: Ring | None
    ) -> tuple[Tensor, Tensor]:
        """`x`, contiguous, now the sum over all ranks, and its norm (`norms.norm`), in one launch. Precondition: `takes_norm`."""
        from rowcast.kernels.gpu.one_shot import sum_norm

        assert self._shared is not None
        return sum_norm(x, self._shared, weight, bias, eps, rms, keep)

    def _obstacle(self) -> str | None:
        """Why this rank cannot take part, as far as it knows without the others."""
        if self.device.type != "cuda":
            return f"the device is {self.device.type}"
        if not settings().gpu_one_shot:
            return "ROWCAST_GPU_ONE_SHOT is 0"
        if find_spec("triton") is None:
            return "Triton is not installed"
        if self.dtype not in _DTYPES:
            return f"{str(self.dtype).removeprefix('torch.')} is not added in one shot"
        return "there is one rank" if self.group.size() == 1 else None

    def _share(self) -> str | None:
        """Keep memory that the peers can read; what went wrong, if anything did."""
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # Of no use here.
        try:
            import torch.distributed._symmetric_memory as symmetric_memory

            from rowcast.kernels.gpu.one_shot import Shared

            rank, world = self.group.rank(), self.group.size()
            size = Shared.size(self.most_elements, world, self.dtype)
            with torch.cuda.device(self.device):
                memory: Any = symmetric_memory.empty(size, dtype=torch.uint8, device=self.device)
                memory.zero_()
                torch.cuda.synchronize()
                handle: Any = symmetric_memory.rendezvous(memory, self.group)
                addresses = [handle.get_buffer(peer, (size,), torch.uint8).data_ptr() for peer in range(world)]
                addresses[rank] = memory.data_ptr()
                self._shared = Shared(addresses, rank, self.most_elements, self.dtype, self.device)
        except (RuntimeError, AttributeError, ImportError, TypeError) as error:
            return f"peers' memory cannot be shared ({_first_line(error)})"
        self._memory = memory, handle
        return None

    def _try(self) -> str | None:
        """Add, in one shot, what has a known sum, and norm what has a known norm."""
        from rowcast.kernels.gpu.one_shot import CHUNK, sum_, sum_norm

        assert self._shared is not None
        rank, ranks = self.group.rank(), self.group.size()
        try:
            with torch.cuda.device(self.device):
                trials = [
                    torch.full((self.most_elements,), rank + float(trial), dtype=self.dtype, device=self.device)
                    for trial in range(_TRIALS)
                ]
                for x in trials:
                    sum_(x, self._shared, _TRIAL_LOOKS)
                right = [bool((x == ranks * (ranks - 1) // 2 + ranks * trial).all()) for trial, x in enumerate(trials)]
                if (tokens := min(MOST_TOKENS, self.most_elements // (2 * CHUNK))) > 0:
                    signs = torch.ones(tokens, 2 * CHUNK, dtype=self.dtype, device=self.device)
                    signs[:, ::2] = -1.0
                    normed = sum_norm(signs.clone(), self._shared, None, None, 0.0, False, None, _TRIAL_LOOKS)[1]
                    right.append(torch.allclose(normed, signs, rtol=1e-2))
        except Exception as error:  # of the driver, or of Triton's compiler, which has classes of its own
            return f"one shot does not run ({_first_line(error)})"
        return None if all(right) else "a trial in one shot gave a wrong sum or norm"


def _first_obstacle(group: dist.ProcessGroup, own: str | None) -> str | None:
    """Of the first rank that has one. Ranks on several hosts are one, too."""
    found: list[Any] = [None] * group.size()
    dist.all_gather_object(found, (own, socket.gethostname()), group=group)
    several = "the ranks are on several hosts" if len({host for _, host in found}) > 1 else None
    return next((obstacle for obstacle, _ in found if obstacle), several)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
