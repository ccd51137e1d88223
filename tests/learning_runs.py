"""What the tests of commands that train or round a copy share: parts that end, and processes."""

from __future__ import annotations

import multiprocessing.context
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rowcast.calibration.learning.job import How
from rowcast.calibration.learning.part import Part, Unfinished
from rowcast.cli import main

CPU = torch.device("cpu")
QUIET = How(device="cpu", show=False)
JOB = "rowcast.calibration.learning.job"

Run = Callable[..., dict[str, Any]]
"""(texts, output, held_out=...): one of the commands, with a model and settings."""


class Ends(Part):
    """A part that is over when it has been asked so many times."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    @property
    def over(self) -> bool:
        self.looks -= 1
        return self.looks < 0


def parts_of(looks: int, patch: pytest.MonkeyPatch) -> None:
    """From here on the commands' parts are over when they have been asked so many times."""
    patch.setattr(f"{JOB}.Part", lambda minutes: Ends(looks))


def sittings(run: Run, texts: Sequence[Path], output: Path, most: int = 60) -> int:
    """How many parts a command takes whose parts are over before they begin."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Part, "over", True)
        for count in range(1, most):
            try:
                run(texts, output)
            except Unfinished:
                assert not output.exists()
                continue
            return count
    raise AssertionError(f"not done after {most} parts")


def in_child(arguments: list[str], **environment: str) -> multiprocessing.context.ForkProcess:
    """The command in a process of its own, which has all imported already."""

    def run() -> None:
        os.environ.update(environment)
        os._exit(main(arguments))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def in_two(arguments: list[str]) -> list[multiprocessing.context.ForkProcess]:
    """The command in two processes that train together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    return [in_child(arguments, RANK=str(i), LOCAL_RANK=str(i), **place) for i in range(2)]


def ended(processes: Sequence[multiprocessing.context.ForkProcess], code: int = 0) -> None:
    """All of them end, with this code; one that does not is ended."""
    try:
        for process in processes:
            process.join(100)
        assert [process.exitcode for process in processes] == [code] * len(processes)
    finally:
        for process in processes:
            process.kill()
