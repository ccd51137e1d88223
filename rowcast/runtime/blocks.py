"""Who uses which block of KV memory, and what is known of its content. Torch-free."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Sequence


class BlockPool:
    """Blocks 0 .. total - 1, each with the number of its users. A block that is named by its content may have several, and who has
    none keeps its name: it is free, and can be found again, until it is handed out anew.

    Nameless blocks go first, lowest first, so that a sequence's blocks tend to be neighbours; then those that nobody has used for
    longest.
    """

    def __init__(self, total: int, *, each_use_counts: bool = False) -> None:
        """`each_use_counts`: there are no more uses than blocks either, as a pass has a copy of its blocks for each sequence."""
        self.total = total
        self._each_use_counts = each_use_counts
        self._uses = 0
        """Of all blocks."""
        self._blank = list(range(total))
        """A heap: without users and without a name."""
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Without users but named, the least recently used first."""
        self._users: dict[int, int] = {}
        """Blocks in use."""
        self._named: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}

    @property
    def free_blocks(self) -> int:
        """Blocks that `take` can give, named ones included."""
        return min(self.unused_blocks, self.total - self._uses) if self._each_use_counts else self.unused_blocks

    @property
    def unused_blocks(self) -> int:
        """Blocks without users."""
        return len(self._blank) + len(self._idle)

    @property
    def cached_blocks(self) -> int:
        """Blocks that can be found by name, in use or free."""
        return len(self._names)

    def fits(self, count: int, shared: Sequence[int]) -> bool:
        """Whether `count` blocks could be taken once `shared` are."""
        idle = sum(block not in self._users for block in shared)
        if self._each_use_counts and count + len(shared) > self.total - self._uses:
            return False
        return count <= self.unused_blocks - idle

    def take(self, count: int) -> list[int]:
        """`count` blocks for one user, ascending as far as they were never named. Precondition: that many are free."""
        assert count <= self.free_blocks, f"{count} blocks wanted, {self.free_blocks} free"
        blocks = [heapq.heappop(self._blank) for _ in range(min(count, len(self._blank)))]
        evicted = sorted(self._idle.popitem(last=False)[0] for _ in range(count - len(blocks)))
        for block in evicted:
            del self._named[self._names.pop(block)]
        blocks += evicted
        self._users.update(dict.fromkeys(blocks, 1))
        self._uses += count
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """One user more for each of them. Precondition: they are named."""
        for block in blocks:
            assert block in self._names, f"block {block} has no name to be found by"
            self._idle.pop(block, None)
            self._users[block] = self._users.get(block, 0) + 1
        self._uses += len(blocks)

    def give_back(self, blocks: list[int]) -> None:
        """One user fewer for each of them; empties the list. The last ones are forgotten first: without the first ones of a sequence
        they are of no use."""
        self._uses -= len(blocks)
        for block in reversed(blocks):
            users = self._users.pop(block) - 1
            if users:
                self._users[block] = users
            elif block in self._names:
                self._idle[block] = None
            else:
                heapq.heappush(self._blank, block)
        blocks.clear()

    def name(self, block: int, name: bytes) -> None:
        """The block's content is complete and will not change as long as the block is in use. Where another has the name already,
        that one keeps it."""
        assert block in self._users, f"block {block} is nobody's"
        if name not in self._named:
            assert block not in self._names, f"block {block} has another name"
            self._named[name], self._names[block] = block, name

    def find(self, name: bytes) -> int | None:
        """The block with this content."""
        return self._named.get(name)

    def name_of(self, block: int) -> bytes | None:
        return self._names.get(block)

    def users(self, block: int) -> int:
        """0 for a free one."""
        return self._users.get(block, 0)

    def forget_names(self) -> None:
        """The content of all blocks is void."""
        for block in self._idle:
            heapq.heappush(self._blank, block)
        self._idle.clear()
        self._named.clear()
        self._names.clear()

    def check(self) -> None:
        """Every block is blank, idle or in use, once, and names go both ways. For tests and idle moments."""
        blank, idle, used = set(self._blank), set(self._idle), set(self._users)
        assert len(blank) == len(self._blank) and not (blank & idle or blank & used or idle & used)
        assert blank | idle | used == set(range(self.total))
        assert all(users > 0 for users in self._users.values()) and sum(self._users.values()) == self._uses
        assert not self._each_use_counts or self._uses <= self.total
        assert {block: name for name, block in self._named.items()} == self._names
        assert idle <= set(self._names) and blank.isdisjoint(self._names)
