"""Decides which sequences run in a step, and which give way when KV memory runs out. Torch-free."""

from __future__ import annotations

from collections import deque

from rowcast.runtime.blocks import BlockPool
from rowcast.runtime.request import Sequence


class Scheduler:
    """First come, first served. A sequence holds blocks for all positions it has run; the youngest gives way first.

    `running` is in order of age. A preempted sequence goes to the head of the queue with its tokens kept and its KV void: when it
    is admitted again, prompt and output are prefilled together.
    """

    def __init__(self, *, num_blocks: int, block_size: int, max_num_seqs: int, max_batch_tokens: int, lookahead: int = 0) -> None:
        """`lookahead`: tokens that a decoding sequence may draft in a step, beyond the one that it runs anyway."""
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.max_batch_tokens = max_batch_tokens
        self.lookahead = lookahead
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._room: dict[int, int] = {}
        """By sequence id, for the step that was scheduled last."""

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    def schedule(self) -> tuple[list[tuple[Sequence, int]], list[Sequence]]:
        """((sequence, tokens to run) in order of age, sequences preempted on the way).

        Decoding sequences always run; prefills share what they leave of `max_batch_tokens`. Chosen sequences own the blocks that
        their tokens need, and decoding ones, where blocks and tokens are left over, those of drafts (`room`).
        """
        for seq in self.running:
            self._trim(seq)
        chosen: list[tuple[Sequence, int]] = []
        preempted: list[Sequence] = []
        budget = self.max_batch_tokens - sum(1 for s in self.running if s.pending == 1)
        for seq in list(self.running):
            if seq in preempted:
                continue
            tokens = 1 if seq.pending == 1 else min(seq.pending, budget)
            if tokens and self._reserve(seq, tokens, preempted):
                chosen.append((seq, tokens))
                budget -= 0 if seq.pending == 1 else tokens
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs and not preempted:
            seq = self.waiting[0]
            if self.blocks_for(seq.length) > self.pool.free_blocks:
                break
            self.running.append(self.waiting.popleft())
            tokens = min(seq.pending, budget)
            self._reserve(seq, tokens, preempted)
            chosen.append((seq, tokens))
            budget -= tokens
        self._look_ahead(chosen)
        return chosen, preempted

    def room(self, seq: Sequence) -> int:
        """Tokens that a chosen, decoding sequence may draft in this step. 0 for others."""
        return self._room.get(seq.seq_id, 0)

    def preempt_all(self) -> list[Sequence]:
        """Send every running sequence back to the queue, its KV void."""
        return [self._preempt_youngest() for _ in range(len(self.running))]

    def remove(self, seq: Sequence) -> None:
        """The sequence has finished or was cancelled: give its blocks back."""
        if seq in self.running:
            self.running.remove(seq)
        elif seq in self.waiting:
            self.waiting.remove(seq)
        self.pool.give_back(seq.blocks)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` positions."""
        return -(-tokens // self.block_size)

    def check(self) -> None:
        """Blocks are owned by running sequences, each by one. For tests and idle moments."""
        self.pool.check()
        owned = [block for seq in self.running for block in seq.blocks]
        assert len(owned) == len(set(owned)) == self.pool.total - self.pool.free_blocks
        assert not any(seq.blocks for seq in self.waiting)

    def _trim(self, seq: Sequence) -> None:
        """Give back what was reserved for drafts and not used."""
        spare = seq.blocks[self.blocks_for(seq.computed) :]
        del seq.blocks[self.blocks_for(seq.computed) :]
        self.pool.give_back(spare)

    def _look_ahead(self, chosen: list[tuple[Sequence, int]]) -> None:
        """Deal out blocks and tokens that nobody needs to the drafts of decoding sequences, the oldest first."""
        self._room.clear()
        decoding = [seq for seq, _ in chosen if seq.pending == 1]
        if not self.lookahead or not decoding:
            return
        share = (self.max_batch_tokens - sum(tokens for _, tokens in chosen)) // len(decoding)
        for seq in decoding:
            # A round emits one token more than it drafts, and the request ends at max_length.
            room = min(self.lookahead, share, seq.request.max_length - seq.length - 1)
            missing = self.blocks_for(seq.length + room) - len(seq.blocks)
            seq.blocks += self.pool.take(max(0, min(missing, self.pool.free_blocks)))
            self._room[seq.seq_id] = max(0, min(room, len(seq.blocks) * self.block_size - seq.length))

    def _reserve(self, seq: Sequence, tokens: int, preempted: list[Sequence]) -> bool:
        """Give `seq` the blocks for its next `tokens` tokens; false if it had to give way itself."""
        missing = self.blocks_for(seq.computed + tokens) - len(seq.blocks)
        while missing > self.pool.free_blocks:
            victim = self._preempt_youngest()
            preempted.append(victim)
            if victim is seq:
                return False
        if missing > 0:
            seq.blocks += self.pool.take(missing)
        return True

    def _preempt_youngest(self) -> Sequence:
        victim = self.running.pop()
        self.pool.give_back(victim.blocks)
        victim.computed = 0
        self.waiting.appendleft(victim)
        return victim
