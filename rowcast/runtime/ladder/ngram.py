"""The rung that looks the context up: what followed the last tokens when they stood there before. Torch-free.

Prompt lookup decoding (Saxena, 2023) and LLMA (arXiv 2304.04487), with the longest match instead of a fixed length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rowcast.runtime.ladder.path import Path

MIN_MATCH = 2
MAX_MATCH = 16
_KEY_LENGTHS = (6, MIN_MATCH)
"""Tokens in the keys of the two indexes: the long one finds an old long match whose last two tokens often stood since."""
_CANDIDATES = 32
"""Most earlier places looked at in one index, newest first."""


class NgramLookup:
    """Implements `Lookup`. Indexes each sequence's committed tokens as they come, in O(1) time and memory a token."""

    def __init__(self, name: str = "ngram") -> None:
        self.name = name
        self._indexes: dict[int, tuple[_Index, ...]] = {}

    @property
    def seq_ids(self) -> set[int]:
        return set(self._indexes)

    def admit(self, path: Path, room: int) -> bool:
        return True

    def propose(self, path: Path, count: int) -> list[int]:
        """The `count` tokens behind the newest of the longest matches. A match so near that they run into the end of the path goes on
        periodically, and is taken only if no other is as long."""
        end, _ = self._match(path, count)
        if not end:
            return []
        found = path.ids[end : end + count]
        period = len(path.ids) - end
        while len(found) < count:
            found += found[len(found) - period :][: count - len(found)]
        return found

    def match_length(self, path: Path) -> int:
        """How many last tokens of the path stood in its committed part before, at most `MAX_MATCH`; 0 where fewer than `MIN_MATCH`."""
        return self._match(path, 1)[1]

    def truncate(self, seq_id: int, length: int) -> None:
        """Nothing to drop: only committed tokens are indexed."""

    def commit(self, seq_id: int, length: int) -> None:
        """Nothing to keep: tokens are indexed when they are next looked for."""

    def free(self, seq_id: int) -> None:
        self._indexes.pop(seq_id, None)

    def _match(self, path: Path, count: int) -> tuple[int, int]:
        """Where the best match ends, and its length; (0, 0) where there is none."""
        indexes = self._indexes.get(path.seq_id)
        if indexes is None:
            indexes = self._indexes[path.seq_id] = tuple(map(_Index, _KEY_LENGTHS))
        ids = path.ids
        best_end, best_length, best_whole = 0, 0, False
        for index in indexes:
            index.grow(ids, path.committed)
            for end in index.ends(ids):
                whole = end + count <= len(ids)
                # One token of the length to beat rules most places out.
                reach = max(1, best_length + (best_whole or not whole))
                if reach > min(MAX_MATCH, end) or ids[end - reach] != ids[-reach]:
                    continue
                length = _common(ids, end)
                if (length, whole) > (best_length, best_whole):
                    best_end, best_length, best_whole = end, length, whole
            if best_length:
                break
        return best_end, best_length


class _Index:
    """Where each run of `size` tokens ends, newest place first: a table of newest places, and for each place the one before it."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._newest: dict[tuple[int, ...], int] = {}
        self._before: list[int] = [0] * size  # by place

    def grow(self, ids: Sequence[int], committed: int) -> None:
        """Add the runs that end before the last committed token: the path's own end is no earlier place."""
        newest, before, size = self._newest, self._before, self._size
        for end in range(len(before), committed):
            key = tuple(ids[end - size : end])
            before.append(newest.get(key, 0))
            newest[key] = end

    def ends(self, ids: Sequence[int]) -> Iterator[int]:
        """Places where the last `size` tokens of `ids` stood before."""
        end = self._newest.get(tuple(ids[-self._size :]), 0)
        for _ in range(_CANDIDATES):
            if not end:
                return
            yield end
            end = self._before[end]


def _common(ids: Sequence[int], end: int) -> int:
    """How many tokens before `end` equal the last ones of `ids`, at most `MAX_MATCH`."""
    length = 0
    while length < min(MAX_MATCH, end) and ids[end - 1 - length] == ids[-1 - length]:
        length += 1
    return length
