"""Who owns which block of KV memory. Torch-free."""

from __future__ import annotations

import heapq


class BlockPool:
    """Blocks 0 .. total - 1, handed out lowest first, so that a sequence's blocks tend to be neighbours."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total))
        self._taken: set[int] = set()

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` blocks. Precondition: that many are free."""
        assert count <= len(self._free), f"{count} blocks wanted, {len(self._free)} free"
        blocks = [heapq.heappop(self._free) for _ in range(count)]
        self._taken.update(blocks)
        return blocks

    def give_back(self, blocks: list[int]) -> None:
        """Return blocks and empty the list."""
        for block in blocks:
            self._taken.remove(block)
            heapq.heappush(self._free, block)
        blocks.clear()

    def check(self) -> None:
        """Every block is either free or taken, once. For tests and idle moments."""
        assert len(self._free) == len(set(self._free)) and self._taken.isdisjoint(self._free)
        assert len(self._free) + len(self._taken) == self.total
