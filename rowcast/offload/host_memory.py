"""Host memory that a GPU reads over the bus: ordinary pages, pinned in place and mapped for the device."""

from __future__ import annotations

import ctypes
import math
import mmap
import weakref
from contextlib import suppress
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from rowcast.errors import OutOfMemoryError, UserError
from rowcast.kernels.gpu.host_rows import UNIT, gather
from rowcast.offload import numa

_PORTABLE_AND_MAPPED = 1 | 2
"""Flags of cudaHostRegister: pinned for every context, mapped into the device's address space."""


class HostTensor:
    """A CPU tensor whose memory the device reads while this object is open. Rows are along the first dimension.

    Without a GPU (`device` cpu) nothing is pinned and the device's address is the tensor's own: that is for tests.
    """

    def __init__(self, tensor: Tensor, device: torch.device) -> None:
        """Pin the memory of `tensor`, contiguous, whole units of `UNIT` bytes, whose pages were touched and hold nothing else that is
        pinned.

        Raises UserError where the system refuses to pin it or the device does not see it.
        """
        assert tensor.is_contiguous() and tensor.device.type == "cpu" and tensor.nbytes % UNIT == 0 and tensor.nbytes
        self.tensor, self.device = tensor, device
        self.address = tensor.data_ptr()
        """Of the first byte, as the device sees it."""
        self._unpin: Any = None
        if device.type == "cuda":
            with torch.cuda.device(device):
                _register(tensor, device)
                self._unpin = weakref.finalize(self, _unregister, tensor.data_ptr())
                try:
                    self.address = _device_address(tensor.data_ptr())
                    self._check()
                except UserError:
                    self.close()
                    raise

    @property
    def row_bytes(self) -> int:
        """From one row to the next."""
        return self.tensor.stride(0) * self.tensor.element_size()

    def gather(self, ids: Tensor, count: Tensor, out: Tensor) -> None:
        """out[i] = row ids[i] for i < count, by the device, on its current stream: `kernels.gpu.host_rows.gather`.

        A row of `out` may be shorter than one of this tensor: it gets the row's beginning. This object has to stay open until the
        device is done.
        """
        gather(self.address, self.row_bytes, ids, count, out)

    def close(self) -> None:
        """Unpin the memory, once the device is done with all that it was given. The tensor stays, for the CPU. May be called again."""
        if self._unpin is not None and self._unpin.alive:
            torch.cuda.synchronize(self.device)
            self._unpin()

    def __enter__(self) -> HostTensor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _check(self) -> None:
        """That the device reads at this address what the host writes, at both ends. Their content is put back."""
        units = self.tensor.view(-1).view(torch.uint8).view(-1, UNIT)
        first = torch.zeros(1, dtype=torch.int32, device=self.device)
        for place, mark in ((0, 0x5A), (len(units) - 1, 0xA5)):
            kept = units[place].clone()
            units[place] = mark
            seen = torch.zeros(1, UNIT, dtype=torch.uint8, device=self.device)
            gather(self.address + place * UNIT, UNIT, first, first + 1, seen)
            found = seen.cpu()
            units[place] = kept
            if not bool((found == mark).all()):
                raise UserError(f"{self.device} does not see what is written to pinned host memory: keep the weights on the GPU")


def pinned_bank(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> HostTensor:
    """Zeros that the device can read; rows are along the first dimension of `shape`.

    Raises OutOfMemoryError where the host has not enough memory, UserError where the system refuses to pin it.
    """
    size = math.prod(shape) * dtype.itemsize
    try:
        pages = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # On pages of its own.
    except OSError as error:
        raise OutOfMemoryError(
            f"no {_gib(size)} of host memory are free ({error.strerror}): use a lower --host-memory"
        ) from error
    with suppress(AttributeError, OSError):  # Not every system has huge pages.
        pages.madvise(mmap.MADV_HUGEPAGE)
    bank = torch.frombuffer(pages, dtype=dtype, count=math.prod(shape)).view(shape)
    if (node := numa.node_of(device)) is not None and size:
        numa.prefer(bank.data_ptr(), size, node)
    return HostTensor(bank.zero_(), device)


def _register(tensor: Tensor, device: torch.device) -> None:
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    code = runtime.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, _PORTABLE_AND_MAPPED)
    if code == runtime.cudaError.success:
        return
    with suppress(RuntimeError):  # The runtime remembers the error and would blame the next kernel for it.
        torch.zeros(1, device=device)
    raise UserError(
        f"the system refuses to pin {_gib(tensor.nbytes)} of host memory for the GPU ({runtime.cudaGetErrorString(code)}): allow more "
        "locked memory (ulimit -l) or use a lower --host-memory"
    )


def _unregister(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]


def _device_address(address: int) -> int:
    """Of pinned host memory, by the driver. It need not be the host's address."""
    found = ctypes.c_uint64()
    driver = ctypes.CDLL("libcuda.so.1")
    code = driver.cuMemHostGetDevicePointer_v2(ctypes.byref(found), ctypes.c_void_p(address), ctypes.c_uint(0))
    if code:
        raise UserError(f"the driver maps no pinned host memory for the GPU (error {code}): keep the weights on the GPU")
    return found.value


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.2f} GiB"
