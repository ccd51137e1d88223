"""Which entries of a long sequence a small view shows: chosen for each layer and KV head, from committed entries and queries only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rowcast.runtime.kv.paged import PagedKV
from rowcast.runtime.kv.summaries import Score, Summary


class Policy(Protocol):
    """One way to choose."""

    chunk: int
    """It chooses whole chunks of so many positions."""

    def select(self, parent: PagedKV, seq_id: int, queries: Tensor | None, span: range, count: int) -> Tensor | None:
        """Choose `count` of the chunks in `span`, a range of positions that holds more than so many whole ones.

        `queries` [layers, n, H, d] are those of the parent's last n committed tokens, None where it kept none. Returns positions
        [layers, K, count * chunk], or None: nothing is chosen, or not anew.
        """
        ...

    def free(self, seq_id: int) -> None:
        """Forget the sequence. Unknown ids are ignored."""
        ...


class Retrieval:
    """The chunks whose summaries score highest (TriForce, arXiv 2404.11912, section 4.1; Quest, arXiv 2406.10774, section 3.2).

    The parent has to keep `summary`.
    """

    def __init__(self, score: Score = "bounds", chunk: int = 8) -> None:
        self.chunk = chunk
        self.summary = Summary(score, chunk)

    def select(self, parent: PagedKV, seq_id: int, queries: Tensor | None, span: range, count: int) -> Tensor | None:
        if queries is None:
            return None
        first, last = span.start // self.chunk, span.stop // self.chunk
        # [layers, K, d, chunks] each
        parts = [part[:, :, first:last].transpose(2, 3) for part in parent.summary(seq_id, self.summary)]
        rows = _by_kv_head(queries, parent.num_kv_heads)
        scores = rows @ parts[0] if self.summary.score == "mean" else _bound(rows, *parts)
        ends = torch.arange(first, last, device=parent.device) * self.chunk + self.chunk - 1
        weights = _combine(_attention(scores, ends.expand(*scores.shape[:2], -1), parent, seq_id, queries.shape[1], causal=False))
        chosen = weights.topk(count).indices.sort().values + first
        return (chosen[..., None] * self.chunk + torch.arange(self.chunk, device=parent.device)).flatten(2)

    def free(self, seq_id: int) -> None:
        pass


class Streaming:
    """Nothing: sinks and recent entries fill the budget, at their true positions (StreamingLLM, arXiv 2309.17453, section 3.2)."""

    chunk = 1

    def select(self, parent: PagedKV, seq_id: int, queries: Tensor | None, span: range, count: int) -> Tensor | None:
        return None

    def free(self, seq_id: int) -> None:
        pass


@dataclass(slots=True)
class _Held:
    """Entries that a sequence still has, [layers, K, m] each, and the parent's length when they were chosen."""

    positions: Tensor
    mass: Tensor
    length: int


class HeavyHitters:
    """The entries that gathered most attention; what was evicted never comes back (H2O, arXiv 2306.14048, section 4).

    The paper adds up the attention of every query, the prompt's included, and evicts one entry a token. Here only the queries that
    the parent kept of its last pass before each choice count, over the entries still held, and as many are evicted as came in.
    """

    chunk = 1

    def __init__(self) -> None:
        self._held: dict[int, _Held] = {}

    def select(self, parent: PagedKV, seq_id: int, queries: Tensor | None, span: range, count: int) -> Tensor | None:
        if queries is None:
            return None
        length, layers, kv_heads = parent.length(seq_id), queries.shape[0], parent.num_kv_heads
        before = self._held.get(seq_id)
        came = torch.arange(before.length if before else 0, length, device=parent.device).expand(layers, kv_heads, -1)
        positions = torch.cat((before.positions, came), -1) if before else came
        scores = _by_kv_head(queries, kv_heads) @ parent.keys_at(parent.locate(seq_id, positions)).transpose(2, 3)
        mass = _attention(scores, positions, parent, seq_id, queries.shape[1], causal=True).sum(2)
        if before:
            mass[..., : before.mass.shape[-1]] += before.mass
        # Sinks and recent entries, as many for every head, stay in any case.
        stay = span.start + length - span.stop
        open_to_choice = (positions >= span.start) & (positions < span.stop)
        kept = mass.masked_fill(~open_to_choice, float("inf")).topk(stay + count).indices
        self._held[seq_id] = _Held(positions.gather(-1, kept), mass.gather(-1, kept), length)
        return self._held[seq_id].positions[..., stay:].sort().values

    def free(self, seq_id: int) -> None:
        self._held.pop(seq_id, None)


def _by_kv_head(queries: Tensor, kv_heads: int) -> Tensor:
    """The queries that read the same keys, head by head: [layers, n, H, d] -> [layers, K, H/K * n, d]."""
    layers, tokens, _, size = queries.shape
    return queries.view(layers, tokens, kv_heads, -1, size).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _bound(queries: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The largest q . k of any key between the bounds: the sum over channels of max(q * low, q * high)."""
    # queries [..., rows, d], low, high [..., d, chunks] -> [..., rows, chunks]
    return queries.clamp(max=0) @ low + queries.clamp(min=0) @ high


def _attention(scores: Tensor, positions: Tensor, parent: PagedKV, seq_id: int, tokens: int, *, causal: bool) -> Tensor:
    """Softmax over keys at `positions` for the queries of the last `tokens` tokens: scaled, with ALiBi and windows, and `causal`
    where keys may lie behind queries.

    scores [layers, K, H/K * tokens, m] (q . k), positions [layers, K, m] -> the shape of scores, float32.
    """
    spec, length = parent.spec, parent.length(seq_id)
    share = scores.shape[2] // tokens
    queries = torch.arange(length - tokens, length, device=parent.device).repeat(share)[:, None]  # [rows, 1]
    keys = positions[:, :, None]
    weights = scores.float() * spec.attention_scale
    if parent.slopes is not None:
        # What depends on the query alone drops out, so the position of the key is enough.
        slopes = parent.slopes.float().view(-1, share).repeat_interleave(tokens, 1)
        weights += slopes[..., None] * keys * (parent.absolute_bias_scale or 1.0)
    lowest = torch.finfo(weights.dtype).min
    if causal:
        weights.masked_fill_(keys > queries, lowest)
    for layer, window in enumerate(spec.windows):
        if window is not None:
            weights[layer].masked_fill_(keys[layer] <= queries - window, lowest)
    return weights.softmax(-1)


def _combine(weights: Tensor) -> Tensor:
    """One weight for each chunk from those that each row, a query head and a token, gives it."""
    # [layers, K, rows, chunks] -> [layers, K, chunks]
    return weights.mean(2)
