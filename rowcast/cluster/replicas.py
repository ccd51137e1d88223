"""Several gangs of one model, each on a node of its own where there are enough, that share the requests.

Tensor parallelism stays inside a node; between nodes nothing crosses but requests and their results. A replica that fails hands its
unfinished requests to the others and joins them again once it has been started anew.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from rowcast.cluster.gang import Limits
from rowcast.cluster.launcher import Launcher
from rowcast.cluster.replica import Pool, Replica, ReplicaLLM, Work
from rowcast.errors import GangError, UserError
from rowcast.placement.plan import Plan
from rowcast.runtime.engine import derived_seed
from rowcast.runtime.llm import each_params
from rowcast.runtime.outputs import RequestOutput
from rowcast.runtime.params import SamplingParams
from rowcast.runtime.prompts import Prompt, each_prompt

MAX_REPLICAS = 1024

RETRY_S = 10.0
"""Between two attempts to start a replica that has no place, or fails; and at least so long one waits for a place: an attempt that
gives up sooner than the cluster can answer never succeeds."""


_SHUT_DOWN = "the model's ranks are gone: it was shut down; make a new Replicas"


class Replicas:
    """`data_parallel_size` times the same model, `tensor_parallel_size` ranks each. Not thread-safe.

    >>> with Replicas("facebook/opt-30b", data_parallel_size=2, tensor_parallel_size=4) as replicas:
    ...     replicas.generate(prompts)
    """

    def __init__(
        self,
        model: str | Path,
        *,
        data_parallel_size: int,
        tensor_parallel_size: int = 1,
        launcher: str | Callable[[int], Launcher] = "auto",
        limits: Limits | None = None,
        retry_s: float = RETRY_S,
        seed: int = 0,
        progress: bool | None = None,
        **arguments: Any,
    ) -> None:
        """Start all replicas. Arguments as for `LLM`; `launcher` may make one for each replica, by number. `retry_s`: between two
        attempts to start one again.

        Requests get the tokens that one `LLM` with this seed gives, whichever replica runs them. Raises what the first replica that
        cannot be started raises.
        """
        if not isinstance(data_parallel_size, int) or isinstance(data_parallel_size, bool):
            raise UserError(f"data_parallel_size={data_parallel_size!r:.60} has to be a whole number")
        if not 1 <= data_parallel_size <= MAX_REPLICAS:
            raise UserError(f"data_parallel_size={data_parallel_size} has to be from 1 to {MAX_REPLICAS}")
        self._seed = seed
        self._requests = 0
        self._pool = pool = Pool()
        limits = limits or Limits()

        def make(number: int, again: bool) -> ReplicaLLM:
            return ReplicaLLM(
                number,
                launcher,
                max(retry_s, RETRY_S) if again else None,
                model,
                tensor_parallel_size=tensor_parallel_size,
                limits=limits,
                seed=seed,
                progress=progress if number == 0 and not again else False,
                **arguments,
            )

        if launcher in ("auto", "ray"):
            _connect(launcher, data_parallel_size * max(1, tensor_parallel_size))
        self._threads = [Replica(number, make, pool, limits.failures, retry_s) for number in range(data_parallel_size)]
        self._end = weakref.finalize(self, _end, pool, self._threads)
        for thread in self._threads:
            thread.start()
        try:
            with pool.changed:
                pool.changed.wait_for(lambda: pool.errors or len(pool.running) == data_parallel_size)
                if pool.errors:
                    raise next(iter(pool.errors.values()))
        except BaseException:
            self.shutdown()
            raise
        self.plan: Plan = next(thread.plan for thread in self._threads if thread.plan is not None)

    @property
    def up(self) -> list[int]:
        """The replicas that take requests now."""
        with self._pool.changed:
            return sorted(self._pool.running)

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """As `LLM.generate`: results in input order."""
        return list(self.iterate(prompts, sampling_params))

    def iterate(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[RequestOutput]:
        """As `LLM.iterate`. Raises GangError for a request whose replicas failed too often, and where none can be started any more."""
        each = each_prompt(prompts)
        works = []
        for prompt, params in zip(each, each_params(sampling_params, len(each)), strict=True):
            seed = derived_seed(self._seed, self._requests) if params.seed is None else params.seed
            works.append(Work(self._requests, prompt, replace(params, seed=seed)))
            self._requests += 1
        pool = self._pool
        with pool.changed:
            if pool.closing:
                raise GangError(_SHUT_DOWN)
            pool.queue.extend(works)
            pool.changed.notify_all()
        try:
            for work in works:
                with pool.changed:
                    pool.changed.wait_for(lambda work=work: work.over or pool.closing or any(each.error for each in works))  # type: ignore[misc]
                for i, failed in enumerate(works, start=1):
                    if isinstance(failed.error, UserError) and len(works) > 1:
                        raise type(failed.error)(f"prompt {i} of {len(works)}: {failed.error}") from failed.error
                    if failed.error is not None:
                        raise failed.error
                if work.output is None:
                    raise GangError(_SHUT_DOWN)
                yield work.output
        finally:
            with pool.changed:
                for work in works:
                    work.cancelled = True
                pool.queue = deque(work for work in pool.queue if not work.over)
                pool.changed.notify_all()

    def shutdown(self) -> None:
        """End all ranks. May be called twice."""
        self._end()

    def __enter__(self) -> Replicas:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.shutdown()


def _end(pool: Pool, threads: list[Replica]) -> None:
    with pool.changed:
        pool.closing = True
        pool.changed.notify_all()
    for thread in threads:
        if thread.ident is not None and thread is not threading.current_thread():
            thread.join()


def _connect(launcher: object, ranks: int) -> None:
    """To Ray, in the caller's thread, where that is what starts the ranks."""
    from importlib.util import find_spec

    if launcher == "auto" and find_spec("ray") is None:
        return
    from rowcast.cluster.ray_launcher import connect

    connect(ranks)
