"""What the KV views take, and which of them a model cannot have, before any is made. Torch-free.

KV heads are counted through all layers here: `heads` are layers * K.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from rowcast.errors import UserError
from rowcast.kernels.retrieval_sizes import LEAST_ROWS, layer_bytes
from rowcast.runtime.ladder.spec import Rung, Score
from rowcast.runtime.spec import ModelSpec

WORK_BYTES = 64 << 20
"""Work space of a choice, unless a single head needs more."""

LIST_WORK_BYTES = 64 << 20
"""Of a choice on a GPU: scores of chunks of several sequences, and those by token of a few layers at a time."""

ROUNDED_CHUNKS = 256
"""Least chunks that its work space is rounded up to: see `rounded_chunks`."""

_SCORE_BYTES = 13
"""Of one score while it becomes a weight: itself, in float32, its share, and whether its key is visible."""

_PLACE_BYTES = 32
"""Of one entry while it is looked up: its position, its row in the store."""

_TABLE_BYTES = 32
"""Of one entry of the whole sequence: its place in the store, for the view and for the policy."""

_CHOSEN_BYTES = 24
"""Of one chosen position, until it is copied: as it was found, in one piece, as the index of an entry."""


class Summary(NamedTuple):
    """One kind of summary."""

    score: Score = "bounds"
    chunk: int = 8
    """Positions to a chunk."""

    @property
    def parts(self) -> int:
        """Keys that stand for a chunk."""
        return 1 if self.score == "mean" else 2

    def per_block(self, block_size: int) -> int:
        """Chunks to a KV block. Raises UserError where they do not fill it."""
        if self.chunk < 1 or block_size % self.chunk:
            fits = [n for n in range(1, block_size + 1) if block_size % n == 0]
            raise UserError(
                f"chunk={self.chunk} does not divide a KV block of {block_size} tokens: use one of {fits}, or another block_size"
            )
        return block_size // self.chunk


class PolicySizes(Protocol):
    """What one way to choose entries takes."""

    @property
    def held_bytes(self) -> int:
        """What it remembers of each entry that a head shows of a sequence."""
        ...

    def head_bytes(self, entries: int, rows: int, head_dim: int, width: int) -> int:
        """Work space of one head's choice among `entries` by `rows` queries, `width` bytes an element."""
        ...


class RetrievalSizes:
    """Of chunks by their summaries."""

    held_bytes = 0

    def __init__(self, summary: Summary) -> None:
        self.summary = summary

    def head_bytes(self, entries: int, rows: int, head_dim: int, width: int) -> int:
        # Summaries of scattered blocks are copied, one of them once more where the product wants another order.
        return entries // self.summary.chunk * (rows * _SCORE_BYTES + (self.summary.parts + 1) * head_dim * width)


class StreamingSizes:
    """Of sinks and recent entries."""

    held_bytes = 0

    def head_bytes(self, entries: int, rows: int, head_dim: int, width: int) -> int:
        return 0


class HeavyHitterSizes:
    """Of the entries that gathered most attention: a position and a mass of each."""

    held_bytes = 8

    def head_bytes(self, entries: int, rows: int, head_dim: int, width: int) -> int:
        return entries * (rows * _SCORE_BYTES + 2 * head_dim * width + _PLACE_BYTES)


def policy_sizes(rung: Rung) -> PolicySizes:
    """Of the policy by which a rung self chooses its entries."""
    if rung.view == "retrieval":
        return RetrievalSizes(Summary(rung.score, rung.chunk))
    return StreamingSizes() if rung.view == "streaming" else HeavyHitterSizes()


def copy_bytes(head_dim: int, width: int) -> int:
    """Work space of copying one entry of one head: its key or value, `width` bytes an element."""
    return head_dim * width + _PLACE_BYTES


def choice_bytes(policy: PolicySizes, spec: ModelSpec, kv: int, context: int, queries: int, width: int) -> int:
    """Most work space of choosing `kv` entries of `context` by the last `queries` tokens, and of copying them."""
    each = max(policy.head_bytes(context, queries * spec.group_size, spec.head_dim, width), kv * copy_bytes(spec.head_dim, width))
    heads = spec.num_layers * spec.num_kv_heads
    chosen = heads * kv * (_CHOSEN_BYTES + policy.held_bytes)
    return min(heads * each, max(WORK_BYTES, each)) + chosen + context * _TABLE_BYTES


def head_groups(heads: int, each_bytes: int) -> Iterator[slice]:
    """All heads in groups, as large as work space allows where one head needs `each_bytes`."""
    size = max(1, WORK_BYTES // max(1, each_bytes))
    for first in range(0, heads, size):
        yield slice(first, min(first + size, heads))


def listed_bytes(spec: ModelSpec, kv: int, chunk: int) -> int:
    """The lists of one sequence, as they are kept, or as a round reads them."""
    return 4 * spec.num_layers * spec.num_kv_heads * -(-kv // chunk)


def rounded_chunks(chunks: int) -> int:
    """At least so many: few different numbers, as each has graphs of its own, and a quarter more at most, or `ROUNDED_CHUNKS`."""
    step = max(ROUNDED_CHUNKS, (1 << max(0, chunks - 1).bit_length()) // 8)
    return max(1, -(-chunks // step)) * step


class ListWork(NamedTuple):
    """Work space of choosing chunks by list, on one rank. Held for good: graphs of rounds work in it, and choices of the host."""

    layers: int
    kv_heads: int
    rows: int
    """Queries of a KV head: tokens times the query heads of its group."""
    width: int
    """Bytes of an element of queries."""

    @classmethod
    def of(cls, spec: ModelSpec, tokens: int, width: int) -> ListWork:
        """`spec`: the rank's share. `tokens`: of one sequence that a choice looks at, at most."""
        return cls(spec.num_layers, spec.num_kv_heads, tokens * spec.group_size, width)

    def together(self, chunks: int) -> int:
        """Sequences of so many chunks that are chosen for at once."""
        return max(1, LIST_WORK_BYTES // (self._scores(chunks) + self._layer(chunks)))

    def bytes(self, chunks: int) -> tuple[int, int]:
        """For each sequence of a round, as long as it is short of the second: for all of them. `chunks`: of a sequence, at most."""
        scores, layer = self._scores(chunks), self._layer(chunks)
        several = LIST_WORK_BYTES * self.layers // (self.layers + LEAST_ROWS)  # what is left of it is for a layer's by token
        return scores + self.layers * layer, max(scores, several) + max(LIST_WORK_BYTES, layer)

    def _scores(self, chunks: int) -> int:
        """One sequence's, in all layers."""
        return 4 * chunks * self.kv_heads * self.layers

    def _layer(self, chunks: int) -> int:
        """Beside them, for one layer of it."""
        return layer_bytes(self.kv_heads, self.rows, chunks, self.width)


def most_chunks(context: int, tokens: int, chunk: int) -> int:
    """Chunks that a choice for a sequence of `context` entries and `tokens` proposals has room for."""
    return rounded_chunks((context + tokens) // chunk)


def why_not_streaming(spec: ModelSpec) -> str | None:
    """Why sinks cannot slide in this model, None if they can."""
    if spec.learned_positions:
        return "its positions are learned, and a key cannot be moved to another one"
    if spec.rope is not None and spec.rope.scaling == "dynamic":
        return "its rotary frequencies change with the length (dynamic scaling)"
    return None
