"""Who runs, who waits and who gives way, without a model."""

from __future__ import annotations

from rowcast.runtime.outputs import RequestStats
from rowcast.runtime.params import SamplingParams
from rowcast.runtime.request import Request, Sequence
from rowcast.runtime.scheduler import Scheduler


def sequence(seq_id: int, prompt: int) -> Sequence:
    request = Request(str(seq_id), None, [0] * prompt, SamplingParams(), 0, 1000, RequestStats(prompt))
    request.sequences.append(Sequence(seq_id, 0, request, None))
    return request.sequences[0]


def make(
    prompts: list[int], *, blocks: int, max_num_seqs: int = 8, max_batch_tokens: int = 100
) -> tuple[Scheduler, list[Sequence]]:
    scheduler = Scheduler(num_blocks=blocks, block_size=4, max_num_seqs=max_num_seqs, max_batch_tokens=max_batch_tokens)
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
