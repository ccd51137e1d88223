"""A bar on standard error while weights are placed."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn


class LoadProgress:
    """Shows bytes placed out of `total`, if `show` says so or, with None, if standard error is a terminal."""

    def __init__(self, name: str, total: int, show: bool | None) -> None:
        self._progress = Progress(
            TextColumn("loading {task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            console=Console(stderr=True),
            disable=not (sys.stderr.isatty() if show is None else show),
        )
        self._task = self._progress.add_task(name, total=total)

    def __enter__(self) -> LoadProgress:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def advance(self, count: int) -> None:
        """`count` more bytes are in place."""
        self._progress.update(self._task, advance=count)
