"""A GPU's memory as a hard ceiling by the driver's count, so that a large card stands in for a small one.

torch's allocator can be held to a limit. What a process takes beside it, its context, libraries, kernels and captured graphs, cannot:
it is counted, and the allocator gets what it leaves.
"""

from __future__ import annotations

import gc
import logging
from weakref import WeakSet, finalize

import torch

from rowcast.errors import OutOfMemoryError
from rowcast.placement import process_memory
from rowcast.placement.constants import Constants
from rowcast.placement.here import joined_by_nvlink
from rowcast.placement.plan import Plan
from rowcast.placement.process_memory import OwnBytes
from rowcast.placement.units import format_bytes

log = logging.getLogger("rowcast")

LATER_BYTES = 256 << 20
"""Kernels, libraries and graphs that come after a context, when a plan is made: 250 MiB, measured on an H100 (its context: 518)."""

_STEPS = 64
"""Between two counts, which take .06 ms each."""

_MOST_OUTSIDE_BYTES = 4 << 30
"""Where the driver tells no processes apart and the card holds more than so much beside this one's tensors, others are on it."""


def first_look() -> None:
    """Note what the cards hold before this process uses any; nothing where it does already, or where there is no GPU."""
    if torch.cuda.is_available() and not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        process_memory.first_look()


def outside_bytes(device: torch.device, world: int) -> int:
    """What one of `world` ranks will take of such a GPU beside tensors: for plans."""
    counted = _counted(device)
    there = 0 if counted is None else counted.bytes - torch.cuda.memory_reserved(device) + LATER_BYTES
    return _assumed_bytes(world) + max(0, there - Constants().context_bytes)


def peak_bytes(device: torch.device) -> OwnBytes | None:
    """The most that this process took of a GPU, by the driver's count; None where that cannot be told.

    The driver keeps no peak. What lies beside tensors only grows, so that its size now and the most of the allocator's make one.
    """
    counted = _counted(device)
    if counted is None:
        return None
    most = counted.bytes - torch.cuda.memory_reserved(device) + torch.cuda.max_memory_reserved(device)
    return OwnBytes(most, counted.whole_card)


_models: WeakSet[Ceiling] = WeakSet()
"""Of this process, those that are there: the allocator's limit is one for all of them."""


class Ceiling:
    """Holds this process to a plan's memory, beyond what it held before. On a CPU nothing is held.

    Several models of a process have their ceilings' sum: none is held to less because another came later, or had a lower one. When the
    last one is gone, the allocator has the card to itself: a limit that somebody else had set is not put back.
    """

    def __init__(self, device: torch.device, plan: Plan) -> None:
        """Limits the allocator. Raises OutOfMemoryError where the ceiling leaves less than the plan takes."""
        self._device = device
        self._bytes = ceiling_bytes(plan)
        self._world = plan.world
        self._assumed = 0
        """Beside tensors, once it had to be."""
        self._steps = 0
        self._told = False
        self._lift = finalize(self, _lift, device)
        self._lift.atexit = False
        if device.type != "cuda":
            return
        if self._bytes is not None:
            process_memory.stay_open()
        gc.collect()  # an earlier model that nobody has any more
        torch.cuda.empty_cache()  # what it has left counts otherwise
        others = self._together()
        self._before: int = others[0]._before if others else torch.cuda.memory_reserved(device)
        """What is no model's: as the allocator holds it, whose pieces of memory are larger than what lies in them."""
        self._budget_bytes = plan.budget_bytes
        needed = plan.budget_bytes - plan.margin_bytes
        outside = 0 if self._bytes is None else self._outside()
        if self._bytes is not None and outside + needed > self._bytes:
            left, beside = format_bytes(max(0, self._bytes - outside)), format_bytes(outside)
            raise OutOfMemoryError(
                f"gpu_memory={format_bytes(self._bytes)} leaves {left} beside the {beside} that the GPU's context and libraries take, "
                f"but the plan needs {format_bytes(needed)}: ask for more, or make the plan again"
            )
        _models.add(self)
        self._limit(outside)

    def check(self) -> None:
        """Count, and give the allocator what the ceiling leaves it. Raises OutOfMemoryError where it has taken more already."""
        if self._device.type != "cuda" or self._bytes is None:
            return
        outside = self._outside()
        limit = self._limit(outside)
        if torch.cuda.memory_reserved(self._device) > limit:
            torch.cuda.empty_cache()
        reserved = torch.cuda.memory_reserved(self._device)
        if reserved > limit:
            taken, allowed = format_bytes(outside + reserved - self._before), sum(each._bytes or 0 for each in self._together())
            raise OutOfMemoryError(
                f"this process takes {taken} of {self._device} by the driver's count, {format_bytes(outside)} of it for context, "
                f"libraries and graphs, more than gpu_memory={format_bytes(allowed)}: ask for more, or lower max_model_len"
            )

    def end(self) -> None:
        """The model is not there: nothing is allowed for it any more, whoever still holds this."""
        _models.discard(self)
        self._lift()

    def stepped(self) -> None:
        """A step is over. `check` after the first, second, fourth, ... and every `_STEPS`: what lies beside tensors comes when kernels
        are first used, most of it early."""
        self._steps += 1
        if self._steps & (self._steps - 1) == 0 or self._steps % _STEPS == 0:
            self.check()

    def _outside(self) -> int:
        """What this process takes beside tensors, as far as it can be told."""
        counted = _counted(self._device)
        if counted is not None:
            return counted.bytes - torch.cuda.memory_reserved(self._device)
        assumed = self._assumed = self._assumed or _assumed_bytes(self._world)
        if not self._told:
            self._told = True
            log.warning(
                "the driver does not tell what this process takes of %s: beside tensors %s are assumed",
                self._device,
                format_bytes(assumed),
            )
        return assumed

    def _together(self) -> list[Ceiling]:
        """Those of this device."""
        return [each for each in _models if each._device == self._device]

    def _limit(self, outside: int) -> int:
        """Set the allocator's limit; in bytes."""
        models = self._together()
        most = budgets = sum(each._budget_bytes for each in models)
        if any(each._bytes is not None for each in models):
            most = sum(each._budget_bytes if each._bytes is None else each._bytes for each in models) - outside
        most = self._before + max(0, min(budgets, most))
        torch.cuda.set_per_process_memory_fraction(min(1.0, most / _total(self._device)), self._device)
        return most


def _lift(device: torch.device) -> None:
    """A model is gone: with the last one of a card the allocator has it to itself again."""
    if device.type == "cuda" and not any(each._device == device for each in _models):
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def ceiling_bytes(plan: Plan) -> int | None:
    """What a plan lets a process take of its GPU, context and libraries included; None: nobody asked for a limit."""
    if plan.device == "cpu":
        return None
    if plan.ceiling_bytes or plan.forecast is None:
        return plan.ceiling_bytes or None
    return max((each.budget_bytes for each in plan.forecast.memory if each.card != "host"), default=None)


def _assumed_bytes(world: int) -> int:
    """What plans assume of one of so many ranks beside tensors and graphs."""
    return Constants().outside_bytes(world, nvlink_peers=world - 1 if world > 1 and joined_by_nvlink() else 0)


def _counted(device: torch.device) -> OwnBytes | None:
    reserved = torch.cuda.memory_reserved(device)
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    counted = None if uuid is None else process_memory.own_bytes(str(uuid), reserved)
    if counted is not None and counted.whole_card and counted.bytes - reserved > _MOST_OUTSIDE_BYTES:
        return None
    return counted


def _total(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).total_memory)
