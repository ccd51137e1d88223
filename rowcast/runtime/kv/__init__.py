"""What a rung sees of the keys and values: all of them (paged, shared), chosen ones, or the sinks and the recent ones of its own."""

from rowcast.runtime.kv.listed import ListedKV, choosing_bytes, listed_bytes
from rowcast.runtime.kv.paged import PagedKV
from rowcast.runtime.kv.selected import SelectedKV
from rowcast.runtime.kv.selection import Choice, HeavyHitters, Policy, Retrieval, Streaming, choice_bytes
from rowcast.runtime.kv.shared import SharedKV
from rowcast.runtime.kv.streaming import StreamingKV, why_not_streaming
from rowcast.runtime.kv.summaries import Summary

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
    "choosing_bytes",
    "listed_bytes",
    "why_not_streaming",
]
