"""An ingress's connection to one engine replica: opened, kept, lost, opened again. Torch-free."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from rowcast.serving.backend import Ask, State
from rowcast.serving.ray_session import BEAT_S, SILENCE_S, Batch, Command, Hello, within

log = logging.getLogger("rowcast")

_HELLO_S = 60.0
"""Ray Serve holds a call while its deployment has no replica; then the call is made anew."""
_PAUSE_S = 0.5
"""Before the next attempt."""


class Link:
    """To a deployment of one replica, which Ray Serve starts again when it dies. Lives in one event loop.

    Whoever makes it gives the functions that it calls: `up` with each session's hello, `got` with its batches, `down` with why it
    ended.
    """

    def __init__(
        self,
        number: int,
        handle: Any,
        *,
        up: Callable[[Link, Hello], None],
        got: Callable[[Link, Batch], None],
        down: Callable[[Link, str], None],
    ) -> None:
        """`handle`: Ray Serve's."""
        self.number = number
        self.hello: Hello | None = None
        """None while there is no session."""
        self.state: State = "starting"
        self.reason = ""
        self._handle = handle
        self._up, self._got, self._down = up, got, down
        self._outbox: list[Command] = []
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._stopping = False

    @property
    def ready(self) -> bool:
        return self.hello is not None and self.state == "ready"

    def start(self) -> None:
        self._task = asyncio.ensure_future(self._keep())

    async def stop(self) -> None:
        self._stopping = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def ask(self, number: int, ask: Ask) -> None:
        """Send a request. Precondition: there is a session."""
        self._send(Command(number, ask))

    def cancel(self, number: int) -> None:
        """Of a request that was sent."""
        self._send(Command(number))

    async def call(self, method: str) -> Any:
        """The result of a method without arguments. Raises what Ray raises."""
        return await self._handle.options(method_name=method).remote()

    def _send(self, command: Command) -> None:
        self._outbox.append(command)
        self._wake.set()

    async def _keep(self) -> None:
        while True:
            stream = None
            try:
                session = uuid.uuid4().hex
                stream = self._handle.options(method_name="attach", stream=True).remote(session)
                hello = await within(_HELLO_S, stream.__anext__())
                self._outbox, self.hello, self.state, self.reason = [], hello, "ready", ""
                self._up(self, hello)
                why = await self._both(stream, session)
            except asyncio.TimeoutError:
                why = "it does not answer"
            except asyncio.CancelledError:
                if self._stopping:
                    raise
                why = "the call was cancelled at its other end"  # which is no reason to give the replica up
            except Exception as error:  # Ray has many ways to say that an actor is gone
                why = str(error).strip().partition("\n")[0] or type(error).__name__
            finally:
                if stream is not None:
                    stream.cancel()
                up, self.hello = self.hello is not None, None
            if up:
                self._down(self, why)
            else:
                log.info("engine replica %s is not there yet: %s", self.number, why)
            await asyncio.sleep(_PAUSE_S)

    async def _both(self, stream: Any, session: str) -> str:
        """Until either direction fails; why it did."""
        tasks = [asyncio.ensure_future(self._read(stream)), asyncio.ensure_future(self._write(session))]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return next(iter(done)).result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, stream: Any) -> str:
        while True:
            try:
                batch = await within(SILENCE_S, stream.__anext__())
            except StopAsyncIteration:
                return "it ended the session"
            self.state, self.reason = batch.state, batch.reason
            self._got(self, batch)

    async def _write(self, session: str) -> str:
        call = self._handle.options(method_name="obey")
        while True:
            if not self._outbox:
                self._wake.clear()
                with suppress(asyncio.TimeoutError):
                    await within(BEAT_S, self._wake.wait())
            commands, self._outbox = self._outbox, []
            if not await within(SILENCE_S, call.remote(session, commands)):
                return "another replica has taken its place"
