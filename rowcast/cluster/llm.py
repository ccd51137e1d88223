"""The driver API for any number of ranks. One rank is this process and needs neither Ray nor ZeroMQ; more are a gang."""

from __future__ import annotations

import weakref
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import msgpack
import torch

from rowcast.errors import UserError
from rowcast.runtime import llm as one_rank
from rowcast.runtime.checkpoint import DEFAULT_MODEL, Checkpoint
from rowcast.runtime.device import choose_device
from rowcast.runtime.executor import LocalExecutor
from rowcast.runtime.planning import Planned
from rowcast.runtime.progress import LoadProgress
from rowcast.runtime.step import Executor
from rowcast.runtime.trace import Trace
from rowcast.settings import settings

if TYPE_CHECKING:
    from rowcast.cluster.drafting import DriverDraft
    from rowcast.cluster.gang import Gang, Limits
    from rowcast.cluster.launcher import Launcher
    from rowcast.runtime.metrics import Exporter

MAX_RANKS = 1024


class LLM(one_rank.LLM):
    """A language model ready to generate, on one rank or several. Not thread-safe.

    >>> with LLM("facebook/opt-66b", tensor_parallel_size=2) as llm:
    ...     llm.generate("The capital of France is")
    """

    _one_rank_here = True
    """Whether one rank is this process."""

    def __init__(
        self,
        model: str | Path | Checkpoint = DEFAULT_MODEL,
        *,
        launcher: str | Launcher = "auto",
        limits: Limits | None = None,
        metrics: str | Exporter | None = None,
        draft_device: str | None = None,
        **arguments: Any,
    ) -> None:
        """Arguments as in `rowcast.runtime.llm.LLM`, and for several ranks:

        `launcher`: what starts them. "ray": actors of the Ray cluster that there is, or of one that is started here; "local":
        processes of this machine; "auto": Ray where it is installed. `limits`: how long to wait for ranks, and how often to start them
        again; when they failed too often, all requests raise GangError. `metrics`: where to report what the engine does: "ray",
        "prometheus", a port, "auto", or an exporter (`rowcast.cluster.metrics`); None: as ROWCAST_METRICS says, else nowhere.
        `draft_device`: of this process, such as "cuda:2", for a rung draft with at=driver. None or "auto": the first GPU that the
        ranks leave, else the CPU.
        """
        self._launcher = launcher
        self._limits = limits
        self._draft_device = draft_device
        self._calibration = arguments.get("calibration")
        self._end: weakref.finalize[Any, Any] | None = None
        super().__init__(model, **arguments)
        metrics = metrics or settings().metrics
        if metrics is not None:
            self._report_to(metrics)

    def shutdown(self) -> None:
        """End the ranks; they end with the process, or once the LLM is dropped, anyway. May be called twice; a single rank goes on."""
        if self._end is not None:
            self._end()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.shutdown()

    def _choose_launcher(self, *, on_gpu: bool) -> Launcher:
        """`on_gpu`: each rank takes a GPU."""
        from rowcast.cluster.launcher import choose_launcher

        return choose_launcher(self._launcher, on_gpu=on_gpu) if isinstance(self._launcher, str) else self._launcher

    def _check_ranks(self, tensor_parallel_size: int) -> None:
        if not isinstance(tensor_parallel_size, int) or isinstance(tensor_parallel_size, bool):
            raise UserError(f"tensor_parallel_size={tensor_parallel_size!r:.60} has to be a whole number")
        if not 1 <= tensor_parallel_size <= MAX_RANKS:
            raise UserError(f"tensor_parallel_size={tensor_parallel_size} has to be from 1 to {MAX_RANKS}")

    def _driver_draft(self, planned: Planned) -> DriverDraft | None:
        """What runs in this process of the ladder, if anything. Raises UserError."""
        if not any(rung.at == "driver" for rung in planned.ladder.lower):
            if self._draft_device is not None:
                raise UserError(
                    f"draft_device={self._draft_device!r:.60} is for a rung draft with at=driver, and the ladder "
                    f"{str(planned.ladder)!r:.80} has none; leave it out, or add at=driver"
                )
            return None
        from rowcast.cluster.drafting import DriverDraft

        world = planned.plan.world
        spare = planned.plan.device != "cpu" and torch.cuda.device_count() > world
        asked = None if self._draft_device == "auto" else self._draft_device
        device, _ = choose_device(asked or (f"cuda:{world}" if spare else "cpu"), "draft_device")
        return DriverDraft(planned, self.spec.vocab_size, self._rule, device)

    def _report_to(self, metrics: str | Exporter, replica: int = 0) -> None:
        from rowcast.cluster.executor import GangExecutor
        from rowcast.cluster.metrics import choose_exporter
        from rowcast.runtime.metrics import EngineMetrics

        memory = "host" if self.plan.device == "cpu" else "gpu"
        found = EngineMetrics(choose_exporter(metrics), memory=memory, replica=f"{replica}")
        self.engine.metrics = found
        if isinstance(self.engine._executor, GangExecutor):
            self.engine._executor.on_failure = found.rank_failure

    def _executor(self, planned: Planned, progress: bool | None, eager: bool) -> Executor:
        world = planned.plan.world
        if world == 1 and self._draft_device is not None:
            raise UserError(
                f"draft_device={self._draft_device!r:.60} is for several ranks, and there is one, which runs the draft, too; leave it "
                "out"
            )
        if world == 1 and self._one_rank_here:
            alone = super()._executor(planned, progress, eager)
            if folder := settings().trace:
                assert isinstance(alone, LocalExecutor)
                trace = Trace(folder, 0)
                alone.record(trace)
                self._end = weakref.finalize(self, trace.close)
            return alone
        from rowcast.cluster.executor import GangExecutor
        from rowcast.cluster.gang import Gang, Limits
        from rowcast.cluster.wire import Order

        path = self.checkpoint.path
        if self.checkpoint.format != "random":
            path = path.resolve()
        if self.checkpoint.format != "random" and not path.exists():
            raise UserError(f"tensor_parallel_size={world} needs a model on disk, which every rank opens: {path} is none")
        limits = self._limits or Limits()
        launcher = self._choose_launcher(on_gpu=planned.plan.device != "cpu")
        order = Order(
            world=world,
            model=str(path),
            plan=msgpack.packb(asdict(planned.plan)),
            calibration=None if self._calibration is None else str(Path(self._calibration).resolve()),
            eager=eager,
            threads=settings().threads or max(1, torch.get_num_threads() // world),
            timeout_s=limits.step_s,
        )

        def start() -> Gang:
            with LoadProgress(path.name, 0, progress) as bar:
                return Gang(launcher, order, limits, bar)

        executor = GangExecutor(start, limits, self._driver_draft(planned))
        self._end = weakref.finalize(self, executor.shutdown)
        return executor
