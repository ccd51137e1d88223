"""What a rank has in host memory: what came from there, and giving it back."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from rowcast.offload.row_cache import RowCounts
from rowcast.offload.streamer import StreamCounts
from rowcast.runtime.kv.hosted import HostedKV
from rowcast.runtime.offloaded.packed import OffloadedPacked
from rowcast.runtime.offloaded.weights import OffloadedBanks
from rowcast.runtime.step import Moved


@dataclass(frozen=True, slots=True)
class OffloadCounts:
    """What came from host memory."""

    weights: StreamCounts = field(default_factory=StreamCounts)
    """Whole pieces."""
    rows: RowCounts = field(default_factory=RowCounts)
    kv: StreamCounts = field(default_factory=StreamCounts)
    """What passes over all entries streamed, and what views of a few copied."""


@dataclass(slots=True)
class Elsewhere:
    """The views that have something there."""

    weights: OffloadedBanks | OffloadedPacked | None = None
    kv: HostedKV | None = None
    _unread: OffloadCounts = field(default_factory=OffloadCounts)
    """What `moved` has told and `counts` has not."""
    _sent_bytes: int = 0
    """KV on its way to the host that has been told."""
    _disk: tuple[int, float] = (0, 0.0)
    """Bytes from disk, and seconds waited for them, that have been told."""

    @property
    def host_bytes(self) -> int:
        """Pinned memory of both."""
        return sum(view.store.bytes for view in (self.weights, self.kv) if view is not None)

    def moved(self) -> Moved:
        """Since the last call of this. Waits for the device."""
        found = self._drained()
        self._unread = _sum(self._unread, found)
        sent = 0 if self.kv is None else self.kv.sent_bytes
        self._sent_bytes, sent = sent, sent - self._sent_bytes
        read = 0, 0.0
        if self.weights is not None and (disk := self.weights.disk) is not None:
            read = disk.read_bytes, disk.waited_s
        (told_bytes, told_s), self._disk = self._disk, read
        # A CPU waits for the disk in the midst of a copy, whose time counts; on a GPU the host waits, and not the stream.
        waited = 0.0 if self.weights is None or self.weights.store.device.type == "cpu" else read[1] - told_s
        return Moved(
            disk_bytes=read[0] - told_bytes,
            weight_bytes=found.weights.bytes,
            rows_wanted=found.rows.wanted,
            rows_moved=found.rows.moved,
            row_bytes=found.rows.moved * self._row_bytes,
            kv_bytes=found.kv.bytes,
            kv_out_bytes=sent,
            stalled_s=found.weights.stalled_s + found.kv.stalled_s + waited,
        )

    def counts(self) -> OffloadCounts:
        """Since the last call of this, whatever `moved` has told. Waits for the device."""
        found, self._unread = _sum(self._unread, self._drained()), OffloadCounts()
        return found

    def repair(self) -> None:
        """After a step that was broken off: nothing that it left half done is taken for what it was to become."""
        if self.weights is not None and self.weights.pool is not None:
            self.weights.pool.rows.repair()

    def close(self) -> None:
        """Give host memory back, once the device is done with it. No pass may follow. May be called again."""
        for view in (self.weights, self.kv):
            if view is not None:
                view.close()

    @property
    def _row_bytes(self) -> int:
        """Of a fetched row."""
        return 0 if self.weights is None or self.weights.pool is None else self.weights.pool.rows.rows[0].nbytes

    def _drained(self) -> OffloadCounts:
        weights, rows = (StreamCounts(), RowCounts()) if self.weights is None else self.weights.counts()
        return OffloadCounts(weights, rows, StreamCounts() if self.kv is None else self.kv.counts())


def _sum(one: OffloadCounts, other: OffloadCounts) -> OffloadCounts:
    def add(a: Any, b: Any) -> Any:
        return type(a)(*(getattr(a, each.name) + getattr(b, each.name) for each in fields(a)))

    return OffloadCounts(add(one.weights, other.weights), add(one.rows, other.rows), add(one.kv, other.kv))
