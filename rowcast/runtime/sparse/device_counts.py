"""What passes of a device's own rounds read, counted where it happens: replays of a captured pass count, too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rowcast.runtime.protocols import SUMS, Reads


class DeviceCounts:
    """Sums of `Reads` on a device. What is known beforehand is one addition a pass, and so is each kind of what is not."""

    def __init__(self, device: torch.device, layers: int) -> None:
        size = len(SUMS) + 2 * layers
        self._layers = layers
        self._total = torch.zeros(size, dtype=torch.int64, device=device)
        """As `Reads.numbers`."""
        self._on_host = torch.zeros(size, dtype=torch.int64, pin_memory=device.type == "cuda")
        """As `send` copied it."""
        self._seen = [0] * size
        self._known: dict[tuple[int, ...], Tensor] = {}
        """What passes add that is known, by its numbers: a pass that is captured has run before."""
        self._varying: dict[tuple[str, int], list[Tensor]] = {}
        self._neurons: dict[int, Tensor] = {}
        """By layer: those of the pass that are not known."""
        self._at: dict[tuple[int, ...], Tensor] = {}
        """Where the neurons of such layers are counted."""
        self.pass_reads = Reads()
        """What the pass reads whatever it chooses."""

    def add(self, name: str, count: Tensor, each: int = 1) -> None:
        """The pass counts `each` for each of `count`, a whole number on the device."""
        self._varying.setdefault((name, each), []).append(count)

    def add_neurons(self, layer: int, count: Tensor) -> None:
        """Those that the pass's tokens use of a layer, a whole number on the device."""
        self.add("neurons", count)
        self._neurons[layer] = count

    def begin(self) -> None:
        self.pass_reads = Reads()
        self._varying.clear()
        self._neurons.clear()

    def end(self) -> None:
        """The pass is over."""
        numbers = tuple(self.pass_reads.numbers(self._layers))
        known = self._known.get(numbers)
        if known is None:
            known = self._known[numbers] = torch.tensor(numbers, device=self._total.device)
        self._total.add_(known)
        for (name, each), counts in self._varying.items():
            self._total[SUMS.index(name)].add_(_sum(counts), alpha=each)
        self._varying.clear()
        if self._neurons:
            layers = tuple(self._neurons)
            at = self._at.get(layers)
            if at is None:
                at = self._at[layers] = torch.tensor([len(SUMS) + layer for layer in layers], device=self._total.device)
            self._total.index_add_(0, at, torch.cat([count.view(1) for count in self._neurons.values()]).to(torch.int64))
            self._neurons.clear()

    def send(self) -> None:
        """Copy what is counted so far to the host, for `read`. Passes that are launched from here on come to the next one."""
        self._on_host.copy_(self._total, non_blocking=True)

    def read(self) -> Reads:
        """What was counted between the last two `send`s that were read. Precondition: the last copy is over."""
        total = self._on_host.tolist()
        found = Reads.of([now - before for now, before in zip(total, self._seen, strict=True)], self._layers)
        self._seen = total
        return found


def _sum(counts: Sequence[Tensor]) -> Tensor:
    return torch.cat([count.view(1) for count in counts]).sum()
