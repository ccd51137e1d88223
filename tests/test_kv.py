"""The paged store: entries, windows, rollback."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from rowcast.kernels.attention import attend
from rowcast.runtime.kv import PagedKV
from rowcast.runtime.scheduler import Scheduler
from rowcast.runtime.shard import Shard
from rowcast.runtime.spec import AlibiSpec, ModelSpec
from rowcast.runtime.step import SeqStep

BLOCK = 4
SPEC = ModelSpec(
    family="llama",
    vocab_size=10,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=16,
    max_context=64,
    activation="silu",
    gated=True,
    norm="rms",
    norm_eps=1e-5,
    attention_scale=8**-0.5,
    windows=(None, 5),
    embed_size=32,
)


def reference(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, slopes: Tensor | None = None, bias_scale: float | None = None
) -> Tensor:
    """Attention one query and head at a time, in float64."""
    tokens, heads, size = q.shape
    length, groups = k.shape[:2]
    out = torch.zeros(q.shape, dtype=torch.float64)
    for i in range(tokens):
        at = length - tokens + i
        low = 0 if window is None else max(0, at + 1 - window)
        for head in range(heads):
            keys = k[low : at + 1, head * groups // heads].double()
            scores = keys @ q[i, head].double() * size**-0.5
            if slopes is not None:
                positions = torch.arange(low, at + 1)
                if bias_scale is None:
                    scores += slopes[head].double() * (positions - at)
                else:
                    scores += (slopes[head].bfloat16() * positions.bfloat16()).double() * bias_scale
            out[i, head] = scores.softmax(0) @ v[low : at + 1, head * groups // heads].double()
    return out.float()


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("tokens", "length"), [(1, 1), (1, 30), (30, 30), (7, 30)])
@pytest.mark.parametrize("kind", ["plain", "window", "alibi", "falcon", "alibi+window"])
def test_attention_equals_the_definition(
    groups: int, tokens: int, length: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(tokens, 4, 8), torch.randn(length, groups, 8), torch.randn(length, groups, 8)
    window = 6 if "window" in kind else None
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.01]) if kind not in ("plain", "window") else None
    bias_scale = 8**-0.5 if kind == "falcon" else None
    expected = reference(q, k, v, window=window, slopes=slopes, bias_scale=bias_scale)
    for mask_elements in (1 << 23, 90):  # 90: over the queries in blocks
        monkeypatch.setattr("rowcast.kernels.attention.MASK_ELEMENTS", mask_elements)
        found = attend(q, k, v, scale=8**-0.5, window=window, slopes=slopes, absolute_bias_scale=bias_scale)
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


def store(spec: ModelSpec = SPEC, blocks: int = 40) -> PagedKV:
    return PagedKV(spec, Shard(), num_blocks=blocks, block_size=BLOCK, dtype=torch.float32, device=torch.device("cpu"))


def test_ragged_sequences_see_their_own_entries_only() -> None:
    """Random passes over three sequences with random commits and rollbacks, against plain lists of entries."""
    rng, torch_rng = random.Random(1), torch.Generator().manual_seed(1)
    kv = store()
    tables = {s: rng.sample(range(40), 40)[:13] for s in (0,)}
    free = [b for b in range(40) if b not in tables[0]]
    tables |= {1: free[:13], 2: free[13:26]}
    entries: dict[int, list[list[tuple[Tensor, Tensor]]]] = {s: [[], []] for s in tables}  # by sequence and layer
    for _ in range(60):
        chosen = rng.sample(sorted(tables), rng.randint(1, 3))
        steps, rows = [], []
        for seq in chosen:
            start = kv.length(seq)
            count = min(rng.choice([1, 1, 2, 5]), 52 - start)
            if count <= 0:
                kv.rollback(seq, 3)
                for kept_entries in entries[seq]:
                    del kept_entries[3:]
                continue
            rows.append((seq, count))
            steps.append(SeqStep(seq, [0] * count, start, tables[seq], 1, False))
        if not steps:
            continue
        total = sum(count for _, count in rows)
        kv.bind(steps)
        for layer in (0, 1):
            q = torch.randn(total, 4, 8, generator=torch_rng)
            k, v = torch.randn(2, total, 2, 8, generator=torch_rng)
            kv.append(layer, k, v)
            found, at = kv.attend(layer, q), 0
            for seq, count in rows:
                mine = entries[seq][layer]
                mine += [(k[at + i], v[at + i]) for i in range(count)]
                keys, values = (torch.stack(x) for x in zip(*mine, strict=True))
                expected = reference(q[at : at + count], keys, values, window=SPEC.windows[layer])
                torch.testing.assert_close(found[at : at + count], expected, atol=2e-6, rtol=1e-5)
                at += count
        for seq, count in rows:
            kept = rng.randint(0, count)
            kv.commit(seq, kept)
            for layer_entries in entries[seq]:
                del layer_entries[len(layer_entries) - count + kept :]
            assert kv.length(seq) == len(entries[seq][0])


def test_rollback_and_commit_refuse_what_was_never_there() -> None:
    kv = store()
    kv.bind([SeqStep(0, [1, 2, 3], 0, [0], 3, False)])
    kv.commit(0, 2)
    assert (kv.length(0), kv.end(0)) == (2, 3)
    with pytest.raises(ValueError, match="back to 4"):
        kv.rollback(0, 4)
    with pytest.raises(ValueError, match="fewer than 4"):
        kv.commit(0, 4)
    kv.commit(0, 1)  # the third
    assert kv.length(0) == 3
    with pytest.raises(ValueError, match="fewer than 1"):
        kv.commit(0, 1)
    kv.bind([SeqStep(0, [4, 5], 3, [0, 1], 3, False)])
    kv.rollback(0, 0)
    assert kv.length(0) == 0
    with pytest.raises(ValueError, match="fewer than 1"):
        kv.commit(0, 1)
    kv.bind([SeqStep(0, [1], 0, [0], 3, False)])
    kv.free(0)
    kv.free(0)
    with pytest.raises(ValueError, match="fewer than 1"):
        kv.commit(0, 1)
    assert kv.seq_ids == set()


def test_a_rank_takes_its_own_slopes() -> None:
    spec = ModelSpec(**{f: getattr(SPEC, f) for f in SPEC.__dataclass_fields__} | {"alibi": AlibiSpec((0.1, 0.2, 0.3, 0.4))})
    kv = PagedKV(spec, Shard(1, 2), num_blocks=2, block_size=BLOCK, dtype=torch.float32, device=torch.device("cpu"))
    kv.bind([SeqStep(0, [0] * 6, 0, [0, 1], 6, False)])
    q, (k, v) = torch.randn(6, 2, 8), torch.randn(2, 6, 1, 8)
    kv.append(0, k, v)
    torch.testing.assert_close(kv.attend(0, q), reference(q, k, v, slopes=torch.tensor([0.3, 0.4])), atol=2e-6, rtol=1e-5)


def test_blocks_are_handed_out_lowest_first_and_never_twice() -> None:
    pool = Scheduler(num_blocks=6, block_size=4, max_num_seqs=2, max_batch_tokens=8).pool
    first, second = pool.take(2), pool.take(2)
    assert (first, second) == ([0, 1], [2, 3])
    pool.give_back(first)
    assert first == [] and pool.take(3) == [0, 1, 4]
    pool.check()
    with pytest.raises(KeyError):
        pool.give_back([5])
