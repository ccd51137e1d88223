"""The bank layout and the sparse view: all rows give the dense model, chosen rows give the chosen rows' model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import CASES, VOCAB, tiny_model
from torch import Tensor

from rowcast.errors import UserError
from rowcast.kernels import lowbit, native, select
from rowcast.kernels.rows import ACTIVATIONS
from rowcast.placement.resident import pass_bytes
from rowcast.runtime.banks import BankWeights, FfnBank
from rowcast.runtime.checkpoint.safetensors_file import SafetensorsSource
from rowcast.runtime.comm import SoloComm
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.decoder import Decoder
from rowcast.runtime.kv import PagedKV
from rowcast.runtime.ladder.spec import Rung
from rowcast.runtime.model import load_decoder
from rowcast.runtime.protocols import WeightView
from rowcast.runtime.shard import Shard
from rowcast.runtime.sparse import build
from rowcast.runtime.sparse.artefact import DESCRIPTION, FORMAT, TENSORS, Calibration
from rowcast.runtime.sparse.build import build_neurons, layer_threshold, scorer
from rowcast.runtime.sparse.scorers import FewBits, Gate, Oracle, Proxy, Reads, Scored, Scorer
from rowcast.runtime.sparse.selection import SHARDS, Selector, shards_for
from rowcast.runtime.sparse.sizes import expected_bytes
from rowcast.runtime.sparse.weights import SparseWeights
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.step import SeqStep

CPU = torch.device("cpu")
PROMPT, NEW = 9, 6
FAMILIES = ["opt", "llama-bias", "llama-gqa", "bloom", "mpt", "falcon-7b"]


class Model:
    """A tiny model of each layout."""

    def __init__(self, name: str, path: Path, **overrides: Any) -> None:
        tiny_model(name, path, **overrides)
        self.spec: ModelSpec = spec_from_config(json.loads((path / "config.json").read_text()))
        self.source = SafetensorsSource.open(path)
        self.banks = BankWeights(self.spec, self.source, SoloComm(), dtype=torch.float32, device=CPU)
        self.tokens = torch.randint(VOCAB, (PROMPT + NEW,), generator=torch.Generator().manual_seed(3)).tolist()

    def logits(self, view: WeightView | None, chunks: list[int], prompt: int = PROMPT) -> Tensor:
        """Logits [T, V] of all tokens, run in passes that end at `chunks`; None: the plain view."""
        decoder = load_decoder(self.spec, self.source) if view is None else Decoder(view, SoloComm(), CPU)
        kv = PagedKV(self.spec, Shard(), num_blocks=8, block_size=4, dtype=torch.float32, device=CPU)
        rows, start = [], 0
        for end in chunks:
            step = SeqStep(0, self.tokens[start:end], start, list(range(8)), prompt, sample=True)
            rows.append(decoder.logits(decoder.run([step], kv)))
            kv.commit(0, end - start)
            start = end
        return torch.cat(rows)

    def view(self, make: Callable[[FfnBank], Selector]) -> SparseWeights:
        return SparseWeights(self.banks, [make(bank) for bank in self.banks.ffn])


@pytest.fixture(scope="module", params=CASES)
def any_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(request.param, tmp_path_factory.mktemp(request.param))


class Rank(SoloComm):
    """One of two, whose parts of sums stay apart."""

    def __init__(self, rank: int) -> None:
        self.rank, self.world = rank, 2


@dataclass
class Given:
    """Scores that are there already."""

    values: Tensor
    reads: Reads = "own"
    bytes: int = 0

    def __call__(self, x: Tensor) -> Scored:
        return Scored(self.values)


ONE_BY_ONE = [PROMPT, *range(PROMPT + 1, PROMPT + NEW + 1)]


def proxy(bank: FfnBank, bits: int = 8) -> Proxy:
    tables = [bank.up] if bank.gate is None else [bank.gate, bank.up]
    biases = [b for b in (bank.gate_bias, bank.up_bias) if b is not None]
    weight = lowbit.quantise(torch.cat(tables), bits)
    return Proxy(FewBits(weight, torch.cat(biases) if biases else None), bank.norms, bank.activation, bank.gate is not None)


def chooses(share: float, make: Callable[[FfnBank], Scorer] = Oracle, over: float = 1.0) -> Callable[[FfnBank], Selector]:
    return lambda bank: Selector(make(bank), len(bank.order), keep=round(share * len(bank.order)), over=over)


def test_banks_equal_dense(any_model: Model) -> None:
    dense = any_model.logits(None, ONE_BY_ONE)
    torch.testing.assert_close(any_model.logits(any_model.banks, ONE_BY_ONE), dense, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("chunks", [ONE_BY_ONE, [PROMPT, PROMPT + 4, PROMPT + NEW], [PROMPT + NEW]])
def test_all_rows_equal_dense(any_model: Model, chunks: list[int]) -> None:
    dense = any_model.logits(None, ONE_BY_ONE)
    for make in (chooses(1.0), chooses(1.0, proxy), chooses(0.6, proxy, over=3.0), chooses(1.0, proxy, over=2.0)):
        view = any_model.view(make)
        found = any_model.logits(view, chunks)
        if view._neurons[0].keep == len(any_model.banks.ffn[0].order):  # type: ignore[union-attr]
            torch.testing.assert_close(found, dense, atol=2e-5, rtol=1e-5)
        else:
            assert (found[PROMPT:] - dense[PROMPT:]).abs().max() > 1e-3


def reference_mlp(bank: FfnBank, x: Tensor, keep: int) -> Tensor:
    """Everything computed, then all but the kept neurons dropped, token by token."""
    out = []
    for row in x:
        hidden = bank.hidden(row[None])
        mask = select.top_mask(bank.score(hidden), keep, SHARDS)
        out.append(bank.out(hidden * mask))
    return torch.cat(out)


@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 20])
def test_each_token_uses_its_own_set(model: Model, tokens: int) -> None:
    """Whatever the number of tokens: unions and dense reads change what is read, not what is computed."""
    bank = model.banks.ffn[1]
    keep = len(bank.order) // 3
    x = torch.randn(tokens, model.spec.hidden_size, generator=torch.Generator().manual_seed(tokens))
    view = model.view(chooses(keep / len(bank.order)))
    view._generated = [True] * tokens
    torch.testing.assert_close(view.mlp(1, x), reference_mlp(bank, x, keep), atol=1e-5, rtol=1e-4)
    reads = view.reads()
    assert reads.neurons == tokens * keep and reads.neurons_of == tokens * len(bank.order)


def test_prompts_run_dense_beside_generated_tokens(model: Model) -> None:
    bank = model.banks.ffn[0]
    x = torch.randn(5, model.spec.hidden_size, generator=torch.Generator().manual_seed(1))
    keep = len(bank.order) // 2
    view = model.view(chooses(keep / len(bank.order)))
    view._generated = [False, False, False, True, True]
    expected = torch.cat([model.banks.mlp(0, x[:3]), reference_mlp(bank, x[3:], keep)])
    torch.testing.assert_close(view.mlp(0, x), expected, atol=1e-5, rtol=1e-4)


def test_reranking_keeps_the_best_candidates(model: Model) -> None:
    """With candidates enough, a coarse proxy and exact ranking give the oracle's set."""
    bank = model.banks.ffn[0]
    x = torch.randn(4, model.spec.hidden_size, generator=torch.Generator().manual_seed(2))
    keep = len(bank.order) // 4
    view = model.view(chooses(keep / len(bank.order), lambda b: proxy(b, 2), over=4.0))
    view._generated = [True] * 4
    torch.testing.assert_close(view.mlp(0, x), reference_mlp(bank, x, keep), atol=1e-5, rtol=1e-4)


def test_fewer_rows_are_fewer_bytes(model: Model) -> None:
    x = torch.randn(1, model.spec.hidden_size, generator=torch.Generator().manual_seed(5))
    read = []
    for share in (1.0, 0.5, 0.25):
        view = model.view(chooses(share, proxy))
        view._generated = [True]
        view.mlp(0, x)
        read.append(view.reads().bytes)
    bank = model.banks.ffn[0]
    row = bank.in_row_bytes + bank.out_row_bytes
    neurons = len(bank.order)
    assert read[0] - read[1] == (neurons - round(0.5 * neurons)) * row
    assert read[0] - read[2] == (neurons - round(0.25 * neurons)) * row


def test_a_threshold_takes_all_above_it(model: Model) -> None:
    bank = model.banks.ffn[0]
    neurons = len(bank.order)
    x = torch.randn(7, model.spec.hidden_size, generator=torch.Generator().manual_seed(6))
    values = bank.score(bank.hidden(x))
    threshold = float(values.flatten().sort().values[-len(values.flatten()) // 3])
    chosen = Selector(Oracle(bank), neurons, keep=neurons // 3, threshold=threshold)(x, False)
    assert chosen.own is not None and torch.equal(chosen.own, values > threshold)


@pytest.mark.parametrize("over", [1.05, 1.5])
@pytest.mark.parametrize("keep", [3, 19])
@pytest.mark.parametrize("make", [lambda bank: proxy(bank, 2), Gate], ids=["q2", "gate"])
def test_a_tokens_set_is_the_same_alone_and_in_passes(
    model: Model, make: Callable[[FfnBank], Scorer], keep: int, over: float
) -> None:
    """Few candidates, in shards of which some keep none: what is kept is a candidate, and as many as were asked for."""
    bank = model.banks.ffn[1]
    if bank.gate is None and make is Gate:
        return
    x = torch.randn(20, model.spec.hidden_size, generator=torch.Generator().manual_seed(7))
    view = model.view(lambda b: Selector(make(b), len(b.order), keep=keep, over=over))

    def run(rows: Tensor) -> Tensor:
        view._generated = [True] * len(rows)
        y = view.mlp(1, rows)
        assert view.reads().neurons == len(rows) * keep
        return y

    alone = torch.cat([run(row[None]) for row in x])
    assert not torch.equal(alone[0], alone[1])
    for tokens in (3, 8, 9, 20):
        torch.testing.assert_close(run(x[:tokens]), alone[:tokens], atol=1e-5, rtol=1e-4)
    assert len(bank.order) > 2 * keep


@pytest.mark.parametrize("over", [1.0, 2.0])
@pytest.mark.parametrize("neurons", [90, 96])
def test_common_neurons_are_always_kept(neurons: int, over: float) -> None:
    """Within `keep`, and whatever their scores, first and after exact ranking; the others are the best of what remains."""
    generator = torch.Generator().manual_seed(8)
    values, exact = torch.rand(7, neurons, generator=generator), torch.rand(7, neurons, generator=generator)
    frequency = torch.rand(neurons, generator=generator)
    common = select.top_mask(frequency[None], 20, SHARDS)[0]
    values[:, common] = exact[:, common] = 0
    selector = Selector(Given(values), neurons, keep=40, over=over, common=20, frequency=frequency)
    own = selector(values, False).own
    assert own is not None and bool(own[:, common].all()) and own.sum(1).tolist() == [round(40 * over)] * 7
    assert selector.keep == 40 and selector.reranks == (over > 1)
    ids, some = select.union(own)
    assert some is not None
    for found in (
        selector.rerank(exact.masked_fill(~own, float("-inf")), None),
        torch.zeros_like(own).index_copy_(1, ids, selector.rerank(exact[:, ids].masked_fill(~some, float("-inf")), ids)),
    ):
        if over > 1:
            assert bool(found[:, common].all()) and not (found & ~own).any() and found.sum(1).tolist() == [40] * 7


def test_groups_are_chosen_whole() -> None:
    """Also where scores are negative and a shard's last group is smaller: it stands by its mean as others do."""
    values = -1 - torch.rand(5, 90, generator=torch.Generator().manual_seed(9))
    selector = Selector(Given(values), 90, keep=30, group=4)
    own = selector(values, False).own
    assert own is not None and selector.keep == 32
    for token, mask in zip(values, own, strict=True):
        groups = 0
        for span, _ in select.shard_spans(90, 0, SHARDS):
            means = [float(part.mean()) for part in token[span].split(4)]
            taken = [bool(part.all()) for part in mask[span].split(4)]
            assert taken == [bool(part.any()) for part in mask[span].split(4)]
            groups += sum(taken)
            assert max([m for m, t in zip(means, taken, strict=True) if not t]) < min(
                [m for m, t in zip(means, taken, strict=True) if t], default=0.0
            )
        assert groups == 8
    assert bool(Selector(Given(values), 90, keep=90, group=8)(values, False).own.all())  # type: ignore[union-attr]


def test_wide_layers_have_more_shards() -> None:
    """A multiple, so that the same numbers of ranks hold whole ones."""
    assert [shards_for(neurons) for neurons in (1, 11_008, 16_384, 16_385, 36_864, 49_152)] == [8, 8, 8, 16, 24, 24]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("neurons", [90, 96, 1536, 18_432])
@pytest.mark.parametrize(
    "how",
    [{}, {"over": 1.1}, {"common": 13}, {"over": 1.5, "common": 13}, {"group": 4}],
    ids=["top", "over", "common", "both", "group"],
)
def test_ranks_choose_what_one_rank_chooses(neurons: int, world: int, how: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(10)
    values, exact, frequency = (torch.rand(n, neurons, generator=generator) for n in (6, 6, 1))

    def sets(shard: Shard) -> tuple[Tensor, Tensor]:
        span = shard.span(neurons)
        part = values[:, span]
        selector = Selector(Given(part), neurons, keep=31, shard=shard, frequency=frequency[0, span], **how)
        own = selector(part, False).own
        assert own is not None
        if not selector.reranks:
            return own, own
        return own, selector.rerank(exact[:, span].masked_fill(~own, float("-inf")), None)

    ranks = [sets(Shard(rank, world)) for rank in range(world)]
    for whole, parts in zip(sets(Shard()), zip(*ranks, strict=True), strict=True):
        assert torch.equal(torch.cat(parts, 1), whole)
    if "group" not in how:
        assert sets(Shard())[1].sum(1).tolist() == [31] * 6


def test_a_rank_may_have_nothing_to_read(model: Model) -> None:
    bank = model.banks.ffn[0]
    x = torch.randn(1, model.spec.hidden_size)
    view = model.view(lambda b: Selector(proxy(b), len(b.order), keep=0))
    none = torch.zeros_like(x) if bank.down_bias is None else bank.down_bias[None]
    for rows in (x, x.expand(3, -1).contiguous()):
        view._generated = [True] * len(rows)
        torch.testing.assert_close(view.mlp(0, rows), none.expand(len(rows), -1))


def test_ranks_of_a_model_add_up_to_one(tmp_path: Path) -> None:
    """90 neurons, of which ranks' shards are not of equal size."""
    model = Model("llama-gqa", tmp_path)
    x = torch.randn(4, model.spec.hidden_size, generator=torch.Generator().manual_seed(11))
    for mlp, over in ((0.3, 1.0), (0.3, 1.1), (0.5, 1.5)):
        whole = SparseWeights(model.banks, build_neurons(model.banks, mlp=mlp, by="q8", over=over))
        whole._generated = [True] * 4
        expected, parts = whole.mlp(0, x), []
        for rank in (0, 1):
            banks = BankWeights(model.spec, model.source, Rank(rank), dtype=torch.float32, device=CPU)
            view = SparseWeights(banks, build_neurons(banks, mlp=mlp, by="q8", over=over))
            view._generated = [True] * 4
            parts.append(view.mlp(0, x))
        torch.testing.assert_close(sum(parts), expected, atol=1e-5, rtol=1e-4)


def test_a_layer_that_keeps_all_neurons_beside_others_asks_nobody(any_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = any_model.spec.num_layers
    monkeypatch.setattr(build, "layer_shares", lambda mean, layers, *_: [0.5] * (layers - 1) + [1.0])
    rung = Rung(kind="self", mlp=0.75, by="q8")
    made: list[int] = []

    def make(by: str, bank: Any, layer: int, *rest: Any) -> Scorer:
        made.append(layer)
        return scorer(by, bank, layer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(build, "scorer", make)
        view = build.build_view(any_model.banks, rung, None)
    assert made == list(range(layers - 1))  # nor is there anybody
    assert [selector is None for selector in view._neurons] == [False] * (layers - 1) + [True]
    asked = SparseWeights(any_model.banks, build_neurons(any_model.banks, mlp=0.75, by="q8"))

    def hidden(weights: SparseWeights) -> torch.Tensor:
        kv = PagedKV(any_model.spec, Shard(), num_blocks=8, block_size=4, dtype=torch.float32, device=CPU)
        return Decoder(weights, SoloComm(), CPU).run([SeqStep(0, [3], 0, list(range(8)), 0, sample=True)], kv)

    torch.testing.assert_close(hidden(view), hidden(asked), atol=1e-4, rtol=1e-4)
    banks = BankWeights(any_model.spec, any_model.source, Rank(1), dtype=torch.float32, device=CPU)
    assert [selector is None for selector in build.build_view(banks, rung, None)._neurons] == [False] * (layers - 1) + [True]
    monkeypatch.setattr(build, "layer_shares", lambda mean, layers, *_: [1.0] * layers)
    assert None not in build.build_view(any_model.banks, rung, None)._neurons


def test_what_is_read_is_counted_with_its_biases(any_model: Model) -> None:
    spec = any_model.spec
    assert any_model.banks.bytes == pass_bytes(spec, 4)
    for mlp, by, over in ((1.0, "q8", 1.0), (0.5, "q4", 1.0), (0.2, "q4", 2.0), (0.4, "oracle", 1.0)):
        if over > 1 and native.library() is None:
            continue  # Library products read the down rows of all candidates.
        view = SparseWeights(any_model.banks, build_neurons(any_model.banks, mlp=mlp, by=by, over=over))
        any_model.logits(view, [PROMPT])
        view.reads()
        kv = PagedKV(spec, Shard(), num_blocks=8, block_size=4, dtype=torch.float32, device=CPU)
        Decoder(view, SoloComm(), CPU).run([SeqStep(0, [3], 0, list(range(8)), 0, sample=True)], kv)
        rung = Rung(kind="self", mlp=mlp, by=by, over=over)  # type: ignore[arg-type]
        neurons, row = spec.intermediate_size, spec.num_layers * 3 * spec.hidden_size * 4
        rounding = row * max(1.0, over)
        assert abs(view.reads().bytes - expected_bytes(spec, rung, 4, None)) <= (rounding if mlp * neurons % 1 else 1)


def test_library_products_read_all_down_rows(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the native part leaves out the rows of candidates that nobody kept."""
    if native.library() is None:
        pytest.skip("there is no native part")
    bank, x = model.banks.ffn[0], torch.randn(1, model.spec.hidden_size, generator=torch.Generator().manual_seed(12))
    read = []
    for library in (native.library, lambda: None):
        monkeypatch.setattr(native, "library", library)
        view = model.view(chooses(0.25, proxy, over=2.0))
        view._generated = [True]
        view.mlp(0, x)
        read.append(view.reads().bytes)
    selector = view._neurons[0]
    assert selector is not None and selector.candidates > selector.keep
    assert read[1] - read[0] == (selector.candidates - selector.keep) * bank.out_row_bytes


def test_thresholds_lie_between_the_grids_in_the_logarithm(tmp_path: Path) -> None:
    tables = {"layers.0.q4.thresholds": torch.tensor([4.0, 1.0, 0.0]), "layers.1.q4.thresholds": torch.tensor([1.0, -1.0, -2.0])}
    save_file(tables, tmp_path / TENSORS, {"fingerprint": "f"})
    about = {"format": FORMAT, "fingerprint": "f", "density": 1, "densities": [0.25, 0.75, 1], "quality": {}, "scorers": {}}
    (tmp_path / DESCRIPTION).write_text(json.dumps(about))
    found = Calibration.open(tmp_path, "f")
    assert [layer_threshold(found, 0, "q4", share) for share in (0.1, 0.25, 0.5, 0.75)] == [4.0, 4.0, 2.0, 1.0]
    assert [layer_threshold(found, 1, "q4", share) for share in (0.5, 0.875, 1.0)] == [0.0, -1.5, -math.inf]
    assert layer_threshold(found, 0, "q4", 0.875) == 0.5


def test_a_ranks_banks_are_its_share(tmp_path: Path) -> None:
    """Ranks' neurons are disjoint, together all of them, and not the checkpoint's neighbours."""
    model = Model("llama-gqa", tmp_path)

    halves = [BankWeights(model.spec, model.source, Rank(r), dtype=torch.float32, device=CPU).ffn[0].order for r in (0, 1)]
    assert sorted(torch.cat(halves).tolist()) == list(range(model.spec.intermediate_size))
    assert not torch.equal(halves[0].sort().values, torch.arange(len(halves[0])))


def test_recall_rises_with_over_selection(model: Model) -> None:
    """A coarse proxy's candidates hold ever more of the exact best, the more of them there are, and in the end all."""
    bank = model.banks.ffn[0]
    neurons = len(bank.order)
    keep = neurons // 4
    x = torch.randn(64, model.spec.hidden_size, generator=torch.Generator().manual_seed(7))
    best = select.top_mask(bank.score(bank.hidden(x)), keep, SHARDS)
    recalls = []
    for over in (1.0, 1.5, 2.0, 3.0, 4.0):
        own = Selector(proxy(bank, 2), neurons, keep=keep, over=over)(x, False).own
        assert own is not None
        recalls.append(float((own & best).sum() / best.sum()))
    assert recalls == sorted(recalls) and recalls[0] < 0.95 and recalls[-1] > 0.99


def levelled(model: Model, path: Path, **changes: Tensor) -> Calibration:
    """Random sensitivities, and levels that random inputs' scores exceed in a part of all layers' neurons."""
    generator, layers, neurons = torch.Generator().manual_seed(20), model.spec.num_layers, model.spec.intermediate_size
    tables = {f"layers.{i}.sensitivity": torch.rand(neurons, generator=generator) * 4 + 0.2 * (i + 1) for i in range(layers)}
    x = torch.randn(16, model.spec.hidden_size, generator=generator).to(model.banks.ffn[0].down.device)
    scores = torch.cat(
        [exact(bank, tables[f"layers.{i}.sensitivity"], x).flatten() for i, bank in enumerate(model.banks.ffn)]
    ).cpu()
    levels = torch.cat([scores.quantile(torch.tensor([0.9, 0.7])), torch.tensor([-math.inf])])
    tables |= {
        "levels.oracle": levels,
        "levels.q8": levels.clone(),
        "densities": torch.tensor([[0.2], [0.6], [1.0]]).repeat(1, layers),
    }
    tables["levels.densities"] = torch.tensor([[0.1], [0.5], [1.0]]).repeat(1, layers)
    tables |= changes
    save_file(tables, path / TENSORS, {"fingerprint": "f"})
    about = {"format": FORMAT, "fingerprint": "f", "density": 1, "densities": [0.2, 0.6, 1], "quality": {}, "scorers": {}}
    (path / DESCRIPTION).write_text(json.dumps(about))
    return Calibration.open(path, "f")


def exact(bank: FfnBank, sensitivity: Tensor, x: Tensor) -> Tensor:
    """|activation| x column length x sensitivity, [T, N] in the bank's order."""
    scores: Tensor = bank.hidden(x).abs() * torch.linalg.vector_norm(bank.down, dim=1) * sensitivity[bank.order].to(x.device)
    return scores


def approximate(bank: FfnBank, sensitivity: Tensor, x: Tensor) -> Tensor:
    """The same by q8; ReLU's pre-activations take the activations' place."""
    pre = proxy(bank, 8).pre(x)
    act = ACTIVATIONS[bank.activation]
    if bank.gate is not None:
        gate, up = pre.chunk(2, -1)
        values = (act(gate) * up).abs()
    else:
        values = pre if bank.activation == "relu" else act(pre).abs()
    scores: Tensor = values * torch.linalg.vector_norm(bank.down, dim=1) * sensitivity[bank.order]
    return scores


SCORES = {"oracle": exact, "q8": approximate}


def shards_of(model: Model, rung: Rung, found: Calibration) -> list[SparseWeights]:
    """Of two ranks."""
    banks = [BankWeights(model.spec, model.source, Rank(rank), dtype=torch.float32, device=CPU) for rank in (0, 1)]
    return [build.build_view(each, rung, found) for each in banks]


@pytest.mark.parametrize("mlp", [0.2, 0.3464, 0.7, 1.0])
@pytest.mark.parametrize("by", SCORES)
def test_a_tokens_neurons_are_those_above_the_level_of_all_layers(model: Model, tmp_path: Path, by: str, mlp: float) -> None:
    found = levelled(model, tmp_path)
    high, low = found.tensor(f"levels.{by}")[:2].tolist()
    level = {0.2: high, 0.3464: high * (low / high) ** (0.1464 / 0.4), 0.7: low * 0.75, 1.0: -math.inf}[mlp]
    rung = Rung.parse(f"self:mlp={mlp},by={by},cut=threshold")
    view, counts = build.build_view(model.banks, rung, found), []
    parts = shards_of(model, rung, found)
    for layer, bank in enumerate(model.banks.ffn):
        for tokens in (1, 3, 20):
            x = torch.randn(tokens, model.spec.hidden_size, generator=torch.Generator().manual_seed(21 + tokens))
            own = SCORES[by](bank, found.tensor(f"layers.{layer}.sensitivity"), x) > level
            expected = bank.out(bank.hidden(x) * own)
            outputs = []
            for each in (view, *parts):
                each._generated = [True] * tokens
                outputs.append(each.mlp(layer, x))
            torch.testing.assert_close(outputs[0], expected, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(outputs[1] + outputs[2], expected, atol=1e-5, rtol=1e-4)
            used = int(own.sum())
            reads = view.reads()
            assert (reads.neurons, reads.overflows) == (used, 0) and sum(part.reads().neurons for part in parts) == used
            counts.append(used / own.numel())
    assert mlp == 1.0 or len(set(counts)) > 3


def test_a_token_may_have_all_neurons_above_the_level(tmp_path: Path) -> None:
    """Of a layer that has few of them on average."""
    model = Model("llama-gqa", tmp_path, intermediate_size=512)
    found = levelled(model, tmp_path, **{"layers.0.sensitivity": torch.full((512,), 1e6)})
    view = build.build_view(model.banks, Rung.parse("self:mlp=0.2,by=q8,cut=threshold"), found)
    for tokens in (1, 2):
        view._generated = [True] * tokens
        x = torch.randn(tokens, model.spec.hidden_size, generator=torch.Generator().manual_seed(25))
        torch.testing.assert_close(view.mlp(0, x), model.banks.mlp(0, x), atol=1e-4, rtol=1e-3)
        reads = view.reads()
        assert reads.overflows == 0 and reads.neurons > 0.95 * tokens * 512


@pytest.mark.parametrize("by", SCORES)
def test_sensitivities_count_in_each_tokens_best(model: Model, tmp_path: Path, by: str) -> None:
    """Alone, which may be one call, in unions, and on two ranks together; over-selection ranks by them again."""
    bank, keep = model.banks.ffn[1], round(0.3 * model.spec.intermediate_size)
    shares = {"densities": torch.tensor([[0.3], [0.6], [1.0]]).repeat(1, model.spec.num_layers)}
    found = levelled(model, tmp_path, **shares)
    sensitivity = found.tensor("layers.1.sensitivity")
    differ = 0
    for tokens in (1, 4, 20):
        x = torch.randn(tokens, model.spec.hidden_size, generator=torch.Generator().manual_seed(30 + tokens))
        own = select.top_mask(SCORES[by](bank, sensitivity, x), keep, SHARDS)
        best = bank.out(bank.hidden(x) * own)
        differ += int((own != select.top_mask(SCORES[by](bank, torch.ones_like(sensitivity), x), keep, SHARDS)).sum())
        ranked = bank.out(bank.hidden(x) * select.top_mask(exact(bank, sensitivity, x), keep, SHARDS))
        for rung, expected in (
            (f"self:mlp=0.2,by={by}", best),
            (f"self:mlp=0.2,by={by},over=3", ranked),
        ):
            whole, *parts = build.build_view(model.banks, Rung.parse(rung), found), *shards_of(model, Rung.parse(rung), found)
            outputs = []
            for view in (whole, *parts):
                view._generated = [True] * tokens
                outputs.append(view.mlp(1, x))
            torch.testing.assert_close(outputs[0], expected, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(outputs[1] + outputs[2], expected, atol=1e-5, rtol=1e-4)
    assert differ > 0


def test_common_neurons_and_groups_count_sensitivities(model: Model, tmp_path: Path) -> None:
    neurons = model.spec.intermediate_size
    tables = {f"layers.{i}.frequency": torch.rand(neurons) for i in range(model.spec.num_layers)}
    found, bank = levelled(model, tmp_path, **tables), model.banks.ffn[0]
    x = torch.randn(3, model.spec.hidden_size, generator=torch.Generator().manual_seed(33))
    scores = approximate(bank, found.tensor("layers.0.sensitivity"), x)
    for how in ("common=0.1", "group=4"):
        selector = build.build_view(model.banks, Rung.parse(f"self:mlp=0.2,by=q8,{how}"), found)._neurons[0]
        assert selector is not None
        torch.testing.assert_close(selector.scorer(x).values, scores, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "table", "said"),
    [
        ("layers.0.sensitivity", torch.ones(3), r"has the shape \[3\]"),
        ("layers.0.sensitivity", 0.0, "is not finite and above 0"),
        ("layers.0.sensitivity", math.inf, "is not finite and above 0"),
        ("layers.0.sensitivity", math.nan, "is not finite and above 0"),
        ("levels.q8", torch.ones(2), r"has the shape \[2\]"),
        ("levels.q8", torch.tensor([1.0, math.nan, 0.0]), "does not fall, or is not finite"),
        ("levels.q8", torch.tensor([1.0, 2.0, 0.0]), "does not fall, or is not finite"),
        ("levels.densities", torch.ones(3, 1), r"has the shape \[3, 1\]"),
        ("levels.densities", -1.0, "are not shares from 0 to 1"),
    ],
)
def test_bad_sensitivities_and_levels_are_one_sentence(tmp_path: Path, name: str, table: Tensor | float, said: str) -> None:
    model = Model("llama-gqa", tmp_path)
    if isinstance(table, float):
        bad, table = table, levelled(model, tmp_path).tensor(name).clone()
        table.flatten()[1] = bad
    with pytest.raises(UserError, match=f"{name} of the calibration .* {said}.*run rowcast calibrate again") as error:
        build.build_view(model.banks, Rung.parse("self:mlp=0.3,by=q8,cut=threshold"), levelled(model, tmp_path, **{name: table}))
    assert "\n" not in str(error.value)
