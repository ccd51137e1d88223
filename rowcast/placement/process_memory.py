"""What this process takes of a GPU by the driver's count: context, libraries and graphs as well as tensors. Torch-free.

Where the driver names processes, by this one's entry. In a container it may name them by the host's ids, or name none: then this
process is the one that came since the first look, or what the whole card holds more since then, if nobody else is named.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from rowcast.placement import nvml
from rowcast.placement.nvml import CardMemory


@dataclass(frozen=True, slots=True)
class OwnBytes:
    """What was counted."""

    bytes: int
    whole_card: bool
    """The driver tells no processes apart: what the card holds more than before this process used it."""


_before: dict[str, CardMemory] = {}
"""By card: what was there before this process used any."""


_open = ExitStack()
"""The driver's library, once it is used: to load it takes a second, to ask it less than a millisecond."""


def stay_open() -> None:
    """From now on `own_bytes` is fast."""
    _open.enter_context(nvml.kept_open())


def first_look() -> None:
    """Note what all cards hold. Precondition: this process has not used any. Later calls change nothing."""
    if _before:
        return
    stay_open()
    driver = nvml.read()
    for gpu in () if driver is None else driver.gpus:
        held = nvml.card_memory(gpu.uuid)
        if held is not None:
            _before[gpu.uuid.removeprefix("GPU-")] = held


def own_bytes(uuid: str, least: int) -> OwnBytes | None:
    """What this process takes of the card with this id now; None where that cannot be told. `least`: what it takes for certain."""
    now = nvml.card_memory(uuid)
    return None if now is None else _own(_before.get(uuid.removeprefix("GPU-")), now, os.getpid(), least)


def _own(before: CardMemory | None, now: CardMemory, pid: int, least: int) -> OwnBytes | None:
    mine = now.processes.get(pid)
    if mine is not None and mine >= least:  # else another process has this id outside the container
        return OwnBytes(mine, whole_card=False)
    if before is None:
        return None
    new = _new(before.processes, now.processes)
    if len(new) == 1 and (mine := now.processes[new[0]]) is not None and mine >= least:
        return OwnBytes(mine, whole_card=False)
    if before.processes or len(now.processes) > 1:
        return None
    more = now.used_bytes - before.used_bytes
    return OwnBytes(more, whole_card=True) if more >= least else None


def _new(before: Mapping[int, int | None], now: Mapping[int, int | None]) -> list[int]:
    return [pid for pid in now if pid not in before]
