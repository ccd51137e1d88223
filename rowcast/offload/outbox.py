"""What the device writes to host memory: through pinned pages, on a stream of its own, put into place when the host next looks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rowcast.offload.host_store import HostStore


@dataclass(frozen=True, slots=True)
class _Posted:
    content: Tensor
    """On the device, until it has been read."""
    copy: Tensor
    put: Callable[[Tensor], None]
    done: Any
    """Event after the copy."""


class Outbox:
    """Copies on their way to the host. On a CPU there is no way: they are put into place at once."""

    def __init__(self, store: HostStore, capacity_bytes: int) -> None:
        """`capacity_bytes`: most that is on its way; more waits until what went before has arrived."""
        self._device = store.device
        self._posted: list[_Posted] = []
        self._filled = 0
        self._pages = torch.empty(0, dtype=torch.uint8)
        self._stream: Any = None
        self.bytes = 0
        """Sent."""
        if self._device.type == "cuda":
            self._pages = store.bank((capacity_bytes,), torch.uint8).tensor
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def post(self, content: Tensor, put: Callable[[Tensor], None]) -> None:
        """Hand `content`, contiguous, as it is now on the current stream, to `put` as a CPU tensor that is valid during the call."""
        self.bytes += content.nbytes
        if self._stream is None:
            put(content)
            return
        size = -(-content.nbytes // 256) * 256
        if self._filled + size > len(self._pages):
            self.drain()
        if size > len(self._pages):
            put(content.cpu())
            return
        copy = self._pages[self._filled : self._filled + content.nbytes].view(content.dtype).view(content.shape)
        self._filled += size
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            copy.copy_(content, non_blocking=True)
            done = self._stream.record_event()
        self._posted.append(_Posted(content, copy, put, done))

    def drain(self) -> None:
        """Everything that was posted is in place. Waits for copies that are under way."""
        for posted in self._posted:
            posted.done.synchronize()
            posted.put(posted.copy)
        self._posted.clear()
        self._filled = 0
