"""The n-gram rung against a search through all earlier places."""

from __future__ import annotations

import random
import time

from rowcast.runtime.ladder.ngram import MAX_MATCH, MIN_MATCH, NgramLookup
from rowcast.runtime.ladder.path import Path
from rowcast.runtime.ladder.runner import Lookup


def path(ids: list[int], committed: int | None = None) -> Path:
    return Path(0, ids, len(ids) if committed is None else committed, [], 1)


def common(ids: list[int], end: int) -> int:
    length = 0
    while length < min(end, MAX_MATCH) and ids[end - 1 - length] == ids[-1 - length]:
        length += 1
    return length


def searched(ids: list[int], committed: int, count: int) -> list[int]:
    """Every place looked at: the longest match, then one that is followed by `count` tokens, then the newest."""
    places = [(common(ids, end), end + count <= len(ids), end) for end in range(1, committed)]
    length, _, end = max(places, default=(0, False, 0))
    if length < MIN_MATCH:
        return []
    following = ids[end:]
    return (following * count)[:count]


def test_the_longest_match_wins() -> None:
    lookup = NgramLookup()
    assert isinstance(lookup, Lookup)
    ids = [1, 2, 3, 7, 9, 2, 3, 8, 1, 2, 3]
    assert lookup.propose(path(ids), 2) == [7, 9]
    assert lookup.match_length(path(ids)) == 3


def test_a_copy_may_run_into_itself() -> None:
    lookup = NgramLookup()
    assert lookup.propose(path([9, 1, 2, 3, 1, 2]), 7) == [3, 1, 2, 3, 1, 2, 3]
    assert lookup.propose(Path(1, [4, 4, 4], 3, [], 1), 3) == [4, 4, 4]


def test_it_knows_nothing_of_what_is_new() -> None:
    lookup = NgramLookup()
    for ids in ([1], [1, 2], [1, 2, 3, 4, 5]):
        lookup.free(0)
        assert lookup.propose(path(ids), 4) == []
        assert lookup.match_length(path(ids)) == 0


def test_cut_and_extended_paths_match_a_full_search() -> None:
    chance = random.Random(0)
    lookup = NgramLookup()
    found = 0
    for seq_id in range(20):
        ids = [chance.randrange(6) for _ in range(chance.randrange(2, 30))]
        for _ in range(20):
            committed = len(ids)
            drafted = list(ids)
            for _ in range(3):
                count = chance.randrange(1, 9)
                proposed = lookup.propose(Path(seq_id, drafted, committed, [], 1), count)
                assert proposed == searched(drafted, committed, count)
                found += len(proposed)
                drafted += proposed or [chance.randrange(6)]
                del drafted[chance.randrange(committed, len(drafted)) + 1 :]
                lookup.truncate(seq_id, len(drafted))
            ids = [*drafted[: committed + 1], chance.randrange(6)]
            lookup.commit(seq_id, len(ids))
    assert found > 1000


def test_free_forgets() -> None:
    lookup = NgramLookup()
    lookup.propose(path([1, 2, 3, 1, 2]), 1)
    assert lookup.seq_ids == {0}
    lookup.free(0)
    lookup.free(0)
    assert lookup.seq_ids == set()
    assert lookup.propose(path([1, 2, 4, 1, 2]), 1) == [4]


def test_a_lookup_takes_microseconds() -> None:
    chance = random.Random(0)
    ids = [min(int(chance.expovariate(0.02)), 2000) for _ in range(8000)]
    lookup = NgramLookup()
    lookup.propose(path(ids), 8)
    taken = []
    for _ in range(300):
        ids.append(min(int(chance.expovariate(0.02)), 2000))
        started = time.perf_counter()
        lookup.propose(path(ids), 8)
        taken.append(time.perf_counter() - started)
    assert sorted(taken)[150] < 2e-4
