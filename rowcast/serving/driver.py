"""The thread that owns a model and drives its engine: requests in, steps, pieces out; a model that is lost is made anew."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rowcast.cluster.replica import ReplicaLLM
from rowcast.errors import GangError, UserError
from rowcast.runtime.densities import Densities
from rowcast.runtime.metrics import EngineMetrics, Exporter
from rowcast.runtime.outputs import RequestStats, StreamChunk
from rowcast.runtime.scheduler import Scheduler
from rowcast.runtime.step import SeqResult
from rowcast.runtime.stream import take_chunk
from rowcast.serving.backend import Piece, State, Usage, engine_failed
from rowcast.serving.desk import Batch, Desk
from rowcast.serving.guarded import guard, text_error
from rowcast.serving.live import Window
from rowcast.serving.taken import Taken

log = logging.getLogger("rowcast")

MakeLLM = Callable[[Exporter], ReplicaLLM]
"""Makes the model, its metrics going to that exporter. Raises what `LLM` raises."""

_LOOK_S = 1.0
"""Between two looks at the ranks of a model that has nothing to do."""
_CALM_S = 60.0
"""After which a step that fails is not held against the requests that it ran."""


@dataclass(frozen=True, slots=True)
class Pauses:
    """Between two attempts to make a model anew: each twice as long as the one before."""

    first_s: float = 1.0
    last_s: float = 60.0

    def after(self, attempts: int) -> float:
        """Seconds, after so many that failed."""
        return float(min(self.first_s * 2 ** min(attempts, 64), self.last_s))


class Driver(threading.Thread):
    """Runs from the first start of the model until the desk is closing; ends the ranks then."""

    def __init__(
        self,
        make: MakeLLM,
        desk: Desk,
        exporter: Exporter,
        pauses: Pauses,
        on_model: Callable[[ReplicaLLM | BaseException], object],
    ) -> None:
        """`on_model` is called in the event loop with the model each time that it was made, and with why the first time failed."""
        super().__init__(name="rowcast-engine", daemon=True)
        self._make, self._desk, self._exporter, self._pauses, self._on_model = make, desk, exporter, pauses, on_model
        self._llm: ReplicaLLM | None = None
        self._was_up = False
        self._attempts = 0
        """To make it anew, since it was lost."""
        self._running: list[Taken] = []
        """What the engine has, the oldest first."""
        self._mishap_s = float("-inf")
        """When a step failed last."""

    def run(self) -> None:
        try:
            while not self._desk.closing:
                try:
                    if self._llm is None:
                        self._start()
                    elif self._wait(self._llm):
                        self._work(self._llm)
                except BaseException as error:  # of ours, or a panic in a library: nobody is to wait for this thread
                    log.exception("the engine's thread")
                    self._lost(error)
        finally:
            self._say("stopped", "it was shut down")
            self._shut_down()

    # The model.

    def _start(self) -> None:
        """Make it; where it was lost, after a pause."""
        desk = self._desk
        if self._was_up:
            with desk.changed:
                if desk.changed.wait_for(lambda: desk.closing, self._pauses.after(self._attempts)):
                    return
        try:
            llm = self._make(self._exporter)
        except BaseException as error:
            self._attempts += 1
            if not self._was_up:
                desk.close()
                desk.call(self._on_model, error)
                return
            sentence = str(error).partition("\n")[0]
            log.warning("the model cannot be started again: %s", sentence)
            self._say("recovering", f"the model cannot be started again: {sentence}")
            desk.lost([], f"the model cannot be started again: {sentence}")
            return
        memory = "host" if llm.plan.device == "cpu" else "gpu"
        llm.engine.metrics = _Metrics(self._exporter, desk.window, memory=memory)
        llm.engine._make_detokenizer = guard(llm.engine._make_detokenizer)
        llm.gang_executor.on_failure = self._rank_failed
        if self._was_up:
            desk.counts.starts += 1
            desk.metrics.add("server_model_starts")
            log.warning("the model is back")
        self._llm, self._was_up, self._attempts = llm, True, 0
        desk.room = llm.plan.max_num_seqs
        self._say("ready", "")
        desk.call(self._on_model, llm)

    def _rank_failed(self) -> None:
        """The executor says so before it starts them again."""
        self._desk.counts.rank_failures += 1
        self._say("recovering", "the model's ranks are being started again")
        if self._llm is not None and self._llm.engine.metrics is not None:
            self._llm.engine.metrics.rank_failure()

    def _is_well(self) -> None:
        """The ranks have answered."""
        if self._desk.state == "recovering":
            self._say("ready", "")
            log.warning("the model's ranks are back")

    def _lost(self, error: BaseException) -> None:
        """The model is gone, and with it all that was taken."""
        sentence = str(error).partition("\n")[0] or type(error).__name__
        log.error("the model is lost: %s", sentence)
        self._say("recovering", "the model is being started again")
        running, self._running = self._running, []
        self._desk.lost(running, f"the model was lost before the request was finished: {sentence}")
        self._shut_down()

    def _shut_down(self) -> None:
        """End the ranks of a model that is no longer used."""
        llm, self._llm = self._llm, None
        if llm is None:
            return
        try:
            llm.shutdown()
        except Exception:  # those that are left find their driver gone, or are ended with it
            log.exception("the model's ranks could not be ended in order")

    def _say(self, state: State, reason: str) -> None:
        self._desk.state, self._desk.reason = state, reason

    # Its requests.

    def _wait(self, llm: ReplicaLLM) -> bool:
        """Until there is something to do, looking at the ranks meanwhile; false where they were lost."""
        desk = self._desk
        while not self._running:
            with desk.changed:
                if desk.changed.wait_for(lambda: desk.closing or len(desk.queue) > 0, _LOOK_S):
                    break
            try:
                llm.gang_executor.look()
                if not llm.alive:
                    llm.gang_executor.revive()
                    self._is_well()
            except Exception as error:
                self._lost(error)
                return False
        return not desk.closing

    def _work(self, llm: ReplicaLLM) -> None:
        """Let requests in and out, make a step, and hand out what it gave."""
        batch: Batch = []
        was_alive = llm.alive
        try:
            for taken in [taken for taken in self._running if taken.cancelled]:
                self._abort(llm, taken)
            self._admit(llm, batch)
            if llm.engine.has_work:
                llm.engine.step()
                if llm.alive:
                    self._is_well()
            for taken in list(self._running):
                self._collect(llm, taken, batch)
        except Exception as error:
            if isinstance(error, GangError) or not was_alive:
                self._lost(error)
            else:
                self._mishap(llm, error)
        finally:
            self._desk.deliver(batch)

    def _admit(self, llm: ReplicaLLM, batch: Batch) -> None:
        """Give the engine what it can run now: what waits, waits at the desk, where its order is fair."""
        desk = self._desk
        while not desk.closing:
            with desk.changed:
                taken = desk.queue.first()
                fits = taken is None or self._fits(llm.engine.scheduler, taken)
                desk.room = max(0, llm.plan.max_num_seqs - self._places) if fits else 0
                if taken is None or not fits:
                    return
                desk.queue.pop(len(taken.prompt_ids))
                desk.room = max(0, desk.room - taken.params.n)  # at once: others come while the engine takes this one in
            self._running.append(taken)
            if taken.cancelled:
                self._leave(taken)
                continue
            taken.begun_s = time.monotonic()
            desk.metrics.observe("server_queue_seconds", taken.begun_s - taken.arrived_s)
            prompt = taken.ask.prompt if isinstance(taken.ask.prompt, str) else None
            try:
                taken.request = llm.engine.add(
                    taken.prompt_ids,
                    taken.params,
                    prompt=prompt,
                    bad_word_ids=taken.bad_word_ids,
                    ladder=taken.ask.ladder,
                    mode=taken.ask.mode,
                )
            except UserError as error:
                self._leave(taken)
                if not llm.alive:  # it may be the ranks that cannot be started
                    batch.append((taken, [], engine_failed("the model was lost before the request was begun")))
                    raise
                batch.append((taken, [], error))

    def _fits(self, scheduler: Scheduler, taken: Taken) -> bool:
        """Whether the engine would run it, or some of its answers, at its next step: the others wait in there for places as they come
        free, so that nobody's place stays empty for them. One that does not fit by its size goes in, too, where none waits for memory
        in there: the prefix cache may have most of it."""
        if not self._running:
            return True
        if self._places >= scheduler.max_num_seqs:
            return False
        if not scheduler.waiting:
            return True
        blocks = sum(scheduler.blocks_for(seq.length) for seq in scheduler.waiting)
        blocks += taken.params.n * scheduler.blocks_for(len(taken.prompt_ids) + 1)
        return blocks <= scheduler.pool.free_blocks

    @property
    def _places(self) -> int:
        """Answers that the engine has yet to end."""
        return sum(
            taken.params.n if taken.request is None else sum(seq.finish_reason is None for seq in taken.request.sequences)
            for taken in self._running
        )

    def _collect(self, llm: ReplicaLLM, taken: Taken, batch: Batch) -> None:
        """What a request gained."""
        request, desk = taken.request, self._desk
        if request is None:  # it could not be added
            self._leave(taken)
            batch.append((taken, [], engine_failed("the request could not be begun")))
            return
        error = next((found for seq in request.sequences if (found := text_error(seq)) is not None), None)
        if error is not None:
            log.error("request %s: its text cannot be made: %r", taken.ask.request_id, error)
            self._abort(llm, taken)
            batch.append((taken, [], engine_failed(f"the text of the request could not be made: {type(error).__name__}")))
            return
        pieces = [_piece(chunk) for seq in request.sequences if (chunk := take_chunk(seq)) is not None]
        if not pieces:
            return
        now = time.monotonic()
        with desk.changed:
            desk.queue.generated(taken.ask.client, sum(len(piece.token_ids) for piece in pieces))
        if taken.first_token_s is None:
            taken.first_token_s = now
            desk.window.first_token(now - taken.arrived_s)
            desk.metrics.observe("server_first_token_seconds", now - taken.arrived_s)
        if request.finished:
            pieces[-1] = replace(pieces[-1], usage=_usage(taken, request.stats))
            self._leave(taken)
            desk.counts.finished += 1
            desk.metrics.add("server_finished")
            desk.rate.finished(now)
            desk.window.finished(1 / request.stats.tokens_per_s if request.stats.tokens_per_s else None)
        batch.append((taken, pieces, None))

    def _mishap(self, llm: ReplicaLLM, error: Exception) -> None:
        """A step came to nothing, by no fault of the ranks: a request may be to blame. The first time the step is made again; where
        that does not help, the youngest request is given up, and so on until it does. Ranks of which only some failed have ended."""
        if not llm.alive:
            self._rank_failed()
        now = time.monotonic()
        again, self._mishap_s = now - self._mishap_s < _CALM_S, now
        log.error("a step failed, %s: %r", "the youngest request is given up" if again else "it is made again", error)
        if again and self._running:
            taken = self._running[-1]
            self._abort(llm, taken)
            sentence = str(error).partition("\n")[0]
            self._desk.deliver([(taken, [], engine_failed(f"the request could not be run: {sentence}"))])

    def _abort(self, llm: ReplicaLLM, taken: Taken) -> None:
        if taken.request is not None:
            llm.engine.abort(taken.request)
        self._leave(taken)

    def _leave(self, taken: Taken) -> None:
        """It is no longer in the engine."""
        self._running.remove(taken)
        self._desk.left(taken)


class _Metrics(EngineMetrics):
    """An engine's events, for the page, too."""

    def __init__(self, exporter: Exporter, window: Window, *, memory: str) -> None:
        super().__init__(exporter, memory=memory)
        self._window = window

    def step(
        self,
        scheduler: Scheduler,
        results: Sequence[SeqResult],
        emitted: int,
        preempted: int,
        dense_bytes: int,
        densities: Densities,
    ) -> None:
        super().step(scheduler, results, emitted, preempted, dense_bytes, densities)
        self._window.step(results, emitted, dense_bytes, densities)


def _piece(chunk: StreamChunk) -> Piece:
    return Piece(chunk.index, chunk.text, chunk.token_ids, chunk.logprobs, chunk.finish_reason, chunk.stop_reason)


def _usage(taken: Taken, stats: RequestStats) -> Usage:
    queued_s = (taken.begun_s or taken.arrived_s) - taken.arrived_s
    return Usage(stats.prompt_tokens, stats.cached_tokens, stats.generated_tokens, {**stats.to_json(), "queued_s": queued_s})
