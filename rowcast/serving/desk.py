"""What an engine's thread and the event loop share: the requests between them, and what both know of the server. Torch-free."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from rowcast.serving.admission import FairQueue, FinishRate
from rowcast.serving.backend import Piece, State, engine_failed
from rowcast.serving.live import Window
from rowcast.serving.metrics import ServerMetrics
from rowcast.serving.taken import Taken

log = logging.getLogger("rowcast")

Batch = list[tuple[Taken, list[Piece], Exception | None]]
"""What one step gave, by request; an error is its last."""


@dataclass(slots=True)
class Counts:
    """Requests, in all."""

    finished: int = 0
    rejected: int = 0
    cancelled: int = 0
    missed: int = 0
    """Deadlines."""
    lost: int = 0
    """With the engine."""
    rank_failures: int = 0
    """Times that ranks were started again."""
    starts: int = 0
    """Times that the model was made anew."""


class Desk:
    """A request is taken by the event loop, waits in `queue`, is in the engine, and is over: the event loop says so to its reader."""

    def __init__(self, metrics: ServerMetrics) -> None:
        self.metrics = metrics
        self.counts = Counts()
        self.window = Window()
        self.rate = FinishRate()
        self.state: State = "starting"
        self.reason = "the model is being loaded"
        self.changed = threading.Condition()
        """Guards what follows; the engine's thread waits on it."""
        self.queue: FairQueue[Taken] = FairQueue()
        self.taken: set[Taken] = set()
        """All that are not over."""
        self.room = 0
        """Sequences that the engine could run beside those that it has."""
        self.closing = False
        """The engine's thread is to end."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._emptied = asyncio.Event()

    def open(self) -> None:
        """In the event loop, before anything else."""
        self._loop = asyncio.get_running_loop()

    @property
    def load(self) -> tuple[int, int, int]:
        """(requests that the engine has, that wait, clients)."""
        with self.changed:
            waiting = len(self.queue)
            return len(self.taken) - waiting, waiting, self.queue.clients

    # In the event loop.

    def take(self, taken: Taken, max_waiting: int) -> int | None:
        """Queue a request; None, or how many wait where that are too many. Those that the engine has room for do not count."""
        with self.changed:
            waiting = len(self.queue)
            if waiting >= max_waiting + self.room:
                return waiting
            self.taken.add(taken)
            self.queue.push(taken.ask.client, taken)
            self.changed.notify_all()
        return None

    def let_go(self, taken: Taken) -> None:
        """Nobody wants it: out of the queue at once, out of the engine after its step."""
        taken.cancelled = True
        if taken.alarm is not None:
            taken.alarm.cancel()
        with self.changed:
            self.queue.remove(taken.ask.client, taken)
            self._over(taken)
            self.changed.notify_all()

    def abandon(self, error: Callable[[], Exception]) -> None:
        """All that were taken get an error."""
        with self.changed:
            left = list(self.taken)
        for taken in left:
            self.let_go(taken)
            self._lose(taken, error())

    def close(self) -> None:
        """Have the engine's thread end."""
        with self.changed:
            self.closing = True
            self.changed.notify_all()

    async def emptied(self, timeout_s: float) -> bool:
        """Whether all that were taken are over within that time, or the server has stopped."""
        until = time.monotonic() + timeout_s
        while self.taken and self.state != "stopped":
            self._emptied.clear()
            try:
                await asyncio.wait_for(self._emptied.wait(), until - time.monotonic())
            except asyncio.TimeoutError:
                return not self.taken
        return not self.taken

    def _deliver(self, batch: Batch) -> None:
        for taken, pieces, error in batch:
            taken.give(pieces)
            if error is not None:
                self._lose(taken, error)

    def _lose(self, taken: Taken, error: Exception) -> None:
        if not taken.over:
            self.counts.lost += 1
            self.metrics.add("server_lost")
            taken.give([], error)

    # In the engine's thread.

    def left(self, taken: Taken) -> None:
        """It is no longer in the engine, and over."""
        with self.changed:
            self.queue.done(taken.ask.client)
            self.room += taken.params.n
            self._over(taken)

    def lost(self, running: list[Taken], sentence: str) -> None:
        """The engine is, with what it ran and what waited for it."""
        with self.changed:
            for taken in running:
                self.queue.done(taken.ask.client)
        self.call(self.abandon, lambda: engine_failed(sentence))

    def deliver(self, batch: Batch) -> None:
        """Tell the readers, in one call for all."""
        if batch:
            self.call(self._deliver, batch)

    def call(self, function: Callable[..., object], *arguments: object) -> None:
        """In the event loop, from any thread."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # it is closed: nobody listens any more
            log.debug("the event loop is closed")

    def _over(self, taken: Taken) -> None:
        """Precondition: `changed` is held."""
        self.taken.discard(taken)
        if not self.taken:
            self.call(self._emptied.set)
