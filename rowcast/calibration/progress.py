"""A bar on standard error while text runs through layers."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


class CalibrationProgress:
    """Counts tokens times layers; `show` as in `LoadProgress`."""

    def __init__(self, total: int, show: bool | None) -> None:
        self._progress = Progress(
            TextColumn("calibrating: {task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not (sys.stderr.isatty() if show is None else show),
        )
        self._task = self._progress.add_task("reading", total=total)

    def __enter__(self) -> CalibrationProgress:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def advance(self, count: int) -> None:
        """`count` more tokens are through one layer."""
        self._progress.update(self._task, advance=count)

    def say(self, doing: str) -> None:
        """What goes on."""
        self._progress.update(self._task, description=doing)
