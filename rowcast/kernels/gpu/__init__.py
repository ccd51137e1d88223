"""The Triton kernels of a GPU. Each module stands beside the torch reference that defines its result.

Conventions that all of them keep:

- At most `MOST_TOKENS` tokens a call, which are columns of one matrix product: each token gets the same bits whatever the number of
  tokens, so that verifying several equals decoding one by one. Tiles, splits and orders of addition follow from shapes of weights and
  from positions, never from the number of tokens. Sums are float32 and have a fixed order.
- Nothing is asked of the device: how many rows were chosen is a device-side count, buffers have a fixed capacity, so that every call
  can be captured in a CUDA graph and replayed while the counts change.
- float32, bfloat16 and float16; float32 products are exact ones, not TF32.

Without a GPU they run in Triton's interpreter where TRITON_INTERPRET=1 was set before they were imported; that is for tests.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Final

import torch
from torch import Tensor

from rowcast.settings import settings

MOST_TOKENS: Final = 16
"""Tokens of a call, over all sequences: the columns of the smallest tile that the matrix units take."""


interpreted = False
"""Set by tests alone: a CPU's tensors go to these kernels, in Triton's interpreter."""


@cache
def available() -> bool:
    """Whether a GPU's tensors go to these kernels. ROWCAST_GPU_KERNELS=0 keeps them from it."""
    return torch.cuda.is_available() and settings().gpu_kernels and find_spec("triton") is not None


def serves(device: torch.device) -> bool:
    """Whether the device's tensors go to these kernels."""
    return available() if device.type == "cuda" else interpreted


def takes(x: Tensor) -> bool:
    """Whether x [T, ...] is theirs: on such a device, 1 to `MOST_TOKENS` tokens, a floating dtype."""
    return (x.is_cuda or interpreted) and 0 < x.shape[0] <= MOST_TOKENS and x.dtype in _DTYPES and serves(x.device)


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def multiprocessors(device: torch.device) -> int:
    """Of the GPU; 4 in the interpreter."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 4
