"""Late keys and values: what skipped heads lack is there before anybody looks."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sparse_models import CPU, EagerReference, HeadModel, Run
from torch import Tensor

from rowcast.runtime.kv import PagedKV, SelectedKV, SharedKV, Streaming, StreamingKV, why_not_streaming
from rowcast.runtime.protocols import KVView, WeightView
from rowcast.runtime.shard import Shard
from rowcast.runtime.sparse.heads import HeadSelector
from rowcast.runtime.sparse.lazy import LazyKV
from rowcast.runtime.sparse.sizes import LATE_TOKENS, late_bytes
from rowcast.runtime.sparse.weights import SparseWeights

FAMILIES: dict[str, dict[str, int]] = {
    "opt": {},
    "mpt-clip": {},
    "falcon-rw": {},
    "llama-mha": {},
    "llama-dynamic-grows": {"num_key_value_heads": 8},
    "mistral-window": {"num_key_value_heads": 8},
}
"""Of all kinds of positions, each query head with a KV head of its own."""
PROMPT = 6


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HeadModel:
    return HeadModel(request.param, tmp_path_factory.mktemp(request.param), **FAMILIES[request.param])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> HeadModel:
    return HeadModel("llama-mha", tmp_path_factory.mktemp("llama-mha"))


def lazy_of(view: SparseWeights) -> LazyKV:
    found = view._attention._lazy
    assert found is not None
    return found


def entries(kv: PagedKV, seq_id: int) -> Tensor:
    """Keys and values of a sequence, [2, layers * K, length, d]."""
    table = kv.table(seq_id)
    return torch.stack((kv.keys_of(table), kv.values_of(table)))


def test_after_a_flush_the_cache_is_the_eager_one(model: HeadModel) -> None:
    """Before it nothing but the last tokens' entries differs, which are not there; a pass of many tokens fills them in, too."""
    tokens, spec = model.tokens(PROMPT + 40), model.spec
    always_the_same = HeadSelector(torch.zeros(spec.num_heads, spec.hidden_size), torch.arange(spec.num_heads), keep=2)
    heads, neurons = [always_the_same] * spec.num_layers, [None] * spec.num_layers
    view = SparseWeights(model.banks, neurons, heads=heads)
    lazy, eager = Run(view, model.paged()), Run(SparseWeights(model.banks, neurons, heads=heads), model.paged(lazy=False))
    assert isinstance(lazy.kv, PagedKV) and isinstance(eager.kv, PagedKV)
    cuts, flushes, start = [*range(PROMPT, PROMPT + 30), len(tokens)], [], 0
    for end in cuts:
        for run in (lazy, eager):
            run((0, tokens[start:end], start), prompt=PROMPT)
            run.kv.commit(0, end - start)
        start = end
        found, expected = entries(lazy.kv, 0), entries(eager.kv, 0)
        late = (found == 0).all(-1)
        torch.testing.assert_close(found, expected.masked_fill(late[..., None], 0), atol=1e-5, rtol=1e-5)
        if not late.any():
            flushes.append(end)
    assert flushes == [PROMPT, PROMPT + LATE_TOKENS, len(tokens)]


def test_lazy_reads_fewer_bytes_than_eager(model: HeadModel) -> None:
    """The same output, whether the view takes late entries or not."""
    tokens = model.tokens(PROMPT + 12)
    cuts = [PROMPT, *range(PROMPT + 1, len(tokens) + 1)]
    rows, read = [], []
    for lazy in (True, False):
        view = model.view(model.spec.num_heads // 4)
        rows.append(Run(view, model.paged(lazy=lazy)).alone(tokens, cuts, PROMPT))
        read.append(view.reads().bytes)
    torch.testing.assert_close(*rows, atol=1e-5, rtol=1e-5)
    skipped = model.spec.num_heads - model.spec.num_heads // 4
    per_head = 2 * 4 * model.spec.hidden_size * model.spec.head_dim * model.spec.num_layers
    assert read[1] - read[0] == 12 * skipped * per_head


def paged(model: HeadModel, parent: PagedKV) -> KVView:
    return parent


def selected(model: HeadModel, parent: PagedKV) -> KVView:
    return SelectedKV(parent, Streaming(), budget=9, sinks=2, recent=4, slots=3, room=8)


def shared(model: HeadModel, parent: PagedKV) -> KVView:
    return SharedKV(parent, lazy=True)


def streaming(model: HeadModel, parent: PagedKV) -> KVView:
    return StreamingKV(model.spec, Shard(), budget=13, sinks=8, stride=3, slots=3, room=4, dtype=torch.float32, device=CPU)


class Lane:
    """One way to run a history: a rung, and, where its view is not the full one, a dense last rung that it drafts for."""

    def __init__(self, model: HeadModel, weights: WeightView, make: Callable[[HeadModel, PagedKV], KVView]) -> None:
        self.full = Run(model.banks, model.paged(3, lazy=make is paged))
        assert isinstance(self.full.kv, PagedKV)
        self.rung = Run(weights, make(model, self.full.kv))
        self.own = isinstance(self.rung.kv, (PagedKV, StreamingKV))
        """Whether the rung has to run committed tokens itself."""
        self.is_last = self.rung.kv is self.full.kv

    def commit(self, seq_id: int, tokens: list[int], length: int) -> None:
        """The sequence is now `tokens[:length]`."""
        if not self.is_last:
            start = self.full.kv.length(seq_id)
            self.full((seq_id, tokens[start:length], start), prompt=PROMPT)
            self.full.kv.commit(seq_id, length - start)
        kv = self.rung.kv
        if seq_id in kv.seq_ids:
            kv.commit(seq_id, max(0, min(kv.end(seq_id), length) - kv.length(seq_id)))
            kv.rollback(seq_id, kv.length(seq_id))

    def free(self, seq_id: int) -> None:
        self.rung.kv.free(seq_id)
        self.full.kv.free(seq_id)


@pytest.mark.parametrize("make", [paged, selected, shared, streaming])
def test_random_histories_equal_eager_ones(model: HeadModel, make: Callable[[HeadModel, PagedKV], KVView]) -> None:
    """Batches, proposals, rejections, preemption, new sequences under old ids: the same hidden states as where nothing is late."""
    if make is streaming and why_not_streaming(model.spec):
        pytest.skip("cannot stream")
    keep = model.spec.num_heads // 4
    view = model.view(keep)
    lanes = [Lane(model, view, make), Lane(model, EagerReference(model, keep), make)]
    draw = random.Random(1)
    texts: dict[int, list[int]] = {}
    committed: dict[int, int] = {}
    late = 0
    for _ in range(25):
        for seq_id in range(3):
            if seq_id in texts and (draw.random() < 0.05 or committed[seq_id] > 40):
                for lane in lanes:
                    lane.free(seq_id)
                if draw.random() < 0.5:
                    del texts[seq_id]
                else:
                    committed[seq_id] = 0  # preempted
            if seq_id not in texts and draw.random() < 0.5:
                texts[seq_id], committed[seq_id] = [draw.randrange(101) for _ in range(PROMPT + 1)], 0
        running = [seq_id for seq_id in texts if draw.random() < 0.8]
        for seq_id in running:
            if committed[seq_id] == 0:
                for lane in lanes:
                    if not lane.is_last:
                        lane.commit(seq_id, texts[seq_id], len(texts[seq_id]) - 1)
                if not lanes[0].is_last:
                    committed[seq_id] = len(texts[seq_id]) - 1
        for _ in range(draw.randrange(1, 4) if running else 0):
            ends = {seq_id: lanes[0].rung.kv.end(seq_id) for seq_id in running}
            passes = []
            for seq_id in running:
                texts[seq_id] += [draw.randrange(101) for _ in range(draw.randrange(1, 3))]
                passes.append((seq_id, texts[seq_id][ends[seq_id] : -1], ends[seq_id]))
            if any(not tokens for _, tokens, _ in passes):
                continue
            found, expected = (lane.rung(*passes, prompt=PROMPT) for lane in lanes)
            torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-4)
            late += view.heads(0).late is not None
        for seq_id in running:
            end = lanes[0].rung.kv.end(seq_id)
            if end <= committed[seq_id]:
                continue
            length = draw.randrange(committed[seq_id] + 1, end + 1)
            length = max(length, min(end, PROMPT))
            texts[seq_id] = [*texts[seq_id][:length], draw.randrange(101)]
            committed[seq_id] = length
            for lane in lanes:
                lane.commit(seq_id, texts[seq_id], length)
        assert lazy_of(view)._sequences.keys() <= {0, 1, 2}
        assert lazy_of(view).bytes <= 3 * late_bytes(model.spec, 4)
    assert late > 5


def test_finished_sequences_are_forgotten(llama: HeadModel) -> None:
    view, tokens = llama.view(2), llama.tokens(PROMPT + 3)
    run = Run(view, llama.paged(2))
    run.alone(tokens, [PROMPT, PROMPT + 1, PROMPT + 3], PROMPT)
    assert lazy_of(view).bytes == late_bytes(llama.spec, 4) > 0
    run.kv.free(0)
    run((1, tokens[:3], 0), prompt=PROMPT)
    assert lazy_of(view).bytes == 0


def test_rungs_may_share_a_weight_view(llama: HeadModel) -> None:
    """What is late belongs to a KV view: two of them run the same sequence by turns."""
    view, texts = llama.view(2), [llama.tokens(PROMPT + 20, seed) for seed in (0, 1)]
    cuts = [PROMPT, *range(PROMPT + 1, PROMPT + 21)]
    expected = [Run(EagerReference(llama, 2), llama.paged()).alone(text, cuts, PROMPT) for text in texts]
    runs, start = [Run(view, llama.paged()) for _ in texts], 0
    found: list[list[Tensor]] = [[], []]
    for end in cuts:
        for run, text, rows in zip(runs, texts, found, strict=True):
            rows.append(run((0, text[start:end], start), prompt=PROMPT))
            run.kv.commit(0, end - start)
        start = end
    for rows, eager in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.cat(rows), eager, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("before", [PROMPT + 3, PROMPT + LATE_TOKENS - 1])
@pytest.mark.parametrize("fails", ["mlp", "fill", "append"])
def test_a_failed_pass_is_run_again(fails: str, before: int, llama: HeadModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error between layers, or before a layer's K/V are written, in a pass that fills in everything and in one that does not."""
    tokens = llama.tokens(PROMPT + 2 * LATE_TOKENS)
    cuts = [PROMPT, *range(PROMPT + 1, len(tokens) + 1)]
    expected = Run(EagerReference(llama, 2), llama.paged()).alone(tokens, cuts, PROMPT)
    run = Run(llama.view(2), llama.paged())
    found = [run.alone(tokens, cuts[: cuts.index(before) + 1], PROMPT)]
    with monkeypatch.context() as patch:
        patch.setattr(run.view if fails == "mlp" else run.kv, fails, lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run((0, tokens[before : before + 1], before), prompt=PROMPT)
    for at in range(before, len(tokens)):
        found.append(run((0, tokens[at : at + 1], at), prompt=PROMPT))
        run.kv.commit(0, 1)
    torch.testing.assert_close(torch.cat(found), expected, atol=2e-5, rtol=1e-5)


def test_grouped_heads_are_never_late(tmp_path: Path) -> None:
    model = HeadModel("llama-gqa", tmp_path)
    view = model.view(2)
    Run(view, model.paged()).alone(model.tokens(PROMPT + 2), [PROMPT, PROMPT + 1, PROMPT + 2], PROMPT)
    assert view.heads(0).queries is not None and view.heads(0).late is None
    assert view._attention._lazy is None and late_bytes(model.spec, 4) == 0


def test_views_that_copy_need_complete_entries(llama: HeadModel) -> None:
    for make in (selected, shared):
        with pytest.raises(AssertionError, match="not complete"):
            make(llama, llama.paged(lazy=True))
