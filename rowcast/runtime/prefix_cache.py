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
        for place in range(self._findable(seq)):  # a name is made when it is asked for: most prompts end at the first block
            block = self._pool.find(self._name(seq, place))
            if block is None:
                break
            found.append(block)
        assert len(found) * self._size < seq.length, "the newest token has to be run"
        return found

    def known(self, seq: Sequence) -> int:
        """How many blocks `find` gives, or would if some had not been evicted from their middle. Counts on from the last call, as a
        sequence may wait for many steps."""
        if self._by.prompts_only and seq.cached is not None:
            return 0
        most = self._findable(seq)
        while seq.named < most and self._pool.find(self._name(seq, seq.named)) is not None:
            seq.named += 1
        while seq.named and self._pool.find(self._name(seq, seq.named - 1)) is None:
            seq.named -= 1
        return seq.named

    def coming(self, sequences: Iterable[Sequence]) -> Coming:
        """What these sequences, which run or are about to, have yet to fill."""
        return Coming(self, self._size, sequences)

    def wants(self, seq: Sequence, place: int) -> bytes | None:
        """The name of the block at this place, if a sequence that does not run could begin with it."""
        if place >= self._findable(seq) or (self._by.prompts_only and seq.cached is not None):
            return None
        return self._name(seq, place)

    def will_have(self, seq: Sequence, place: int) -> bytes | None:
        """The name of the block at this place, once it is filled; None: it gets none."""
        return self._name(seq, place) if place < self._whole(seq) else None

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
        for place in range(seq.named, whole):
            self._pool.name(seq.blocks[place], self._name(seq, place))
        seq.named = max(seq.named, whole)

    def check(self, seq: Sequence) -> None:
        """Of a running sequence: its blocks' names are those of its tokens, and what it still writes to is its own alone."""
        complete = seq.computed // self._size
        names = [self._name(seq, place) for place in range(min(complete, self._whole(seq)))]
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

    def _name(self, seq: Sequence, place: int) -> bytes:
        """Of the block at this place; names are kept with the sequence. Precondition: it has the block's tokens."""
        names, size, prompt = seq.block_names, self._size, len(seq.request.prompt_ids)
        apart = self._by.tells_apart or seq.request.cache_key
        while len(names) <= place:
            first = len(names) * size
            before = names[-1] if names else self._root(seq)
            ids = array("q", seq.tokens(first, first + size))
            generated = max(0, first + size - max(first, prompt)) if apart else 0
            names.append(sha256(b"%b%d:%b" % (before, generated, ids.tobytes())).digest())
        return names[place]

    def _root(self, seq: Sequence) -> bytes:
        """What stands before a sequence's first block."""
        stretch, prompt = self._by.stretches_from, len(seq.request.prompt_ids)
        length = 0 if stretch is None else max(0, prompt - stretch)
        return sha256(repr((self._by.writer, seq.request.cache_key, length)).encode()).digest()


class Coming:
    """Blocks that sequences have yet to fill, named as far as anybody asks. For one step, so that who waits is compared with all of
    them at once."""

    def __init__(self, cache: PrefixCache, block_size: int, sequences: Iterable[Sequence]) -> None:
        self._cache = cache
        self._size = block_size
        self._alike: dict[bytes, list[Sequence]] = {}
        """By the name of their first block."""
        self._names: dict[bytes, dict[int, set[bytes]]] = {}
        """Of those that begin with a block, by place."""
        for seq in sequences:
            self.add(seq)

    def add(self, seq: Sequence) -> None:
        """One more."""
        first = self._cache.will_have(seq, 0)
        if first is not None:
            self._alike.setdefault(first, []).append(seq)
            for place, names in self._names.get(first, {}).items():
                self._note(seq, place, names)

    def awaits(self, seq: Sequence, found: int) -> bool:
        """Whether the block behind the `found` ones of a sequence that does not run is among them."""
        name = self._cache.wants(seq, found)
        if name is None:
            return False
        first = seq.block_names[0]
        alike = self._alike.get(first)
        if alike is None:
            return False
        at = self._names.setdefault(first, {})
        if found not in at:
            at[found] = set()
            for other in alike:
                self._note(other, found, at[found])
        return name in at[found]

    def _note(self, seq: Sequence, place: int, names: set[bytes]) -> None:
        name = self._cache.will_have(seq, place) if seq.computed // self._size <= place else None
        if name is not None:
            names.add(name)
