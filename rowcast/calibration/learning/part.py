"""How a long command is cut: into parts of some minutes, by signals, over several processes."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor

from rowcast.errors import UserError

WAIT = timedelta(hours=2)
"""Most that processes wait for one another: while the leading one judges, the others have nothing to do."""


class Unfinished(Exception):
    """The command has saved what it has and stops; the same command goes on."""

    def __init__(self, by_signal: int | None) -> None:
        super().__init__("go on with the same command")
        self.by_signal = by_signal
        """None: its minutes are over."""
        self.saved = True
        """Whether there was anything to save yet."""


class World:
    """The processes that train together, started by `accelerate launch`; one, without it."""

    def __init__(self, device: str = "auto") -> None:
        """Joins them; `device`: as the user says. Raises UserError where accelerate is not installed."""
        self.rank, self.size = 0, 1
        self._state: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            try:
                from accelerate import PartialState  # type: ignore[import-untyped]
            except ImportError:
                raise UserError("several processes train by accelerate, which is not installed: pip install accelerate") from None
            self._state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=WAIT)
            self.rank, self.size = self._state.process_index, self._state.num_processes

    @property
    def leads(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    @property
    def device(self) -> torch.device | None:
        """This process's own; None: as the user says."""
        return None if self._state is None else torch.device(self._state.device)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Each becomes its mean over all processes, in place."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        torch.distributed.all_reduce(flat)
        flat /= self.size
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):  # type: ignore[no-untyped-call]
            tensor.copy_(mean.view_as(tensor))

    def agree(self, number: int, device: torch.device) -> int:
        """The leading process's number, on all."""
        if self.size == 1:
            return number
        told = torch.tensor([number], device=device)
        torch.distributed.broadcast(told, 0)
        return int(told)

    def stop_together(self, stopped: Unfinished | None, device: torch.device) -> None:
        """Raise Unfinished in all processes where the leading one has `stopped`: by the signal that came there."""
        code = 0 if stopped is None else 1 + (stopped.by_signal or 0)
        if told := self.agree(code, device):
            raise stopped or Unfinished(told - 1 or None)

    def check_shares(self, batch: int, accumulate: int) -> None:
        """Raise UserError for a batch that these processes, each in so many parts, do not share evenly: windows would weigh unequal."""
        if batch % (self.size * accumulate):
            raise UserError(
                f"--batch {batch} is not shared evenly by {self.size} processes with --accumulate {accumulate}: give a multiple of "
                f"{self.size * accumulate}"
            )

    def wait(self) -> None:
        """For all processes."""
        if self._state is not None:
            self._state.wait_for_everyone()


class Part:
    """One sitting of a command. As a context it takes SIGTERM and Ctrl-C, so that work ends where it can be saved."""

    def __init__(self, minutes: float | None = None) -> None:
        """None: until all is done. Raises UserError for no time at all."""
        if minutes is not None and minutes <= 0:
            raise UserError(f"--part-minutes {minutes:g} leaves no time: give a number above 0")
        self._end = None if minutes is None else time.monotonic() + 60 * minutes
        self._signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Part:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            raise KeyboardInterrupt  # asked twice: at once
        self._signal = number

    @property
    def over(self) -> bool:
        """Whether to save and stop."""
        return self._signal is not None or (self._end is not None and time.monotonic() >= self._end)

    @property
    def asked(self) -> bool:
        """Whether a signal came."""
        return self._signal is not None

    def stop(self) -> Unfinished:
        """What to raise, when all is saved."""
        return Unfinished(self._signal)
