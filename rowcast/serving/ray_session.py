"""What an ingress and an engine replica say to each other. Torch-free, and without Ray.

An ingress opens a session with each replica: one call of `attach`, whose generator brings everything that the replica has to tell, all
requests together and at most one batch in some milliseconds; the other way go lists of commands. A call for each request would cost Ray
a message for each of its pieces.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from rowcast.errors import UserError
from rowcast.serving.backend import Ask, Backend, ModelCard, Piece, ServingError, State, engine_failed

T = TypeVar("T")

BEAT_S = 1.0
"""A replica that has nothing to tell says so as often; an ingress that has no commands, too."""

SILENCE_S = 20.0
"""After so long without a word from the other side it is taken for lost."""

_BATCH_S = 0.002
"""What a batch waits for the other pieces of its step."""


@dataclass(frozen=True, slots=True)
class Fault:
    """An error on its way to another process."""

    sentence: str
    bad_input: bool = False
    status: int = 500
    kind: str = "server_error"
    code: str = "engine_failed"
    retry_after_s: float | None = None

    @classmethod
    def of(cls, error: Exception) -> Fault:
        if isinstance(error, UserError):
            return cls(str(error), bad_input=True)
        if isinstance(error, ServingError):
            return cls(f"{error}", False, error.status, error.kind, error.code, error.retry_after_s)
        return cls(f"the engine raised {type(error).__name__}")

    def error(self) -> Exception:
        """As it was raised."""
        if self.bad_input:
            return UserError(self.sentence)
        return ServingError(self.sentence, status=self.status, kind=self.kind, code=self.code, retry_after_s=self.retry_after_s)


@dataclass(frozen=True, slots=True)
class Hello:
    """The first message of a session."""

    card: ModelCard
    slots: int
    """Sequences that its engine runs at a time."""
    pid: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Any further one."""

    state: State
    reason: str
    taken: list[int]
    """Requests, by the ingress's numbers, that were found to be all right."""
    pieces: list[tuple[int, Piece]]
    over: list[tuple[int, Fault | None]]
    """Requests that have ended, after their last piece, each well or not."""


@dataclass(frozen=True, slots=True)
class Command:
    """Run a request, or, without an `ask`, do so no more."""

    number: int
    ask: Ask | None = None


async def within(timeout_s: float, awaitable: Awaitable[T]) -> T:
    """Its result. Raises asyncio.TimeoutError.

    `asyncio.wait_for` of older Pythons drops a cancellation that comes together with the result, and whoever cancelled waits for ever.
    """
    task = asyncio.ensure_future(awaitable)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be left to read it
    try:
        await asyncio.wait({task}, timeout=timeout_s)
        if task.done():
            return task.result()
        raise asyncio.TimeoutError
    finally:
        task.cancel()


@dataclass(eq=False)
class Session:
    """The replica's end of one. Lives in one event loop."""

    backend: Backend
    clock: Callable[[], float] = time.monotonic
    _tasks: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    _taken: list[int] = field(default_factory=list)
    _pieces: list[tuple[int, Piece]] = field(default_factory=list)
    _over: list[tuple[int, Fault | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._heard_s = self.clock()
        self._news = asyncio.Event()

    @property
    def running(self) -> int:
        """Requests."""
        return len(self._tasks)

    @property
    def lapsed(self) -> bool:
        """Nobody has been heard of at the other end."""
        return self.clock() - self._heard_s > SILENCE_S

    def obey(self, commands: list[Command]) -> None:
        """Any list, an empty one too, says that the ingress lives. A command that comes twice counts once."""
        self._heard_s = self.clock()
        for command in commands:
            task = self._tasks.get(command.number)
            if command.ask is None:
                if task is not None:
                    task.cancel()
            elif task is None:
                task = self._tasks[command.number] = asyncio.ensure_future(self._run(command.number, command.ask))
                task.add_done_callback(partial(self._ended, command.number))

    async def next(self) -> Batch:
        """What has happened since the last call; waits for something to happen, but not for long."""
        with suppress(asyncio.TimeoutError):
            await within(BEAT_S, self._news.wait())
            await asyncio.sleep(_BATCH_S)
        self._news.clear()
        state, reason = self.backend.state()
        batch = Batch(state, reason, self._taken, self._pieces, self._over)
        self._taken, self._pieces, self._over = [], [], []
        return batch

    async def close(self) -> None:
        """Cancel all requests. Returns when the engine knows."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, number: int, ask: Ask) -> None:
        """Raises what the backend raises."""
        pieces = await self.backend.submit(ask)
        self._taken.append(number)
        last = False
        try:
            async for piece in pieces:
                self._pieces.append((number, piece))
                self._news.set()
                last = last or piece.usage is not None
        finally:
            await pieces.aclose()  # type: ignore[attr-defined]
        if not last:
            raise engine_failed("the engine ended before the request did")

    def _ended(self, number: int, task: asyncio.Task[None]) -> None:
        """Also where it was cancelled before it began."""
        del self._tasks[number]
        error = None if task.cancelled() else task.exception()
        self._over.append((number, Fault.of(error) if isinstance(error, Exception) else None))
        self._news.set()
