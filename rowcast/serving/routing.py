"""Which replica runs a request: the one with the fewest, unless another one has the prompt's beginning in its cache. Torch-free."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

_TOKENS = 64
_CHARACTERS = 256
"""Steps in which beginnings are compared: of token ids, of text."""
_STEPS = 32
"""Longer beginnings count as this many."""
_KEPT = 8192
"""Beginnings that are remembered, the least recently used ones forgotten first."""
_BUSIER = 4
"""Requests that a replica may have more than the least busy one and be chosen for its cache still."""


class Router:
    """Remembers who ran which beginnings of prompts. It knows nothing of replicas but their numbers."""

    def __init__(self) -> None:
        self._ran: OrderedDict[int, int] = OrderedDict()
        """The last replica by the beginning's hash."""

    def choose(self, prompt: str | list[int], loads: Mapping[int, int]) -> int:
        """One of `loads`, requests by replica; the prompt counts as run there. Precondition: there is one."""
        beginnings = _beginnings(prompt)
        least = min(loads, key=lambda number: (loads[number], number))
        chosen = least
        for beginning in reversed(beginnings):
            number = self._ran.get(beginning, -1)
            if number in loads and loads[number] <= loads[least] + _BUSIER:
                chosen = number
                break
        for beginning in beginnings:
            self._ran[beginning] = chosen
            self._ran.move_to_end(beginning)
        while len(self._ran) > _KEPT:
            self._ran.popitem(last=False)
        return chosen

    def forget(self, number: int) -> None:
        """That replica's cache is gone."""
        for beginning in [beginning for beginning, ran in self._ran.items() if ran == number]:
            del self._ran[beginning]


def _beginnings(prompt: str | list[int]) -> list[int]:
    """Hashes of its beginnings, the shortest first."""
    step = _CHARACTERS if isinstance(prompt, str) else _TOKENS
    found: list[int] = []
    before = 0
    for end in range(step, min(len(prompt), step * _STEPS) + 1, step):
        part = prompt[end - step : end]
        before = hash((before, part if isinstance(part, str) else tuple(part)))
        found.append(before)
    return found
