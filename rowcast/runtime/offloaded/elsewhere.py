"""What a rank has in host memory: what came from there, and giving it back."""

from __future__ import annotations

from dataclasses import dataclass

from rowcast.offload.row_cache import RowCounts
from rowcast.offload.streamer import StreamCounts
from rowcast.runtime.kv.hosted import HostedKV
from rowcast.runtime.offloaded.weights import OffloadedBanks


@dataclass(frozen=True, slots=True)
class OffloadCounts:
    """What came from host memory."""

    weights: StreamCounts
    """Whole pieces."""
    rows: RowCounts
    kv: StreamCounts


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """The views that have something there."""

    weights: OffloadedBanks | None = None
    kv: HostedKV | None = None

    @property
    def host_bytes(self) -> int:
        """Pinned memory of both."""
        return sum(view.store.bytes for view in (self.weights, self.kv) if view is not None)

    def counts(self) -> OffloadCounts:
        """Since the last call of this. Waits for the device."""
        weights, rows = (StreamCounts(), RowCounts()) if self.weights is None else self.weights.counts()
        return OffloadCounts(weights, rows, StreamCounts() if self.kv is None else self.kv.counts())

    def close(self) -> None:
        """Give host memory back, once the device is done with it. No pass may follow. May be called again."""
        for view in (self.weights, self.kv):
            if view is not None:
                view.close()
