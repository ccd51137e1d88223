"""Dense products with a weight that stays put: y = x W^T + b.

The one dispatch point for them. On a CPU with oneDNN the weight is re-ordered once into the library's blocked layout, which a
decode step reads two to three times faster than the row-major one (docs/experiments.md); on a GPU few tokens go to
`kernels/gpu/products.py`; elsewhere it is torch's own `linear`.
Setting ROWCAST_CPU_PACK=0 turns the re-ordering off, and `backend` tells which of the two a device gets.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rowcast.kernels import gpu
from rowcast.settings import settings

Backend = Literal["onednn-packed", "torch"]

_KEPT_KERNELS = "64"
"""oneDNN makes a kernel for each shape and number of tokens. Of so many, the last used are kept, by it and by torch's binding each;
their own 1,024 take a gigabyte and more once a server has met hundreds of numbers of tokens (docs/experiments.md)."""


@cache
def _onednn_can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of torch re-orders weights of `dtype` and this CPU multiplies them natively."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # read when the first kernel is made
        os.environ.setdefault(name, _KEPT_KERNELS)
    ops = torch.ops.mkldnn
    if not hasattr(ops, "_reorder_linear_weight") or not hasattr(ops, "_linear_pointwise"):
        return False
    if dtype == torch.float32:
        return True
    if dtype == torch.bfloat16:
        return bool(ops._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(ops._is_mkldnn_fp16_supported())
    return False


def backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """Which implementation `make_linear` chooses for weights of `dtype` on `device`."""
    if device.type == "cpu" and settings().cpu_pack and _onednn_can_pack(dtype):
        return "onednn-packed"
    return "torch"


class Linear:
    """y = x W^T + b by torch, the reference for the others. Weight [N, K], bias [N] or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:  # [T, K] -> [T, N]
        if gpu.takes(x):
            from rowcast.kernels.gpu import products

            return products.rows_in(self.weight, x, bias=self.bias)
        return F.linear(x, self.weight, self.bias)


class OneDnnLinear(Linear):
    """The same by oneDNN. With `pack` the weight is held in oneDNN's blocked layout only; otherwise it is used where it lies."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, pack: bool) -> None:
        super().__init__(torch.ops.mkldnn._reorder_linear_weight(weight, None) if pack else weight, bias)
        self._product = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:  # [T, K] -> [T, N]
        return self._product(x, self.weight, self.bias, "none", [], "")  # type: ignore[no-any-return]


def make_linear(weight: Tensor, bias: Tensor | None = None, *, shared: bool = False) -> Linear:
    """The fastest `Linear` for a weight [N, K]. Takes the weight over, unless it is `shared`.

    A shared weight (an embedding table that is also the LM head) has to keep its rows. In float32 oneDNN reads them at nearly the
    packed speed; in 16 bits it does not, so there a packed second copy is made: `packed_copy_bytes` counts it.
    """
    if backend(weight.device, weight.dtype) == "torch":
        return Linear(weight, bias)
    return OneDnnLinear(weight, bias, pack=not (shared and weight.dtype == torch.float32))


def packed_copy_bytes(device: torch.device, dtype: torch.dtype, elements: int) -> int:
    """Bytes that `make_linear(..., shared=True)` takes on top of a weight of `elements`."""
    if dtype == torch.float32 or backend(device, dtype) == "torch":
        return 0
    return elements * dtype.itemsize


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # [T, K], [N, K], [N] -> [T, N]
    """x W^T + b for many tokens, with a weight that lies anyhow: for oneDNN, twice as fast as torch's, it is made contiguous."""
    if backend(weight.device, weight.dtype) == "torch":
        return F.linear(x, weight, bias)
    return OneDnnLinear(weight.contiguous(), bias, pack=False)(x)
