"""What the verbs that train share: a part that is over, and options."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from rowcast.cli.output import print_json

PartMinutes = Annotated[
    float | None,
    typer.Option("--part-minutes", help="Save and stop after so many minutes; the same command goes on."),
]
SaveSeconds = Annotated[float, typer.Option("--save-seconds", help="Between savings of the training's state.")]
Texts = Annotated[list[Path], typer.Option("--text", help="A text file to learn from; repeatable.")]
HeldOut = Annotated[
    list[Path] | None,
    typer.Option("--held-out", help="A text file to judge by only; left out: the end of each text. Repeatable."),
]


def run_part(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `run` returns, in the process that leads; others end here.

    Where it is unfinished, say so, print `{"finished": false}` and end: with code 0 where the part is over, 130 after Ctrl-C,
    143 after SIGTERM.
    """
    from rowcast.calibration.learning.part import Unfinished

    try:
        found = run()
    except Unfinished as stopped:
        if _leads():
            print("rowcast: saved; go on with the same command, without --restart", file=sys.stderr)
            print_json({"finished": False})
        raise typer.Exit(0 if stopped.by_signal is None else 128 + stopped.by_signal) from None
    if not _leads():
        raise typer.Exit
    return found


def _leads() -> bool:
    """Whether this is the only process, or the first of those that train together."""
    return os.environ.get("RANK", "0") == "0"
