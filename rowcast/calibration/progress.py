"""A bar on standard error while text runs through layers; where that is no terminal, a line now and then."""

from __future__ import annotations

import sys
import time
from threading import Event, Thread
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from rowcast.calibration.learning.progress import LINE_SECONDS


class CalibrationProgress:
    """Counts tokens times layers. `show` as in `LoadProgress`; with None a file or a pipe gets a line every half a minute."""

    def __init__(self, total: int, show: bool | None, doing: str = "calibrating") -> None:
        terminal = sys.stderr.isatty() if show is None else show
        self._progress = Progress(
            TextColumn(doing + ": {task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not terminal,
        )
        self._doing, self._said, self._total, self._done = doing, "reading", total, 0
        self._task = self._progress.add_task(self._said, total=total)
        self._begun: tuple[float, int] | None = None
        """When something was said for the first time, and what was done by then: by an earlier run."""
        self._marked = 0.0, 0
        """Likewise, the last time."""
        self._ended = Event()
        self._teller = Thread(target=self._tell, daemon=True) if show is None and not terminal else None

    def __enter__(self) -> CalibrationProgress:
        self._progress.start()
        if self._teller is not None:
            self._teller.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        if self._teller is not None:
            self._teller.join()
        self._progress.stop()

    def advance(self, count: int) -> None:
        """`count` more tokens are through one layer."""
        self._done += count
        self._progress.update(self._task, advance=count)

    def say(self, doing: str) -> None:
        """What goes on. What was counted before is over, fits and all: what is left is foretold by that."""
        self._said, self._marked = doing, (time.monotonic(), self._done)
        self._begun = self._begun or self._marked
        self._progress.update(self._task, description=doing)

    def _tell(self) -> None:
        while not self._ended.wait(LINE_SECONDS):
            print(self._line(), file=sys.stderr, flush=True)

    def _line(self) -> str:
        """Such as "calibrating: layer 4 of 30, 12%, about 9.5 min left"."""
        line = f"{self._doing}: {self._said}, {self._done / max(1, self._total):.0%}"
        (begun, before), (marked, done) = self._begun or self._marked, self._marked
        if not before < done < self._total:
            return line
        left = (marked - begun) / (done - before) * (self._total - done) - (time.monotonic() - marked)
        return f"{line}, about {max(0.0, left) / 60:.1f} min left"
