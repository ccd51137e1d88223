"""What each view shows after any history of proposals, commits and rollbacks, and that nothing of rejected tokens is left."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from test_kv import SPEC
from torch import Tensor

from rowcast.errors import UserError
from rowcast.kernels.attention import attend_entries
from rowcast.runtime.kv import (
    HeavyHitters,
    PagedKV,
    Policy,
    Retrieval,
    SelectedKV,
    Streaming,
    StreamingKV,
    Summary,
    choice_bytes,
    sizes,
    why_not_streaming,
)
from rowcast.runtime.ladder.memory import selected_bytes, streaming_bytes
from rowcast.runtime.ladder.spec import Rung
from rowcast.runtime.protocols import KVView
from rowcast.runtime.rope import Rope, apply_rope
from rowcast.runtime.shard import Shard
from rowcast.runtime.spec import AlibiSpec, ModelSpec, RopeSpec
from rowcast.runtime.step import SeqStep

BLOCK, VOCABULARY, LAYERS = 8, 5, 2
CPU = torch.device("cpu")
KINDS = (Summary("mean", 4), Summary("bounds", 4))
ALIBI = AlibiSpec((0.5, 0.25, 0.1, 0.01))
PLAIN = replace(SPEC, windows=(None, None))
SPECS = {
    "plain": PLAIN,
    "window": replace(SPEC, windows=(None, 13)),
    "alibi": replace(PLAIN, alibi=ALIBI),
    "falcon": replace(SPEC, windows=(30, None), alibi=replace(ALIBI, scaled=True, bfloat16_bias=True)),
    "one KV head": replace(PLAIN, num_kv_heads=1),
    "as many KV heads": replace(SPEC, num_kv_heads=4),
}


class Model:
    """Queries, keys and values as functions of layer, token and position: what a deterministic model would compute."""

    def __init__(self, spec: ModelSpec, seed: int = 0, device: torch.device = CPU) -> None:
        self.spec = spec
        self.device = device
        generator = torch.Generator().manual_seed(seed)
        length = 200
        shape = (LAYERS, VOCABULARY, length)
        self.queries = torch.randn(*shape, spec.num_heads, 8, generator=generator) * 2
        self.raw_keys = torch.randn(*shape, spec.num_kv_heads, 8, generator=generator)
        self.values = torch.randn(*shape, spec.num_kv_heads, 8, generator=generator)
        self.keys = self.raw_keys
        if spec.rope is not None:
            cos, sin = Rope(spec.rope, 8, CPU).cos_sin(torch.arange(length), torch.ones(length, dtype=torch.int64))
            self.keys = apply_rope(self.raw_keys.flatten(0, 1), cos, sin).view(self.raw_keys.shape)

    def rows(self, table: Tensor, layer: int, tokens: Sequence[int], start: int) -> Tensor:
        return table[layer, list(tokens), range(start, start + len(tokens))]

    def run(self, view: KVView, steps: Sequence[SeqStep]) -> list[Tensor]:
        """One pass: attention's output of each layer, [T, H, d]."""
        view.bind(steps)
        out = []
        for layer in range(LAYERS):
            q, k, v = (
                torch.cat([self.rows(table, layer, s.tokens, s.start) for s in steps]).to(self.device)
                for table in (self.queries, self.keys, self.values)
            )
            view.append(layer, k, v)
            out.append(view.attend(layer, q))
        return out


def definition(
    spec: ModelSpec,
    layer: int,
    q: Tensor,
    at: int,
    positions: Sequence[Sequence[int]],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
) -> Tensor:
    """One token's attention in float64 over the entries that each KV head shows: q [H, d], keys and values [n, d] -> [H, d]."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    for head in range(q.shape[0]):
        group = head * len(keys) // q.shape[0]
        window = spec.windows[layer]
        visible = [i for i, p in enumerate(positions[group]) if p <= at and (window is None or p > at - window)]
        scores = keys[group][visible].double() @ q[head].double() * spec.attention_scale
        if spec.alibi is not None:
            where, slope = torch.tensor(positions[group])[visible], torch.tensor(spec.alibi.slopes[head])
            if spec.alibi.bfloat16_bias:
                scores += (slope.bfloat16() * where.bfloat16()).double() * spec.attention_scale
            else:
                scores += slope.double() * (where - at)
        out[head] = scores.softmax(0) @ values[group][visible].double()
    return out.float()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def paged(spec: ModelSpec, *, keep_queries: int = 8, blocks: int = 60) -> PagedKV:
    return PagedKV(
        spec,
        Shard(),
        num_blocks=blocks,
        block_size=BLOCK,
        dtype=torch.float32,
        device=CPU,
        keep_queries=keep_queries,
        summaries=KINDS,
    )


def step(tokens: Iterable[int], start: int, blocks: list[int] | None = None, seq: int = 0) -> SeqStep:
    return SeqStep(seq, list(tokens), start, blocks or list(range(25)), 1, False)


@dataclass
class History:
    """Random rounds over one sequence: the paged store commits what a coin accepts."""

    model: Model
    full: PagedKV
    seed: int

    def __post_init__(self) -> None:
        self.coins = random.Random(self.seed)
        self.sketch = Model(self.model.spec, seed=1)  # what a rung that does not see everything computes
        self.ids: list[int] = []
        self.table = self.coins.sample(range(60), 25)

    def tokens(self, count: int) -> list[int]:
        return [self.coins.randrange(VOCABULARY) for _ in range(count)]

    def prefill(self, count: int) -> None:
        ids = self.tokens(count)
        self.model.run(self.full, [step(ids, len(self.ids), self.table)])
        self.full.commit(0, count)
        self.ids += ids

    def draft(self, view: KVView) -> list[int]:
        """Proposals over several passes of a view, some of them taken back; the first token is the pending one."""
        drafted = self.tokens(1)
        for _ in range(self.coins.randint(1, 3)):
            at = view.end(0) - len(self.ids)
            drafted = drafted[: at + 1] + self.tokens(max(0, at + 1 - len(drafted)) + self.coins.randint(0, 2))
            model = self.model if view is self.full else self.sketch
            model.run(view, [step(drafted[at:], len(self.ids) + at, self.table)])
            view.rollback(0, self.coins.randint(len(self.ids) + 1, view.end(0)))
        return drafted

    def verify(self, drafted: list[int]) -> int:
        """The full pass; how many tokens were committed."""
        self.model.run(self.full, [step(drafted, len(self.ids), self.table)])
        accepted = self.coins.randint(1, len(drafted))
        self.full.commit(0, accepted)
        self.full.rollback(0, len(self.ids) + accepted)
        self.ids += drafted[:accepted]
        return accepted


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("kind", SPECS)
def test_attention_over_entries_equals_the_definition(groups: int, tokens: int, kind: str) -> None:
    spec = replace(SPECS[kind], windows=(13, None))
    torch.manual_seed(0)
    q, k, v = torch.randn(tokens, 4, 8), torch.randn(groups, 20, 8), torch.randn(groups, 20, 8)
    own = list(range(40, 40 + tokens))
    positions = [random.Random(g).sample(range(40), 20 - tokens) + own for g in range(groups)]
    slopes = None if spec.alibi is None else torch.tensor(spec.alibi.slopes)
    bias_scale = spec.attention_scale if spec.alibi is not None and spec.alibi.bfloat16_bias else None
    for layer, window in enumerate(spec.windows):
        found = attend_entries(
            q,
            k,
            v,
            scale=spec.attention_scale,
            key_positions=torch.tensor(positions),
            query_positions=torch.tensor(own),
            window=window,
            slopes=slopes,
            absolute_bias_scale=bias_scale,
        )
        for i, at in enumerate(own):
            close(found[i], definition(spec, layer, q[i], at, positions, list(k), list(v)))


@pytest.mark.parametrize("seed", range(4))
def test_the_full_store_equals_a_fresh_prefill(seed: int) -> None:
    """Entries and summaries, bit for bit, after proposals over several passes, rejections and a preemption."""
    model = Model(PLAIN)
    history = History(model, paged(PLAIN), seed)
    for turn in range(30):
        if turn == 15:
            kept = history.coins.randint(1, len(history.ids))
            history.full.rollback(0, kept)
            del history.ids[kept:]
        drafted = history.draft(history.full)
        if history.coins.random() < 0.5:
            history.verify(drafted)
        else:  # commit what is there without another pass
            count = history.coins.randint(0, history.full.end(0) - len(history.ids))
            history.full.commit(0, count)
            history.ids += drafted[:count]
            history.full.rollback(0, len(history.ids))
        assert history.full.length(0) == len(history.ids)
    length, full, fresh = len(history.ids), history.full, paged(PLAIN)
    model.run(fresh, [step(history.ids, 0)])
    fresh.commit(0, length)
    here, there = full.table(0), fresh.table(0)
    assert full.keys_of(here).shape[:2] == (LAYERS * 2, length)
    assert torch.equal(full.keys_of(here), fresh.keys_of(there)) and torch.equal(full.values_of(here), fresh.values_of(there))
    chunks = torch.stack([model.rows(model.keys, layer, history.ids, 0) for layer in range(LAYERS)])
    chunks = chunks[:, : length // 4 * 4].unflatten(1, (-1, 4)).permute(0, 3, 1, 2, 4)  # type: ignore[no-untyped-call]
    for kind, plain in ((KINDS[0], (chunks.mean(3),)), (KINDS[1], (chunks.amin(3), chunks.amax(3)))):
        for mine, other, expected in zip(full.summary(0, kind), fresh.summary(0, kind), plain, strict=True):
            assert torch.equal(mine, other)
            close(mine, expected.flatten(0, 1))


def test_queries_are_those_of_committed_tokens_of_the_last_pass() -> None:
    model, kv = Model(PLAIN), paged(PLAIN, keep_queries=4)

    def expected(ids: list[int], start: int) -> Tensor:
        return torch.stack([model.rows(model.queries, layer, ids, start) for layer in range(LAYERS)])

    ids = [0, 1, 2, 3, 4, 0, 1]
    model.run(kv, [step(ids, 0), step([1, 1], 0, [30], seq=1)])
    assert kv.queries(0, 4) is None  # nothing is committed
    kv.commit(0, 7)
    kv.commit(1, 1)
    for seq, count, wanted, start in ((0, 4, ids[3:], 3), (0, 2, ids[5:], 5), (1, 4, [1], 0)):
        found = kv.queries(seq, count)
        assert found is not None and torch.equal(found, expected(wanted, start))
    model.run(kv, [step([2, 3, 4], 7)])
    assert kv.queries(0, 4) is None and kv.queries(1, 4) is not None
    kv.commit(0, 2)
    kv.rollback(0, 9)
    found = kv.queries(0, 4)
    assert found is not None and torch.equal(found, expected([2, 3], 7))
    kv.rollback(0, 8)
    found = kv.queries(0, 4)
    assert found is not None and torch.equal(found, expected([2], 7))
    kv.rollback(0, 7)
    assert kv.queries(0, 4) is None
    kv.free(1)
    assert kv.queries(1, 4) is None
    assert paged(PLAIN, keep_queries=0).queries(0, 4) is None


def selected(full: PagedKV, policy: Policy, *, budget: int = 32, recent: int = 6, refresh: int = 1, slots: int = 1) -> SelectedKV:
    view = SelectedKV(full, policy, budget=budget, sinks=3, recent=recent, refresh=refresh, slots=slots, room=12)
    assert view.admit(0)
    return view


def by_definition(model: Model, ids: list[int], queries: Tensor, score: str, budget: int, recent: int) -> list[list[list[int]]]:
    """Positions shown by retrieval with 4 sinks and chunks of 4, [layers][K], one query, head and chunk at a time."""
    spec, length, share = model.spec, len(ids), model.spec.num_heads // model.spec.num_kv_heads
    first, last = 1, (length - recent) // 4
    count = (budget - 4 - recent - 3) // 4
    shown = []
    for layer in range(LAYERS):
        keys, heads = model.rows(model.keys, layer, ids, 0).double(), []
        for group in range(spec.num_kv_heads):
            total = torch.zeros(last - first, dtype=torch.float64)
            own = [(i, head) for i in range(queries.shape[1]) for head in range(group * share, (group + 1) * share)]
            for i, head in own:
                q, scores = queries[layer, i, head].double(), []
                for chunk in range(first, last):
                    members = keys[chunk * 4 : chunk * 4 + 4, group]
                    if score == "mean":
                        scores.append(q @ members.mean(0))
                    else:
                        scores.append(torch.maximum(q * members.amin(0), q * members.amax(0)).sum())
                weights = torch.stack(scores) * spec.attention_scale
                ends = torch.arange(first, last) * 4 + 3
                if spec.alibi is not None:
                    weights += spec.alibi.slopes[head] * ends
                window = spec.windows[layer]
                if window is not None:
                    weights[ends <= length - queries.shape[1] + i - window] = -1e9
                total += weights.softmax(0)
            chosen = [first + int(c) for c in total.argsort(descending=True)[:count]]
            heads.append([*range(4), *(c * 4 + i for c in chosen for i in range(4)), *range(last * 4, length)])
        shown.append(heads)
    return shown


def check_pass(model: Model, out: list[Tensor], ids: list[int], start: int, shown: list[list[list[int]]]) -> None:
    """The outputs of tokens ids[start:] against the definition over entries [layers][K] and the tokens' own."""
    groups = range(model.spec.num_kv_heads)
    for layer in range(LAYERS):
        keys, values = (model.rows(table, layer, ids, 0) for table in (model.keys, model.values))
        positions = [[*shown[layer][g], *range(start, len(ids))] for g in groups]
        for i, q in enumerate(model.rows(model.queries, layer, ids[start:], start)):
            expected = definition(
                model.spec,
                layer,
                q,
                start + i,
                positions,
                [keys[positions[g], g] for g in groups],
                [values[positions[g], g] for g in groups],
            )
            close(out[layer][i], expected)


@pytest.mark.parametrize("score", ["mean", "bounds"])
@pytest.mark.parametrize("kind", ["plain", "window", "alibi", "one KV head", "as many KV heads"])
def test_retrieval_shows_the_chunks_of_the_definition(score: str, kind: str) -> None:
    model = Model(SPECS[kind])
    history = History(model, paged(model.spec), seed=3)
    view = selected(history.full, Retrieval("mean" if score == "mean" else "bounds", 4))
    history.prefill(90)
    for _ in range(8):
        queries = history.full.queries(0, 8)
        assert queries is not None
        shown = by_definition(model, history.ids, queries, score, 32, 6)
        pending = history.tokens(4)
        for first, last in ((0, 1), (1, 4), (2, 3)):  # over several passes, the last one over one that was rejected
            drafted = pending[:last]
            out = model.run(view, [step(drafted[first:], len(history.ids) + first)])
            own = [[[*entries, *range(len(history.ids), len(history.ids) + first)] for entries in heads] for heads in shown]
            check_pass(model, out, history.ids + drafted, len(history.ids) + first, own)
        history.verify(pending)


POLICIES: dict[str, Callable[[], Policy]] = {
    "mean": lambda: Retrieval("mean", 4),
    "bounds": lambda: Retrieval("bounds", 4),
    "streaming": Streaming,
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", SPECS)
def test_a_selected_view_depends_on_its_parent_only(kind: str, policy: str) -> None:
    """After any history it equals one made fresh; what proposals there were, and over how many passes, left no trace."""
    model = Model(SPECS[kind])
    history = History(model, paged(model.spec), seed=1)
    view = selected(history.full, POLICIES[policy]())
    history.prefill(20)  # less than the budget, so it is outgrown on the way
    for turn in range(30):
        if turn == 20:
            history.full.rollback(0, 2)
            del history.ids[2:]
            history.prefill(28)
        drafted = history.draft(view)
        history.verify(drafted)
        assert view.length(0) == view.end(0) == len(history.ids)
        view.commit(0, 0)
        probe = [step(history.tokens(3), len(history.ids), history.table)]
        fresh = selected(history.full, POLICIES[policy]())
        for mine, other in zip(model.run(view, probe), model.run(fresh, probe), strict=True):
            close(mine, other)
        view.rollback(0, len(history.ids))


@pytest.mark.parametrize("kind", SPECS)
def test_streaming_over_the_full_store_is_sinks_and_recents(kind: str) -> None:
    model = Model(SPECS[kind])
    history = History(model, paged(model.spec), seed=2)
    view = selected(history.full, Streaming())
    for _ in range(4):
        history.prefill(23)
        pending, length = history.tokens(3), len(history.ids)
        shown = [*range(3), *range(length - 29, length)] if length > 32 else [*range(length)]
        out = model.run(view, [step(pending, length)])
        check_pass(model, out, history.ids + pending, length, [[shown] * model.spec.num_kv_heads] * LAYERS)
    assert view.refreshes(0) == 0


@pytest.mark.parametrize("policy", [*POLICIES, "heavy hitters"])
@pytest.mark.parametrize("kind", SPECS)
def test_a_budget_larger_than_the_sequence_is_full_attention(kind: str, policy: str) -> None:
    model = Model(SPECS[kind])
    history = History(model, paged(model.spec), seed=4)
    view = selected(history.full, POLICIES.get(policy, HeavyHitters)(), budget=100)
    history.prefill(60)
    for _ in range(8):
        drafted = history.tokens(4)
        probe = [step(drafted, len(history.ids), history.table)]
        for mine, full in zip(model.run(view, probe), model.run(history.full, probe), strict=True):
            close(mine, full)
        history.verify(drafted)
    assert view.refreshes(0) == 0


def test_refreshes_come_at_every_nth_change() -> None:
    model = Model(PLAIN)
    counts = {}
    for refresh in (0, 1, 3):
        history = History(model, paged(PLAIN), seed=5)
        view = selected(history.full, Retrieval("bounds", 4), refresh=refresh)
        history.prefill(50)
        for _ in range(9):
            history.verify(history.draft(view))
        counts[refresh] = view.refreshes(0)
    assert counts == {0: 1, 1: 9, 3: 3}


def test_without_queries_a_view_shows_the_recent_window_and_keeps_its_choice() -> None:
    model = Model(PLAIN)
    history = History(model, paged(PLAIN, keep_queries=0), seed=5)
    view, plain = selected(history.full, Retrieval("bounds", 4)), selected(history.full, Streaming())
    history.prefill(70)
    probe = [step([1, 2], 70)]
    assert view.refreshes(0) == 0
    # Sinks are rounded up to a chunk of 4, of 3 in the other view: one recent entry makes way.
    assert view.bytes_read(0) <= plain.bytes_read(0)
    shown = [[[*range(4), *range(70 - 28, 70)]] * 2] * LAYERS
    check_pass(model, model.run(view, probe), [*history.ids, 1, 2], 70, shown)


def test_heavy_hitters_keep_most_mass_and_never_take_an_evicted_entry_back() -> None:
    model = Model(PLAIN)
    history = History(model, paged(PLAIN), seed=6)
    policy = HeavyHitters()
    history.prefill(60)
    held: list[list[dict[int, float]]] = [[{}, {}] for _ in range(LAYERS)]  # mass by layer, KV head and position
    before = 0
    for _ in range(12):
        length = len(history.ids)
        queries = history.full.queries(0, 8)
        assert queries is not None
        span = range(3, length - 6)
        choice = policy.select(history.full, 0, queries, span, 10)
        assert choice is not None
        found = choice.positions
        for layer in range(LAYERS):
            keys = model.rows(model.keys, layer, history.ids, 0).double()
            for group in (0, 1):
                mass = held[layer][group]
                mass |= dict.fromkeys(range(before, length), 0.0)
                positions = list(mass)
                for i, token in enumerate(range(length - queries.shape[1], length)):
                    past = [p for p in positions if p <= token]
                    for q in queries[layer, i, group * 2 : group * 2 + 2].double():
                        shares = (keys[past, group] @ q * PLAIN.attention_scale).softmax(0)
                        for p, share in zip(past, shares.tolist(), strict=True):
                            mass[p] += share
                best = sorted((p for p in mass if p in span), key=lambda p: -mass[p])[:10]
                assert found[layer, group].tolist() == sorted(best)
                for p in [p for p in mass if p in span and p not in best]:
                    del mass[p]
        before = length
        history.verify(history.tokens(4))
    policy.free(0)
    policy.free(0)


@pytest.mark.parametrize("policy", [*POLICIES, "heavy hitters"])
@pytest.mark.parametrize("kind", SPECS)
def test_views_take_what_a_plan_counts(kind: str, policy: str) -> None:
    model, policies = Model(SPECS[kind]), POLICIES | {"heavy hitters": HeavyHitters}
    history = History(model, paged(model.spec), seed=8)
    chosen = policies[policy]()
    view = SelectedKV(history.full, chosen, budget=32, sinks=4, recent=6, slots=2, room=7)
    assert view.bytes == 2 * selected_bytes(model.spec, chosen, 32, ahead=6, width=4)
    history.prefill(70)
    assert view.admit(0)
    model.run(view, [step([1], 70)])
    if isinstance(chosen, HeavyHitters):
        held = chosen._held[0]
        assert held.positions.nbytes + held.mass.nbytes == LAYERS * model.spec.num_kv_heads * 32 * chosen.held_bytes
    stored = StreamingKV(model.spec, Shard(), budget=40, sinks=3, slots=2, room=7, dtype=torch.float32, device=CPU)
    assert stored.bytes == 2 * streaming_bytes(model.spec, 40, 3, ahead=6, width=4)


def peak_bytes(work: Callable[[], object]) -> int:
    """Most memory that `work` has at any time beyond what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "window", "alibi"])
@pytest.mark.parametrize("policy", [lambda: Retrieval("mean", 4), lambda: Retrieval("bounds", 4), HeavyHitters])
def test_a_choice_stays_within_its_work_space(
    policy: Callable[[], Policy], kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long sequence in scattered blocks; a head at a time or all at once chooses the same."""
    spec, length, queries, budget = replace(SPECS[kind], head_dim=16), 6000, 8, 600
    torch.manual_seed(0)
    full = PagedKV(
        spec,
        Shard(),
        num_blocks=750,
        block_size=8,
        dtype=dtype,
        device=CPU,
        keep_queries=queries,
        summaries=[Summary("mean", 4), Summary("bounds", 4)],
    )
    blocks = random.Random(0).sample(range(750), 750)
    for start, count in ((0, length - queries), (length - queries, queries)):
        full.bind([step([0] * count, start, blocks)])
        for layer in range(LAYERS):
            full.append(layer, *torch.randn(2, count, spec.num_kv_heads, 16).to(dtype))
            if count == queries:
                full.attend(layer, torch.randn(count, spec.num_heads, 16).to(dtype))
        full.commit(0, count)
    shown = []
    for work_bytes in (1, 1 << 30):
        monkeypatch.setattr(sizes, "WORK_BYTES", work_bytes)
        chosen = policy()
        view = SelectedKV(full, chosen, budget=budget, slots=1, room=3)
        assert view.admit(0)
        counted = choice_bytes(chosen, spec, budget, length, queries, dtype.itemsize) + budget * chosen.held_bytes * 4
        peak = peak_bytes(lambda view=view: view.bind([step([1], length)]))  # type: ignore[misc]
        assert counted // 4 < peak <= counted, (peak, counted)
        shown.append(view)
    assert shown[0].refreshes(0) == 1
    for mine, other in zip(*((view._keys, view._values) for view in shown), strict=True):
        assert torch.equal(mine[..., : shown[0]._shown[0].entries, :], other[..., : shown[0]._shown[0].entries, :])


def test_a_pass_after_a_change_has_read_what_was_copied() -> None:
    """Once: summaries or keys that were looked at, and entries out of the store and into the view."""
    model = Model(PLAIN)
    heads, entry = LAYERS * 2, 8 * 4
    # Of 90 entries, chunks 1 .. 20 of 4 are between the sinks and the last 6.
    for policy, looked_at in ((Streaming(), 0), (Retrieval("bounds", 4), 2 * 20), (HeavyHitters(), 90)):
        history = History(model, paged(PLAIN), seed=9)
        history.prefill(90)
        view = selected(history.full, policy)
        model.run(view, [step([1], 90)])
        shown = view._shown[0].entries
        attended = heads * (shown + 1) * 2 * entry
        assert view.bytes_read(0) == attended + heads * (looked_at + 4 * shown) * entry
        model.run(view, [step([1], 91)])
        assert view.bytes_read(0) == attended + heads * 2 * entry


def test_slots_are_given_and_taken_back() -> None:
    model = Model(PLAIN)
    full = paged(PLAIN)
    views: list[SelectedKV | StreamingKV] = [
        SelectedKV(full, Streaming(), budget=32, sinks=3, recent=6, slots=2, room=4),
        StreamingKV(PLAIN, Shard(), budget=40, sinks=3, stride=4, slots=2, room=4, dtype=torch.float32, device=CPU),
    ]
    model.run(full, [step([1] * 8, 0, [s], seq=s) for s in range(3)])
    for view in views:
        assert [view.admit(s) for s in (0, 1, 1, 2)] == [True, True, True, False]
        assert view.seq_ids == {0, 1} and view.bytes > 0
        view.free(0)
        view.free(7)
        assert view.admit(2) and not view.admit(0)
        assert view.seq_ids == {1, 2}


def test_what_cannot_be_rolled_back_is_refused() -> None:
    model = Model(PLAIN)
    history = History(model, paged(PLAIN), seed=0)
    view = selected(history.full, Streaming())
    history.prefill(10)
    model.run(view, [step([1, 2], 10)])
    view.rollback(0, 11)
    for length in (9, 12):
        with pytest.raises(ValueError, match=f"back to {length}"):
            view.rollback(0, length)


@pytest.mark.parametrize(("budget", "works"), [(16, False), (17, True)])
def test_a_budget_without_a_place_for_a_chunk_is_refused(budget: int, works: bool) -> None:
    full = paged(PLAIN)
    text = f"self:kv={budget},chunk=4,sinks=3,recent=6"
    if works:
        selected(full, Retrieval("mean", 4), budget=budget)
        assert Rung.parse(text).kv == budget
        return
    with pytest.raises(AssertionError, match="nothing to choose"):
        selected(full, Retrieval("mean", 4), budget=budget)
    with pytest.raises(UserError, match="= 17; raise kv"):
        Rung.parse(text)


def test_a_chunk_has_to_divide_a_block() -> None:
    with pytest.raises(UserError, match=r"chunk=3 does not divide a KV block of 8 tokens: use one of \[1, 2, 4, 8\]"):
        PagedKV(PLAIN, Shard(), num_blocks=1, block_size=8, dtype=torch.float32, device=CPU, summaries=[Summary("mean", 3)])


# A draft model's own streaming store.

SINKS, STRIDE, BUDGET, ROOM = 3, 4, 20, 6
ROPES = {
    "rope": replace(PLAIN, rope=RopeSpec(100.0)),
    "yarn": replace(SPECS["window"], rope=RopeSpec(100.0, "yarn", 4.0, 32, attention_factor=1.2)),
}
STREAMED = SPECS | ROPES


def streaming(spec: ModelSpec, slots: int = 1) -> StreamingKV:
    view = StreamingKV(
        spec, Shard(), budget=BUDGET, sinks=SINKS, stride=STRIDE, slots=slots, room=ROOM, dtype=torch.float32, device=CPU
    )
    assert all(view.admit(s) for s in range(slots))
    return view


def streamed(model: Model, ids: list[int], at: int) -> list[Tensor]:
    """What token `at` gets in each layer, by the definition: sinks slide up to what is recent."""
    spec = model.spec
    first = SINKS + STRIDE * -(-max(0, at + 1 - BUDGET) // STRIDE)
    entries = [*range(min(SINKS, at + 1)), *range(first, at + 1)]
    out = []
    for layer in range(LAYERS):
        keys, values = model.rows(model.keys, layer, ids, 0).clone(), model.rows(model.values, layer, ids, 0)
        if spec.rope is not None:
            where = torch.arange(SINKS) + first - SINKS
            turned = Rope(spec.rope, 8, CPU).cos_sin(where, torch.ones_like(where))
            raw = model.rows(model.raw_keys, layer, ids[:SINKS], 0)
            keys[: len(raw)] = apply_rope(raw, turned[0][: len(raw)], turned[1][: len(raw)])
        positions = [e + first - SINKS if e < SINKS else e for e in entries]
        q = model.queries[layer, ids[at], at]
        heads = range(spec.num_kv_heads)
        # Neighbouring positions: Falcon's rounded bias counts from the first of them.
        seen = [p - positions[0] for p in positions]
        out.append(
            definition(
                spec,
                layer,
                q,
                at - positions[0],
                [seen] * len(heads),
                [keys[entries, g] for g in heads],
                [values[entries, g] for g in heads],
            )
        )
    return out


@pytest.mark.parametrize("kind", STREAMED)
def test_a_streaming_view_shows_the_same_however_passes_are_cut(kind: str) -> None:
    """Random rounds with long and short passes, against the definition and against the same view stepped token by token."""
    model = Model(STREAMED[kind])
    coins = random.Random(7)
    view, stepped = streaming(model.spec), streaming(model.spec)
    ids: list[int] = []

    def one_by_one() -> None:
        for at in range(stepped.length(0), len(ids)):
            model.run(stepped, [step([ids[at]], at)])
            stepped.commit(0, 1)

    for turn in range(40):
        drafted: list[int] = []
        certain = [coins.randrange(VOCABULARY) for _ in range(coins.choice([1, 1, 2, 30 if turn % 8 == 0 else 3]))]
        for passes in range(coins.randint(1, 3)):
            at = view.end(0) - len(ids)
            new = [coins.randrange(VOCABULARY) for _ in range(coins.randint(0, 1))]
            tokens = (certain if passes == 0 else []) + (new or [1])
            if at + len(tokens) > len(certain) + ROOM:
                break
            drafted = drafted[:at] + tokens
            out = model.run(view, [step(tokens, len(ids) + at)])
            everything = ids + drafted
            for i in range(len(tokens)):
                for layer, expected in enumerate(streamed(model, everything, len(everything) - len(tokens) + i)):
                    close(out[layer][i], expected)
            view.rollback(0, coins.randint(len(ids) + len(certain), view.end(0)))
        kept = coins.randint(len(certain), view.end(0) - len(ids))
        view.commit(0, kept)
        view.rollback(0, len(ids) + kept)
        ids += drafted[:kept]
        assert view.length(0) == view.end(0) == len(ids)
        if turn % 5 == 4:
            one_by_one()
            probe = [coins.randrange(VOCABULARY) for _ in range(3)]
            for a, b in zip(model.run(view, [step(probe, len(ids))]), model.run(stepped, [step(probe, len(ids))]), strict=True):
                close(a, b)
            for both in (view, stepped):
                both.rollback(0, len(ids))
        if len(ids) > 150:
            view.rollback(0, 0)
            stepped.rollback(0, 0)
            ids.clear()


def test_a_streaming_budget_larger_than_the_sequence_is_full_attention() -> None:
    model = Model(ROPES["rope"])
    view, full = streaming(model.spec), paged(model.spec)
    for start, tokens in ((0, [0, 1, 2, 3, 4, 4, 4]), (7, [2]), (8, [1, 3, 1, 0])):
        for a, b in zip(model.run(view, [step(tokens, start)]), model.run(full, [step(tokens, start)]), strict=True):
            close(a, b)
        view.commit(0, len(tokens))
        full.commit(0, len(tokens))
    assert view.bytes_read(0) == full.bytes_read(0) == 2 * LAYERS * 12 * 2 * 8 * 4


def test_streaming_sequences_do_not_mix() -> None:
    """Two in one pass, one of them longer than the store, equal each alone."""
    model = Model(ROPES["rope"])
    together, alone = streaming(model.spec, 2), [streaming(model.spec, 2), streaming(model.spec, 2)]
    lengths = [0, 0]
    for counts in ((50, 3), (1, 2), (2, 40), (1, 1)):
        steps = [step([(s + i) % VOCABULARY for i in range(n)], lengths[s], seq=s) for s, n in enumerate(counts)]
        out = model.run(together, steps)
        for s, n in enumerate(counts):
            own = model.run(alone[s], [steps[s]])
            rows = slice(0, n) if s == 0 else slice(counts[0], None)
            for a, b in zip(out, own, strict=True):
                close(a[rows], b)
            together.commit(s, n)
            alone[s].commit(s, n)
            lengths[s] += n


def test_streaming_refuses_what_it_cannot_do() -> None:
    assert why_not_streaming(PLAIN) is why_not_streaming(ROPES["yarn"]) is None
    with pytest.raises(UserError, match="positions are learned"):
        streaming(replace(PLAIN, learned_positions=True))
    with pytest.raises(UserError, match="dynamic scaling"):
        streaming(replace(PLAIN, rope=RopeSpec(100.0, "dynamic", 2.0, 32)))
    with pytest.raises(AssertionError, match="48 entries are too few"):
        StreamingKV(PLAIN, Shard(), budget=48, slots=1, room=2, dtype=torch.float32, device=CPU)
    with pytest.raises(UserError, match="= 49; raise kv"):
        Rung.parse("draft:kv=48")
    model, view = Model(PLAIN), streaming(PLAIN)
    model.run(view, [step([1] * 50, 0)])
    with pytest.raises(ValueError, match=r"back to 43: only to 0 or to 44\.\.50"):
        view.rollback(0, 43)
    view.commit(0, 48)
    view.rollback(0, 49)
    with pytest.raises(ValueError, match="fewer than 2"):
        view.commit(0, 2)
    with pytest.raises(ValueError, match="back to 47"):
        view.rollback(0, 47)
    view.rollback(0, 0)
    assert view.end(0) == 0
