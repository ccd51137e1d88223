"""Memory of another GPU of this machine, whose rows a kernel reads over the link between the two: the peer tier's banks.

The process that reads allocates it there, so that no memory has to be shared between processes; that costs a context on the other GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rowcast.errors import OutOfMemoryError, UserError
from rowcast.offload.host_store import HostBank

_UNIT = 16
"""Bytes: `kernels.gpu.host_rows.UNIT`, which is not to be had without Triton."""
_PROGRAMS = 128
"""NVLink has more bytes under way than a bus: it takes most multiprocessors to ask for them."""


class PeerTensor:
    """A tensor on the GPU `tensor.device` that `device` reads. Rows are along the first dimension.

    On a CPU it is ordinary memory: that is for tests.
    """

    def __init__(self, tensor: Tensor, device: torch.device) -> None:
        """`tensor`: contiguous, whole units of 16 bytes. Raises UserError where `device` does not reach it."""
        assert tensor.is_contiguous() and tensor.nbytes % _UNIT == 0 and tensor.nbytes
        self.tensor, self.device = tensor, device
        self.address = tensor.data_ptr()
        if device.type == "cuda":
            enable(device, tensor.device)

    @property
    def row_bytes(self) -> int:
        """From one row to the next."""
        return self.tensor.stride(0) * self.tensor.element_size()

    def gather(self, ids: Tensor, count: Tensor, out: Tensor, places: Tensor | None = None) -> None:
        """As `kernels.gpu.host_rows.gather`, on the reader's current stream."""
        from rowcast.kernels.gpu.host_rows import Fetch, gather

        gather(self.address, self.row_bytes, ids, count, out, Fetch(programs=_PROGRAMS), places)


def enable(device: torch.device, holder: torch.device) -> None:
    """Let kernels of `device` read the memory of `holder`. Raises UserError where the cards cannot."""
    if device == holder:
        return
    if not torch.cuda.can_device_access_peer(device, holder):
        raise UserError(
            f"{device} cannot read the memory of {holder}, as between GeForce cards: keep rows in host memory, or use cards with "
            "NVLink or peer access over PCIe"
        )
    # torch enables the access when it copies, in the direction of the copy.
    torch.zeros(1, device=device).copy_(torch.zeros(1, device=holder))
    torch.zeros(1, device=holder).copy_(torch.zeros(1, device=device))
    torch.cuda.synchronize(device)


def peer_tensor(shape: tuple[int, ...], dtype: torch.dtype, holder: torch.device, device: torch.device) -> PeerTensor:
    """Zeros on `holder` for `device`. Raises UserError where it is out of reach, OutOfMemoryError where it has not enough memory."""
    try:
        return PeerTensor(torch.zeros(shape, dtype=dtype, device=holder), device)
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"{holder} has not enough memory free to hold rows for {device}: free some, or plan with less"
        ) from error


class PeerBank(HostBank):
    """A tensor on another GPU, rows along its first dimension: what a `HostBank` is in host memory."""

    def __init__(self, held: PeerTensor) -> None:
        super().__init__(held.tensor, None, held.device)
        self._peer = held

    @property
    def asks_host(self) -> bool:
        """No: the device reads the other's memory by itself."""
        return False

    def gather(self, ids: Tensor, count: Tensor, out: Tensor, places: Tensor | None = None) -> None:
        """As `HostBank.gather`, over the link between the two GPUs."""
        if self.device.type == "cuda" and len(ids):
            self._peer.gather(ids, count, out, places)
        else:
            super().gather(ids, count, out, places)


class PeerStore:
    """Banks of one device in another GPU's memory."""

    def __init__(self, device: torch.device) -> None:
        """The holder is the GPU in its reach with the most memory free. Raises UserError where there is none."""
        self.device = device
        self.holder = _holder(device)
        self.bytes = 0

    def bank(self, shape: tuple[int, ...], dtype: torch.dtype) -> PeerBank:
        """Zeros. Raises OutOfMemoryError where the holder has not enough memory."""
        held = peer_tensor(shape, dtype, self.holder, self.device)
        self.bytes += held.tensor.nbytes
        return PeerBank(held)


def _holder(device: torch.device) -> torch.device:
    if device.type != "cuda":
        return device
    own = torch.cuda.current_device() if device.index is None else device.index
    others = [torch.device("cuda", place) for place in range(torch.cuda.device_count()) if place != own]
    reached = [other for other in others if torch.cuda.can_device_access_peer(own, other)]
    if not reached:
        raise UserError(
            f"the plan has another GPU hold rows for {device}, but none of the {len(others)} others is in its reach: make a plan for "
            "this machine"
        )
    return max(reached, key=lambda other: torch.cuda.mem_get_info(other)[0])
