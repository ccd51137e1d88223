"""Who runs, who waits and who gives way, without a model."""

from __future__ import annotations

from typing import Any

import pytest

from rowcast.errors import UserError
from rowcast.runtime.blocks import BlockPool
from rowcast.runtime.outputs import RequestStats
from rowcast.runtime.params import SamplingParams
from rowcast.runtime.prefill_limit import LEAST_TOKENS, PrefillLimit, prefill_limit
from rowcast.runtime.prefix_cache import PrefixCache, WrittenBy
from rowcast.runtime.request import Request, Sequence
from rowcast.runtime.scheduler import Scheduler


def sequence(seq_id: int, prompt: int) -> Sequence:
    request = Request(str(seq_id), None, [0] * prompt, SamplingParams(), 0, 1000, RequestStats(prompt))
    request.sequences.append(Sequence(seq_id, 0, request, None))
    return request.sequences[0]


def make(
    prompts: list[int], *, blocks: int, max_num_seqs: int = 8, max_batch_tokens: int = 100, **given: Any
) -> tuple[Scheduler, list[Sequence]]:
    scheduler = Scheduler(num_blocks=blocks, block_size=4, max_num_seqs=max_num_seqs, max_batch_tokens=max_batch_tokens, **given)
    sequences = [sequence(i, prompt) for i, prompt in enumerate(prompts)]
    for seq in sequences:
        scheduler.add(seq)
    return scheduler, sequences


def step(scheduler: Scheduler) -> tuple[list[tuple[int, int]], list[int]]:
    """One step in which everything runs: ((sequence, tokens), preempted), by id."""
    chosen, preempted = scheduler.schedule()
    for seq, tokens in chosen:
        seq.computed += tokens
        if seq.pending == 0:
            seq.output_ids.append(0)
    scheduler.check()
    return [(seq.seq_id, tokens) for seq, tokens in chosen], [seq.seq_id for seq in preempted]


def test_the_youngest_gives_way_and_goes_on_before_those_that_wait() -> None:
    scheduler, sequences = make([4, 4, 4, 4], blocks=4, max_num_seqs=2)
    assert step(scheduler) == ([(0, 4), (1, 4)], [])
    for _ in range(4):
        assert step(scheduler) == ([(0, 1), (1, 1)], [])
    assert step(scheduler) == ([(0, 1)], [1])  # the ninth position of 0 needs a third block: 1 gives both of its own back
    assert [seq.seq_id for seq in scheduler.waiting] == [1, 2, 3]
    assert sequences[1].computed == 0 and len(sequences[1].output_ids) == 5
    scheduler.remove(sequences[0])
    assert step(scheduler) == ([(1, 9), (2, 4)], [])  # prompt and output in one prefill


def test_several_that_give_way_keep_their_order() -> None:
    scheduler, _ = make([8, 4, 4, 4], blocks=5)
    assert step(scheduler) == ([(0, 8), (1, 4), (2, 4), (3, 4)], [])
    chosen, preempted = step(scheduler)
    assert (chosen, preempted) == ([(0, 1), (1, 1)], [3, 2])
    assert [seq.seq_id for seq in scheduler.waiting] == [2, 3]


def test_decoding_goes_on_while_a_long_prompt_is_prefilled_in_chunks() -> None:
    scheduler, _ = make([4, 21], blocks=20, max_num_seqs=2, max_batch_tokens=8)
    assert step(scheduler) == ([(0, 4), (1, 4)], [])
    assert step(scheduler) == ([(0, 1), (1, 7)], [])
    assert step(scheduler) == ([(0, 1), (1, 7)], [])
    assert step(scheduler) == ([(0, 1), (1, 3)], [])
    assert step(scheduler) == ([(0, 1), (1, 1)], [])


def test_nobody_overtakes_the_first_in_the_queue() -> None:
    scheduler, sequences = make([4, 16, 4], blocks=4)
    assert step(scheduler) == ([(0, 4)], [])  # 1 does not fit, and 2 waits behind it
    scheduler.remove(sequences[0])
    assert step(scheduler) == ([(1, 16)], [])


def test_a_cancelled_sequence_gives_its_blocks_back_wherever_it_is() -> None:
    scheduler, sequences = make([4, 4, 4], blocks=8, max_num_seqs=2)
    step(scheduler)
    for seq in sequences:
        scheduler.remove(seq)
    assert scheduler.pool.free_blocks == 8
    assert not scheduler.running and not scheduler.waiting


def test_prefill_waits_where_decoding_leaves_no_room() -> None:
    """As a plan from a file may have it: fewer tokens a step than sequences."""
    scheduler, sequences = make([1, 1, 1, 9], blocks=20, max_batch_tokens=2)
    for _ in range(3):
        step(scheduler)
    for _ in range(3):
        chosen, _ = step(scheduler)
        assert all(tokens > 0 for _, tokens in chosen)
    for seq in sequences[:3]:
        scheduler.remove(seq)
    assert step(scheduler) == ([(3, 2)], [])


def test_a_limit_holds_while_others_decode_and_no_longer() -> None:
    scheduler, sequences = make([4, 60], blocks=40, prefill_limit=PrefillLimit(6, None))
    assert step(scheduler) == ([(0, 4), (1, 60)], [])
    scheduler, sequences = make([4], blocks=40, prefill_limit=PrefillLimit(6, None))
    step(scheduler)
    scheduler.add(sequence(1, 60))
    assert step(scheduler) == step(scheduler) == ([(0, 1), (1, 6)], [])
    scheduler.remove(sequences[0])
    assert step(scheduler) == ([(1, 48)], [])


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    """The oldest has half of the share, the others the rest, in turn; what nobody needs goes on."""
    scheduler, _ = make([4, 800], blocks=300, prefill_limit=PrefillLimit(16, None), max_batch_tokens=64)
    assert step(scheduler) == ([(0, 4), (1, 60)], [])
    assert step(scheduler) == ([(0, 1), (1, 16)], [])
    for seq_id, prompt in ((2, 300), (3, 12), (4, 6)):
        scheduler.add(sequence(seq_id, prompt))
    assert step(scheduler) == ([(0, 1), (1, 8), (3, 8)], [])
    assert step(scheduler) == ([(0, 1), (1, 8), (3, 4), (4, 4)], [])


def test_short_prompts_that_keep_coming_hold_up_no_longer_one() -> None:
    scheduler, _ = make([4, 800], blocks=400, max_num_seqs=40, prefill_limit=PrefillLimit(16, None), max_batch_tokens=64)
    step(scheduler)
    scheduler.add(middling := sequence(2, 40))
    for number in range(6):
        scheduler.add(sequence(3 + number, 8))
        step(scheduler)
    assert middling.pending == 1


def test_a_long_prompt_is_through_whatever_comes_later() -> None:
    scheduler, _ = make([4], blocks=4000, max_num_seqs=50, prefill_limit=PrefillLimit(8, None))
    step(scheduler)
    scheduler.add(long := sequence(1, 200))
    for number in range(50):
        scheduler.add(sequence(2 + number, 6))
        step(scheduler)
        if not long.pending > 1:
            break
    assert number == 48 or number == 49  # four tokens a step


def test_without_a_limit_the_oldest_has_all_it_can_use() -> None:
    scheduler, _ = make([30, 4], blocks=40, max_batch_tokens=16)
    assert step(scheduler) == ([(0, 16)], [])
    assert step(scheduler) == ([(0, 14), (1, 2)], [])


def test_the_limit_follows_from_how_fast_prompts_were_run() -> None:
    limit = PrefillLimit(None, 0.5)
    first, alone = limit.tokens(3), limit.tokens(0)
    assert first is not None and alone == 4 * first
    for _ in range(20):
        limit.observe(0.1, 0, 3)  # decoding alone
    for _ in range(20):
        tokens = limit.tokens(3)
        assert tokens is not None
        limit.observe(0.1 + tokens / 400, tokens, 3)  # 400 tokens a second beside it
    assert limit.tokens(3) == pytest.approx(200, abs=2) and limit.tokens(0) == pytest.approx(800, abs=8)
    for _ in range(20):
        limit.observe(5.0, 1, 3)
    assert limit.tokens(3) == LEAST_TOKENS
    both = PrefillLimit(10, 0.5)
    assert both.tokens(1) == 10 and both.tokens(0) == alone


@pytest.mark.parametrize(
    ("tokens", "stall"), [(0, None), (1.5, None), (True, None), (None, 0), (None, -1.0), (None, float("inf"))]
)
def test_mistakes_are_one_sentence(tokens: Any, stall: Any) -> None:
    with pytest.raises(UserError, match=r"(max_num_prefill_tokens|prefill_stall_s)=.* has to be"):
        prefill_limit(tokens, stall)


def test_who_begins_alike_waits_for_the_first_and_lets_others_pass() -> None:
    """Prompts of zeroes: what one runs the others need not."""
    scheduler, sequences = make([17, 17, 30], blocks=40, max_batch_tokens=12, written_by=WrittenBy("plain"))
    scheduler.add(other := sequence(3, 9))
    other.request.prompt_ids = [5] * 9

    def ran() -> list[tuple[int, int]]:
        chosen, _ = scheduler.schedule()
        for seq, tokens in chosen:
            seq.computed += tokens
            scheduler.filled(seq)
            if seq.pending == 0:
                seq.output_ids.append(0)
        scheduler.check()
        return [(seq.seq_id, tokens) for seq, tokens in chosen]

    assert ran() == [(0, 12)]
    assert ran() == [(0, 5), (3, 7)]
    assert ran() == [(0, 1), (3, 2), (1, 1), (2, 8)]
    assert [seq.cached for seq in (*sequences, other)] == [0, 16, 16, 0]
    assert sequences[0].blocks[:4] == sequences[1].blocks[:4] == sequences[2].blocks[:4]
    assert scheduler.cache is not None and (scheduler.cache.asked_tokens, scheduler.cache.hit_tokens) == (73, 32)


@pytest.mark.parametrize("copied", [False, True])
def test_shared_blocks_save_memory_unless_they_are_copied(copied: bool) -> None:
    scheduler, sequences = make([16, 17, 17], blocks=8, written_by=WrittenBy("plain"), blocks_are_copied=copied)
    scheduler.schedule()
    sequences[0].computed = 16
    scheduler.remove(sequences[0])
    scheduler.schedule()
    scheduler.check()
    assert len(scheduler.running) == (1 if copied else 2)


def test_who_waits_is_named_no_further_than_it_is_known() -> None:
    """However many long prompts wait: a step looks at their first blocks."""
    scheduler, _ = make([8], blocks=80, max_batch_tokens=12, written_by=WrittenBy("plain"), prefill_limit=PrefillLimit(8, None))
    for number in range(1, 12):
        scheduler.add(seq := sequence(number, 400))
        seq.request.prompt_ids = [number] * 400
    scheduler.schedule()
    assert len(scheduler.waiting) > 8 and max(len(seq.block_names) for seq in scheduler.waiting) == 1


def test_what_is_known_of_who_waits_is_counted_on() -> None:
    pool = BlockPool(20)
    cache, done, waits = PrefixCache(pool, 4, WrittenBy("plain")), sequence(0, 17), sequence(1, 30)
    done.blocks = pool.take(5)
    for computed, known in ((0, 0), (8, 2), (17, 4)):
        done.computed = computed
        cache.filled(done)
        assert cache.known(waits) == len(cache.find(waits)) == known
    pool.give_back(done.blocks)
    assert cache.known(waits) == 4
    pool.give_back(pool.take(18))  # the end of it is evicted
    assert cache.known(waits) == len(cache.find(waits)) == 2
    pool.forget_names()
    assert cache.known(waits) == len(cache.find(waits)) == 0


def test_what_is_coming() -> None:
    """Blocks that others have yet to fill, as far as a sequence could begin with them."""
    cache, runs, waits = PrefixCache(BlockPool(20), 4, WrittenBy("plain")), sequence(0, 17), sequence(1, 17)
    like = [sequence(number, 17) for number in (2, 3)]
    for seq in like:
        seq.request.prompt_ids = [0] * 8 + [5] * 9
    coming = cache.coming([runs])
    assert [coming.awaits(waits, found) for found in range(5)] == [True, True, True, True, False]  # the newest token is run
    assert [coming.awaits(like[0], found) for found in range(4)] == [True, True, False, False]
    coming.add(like[0])
    assert [coming.awaits(like[1], found) for found in range(4)] == [True] * 4
    runs.computed = 9
    assert [cache.coming([runs]).awaits(waits, found) for found in range(4)] == [False, False, True, True]
    runs.request.cache_key = None
    assert not cache.coming([runs]).awaits(waits, 2)
