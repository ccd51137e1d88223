"""A bar on standard error while weights are placed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

Report = Callable[[int, int], None]
"""(bytes that were just placed, bytes in all)."""


class LoadProgress:
    """Shows bytes placed out of `total`, if `show` says so or, with None, if standard error is a terminal. Tells `report`, too."""

    def __init__(self, name: str, total: int, show: bool | None, report: Report | None = None) -> None:
        self._progress = Progress(
            TextColumn("loading {task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            console=Console(stderr=True),
            disable=not (sys.stderr.isatty() if show is None else show),
        )
        self._task = self._progress.add_task(name, total=total)
        self._total = total
        self._report = report

    def __enter__(self) -> LoadProgress:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def advance(self, count: int) -> None:
        """`count` more bytes are in place."""
        self._progress.update(self._task, advance=count)
        if self._report is not None:
            self._report(count, self._total)

    def expect(self, total: int) -> None:
        """It is `total` in all."""
        self._total = total
        self._progress.update(self._task, total=total)
