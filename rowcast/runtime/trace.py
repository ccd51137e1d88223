"""A timeline of one rank, as Chrome's tracing and Perfetto read it. Torch-free."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from rowcast.errors import UserError

_FLUSH_S = 1.0


class Trace:
    """A file of events: a JSON array, which may lack its end where the process was killed; viewers take it nevertheless."""

    def __init__(self, folder: str | Path, rank: int) -> None:
        """`folder` is made where there is none. Raises UserError where it cannot be written to."""
        self.path = Path(folder) / f"rank-{rank}-{os.getpid()}.json"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("w", encoding="utf-8")
        except OSError as error:
            raise UserError(f"the trace {self.path} cannot be written ({error.strerror}), name a folder that can") from None
        self._rank = rank
        self._epoch_s = time.time() - time.perf_counter()  # so that the ranks of one machine share a clock
        self._flushed_s = 0.0
        self._event({"ph": "M", "name": "process_name", "args": {"name": f"rank {rank}"}}, first=True)

    def span(self, name: str, started_s: float, seconds: float, **args: object) -> None:
        """What took `seconds` from `started_s` on, of time.perf_counter. Nothing once it is closed."""
        if self._file.closed:
            return
        at = (self._epoch_s + started_s) * 1e6
        self._event({"ph": "X", "name": name, "ts": round(at, 1), "dur": round(seconds * 1e6, 1), "args": args})

    def close(self) -> None:
        """May be called twice."""
        if not self._file.closed:
            self._file.write("\n]\n")
            self._file.close()

    def _event(self, event: dict[str, object], *, first: bool = False) -> None:
        self._file.write(("[\n" if first else ",\n") + json.dumps({"pid": self._rank, "tid": 0, **event}))
        now = time.monotonic()
        if now - self._flushed_s > _FLUSH_S:
            self._file.flush()
            self._flushed_s = now
