"""GGUF files of K-quants held as they are packed: the numbers that the gguf package gives, and the model that they are unpacked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf_writing import LLAMA, random_blocks, super_blocks, write_gguf
from test_offload_llm import away, shares
from test_packed_weights import GREEDY, HOW, RETRIEVAL, SEEDED, WAYS, logits, tokens
from thread_comm import ThreadComm, run_ranks
from torch import Tensor

from rowcast import LLM
from rowcast.kernels.packed import dequantise
from rowcast.placement.executable import not_yet
from rowcast.placement.resident import rank_share
from rowcast.runtime.checkpoint import open_checkpoint
from rowcast.runtime.checkpoint.gguf_quants import FORMS, GGML_TYPES, repack
from rowcast.runtime.comm import SoloComm
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.packed_sizes import PackedForms, forms_of_tensors, whole_groups
from rowcast.runtime.packed_weights import PackedWeights, SeveralProducts
from rowcast.runtime.plan_for import MachineWish, plan_for
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.weights import DenseWeights

Q3_K, Q4_K, Q5_K, Q6_K = (getattr(GGMLQuantizationType, f"Q{bits}_K") for bits in (3, 4, 5, 6))
Q5_0 = GGMLQuantizationType.Q5_0
KEYS = {
    **LLAMA,
    "block_count": 2,
    "embedding_length": 256,
    "feed_forward_length": 768,
    "rope.dimension_count": 64,
}
SHAPES = {
    "attn_q": (256, 256),
    "attn_k": (128, 256),
    "attn_v": (128, 256),
    "attn_output": (256, 256),
    "ffn_gate": (768, 256),
    "ffn_up": (768, 256),
    "ffn_down": (256, 768),
}
KINDS = {"token_embd": Q6_K, "blk.0.attn_v": Q6_K, "blk.0.ffn_down": Q6_K, "blk.1.ffn_down": Q5_0}
"""As llama.cpp mixes them: the embedding, which is the LM head, too, and in some layers value and down in more bits; 5 in groups of 32
where a row is no whole super-blocks."""


def written(path: Path, kinds: dict[str, GGMLQuantizationType] | None = None) -> Path:
    """A model whose first layer is of Q4_K, its second of Q5_K, but for `KINDS` and `kinds`."""
    kinds = {**KINDS, **(kinds or {})}
    tensors: dict[str, Any] = {"output_norm.weight": torch.ones(256)}
    shapes, stored = {"token_embd": (64, 256)}, {}
    for layer, kind in enumerate((Q4_K, Q5_K)):
        tensors |= {f"blk.{layer}.{name}_norm.weight": torch.ones(256) for name in ("attn", "ffn")}
        for name, shape in SHAPES.items():
            shapes[f"blk.{layer}.{name}"] = shape
            kinds.setdefault(f"blk.{layer}.{name}", kind)
    for seed, (name, (rows, columns)) in enumerate(shapes.items()):
        kind = stored[f"{name}.weight"] = kinds[name]
        blocks = random_blocks if kind in (Q3_K, Q5_0) else super_blocks
        tensors[f"{name}.weight"] = blocks(kind, rows, columns, seed)
    return write_gguf(path / "m.gguf", "llama", KEYS, tensors, stored)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("gguf"))


def opened(path: Path) -> tuple[ModelSpec, Any, PackedForms]:
    checkpoint = open_checkpoint(str(path))
    spec, source = spec_from_config(checkpoint.config), checkpoint.source
    return spec, source, forms_of_tensors(source.form, list(source.names()), spec)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", [Q4_K, Q5_K, Q6_K], ids=lambda kind: kind.name)
def test_blocks_are_ggufs_numbers(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    blocks = super_blocks(kind, 256, 768, seed=5)
    expected = torch.from_numpy(gguf.quants.dequantize(blocks, kind))
    assert 0.01 < expected.std() < 0.2
    _, source, _ = opened(written(tmp_path, {"blk.0.attn_q": kind, "blk.1.ffn_down": kind}))
    name = "model.layers.1.mlp.down_proj.weight"
    assert source.form(name) == FORMS[kind.name]
    stored = source.read(name)
    for rows, columns in ((slice(0, 256), slice(0, 768)), (slice(3, 9), slice(256, 512)), (slice(7, 8), slice(512, 768))):
        q = source.packed(name, rows, columns)
        assert torch.equal(dequantise(q), stored[rows, columns])
        assert q.bytes == FORMS[kind.name].stored_bytes(rows.stop - rows.start, columns.stop - columns.start)
    turned = "model.layers.0.self_attn.q_proj.weight"  # whose rows the file has in another order
    assert torch.equal(dequantise(source.packed(turned, slice(30, 90), slice(0, 256))), source.read(turned, slice(30, 90)))
    assert torch.equal(dequantise(repack(torch.from_numpy(blocks), GGML_TYPES[kind.value])), expected)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_blocks_of_32_are_ggufs_numbers(kind: str) -> None:
    ggml = GGMLQuantizationType[kind]
    blocks = random_blocks(ggml, 40, 192)
    q = repack(torch.from_numpy(blocks), GGML_TYPES[ggml.value])
    assert torch.equal(dequantise(q), torch.from_numpy(gguf.quants.dequantize(blocks, ggml)))
    assert q.bytes == FORMS[kind].stored_bytes(40, 192)


def test_it_is_the_unpacked_model(path: Path) -> None:
    spec, source, forms = opened(path)
    assert forms.all and not forms.why and forms.head == FORMS["Q6_K"]
    assert forms.layers[0] == ((FORMS["Q4_K"], FORMS["Q4_K"], FORMS["Q6_K"]), *(FORMS[f"Q{bits}_K"] for bits in (4, 4, 6)))
    assert forms.layers[1] == (*[FORMS["Q5_K"]] * 3, FORMS["Q5_0"])
    view = PackedWeights(spec, source, SoloComm(), forms, **HOW)
    mixed = view.layers[0].qkv
    assert isinstance(mixed, SeveralProducts) and len(mixed.parts) == 2
    expected = logits(DenseWeights(spec, source, SoloComm(), **HOW), SoloComm())
    torch.testing.assert_close(logits(view, SoloComm()), expected, atol=2e-4, rtol=1e-4)
    assert view.bytes == forms.sizes(spec, 4).pass_bytes(spec, 4)


def test_ranks_hold_whole_super_blocks(path: Path) -> None:
    """Two ranks' shares, 128 of 256 columns of heads and 384 of 768 neurons, cut super-blocks of 256."""
    spec, source, forms = opened(path)
    assert whole_groups(slice(384, 768), 768, FORMS["Q6_K"]) == slice(256, 768)
    alone = logits(PackedWeights(spec, source, SoloComm(), forms, **HOW), SoloComm())

    def rank(comm: ThreadComm) -> tuple[Tensor, int]:
        view = PackedWeights(spec, source, comm, forms, **HOW)
        return logits(view, comm), view.bytes

    (left, size), (right, other) = run_ranks(2, rank)
    torch.testing.assert_close(torch.cat([left, right], 1)[:, : spec.vocab_size], alone, atol=1e-4, rtol=1e-4)
    assert max(size, other) == forms.sizes(spec, 4, 2).pass_bytes(rank_share(spec, 2), 4)


def test_what_has_no_kernel_is_unpacked(tmp_path: Path) -> None:
    _, _, forms = opened(written(tmp_path, {"blk.1.attn_k": Q3_K}))
    assert forms.layers[1][0] is None and forms.layers[0][0] is not None and not forms.all
    assert forms.why == ("3 matrices are unpacked: no kernel reads Q3_K as it is",)


def made(path: Path, ladder: str = "plain", **keywords: Any) -> LLM:
    how = {"dtype": "float32", "device": "cpu", "block_size": 4, "max_model_len": 64, "progress": False, "weights": "packed"}
    return LLM(path, ladder=ladder, **{**how, **keywords})


@pytest.mark.parametrize("ladder", ["ngram / plain", RETRIEVAL, "self:bits=8,gamma=2 / plain"])
def test_drafts_change_no_token(ladder: str, path: Path) -> None:
    plain, drafted = made(path), made(path, ladder)
    assert plain.plan.weights == drafted.plan.weights == "packed"
    for params in (GREEDY, SEEDED):
        assert tokens(drafted, params) == tokens(plain, params)


@pytest.mark.parametrize("seed", [None, 1])
def test_parts_in_host_memory(seed: int | None, path: Path) -> None:
    here = made(path)
    ways = {part.replace(" ", "_"): way for part, way in WAYS.items()}
    plan = away(here.plan, shares(seed, here.spec.num_layers, **ways))
    assert not not_yet(plan)
    for ladder in ("plain", RETRIEVAL):
        llm = LLM(path, plan=replace(plan, ladder=ladder.split(" / "), lookahead=3, speculating_seqs=3), progress=False)
        assert tokens(llm, SEEDED) == tokens(here, SEEDED)
        executor: Any = llm.engine._executor
        assert executor.elsewhere.counts().weights.bytes > 0


def test_the_plan_counts_them(path: Path) -> None:
    spec, _, forms = opened(path)
    packed, whole = made(path).plan, made(path, weights="unpacked").plan
    sizes = forms.sizes(spec, 4)
    assert packed.pass_bytes == sizes.pass_bytes(spec, 4)
    assert whole.weight_bytes - packed.weight_bytes == sizes.spared_bytes > 0
    card = MachineWish(gpus="1xRTX4090")
    few, many = (plan_for(str(path), card, ladder="plain", weights=weights, groups=100) for weights in ("packed", "unpacked"))
    assert few.pass_bytes == forms.sizes(spec, 2).pass_bytes(spec, 2) < many.pass_bytes and not not_yet(few)


@pytest.mark.gpu
def test_on_a_gpu(path: Path) -> None:
    """Log-probabilities are the CPU's, and tokens are the same whatever drafts and wherever parts lie."""
    found = []
    for how in ({"weights": "unpacked"}, {"device": "cuda"}):
        llm = made(path, **how)
        [output] = llm.generate([[i * 5 % 64 for i in range(20)]], replace(GREEDY, prompt_logprobs=0))
        assert output.prompt_logprobs is not None
        found.append([next(iter(each.values())).logprob for each in output.prompt_logprobs if each is not None])
    assert llm.plan.weights == "packed" and found[1] == pytest.approx(found[0], abs=1e-3)
    expected = tokens(llm, SEEDED)
    assert tokens(made(path, device="cuda", eager=True), SEEDED) == expected
    assert tokens(made(path, RETRIEVAL, device="cuda"), SEEDED) == expected
    ways = {part.replace(" ", "_"): way for part, way in WAYS.items()}
    plan = away(llm.plan, shares(1, llm.spec.num_layers, **ways))
    assert tokens(LLM(path, plan=plan, progress=False), SEEDED) == expected
