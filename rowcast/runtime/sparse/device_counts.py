"""What passes of a device's own rounds read, counted where it happens: replays of a captured pass count, too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, fields

import torch
from torch import Tensor

from rowcast.runtime.protocols import Reads

_NAMES = [field.name for field in fields(Reads)]


class DeviceCounts:
    """Sums of `Reads` on a device. What is known beforehand is one addition a pass, and so is each kind of what is not."""

    def __init__(self, device: torch.device) -> None:
        self._total = torch.zeros(len(_NAMES), dtype=torch.int64, device=device)
        self._on_host = torch.zeros(len(_NAMES), dtype=torch.int64, pin_memory=device.type == "cuda")
        """What a pass leaves at its end."""
        self._seen = [0] * len(_NAMES)
        self._known: dict[tuple[int, ...], Tensor] = {}
        """What passes add that is known, by its numbers: a pass that is captured has run before."""
        self._varying: dict[tuple[str, int], list[Tensor]] = {}
        self.pass_reads = Reads()
        """What the pass reads whatever it chooses."""

    def add(self, name: str, count: Tensor, each: int = 1) -> None:
        """The pass counts `each` for each of `count`, a whole number on the device."""
        self._varying.setdefault((name, each), []).append(count)

    def begin(self) -> None:
        self.pass_reads = Reads()
        self._varying.clear()

    def end(self) -> None:
        """The pass is over."""
        numbers = astuple(self.pass_reads)
        known = self._known.get(numbers)
        if known is None:
            known = self._known[numbers] = torch.tensor(numbers, device=self._total.device)
        self._total.add_(known)
        for (name, each), counts in self._varying.items():
            self._total[_NAMES.index(name)].add_(_sum(counts), alpha=each)
        self._varying.clear()
        self._on_host.copy_(self._total, non_blocking=True)

    def read(self) -> Reads:
        """What was counted since the last call. Precondition: the passes are over."""
        total = self._on_host.tolist()
        found = Reads(*(now - before for now, before in zip(total, self._seen, strict=True)))
        self._seen = total
        return found


def _sum(counts: Sequence[Tensor]) -> Tensor:
    return torch.cat([count.view(1) for count in counts]).sum()
