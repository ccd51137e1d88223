"""A bar on standard error while a model writes and learns; where that is no terminal, a line now and then."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)

LINE_SECONDS = 30.0
FORETELL_SECONDS = 10.0
"""By which the speed says how long all of it takes: the first steps are slower than others."""
LONG_SECONDS = 3600.0
"""What takes longer is foretold."""


def amount(count: float) -> str:
    """A number of tokens in the unit of its size: 512, 65.5 k, 20.02 M."""
    if count < 1e3:
        return f"{count:.0f}"
    return f"{count / 1e3:.1f} k" if count < 1e6 else f"{count / 1e6:.2f} M"


def rate(tokens_per_s: float) -> str:
    """Tokens a second in the unit of their size: 8.5, 1.2 k, 3.4 M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if tokens_per_s >= size:
            return f"{tokens_per_s / size:.1f} {unit}"
    return f"{tokens_per_s:.1f}"


class LearningProgress:
    """Counts tokens. `show` as in `LoadProgress`; with None a file or a pipe gets a line every half a minute, with False nothing."""

    def __init__(self, doing: str, total: int, show: bool | None, *, lower: str = "") -> None:
        """`total`: tokens. `lower`: options that make them fewer, which a warning names, once, where they take more than an hour."""
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
        self._doing, self._said, self._total, self._lower = doing, "", total, lower
        self._task = self._progress.add_task(doing, total=total)
        self._done = self._new = self._printed = 0
        self._begun = self._told = time.monotonic()

    def __enter__(self) -> LearningProgress:
        self._progress.start()
        self._begun = self._told = time.monotonic()
        self.tell(f"{self._doing}: {amount(self._total)} tokens", terminal=False)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()
        if self._new and self._printed != self._done:
            self.tell(self._text(), terminal=False)

    def advance(self, tokens: int, *, new: bool = True) -> None:
        """So many more are done, or with a number below 0 fewer; not `new`: by an earlier part, which says nothing of speed."""
        self._done += tokens
        if new:
            self._new += tokens
        self._progress.update(self._task, advance=tokens, description=self._text())
        if self._lines and time.monotonic() - self._told > LINE_SECONDS:
            self._told, self._printed = time.monotonic(), self._done
            self.tell(self._text(), terminal=False)
        if self._lower and self._new > 0 and time.monotonic() - self._begun > FORETELL_SECONDS:
            self._foretell()

    def tell(self, line: str, *, terminal: bool = True) -> None:
        """A line of its own, where anything is shown; on a terminal above the bar, or not."""
        if self._lines:
            print(line, file=sys.stderr, flush=True)
        elif terminal and not self._progress.disable:
            self._progress.console.print(line, markup=False, highlight=False)

    def say(self, what: str) -> None:
        """How it goes, shown with the next `advance`."""
        self._said = what

    @property
    def tokens_per_s(self) -> float:
        """Of the new ones."""
        return self._new / max(1e-9, time.monotonic() - self._begun)

    def _text(self) -> str:
        said = f", {self._said}" if self._said else ""
        return f"{self._doing}: {amount(self._done)} of {amount(self._total)} tokens, {rate(self.tokens_per_s)} tokens/s{said}"

    def _foretell(self) -> None:
        lower, self._lower = self._lower, ""
        if (seconds := (self._total - self._done + self._new) / self.tokens_per_s) > LONG_SECONDS:
            log.warning(
                "%s takes about %.1f hours at %s tokens/s: lower %s", self._doing, seconds / 3600, rate(self.tokens_per_s), lower
            )
