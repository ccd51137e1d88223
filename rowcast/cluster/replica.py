"""One replica: a gang of its own, a thread that drives its engine, and what that shares with the others and the caller."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rowcast.cluster.executor import GangExecutor
from rowcast.cluster.launcher import Launcher, LocalLauncher
from rowcast.cluster.llm import LLM
from rowcast.errors import GangError, OutOfMemoryError
from rowcast.placement.plan import Plan
from rowcast.runtime.metrics import Exporter
from rowcast.runtime.outputs import RequestOutput
from rowcast.runtime.params import SamplingParams
from rowcast.runtime.request import Request

log = logging.getLogger("rowcast")

_LOOK_S = 1.0
"""Between two looks at the ranks of one that has nothing to do."""


@dataclass(eq=False, slots=True)
class Work:
    """One request, wherever it runs."""

    number: int
    prompt: str | list[int]
    params: SamplingParams
    ladder: str | None = None
    """As in `Engine.add`, and so is `mode`."""
    mode: str | None = None
    output: RequestOutput | None = None
    error: Exception | None = None
    losses: int = 0
    """Replicas that failed while they ran it."""
    cancelled: bool = False

    @property
    def over(self) -> bool:
        return self.output is not None or self.error is not None or self.cancelled


@dataclass(slots=True)
class Pool:
    """What the replicas' threads and the caller share. All of it is read and changed under `changed`."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    queue: deque[Work] = field(default_factory=deque)
    running: dict[int, list[Work]] = field(default_factory=dict)
    """By replica; one that is not up has no entry."""
    errors: dict[int, Exception] = field(default_factory=dict)
    """Why a replica could not be started the last time, by replica."""
    attempts: dict[int, int] = field(default_factory=dict)
    """Since it was up."""
    closing: bool = False

    def share(self, replica: int) -> int:
        """How many requests it may take now, so that all that are up have equally many."""
        in_all = len(self.queue) + sum(map(len, self.running.values()))
        return -(-in_all // len(self.running)) - len(self.running[replica])

    def give_back(self, replica: int, limit: int, reason: str) -> None:
        """It is no longer up: others run what it ran, but for requests that were lost too often."""
        lost = [work for work in self.running.pop(replica, []) if not work.over]
        for work in lost:
            work.losses += 1
            if work.losses >= limit:
                work.error = GangError(f"the request's ranks failed {work.losses} times, the last time as {reason}")
        self.queue.extendleft(work for work in reversed(lost) if not work.over)
        self.changed.notify_all()


class ReplicaLLM(LLM):
    """One replica: its ranks are elsewhere, even where there is only one."""

    _one_rank_here = False

    def __init__(
        self, number: int, launcher: str | Callable[[int], Launcher], place_s: float | None, model: str | Path, **arguments: Any
    ) -> None:
        """`place_s`: how long to wait for a place; None: as `RayLauncher`."""
        self._number, self._place_s = number, place_s
        super().__init__(model, launcher=launcher if isinstance(launcher, str) else launcher(number), **arguments)

    def _report_to(self, metrics: str | Exporter, replica: int = 0) -> None:
        super()._report_to(metrics, self._number)

    @property
    def gang_executor(self) -> GangExecutor:
        executor = self.engine._executor
        assert isinstance(executor, GangExecutor)
        return executor

    @property
    def alive(self) -> bool:
        """Whether its ranks are, as far as is known."""
        gang = self.gang_executor.gang
        return gang is not None and gang.alive

    def add(
        self, prompt: str | list[int], params: SamplingParams, *, ladder: str | None = None, mode: str | None = None
    ) -> Request:
        """Queue a request; `ladder` and `mode` as in `Engine.add`. Raises UserError."""
        return self._add(prompt, params, ladder=ladder, mode=mode)

    def _choose_launcher(self, *, on_gpu: bool) -> Launcher:
        chosen = super()._choose_launcher(on_gpu=on_gpu)
        if not isinstance(self._launcher, str) or isinstance(chosen, LocalLauncher):
            return chosen
        from rowcast.cluster.ray_launcher import PLACE_S, RayLauncher

        return RayLauncher(gpus=int(on_gpu), replica=self._number, place_s=self._place_s or PLACE_S)


class Replica(threading.Thread):
    """Makes the LLM and drives its engine. Knows the pool and not the `Replicas`, so that this can be dropped."""

    def __init__(self, number: int, make: Callable[[int, bool], ReplicaLLM], pool: Pool, failures: int, retry_s: float) -> None:
        """`make`: from its number, and whether it was up before."""
        super().__init__(name=f"rowcast-replica-{number}", daemon=True)
        self.plan: Plan | None = None
        self._number, self._make, self._pool, self._limit, self._retry_s = number, make, pool, failures, retry_s
        self._llm: ReplicaLLM | None = None
        self._requests: dict[Work, Request] = {}

    def run(self) -> None:
        try:
            while not self._pool.closing:
                try:
                    if self._llm is None:
                        self._start()
                    elif self._wait_for_work(self._llm):
                        self._work(self._llm)
                except Exception as error:  # an error of ours: nobody is to wait for this thread
                    log.exception("replica %s", self._number)
                    self._lost(error)
        finally:
            if self._llm is not None:
                self._llm.shutdown()

    def _start(self) -> None:
        pool = self._pool
        try:
            self._llm = self._make(self._number, self.plan is not None)
        except Exception as error:
            with pool.changed:
                if pool.attempts.get(self._number) == 0:
                    log.warning("replica %s cannot be started: %s", self._number, error)
                pool.errors[self._number] = error
                pool.attempts[self._number] = pool.attempts.get(self._number, 0) + 1
                self._give_up()
                pool.changed.notify_all()
                pool.changed.wait_for(lambda: pool.closing, self._retry_s)
            return
        self.plan = self._llm.plan
        with pool.changed:
            pool.errors.pop(self._number, None)
            if pool.attempts.pop(self._number, None) is not None:
                log.warning("replica %s is back", self._number)
            pool.running[self._number] = []
            pool.changed.notify_all()

    def _give_up(self) -> None:
        """No replica is up or comes up: nobody has to wait any longer."""
        pool = self._pool
        if not pool.running and pool.attempts and min(pool.attempts.values()) >= self._limit:
            sentence = str(pool.errors[self._number]).partition("\n")[0]
            for work in pool.queue:
                work.error = GangError(f"no replica of the model can be started, the last one as {sentence}")
            pool.queue.clear()

    def _wait_for_work(self, llm: ReplicaLLM) -> bool:
        """Take a fair share of what waits; whether there is anything to do."""
        pool = self._pool
        while not self._requests:
            with pool.changed:
                if pool.changed.wait_for(lambda: pool.closing or pool.queue, _LOOK_S):
                    break
            if self._failed(llm, llm.gang_executor.look):
                return False
        with pool.changed:
            room = llm.plan.max_num_seqs - sum(work.params.n for work in self._requests)
            count = min(pool.share(self._number), len(pool.queue), max(room, 0 if self._requests else 1))
            taken = [pool.queue.popleft() for _ in range(count)]
            pool.running[self._number] += taken
        for work in taken:
            if self._llm is not None:
                self._add(llm, work)
        return self._llm is not None and bool(self._requests)

    def _add(self, llm: ReplicaLLM, work: Work) -> None:
        try:
            self._requests[work] = llm.add(work.prompt, work.params, ladder=work.ladder, mode=work.mode)
        except Exception as error:
            if not llm.alive:
                self._lost(error)
            else:
                self._over({work: error})

    def _work(self, llm: ReplicaLLM) -> None:
        for work, request in list(self._requests.items()):
            if work.cancelled:
                llm.engine.abort(request)
        if llm.engine.has_work and self._failed(llm, llm.engine.step):
            return
        self._over({work: None for work, request in self._requests.items() if request.finished})

    def _failed(self, llm: ReplicaLLM, do: Callable[[], None]) -> bool:
        """Whether the gang was lost while it did that, or all requests with it. Errors of requests are noted."""
        failures = llm.gang_executor.failures
        try:
            do()
        except OutOfMemoryError as error:  # a request is to blame, whichever
            self._over(dict.fromkeys(self._requests, error))
            return True
        except Exception as error:
            if llm.alive:
                self._over(dict.fromkeys(self._requests, error))
            else:
                self._lost(error)
            return True
        if llm.gang_executor.failures > failures:
            self._lost(None)
            return True
        return False

    def _over(self, found: dict[Work, Exception | None]) -> None:
        """Requests that have ended, each well or with an error."""
        if not found:
            return
        with self._pool.changed:
            for work, error in found.items():
                request = self._requests.pop(work, None)
                if error is not None:
                    work.error = error
                    if request is not None and self._llm is not None:
                        self._llm.engine.abort(request)
                elif request is not None:
                    work.output = request.output()
                    work.output.request_id = f"{work.number}"
                self._pool.running[self._number].remove(work)
            self._pool.changed.notify_all()

    def _lost(self, error: Exception | None) -> None:
        """The gang is gone: its requests go elsewhere before anything else is done."""
        reason = "a rank failed" if error is None else str(error).partition("\n")[0]
        log.warning("replica %s is lost, others take its %s requests: %s", self._number, len(self._requests), reason)
        with self._pool.changed:
            self._pool.give_back(self._number, self._limit, reason)
            self._pool.attempts[self._number] = 0
        self._requests.clear()
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.shutdown()
