"""One JSON line a request, on standard error: who asked for what route, how it ended and what it took; never a text or a key.

Torch-free.
"""

from __future__ import annotations

import json
import queue
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, TextIO

MOST_LINES = 10_000
"""That wait to be written. Where nobody reads them, later ones are counted and dropped: requests never wait for the log."""

UNMATCHED = "unmatched"
_QUIET = frozenset({"/health", "/ready", "/metrics", "/live"})
"""Routes that are asked every few seconds; their lines are written where something is wrong only."""


@dataclass(slots=True)
class Exchange:
    """One HTTP request and what became of it."""

    request_id: str
    method: str
    client: str = ""
    """The name of its API key, or its address."""
    route: str = UNMATCHED
    """As the server writes it, never what the client sent."""
    status: int = 0
    """499 where the client went before it had its answer."""
    completion_id: str | None = None
    prompt_field: str = "prompt"
    """Of its body, that has the prompt."""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    generated_tokens: int | None = None
    ttft_s: float | None = None
    """From the request's arrival to the first piece of its answer."""
    finish_reasons: list[str] = field(default_factory=list)
    error: str | None = None
    """Its `code`."""
    started_s: float = field(default_factory=time.perf_counter)

    def first_piece(self) -> None:
        """A piece of the answer is there."""
        if self.ttft_s is None:
            self.ttft_s = time.perf_counter() - self.started_s

    def to_json(self) -> dict[str, Any]:
        found = {
            "event": "request",
            "request_id": self.request_id,
            "method": self.method,
            "route": self.route,
            "status": self.status,
            "client": self.client,
            "completion_id": self.completion_id,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "generated_tokens": self.generated_tokens,
            "ttft_s": None if self.ttft_s is None else round(self.ttft_s, 6),
            "total_s": round(time.perf_counter() - self.started_s, 6),
            "finish_reason": ",".join(self.finish_reasons) or None,
            "error": self.error,
        }
        return {name: value for name, value in found.items() if value is not None}


class RequestLog:
    """Writes lines from a thread of its own, which begins with the first line."""

    def __init__(self, stream: TextIO | None = None, *, enabled: bool = True) -> None:
        """`stream`: None is what sys.stderr is when a line is written."""
        self._stream = stream
        self._enabled = enabled
        self._lines: queue.Queue[str | None] = queue.Queue(MOST_LINES)
        self._thread: threading.Thread | None = None
        self._dropped = 0

    def request(self, exchange: Exchange) -> None:
        """One request is over."""
        if exchange.route not in _QUIET or exchange.status != 200:
            self.write(exchange.to_json())

    def failure(self, error: BaseException, request_id: str) -> None:
        """A mistake of ours, told also where the log is off. Its message is left out: it may hold what a client sent."""
        frames = [line for entry in traceback.format_tb(error.__traceback__) for line in entry.splitlines()]
        self._put({"event": "error", "request_id": request_id, "exception": type(error).__name__, "traceback": frames})

    def write(self, record: dict[str, Any]) -> None:
        """One line, with the time. Never waits; does nothing where the log is off."""
        if self._enabled:
            self._put(record)

    def _put(self, record: dict[str, Any]) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        try:
            self._lines.put_nowait(json.dumps({"time": now, **record}))
        except queue.Full:
            self._dropped += 1
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="rowcast-log", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Write what waits, for two seconds at most. Lines that come later are written all the same."""
        thread, self._thread = self._thread, None
        if thread is not None:
            try:
                self._lines.put(None, timeout=1)
            except queue.Full:
                return
            thread.join(timeout=2)

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            if self._dropped:
                dropped, self._dropped = self._dropped, 0
                line = json.dumps({"event": "lines_dropped", "lines": dropped}) + "\n" + line
            try:
                print(line, file=self._stream or sys.stderr, flush=True)
            except (OSError, ValueError):  # it was closed
                continue
