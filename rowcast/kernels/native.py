"""The optional C++ part of the CPU kernels (`_rows.cpp`): found, loaded, or done without.

`pip install` builds it where there is a compiler with OpenMP. It is loaded after torch, whose OpenMP runtime and threads it shares.
Without it, or with ROWCAST_CPU_NATIVE=0 when it is first asked for, the torch references of `rows`, `lowbit` and `select` run.
"""

from __future__ import annotations

import ctypes
import logging
from ctypes import CDLL, c_int, c_int64, c_void_p
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from rowcast.settings import settings

logger = logging.getLogger(__name__)

MOST_TOKENS = 16
"""More tokens than this are torch's."""
LEVELS = ("baseline", "avx2", "avx512-vnni")


@cache
def library() -> CDLL | None:
    """The native part, set to the CPU's best instruction set, or None. Decided at the first call and logged."""
    if not settings().cpu_native:
        logger.info("CPU kernels: torch, since ROWCAST_CPU_NATIVE is 0")
        return None
    found = [path for suffix in EXTENSION_SUFFIXES if (path := Path(__file__).with_name("_rows" + suffix)).exists()]
    if not found:
        logger.info("CPU kernels: torch, since the native part was not built; `pip install -e .` with a C++ compiler builds it")
        return None
    try:
        lib = load(found[0])
    except (OSError, AttributeError) as error:  # the latter: one that was built before a function was added
        logger.info("CPU kernels: torch, since the native part cannot be loaded: %s", error)
        return None
    logger.info("CPU kernels: native, %s", LEVELS[lib.rowcast_level(len(LEVELS) - 1)])
    return lib


def describe() -> str:
    """The instruction set in use, or `torch`, for printing."""
    lib = library()
    return "torch" if lib is None else f"native ({LEVELS[lib.rowcast_level(len(LEVELS) - 1)]})"


def load(path: Path) -> CDLL:
    """The library at `path` with the types of its functions. Raises OSError, and AttributeError for one that lacks a function."""
    lib = ctypes.CDLL(str(path))
    for name, result, arguments in (
        ("rowcast_level", c_int, [c_int]),
        ("rowcast_rows", c_int, [c_int, *[c_void_p] * 9, *[c_int64] * 7, c_int, c_int]),
        ("rowcast_top", c_int64, [c_void_p, *[c_int64] * 4, c_void_p, c_void_p, c_int]),
        ("rowcast_union", c_int64, [c_void_p, c_int64, c_int64, c_void_p]),
        ("rowcast_gated_ffn", None, [c_int, *[c_void_p] * 10, *[c_int64] * 9, c_int, c_int, c_int]),
        ("rowcast_lowbit", None, [*[c_void_p] * 5, *[c_int64] * 5, c_int, c_int, c_int]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def library_for(x: Tensor) -> CDLL | None:
    """The native part where it takes inputs x [T, ...]: on a CPU, up to `MOST_TOKENS` tokens."""
    return library() if x.device.type == "cpu" and 0 < x.shape[0] <= MOST_TOKENS else None


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


threads = torch.get_num_threads
