"""The environment variables, all of them. Torch-free.

What belongs to one model or one request is an argument of `LLM` or `SamplingParams`; a variable is for the machine. A variable
that begins with ROWCAST_ and is not listed here is refused: it is a misspelling that would otherwise go unnoticed.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, TypeVar

from rowcast.errors import UserError

PREFIX = "ROWCAST_"
LOG_LEVELS = ("debug", "info", "warning", "error")

T = TypeVar("T")


def _switch(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError("1 or 0")


def _level(text: str) -> str:
    if text.lower() not in LOG_LEVELS:
        raise ValueError("one of " + ", ".join(LOG_LEVELS))
    return text.lower()


def _threads(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 1024):
        raise ValueError("a whole number from 1 to 1024")
    return int(text)


def _folder(text: str) -> str:
    if not text:
        raise ValueError("the path of a folder")
    return text


def _metrics(text: str) -> str:
    if text in ("auto", "ray", "prometheus") or (text.isascii() and text.isdigit() and 1 <= int(text) <= 65535):
        return text
    raise ValueError("auto, ray, prometheus or a port")


def _setting(default: T, parse: Callable[[str], T], doc: str) -> T:
    """`parse` raises ValueError with what it expects."""
    return field(default=default, metadata={"parse": parse, "doc": doc})


@dataclass(frozen=True, slots=True)
class Settings:
    """One field a variable: `cpu_pack` is ROWCAST_CPU_PACK."""

    cache: str | None = _setting(
        None, _folder, "Folder for what was measured of this machine; unset: rowcast in $XDG_CACHE_HOME or ~/.cache."
    )
    cpu_pack: bool = _setting(True, _switch, "1: repack CPU weights for oneDNN while loading; 0: use torch's plain linear.")
    cpu_as_gpu: bool = _setting(
        False, _switch, "1: without a GPU, --gpu-memory is that of one which the CPU stands in for: a trial of offloading plans."
    )
    cpu_native: bool = _setting(
        True, _switch, "1: use the C++ kernels for a few tokens where they were built; 0: torch's products."
    )
    gpu_kernels: bool = _setting(True, _switch, "1: use the Triton kernels on a GPU; 0: torch's products and attention.")
    gpu_one_shot: bool = _setting(
        True, _switch, "1: GPUs that reach each other's memory sum small messages in one kernel; 0: by NCCL."
    )
    gpu_overlap: bool = _setting(True, _switch, "1: a GPU starts a kernel while the one before it ends; 0: one after another.")
    gpu_rounds: bool = _setting(
        True, _switch, "1: whole rounds of a ladder run on a GPU, where they can; 0: the host drives every pass."
    )
    log: str = _setting("warning", _level, "Least severe messages shown on standard error: debug, info, warning or error.")
    metrics: str | None = _setting(
        None,
        _metrics,
        "Where metrics go: ray, prometheus, a port that serves them, too, or auto, ray in a Ray job; unset: nowhere.",
    )
    threads: int | None = _setting(None, _threads, "CPU threads of torch; unset: torch's own choice.")
    trace: str | None = _setting(
        None, _folder, "Folder for a timeline of each rank, commands and passes, as Chrome's tracing reads it; unset: none."
    )


@dataclass(frozen=True, slots=True)
class Variable:
    """One row of the registry, for printing."""

    name: str
    value: object
    default: object
    doc: str


def settings(environ: Mapping[str, str] = os.environ) -> Settings:
    """The settings as `environ` has them now; nothing is remembered.

    Raises UserError for a malformed value and for an unknown variable that starts with ROWCAST_.
    """
    known = {PREFIX + f.name.upper(): f for f in fields(Settings)}
    values: dict[str, Any] = {}
    for name in sorted(environ):
        if not name.startswith(PREFIX):
            continue
        if name not in known:
            near = get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise UserError(f"the environment variable {name} is unknown, did you mean {near}? (all: {', '.join(known)})")
        try:
            values[known[name].name] = known[name].metadata["parse"](environ[name].strip())
        except ValueError as expected:
            raise UserError(f"the environment variable {name} is {environ[name]!r}, it must be {expected}") from None
    return Settings(**values)


def describe(values: Settings) -> list[Variable]:
    """All variables with their values, in the order of the registry."""
    return [Variable(PREFIX + f.name.upper(), getattr(values, f.name), f.default, f.metadata["doc"]) for f in fields(Settings)]


class _StandardError(logging.Handler):
    """Writes to what sys.stderr is at the time of the message."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def configure_logging() -> None:
    """Let the logger "rowcast" say what ROWCAST_LOG asks for, on standard error. May be called again; other loggers stay as they are.

    An application that gave this logger a handler keeps it as it is; with handlers of the root logger only, those get the messages.
    """
    logger = logging.getLogger("rowcast")
    if any(not isinstance(handler, _StandardError) for handler in logger.handlers):
        return
    logger.setLevel(settings().log.upper())
    if not logger.hasHandlers():
        handler = _StandardError()
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)
