"""Rounds on the device over neurons that are fetched: the tokens of a model that lies next to the compute. Here through Triton's
interpreter; on a GPU captured in graphs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from test_offload_llm import away, shares
from test_offload_weights import Model
from test_sparse_weights import levelled
from test_speculation import GREEDY, ids, prompts
from tiny import tiny_model
from triton_interpreting import take_arrays_as_bounds

from rowcast import LLM
from rowcast.kernels import gpu
from rowcast.runtime.offloaded.on_device import PlacedNeurons
from rowcast.runtime.offloaded.sparse import OffloadedSparse
from rowcast.runtime.offloaded.tiers import Spans, Tiers
from rowcast.runtime.offloaded.weights import OffloadedBanks
from rowcast.runtime.sparse.build import build_neurons

take_arrays_as_bounds()
ON_GPU = torch.cuda.is_available()
PARAMS = replace(GREEDY, max_tokens=24 if ON_GPU else 3)
PENALISED = replace(PARAMS, repetition_penalty=1.3)
"""Rounds are driven by the host."""


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "interpreted", not ON_GPU)


@pytest.mark.parametrize(
    ("name", "ladder", "room"), [("llama-gqa", "self:mlp=0.3,by=q4", 1.0), ("opt", "self:mlp=0.2,by=q4,over=1.5", 0.3)]
)
def test_rounds_fetch_what_they_need(
    name: str, ladder: str, room: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone and in a batch, whose union goes into the buffer or, in parts, does not; with a cache and without."""
    tiny_model(name, tmp_path, num_hidden_layers=1)
    some = prompts(2, 8, 24)

    def make(**given: object) -> LLM:
        keywords = (
            {"ladder": ladder, "mode": "approximate", "dtype": "float32", "block_size": 4} if "plan" not in given else given
        )
        return LLM(tmp_path, device="cuda" if ON_GPU else "cpu", progress=False, **keywords)  # type: ignore[arg-type]

    resident = make()
    expected = [ids(resident.generate(prompt, PARAMS))[0] for prompt in some]
    penalised = resident.generate(some[0], PENALISED)
    real = OffloadedBanks._pool

    def tight(self: OffloadedBanks, buffers: object, layers: int, held: int, *more: object) -> object:
        count = self.spec.intermediate_size
        kept = round(count * (0.5 if room == 1 else 0))
        size = 3 * self.spec.hidden_size * 4
        given = replace(buffers, rows_bytes=round(room * count) * size, cache_bytes=kept * layers * size)  # type: ignore[type-var]
        return real(self, given, layers, held, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(OffloadedBanks, "_pool", tight)
    layers = resident.spec.num_layers
    for given in (shares(None, layers, neurons=("rows",)), shares(3, layers, neurons=("rows", "resident"), **RESIDENT)):
        there = LLM(tmp_path, plan=away(resident.plan, given), progress=False)
        executor = there.engine._executor
        weights = executor._top.decoder.weights  # type: ignore[attr-defined]
        assert isinstance(weights, OffloadedSparse) and weights.on_device
        assert executor._rounds is not None  # type: ignore[attr-defined]
        assert ids(there.generate(some[0], PARAMS)) == expected[:1]
        assert ids(there.generate(some, PARAMS)) == expected
        [found] = there.generate(some[0], PENALISED)
        assert ids([found]) == ids(penalised) and weights._direct is not None
        assert found.metrics.density["self"] == pytest.approx(penalised[0].metrics.density["self"])
        counts = executor.elsewhere.counts()  # type: ignore[attr-defined]
        assert counts.rows.wanted > 0 and counts.rows.moved == counts.rows.wanted - counts.rows.hit
        assert weights._offloaded.pool is not None
        weights._offloaded.pool.rows.check()
        there.engine.check()


@pytest.mark.parametrize(
    ("ladder", "where", "batch"),
    [
        ("ngram:gamma=2 / self:kv=16,chunk=4,sinks=4,recent=4,score=mean,gamma=3 / plain", "KV", 1),
        ("self:bits=4,gamma=3 / plain", "neurons", 1),
        ("self:kv=16,chunk=4,sinks=4,recent=4,gamma=2 / plain", "KV", 2),
    ],
)
def test_the_host_drives_the_last_pass_alone(
    ladder: str, where: str, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where what the last rung reads is away, rounds of the rungs below are the device's; no token changes."""
    tiny_model("llama-gqa", tmp_path, num_hidden_layers=2 if ON_GPU else 1)
    some = prompts(batch, 18, 20)
    how: dict[str, Any] = {
        "device": "cuda" if ON_GPU else "cpu",
        "dtype": "float32",
        "block_size": 4,
        "max_num_seqs": 2,
        "progress": False,
    }
    seeded = replace(PARAMS, temperature=0.8, seed=3, max_tokens=24 if ON_GPU else 4)
    mixed = [seeded, replace(seeded, repetition_penalty=1.3)][:batch]
    with monkeypatch.context() as plainly:
        plainly.setattr(gpu, "interpreted", False)
        reference = LLM(tmp_path, ladder="plain", **how)
        expected = [ids(reference.generate(some, params)) for params in (seeded, mixed)]
        plan = LLM(tmp_path, ladder=ladder, **how).plan
    given = shares(None, reference.spec.num_layers, **{where: ("streamed",)})
    there = LLM(tmp_path, plan=away(plan, given), progress=False)
    rounds = there.engine._executor._rounds  # type: ignore[attr-defined]
    assert rounds is not None and rounds.driven
    found = there.generate(some, seeded)
    assert ids(found) == expected[0]
    assert any(each.metrics.acceptance for each in found)
    assert rounds._reads, "the device ran no round"
    if batch > 1:  # the host drives rounds with a sequence that it has to: a pass streams once for both
        with patch.object(rounds, "_run", wraps=rounds._run) as passes:
            assert ids(there.generate(some, mixed)) == expected[1]
        assert passes.call_args_list and all(call.args[0].batch == 1 for call in passes.call_args_list)
    there.engine.check()


RESIDENT = {"attention": ("resident",), "LM_head": ("resident",), "KV": ("resident",), "embeddings": ("host",)}


@pytest.mark.parametrize("how", [{"by": "q4"}, {"by": "q2", "over": 2.0}])
@pytest.mark.parametrize("calibrated", [False, True])
def test_many_tokens(calibrated: bool, how: dict[str, Any], tmp_path: Path) -> None:
    """More than a union is read of: all neurons pass through the buffer, of which each token has its own."""
    model = Model("llama-bias", tmp_path, "cuda" if ON_GPU else "cpu")
    if calibrated:
        how = how | {"calibration": levelled(model, tmp_path)}  # type: ignore[arg-type]
    row, count = 3 * model.spec.hidden_size * 4, model.spec.intermediate_size
    tiers = Tiers(
        attention=dict.fromkeys(range(2), Spans()),
        neurons=dict.fromkeys(range(2), Spans((("resident", 0, 1, 3), ("rows", 1, 2, 3)))),
        head=Spans(),
        embeddings=Spans(),
        kv_away=frozenset(),
    )
    banks = model.placed(tiers, rows_bytes=count // 4 * row, cache_bytes=count * row)
    view = OffloadedSparse(banks, build_neurons(banks, mlp=0.1, **how))
    x = torch.randn(17, model.spec.hidden_size, generator=torch.Generator().manual_seed(1)).to(model.device)
    bank, selector = model.banks.ffn[0], build_neurons(model.banks, mlp=0.1, **how)[0]
    hidden, own = bank.hidden(x), selector(x, few=False).own
    assert own is not None
    if selector.reranks:
        own = selector.rerank(bank.score(hidden, norms=selector.norms).masked_fill_(~own, float("-inf")), None)
    passes = view._on_device()
    passes._counts.begin()
    torch.testing.assert_close(passes.mlp(0, x, x), bank.out(hidden * own, residual=x), atol=2e-5, rtol=1e-5)
    assert banks.pool is not None
    banks.pool.rows.check()


@pytest.mark.parametrize(
    ("resident", "kept", "buffer", "parts"),
    [
        (0, 0.0, 0.5, 2),  # as is allocated, and nothing else lies on the device
        (1, 0.0, 0.5, 2),
        (1, 0.2, 0.5, 1),
        (2, 0.0, 0.5, 1),
        (0, 0.0, 0.2, 5),
    ],
)
def test_above_a_threshold(resident: int, kept: float, buffer: float, parts: int, tmp_path: Path) -> None:
    """As many rows as there may be are reached in few parts, of which choosing begins the first; none of them is lost."""
    model = Model("llama-bias", tmp_path, "cuda" if ON_GPU else "cpu")
    row, count = 3 * model.spec.hidden_size * 4, model.spec.intermediate_size
    neurons = Spans(tuple(("resident" if i < resident else "rows", i, 1, 3) for i in range(3)))
    tiers = Tiers(dict.fromkeys(range(2), Spans()), dict.fromkeys(range(2), neurons), Spans(), Spans(), frozenset())
    banks = model.placed(tiers, rows_bytes=round(buffer * count) * row, cache_bytes=round(kept * count) * row * 2)
    assert banks.pool is not None
    calibration = levelled(model, tmp_path)  # type: ignore[arg-type]
    selectors = build_neurons(banks, mlp=0.1, by="q8", cut="threshold", calibration=calibration)
    generator = torch.Generator().manual_seed(1)
    view = OffloadedSparse(banks, selectors)
    passes, bank, selector = view._on_device(), model.banks.ffn[0], selectors[0]
    neuron = passes._neurons[0]
    assert view.on_device and isinstance(neuron, PlacedNeurons)
    for tokens, share in ((1, 0.1), (1, 0.0), (1, 1.0), (3, 0.1), (3, 0.9)):
        x = torch.randn(tokens, model.spec.hidden_size, generator=generator).to(model.device)
        scores = selector.scorer(x).values
        level = float(scores.quantile(1 - share)) if 0 < share < 1 else -math.inf if share else math.inf
        with patch.object(selector, "_threshold", level):
            passes._counts.begin()
            with patch.object(neuron._cached, "reach", wraps=neuron._cached.reach) as reach:
                choice = neuron.choose(x)
                ahead = banks.pool.rows.counts().wanted
                y = neuron.mlp(x, choice, x)
            assert reach.call_count == parts
        own, later = scores > level, banks.pool.rows.counts().wanted
        torch.testing.assert_close(y, bank.out(bank.hidden(x) * own, residual=x), atol=2e-5, rtol=1e-5)
        assert ahead + later == int((own.any(0) & (neuron._placed.place >= resident * count // 3)).sum())
        if share == 0.1:  # all of the union, where the buffer has what is allocated for it
            assert ahead and (later == 0 or parts > 2)
        banks.pool.rows.check()
