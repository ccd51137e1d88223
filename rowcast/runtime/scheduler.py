"""Decides which sequences run in a step, and which give way when KV memory runs out. Torch-free."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence as Seq
from itertools import islice

from rowcast.runtime.blocks import BlockPool
from rowcast.runtime.prefill_limit import PrefillLimit
from rowcast.runtime.prefix_cache import PrefixCache, WrittenBy
from rowcast.runtime.request import Sequence

_LONG_STEPS = 8
"""Under a limit, a prompt that takes more steps than that lets all others pass until it is the oldest. Shorter ones keep their turn:
with the shortest first, those of middling length waited for minutes while short ones came."""


class Scheduler:
    """First come, first served. A sequence holds blocks for all positions it has run; the youngest gives way first.

    `running` is in order of age. A preempted sequence goes to the head of the queue with its tokens kept and its KV void: when it
    is admitted again, prompt and output are prefilled together, but for what the prefix cache still has of them.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_batch_tokens: int,
        lookahead: int = 0,
        written_by: WrittenBy | None = None,
        prefill_limit: PrefillLimit | None = None,
        blocks_are_copied: bool = False,
    ) -> None:
        """`lookahead`: tokens that a decoding sequence may draft in a step, beyond the one that it runs anyway. `written_by`: what
        sequences that begin with the same tokens share blocks by; None: they share none. `prefill_limit`: bounds the tokens of prompts
        in a step, and has them shared out so that short prompts do not wait for long ones; None: only `max_batch_tokens` does, and
        the oldest gets all it can use. `blocks_are_copied`: a pass copies each of its sequences' blocks to memory for `num_blocks` of
        them, so that those that are shared save time and no memory."""
        self.pool = BlockPool(num_blocks, each_use_counts=blocks_are_copied)
        self.cache = None if written_by is None else PrefixCache(self.pool, block_size, written_by)
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.max_batch_tokens = max_batch_tokens
        self.lookahead = lookahead
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._limit = prefill_limit
        self._room: dict[int, int] = {}
        """By sequence id, for the step that was scheduled last."""

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    def schedule(self) -> tuple[list[tuple[Sequence, int]], list[Sequence]]:
        """((sequence, tokens to run) in order of age, sequences preempted on the way).

        Decoding sequences always run; prefills share what they leave of `max_batch_tokens`, or of the limit on prefills. Chosen
        sequences own the blocks that their tokens need, and decoding ones, where blocks and tokens are left over, those of drafts
        (`room`). Who begins with tokens that another is about to run waits until that has run them.
        """
        for seq in self.running:
            self._trim(seq)
        chosen: list[tuple[Sequence, int]] = []
        preempted: list[Sequence] = []
        prefilling = [(seq, seq.pending) for seq in self.running if seq.pending > 1]
        budget = self._budget(len(self.running) - len(prefilling))
        joining = self._joining(prefilling, budget)
        shares = self._shares([*prefilling, *joining], budget)
        for seq in list(self.running):
            if seq in preempted:
                continue
            tokens = 1 if seq.pending == 1 else shares[seq.seq_id]
            if tokens and self._reserve(seq, tokens, preempted):
                chosen.append((seq, tokens))
        for seq, _ in joining:
            if preempted:
                break
            if not shares[seq.seq_id]:
                continue
            found = self._found(seq)
            if not self.pool.fits(self.blocks_for(seq.length) - len(found), found):
                break
            self.waiting.remove(seq)
            self.running.append(seq)
            self._begin(seq, found)
            tokens = min(seq.pending, shares[seq.seq_id])
            self._reserve(seq, tokens, preempted)
            chosen.append((seq, tokens))
        self._look_ahead(chosen)
        return chosen, preempted

    def room(self, seq: Sequence) -> int:
        """Tokens that a chosen, decoding sequence may draft in this step. 0 for others."""
        return self._room.get(seq.seq_id, 0)

    def filled(self, seq: Sequence) -> None:
        """Entries up to `seq.computed` are there for good. Call it whenever that has grown."""
        if self.cache is not None:
            self.cache.filled(seq)

    def preempt_all(self) -> list[Sequence]:
        """Send every running sequence back to the queue. All KV is void, that of the prefix cache included."""
        preempted = [self._preempt_youngest() for _ in range(len(self.running))]
        self.pool.forget_names()
        return preempted

    def remove(self, seq: Sequence) -> None:
        """The sequence has finished or was cancelled: give its blocks back."""
        if seq in self.running:
            self.filled(seq)
            self.running.remove(seq)
        elif seq in self.waiting:
            self.waiting.remove(seq)
        self.pool.give_back(seq.blocks)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` positions."""
        return -(-tokens // self.block_size)

    def check(self) -> None:
        """Blocks are used by running sequences; those that several use are whole and known by their content. For tests and idle
        moments."""
        self.pool.check()
        users = Counter(block for seq in self.running for block in seq.blocks)
        assert all(self.pool.users(block) == count for block, count in users.items())
        assert len(users) == self.pool.total - self.pool.unused_blocks
        assert all(len(seq.blocks) == len(set(seq.blocks)) for seq in self.running)
        assert not any(seq.blocks for seq in self.waiting)
        if self.cache is None:
            assert not self.pool.cached_blocks and all(count == 1 for count in users.values())
        else:
            for seq in self.running:
                self.cache.check(seq)

    def _budget(self, decoding: int) -> int:
        """Tokens of prompts in a step with so many decoding sequences."""
        left = max(0, self.max_batch_tokens - decoding)
        limit = None if self._limit is None else self._limit.tokens(decoding)
        return left if limit is None else min(left, limit)

    def _joining(self, prefilling: Seq[tuple[Sequence, int]], budget: int) -> list[tuple[Sequence, int]]:
        """Who waits and may join, in order, with the tokens that each would have to run."""
        joining: list[tuple[Sequence, int]] = []
        places = self.max_num_seqs - len(self.running)
        if not places or not self.waiting:
            return joining
        coming = None if self.cache is None else self.cache.coming(seq for seq, _ in prefilling)
        wanted = 0 if self._limit is not None else sum(pending for _, pending in prefilling)
        for seq in islice(self.waiting, 2 * self.max_num_seqs):
            if len(joining) >= places or wanted >= budget:
                break
            known = 0 if self.cache is None else self.cache.known(seq)
            if coming is not None:
                if coming.awaits(seq, known):
                    continue
                coming.add(seq)
            pending = seq.length - known * self.block_size
            joining.append((seq, pending))
            wanted += pending if self._limit is None else 0
        return joining

    def _shares(self, prefills: Seq[tuple[Sequence, int]], budget: int) -> dict[int, int]:
        """Of the budget, by sequence id: first come, first served, or, under a limit, half to the oldest, so that it comes to an end,
        and the rest to the others in turn, long prompts last, so that nobody waits for these. `prefills`: with what they have left."""
        shares: dict[int, int] = {}
        order = list(prefills)
        if self._limit is not None and order:
            (oldest, pending), *others = order
            shares[oldest.seq_id] = min(pending, -(-budget // 2))
            budget -= shares[oldest.seq_id]
            long = _LONG_STEPS * budget
            order = [*sorted(others, key=lambda each: each[1] > long), (oldest, pending - shares[oldest.seq_id])]
        for seq, pending in order:
            tokens = min(pending, budget)
            shares[seq.seq_id] = shares.get(seq.seq_id, 0) + tokens
            budget -= tokens
        return shares

    def _found(self, seq: Sequence) -> list[int]:
        """Blocks that have what a waiting sequence begins with."""
        return [] if self.cache is None else self.cache.find(seq)

    def _begin(self, seq: Sequence, found: list[int]) -> None:
        """A sequence runs from now on, behind the blocks that were found."""
        if self.cache is not None:
            self.cache.begin(seq, found)
        cached = len(found) * self.block_size
        if seq.cached is None and not seq.sample_index:
            seq.request.stats.cached_tokens = min(cached, len(seq.request.prompt_ids))
        seq.computed = seq.cached = cached

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
