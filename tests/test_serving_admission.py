"""Who runs next: clients share evenly, whatever each of them sends; and when to come back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rowcast.serving.admission import FairQueue, FinishRate
from rowcast.serving.driver import Driver


def taken(queue: FairQueue[str], count: int, *, tokens: int = 1) -> list[str]:
    return [queue.pop(tokens) for _ in range(count)]


def test_one_client_is_served_in_order() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in "abc":
        queue.push("one", item)
    assert queue.first() == "a" and len(queue) == 3 and list(queue) == ["a", "b", "c"]
    assert taken(queue, 3) == ["a", "b", "c"]
    assert queue.first() is None and queue.clients == 1
    for _ in range(3):
        queue.done("one")
    assert queue.clients == 0


def test_clients_take_turns() -> None:
    queue: FairQueue[str] = FairQueue()
    for i in range(4):
        queue.push("many", f"m{i}")
    queue.push("late", "l0")
    queue.push("late", "l1")
    assert taken(queue, 6) == ["m0", "l0", "m1", "l1", "m2", "m3"]


def test_long_prompts_and_outputs_count() -> None:
    queue: FairQueue[str] = FairQueue()
    for i in range(4):
        queue.push("long", f"L{i}")
        queue.push("short", f"s{i}")
    assert queue.pop(100) == "L0"
    assert taken(queue, 2, tokens=10) == ["s0", "s1"]
    queue.generated("short", 100)
    assert queue.pop(1) == "L1"


def test_nobody_saves_up() -> None:
    """A client that comes late, or comes back, has no claim on what it did not ask for."""
    queue: FairQueue[str] = FairQueue()
    queue.push("idle", "i")
    queue.pop(1)
    queue.push("busy", "b")
    for i in range(50):
        queue.push("busy", f"b{i}")
        queue.pop(1000)
    for i in range(4):
        queue.push("idle", f"i{i}")
    order = taken(queue, 5, tokens=1000)
    assert sum(item.startswith("b") for item in order) >= 1 and order[0] == "i0"


def test_what_waits_can_be_taken_out() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.push("one", "a")
    queue.push("one", "b")
    assert queue.remove("one", "a") and not queue.remove("one", "a") and not queue.remove("other", "b")
    assert list(queue) == ["b"]
    assert queue.remove("one", "b") and queue.clients == 0 and len(queue) == 0


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 50)), min_size=1, max_size=60))
def test_shares_differ_by_one_request(asked: list[tuple[str, int]]) -> None:
    """While two clients wait, neither is ahead of the other by more than the largest request."""
    queue: FairQueue[tuple[str, int]] = FairQueue()
    for name, size in asked:
        queue.push(name, (name, size))
    served = dict.fromkeys("abcd", 0)
    left = {name: sum(other == name for other, _ in asked) for name in "abcd"}
    for _ in asked:
        item = queue.first()
        assert item is not None
        name, size = queue.pop(item[1])
        assert (name, size) == item
        served[name] += size
        left[name] -= 1
        waiting = [served[other] for other in "abcd" if left[other]]
        if waiting:
            assert max(waiting) - min(waiting) <= 50
    assert len(queue) == 0


def test_when_to_come_back() -> None:
    rate = FinishRate()
    assert rate.retry_after_s(10, 0.0) == 5
    for i in range(20):
        rate.finished(i / 2)
    assert rate.retry_after_s(10, 10.0) == 5
    assert rate.retry_after_s(0, 10.0) == 1
    assert rate.retry_after_s(10_000, 10.0) == 60
    assert rate.retry_after_s(10, 500.0) == 5, "what finished long ago says nothing"


def of(n: int, *reasons: str | None, prompt: int = 4) -> Any:
    """A request for `n` answers; of one that runs, why each has ended."""
    request = SimpleNamespace(sequences=[SimpleNamespace(finish_reason=reason) for reason in reasons]) if reasons else None
    return SimpleNamespace(params=SimpleNamespace(n=n), prompt_ids=[1] * prompt, request=request)


@pytest.mark.parametrize(
    ("running", "n", "waiting", "fits"),
    [
        ([], 128, [], True),
        ([of(8, *[None] * 8)], 1, [], False),
        ([of(8, "stop", *[None] * 7)], 1, [], True),  # its place is another's, not the request's to its end
        ([of(8, *["length"] * 7, None)], 4, [], True),
        ([of(2, None, None)], 7, [], True),  # one of its answers waits in the engine, which goes on meanwhile
        ([of(1, None)], 128, [], True),
        ([of(20, *["stop"] * 13, *[None] * 7)], 1, [], True),
        ([of(20, *["stop"] * 12, *[None] * 8)], 1, [SimpleNamespace(length=4)], False),
        ([of(4, *[None] * 4)], 1, [SimpleNamespace(length=36)], False),  # for memory: 9 blocks and 2 of 10 that are free
        ([of(4, *[None] * 4)], 1, [SimpleNamespace(length=32)], True),
    ],
)
def test_answers_have_places_until_they_end(running: list[Any], n: int, waiting: list[Any], fits: bool) -> None:
    """A request of many answers at the head of the queue does not have the engine emptied for it, nor one whose last answer is long
    keep the places of those that have ended."""
    scheduler = SimpleNamespace(
        max_num_seqs=8, waiting=waiting, blocks_for=lambda tokens: -(-tokens // 4), pool=SimpleNamespace(free_blocks=10)
    )
    driver = Driver.__new__(Driver)
    driver._running = running
    assert driver._fits(scheduler, of(n)) is fits  # type: ignore[arg-type]
