"""What a rung sees of the keys and values: all of them (paged), chosen ones of those, or the sinks and the recent ones of its own."""

from rowcast.runtime.kv.paged import PagedKV
from rowcast.runtime.kv.selected import SelectedKV
from rowcast.runtime.kv.selection import HeavyHitters, Policy, Retrieval, Streaming
from rowcast.runtime.kv.streaming import StreamingKV, why_not_streaming
from rowcast.runtime.kv.summaries import Score, Summary

__all__ = [
    "HeavyHitters",
    "PagedKV",
    "Policy",
    "Retrieval",
    "Score",
    "SelectedKV",
    "Streaming",
    "StreamingKV",
    "Summary",
    "why_not_streaming",
]
