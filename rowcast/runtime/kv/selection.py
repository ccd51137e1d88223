"""Which entries of a long sequence a small view shows: chosen for each layer and KV head, from committed entries and queries only.

KV heads are counted through all layers here: `heads` are layers * K. Some of them are chosen for at a time, so that a choice takes
`sizes.WORK_BYTES` of work space, not that of the whole model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rowcast.kernels import gpu
from rowcast.kernels.retrieval_sizes import layer_bytes
from rowcast.runtime.kv.paged import PagedKV
from rowcast.runtime.kv.sizes import (
    WORK_BYTES,
    HeavyHitterSizes,
    PolicySizes,
    RetrievalSizes,
    StreamingSizes,
    Summary,
    head_groups,
)
from rowcast.runtime.ladder.spec import Rung, Score


class Choice(NamedTuple):
    """What a policy chose."""

    positions: Tensor
    """[layers, K, n], ascending."""
    bytes_read: int
    """Summaries or keys that were looked at."""


class Policy(PolicySizes, Protocol):
    """One way to choose."""

    chunk: int
    """It chooses whole chunks of so many positions."""

    def select(self, parent: PagedKV, seq_id: int, queries: Tensor | None, span: range, count: int) -> Choice | None:
        """Choose `count` of the chunks in `span`, a range of positions that holds more than so many whole ones.

        `queries` [layers, n, H, d] are those of the parent's last n committed tokens, None where it kept none. Returns positions
        [layers, K, count * chunk], or None: nothing is chosen, or not anew.
        """
        ...

    def free(self, seq_id: int) -> None:
        """Forget the sequence. Unknown ids are ignored."""
        ...


class Retrieval(RetrievalSizes):
    """The chunks whose summaries score highest (TriForce, arXiv 2404.11912, section 4.1; Quest, arXiv 2406.10774, section 3.2).

    The parent has to keep `summary`.
    """

    def __init__(self, score: Score = "bounds", chunk: int = 8) -> None:
        super().__init__(Summary(score, chunk))
        self.chunk = chunk

    def select(self, parent: PagedKV, seq_id: int, queries: Tensor | None, span: range, count: int) -> Choice | None:
        if queries is None:
            return None
        first, last = span.start // self.chunk, span.stop // self.chunk
        heads, rows = parent.num_kv_heads, queries.shape[1] * queries.shape[2] // parent.num_kv_heads
        layer = 4 * heads * last + layer_bytes(heads, rows, last, parent.dtype.itemsize)
        if gpu.serves(parent.device) and layer <= WORK_BYTES:
            chunks = self._by_kernels(parent, seq_id, queries, first, last, count, WORK_BYTES // layer)
        else:
            chunks = self._by_torch(parent, seq_id, queries, first, last, count)
        positions = chunks[..., None] * self.chunk + torch.arange(self.chunk, device=parent.device)
        each = self.summary.parts * parent.spec.head_dim * parent.dtype.itemsize
        return Choice(positions.flatten(2), len(queries) * heads * (last - first) * each)

    def free(self, seq_id: int) -> None:
        pass

    def _by_torch(self, parent: PagedKV, seq_id: int, queries: Tensor, first: int, last: int, count: int) -> Tensor:
        """The `count` best of the chunks first..last - 1: [layers, K, count], ascending."""
        ends = torch.arange(first, last, device=parent.device) * self.chunk + self.chunk - 1
        rows = _by_kv_head(queries, parent.num_kv_heads)
        each = self.head_bytes(parent.length(seq_id), rows.shape[1], rows.shape[2], parent.dtype.itemsize)
        chosen = []
        for heads in head_groups(len(rows), each):
            keys = [
                part[:, first:last].transpose(1, 2) for part in parent.summary(seq_id, self.summary, heads)
            ]  # [heads, d, chunks]
            scores = rows[heads] @ keys[0] if self.summary.score == "mean" else _bound(rows[heads], *keys)
            weights = _attention(scores, ends, parent, seq_id, heads, queries.shape[1])
            chosen.append(weights.mean(1).topk(count).indices.sort().values + first)
        return torch.cat(chosen).view(-1, parent.num_kv_heads, count)

    def _by_kernels(
        self, parent: PagedKV, seq_id: int, queries: Tensor, first: int, last: int, count: int, together: int
    ) -> Tensor:
        """Likewise, so many layers at a time."""
        from rowcast.kernels.gpu import retrieval

        kept, windows = parent.summary_store(self.summary), [window or 0 for window in parent.spec.windows]

        def ints(*values: int) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=parent.device)

        table, begin, end, length = parent.blocks_of(seq_id)[None], ints(first), ints(last), ints(parent.length(seq_id))
        chosen = []
        for low in range(0, len(queries), together):
            some = slice(low, low + together)
            scores = retrieval.chunk_scores(
                queries[some, None],
                kept[:, some],
                table,
                begin,
                end,
                scale=parent.spec.attention_scale,
                chunk=self.chunk,
                most_chunks=last,
                lengths=length,
                slopes=parent.slopes,
                absolute_bias_scale=parent.absolute_bias_scale,
                windows=ints(*windows[some]) if any(windows) else None,
            )
            chosen.append(retrieval.choose_chunks(scores, count, begin, end)[0])
        return torch.cat(chosen)


class Streaming(StreamingSizes):
    """Nothing: sinks and recent entries fill the budget, at their true positions (StreamingLLM, arXiv 2309.17453, section 3.2)."""

    chunk = 1

    def select(self, parent: PagedKV, seq_id: int, queries: Tensor | None, span: range, count: int) -> Choice | None:
        return None

    def free(self, seq_id: int) -> None:
        pass


@dataclass(slots=True)
class _Held:
    """Entries that a sequence still has, [heads, m] each, and the parent's length when they were chosen."""

    positions: Tensor
    """int32."""
    mass: Tensor
    """float32."""
    length: int


class HeavyHitters(HeavyHitterSizes):
    """The entries that gathered most attention; what was evicted never comes back (H2O, arXiv 2306.14048, section 4).

    The paper adds up the attention of every query, the prompt's included, and evicts one entry a token. Here only the queries that
    the parent kept of its last pass before each choice count, over the entries still held, and as many are evicted as came in.
    """

    chunk = 1

    def __init__(self) -> None:
        self._held: dict[int, _Held] = {}

    def select(self, parent: PagedKV, seq_id: int, queries: Tensor | None, span: range, count: int) -> Choice | None:
        if queries is None:
            return None
        length, table, before = parent.length(seq_id), parent.table(seq_id), self._held.get(seq_id)
        came = torch.arange(before.length if before else 0, length, dtype=torch.int32, device=parent.device)
        entries = came.shape[0] + (before.positions.shape[1] if before else 0)
        rows = _by_kv_head(queries, parent.num_kv_heads)
        # Sinks and recent entries, as many for every head, stay in any case.
        stay = span.start + length - span.stop
        shape = (len(rows), stay + count)
        held = _Held(came.new_empty(shape), torch.empty(shape, device=parent.device), length)
        for heads in head_groups(len(rows), self.head_bytes(entries, rows.shape[1], rows.shape[2], parent.dtype.itemsize)):
            positions = came.expand(len(rows[heads]), -1)
            if before:
                positions = torch.cat((before.positions[heads], positions), 1)
            scores = rows[heads] @ parent.keys_of(table[positions], heads).transpose(1, 2)
            mass = _attention(scores, positions, parent, seq_id, heads, queries.shape[1], causal=True).sum(1)
            if before:
                mass[:, : before.mass.shape[1]] += before.mass[heads]
            open_to_choice = (positions >= span.start) & (positions < span.stop)
            kept = mass.masked_fill(~open_to_choice, float("inf")).topk(stay + count).indices
            held.positions[heads], held.mass[heads] = positions.gather(1, kept), mass.gather(1, kept)
        self._held[seq_id] = held
        return Choice(
            held.positions[:, stay:].sort().values.view(-1, parent.num_kv_heads, count),
            len(rows) * entries * rows.shape[2] * parent.dtype.itemsize,
        )

    def free(self, seq_id: int) -> None:
        self._held.pop(seq_id, None)


def policy(rung: Rung) -> Policy:
    """By which a rung self chooses its entries."""
    if rung.view == "retrieval":
        return Retrieval(rung.score, rung.chunk)
    return Streaming() if rung.view == "streaming" else HeavyHitters()


def _by_kv_head(queries: Tensor, kv_heads: int) -> Tensor:
    """The queries that read the same keys, head by head: [layers, n, H, d] -> [heads, H/K * n, d]."""
    layers, tokens, _, size = queries.shape
    return queries.view(layers, tokens, kv_heads, -1, size).permute(0, 2, 3, 1, 4).reshape(layers * kv_heads, -1, size)


def _bound(queries: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The largest q . k of any key between the bounds: the sum over channels of max(q * low, q * high)."""
    # queries [heads, rows, d], low, high [heads, d, chunks] -> [heads, rows, chunks]
    return (queries.clamp(max=0) @ low).add_(queries.clamp(min=0) @ high)


def _attention(
    scores: Tensor, positions: Tensor, parent: PagedKV, seq_id: int, heads: slice, tokens: int, *, causal: bool = False
) -> Tensor:
    """Softmax over keys at `positions` for the queries of the last `tokens` tokens: scaled, with ALiBi and windows, and `causal`
    where keys may lie behind queries. Overwrites `scores`.

    scores [heads, H/K * tokens, m] (q . k), positions [heads, m] or [m] -> the shape of scores, float32.
    """
    spec, length = parent.spec, parent.length(seq_id)
    share = scores.shape[1] // tokens
    queries = torch.arange(length - tokens, length, device=parent.device).repeat(share)[:, None]  # [rows, 1]
    keys = positions[..., None, :]
    weights = scores.float().mul_(spec.attention_scale)
    each = range(spec.num_layers * parent.num_kv_heads)[heads]
    if parent.slopes is not None:
        # What depends on the query alone drops out, so the position of the key is enough.
        slopes = parent.slopes.float().view(-1, share)[[head % parent.num_kv_heads for head in each]].repeat_interleave(tokens, 1)
        weights.addcmul_(slopes[..., None], keys.float(), value=parent.absolute_bias_scale or 1.0)
    lowest = torch.finfo(weights.dtype).min
    if causal:
        weights.masked_fill_(keys > queries, lowest)
    for i, head in enumerate(each):
        window = spec.windows[head // parent.num_kv_heads]
        if window is not None:
            weights[i].masked_fill_((keys if keys.dim() == 2 else keys[i]) <= queries - window, lowest)
    return weights.softmax(-1)
