"""The low-bit view: the model of its rounded weights, exact as a draft, counted to the byte."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_sparse_ladder import tensors
from test_speculation import GREEDY as LONG_GREEDY
from test_speculation import SEEDED as LONG_SEEDED
from test_speculation import ids, prompts
from thread_comm import ThreadComm, run_ranks
from tiny import CASES, VOCAB, tiny_model
from torch import Tensor
from triton_interpreting import take_arrays_as_bounds

from rowcast import LLM
from rowcast.errors import UserError
from rowcast.kernels import gpu, lowbit, native
from rowcast.runtime.banks import BankWeights
from rowcast.runtime.checkpoint.safetensors_file import SafetensorsSource
from rowcast.runtime.comm import SoloComm
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.decoder import Decoder
from rowcast.runtime.kv import PagedKV
from rowcast.runtime.ladder.spec import Rung
from rowcast.runtime.lowbit_sizes import rounded_bytes
from rowcast.runtime.lowbit_weights import LowBitWeights
from rowcast.runtime.model import load_decoder
from rowcast.runtime.protocols import WeightView
from rowcast.runtime.shard import Shard
from rowcast.runtime.sparse.sizes import expected_bytes
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.step import SeqStep

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROMPT, TOKENS = 9, 15
FAMILIES = ["opt", "opt-350m", "llama-bias", "llama-tied", "qwen3", "bloom", "mpt", "falcon-7b"]
GREEDY, SEEDED = replace(LONG_GREEDY, max_tokens=12), replace(LONG_SEEDED, max_tokens=12)
ONE_BY_ONE = [PROMPT, *range(PROMPT + 1, TOKENS + 1)]


class Model:
    def __init__(self, name: str, path: Path) -> None:
        tiny_model(name, path)
        self.spec: ModelSpec = spec_from_config(json.loads((path / "config.json").read_text()))
        self.source = SafetensorsSource.open(path)
        self.banks = self.fresh_banks()
        self.tokens = torch.randint(VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(3)).tolist()

    def fresh_banks(self) -> BankWeights:
        return BankWeights(self.spec, self.source, SoloComm(), dtype=torch.float32, device=CPU)

    def loaded(self, bits: int, **keywords: Any) -> LowBitWeights:
        keywords = {"dtype": torch.float32, "device": CPU, **keywords}
        return LowBitWeights.load(self.spec, self.source, SoloComm(), bits, **keywords)

    def logits(self, view: WeightView | None, chunks: list[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Logits [T, V] of all tokens, run in passes that end at `chunks`; None: the plain view."""
        decoder = load_decoder(self.spec, self.source) if view is None else Decoder(view, SoloComm(), CPU)
        kv = PagedKV(self.spec, Shard(), num_blocks=8, block_size=4, dtype=dtype, device=CPU)
        rows, start = [], 0
        for end in chunks:
            step = SeqStep(0, self.tokens[start:end], start, list(range(8)), PROMPT, sample=True)
            rows.append(decoder.logits(decoder.run([step], kv)))
            kv.commit(0, end - start)
            start = end
        return torch.cat(rows)

    def rounded(self, view: LowBitWeights) -> BankWeights:
        """A dense view of the weights that the codes of `view` stand for."""
        banks = self.fresh_banks()
        for layer, attention, ffn in zip(view._layers, banks.attention, banks.ffn, strict=True):
            attention.qkv.copy_(lowbit.dequantise(layer.qkv))
            attention.o.copy_(lowbit.dequantise(layer.out).T)
            up = lowbit.dequantise(layer.up)
            if ffn.gate is not None:
                ffn.gate.copy_(up[: len(ffn.order)])
            ffn.up.copy_(up[-len(ffn.order) :])
            ffn.down.copy_(lowbit.dequantise(layer.down).T)
        outer, head = banks.outer, lowbit.dequantise(view._head)
        banks.head = lambda x: outer.pad(F.linear(outer.head_input(x), head))
        return banks


@pytest.fixture(scope="module", params=CASES)
def any_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """No native part, whose inputs are in 16-bit fixed point."""
    monkeypatch.setattr(native, "library", lambda: None)


@pytest.mark.usefixtures("by_torch")
def test_it_is_the_model_of_its_rounded_weights(any_model: Model) -> None:
    view = any_model.loaded(4)
    expected = any_model.logits(any_model.rounded(view), ONE_BY_ONE)
    for chunks in (ONE_BY_ONE, [PROMPT, PROMPT + 4, TOKENS]):
        torch.testing.assert_close(any_model.logits(view, chunks), expected, atol=3e-5, rtol=1e-5)


def test_rounding_is_near_the_model(model: Model) -> None:
    """8 bits nearer than 4; a neuron or head in a wrong place would be far away."""
    dense = model.logits(None, ONE_BY_ONE)
    off = [float((model.logits(model.loaded(bits), ONE_BY_ONE) - dense).norm() / dense.norm()) for bits in (8, 4)]
    assert off[0] < 0.05 and off[0] < off[1] < 0.5


class Rank(SoloComm):
    """One of two, whose parts of sums stay apart."""

    def __init__(self, rank: int) -> None:
        self.rank, self.world = rank, 2


def test_ranks_round_their_own_shares(llama: Model) -> None:
    how: dict[str, Any] = {"dtype": torch.float32, "device": CPU}
    ranks = [LowBitWeights.load(llama.spec, llama.source, Rank(rank), 8, **how) for rank in (0, 1)]
    x = torch.randn(3, llama.spec.hidden_size, generator=torch.Generator().manual_seed(4))
    heads = torch.randn(3, llama.spec.num_heads, llama.spec.head_dim, generator=torch.Generator().manual_seed(5))
    half = llama.spec.num_heads // 2
    logits = torch.cat([rank.head(x) for rank in ranks], dim=1)[:, : llama.spec.vocab_size]
    for found, expected in (
        (ranks[0].mlp(1, x) + ranks[1].mlp(1, x), llama.banks.mlp(1, x)),
        (ranks[0].out(1, heads[:, :half]) + ranks[1].out(1, heads[:, half:]), llama.banks.out(1, heads)),
        (torch.cat([rank.qkv(1, x)[0] for rank in ranks], dim=1), llama.banks.qkv(1, x)[0]),
        (logits, llama.banks.head(x)),
    ):
        assert (found - expected).norm() < 0.03 * expected.norm()


@pytest.fixture
def floats() -> Iterator[None]:
    """Products take inputs as they are: with VNNI they make 16-bit numbers of each 64, which a rank's share does not hold whole."""
    lib = native.library()
    if lib is not None:
        lib.rowcast_level(native.LEVELS.index("avx2"))
    yield
    if lib is not None:
        lib.rowcast_level(len(native.LEVELS) - 1)


@pytest.mark.usefixtures("floats")
def test_two_ranks_are_the_same_model(llama: Model) -> None:
    """Shares of 45 neurons and of 32 columns of heads cut groups of 64: both ranks round the whole group."""
    alone = llama.logits(llama.loaded(4), [TOKENS])
    step = SeqStep(0, llama.tokens, 0, list(range(8)), PROMPT, sample=True)

    def rank(comm: ThreadComm) -> Tensor:
        view = LowBitWeights.load(llama.spec, llama.source, comm, 4, dtype=torch.float32, device=CPU)
        banks = BankWeights(llama.spec, llama.source, comm, dtype=torch.float32, device=CPU)
        beside = LowBitWeights.beside(banks, llama.source, comm, 4, dtype=torch.float32, device=CPU)
        for ours, theirs in zip(parts(beside), parts(view), strict=True):
            assert torch.equal(ours.codes, theirs.codes) and torch.equal(ours.scales, theirs.scales)
        kv = PagedKV(llama.spec, Shard(comm.rank, 2), num_blocks=8, block_size=4, dtype=torch.float32, device=CPU)
        decoder = Decoder(view, comm, CPU)
        return decoder.logits(decoder.run([step], kv))

    for found in run_ranks(2, rank):
        torch.testing.assert_close(found, alone, atol=2e-4, rtol=1e-4)


def test_of_banks_and_loaded_are_the_same(model: Model) -> None:
    view, loaded = LowBitWeights.of_banks(model.banks, 4), model.loaded(4)
    for ours, theirs in zip([view._head, *parts(view)], [loaded._head, *parts(loaded)], strict=True):
        assert torch.equal(ours.codes, theirs.codes) and torch.equal(ours.scales, theirs.scales)
    assert torch.equal(model.logits(view, ONE_BY_ONE), model.logits(loaded, ONE_BY_ONE))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_pass_reads_what_was_expected(model: Model, bits: int) -> None:
    expected = expected_bytes(model.spec, Rung(kind="self", bits=bits), 4, None)  # type: ignore[arg-type]
    made = model.loaded(bits), model.loaded(bits, outer=model.banks.outer), LowBitWeights.of_banks(model.banks, bits)
    assert [view.bytes for view in made] == [expected] * 3
    model.logits(made[0], ONE_BY_ONE)
    assert made[0].reads().bytes == len(ONE_BY_ONE) * expected and made[0].reads().bytes == 0


def parts(view: LowBitWeights) -> list[lowbit.LowBit]:
    return [part for layer in view._layers for part in (layer.qkv, layer.out, layer.up, layer.down)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model("llama-gqa", tmp_path_factory.mktemp("llama"))


def products(view: LowBitWeights, tokens: slice) -> list[Tensor]:
    """All of layer 1's, and logits, of some of 40 random tokens."""
    generator, spec = torch.Generator().manual_seed(5), view.spec
    device = view._head.codes.device
    dtype = view.embed(torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(1, dtype=torch.int64, device=device)).dtype
    x, heads = (
        torch.randn(40, spec.hidden_size, generator=generator),
        torch.randn(40, spec.num_heads, spec.head_dim, generator=generator),
    )
    x, heads = x[tokens].to(device, dtype), heads[tokens].to(device, dtype)
    return [*view.qkv(1, x), view.out(1, heads, x), view.mlp(1, x, x), view.head(x)]


@pytest.mark.skipif(native.library() is None, reason="the native part was not built")
def test_a_tokens_products_are_its_own(model: Model) -> None:
    """The same bits whatever the number of tokens."""
    view = model.loaded(4)
    whole = products(view, slice(0, 40))
    for few in (slice(20, 21), slice(20, 27), slice(7, 23)):
        for part, all_of_them in zip(products(view, few), whole, strict=True):
            assert torch.equal(part, all_of_them[few])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("llama-bias", torch.float32), ("llama-gqa", torch.bfloat16), ("llama-gqa", torch.float16), ("opt", torch.bfloat16)],
)
def test_a_gpus_kernels(name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against torch's products; a token's are its own."""
    take_arrays_as_bounds()
    model = Model(name, tmp_path)
    view = model.loaded(4, dtype=dtype, device=DEVICE)
    monkeypatch.setattr(gpu, "interpreted", DEVICE.type == "cpu")
    found = products(view, slice(0, 20))
    for few in (slice(3, 4), slice(3, 10)):
        for part, all_of_them in zip(products(view, few), found, strict=True):
            assert torch.equal(part, all_of_them[few])
    monkeypatch.setattr(gpu, "takes", lambda x: False)
    monkeypatch.setattr(native, "library", lambda: None)
    for ours, theirs in zip(found, products(view, slice(0, 20)), strict=True):
        assert ours.dtype == theirs.dtype == dtype
        assert (ours.float() - theirs.float()).norm() <= max(5e-5, 2 * torch.finfo(dtype).eps) * theirs.float().norm()


def test_sixteen_bits(llama: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Natively and by torch, within what 16 bits resolve."""
    expected = llama.logits(llama.rounded(llama.loaded(8)), ONE_BY_ONE)
    view = llama.loaded(8, dtype=torch.bfloat16)
    for _ in range(2):
        found = llama.logits(view, ONE_BY_ONE, torch.bfloat16)
        assert found.dtype == torch.bfloat16 and (found.float() - expected).norm() < 0.03 * expected.norm()
        monkeypatch.setattr(native, "library", lambda: None)


VIEW = "chunk=4,sinks=4,recent=8"
LADDERS = {
    "4 bits": "self:bits=4,gamma=3 / plain",
    "8 bits": "self:bits=8,gamma=4 / plain",
    "retrieval": f"self:bits=4,kv=24,{VIEW},gamma=3 / plain",
    "streaming": "self:bits=4,kv=24,view=streaming,sinks=4,gamma=3 / plain",
    "two": f"self:bits=4,kv=24,{VIEW},gamma=2 / self:bits=8,gamma=4 / plain",
    "beside neurons": "self:bits=4,gamma=2 / self:mlp=0.6,gamma=3 / plain",
    "controlled": f"ngram / self:bits=4 / self:kv=24,{VIEW} / plain",
}


def make(path: Path, ladder: str, **keywords: Any) -> LLM:
    return LLM(path, ladder=ladder, **{"dtype": "float32", "device": "cpu", "block_size": 4, "progress": False, **keywords})


@pytest.fixture(scope="module", params=["llama-gqa", "opt", "qwen3", "bloom", "falcon-7b"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param, path)
    return path


@pytest.fixture(scope="module")
def plain(target: Path) -> dict[str, list[list[int]]]:
    llm = make(target, "plain")
    return {name: ids(llm.generate(asked(), params)) for name, params in (("greedy", GREEDY), ("seeded", SEEDED))}


def asked() -> list[list[int]]:
    return [prompt[:40] for prompt in prompts(4)]


@pytest.mark.parametrize("ladder", LADDERS)
def test_low_bit_drafts_change_no_token(target: Path, plain: dict[str, list[list[int]]], ladder: str) -> None:
    llm = make(target, LADDERS[ladder])
    for name, params in (("greedy", GREEDY), ("seeded", SEEDED)):
        outputs = llm.generate(asked(), params)
        assert ids(outputs) == plain[name], name
        llm.engine.check()
    if ladder != "controlled":
        first = llm.engine._ladder.names[0]
        assert sum(sum(output.metrics.rungs[first].judged) for output in outputs) > 0


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the interpreter is for machines without a GPU")
def test_rounds_that_the_device_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take_arrays_as_bounds()
    tiny_model("llama-gqa", tmp_path, num_hidden_layers=1)
    params = replace(SEEDED, max_tokens=4)
    expected = ids(make(tmp_path, "plain").generate(asked()[:1], params))
    monkeypatch.setattr(gpu, "interpreted", True)
    llm = make(tmp_path, "self:bits=4,gamma=2 / plain")
    assert llm.engine._executor._rounds is not None  # type: ignore[attr-defined]
    [output] = llm.generate(asked()[:1], params)
    assert ids([output]) == expected
    whole, low = views(llm)
    assert type(whole).__name__ == "BankWeights" and isinstance(low, LowBitWeights)
    counts = output.metrics.rungs["self"]
    assert sum(counts.judged) > 0 and counts.bytes_read >= sum(counts.judged) * low.bytes


@pytest.mark.gpu
def test_low_bit_drafts_change_no_token_on_a_gpu(target: Path) -> None:
    """Views are made of the banks that plain runs, and share all but what is rounded."""
    plain = make(target, "plain", device="cuda")
    expected = {params: ids(plain.generate(asked(), params)) for params in (GREEDY, SEEDED)}
    for ladder in LADDERS.values():
        llm = make(target, ladder, device="cuda")
        for params, tokens in expected.items():
            assert ids(llm.generate(asked(), params)) == tokens, ladder
        low = [view for view in views(llm) if isinstance(view, LowBitWeights)]
        whole = [view for view in views(llm) if not isinstance(view, LowBitWeights)]
        own = sum(t.nbytes for key, t in tensors(low).items() if key not in tensors(whole))
        assert own == sum(rounded_bytes(llm.spec, bits) for bits in {4, 8} if f"bits={bits}" in ladder)


def test_maximal_is_exact_when_greedy(target: Path, plain: dict[str, list[list[int]]]) -> None:
    assert ids(make(target, LADDERS["two"], verification="maximal").generate(asked(), GREEDY)) == plain["greedy"]


def test_as_the_last_rung_its_output_depends_on_the_request_alone(target: Path) -> None:
    for params in (GREEDY, SEEDED):
        llm = make(target, "self:bits=4", mode="approximate")
        alone = [ids(llm.generate(prompt, params))[0] for prompt in asked()]
        assert ids(llm.generate(asked(), params)) == alone
        below = make(target, f"self:bits=4,kv=24,{VIEW},gamma=3 / self:bits=4", mode="approximate")
        assert ids(below.generate(asked(), params)) == alone


def test_preempted_sequences_run_through_the_same_rung(target: Path) -> None:
    llm = make(target, "ngram:gamma=2 / self:bits=4", mode="approximate")
    params = replace(SEEDED, max_tokens=20)
    squeezed = LLM(target, plan=replace(llm.plan, num_blocks=24, max_context=60), progress=False)
    outputs = squeezed.generate(asked(), params)
    assert sum(output.metrics.preemptions for output in outputs) > 0
    assert ids(outputs) == ids(llm.generate(asked(), params))


def views(llm: LLM) -> list[Any]:
    executor = llm.engine._executor
    return [rung.decoder.weights for rung in (executor._top, *executor._lower) if hasattr(rung, "decoder")]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["llama-gqa", "llama-tied", "llama-bias", "opt", "opt-untied", "qwen3", "falcon-7b"])
def test_what_the_plan_counts_is_what_is_allocated(name: str, tmp_path: Path) -> None:
    tiny_model(name, tmp_path)
    whole = make(tmp_path, "plain").plan
    for ladder in (
        "self:bits=4 / plain",
        f"self:bits=8,kv=24,{VIEW} / self:bits=4 / plain",
        "self:bits=8 / self:mlp=0.5,by=q4 / plain",
    ):
        llm = make(tmp_path, ladder)
        dense = tensors([view for view in views(llm) if type(view).__name__ == "DenseWeights"])
        rest = tensors([view for view in views(llm) if type(view).__name__ != "DenseWeights"])
        assert llm.plan.weight_bytes == whole.weight_bytes
        assert llm.plan.rung_weight_bytes == sum(t.nbytes for key, t in rest.items() if key not in dense), ladder
    for ladder in ("self:bits=4", f"self:bits=4,kv=24,{VIEW} / self:bits=4", "self:bits=4 / self:bits=8"):
        plan = (llm := make(tmp_path, ladder, mode="approximate")).plan
        assert plan.weight_bytes + plan.rung_weight_bytes == sum(t.nbytes for t in tensors(views(llm)).values()), ladder
        assert plan.weight_bytes < whole.weight_bytes
        assert plan.pass_bytes == views(llm)[0].bytes < whole.pass_bytes


def test_rungs_of_the_same_bits_share_their_weights(llama: Model, tmp_path: Path) -> None:
    tiny_model("llama-gqa", tmp_path)
    first, second, third = views(make(tmp_path, f"self:bits=4,kv=24,{VIEW} / self:bits=4 / plain"))
    assert second is third is not first


def test_the_plan_tells_what_was_rounded(tmp_path: Path) -> None:
    tiny_model("llama-gqa", tmp_path)
    llm = make(tmp_path, "self:bits=4 / plain")
    [note] = [note for note in llm.plan.notes if note.startswith("rung self:bits=4")]
    assert "rounded to 4 bits" in note and "of the LM head to 8" in note


def test_plans_keep_the_rung(tmp_path: Path) -> None:
    tiny_model("llama-gqa", tmp_path)
    llm = make(tmp_path, f"self:bits=4,kv=24,{VIEW} / plain")
    llm.plan.save(tmp_path / "plan")
    again = LLM(tmp_path, plan=tmp_path / "plan", progress=False)
    assert again.plan.ladder == ["self:bits=4,kv=24,chunk=4,sinks=4,recent=8", "plain"]
    assert ids(again.generate([[1, 2, 3]], GREEDY)) == ids(llm.generate([[1, 2, 3]], GREEDY))


@pytest.mark.parametrize(
    ("ladder", "keywords", "said"),
    [
        ("self:bits=4", {}, "ends in a low-bit rung, .* use mode=approximate"),
        ("self:bits=4 / plain", {"mode": "approximate"}, "sparse or low-bit, and .* ends in plain"),
        ("self:bits=4,mlp=0.5 / plain", {}, "mlp=0.5 and bits=4"),
        ("self:bits=4,kv=128 / plain", {}, "not less than the context"),
        ("self:bits=4 / plain", {"density": 0.5}, "density=0.5 has no place"),
    ],
)
def test_messages(llama: Model, tmp_path: Path, ladder: str, keywords: dict[str, Any], said: str) -> None:
    tiny_model("llama-gqa", tmp_path)
    with pytest.raises(UserError, match=said) as error:
        make(tmp_path, ladder, **keywords)
    assert "\n" not in str(error.value)
