"""The ingress's side of a Ray Serve application: one queue, engine replicas that take from it, and streams that outlive a replica."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from rowcast.errors import UserError
from rowcast.runtime.engine import derived_seed
from rowcast.runtime.tokenizer import Tokenizer
from rowcast.serving.admission import FairQueue, FinishRate
from rowcast.serving.backend import Ask, ModelCard, Piece, ServingError, State, engine_failed, queue_full, too_late, unavailable
from rowcast.serving.metrics import ServerMetrics, new_registry
from rowcast.serving.ray_link import Link
from rowcast.serving.ray_session import Batch, Fault, Hello, within
from rowcast.serving.replay import Diverged, HandedOut
from rowcast.serving.routing import Router
from rowcast.serving.taken import Pieces, Taken

log = logging.getLogger("rowcast")

MAX_LOSSES = 3
"""Replicas that may be lost under one request; it may be what ends them."""

_ENGINE_SLACK_S = 5.0
"""The ingress keeps the deadlines; an engine is told later ones, so that the two do not answer both."""
_ASK_S = 5.0
"""For what a replica says of itself."""
_CHARACTERS_PER_TOKEN = 4
"""Of a prompt, for a fair share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IngressSettings:
    """What an ingress allows."""

    max_waiting: int = 1024
    """Requests that wait for a replica; more are refused."""
    deadline_s: float | None = None
    """For requests that name none; None: as long as it takes."""
    seed: int | None = None
    """As in `ServiceSettings`."""

    def __post_init__(self) -> None:
        if self.max_waiting < 0:
            raise UserError(f"max_waiting={self.max_waiting} has to be at least 0: that lets none wait")
        if self.deadline_s is not None and not self.deadline_s > 0:
            raise UserError(f"deadline={self.deadline_s} has to be more than 0 seconds: leave it out for none")


@dataclass(eq=False, slots=True)
class _Job:
    """One request, wherever it runs."""

    number: int
    ask: Ask
    """With its seed."""
    taken: Taken
    found_right: asyncio.Future[None]
    """Done when a replica has it, or with why none takes it."""
    until_s: float | None
    handed_out: HandedOut = field(default_factory=HandedOut)
    link: Link | None = None
    """Whose replica runs it; None while it waits."""
    places: int = 0
    """That it has there: one for each answer that has not ended."""
    popped: bool = False
    """It was given to a replica before, so that it is the queue's no longer."""
    losses: int = 0


class RayBackend:
    """Implements `Backend` over engine replicas, each behind a `Link`. Made in the event loop that it belongs to."""

    def __init__(self, handles: Sequence[Any], settings: IngressSettings) -> None:
        """`handles`: Ray Serve's, one for each deployment of one engine replica."""
        self.settings = settings
        self.server_metrics = ServerMetrics(new_registry())
        self._links = [Link(number, handle, up=self._up, got=self._got, down=self._down) for number, handle in enumerate(handles)]
        self._loads = [0] * len(self._links)
        """Sequences that each replica has of here."""
        self._router = Router()
        self._rate = FinishRate()
        self._queue: FairQueue[_Job] = FairQueue()
        self._again: deque[_Job] = deque()
        """Requests that lost their replica; they go first."""
        self._jobs: dict[int, _Job] = {}
        """All that are not over."""
        self._numbers = itertools.count()
        self._seed = secrets.randbits(62) if settings.seed is None else settings.seed
        self._counts = dict.fromkeys(("finished", "rejected", "cancelled", "missed", "lost", "moved"), 0)
        self._losses = 0
        self._card: ModelCard | None = None
        self._tokenizer: Tokenizer | str = "no replica has said what its tokenizer is"
        self._first = asyncio.Event()
        self._emptied = asyncio.Event()
        self._draining = False
        self._stopped = False
        self._started_s = time.monotonic()

    async def start(self) -> None:
        """Returns when the first replica is there, however long that takes."""
        for link in self._links:
            link.start()
        while self._card is None:
            await self._first.wait()
            for link in self._links:
                if link.hello is not None:
                    try:
                        self._tokenizer = await link.call("describe")
                        self._card = link.hello.card
                        return
                    except Exception as error:
                        log.warning("engine replica %s does not answer: %s", link.number, error)
            self._first.clear()

    @property
    def card(self) -> ModelCard:
        assert self._card is not None, "it was not started"
        return self._card

    @property
    def tokenizer(self) -> Tokenizer:
        if isinstance(self._tokenizer, str):
            raise UserError(self._tokenizer)
        return self._tokenizer

    def state(self) -> tuple[State, str]:
        if self._stopped:
            return "stopped", "it was shut down"
        if self._draining:
            return "draining", "it is being shut down"
        if self._card is None:
            return "starting", "no replica of the model is up yet"
        if any(link.ready for link in self._links):
            return "ready", ""
        return "recovering", "all replicas of the model are being started again"

    async def submit(self, ask: Ask) -> AsyncIterator[Piece]:
        state, reason = self.state()
        if state not in ("ready", "recovering"):
            self._reject("unavailable")
            raise unavailable(f"the server takes no requests: {reason}", None if state == "stopped" else 5.0)
        waiting = len(self._queue)
        if waiting >= self.settings.max_waiting and (waiting > 0 or not any(map(self._room, self._links))):
            self._reject("queue_full")
            raise queue_full(waiting, self._rate.retry_after_s(waiting, time.monotonic()))
        job = self._job(ask)
        self._queue.push(ask.client, job)
        self._dispatch()
        try:
            await job.found_right
        except asyncio.CancelledError:
            self._cancel(job)
            raise
        except UserError:
            self._reject("invalid")
            raise
        return Pieces(job.taken, lambda _: self._cancel(job))

    async def live(self) -> dict[str, Any]:
        """That of one replica, with the sums of all, and each under `replicas`."""
        from rowcast.serving.ray_live import together

        links = [link for link in self._links if link.hello is not None]
        calls = [within(_ASK_S, link.call("live")) for link in links]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        found = {
            link.number: answer for link, answer in zip(links, answers, strict=True) if not isinstance(answer, BaseException)
        }
        state, reason = self.state()
        mine = {
            "state": state,
            "reason": reason,
            "uptime_s": time.monotonic() - self._started_s,
            "requests": {"running": len(self._jobs) - self._waiting, "waiting": self._waiting, **self._counts},
            "clients": self._queue.clients,
        }
        pids = [None if link.hello is None else link.hello.pid for link in self._links]
        return together(mine, found, pids, self._losses)

    async def metrics(self) -> bytes:
        self.server_metrics.set("server_queue", self._waiting)
        self.server_metrics.set("server_running", len(self._jobs) - self._waiting)
        self.server_metrics.set("server_clients", self._queue.clients)
        self.server_metrics.state(self.state()[0])
        return self.server_metrics.render()

    async def drain(self, timeout_s: float) -> bool:
        self._draining = True
        if self._jobs:
            with suppress(asyncio.TimeoutError):
                await within(timeout_s, self._emptied.wait())
        finished = not self._jobs
        for job in list(self._jobs.values()):
            self._fail(job, unavailable("the server was shut down before the request was finished"))
        self._stopped = True
        await asyncio.gather(*(link.stop() for link in self._links))
        return finished

    # Requests.

    @property
    def _waiting(self) -> int:
        return len(self._queue) + len(self._again)

    def _job(self, ask: Ask) -> _Job:
        """Its seed is fixed here, so that it gets the same tokens wherever it runs, and however often."""
        number, loop = next(self._numbers), asyncio.get_running_loop()
        params = ask.params
        if params.seed is None:
            params = replace(params, seed=derived_seed(self._seed, number))
        deadline_s = ask.deadline_s if ask.deadline_s is not None else self.settings.deadline_s
        job = _Job(
            number,
            replace(ask, params=params),
            Taken(ask, params, [], []),
            loop.create_future(),
            None if deadline_s is None else time.monotonic() + deadline_s,
        )
        if deadline_s is not None:
            job.taken.alarm = loop.call_later(deadline_s, self._miss, job, deadline_s)
        self._jobs[number] = job
        self._emptied.clear()
        return job

    def _dispatch(self) -> None:
        """Give replicas what they can run now; what waits, waits here, where its order is fair and no replica's end moves it."""
        while self._waiting:
            loads = {link.number: self._loads[link.number] for link in self._links if self._room(link)}
            if not loads:
                return
            if self._again:
                job = self._again.popleft()
            else:
                first = self._queue.first()
                assert first is not None
                job = self._queue.pop(_tokens(first.ask.prompt))
                job.popped = True
                self.server_metrics.observe("server_queue_seconds", time.monotonic() - job.taken.arrived_s)
            job.link = self._links[self._router.choose(job.ask.prompt, loads)]
            job.places = job.ask.params.n
            self._loads[job.link.number] += job.places
            left_s = None if job.until_s is None else max(0.0, job.until_s - time.monotonic()) + _ENGINE_SLACK_S
            job.link.ask(job.number, replace(job.ask, deadline_s=left_s))

    def _room(self, link: Link) -> bool:
        return link.ready and link.hello is not None and self._loads[link.number] < link.hello.slots

    def _leave(self, job: _Job) -> None:
        """It is its replica's no longer."""
        assert job.link is not None
        self._loads[job.link.number] -= job.places
        job.link = None

    def _reject(self, reason: str) -> None:
        self._counts["rejected"] += 1
        self.server_metrics.add("server_rejected", reason=reason)

    def _cancel(self, job: _Job) -> None:
        """Its reader has gone."""
        if self._end(job):
            self._count("cancelled", "server_cancelled")

    def _miss(self, job: _Job, deadline_s: float) -> None:
        if self._end(job):
            self._count("missed", "server_deadlines_missed")
            self._tell(job, too_late(deadline_s))

    def _fail(self, job: _Job, error: Exception) -> None:
        if self._end(job):
            if not isinstance(error, UserError):
                self._count("lost", "server_lost")
            self._tell(job, error)

    def _tell(self, job: _Job, error: Exception) -> None:
        if job.found_right.done():
            job.taken.give([], error)
        else:
            job.found_right.set_exception(error)

    def _count(self, name: str, metric: str) -> None:
        self._counts[name] += 1
        self.server_metrics.add(metric)

    def _end(self, job: _Job) -> bool:
        """It is nobody's any more; False if it was over before."""
        if self._jobs.pop(job.number, None) is None:
            return False
        if job.taken.alarm is not None:
            job.taken.alarm.cancel()
        if job.popped:
            self._queue.done(job.ask.client)
        else:
            self._queue.remove(job.ask.client, job)
        if job.link is not None:
            job.link.cancel(job.number)
            self._leave(job)
        elif job.popped:
            self._again.remove(job)
        if not self._jobs:
            self._emptied.set()
        self._dispatch()
        return True

    # What links say.

    def _up(self, link: Link, hello: Hello) -> None:
        log.warning("engine replica %s is up, process %s", link.number, hello.pid)
        self._first.set()
        self._dispatch()

    def _got(self, link: Link, batch: Batch) -> None:
        for number in batch.taken:
            job = self._jobs.get(number)
            if job is not None and not job.found_right.done():
                job.found_right.set_result(None)
        for number, piece in batch.pieces:
            job = self._jobs.get(number)
            if job is not None and job.link is link:
                self._gained(job, piece)
        for number, fault in batch.over:
            job = self._jobs.get(number)
            if job is not None and job.link is link:
                self._over(job, fault)
        self._dispatch()

    def _gained(self, job: _Job, piece: Piece) -> None:
        if job.taken.cancelled:  # its reader was dropped
            self._cancel(job)
            return
        if piece.finish_reason is not None and job.places and job.link is not None:
            job.places -= 1
            self._loads[job.link.number] -= 1
        before = job.handed_out.tokens
        try:
            new = job.handed_out.new(piece)
        except Diverged:
            self._fail(job, engine_failed("the request's replica was lost, and another one does not give the same tokens"))
            return
        if new is None:
            return
        if before == 0 and new.token_ids:
            self.server_metrics.observe("server_first_token_seconds", time.monotonic() - job.taken.arrived_s)
        self._queue.generated(job.ask.client, job.handed_out.tokens - before)
        job.taken.give([new])
        if new.usage is not None and self._end(job):
            self._count("finished", "server_finished")
            self._rate.finished(time.monotonic())

    def _over(self, job: _Job, fault: Fault | None) -> None:
        """It ended on its replica without a last piece."""
        error = Fault.of(engine_failed("it ended early")).error() if fault is None else fault.error()
        if isinstance(error, ServingError) and error.status != 504:
            self._move(job, f"{error}")
        else:
            self._fail(job, error)

    def _down(self, link: Link, why: str) -> None:
        jobs = [job for job in self._jobs.values() if job.link is link]
        log.warning("engine replica %s is lost, others take its %s requests: %s", link.number, len(jobs), why)
        self._losses += 1
        self._router.forget(link.number)
        for job in jobs:
            self._move(job, why)
        self._dispatch()

    def _move(self, job: _Job, why: str) -> None:
        """Another replica has to run it; what was handed out stays."""
        self._leave(job)
        job.losses += 1
        self._again.append(job)
        if job.losses >= MAX_LOSSES:
            self._fail(job, engine_failed(f"the request's replica failed {job.losses} times, the last time as {why}"))
            return
        self._counts["moved"] += 1
        job.handed_out.again()


def _tokens(prompt: str | list[int]) -> int:
    return len(prompt) // _CHARACTERS_PER_TOKEN if isinstance(prompt, str) else len(prompt)
