"""Who has which place in a view that holds a fixed number of sequences."""

from __future__ import annotations


class Slots:
    """Places 0 .. count - 1, lowest first."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count))
        self._taken: dict[int, int] = {}

    def __contains__(self, seq_id: int) -> bool:
        return seq_id in self._taken

    def __getitem__(self, seq_id: int) -> int:
        """A sequence's place. Raises KeyError where it has none."""
        return self._taken[seq_id]

    def take(self, seq_id: int) -> bool:
        """Whether the sequence has a place now. One that has it keeps it."""
        if seq_id not in self._taken:
            if not self._free:
                return False
            self._taken[seq_id] = self._free.pop(0)
        return True

    def give_back(self, seq_id: int) -> None:
        """Unknown ids are ignored."""
        if seq_id in self._taken:
            self._free.append(self._taken.pop(seq_id))
            self._free.sort()
