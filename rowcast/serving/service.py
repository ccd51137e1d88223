"""The engine as a service: one thread drives it, any number of requests come and go in an event loop.

The model runs in processes of its own. Ranks that die are started again by the engine, and streams go on where they were; when they die
too often, or the model cannot be started again, the requests that were taken get an error and the model is made anew, with growing
pauses, until it is back.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rowcast.cluster.gang import Limits
from rowcast.cluster.launcher import Launcher
from rowcast.cluster.metrics import PrometheusExporter
from rowcast.cluster.replica import ReplicaLLM
from rowcast.errors import UserError
from rowcast.runtime.engine import derived_seed
from rowcast.runtime.metrics import Exporter
from rowcast.runtime.sampler import Sampler
from rowcast.runtime.tokenizer import Tokenizer
from rowcast.serving import live
from rowcast.serving.backend import Ask, ModelCard, Piece, State, queue_full, too_late, unavailable
from rowcast.serving.desk import Desk
from rowcast.serving.driver import Driver, MakeLLM, Pauses
from rowcast.serving.metrics import ServerMetrics, Tee, new_registry
from rowcast.serving.taken import Pieces, Taken

LONG_PROMPT_CHARS = 8192
"""Longer ones are tokenised beside the event loop."""

PREFILL_STALL_S = 0.1
"""By which prompts may prolong a step in which others generate."""

_RETRY_S = 5.0
"""When to ask a server again that starts or drains."""
_END_S = 10.0
"""For the engine's thread and the ranks, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceSettings:
    """What a service allows."""

    name: str
    """Of the model, as clients write it."""
    max_waiting: int = 1024
    """Requests that wait for the engine; more are refused."""
    deadline_s: float | None = None
    """For requests that name none; None: as long as it takes."""
    pauses: Pauses = field(default_factory=Pauses)
    seed: int | None = None
    """From which those of requests are derived that bring none; None: by chance."""

    def __post_init__(self) -> None:
        if self.max_waiting < 0:
            raise UserError(f"max_waiting={self.max_waiting} has to be at least 0: that lets none wait")
        if self.deadline_s is not None and not self.deadline_s > 0:
            raise UserError(f"deadline={self.deadline_s} has to be more than 0 seconds: leave it out for none")


class EngineService:
    """Implements `Backend`. Made anywhere; `start` and all that follows belong to one event loop."""

    def __init__(self, make: MakeLLM, settings: ServiceSettings, *, also: Exporter | None = None) -> None:
        """`also`: gets the engine's metrics, too. Raises UserError where prometheus_client is not installed."""
        registry = new_registry()
        exporter: Exporter = PrometheusExporter(registry)
        self.settings = settings
        self.server_metrics = ServerMetrics(registry)
        self._desk = Desk(self.server_metrics)
        self._driver = Driver(
            make, self._desk, exporter if also is None else Tee(exporter, also), settings.pauses, self._model_came
        )
        self._seed = secrets.randbits(62) if settings.seed is None else settings.seed
        self._seeds = 0
        self._started_s = time.monotonic()
        self._draining = False
        self._first: asyncio.Future[None] | None = None
        """Of the first start."""
        self._llm: ReplicaLLM | None = None
        """The latest, for what does not change: its plan, shape and tokenizer."""
        self._card: ModelCard | None = None

    async def start(self) -> None:
        """Load the model. Raises what that raises, after which the service is stopped."""
        self._desk.open()
        self._first = asyncio.get_running_loop().create_future()
        self._driver.start()
        await self._first

    @property
    def card(self) -> ModelCard:
        if self._card is None:
            raise self._unavailable()
        return self._card

    @property
    def tokenizer(self) -> Tokenizer:
        if self._llm is None:
            raise self._unavailable()
        return self._llm.tokenizer

    @property
    def slots(self) -> int:
        """Sequences that run at a time. Raises ServingError before the model was loaded."""
        if self._llm is None:
            raise self._unavailable()
        return self._llm.plan.max_num_seqs

    @property
    def rank_pids(self) -> list[int]:
        """Of the model's processes on this machine, as far as they live; for whoever watches them."""
        llm = self._llm
        gang = None if llm is None else llm.gang_executor.gang
        return [] if gang is None or not gang.alive else list(gang.pids)

    def state(self) -> tuple[State, str]:
        state, reason = self._desk.state, self._desk.reason
        if self._draining and state != "stopped":
            return "draining", "it is being shut down"
        return state, reason

    async def submit(self, ask: Ask) -> AsyncIterator[Piece]:
        if self.state()[0] not in ("ready", "recovering"):
            self._reject("unavailable")
            raise self._unavailable()
        try:
            taken = await self._check(ask)
        except UserError:
            self._reject("invalid")
            raise
        if self.state()[0] not in ("ready", "recovering"):  # meanwhile
            self._reject("unavailable")
            raise self._unavailable()
        waiting = self._desk.take(taken, self.settings.max_waiting)
        if waiting is not None:
            self._reject("queue_full")
            raise queue_full(waiting, self._desk.rate.retry_after_s(waiting, time.monotonic()))
        deadline_s = self.settings.deadline_s if ask.deadline_s is None else ask.deadline_s
        if deadline_s is not None:
            left_s = deadline_s - (time.monotonic() - taken.arrived_s)
            taken.alarm = asyncio.get_running_loop().call_later(max(0.0, left_s), self._miss, taken, deadline_s)
        return Pieces(taken, self._cancel)

    async def live(self) -> dict[str, Any]:
        running, waiting, clients = self._desk.load
        recent, seconds, total, latencies = self._desk.window.snapshot()
        state, reason = self.state()
        counts = self._desk.counts
        found: dict[str, Any] = {
            "state": state,
            "reason": reason,
            "uptime_s": time.monotonic() - self._started_s,
            "requests": {
                "running": running,
                "waiting": waiting,
                "finished": counts.finished,
                "rejected": counts.rejected,
                "cancelled": counts.cancelled,
                "missed": counts.missed,
                "lost": counts.lost,
            },
            "clients": clients,
            "tokens_per_s": recent.tokens / seconds,
            "prompt_tokens_per_s": recent.prompt_tokens / seconds,
            "tokens": total.tokens,
            "prompt_tokens": total.prompt_tokens,
            "steps": total.steps,
            "failures": {"ranks": counts.rank_failures, "models": counts.starts},
            **latencies,
        }
        if self._llm is not None and self._card is not None:
            found |= live.model_json(self._llm.engine, self._card, self._desk.window, recent, total)
        return found

    async def metrics(self) -> bytes:
        for name, value in zip(("server_running", "server_queue", "server_clients"), self._desk.load, strict=True):
            self.server_metrics.set(name, value)
        self.server_metrics.state(self.state()[0])
        return self.server_metrics.render()

    async def drain(self, timeout_s: float) -> bool:
        self._draining = True
        finished = await self._desk.emptied(timeout_s)
        self._desk.abandon(lambda: unavailable("the server was shut down before the request was finished"))
        self._desk.close()
        await asyncio.to_thread(self._driver.join, _END_S)
        self._desk.state, self._desk.reason = "stopped", "it was shut down"
        return finished

    async def _check(self, ask: Ask) -> Taken:
        """The request as the engine gets it. Raises UserError for what the engine would refuse."""
        llm, params, arrived_s = self._llm, ask.params, time.monotonic()
        assert llm is not None
        if params.seed is None:
            params, self._seeds = replace(params, seed=derived_seed(self._seed, self._seeds)), self._seeds + 1
        ids = ask.prompt
        if isinstance(ids, str):
            encode = llm.tokenizer.encode
            ids = await asyncio.to_thread(encode, ids) if len(ids) > LONG_PROMPT_CHARS else encode(ids)
        if params.truncate_prompt_tokens is not None:
            kept = params.truncate_prompt_tokens
            ids = ids[-(kept if kept > 0 else llm.plan.max_context - 1) :]
        if params.detokenize:
            _ = llm.tokenizer  # raises where there is none
        bad_word_ids = [word for text in params.bad_words or () for word in llm._bad_word_ids(text)]
        llm.engine.choices.choose(ask.ladder, ask.mode)
        llm.engine._max_length(ids, params)
        Sampler(llm.spec.vocab_size).add(
            0, params, seed=0, sample_index=0, prompt_ids=(), eos_ids=llm._eos_ids(), bad_word_ids=bad_word_ids
        )
        return Taken(ask, params, list(ids), bad_word_ids, arrived_s=arrived_s)

    def _model_came(self, found: ReplicaLLM | BaseException) -> None:
        assert self._first is not None
        if isinstance(found, BaseException):
            self._first.set_exception(found)
            return
        self._llm = found
        if self._card is None:
            plan = found.plan
            self._card = ModelCard(
                self.settings.name, int(time.time()), plan.max_context, found.spec.vocab_size, plan.ladder_text, plan.mode
            )
        if not self._first.done():
            self._first.set_result(None)

    def _unavailable(self) -> Exception:
        state, reason = self.state()
        return unavailable(f"the server takes no requests: {reason}", None if state == "stopped" else _RETRY_S)

    def _reject(self, reason: str) -> None:
        self._desk.counts.rejected += 1
        self.server_metrics.add("server_rejected", reason=reason)

    def _cancel(self, taken: Taken) -> None:
        """Its reader has gone."""
        if not taken.over:
            self._desk.counts.cancelled += 1
            self.server_metrics.add("server_cancelled")
        self._desk.let_go(taken)

    def _miss(self, taken: Taken, deadline_s: float) -> None:
        """Its deadline has come."""
        if not taken.over and not taken.cancelled:
            self._desk.counts.missed += 1
            self.server_metrics.add("server_deadlines_missed")
            self._desk.let_go(taken)
            taken.give([], too_late(deadline_s))


def engine_service(
    model: str | Path,
    settings: ServiceSettings,
    *,
    tensor_parallel_size: int = 1,
    launcher: str | Launcher = "auto",
    limits: Limits | None = None,
    prefill_stall_s: float | None = PREFILL_STALL_S,
    also: Exporter | None = None,
    **arguments: Any,
) -> EngineService:
    """A service for a model, whose arguments are those of `LLM`. Nothing is loaded before its `start`.

    `launcher`: "local", "ray" or one that was made; "auto": Ray for several ranks in a process that belongs to a Ray cluster, else
    local. Ranks are processes even where there is one. `also`: as in `EngineService`. Raises UserError.
    """
    if launcher == "auto":
        launcher = "ray" if tensor_parallel_size > 1 and _on_a_cluster() else "local"

    def make(exporter: Exporter) -> ReplicaLLM:
        return ReplicaLLM(
            0,
            launcher if isinstance(launcher, str) else lambda _: launcher,
            None,
            model,
            tensor_parallel_size=tensor_parallel_size,
            limits=limits,
            metrics=exporter,
            prefill_stall_s=prefill_stall_s,
            **arguments,
        )

    return EngineService(make, settings, also=also)


def _on_a_cluster() -> bool:
    """Whether this process is a job of one, or was told of one."""
    ray: Any = sys.modules.get("ray")
    return bool(os.environ.get("RAY_ADDRESS")) or (ray is not None and bool(ray.is_initialized()))
