"""KV in host memory: whatever layers lie there, passes and small views see what they see of a store next to the compute."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_kv_views import BLOCK, CPU, KINDS, PLAIN, SPECS, Model, selected, step
from torch import Tensor
from triton_interpreting import take_arrays_as_bounds

from rowcast.kernels import gpu
from rowcast.kernels.gpu import decoding
from rowcast.offload.host_store import HostStore
from rowcast.offload.outbox import Outbox, _Posted
from rowcast.runtime.kv import HeavyHitters, PagedKV, Policy, Retrieval, SharedKV, Streaming
from rowcast.runtime.kv.hosted import HostedKV
from rowcast.runtime.shard import Shard
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.step import SeqStep

take_arrays_as_bounds()

BLOCKS = 60
KERNELS = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where kernels run, in Triton's interpreter if need be."""
BOTH = [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def stores(
    spec: ModelSpec, away: set[int], *, piece_bytes: int = 1, device: torch.device = CPU, summaries: bool = True
) -> tuple[PagedKV, HostedKV]:
    """One next to the compute, one of which some layers are away, a head at a time."""
    how = {"num_blocks": BLOCKS, "block_size": BLOCK, "dtype": torch.float32, "keep_queries": 8}
    kinds = KINDS if summaries else ()
    here = PagedKV(spec, Shard(), device=device, summaries=kinds, **how)  # type: ignore[arg-type]
    there = HostedKV(
        spec,
        Shard(),
        device=device,
        summaries=kinds,
        away=away,
        store=HostStore(device),
        piece_bytes=piece_bytes,
        **how,  # type: ignore[arg-type]
    )
    return here, there


@pytest.mark.parametrize("device", BOTH)
@pytest.mark.parametrize("away", [{0}, {1}, {0, 1}])
@pytest.mark.parametrize("kind", SPECS)
def test_passes_see_the_same(kind: str, away: set[int], device: torch.device) -> None:
    """Three sequences with scattered blocks, in random passes, commits, rollbacks and freeings."""
    rng, generator, spec = random.Random(4), torch.Generator().manual_seed(4), SPECS[kind]
    here, there = stores(spec, away, piece_bytes=rng.choice([1, 1 << 20]), device=device)
    blocks = rng.sample(range(BLOCKS), BLOCKS)
    tables = {seq: sorted(blocks[seq * 20 : seq * 20 + 20]) if seq == 2 else blocks[seq * 20 : seq * 20 + 20] for seq in range(3)}
    for _ in range(24):
        steps = []
        for seq in rng.sample(range(3), rng.randint(1, 3)):
            start = rng.randint(here.length(seq), here.end(seq))
            tokens = min(rng.choice([1, 1, 3, 20]), 20 * BLOCK - start)
            if tokens:
                steps.append(SeqStep(seq, [0] * tokens, start, tables[seq], 1, False))
        if steps:
            total = sum(len(each.tokens) for each in steps)
            here.bind(steps)
            there.bind(steps)
            for layer in range(spec.num_layers):
                q = torch.randn(total, spec.num_heads, 8, generator=generator).to(device)
                k, v = torch.randn(2, total, spec.num_kv_heads, 8, generator=generator).to(device)
                for kv in (here, there):
                    kv.append(layer, k.clone(), v.clone())
                close(there.attend(layer, q), here.attend(layer, q))
                if spec.num_kv_heads < 4:
                    some = torch.tensor([0, 2], device=device)
                    here.append(layer, k, v)
                    there.append(layer, k, v)
                    close(there.attend(layer, q, some), here.attend(layer, q, some))
        for seq in range(3):
            count, action = rng.randint(0, here.end(seq) - here.length(seq)), rng.random()
            for kv in (here, there):
                if seq in kv.seq_ids:
                    kv.commit(seq, count)
                    if action < 0.1:
                        kv.free(seq)
                    elif action < 0.3:
                        kv.rollback(seq, kv.length(seq) * 2 // 3)
            if here.length(seq):
                entries = here.table(seq)
                assert torch.equal(there.keys_of(entries), here.keys_of(entries))
                assert torch.equal(there.values_of(entries, slice(1, None)), here.values_of(entries, slice(1, None)))
                for summary in KINDS:
                    for mine, other in zip(there.summary(seq, summary), here.summary(seq, summary), strict=True):
                        assert torch.equal(mine, other)
    there._ring.check()


POLICIES: dict[str, Callable[[], Policy]] = {
    "bounds": lambda: Retrieval("bounds", 4),
    "mean": lambda: Retrieval("mean", 4),
    "streaming": Streaming,
    "eviction": HeavyHitters,
}


class OnItsWay(Outbox):
    """As on a GPU: nothing is in place before somebody waits for it."""

    def post(self, content: Tensor, put: Callable[[Tensor], None]) -> None:
        self._posted.append(_Posted(content, content.cpu().clone(), put, SimpleNamespace(synchronize=lambda: None)))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("away", [{0}, {1}, {0, 1}])
def test_small_views_copy_the_same(away: set[int], policy: str) -> None:
    """What is chosen and copied of entries in host memory; verification, as passes over several tokens."""
    model, rng = Model(PLAIN), random.Random(6)
    full = stores(PLAIN, away, summaries=policy in ("bounds", "mean"))
    full[1]._outbox = OnItsWay(full[1].store, 0)
    views = [selected(kv, POLICIES[policy](), budget=32, refresh=2) for kv in full]
    ids: list[int] = []
    for turn in range(14):
        tokens = [rng.randrange(3) for _ in range(rng.choice([1, 4, 17]) if len(ids) < 70 else 1)]
        for kv in full:
            model.run(kv, [step(tokens, len(ids))])
            kv.commit(0, len(tokens))
        ids += tokens
        if turn % 5 == 4:
            ids = ids[: len(ids) * 3 // 4]
            for kv in full:
                kv.rollback(0, len(ids))
        for view in views:
            view.admit(0)
        for _ in range(2):
            start = views[0].end(0)
            found, expected = (model.run(view, [step([1], start)]) for view in reversed(views))
            for mine, other in zip(found, expected, strict=True):
                close(mine, other)
        assert views[0].bytes_read(0) == views[1].bytes_read(0) and views[0].refreshes(0) == views[1].refreshes(0)


@pytest.mark.parametrize("kind", ["plain", "falcon"])
def test_the_kernels_read_the_buffers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's flash-decoding over entries that lie in a buffer head by head; without one in Triton's interpreter."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(gpu, "interpreted", True)
    model = Model(SPECS[kind], device=KERNELS)
    full = stores(SPECS[kind], {0, 1}, piece_bytes=1 if kind == "plain" else 1 << 20, device=KERNELS, summaries=False)
    for start, count in ((0, 13), (13, 1), (14, 3), (17, 21)):
        found, expected = (model.run(kv, [step([1] * count, start, list(range(30, 55)))]) for kv in reversed(full))
        for mine, other in zip(found, expected, strict=True):
            close(mine, other)
        for kv in full:
            kv.commit(0, count)


def test_where_entries_lie_is_written_before_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that overlaps what comes before it reads that before it waits."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(gpu, "interpreted", True)
    model = Model(SPECS["plain"], device=KERNELS)
    _, away = stores(SPECS["plain"], {0, 1}, device=KERNELS, summaries=False)
    written: list[Tensor] = []
    real = decoding.decode

    def decode(q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, starts: Tensor, **options: Any) -> Tensor:
        written.extend((tables, starts))
        assert not options.get("overlap", True) or all(any(each is known for known in before) for each in (tables, starts))
        return real(q, keys, values, tables, starts, **options)

    bind = away.bind
    before: list[Tensor] = []

    def bound(steps: Any) -> None:
        bind(steps)
        before[:] = [each for parts in away._decoded for part in parts for each in (part.table, part.starts)]

    monkeypatch.setattr(decoding, "decode", decode)
    monkeypatch.setattr(away, "bind", bound)
    model.run(away, [step([1] * 21, 0, list(range(30, 55)))])
    assert len(before) == 4 and len(written) > 4


def test_a_view_of_all_entries_lends_the_store() -> None:
    model = Model(PLAIN)
    here, there = stores(PLAIN, {0, 1}, summaries=False)
    shared = [SharedKV(here), SharedKV(there)]
    for kv in (here, there):
        model.run(kv, [step([1, 2] * 9, 0)])
        kv.commit(0, 18)
    for view in shared:
        view.admit(0)
    for start in (18, 19, 20):
        for mine, other in zip(model.run(shared[1], [step([2], start)]), model.run(shared[0], [step([2], start)]), strict=True):
            close(mine, other)
    for mine, other in zip(model.run(there, [step([2, 2, 2, 1], 18)]), model.run(here, [step([2, 2, 2, 1], 18)]), strict=True):
        close(mine, other)
    assert shared[0].serves_device and not shared[1].serves_device


@pytest.mark.parametrize("kind", SPECS)
def test_layer_by_layer(kind: str) -> None:
    """A pass over several sequences in parts of each layer: attention, queries, entries are those of the pass in one; what was there
    before crosses once."""
    spec, rng, generator = SPECS[kind], random.Random(9), torch.Generator().manual_seed(9)
    for turn in range(6):
        here, there = stores(spec, {0, 1} if turn % 2 else {1}, piece_bytes=1 << 20 if turn % 3 else 1, summaries=False)
        there._part_tokens = rng.choice([9, 10, 13, 30])
        few = len(there._groups) <= 2
        blocks = rng.sample(range(BLOCKS), BLOCKS)
        tables = {seq: blocks[seq * 20 : seq * 20 + 20] for seq in range(3)}
        before = {seq: rng.randrange(1, 30) for seq in range(3)}
        counts = [dict.fromkeys(range(3), 0), {seq: rng.choice([1, 5, 12, 40]) for seq in range(3)}]
        for starts, tokens in ((counts[0], before), (before, counts[1])):
            steps = [SeqStep(seq, [0] * tokens[seq], starts[seq], tables[seq], 1, False) for seq in range(3)]
            total = sum(tokens.values())
            here.bind(steps)
            there.counts()
            there.bind(steps)
            parts = there.parts()
            assert [t for part in parts for s in part for t in range(s.start, s.start + len(s.tokens))] == [
                t for s in steps for t in range(s.start, s.start + len(s.tokens))
            ]
            assert len(parts) == 1 or few
            for layer in range(spec.num_layers):
                q = torch.randn(total, spec.num_heads, 8, generator=generator)
                k, v = torch.randn(2, total, spec.num_kv_heads, 8, generator=generator)
                here.append(layer, k, v)
                found, first = [], 0
                for number, part in enumerate(parts):
                    rows = slice(first, first + sum(len(step.tokens) for step in part))
                    there.part(number)
                    there.append(layer, k[rows], v[rows])
                    found.append(there.attend(layer, q[rows]))
                    first = rows.stop
                close(torch.cat(found), here.attend(layer, q))
            crossed = 2 * spec.num_kv_heads * 8 * 4 * sum(starts.values()) * len(there._away)
            assert there.counts().bytes == crossed
            for seq in range(3):
                for kv in (here, there):
                    kv.commit(seq, tokens[seq])
                mine, other = there.queries(seq, 8), here.queries(seq, 8)
                assert mine is not None and other is not None and torch.equal(mine, other)
                assert torch.equal(there.keys_of(here.table(seq)), here.keys_of(here.table(seq)))


def test_what_crosses_is_what_a_pass_sees() -> None:
    """Each entry before the pass's tokens once, head group by head group, keys and values of the layers that are away."""
    model = Model(PLAIN)
    _, there = stores(PLAIN, {1}, summaries=False)
    model.run(there, [step([0] * 21, 0)])
    there.commit(0, 21)
    there.counts()
    model.run(there, [step([0], 21)])
    counts = there.counts()
    assert counts.pieces == counts.taken == PLAIN.num_kv_heads
    assert counts.bytes == 2 * PLAIN.num_kv_heads * 21 * 8 * 4
    assert there.bytes - there._ring.bytes == stores(PLAIN, {0}, summaries=False)[0].bytes // 2
    assert there._outbox.bytes == 22 * 2 * PLAIN.num_kv_heads * 8 * 4


def test_all_memory_is_given_back() -> None:
    _, there = stores(replace(PLAIN, num_kv_heads=4), {0, 1})
    held = there.store.bytes
    assert held == 2 * 2 * 4 * BLOCKS * BLOCK * 8 * 4
    there.close()
    assert there.store.bytes == 0
