"""Connections of clients that are slow, silent or talk no HTTP: each costs a bounded amount for a bounded time. Torch-free.

uvicorn has no limit on how long a request's head may take, on how long a response may wait for a reader, nor on connections.
"""

from __future__ import annotations

import asyncio
import resource
from dataclasses import dataclass
from typing import Any, cast

from uvicorn.protocols.http.h11_impl import H11Protocol

from rowcast.serving.errors import ApiError, json_text

_LOOK_S = 1.0
"""Between two looks at a connection, at most; limits are kept that exactly."""
_SPARE_FILES = 128
"""Descriptors that are left for everything else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    head_s: float = 10.0
    """In which a request's line and headers have to arrive, from its first byte, or from when the connection is made."""
    write_s: float = 30.0
    """In which a client has to read what is buffered for it when that is too much to buffer more, or nothing more is to come."""
    connections: int = 4096
    """At the same time, as far as the process may open so many files. One more takes the place of the one that was idle the longest."""

    @property
    def affordable(self) -> int:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return self.connections if soft == resource.RLIM_INFINITY else max(16, min(self.connections, soft - _SPARE_FILES))

    def afford(self) -> None:
        """Raise this process's limit of open files as far as it may and has to."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = self.connections + _SPARE_FILES
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 connection, within limits. `Config(http=limited(...))` uses it."""

    limits = ConnectionLimits()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._rests_since_s = self.loop.time()
        """Since when it has no request; where it has one, anything."""
        self._head_since_s: float | None = self._rests_since_s
        """Since when a request's head is waited for; None: one is being answered, or nothing of the next one has come."""
        self._paused_since_s: float | None = None
        super().connection_made(transport)
        if len(self.connections) > self.limits.affordable:
            self._make_room()
        self._timer = self.loop.call_later(min(_LOOK_S, self.limits.head_s, self.limits.write_s), self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        if self._head_since_s is None and self._between_requests:
            self._head_since_s = self.loop.time()
        super().data_received(data)
        if self.cycle is not before:
            self._head_since_s = None

    def on_response_complete(self) -> None:
        before = self.cycle
        self._rests_since_s = self.loop.time()
        super().on_response_complete()
        if self.cycle is not before:  # the next one had come already
            self._head_since_s = None

    def pause_writing(self) -> None:
        self._paused_since_s = self.loop.time()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._paused_since_s = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """As uvicorn's, but as OpenAI's error object, and never in the middle of another response."""
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.abort()
            return
        body = json_text(ApiError(400, "this is no HTTP/1.1 request that can be read", code="invalid_http").to_json()).encode()
        head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode() + body)
        self.transport.close()

    @property
    def _between_requests(self) -> bool:
        return self.cycle is None or (self.cycle.response_complete and not self.cycle.more_body)

    @property
    def _gives_way(self) -> bool:
        return self._between_requests and not self.transport.is_closing()

    def _look(self) -> None:
        """Close it where it takes too long."""
        now = self.loop.time()
        if self.transport.is_closing() and self._paused_since_s is None:
            self._paused_since_s = now  # what is buffered is the last
        late_head = self._head_since_s is not None and now - self._head_since_s > self.limits.head_s
        late_read = self._paused_since_s is not None and now - self._paused_since_s > self.limits.write_s
        if late_head or late_read:
            self.transport.abort()
        else:
            self._timer = self.loop.call_later(min(_LOOK_S, self.limits.head_s, self.limits.write_s), self._look)

    def _make_room(self) -> None:
        """Close the one that has been without a request the longest; this one, where all others have one."""
        idle = [each for each in self.connections if isinstance(each, Connection) and each._gives_way]
        min(idle, key=lambda each: each._rests_since_s, default=self).transport.abort()


def limited(limits: ConnectionLimits) -> type[asyncio.Protocol]:
    """The class of connections within `limits`, for `uvicorn.Config(http=...)`."""
    return cast(type[asyncio.Protocol], type("LimitedConnection", (Connection,), {"limits": limits}))


def uvicorn_options(limits: ConnectionLimits | None = None) -> dict[str, Any]:
    """Keywords of `uvicorn.Config` that this module and `security` count on. Raises this process's limit of open files."""
    limits = limits or ConnectionLimits()
    limits.afford()
    return {
        "http": limited(limits),
        "log_level": "error",  # not a line for each request that is none
        "ws": "none",
        "access_log": False,
        "log_config": None,
        "server_header": False,
        "proxy_headers": False,  # clients could name any address
    }
