"""The bank layout and the sparse view: all rows give the dense model, chosen rows give the chosen rows' model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import CASES, VOCAB, tiny_model
from torch import Tensor

from rowcast.kernels import lowbit, select
from rowcast.runtime.banks import BankWeights, FfnBank
from rowcast.runtime.checkpoint.safetensors_file import SafetensorsSource
from rowcast.runtime.comm import SoloComm
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.decoder import Decoder
from rowcast.runtime.kv import PagedKV
from rowcast.runtime.model import load_decoder
from rowcast.runtime.protocols import WeightView
from rowcast.runtime.shard import Shard
from rowcast.runtime.sparse.scorers import FewBits, Oracle, Proxy, Scorer
from rowcast.runtime.sparse.selection import SHARDS, Selector
from rowcast.runtime.sparse.weights import SparseWeights
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.step import SeqStep

CPU = torch.device("cpu")
PROMPT, NEW = 9, 6
FAMILIES = ["opt", "llama-bias", "llama-gqa", "bloom", "mpt", "falcon-7b"]


class Model:
    """A tiny model of each layout."""

    def __init__(self, name: str, path: Path) -> None:
        tiny_model(name, path)
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


def test_a_union_beyond_its_buffer_is_counted_and_reads_all(model: Model) -> None:
    bank = model.banks.ffn[0]
    neurons = len(bank.order)
    x = torch.randn(6, model.spec.hidden_size, generator=torch.Generator().manual_seed(4))
    keep = neurons // 3
    view = model.view(lambda b: Selector(Oracle(b), neurons, keep=keep, capacity=keep))
    view._generated = [True] * 6
    torch.testing.assert_close(view.mlp(0, x), reference_mlp(bank, x, keep), atol=1e-5, rtol=1e-4)
    assert view.reads().overflows == 1


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


def test_threshold_common_path_and_groups(model: Model) -> None:
    bank = model.banks.ffn[0]
    neurons = len(bank.order)
    x = torch.randn(7, model.spec.hidden_size, generator=torch.Generator().manual_seed(6))
    values = bank.score(bank.hidden(x))
    threshold = float(values.flatten().sort().values[-len(values.flatten()) // 3])
    chosen = Selector(Oracle(bank), neurons, keep=neurons // 3, threshold=threshold)(x, False)
    assert chosen.own is not None and torch.equal(chosen.own, values > threshold)
    common = torch.zeros(neurons, dtype=torch.bool)
    common[::10] = True
    chosen = Selector(Oracle(bank), neurons, keep=neurons // 2, common=common)(x, False)
    assert chosen.own is not None and bool(chosen.own[:, common].all()) and int(chosen.own.sum(1).max()) == neurons // 2
    chosen = Selector(Oracle(bank), neurons, keep=neurons // 2, group=2)(x, False)
    assert chosen.own is not None and torch.equal(
        chosen.own[:, 0:-1:2][:, : neurons // 2 - 1], chosen.own[:, 1::2][:, : neurons // 2 - 1]
    )


def test_a_ranks_banks_are_its_share(tmp_path: Path) -> None:
    """Ranks' neurons are disjoint, together all of them, and not the checkpoint's neighbours."""
    model = Model("llama-gqa", tmp_path)

    class Rank(SoloComm):
        def __init__(self, rank: int) -> None:
            self.rank, self.world = rank, 2

    halves = [BankWeights(model.spec, model.source, Rank(r), dtype=torch.float32, device=CPU).ffn[0].order for r in (0, 1)]
    assert sorted(torch.cat(halves).tolist()) == list(range(model.spec.intermediate_size))
    assert not torch.equal(halves[0].sort().values, torch.arange(len(halves[0])))
