"""Chosen query heads: each token uses its own, whatever is read for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from sparse_models import BLOCKS, CPU, EagerReference, HeadModel, Run
from thread_comm import run_ranks
from torch import Tensor

from rowcast.errors import UserError
from rowcast.kernels.attention import attend, attend_entries
from rowcast.runtime.banks import BankWeights
from rowcast.runtime.kv import PagedKV
from rowcast.runtime.ladder.spec import HeadReads
from rowcast.runtime.protocols import Comm
from rowcast.runtime.shard import Shard
from rowcast.runtime.sparse.artefact import DESCRIPTION, FORMAT, TENSORS, Calibration
from rowcast.runtime.sparse.heads import HeadOracle, HeadSelector, top_heads
from rowcast.runtime.sparse.weights import SparseWeights

FAMILIES = [
    "opt",
    "opt-350m",
    "bloom",
    "mpt-clip",
    "mpt-12-heads",
    "llama-mha",
    "llama-gqa",
    "llama-dynamic-grows",
    "qwen2-window",
    "qwen3",
    "falcon-7b",
    "falcon-mha",
    "falcon-rw",
]
"""Every kind of position, norm, window, bias and grouping."""
PROMPT, TOKENS = 7, 27
ONE_BY_ONE = [PROMPT, *range(PROMPT + 1, TOKENS + 1)]
MANY = [4, PROMPT, PROMPT + 1, PROMPT + 4, PROMPT + 5, PROMPT + 15, TOKENS - 1, TOKENS]
"""Passes of a few tokens, of more than are read sparsely, and of a prompt's last chunk."""


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HeadModel:
    return HeadModel(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> HeadModel:
    return HeadModel("opt", tmp_path_factory.mktemp("opt"))


def test_all_heads_equal_dense(model: HeadModel) -> None:
    tokens = model.tokens(TOKENS)
    dense = Run(model.banks, model.paged()).alone(tokens, ONE_BY_ONE, PROMPT)
    for heads in (model.selectors(model.spec.num_heads), [HeadOracle(model.spec.num_heads)] * model.spec.num_layers):
        view = SparseWeights(model.banks, [None] * model.spec.num_layers, heads=heads)
        found = Run(view, model.paged()).alone(tokens, MANY, PROMPT)
        torch.testing.assert_close(found, dense, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("reads", ["own", "ahead"])
@pytest.mark.parametrize("cuts", [ONE_BY_ONE, MANY, [TOKENS]], ids=["one by one", "many", "at once"])
def test_chosen_heads_equal_the_reference(model: HeadModel, cuts: list[int], reads: HeadReads) -> None:
    """Also where prompt and generated tokens share a pass, and where all heads are read."""
    tokens, keep = model.tokens(TOKENS), model.spec.num_heads // 2
    expected = Run(EagerReference(model, keep, reads), model.paged()).alone(tokens, ONE_BY_ONE, PROMPT)
    dense = Run(model.banks, model.paged()).alone(tokens, ONE_BY_ONE, PROMPT)
    assert (expected - dense)[PROMPT:].abs().max() > 0.1
    found = Run(model.view(keep, reads), model.paged()).alone(tokens, cuts, PROMPT)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def test_a_batch_equals_its_sequences(model: HeadModel) -> None:
    keep, count = model.spec.num_heads // 4, 3
    texts = [model.tokens(TOKENS, seed) for seed in range(count)]
    cuts = [PROMPT, *range(PROMPT + 2, TOKENS, 2)]
    alone = [Run(model.view(keep), model.paged()).alone(text, cuts, PROMPT) for text in texts]
    run, start, rows = Run(model.view(keep), model.paged(count)), 0, []
    for end in cuts:
        passes = [(i, text[start:end], start) for i, text in enumerate(texts)]
        rows.append(run(*passes, prompt=PROMPT).view(count, end - start, -1))
        for i in range(count):
            run.kv.commit(i, end - start)
        start = end
    torch.testing.assert_close(torch.cat(rows, 1), torch.stack(alone), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("by", ["contribution", "output"])
def test_the_oracle_keeps_the_best(model: HeadModel, by: str) -> None:
    bank, spec = model.banks.attention[1], model.spec
    heads = torch.randn(5, spec.num_heads, spec.head_dim, generator=torch.Generator().manual_seed(0))
    rows = bank.o.view(spec.num_heads, spec.head_dim, -1)
    parts = torch.einsum("thd,hdm->thm", heads, rows) if by == "contribution" else heads
    oracle = HeadOracle(spec.num_heads // 2, by)  # type: ignore[arg-type]
    assert torch.equal(oracle(heads, bank.o), top_heads(parts.norm(dim=-1), spec.num_heads // 2))


def test_the_oracle_runs_where_a_predictor_does(model: HeadModel) -> None:
    """Prompt tokens keep all heads, generated ones the best: fewer heads, another output."""
    tokens, layers = model.tokens(TOKENS), model.spec.num_layers
    dense = Run(model.banks, model.paged()).alone(tokens, ONE_BY_ONE, PROMPT)
    view = SparseWeights(model.banks, [None] * layers, heads=[HeadOracle(model.spec.num_heads // 2)] * layers)
    found = Run(view, model.paged()).alone(tokens, MANY, PROMPT)
    torch.testing.assert_close(found[:PROMPT], dense[:PROMPT], atol=2e-5, rtol=1e-5)
    assert (found - dense)[PROMPT:].abs().max() > 0.05
    reads = view.reads()
    assert reads.heads * 2 == reads.heads_of == (TOKENS - PROMPT) * model.spec.num_heads * layers


def test_heads_and_bytes_are_counted(model: HeadModel) -> None:
    spec, keep = model.spec, model.spec.num_heads // 4
    tokens = model.tokens(TOKENS)
    view = model.view(keep)
    run = Run(view, model.paged())
    run.alone(tokens, [PROMPT + 3], PROMPT)
    reads = view.reads()
    assert (reads.heads, reads.heads_of) == (3 * keep * spec.num_layers, 3 * spec.num_heads * spec.num_layers)
    run((0, tokens[PROMPT + 3 : PROMPT + 4], PROMPT + 3), prompt=PROMPT)
    found = view.reads().bytes
    row, mlps = 4 * spec.hidden_size * spec.head_dim, sum(b.in_row_bytes + b.out_row_bytes for b in model.banks.ffn)
    per_head = 4 if spec.group_size == 1 else 2
    kv = 0 if spec.group_size == 1 else 2 * spec.num_kv_heads
    heads = spec.num_layers * row * (per_head * keep + kv)
    scorers = sum(selector.bytes for selector in model.selectors(keep))
    attention = [bias for b in model.banks.attention for bias in (b.q_bias, b.k_bias, b.v_bias, b.o_bias)]
    biases = sum(bias.nbytes for bias in [*attention, *(b.down_bias for b in model.banks.ffn)] if bias is not None)
    biases += 2 * spec.num_layers * spec.head_dim * 4 * (spec.qk_norm == "head")
    assert found == model.banks.outer_bytes + mlps * spec.intermediate_size + biases + heads + scorers


def test_kept_queries_have_all_heads(opt: HeadModel) -> None:
    """Skipped ones are 0, so that views which choose entries by them have one row a head."""
    kv = opt.paged(lazy=False, keep_queries=4)
    Run(opt.view(1), kv).alone(opt.tokens(9), [8, 9], 8)
    queries = kv.queries(0, 4)
    assert queries is not None and queries.shape == (2, 1, opt.spec.num_heads, opt.spec.head_dim)
    assert ((queries != 0).any(-1).sum(-1) == 1).all()


@pytest.mark.parametrize("kv_heads", [2, 6])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("alibi", [False, True])
def test_attention_of_chosen_heads(kv_heads: int, tokens: int, window: int | None, alibi: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(tokens, 6, 8, generator=generator)
    k, v = torch.randn(2, 11, kv_heads, 8, generator=generator)
    heads = torch.tensor([0, 3, 4])
    slopes = torch.rand(6, generator=generator) if alibi else None
    options = {"scale": 0.3, "window": window, "slopes": slopes}
    full = attend(q, k, v, **options)  # type: ignore[arg-type]
    found = attend(q, k, v, heads=heads, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(found, full[:, heads])
    positions = torch.arange(11)
    chosen = attend_entries(
        q,
        k.transpose(0, 1),
        v.transpose(0, 1),
        key_positions=positions.expand(kv_heads, 11),
        query_positions=positions[11 - tokens :],
        heads=heads,
        **options,  # type: ignore[arg-type]
    )
    torch.testing.assert_close(chosen, full[:, heads])


def test_ranks_together_equal_one(model: HeadModel) -> None:
    """Each holds some of the heads; one that holds none of a token's adds nothing."""
    spec, tokens, keep = model.spec, model.tokens(TOKENS), 2
    expected = Run(EagerReference(model, keep), model.paged()).alone(tokens, ONE_BY_ONE, PROMPT)

    def work(comm: Comm) -> Tensor:
        shard = Shard(comm.rank, comm.world)
        banks = BankWeights(spec, model.source, comm, dtype=torch.float32, device=CPU)
        heads = [
            HeadSelector(*model.predictor(layer, "own"), keep=keep, local=shard.query_heads(spec))
            for layer in range(spec.num_layers)
        ]
        kv = PagedKV(spec, shard, num_blocks=BLOCKS, block_size=4, dtype=torch.float32, device=CPU, lazy=True)
        return Run(SparseWeights(banks, [None] * spec.num_layers, heads=heads), kv, comm).alone(tokens, ONE_BY_ONE, PROMPT)

    for found in run_ranks(4, work):
        torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-4)


def test_a_calibrations_selector(opt: HeadModel, tmp_path: Path) -> None:
    """Layer 0 has no layer before it, so it reads its own input whatever is asked for."""
    weight, bias = opt.predictor(1, "own")
    names = ["layers.0.heads.own", "layers.1.heads.ahead"]
    save_file(
        {f"{n}.weight": weight.clone() for n in names} | {f"{n}.bias": bias.clone() for n in names},
        tmp_path / TENSORS,
        {"fingerprint": "f"},
    )
    (tmp_path / DESCRIPTION).write_text(
        json.dumps({"format": FORMAT, "fingerprint": "f", "density": 1, "densities": [1], "quality": {}, "scorers": {}})
    )
    found = Calibration.open(tmp_path, "f")
    x = torch.randn(3, opt.spec.hidden_size, generator=torch.Generator().manual_seed(1))
    expected = HeadSelector(weight, bias, keep=2)(x, False).own
    for layer, reads in enumerate(("own", "ahead")):
        selector = HeadSelector.calibrated(found, layer, keep=2, reads="ahead", spec=opt.spec, shard=Shard(), device=CPU)
        own = selector(x, False).own
        assert selector.reads == reads and own is not None and expected is not None and torch.equal(own, expected)
    with pytest.raises(UserError, match=r"no layers\.1\.heads\.own\.weight"):
        HeadSelector.calibrated(found, 1, keep=2, reads="own", spec=opt.spec, shard=Shard(), device=CPU)


def test_ranks_share_out_one_choice(opt: HeadModel) -> None:
    weight, bias = opt.predictor(0, "own")
    x = torch.randn(5, opt.spec.hidden_size, generator=torch.Generator().manual_seed(2))
    whole = HeadSelector(weight, bias, keep=2)(x, False).own
    halves = [HeadSelector(weight, bias, keep=2, local=slice(2 * r, 2 * r + 2))(x, True) for r in (0, 1)]
    assert whole is not None
    for rank, half in enumerate(halves):
        own = torch.zeros(5, 2, dtype=torch.bool)
        assert half.own is not None
        own[:, slice(None) if half.ids is None else half.ids] = half.own
        assert torch.equal(own, whole[:, 2 * rank : 2 * rank + 2])
