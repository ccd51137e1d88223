"""The way to the CPU and back, for the part of a sub-layer that it computes while the device computes its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rowcast.offload.host_store import HostStore


class CpuSide:
    """Carries a pass's hidden states to the CPU, and what it made of them back."""

    def __init__(self, store: HostStore, tokens: int, width: int, dtype: torch.dtype) -> None:
        """`tokens`: most of those whose copies hide under computing; passes over more wait for them."""
        self._device = store.device
        self._event: Any = None
        self._there = self._back = torch.empty(0)
        if self._device.type == "cuda":
            self._there, self._back = (store.bank((tokens, width), dtype).tensor for _ in range(2))
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._sent = self._there

    def send(self, x: Tensor) -> None:
        """x [T, D], on the device: its copy is under way."""
        if self._event is None:
            self._sent = x
        elif len(x) > len(self._there):
            self._sent = x.cpu()
        else:
            self._sent = self._there[: len(x)]
            self._sent.copy_(x, non_blocking=True)
            self._event.record(torch.cuda.current_stream(self._device))

    def received(self) -> Tensor:
        """What was sent, on the CPU. Waits for the copy, not for what was launched after it."""
        if self._event is not None:
            self._event.synchronize()
        return self._sent

    def returned(self, y: Tensor) -> Tensor:
        """y [T, D] of the CPU, on the device."""
        if self._event is None:
            return y
        if len(y) > len(self._back):
            return y.to(self._device)
        # The last copy out of this buffer is over: what it was added to went into the hidden states that were received since.
        back = self._back[: len(y)].copy_(y)
        return back.to(self._device, non_blocking=True)
