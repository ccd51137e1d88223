"""Banks of rows in host memory for one device: pinned in place where the system allows it, ordinary pages where it does not.

Without a GPU nothing is pinned and "the device" reads the pages as they are: what runs on a GPU runs there, too.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rowcast.errors import OutOfMemoryError, UserError
from rowcast.placement import host

if TYPE_CHECKING:
    from rowcast.offload.host_memory import HostTensor

log = logging.getLogger("rowcast")

_UNIT = 16
"""Bytes: `kernels.gpu.host_rows.UNIT`, which is not to be had without Triton."""


_CHECKED_BYTES = 16 << 20
"""Smaller banks are not worth a look at what is free."""


class HostBank:
    """A tensor in host memory, contiguous, rows along its first dimension."""

    def __init__(self, tensor: Tensor, held: HostTensor | None, device: torch.device) -> None:
        """`held`: the pinned memory that it lies in; None: pages that the device does not see."""
        self.tensor = tensor
        self.device = device
        self._held = held

    @property
    def row_bytes(self) -> int:
        return self.tensor[0].nbytes if len(self.tensor) else 0

    @property
    def bytes(self) -> int:
        return self.tensor.nbytes

    @property
    def asks_host(self) -> bool:
        """Whether `gather` waits for the device, as it is the host that copies: no pass with such a call can be captured."""
        return self.device.type == "cuda" and self._held is None

    def widened(self, rows: int) -> HostBank:
        """The same memory, so many neighbouring rows as one. Precondition: they divide the number of rows."""
        return HostBank(self.tensor.view(len(self.tensor) // rows, -1), self._held, self.device)

    def piece(self, rows: slice) -> Tensor:
        """Neighbouring rows as bytes, [n * row_bytes] uint8: no copy."""
        return self.tensor[rows].view(-1).view(torch.uint8)

    def gather(self, ids: Tensor, count: Tensor, out: Tensor, places: Tensor | None = None) -> None:
        """out[i] = row ids[i] for i < count; `ids` [C] int32 and `count` [1] int32 on the device, `out` [C, ...] there, contiguous.

        With `places` [C] int32, each once, out[places[i]] in place of out[i], `out` of any length.

        On a GPU by a kernel over the bus, on its current stream. Where the memory is not pinned, the host is asked, which waits for
        the device. Precondition on a GPU: rows are whole units of 16 bytes.
        """
        if not len(ids):
            return
        if self.device.type == "cuda" and self._held is not None:
            from rowcast.kernels.gpu.host_rows import gather

            gather(self._held.address, self.row_bytes, ids, count, out, places=places)
            return
        rows = min(int(count), len(ids))
        table, target = self.tensor.view(len(self.tensor), -1), out.view(len(out), -1)
        if self.device.type == "cpu" and places is None:
            torch.index_select(table, 0, ids[:rows], out=target[:rows])
            return
        found = table.index_select(0, ids[:rows].cpu()).to(self.device)
        if places is None:
            target[:rows] = found
        else:
            target.index_copy_(0, places[:rows].long(), found)


class HostStore:
    """All banks of one device, freed together."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0
        self.unpinned: str | None = None
        """Why memory is not pinned, where the device could use it."""
        self._held: list[Tensor] = []
        self._pinned: list[HostTensor] = []

    def bank(self, shape: tuple[int, ...], dtype: torch.dtype) -> HostBank:
        """Zeros. Raises OutOfMemoryError where the host has not enough memory."""
        size = math.prod(shape) * dtype.itemsize
        padded = max(_UNIT, -(-size // _UNIT) * _UNIT)
        _check_free(padded)
        pinned = None
        if self.device.type != "cpu" and self.unpinned is None:
            try:
                pinned = pinned_pages(padded, self.device)
                self._pinned.append(pinned)
            except OutOfMemoryError:
                raise
            except UserError as error:
                self.unpinned = str(error)
                log.warning("weights and KV in host memory are not pinned, which is slower: %s", error)
        pages = _pages(padded) if pinned is None else pinned.tensor
        self._held.append(pages)
        self.bytes += padded
        return HostBank(pages[:size].view(dtype).view(shape), pinned, self.device)

    def close(self) -> None:
        """Unpin everything, once the device is done with it, and forget it. May be called again."""
        for pinned in self._pinned:
            pinned.close()
        self._pinned.clear()
        self._held.clear()
        self.bytes = 0


def pinned_pages(size: int, device: torch.device) -> HostTensor:
    """As `host_memory.pinned_bank`, of bytes."""
    from rowcast.offload.host_memory import pinned_bank

    return pinned_bank((size,), torch.uint8, device)


def _check_free(size: int) -> None:
    """Raise OutOfMemoryError before the system runs out of memory: it would not refuse, but end a process."""
    if size < _CHECKED_BYTES:
        return
    free = host.read().available_bytes
    if size > free:
        raise OutOfMemoryError(
            f"no {size / (1 << 30):.2f} GiB of host memory are free, but {free / (1 << 30):.2f}: use a lower --host-memory, or end "
            "what else takes memory"
        )


def _pages(size: int) -> Tensor:
    """Ordinary memory, zeros."""
    try:
        return torch.zeros(size, dtype=torch.uint8)
    except RuntimeError as error:
        raise OutOfMemoryError(f"no {size / (1 << 30):.2f} GiB of host memory are free: use a lower --host-memory") from error
