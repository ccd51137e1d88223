"""Sparse rungs in rounds that the device runs by itself: the sets, the numbers and the tokens that the host's choice gives.

Here through Triton's interpreter; on a GPU the same, and captured in graphs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from test_sparse_ladder import calibrate
from test_speculation import ids, prompts
from tiny import VOCAB, tiny_model
from torch import Tensor
from triton_interpreting import take_arrays_as_bounds

from rowcast import LLM, SamplingParams
from rowcast.kernels import gpu, lowbit
from rowcast.placement import workload
from rowcast.runtime.banks import BankWeights, FfnBank
from rowcast.runtime.checkpoint.safetensors_file import SafetensorsSource
from rowcast.runtime.comm import SoloComm
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.decoder import Decoder
from rowcast.runtime.kv import PagedKV
from rowcast.runtime.kv.device import BoundStore, Placement
from rowcast.runtime.ladder.memory import kv_heads
from rowcast.runtime.ladder.spec import HeadReads, Ladder
from rowcast.runtime.protocols import KVView, Reads, Tokens
from rowcast.runtime.shard import Shard
from rowcast.runtime.sparse import selection
from rowcast.runtime.sparse.heads import HeadSelector
from rowcast.runtime.sparse.lm_head import TOP, CertifiedHead
from rowcast.runtime.sparse.scorers import FewBits, InputMap, LowRank, Proxy, Scorer
from rowcast.runtime.sparse.selection import Selector
from rowcast.runtime.sparse.weights import SPARSE_TOKENS, SparseWeights
from rowcast.runtime.step import SeqStep

take_arrays_as_bounds()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOKENS = (1, 3, 9, 8, 20)
NO_KV = cast(KVView, None)
Make = Callable[[FfnBank], Selector]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "interpreted", DEVICE.type == "cpu")
    monkeypatch.setattr(workload, "LATE_BYTES", 0)
    if DEVICE.type == "cpu":  # which takes its time for each shard
        monkeypatch.setattr(selection, "SHARDS", 2)


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def device_reads(view: SparseWeights) -> Reads:
    """What its passes on the device read since this was called last."""
    with torch.inference_mode():
        view.send_reads()
    synchronize()
    return view.device_reads()


class Model:
    def __init__(self, name: str, path: Path, dtype: torch.dtype = torch.float32, layers: int = 1) -> None:
        tiny_model(name, path, num_hidden_layers=layers)
        self.path, self.spec = path, spec_from_config(json.loads((path / "config.json").read_text()))
        source = SafetensorsSource.open(path)
        self.banks = BankWeights(self.spec, source, SoloComm(), dtype=dtype, device=DEVICE)

    def inputs(self, tokens: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(tokens, self.spec.hidden_size, generator=generator).to(DEVICE)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model("llama-gqa", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model("opt", tmp_path_factory.mktemp("opt"))


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The second one's heads can be chosen ahead."""
    return Model("opt", tmp_path_factory.mktemp("two-layers"), layers=2)


def few_bits(bank: FfnBank, bits: int = 4) -> FewBits:
    tables = [table for table in (bank.gate, bank.up) if table is not None]
    biases = [bias for bias in (bank.gate_bias, bank.up_bias) if bias is not None]
    return FewBits(lowbit.quantise(torch.cat(tables), bits), torch.cat(biases) if biases else None)


def proxy(bank: FfnBank, **how: Any) -> Proxy:
    return Proxy(few_bits(bank), bank.norms, bank.activation, bank.gate is not None, **how)


def sensitive(bank: FfnBank) -> Selector:
    """By scores and candidates' ranks in which columns count for more than their lengths."""
    norms = bank.norms * (torch.rand(len(bank.order), generator=torch.Generator().manual_seed(8)) * 4 + 0.2).to(DEVICE)
    count = len(bank.order)
    return Selector(replace(proxy(bank), norms=norms), count, keep=round(0.2 * count), over=2.0, norms=norms)


def low_rank(bank: FfnBank) -> Proxy:
    generator, rows = torch.Generator().manual_seed(5), len(bank.order) * (1 if bank.gate is None else 2)
    a, b, bias = (torch.randn(shape, generator=generator).to(DEVICE) for shape in ((16, bank.up.shape[1]), (rows, 16), (rows,)))
    pre = LowRank(lowbit.quantise(a, 8), lowbit.quantise(b, 8), bias)
    return Proxy(pre, bank.norms, bank.activation, bank.gate is not None)


def mapped(bank: FfnBank) -> Proxy:
    size = bank.up.shape[1]
    matrix = torch.eye(size) + torch.randn(size, size, generator=torch.Generator().manual_seed(6)) / size
    return proxy(bank, reads="ahead", ahead=InputMap(lowbit.quantise(matrix.to(DEVICE), 8)))


def chooses(scorer: Callable[[FfnBank], Scorer], share: float = 0.3, **how: Any) -> Make:
    return lambda bank: Selector(scorer(bank), len(bank.order), keep=round(share * len(bank.order)), **how)


def above(share: float) -> Make:
    """Above what a share of some tokens' scores exceed."""

    def make(bank: FfnBank) -> Selector:
        scorer = low_rank(bank)
        x = torch.randn(16, bank.up.shape[1], generator=torch.Generator().manual_seed(7)).to(DEVICE)
        least = float(scorer(x).values.quantile(1 - share))
        return Selector(scorer, len(bank.order), keep=round(share * len(bank.order)), threshold=least)

    return make


CUTS = {
    "bits": chooses(proxy),
    "low rank": chooses(low_rank),
    "re-ranked": chooses(proxy, 0.2, over=2.0),
    "sensitive": sensitive,
    "threshold": above(0.3),
    "ahead": chooses(mapped),
}


class Sets:
    """Runs a view's only layer by the host and on the device, and notes which neurons each token used."""

    def __init__(self, model: Model, make: Make) -> None:
        self.view = SparseWeights(model.banks, [make(bank) for bank in model.banks.ffn])
        self.bank = model.banks.ffn[0]
        assert self.view.on_device

    def by_host(self, x: Tensor, before: Tensor) -> Tensor:
        steps = [SeqStep(0, [0] * len(x), 5, list(range(64)), 1, sample=True)]
        return self._run(x, before, Tokens(*(torch.zeros(len(x), dtype=torch.int64),) * 3, steps))

    def on_device(self, x: Tensor, before: Tensor) -> Tensor:
        return self._run(x, before, Tokens(*(torch.zeros(len(x), dtype=torch.int64),) * 3, ()))

    def _run(self, x: Tensor, before: Tensor, tokens: Tokens) -> Tensor:
        self.view.begin(tokens, NO_KV)
        self.view.out(0, self.view.qkv(0, before)[0], before)
        return self.view.mlp(0, x, before)


FEW = {
    ("opt", "bits"),
    ("opt", "threshold"),
    ("opt", "sensitive"),
    ("opt", "ahead"),
    ("llama-bias", "low rank"),
    ("llama-bias", "re-ranked"),
}
"""What the interpreter is asked to run."""


@pytest.mark.parametrize(
    ("family", "cut"),
    [pytest.param(f, cut, marks=() if (f, cut) in FEW else pytest.mark.gpu) for f in ("opt", "llama-bias") for cut in CUTS],
)
def test_each_token_gets_what_the_host_gives(tmp_path: Path, family: str, cut: str) -> None:
    model = Model(family, tmp_path)
    sets = Sets(model, CUTS[cut])
    selector = CUTS[cut](sets.bank)
    for tokens in TOKENS if DEVICE.type == "cuda" else TOKENS[: 3 if selector.reranks else 2]:
        x, before = model.inputs(tokens, tokens), model.inputs(tokens, tokens + 50)
        sets.view.reads(), device_reads(sets.view)
        expected, found = sets.by_host(x, before), sets.on_device(x, before)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        by_host, on_device = sets.view.reads(), device_reads(sets.view)
        if selector.reranks and tokens == 1:  # what is not kept is not multiplied on the device
            by_host.bytes -= (selector.candidates - selector.keep) * sets.bank.out_row_bytes
        assert on_device == by_host
    assert device_reads(sets.view) == Reads()


@pytest.mark.parametrize("random", [False, True])
def test_the_certified_head_on_the_device(opt: Model, random: bool) -> None:
    """The largest logits are the host's, exactly: one of each token, or as many as the host's; and what is read is counted."""
    rows = opt.banks.outer.head_rows
    assert rows is not None
    lm = CertifiedHead(rows, bits=(4, 3))
    view = SparseWeights(opt.banks, [chooses(proxy)(bank) for bank in opt.banks.ffn], lm=lm)
    assert view.on_device and view.reads_more_at_random
    view.begin_round(NO_KV, [0], late=False, random=random)
    for tokens in (1, 3, 17):
        x = opt.inputs(tokens, tokens)
        view.begin(Tokens(*(torch.zeros(tokens, dtype=torch.int64),) * 3, ()), NO_KV)
        found, whole, wanted = view.head(x), opt.banks.head(x), TOP if random else 1
        reads, best = device_reads(view), whole.topk(min(wanted, len(rows)))
        torch.testing.assert_close(found.gather(1, best.indices), best.values)
        assert torch.equal(found.argmax(1), whole.argmax(1))
        least = rows.nbytes if tokens == 17 else lm.bytes
        assert least <= reads.bytes - view._outer_bytes <= least + (0 if tokens == 17 else 2 * rows.nbytes)
        assert reads.fallbacks == 0
        dense = torch.isclose(found, whole, atol=1e-6, rtol=1e-6).float().mean()
        assert dense == 1 if tokens == 17 else random or dense < 1


def head_view(model: Model, keep: int, cut: str | None = "bits", reads: HeadReads = "own") -> SparseWeights:
    """`cut`: of neurons; None: all of them. `reads`: of heads, behind layer 0."""
    generator = torch.Generator().manual_seed(8)
    spec, layers = model.spec, range(model.spec.num_layers)
    shapes = (spec.num_heads, spec.hidden_size), (spec.num_heads,)
    heads = [
        HeadSelector(*(torch.randn(s, generator=generator).to(DEVICE) for s in shapes), keep=keep, reads=reads if i else "own")
        for i in layers
    ]
    neurons = [None if cut is None else CUTS[cut](bank) for bank in model.banks.ffn]
    return SparseWeights(model.banks, neurons, heads=heads)


class Passes:
    """Passes of some tokens of one sequence behind a prompt, by the host and on the device."""

    PROMPT = 9

    def __init__(self, model: Model, view: SparseWeights, dtype: torch.dtype = torch.float32) -> None:
        self.view = view
        self.decoder = Decoder(view, SoloComm(), DEVICE)
        self.kv = PagedKV(model.spec, Shard(), num_blocks=16, block_size=4, dtype=dtype, device=DEVICE, lazy=True)
        self.blocks = list(range(16))[::-1]
        self.by_host([t % VOCAB for t in range(self.PROMPT)], 0)
        self.kv.commit(0, self.PROMPT)
        assert view.on_device

    @property
    def entries(self) -> list[Tensor]:
        """Keys and values of each layer in turn."""
        return [each for layer in range(self.kv.spec.num_layers) for each in self.kv.entries(layer)]

    def by_host(self, ids: list[int], start: int = PROMPT) -> Tensor:
        return self.decoder.run([SeqStep(0, ids, start, self.blocks, self.PROMPT, sample=True)], self.kv)

    def inputs(self, ids: list[int], start: int = PROMPT, late: bool | int = False) -> tuple[Tokens, BoundStore]:
        def ints(*values: int) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=DEVICE)

        positions = torch.arange(start, start + len(ids), device=DEVICE)
        table = ints(*self.blocks)[None]
        slots = table[0].long()[positions // 4] * 4 + positions % 4
        at = Placement(table, ints(start), ints(len(ids)), slots, 64)
        of = ints(self.PROMPT) if late is True else late or None
        return Tokens(torch.tensor(ids, device=DEVICE), positions, positions, ()), BoundStore(self.kv, at, late=of)

    def on_device(self, tokens: Tokens, bound: BoundStore) -> Tensor:
        return self.decoder.forward(tokens, cast(KVView, bound))


@pytest.mark.parametrize(("family", "tokens"), [("opt", 1), ("opt", 9), ("llama-gqa", 3)])
def test_chosen_heads_are_the_hosts(tmp_path: Path, family: str, tokens: int) -> None:
    """And what they read; K and V are those of all heads, on the host's passes, too."""
    as_by_the_host(Model(family, tmp_path), tokens, "bits", "own")


@pytest.mark.parametrize(
    ("family", "tokens", "cut"), [("opt", 1, "ahead"), ("falcon-7b", 1, "bits"), ("llama-gqa", 3, "ahead"), ("opt", 9, "bits")]
)
def test_heads_chosen_ahead_are_the_hosts(tmp_path: Path, family: str, tokens: int, cut: str) -> None:
    """Beside neurons that are, and others."""
    as_by_the_host(Model(family, tmp_path, layers=2), tokens, cut, "ahead")


def as_by_the_host(model: Model, tokens: int, cut: str, reads: HeadReads) -> None:
    passes = Passes(model, head_view(model, model.spec.num_heads // 4, cut, reads))
    ids = [(7 * t + tokens) % VOCAB for t in range(tokens)]
    passes.view.reads(), device_reads(passes.view)
    expected, by_host = passes.by_host(ids), passes.view.reads()
    for entries in passes.entries:
        entries[passes.blocks[3:]] = entries[passes.blocks[2], 1:] = torch.nan  # of the pass's own tokens
    found = passes.on_device(*passes.inputs(ids))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert device_reads(passes.view) == by_host


class LatePasses:
    """A sequence whose K/V are late beside the same with complete ones. Behind layer 0 heads are chosen ahead."""

    def __init__(self, model: Model, late: bool | int) -> None:
        self.passes, self.complete = (Passes(model, head_view(model, 1, None, "ahead")) for _ in range(2))
        self._late, self.end = late, Passes.PROMPT
        for one in (self.passes, self.complete):
            device_reads(one.view)
            one.view.begin_round(one.kv, [0], late=type(late) is int, random=False)
            for entries in one.entries:
                entries[one.blocks[3:]] = entries[one.blocks[2], 1:] = torch.nan  # behind the prompt

    def run(self, count: int) -> int:
        """A pass of so many tokens; how many entries are lacking then."""
        ids = [(7 * self.end + 3 * t) % VOCAB for t in range(count)]
        found = self.passes.on_device(*self.passes.inputs(ids, self.end, late=self._late))
        expected = self.complete.on_device(*self.complete.inputs(ids, self.end))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        self.end += count
        return self.lacking()

    def lacking(self) -> int:
        """Entries of the layer that lacks most."""
        missing = []
        for store, whole in zip(self.passes.entries, self.complete.entries, strict=True):
            found, expected = (e[self.passes.blocks].flatten(0, 1)[: self.end] for e in (store, whole))
            there = ~found.isnan()
            torch.testing.assert_close(found[there], expected[there], atol=1e-5, rtol=1e-5)
            missing.append(int((~there).any(-1).sum()))
        assert missing[::2] == missing[1::2]
        return max(missing)


@pytest.mark.parametrize("tokens", [[1, 1, 3], [2, 9, 1]])
def test_entries_are_written_when_a_head_is_used(opt: Model, tokens: list[int]) -> None:
    """Those that nobody has used yet are not there, and the numbers are those of complete ones."""
    written_when_used(opt, tokens)


@pytest.mark.parametrize(("family", "tokens"), [("opt", [1, 1, 3, 1]), ("opt", [1, 9, 1])])
def test_entries_of_heads_chosen_ahead(tmp_path: Path, family: str, tokens: list[int]) -> None:
    """Their inputs are kept by the norm before attention."""
    written_when_used(Model(family, tmp_path, layers=2), tokens)


def test_entries_of_heads_chosen_ahead_behind_a_norm(tmp_path: Path) -> None:
    """Which is that of the MLP before."""
    written_when_used(Model("opt-350m", tmp_path, layers=2), [1, 2, 1])


def written_when_used(model: Model, tokens: list[int]) -> None:
    both = LatePasses(model, True)
    lacking = [both.run(count) for count in tokens]
    assert max(lacking) > 0
    assert all(n == 0 for n, count in zip(lacking, tokens, strict=True) if count > SPARSE_TOKENS)
    late, complete = device_reads(both.passes.view), device_reads(both.complete.view)
    assert late.bytes < complete.bytes or max(tokens) > SPARSE_TOKENS


@pytest.mark.parametrize(("most", "count", "full"), [(8, 1, 9), (5, 3, 4)])
def test_entries_are_complete_before_the_ring_is_full(opt: Model, most: int, count: int, full: int) -> None:
    """Rounds go on with a sequence; others join it, or the host."""
    complete_before_full(opt, most, count, full)


@pytest.mark.parametrize(("most", "count", "full"), [(8, 3, 3), (8, 1, 9)])
def test_entries_of_heads_chosen_ahead_are_complete_before_the_ring_is_full(
    two_layers: Model, most: int, count: int, full: int
) -> None:
    complete_before_full(two_layers, most, count, full)


def complete_before_full(model: Model, most: int, count: int, full: int) -> None:
    both = LatePasses(model, most)
    lacking = [both.run(count) for _ in range(full)]
    assert 0 not in lacking[:-1] and lacking[-1] == 0
    while both.lacking() == 0:
        both.run(1)
    kv = both.passes.kv
    kv.reserve(SeqStep(0, [0] * (both.end - Passes.PROMPT), Passes.PROMPT, both.passes.blocks, Passes.PROMPT, sample=True))
    kv.commit(0, both.end - Passes.PROMPT)
    if count == 1:
        both.passes.view.begin_round(kv, [0, 1], late=False, random=False)
    else:
        both.passes.view.begin(
            Tokens(*(torch.zeros(1, dtype=torch.int64),) * 3, [SeqStep(0, [1], both.end, [], 9, sample=True)]), kv
        )
    assert both.lacking() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["opt", "llama-gqa"])
@pytest.mark.parametrize("cut", CUTS)
def test_replays_follow_the_scores(tmp_path: Path, family: str, cut: str, dtype: torch.dtype) -> None:
    """A captured pass chooses anew with each replay, on its side stream, too, and counts what it read. Heads of layer 0 by their own
    input, others ahead."""
    model = Model(family, tmp_path, dtype, layers=3)
    passes = Passes(model, head_view(model, model.spec.num_heads // 2, cut, "ahead"), dtype)
    for count in (1, 5, 12):
        tokens, bound = passes.inputs([0] * count)
        passes.on_device(tokens, bound)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = passes.on_device(tokens, bound)
        seen = set()
        for seed in range(5):
            tokens.ids.copy_(torch.randint(VOCAB, (count,), generator=torch.Generator().manual_seed(seed)))
            device_reads(passes.view)
            graph.replay()
            counted = device_reads(passes.view)
            assert not found.isnan().any()
            assert torch.equal(found, passes.on_device(tokens, bound))
            assert device_reads(passes.view) == counted
            assert counted.neurons > 0 and counted.heads * 2 == counted.heads_of
            seen.add(counted.bytes)
        assert len(seen) > 1 or (count == 1 and "threshold" not in cut) or count == 12


GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False)
SEEDED = replace(GREEDY, temperature=0.8, seed=11)
ASKED = [prompt[-24:] for prompt in prompts(4, shortest=20)][:2]


def make_llm(model: Model, ladder: str, **keywords: Any) -> LLM:
    how = {"dtype": "float32", "device": DEVICE.type, "block_size": 4, "progress": False, **keywords}
    return LLM(model.path, ladder=ladder, **how)


def by_itself(llm: LLM) -> bool:
    """Whether the device runs the rounds."""
    return llm.engine._executor._rounds is not None  # type: ignore[attr-defined]


def driven(llm: LLM) -> LLM:
    """The host drives them from now on."""
    llm.engine._executor._rounds = None  # type: ignore[attr-defined]
    return llm


@pytest.fixture(scope="module")
def calibrated(opt: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrate(opt.path, tmp_path_factory.mktemp("calibration"))


@pytest.fixture(scope="module")
def calibrated_two(two_layers: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrate(two_layers.path, tmp_path_factory.mktemp("calibration-of-two"))


def test_drafts_change_no_token(opt: Model, calibrated: Path) -> None:
    """Of neurons and of heads, whose K/V are late."""
    changes_no_token(opt, calibrated, "self:mlp=0.6,heads=0.5,gamma=2 / plain")


def test_drafts_that_look_ahead_change_no_token(two_layers: Model, calibrated_two: Path) -> None:
    changes_no_token(two_layers, calibrated_two, "self:mlp=0.6,heads=0.5,heads_by=ahead,gamma=2 / plain")


def changes_no_token(model: Model, calibration: Path, ladder: str) -> None:
    llm = make_llm(model, ladder, calibration=calibration)
    assert by_itself(llm)
    output = llm.generate(ASKED[0], SEEDED)[0]
    assert ids([output]) == ids(make_llm(model, "plain").generate(ASKED[0], SEEDED))
    assert sum(output.metrics.rungs["self"].judged) > 0
    assert output.metrics.density["self"] == pytest.approx(0.6, abs=0.02)
    assert output.metrics.head_density["self"] == 0.5
    llm.engine.check()


@pytest.mark.parametrize(
    "ladder",
    [
        "self:mlp=0.3,by=q2,over=1.5",
        *(pytest.param(x, marks=pytest.mark.gpu) for x in ("self:mlp=0.5", "ngram:gamma=3 / self:mlp=0.5")),
    ],
)
def test_a_last_rung_is_what_the_host_drives(llama: Model, ladder: str) -> None:
    llm = make_llm(llama, ladder, mode="approximate")
    assert by_itself(llm)
    count = 2 if DEVICE.type == "cuda" else 1
    outputs = llm.generate(ASKED[:count], [SEEDED, GREEDY][:count])
    found = [output.metrics for output in outputs]
    again = driven(llm).generate(ASKED[:count], [SEEDED, GREEDY][:count])
    assert ids(outputs) == ids(again)
    for one, other in zip(found, [output.metrics for output in again], strict=True):
        assert one.density == other.density


def test_a_certified_head_in_a_round_of_the_device(llama: Model) -> None:
    """It drafts what plain decoding confirms; without its exact rows hardly anything would stand."""
    params = replace(GREEDY, max_tokens=7)
    llm = make_llm(llama, "self:lm=hire,gamma=3 / plain")
    assert by_itself(llm)
    [output] = llm.generate(ASKED[:1], params)
    assert ids([output]) == ids(make_llm(llama, "plain").generate(ASKED[:1], params))
    assert output.metrics.acceptance["self"] == 1


def test_cuts_that_the_host_makes_stay_its(llama: Model) -> None:
    assert not by_itself(make_llm(llama, "self:mlp=0.4,by=gate,gamma=2 / plain"))
    assert not by_itself(make_llm(llama, "self:mlp=0.4,group=4,gamma=2 / plain"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "ladder",
    [
        "self:mlp=0.5,gamma=2 / plain",
        "self:mlp=0.5,lm=hire,gamma=2 / plain",
        "self:mlp=0.3,by=q2,over=1.5",
        "ngram:gamma=3 / self:mlp=0.5",
        "self:mlp=0.5,lm=hire",
    ],
)
def test_captured_rounds_give_what_eager_ones_give(llama: Model, ladder: str, dtype: str) -> None:
    mode = "exact" if "plain" in ladder else "approximate"
    params = [replace(p, max_tokens=40) for p in (GREEDY, SEEDED)]
    outputs = []
    for eager in (False, True):
        llm = make_llm(llama, ladder, mode=mode, eager=eager, dtype=dtype)
        assert by_itself(llm)
        outputs.append(llm.generate(ASKED, params))
    assert ids(outputs[0]) == ids(outputs[1])
    for one, other in zip(*outputs, strict=True):
        assert one.metrics.density == other.metrics.density


def test_a_last_rung_that_looks_ahead_is_what_the_host_drives(two_layers: Model, calibrated_two: Path) -> None:
    llm = make_llm(two_layers, "self:mlp=0.6,heads=0.5,heads_by=ahead", calibration=calibrated_two, mode="approximate")
    assert by_itself(llm)
    found = ids(llm.generate(ASKED[:1], SEEDED))
    assert ids(driven(llm).generate(ASKED[:1], SEEDED)) == found


@pytest.mark.gpu
@pytest.mark.parametrize("by", ["", ",heads_by=ahead"])
@pytest.mark.parametrize("ladder", ["self:mlp=0.6,heads=0.5", "ngram:gamma=3 / self:mlp=0.6,heads=0.5"])
def test_late_entries_of_a_last_rung(two_layers: Model, calibrated_two: Path, ladder: str, by: str) -> None:
    """Sequences that run alone, that others join and that others leave give what the host's rounds give."""
    how = {"calibration": calibrated_two, "mode": "approximate", "max_num_batched_tokens": 16}
    params = [replace(p, max_tokens=n) for p, n in ((GREEDY, 36), (SEEDED, 24), (SEEDED, 12))]
    asked = [ASKED[0][:3], ASKED[1], ASKED[0]]
    expected = None
    for drive, eager in ((driven, True), (lambda llm: llm, True), (lambda llm: llm, False)):
        llm = drive(make_llm(two_layers, f"{ladder}{by}", eager=eager, **how))
        found = [ids(llm.generate(asked, params)), *(ids(llm.generate(one, p)) for one, p in zip(asked, params, strict=True))]
        assert expected is None or found == expected
        assert found[0] == [one[0] for one in found[1:]]
        expected = found
        llm.engine.check()


def test_entries_are_late_where_plans_count_them_so(opt: Model, calibrated: Path) -> None:
    """As long as inputs of a round's tokens are kept, of a last rung's two rounds'."""
    state: Any = SimpleNamespace(batch=1, round=SimpleNamespace(base=torch.zeros(1)))
    for text, sparse, late in (
        ("ngram:gamma=7 / self:heads=0.5", 1, True),
        ("ngram:gamma=8 / self:heads=0.5", 1, False),
        ("self:heads=0.5,gamma=15 / plain", 0, True),
        ("self:heads=0.5,gamma=16 / plain", 0, False),
    ):
        ladder = Ladder.parse(text)
        llm = make_llm(opt, text, calibration=calibrated, mode="approximate" if ladder.approximate else "exact")
        rounds: Any = llm.engine._executor._rounds  # type: ignore[attr-defined]
        assert (rounds._late(sparse, state) is not None) == late, text
        assert (kv_heads(ladder, ladder.rungs[sparse], opt.spec, on_gpu=True) < 1) == late, text


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_a_round_run_in_vain_leaves_late_entries_right(opt: Model, calibrated: Path) -> None:
    """Another request joins while the round after this one is under way, in which all heads write."""
    llm = make_llm(opt, "self:mlp=0.6,heads=0.5", calibration=calibrated, mode="approximate")
    rounds: Any = llm.engine._executor._rounds  # type: ignore[attr-defined]
    [expected] = ids(llm.generate([ASKED[0][:3]], replace(GREEDY, max_tokens=18)))
    rounds._goes_ahead = True
    first = llm.engine.add(ASKED[0][:3], replace(GREEDY, max_tokens=18))
    while len(first.sequences[0].output_ids) < 15:
        llm.engine.step()
    llm.engine.add(ASKED[0][:2], replace(GREEDY, max_tokens=2))
    while llm.engine.has_work:
        llm.engine.step()
    assert first.sequences[0].output_ids == expected
