"""Memory of another GPU of this machine, whose rows a kernel reads over the link between the two: the peer tier's banks.

The process that reads allocates it there, so that no memory has to be shared between processes; that costs a context on the other GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rowcast.errors import OutOfMemoryError, UserError
from rowcast.kernels.gpu.host_rows import UNIT, Fetch, gather

FETCH = Fetch(programs=128)
"""NVLink has more bytes under way than a bus: it takes most multiprocessors to ask for them."""


class PeerTensor:
    """A tensor on the GPU `tensor.device` that `device` reads. Rows are along the first dimension.

    On a CPU it is ordinary memory: that is for tests.
    """

    def __init__(self, tensor: Tensor, device: torch.device) -> None:
        """`tensor`: contiguous, whole units of `UNIT` bytes. Raises UserError where `device` does not reach it."""
        assert tensor.is_contiguous() and tensor.nbytes % UNIT == 0 and tensor.nbytes
        self.tensor, self.device = tensor, device
        self.address = tensor.data_ptr()
        if device.type == "cuda":
            enable(device, tensor.device)

    @property
    def row_bytes(self) -> int:
        """From one row to the next."""
        return self.tensor.stride(0) * self.tensor.element_size()

    def gather(self, ids: Tensor, count: Tensor, out: Tensor, places: Tensor | None = None, fetch: Fetch = FETCH) -> None:
        """As `kernels.gpu.host_rows.gather`, on the reader's current stream."""
        gather(self.address, self.row_bytes, ids, count, out, fetch, places)


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
    if device.type == "cuda":
        enable(device, holder)
    try:
        return PeerTensor(torch.zeros(shape, dtype=dtype, device=holder), device)
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"{holder} has not enough memory free to hold rows for {device}: free some, or plan with less"
        ) from error
