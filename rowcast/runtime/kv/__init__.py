"""What a rung sees of the keys and values: all of them (paged, shared), chosen ones, or the sinks and the recent ones of its own.

The names below are loaded on first use: `sizes` is read where torch is absent.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rowcast.runtime.kv.listed import ListedKV
    from rowcast.runtime.kv.paged import PagedKV
    from rowcast.runtime.kv.selected import SelectedKV
    from rowcast.runtime.kv.selection import Choice, HeavyHitters, Policy, Retrieval, Streaming
    from rowcast.runtime.kv.shared import SharedKV
    from rowcast.runtime.kv.sizes import Summary, choice_bytes, listed_bytes, why_not_streaming
    from rowcast.runtime.kv.streaming import StreamingKV

__all__ = [
    "Choice",
    "HeavyHitters",
    "ListedKV",
    "PagedKV",
    "Policy",
    "Retrieval",
    "SelectedKV",
    "SharedKV",
    "Streaming",
    "StreamingKV",
    "Summary",
    "choice_bytes",
    "listed_bytes",
    "why_not_streaming",
]

_HOME = {
    "ListedKV": "listed",
    "PagedKV": "paged",
    "SelectedKV": "selected",
    "SharedKV": "shared",
    "StreamingKV": "streaming",
    **dict.fromkeys(("Choice", "HeavyHitters", "Policy", "Retrieval", "Streaming"), "selection"),
    **dict.fromkeys(("Summary", "choice_bytes", "listed_bytes", "why_not_streaming"), "sizes"),
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
