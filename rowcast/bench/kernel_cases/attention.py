"""Decoding attention over long and short contexts, rotation with append, and what the retrieval cache needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rowcast.bench.kernel_cases.case import Case
from rowcast.kernels.gpu.decoding import Chunks, decode
from rowcast.kernels.gpu.retrieval import choose_chunks, chunk_scores, summarise
from rowcast.kernels.gpu.rotate import apart, rotate_append

LONG = 124_928
"""TriForce's context of 122K tokens."""
HEAD = 128
BLOCK = 16
HEADS = 32
_ROTATED_BYTES = 256 << 20
"""What the inputs of small cases take together, at least four times the L2."""


def cases(device_name: str) -> Iterator[Case]:
    """All of them, each of which frees its tensors when the next one is made."""
    for kv_heads in (32, 8):
        for tokens in (1, 7):
            yield _attention(kv_heads, LONG, tokens)
    for kv_heads in (32, 8):
        for entries in (1024, 8192):
            yield _attention(kv_heads, entries, 1)
    yield _attention(8, 4096, 1, sequences=8)
    for tokens in (1, 7):
        yield _chunks(32, tokens)
    for tokens in (1, 7):
        yield _rotation(32, tokens)
    yield _summaries(32)
    for kv_heads in (32, 8):
        yield _scores(kv_heads)
    yield _choice()


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def _ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def _store(kv_heads: int, entries: int, sequences: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [blocks, block_size, K, d] of sequences of `entries` each, and their tables."""
    blocks = entries // BLOCK
    keys, values = (_random(sequences * blocks, BLOCK, kv_heads, HEAD) for _ in range(2))
    return keys, values, torch.randperm(sequences * blocks, device="cuda").int().view(sequences, blocks)


def _attention(kv_heads: int, entries: int, tokens: int, sequences: int = 1) -> Case:
    """The last tokens of contexts, in one call."""
    bytes_each = 2 * sequences * entries * kv_heads * HEAD * 2
    copies = max(1, _ROTATED_BYTES // bytes_each)
    starts, q = _ints(*[entries - tokens] * sequences), _random(sequences * tokens, HEADS, HEAD)

    def ours(keys: Tensor, values: Tensor, table: Tensor) -> Callable[[], object]:
        return lambda: decode(q, keys, values, table, starts, scale=HEAD**-0.5, most_entries=entries)

    def theirs() -> Callable[[], object]:
        k, v = (_random(sequences, kv_heads, entries, HEAD) for _ in range(2))
        mask = None if tokens == 1 else torch.ones(tokens, entries, dtype=torch.bool, device="cuda").tril(entries - tokens)
        share = HEADS // kv_heads  # the group's heads are rows of one product, without a copy of K and V
        rows = q.view(sequences, tokens, kv_heads, share, HEAD).permute(0, 2, 3, 1, 4)
        rows = rows.reshape(sequences, kv_heads, share * tokens, HEAD)
        mask = None if mask is None else mask.repeat(share, 1)
        return lambda: F.scaled_dot_product_attention(rows, k, v, attn_mask=mask)

    shape = f"{sequences} x {tokens} tokens of {entries}, {HEADS} heads, {kv_heads} KV heads of {HEAD}, bf16"
    stores = [_store(kv_heads, entries, sequences) for _ in range(copies)]
    peers = {"torch SDPA, K and V contiguous": [theirs() for _ in range(copies)]}
    return Case("decode", shape, bytes_each, [ours(*store) for store in stores], peers)


def _chunks(kv_heads: int, tokens: int, budget: int = 4096, size: int = 8) -> Case:
    """A retrieval cache's entries where they lie in the store of a long context."""
    keys, values, table = _store(kv_heads, LONG)
    q, starts = _random(tokens, HEADS, HEAD), _ints(LONG - tokens)
    sinks, recent = 16, 64
    count = (budget - sinks - recent) // size

    def ours(ids: Tensor) -> Callable[[], object]:
        chunks = Chunks(ids, size, sinks, _ints(LONG - recent))
        return lambda: decode(
            q, keys, values, table, starts, scale=HEAD**-0.5, most_entries=LONG, most_shown=entries + tokens, chunks=chunks
        )

    among = (LONG - recent - sinks) // size
    lists = [
        (torch.rand(1, kv_heads, among, device="cuda").topk(count).indices.sort().values + sinks // size).int() for _ in range(8)
    ]
    entries = sinks + count * size + recent
    shape = f"{entries} of {LONG} tokens in chunks of {size}, {kv_heads} KV heads of {HEAD}, bf16, {tokens} tokens"
    return Case("decode chunks", shape, 2 * entries * kv_heads * HEAD * 2, [ours(ids) for ids in lists])


def _rotation(kv_heads: int, tokens: int) -> Case:
    width = (HEADS + 2 * kv_heads) * HEAD
    keys, values, _ = _store(kv_heads, 4096)
    cos, sin = _random(tokens, 1, HEAD), _random(tokens, 1, HEAD)
    slots = torch.randperm(4096, device="cuda")[:tokens]

    def ours(qkv: Tensor) -> Callable[[], object]:
        return lambda: rotate_append(*apart(qkv, HEADS, kv_heads), keys, values, slots, cos, sin)

    shape = f"{HEADS} heads, {kv_heads} KV heads of {HEAD}, bf16, {tokens} tokens"
    return Case("rotate append", shape, 2 * tokens * width * 2, [ours(_random(tokens, width)) for _ in range(16)])


def _summaries(kv_heads: int, layers: int = 32, size: int = 8) -> Case:
    """One completed chunk in all layers: what eight decoded tokens cost."""
    blocks = 1024
    keys = _random(layers, blocks, BLOCK, kv_heads, HEAD)
    kept = torch.empty(2, layers, kv_heads, blocks, BLOCK // size, HEAD, dtype=torch.bfloat16, device="cuda")
    table = torch.randperm(blocks, device="cuda").int()[None]

    def ours(position: int) -> Callable[[], object]:
        old, new = _ints(position), _ints(position + size)
        return lambda: summarise(keys, table, old, new, kept, chunk=size)

    moved = layers * kv_heads * HEAD * 2 * (size + 2)
    shape = f"a chunk of {size}, {layers} layers of {kv_heads} KV heads of {HEAD}, bf16"
    return Case("summarise", shape, moved, [ours(position) for position in range(0, 512 * size, 8 * size)])


def _scores(kv_heads: int, tokens: int = 8, size: int = 8) -> Case:
    """One layer's chunks of a long context, by the bounds of q . k."""
    chunks = LONG // size
    table = torch.randperm(LONG // BLOCK, device="cuda").int()[None]
    queries = _random(1, 1, tokens, HEADS, HEAD)
    first, last = _ints(2), _ints(chunks - 8)
    bytes_each = 2 * kv_heads * chunks * HEAD * 2

    def ours(kept: Tensor) -> Callable[[], object]:
        return lambda: chunk_scores(queries, kept, table, first, last, scale=HEAD**-0.5, chunk=size, most_chunks=chunks)

    inputs = [_random(2, 1, kv_heads, LONG // BLOCK, BLOCK // size, HEAD) for _ in range(max(2, _ROTATED_BYTES // bytes_each))]
    shape = f"{chunks} chunks, {HEADS} heads, {kv_heads} KV heads of {HEAD}, bf16, {tokens} tokens"
    return Case("chunk scores", shape, bytes_each, [ours(kept) for kept in inputs])


def _choice(layers: int = 32, kv_heads: int = 32, count: int = 502, size: int = 8) -> Case:
    """All layers' chunks at once."""
    chunks = LONG // size
    inputs = [torch.randn(1, layers, kv_heads, chunks, device="cuda").softmax(-1) for _ in range(4)]
    first, last = _ints(2), _ints(chunks - 8)

    def ours(scores: Tensor) -> Callable[[], object]:
        return lambda: choose_chunks(scores, count, first, last)

    def theirs(scores: Tensor) -> Callable[[], object]:
        return lambda: scores[..., 2 : chunks - 8].topk(count).indices.sort()

    peers: dict[str, Sequence[Callable[[], object]]] = {"torch.topk, then sort": [theirs(scores) for scores in inputs]}
    moved = layers * kv_heads * (chunks + count) * 4
    return Case(
        "choose chunks", f"{count} of {chunks}, {layers} layers of {kv_heads} heads", moved, [ours(s) for s in inputs], peers
    )
