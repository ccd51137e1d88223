"""Checkpoints on disk, read by slice: safetensors directories, GGUF files, hub ids.

The names below are loaded on first use: headers are read where torch is absent.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rowcast.runtime.checkpoint.opening import DEFAULT_MODEL, DEFAULT_MODEL_HUB_ID, Checkpoint, open_checkpoint

__all__ = ["DEFAULT_MODEL", "DEFAULT_MODEL_HUB_ID", "Checkpoint", "open_checkpoint"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.opening"), name)
    globals()[name] = value
    return value
