"""Blocks of KV memory by their content, so that who begins with the same tokens need not run them again. Torch-free.

A block's name is a hash of its tokens, of all before it and of who wrote them: K/V depend on nothing else. Only whole blocks have
one (PagedAttention, arXiv 2309.06180, section 4.4, shares blocks alike).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256

from rowcast.runtime.blocks import BlockPool
from rowcast.runtime.ladder.memory import lazy
from rowcast.runtime.ladder.spec import Ladder
from rowcast.runtime.request import Sequence
from rowcast.runtime.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class WrittenBy:
    """What K/V depend on beside the tokens."""

    writer: str
    """The last rung, which writes all committed entries."""
    tells_apart: bool = False
    """Whether it writes other entries for a token that it generated than for the same one of a prompt: a sparse rung uses all rows for
    prompts."""
    prompts_only: bool = False
    """Whether entries of generated tokens may be completed later, so that only the prompt's are whole once they are written."""
    stretches_from: int | None = None
    """Longest prompt that has no part in its tokens' positions; None: no prompt has. Dynamic RoPE scaling goes by its length."""


def written_by(ladder: Ladder, spec: ModelSpec) -> WrittenBy:
    """Of a ladder's last rung."""
    dynamic = spec.rope is not None and spec.rope.scaling == "dynamic"
    return WrittenBy(
        str(ladder.rungs[-1]),
        tells_apart=ladder.approximate,
        prompts_only=lazy(ladder, spec),
        stretches_from=spec.rope.original_context if dynamic and spec.rope is not None else None,
    )


class PrefixCache:
    """Names blocks of a pool as they are filled, and finds those that a sequence begins with."""

    def __init__(self, pool: BlockPool, block_size: int, by: WrittenBy) -> None:
        self._pool = pool
        self._size = block_size
        self._by = by
        self.asked_tokens = 0
        """Of sequences that were begun, since the start; those that were preempted do not count again."""
        self.hit_tokens = 0
        """Those of them whose K/V were there."""

    def find(self, seq: Sequence) -> list[int]:
        """The blocks of the longest known prefix of a sequence that does not run. It never has the newest token, which has to be run
        as its logits are wanted, nor prompt tokens whose log-probabilities are."""
        found: list[int] = []
        if self._by.prompts_only and seq.cached is not None:  # others may still write what entries of its earlier life lack
            return found
        for name in self._names(seq, self._findable(seq)):
            block = self._pool.find(name)
            if block is None:
                break
            found.append(block)
        assert len(found) * self._size < seq.length, "the newest token has to be run"
        return found

    def awaits(self, seq: Sequence, found: int, others: Iterable[Sequence]) -> bool:
        """Whether the block behind the `found` ones of a sequence that does not run is just being filled by one of the others."""
        if found >= self._findable(seq):
            return False
        if self._by.prompts_only and seq.cached is not None:
            return False
        name = self._names(seq, found + 1)[found]
        return any(found < self._whole(other) and self._names(other, found + 1)[found] == name for other in others)

    def begin(self, seq: Sequence, blocks: list[int]) -> None:
        """The sequence starts behind these blocks, which `find` gave it: it is one of their users now."""
        self._pool.share(blocks)
        if seq.cached is None:
            self.asked_tokens += seq.length
            self.hit_tokens += len(blocks) * self._size
        seq.blocks, seq.named = blocks, len(blocks)

    def filled(self, seq: Sequence) -> None:
        """Entries up to `seq.computed` are there for good."""
        whole = min(seq.computed // self._size, self._whole(seq))
        if whole > seq.named:
            names = self._names(seq, whole)
            for place in range(seq.named, whole):
                self._pool.name(seq.blocks[place], names[place])
            seq.named = whole

    def check(self, seq: Sequence) -> None:
        """Of a running sequence: its blocks' names are those of its tokens, and what it still writes to is its own alone."""
        complete = seq.computed // self._size
        names = self._names(seq, min(complete, self._whole(seq)))
        for place, block in enumerate(seq.blocks):
            name = self._pool.name_of(block)
            if place < complete:
                assert name is None or (place < len(names) and name == names[place]), f"block {block} has another's name"
            else:
                assert name is None and self._pool.users(block) == 1, f"block {block} is shared, and still written to"

    def _findable(self, seq: Sequence) -> int:
        """Blocks at a sequence's beginning that it need not run."""
        return min((seq.length - 1) // self._size, seq.skippable // self._size, self._whole(seq))

    def _whole(self, seq: Sequence) -> int:
        """Blocks that have a name once they are filled."""
        if seq.request.cache_key is None:
            return 0
        return (len(seq.request.prompt_ids) if self._by.prompts_only else seq.length) // self._size

    def _names(self, seq: Sequence, count: int) -> list[bytes]:
        """Of its first `count` blocks; they are kept with the sequence. Precondition: it has so many tokens."""
        names, size, prompt = seq.block_names, self._size, len(seq.request.prompt_ids)
        apart = self._by.tells_apart or seq.request.cache_key
        while len(names) < count:
            first = len(names) * size
            before = names[-1] if names else self._root(seq)
            ids = array("q", seq.tokens(first, first + size))
            generated = max(0, first + size - max(first, prompt)) if apart else 0
            names.append(sha256(b"%b%d:%b" % (before, generated, ids.tobytes())).digest())
        return names[:count]

    def _root(self, seq: Sequence) -> bytes:
        """What stands before a sequence's first block."""
        stretch, prompt = self._by.stretches_from, len(seq.request.prompt_ids)
        length = 0 if stretch is None else max(0, prompt - stretch)
        return sha256(repr((self._by.writer, seq.request.cache_key, length)).encode()).digest()
