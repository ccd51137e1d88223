"""A bar on standard error while a model writes and learns; where that is no terminal, a line now and then."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

LINE_SECONDS = 30.0


class LearningProgress:
    """Counts tokens. `show` as in `LoadProgress`; with None a file or a pipe gets a line every half a minute, with False nothing."""

    def __init__(self, doing: str, total: int, show: bool | None) -> None:
        """`total`: tokens."""
        terminal = sys.stderr.isatty() if show is None else show
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not terminal,
        )
        self._lines = show is None and not terminal
        self._doing, self._said, self._total = doing, "", total
        self._task = self._progress.add_task(doing, total=total)
        self._done = self._new = 0
        self._begun = self._told = time.monotonic()

    def __enter__(self) -> LearningProgress:
        self._progress.start()
        self._begun = self._told = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()
        if self._lines and self._new:
            print(self._text(), file=sys.stderr, flush=True)

    def advance(self, tokens: int, *, new: bool = True) -> None:
        """So many more are done; not `new`: by an earlier part, which says nothing of speed."""
        self._done += tokens
        if new:
            self._new += tokens
        self._progress.update(self._task, advance=tokens, description=self._text())
        if self._lines and time.monotonic() - self._told > LINE_SECONDS:
            self._told = time.monotonic()
            print(self._text(), file=sys.stderr, flush=True)

    def say(self, what: str) -> None:
        """How it goes, shown with the next `advance`."""
        self._said = what

    @property
    def tokens_per_s(self) -> float:
        """Of the new ones."""
        return self._new / max(1e-9, time.monotonic() - self._begun)

    def _text(self) -> str:
        speed = self.tokens_per_s
        said = f", {self._said}" if self._said else ""
        return f"{self._doing}: {self._done / 1e6:.2f} of {self._total / 1e6:.2f} M tokens, {speed / 1e3:.1f} k tokens/s{said}"
