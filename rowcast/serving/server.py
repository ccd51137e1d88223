"""A server's process: load, listen, drain, end. Torch-free."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, Protocol

from rowcast.errors import UserError
from rowcast.serving.backend import Backend

log = logging.getLogger("rowcast")

_SILENT_S = 1.0
"""A start that takes longer says what it does; one that fails sooner says only why."""

_MAX_HEAD_BYTES = 64 << 10
"""Of a request's line and headers."""
_KEEP_ALIVE_S = 30.0
"""That a connection may stay without a request."""
_LAST_ANSWERS_S = 5.0
"""For what is on its way to clients when all requests have ended."""
_BACKLOG = 2048


class Service(Backend, Protocol):
    """A backend that is still to be started."""

    async def start(self) -> None:
        """Load the model. Raises what that raises."""
        ...


def bind(host: str, port: int) -> socket.socket:
    """A socket at that address, which does not listen yet. Port 0: any that is free. Raises UserError."""
    if not 0 <= port <= 65535:
        raise UserError(f"port={port} is none: choose one from 0, for any that is free, to 65535")
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is no host name"
        raise UserError(f"host={host!r:.100} cannot be resolved ({reason}): give a name or an address of this machine") from None
    family, kind, protocol, _, address = found[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise _cannot_listen(host, port, error) from None
    bound.setblocking(False)
    return bound


def url_of(bound: socket.socket) -> str:
    """Under which a client on this machine reaches it."""
    host, port = bound.getsockname()[:2]
    anywhere = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}
    return f"http://{anywhere.get(host, f'[{host}]' if ':' in host else host)}:{port}"


def run(service: Service, make_app: Callable[[], Any], bound: socket.socket, *, drain_s: float) -> int:
    """Serve until a signal says otherwise, and return the process's exit code: 0 after SIGTERM, 130 after Ctrl-C.

    The first signal drains: what was taken is finished within `drain_s`, and nothing new is taken. A second one ends the process at
    once, as the first one does while the model is being loaded. `make_app` is called when that is done. Raises what the start raises.
    """
    with contextlib.closing(bound):
        return asyncio.run(_serve(service, make_app, bound, drain_s))


async def _serve(service: Service, make_app: Callable[[], Any], bound: socket.socket, drain_s: float) -> int:
    stop: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    with _signals(stop) as started:
        soon = asyncio.get_running_loop().call_later(_SILENT_S, _say, "loading the model")
        try:
            await service.start()
        finally:
            soon.cancel()
        started()
        listening = asyncio.Event()
        server = _uvicorn(make_app(), listening)
        serving = asyncio.ensure_future(server.serve(sockets=[bound]))
        told = asyncio.ensure_future(listening.wait())
        await asyncio.wait({serving, told}, return_when=asyncio.FIRST_COMPLETED)
        if listening.is_set():
            _say(f"listening at {url_of(bound)}")
            await asyncio.wait({serving, stop}, return_when=asyncio.FIRST_COMPLETED)
        told.cancel()
        if not listening.is_set():
            await service.drain(0.0)
            error = serving.exception()
            if isinstance(error, OSError):  # another one listens there since
                host, port = bound.getsockname()[:2]
                raise _cannot_listen(host, port, error) from None
            raise error or RuntimeError("the HTTP application did not start")
        _say(f"finishing what runs, within {drain_s:g} s; another signal ends it at once")
        if not await service.drain(drain_s):
            log.warning("not all requests were finished within %g s", drain_s)
        server.should_exit = True
        await serving
        return stop.result() if stop.done() else 1


@contextlib.contextmanager
def _signals(stop: asyncio.Future[int]) -> Iterator[Callable[[], None]]:
    """SIGTERM and Ctrl-C set `stop` to the exit code; another one, or one before the yielded function was called, ends the process."""
    loop = asyncio.get_running_loop()
    started = False

    def note_start() -> None:
        nonlocal started
        started = True

    def note(number: signal.Signals) -> None:
        if stop.done() or not started:
            _end(128 + number)
        stop.set_result(0 if number == signal.SIGTERM else 128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, note, number)
    try:
        yield note_start
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def _say(sentence: str) -> None:
    print(f"rowcast: {sentence}", file=sys.stderr, flush=True)


def _end(code: int) -> NoReturn:
    """Now: threads may be anywhere. The ranks end when they find their driver gone."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _uvicorn(app: Any, listening: asyncio.Event) -> Any:
    """A server that leaves signals alone and says when it listens."""
    import uvicorn

    from rowcast.serving.connections import uvicorn_options

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started and not self.should_exit:
                listening.set()

    return Server(
        uvicorn.Config(
            app,
            **uvicorn_options(),
            lifespan="on",
            backlog=_BACKLOG,
            timeout_keep_alive=round(_KEEP_ALIVE_S),
            timeout_graceful_shutdown=round(_LAST_ANSWERS_S),
            h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
        )
    )


def _cannot_listen(host: str, port: int, error: OSError) -> UserError:
    where = f"port {port} of {host}"
    if error.errno == errno.EADDRINUSE:
        return UserError(f"{where} is in use: choose another --port, or 0 for any that is free")
    if error.errno == errno.EACCES:
        return UserError(f"{where} may not be opened by this user: choose a --port above 1023")
    if error.errno == errno.EADDRNOTAVAIL:
        return UserError(f"host={host!r:.100} is no address of this machine: give one that it has, such as 127.0.0.1")
    return UserError(f"{where} cannot be opened ({error.strerror})")
