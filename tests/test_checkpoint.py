from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf_writing import LLAMA, interleave, llama_tensors, random_blocks, write_gguf, written_by_llama_cpp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny import CASES, VOCAB, tiny_model
from torch import Tensor

from rowcast.runtime.checkpoint import DEFAULT_MODEL, Checkpoint, gguf_source, open_checkpoint, slices
from rowcast.runtime.checkpoint.called_for import called_for
from rowcast.runtime.checkpoint.gguf_config import llama3_divisors
from rowcast.runtime.checkpoint.gguf_quants import GGML_TYPES
from rowcast.runtime.checkpoint.safetensors_file import DTYPES, SafetensorsSource
from rowcast.runtime.checkpoint.safetensors_header import read_header
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.kv import PagedKV
from rowcast.runtime.model import load_decoder
from rowcast.runtime.protocols import Source
from rowcast.runtime.shard import Shard
from rowcast.runtime.step import SeqStep

KINDS = [GGMLQuantizationType(code) for code, kind in GGML_TYPES.items() if kind.dtype is None]


def save_model(directory: Path, tensors: dict[str, Tensor], **config: Any) -> str:
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return str(directory)


def save_shards(directory: Path, shards: dict[str, dict[str, Tensor]]) -> str:
    directory.mkdir(exist_ok=True)
    for file, tensors in shards.items():
        save_file(tensors, directory / file)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text("{}")
    return str(directory)


def open_llama(path: Path, tensors: dict[str, Any] | None = None, architecture: str = "llama", **metadata: Any) -> Checkpoint:
    keys = {key: value for key, value in (LLAMA | metadata).items() if value is not None}
    return open_checkpoint(str(write_gguf(path / "m.gguf", architecture, keys, tensors or llama_tensors())))


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the length of each read."""
    lengths: list[int] = []
    preadv = os.preadv

    def counted(fd: int, buffers: Any, offset: int) -> int:
        got = preadv(fd, buffers, offset)
        lengths.append(got)
        return got

    monkeypatch.setattr(os, "preadv", counted)
    return lengths


# --- safetensors ---------------------------------------------------------------------------------------------------------------


def test_every_dtype_of_safetensors_is_read_bit_for_bit(tmp_path: Path) -> None:
    tensors = {name: torch.arange(48).view(6, 8).to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "cube": torch.randn(3, 4, 5).bfloat16()}
    source = open_checkpoint(save_model(tmp_path, tensors)).source
    assert set(source.names()) == set(tensors)
    for name, tensor in tensors.items():
        assert source.shape(name) == tuple(tensor.shape)
        whole = source.read(name)
        assert whole.dtype == tensor.dtype
        assert torch.equal(bits(whole.view(-1)), bits(tensor.view(-1)))
    assert torch.equal(source.read("cube", slice(1, 3), slice(2, 3)), tensors["cube"][1:3, 2:3])
    assert torch.equal(source.read("BF16", slice(2, 5), slice(1, 7)), tensors["BF16"][2:5, 1:7])


@pytest.fixture(scope="module")
def matrices(tmp_path_factory: pytest.TempPathFactory) -> tuple[SafetensorsSource, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{len(shape)}-{dtype}": torch.randn(shape, generator=generator).to(dtype)
        for shape in ((37,), (13, 29), (7, 5, 3))
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    }
    path = tmp_path_factory.mktemp("matrices") / "model.safetensors"
    save_file(tensors, path)
    return SafetensorsSource(read_header(path)), tensors


@given(data=st.data(), stage=st.sampled_from([8, 64, 1 << 20]))
@settings(max_examples=300, deadline=None)
def test_any_slice_into_any_out(data: st.DataObject, stage: int, matrices: tuple[SafetensorsSource, dict[str, Tensor]]) -> None:
    source, tensors = matrices
    name = data.draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[name]
    part = st.none() | st.builds(slice, st.none() | st.integers(-3, 40), st.none() | st.integers(-3, 40))
    rows, cols = data.draw(part), data.draw(part) if tensor.dim() > 1 else None
    expected = tensor[(rows or slice(None),) if tensor.dim() == 1 else (rows or slice(None), cols or slice(None))]
    read = source.read(name, rows, cols)
    assert read.dtype == tensor.dtype
    assert torch.equal(read, expected)

    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    canvas = torch.full((2 * len(expected) + 1, *expected.shape[1:]), 7.0, dtype=dtype)
    if expected.dim() == 2 and data.draw(st.booleans()):
        canvas = torch.full((2 * len(expected) + 1, expected.shape[1] + 3), 7.0, dtype=dtype)[:, 2:-1]
    out = canvas[1::2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices, "STAGE_BYTES", stage)
        assert source.read(name, rows, cols, out=out) is out
    assert torch.equal(out, expected.to(dtype))
    assert bool((canvas[::2] == 7).all()), "memory beside the slice was written"


def test_misuse_of_read(matrices: tuple[SafetensorsSource, dict[str, Tensor]]) -> None:
    source, _ = matrices
    with pytest.raises(KeyError):
        source.read("missing")
    with pytest.raises(ValueError, match="step 1"):
        source.read("2-torch.float32", slice(0, 10, 2))
    with pytest.raises(ValueError, match="1 dimensions"):
        source.read("1-torch.float32", None, slice(0, 2))
    with pytest.raises(ValueError, match=r"out has shape \(3, 29\), the slice has \(2, 29\)"):
        source.read("2-torch.float32", slice(0, 2), out=torch.empty(3, 29))


# --- both formats --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Source, str]]:
    """A matrix [64, 512] as safetensors, as a plain, as a quantised and as a reordered tensor of a GGUF file; and [6, 4, 5]."""
    folder = tmp_path_factory.mktemp("sources")
    q4, name = GGMLQuantizationType.Q4_1, "model.layers.0.{}.weight"
    tensors = {**llama_tensors(), "blk.0.ffn_up.weight": torch.randn(64, 512), "blk.0.attn_q.weight": torch.randn(64, 512)}
    tensors["blk.0.ffn_down.weight"] = random_blocks(q4, 64, 512)  # type: ignore[assignment]
    path = write_gguf(folder / "m.gguf", "llama", LLAMA, tensors, {"blk.0.ffn_down.weight": q4})
    stored = open_checkpoint(save_model(folder / "dense", {"w": torch.randn(64, 512), "cube": torch.randn(6, 4, 5)})).source
    stems = ("mlp.up_proj", "mlp.down_proj", "self_attn.q_proj")
    return [(stored, "w"), (stored, "cube"), *((open_checkpoint(str(path)).source, name.format(stem)) for stem in stems)]


def test_out_of_any_strides(sources: list[tuple[Source, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_source, "CHUNK_VALUES", 2048)
    for source, name in sources:
        expected = source.read(name, slice(1, 5), slice(1, 3))
        for dtype in (torch.float32, torch.bfloat16):
            canvas = torch.full((5, *[2 * size for size in reversed(expected.shape)], 3), 7.0, dtype=dtype)
            out = canvas[1, ..., 2][tuple(slice(1, None, 2) for _ in expected.shape)].permute(*reversed(range(expected.dim())))
            assert source.read(name, slice(1, 5), slice(1, 3), out=out) is out
            assert torch.equal(out, expected.to(dtype)), name
            assert int((canvas != 7).sum()) <= expected.numel(), "memory beside the slice was written"


def test_reads_from_several_threads_at_once(sources: list[tuple[Source, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_source, "CHUNK_VALUES", 2048)
    jobs = [(source, name, slice(i % 5, i % 5 + 1 + i % 40)) for i in range(60) for source, name in sources]
    expected = [source.read(name, rows) for source, name, rows in jobs]
    with ThreadPoolExecutor(8) as pool:
        for found, wanted in zip(pool.map(lambda job: job[0].read(*job[1:]), jobs), expected, strict=True):
            assert torch.equal(found, wanted)


def test_shards_equal_one_file(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(4, 6) for i in range(5)}
    whole = open_checkpoint(save_model(tmp_path / "whole", tensors)).source
    shards = {"model-1.safetensors": {"t3": tensors["t3"], "t0": tensors["t0"]}}
    shards["model-2.safetensors"] = {name: tensor for name, tensor in tensors.items() if name not in ("t3", "t0")}
    split = open_checkpoint(save_shards(tmp_path / "split", shards)).source
    assert list(split.names()) == ["t0", "t3", "t1", "t2", "t4"], "file order"
    for name in tensors:
        assert torch.equal(split.read(name, slice(1, 3), slice(2, 6)), whole.read(name, slice(1, 3), slice(2, 6)))
    assert split.fingerprint() == whole.fingerprint()


def test_fingerprint_tells_weights_names_shapes_and_dtypes_apart(tmp_path: Path) -> None:
    base = {"a": torch.zeros(4, 6), "b": torch.ones(3)}
    variants = [base, base | {"a": torch.full((4, 6), 1e-3)}, base | {"a": torch.zeros(6, 4)}]
    variants += [base | {"a": torch.zeros(4, 12).half()}, {"c": base["a"], "b": base["b"]}]
    prints = [open_checkpoint(save_model(tmp_path / str(i), tensors)).source.fingerprint() for i, tensors in enumerate(variants)]
    assert len(set(prints)) == len(prints)
    assert all(len(bytes.fromhex(text)) == 8 for text in prints)


def test_config_and_stored_dtype_of_a_directory(tmp_path: Path) -> None:
    tensors = {"big": torch.randn(8, 8).bfloat16(), "small": torch.randn(4), "ids": torch.arange(1000)}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    checkpoint = open_checkpoint(save_model(tmp_path, tensors, hidden_size=64))
    assert checkpoint.config == {"model_type": "llama", "hidden_size": 64}
    assert checkpoint.generation_config == {"eos_token_id": [2, 3]}
    assert (checkpoint.stored_dtype, checkpoint.format, checkpoint.path) == ("bfloat16", "safetensors", tmp_path)
    assert checkpoint.gguf_metadata is None


def test_a_quarter_reads_a_quarter_of_the_bytes(tmp_path: Path, bytes_read: list[int]) -> None:
    source = open_checkpoint(save_model(tmp_path, {"w": torch.randn(256, 128)})).source
    for rows, cols in ((slice(64, 128), None), (None, slice(32, 64))):
        for out in (None, torch.empty(64 if rows else 256, 32 if cols else 128, dtype=torch.bfloat16)):
            bytes_read.clear()
            source.read("w", rows, cols, out=out)
            assert sum(bytes_read) == 256 * 128 * 4 // 4


def test_reading_a_shard_needs_the_shard_and_some_megabytes(tmp_path: Path) -> None:
    save_model(tmp_path, {"w": torch.zeros(16384, 4096, dtype=torch.float16)})  # 128 MiB
    script = """
import resource, sys, torch
from pathlib import Path
from rowcast.runtime.checkpoint.safetensors_file import SafetensorsSource
source = SafetensorsSource.open(Path(sys.argv[1]))
out = torch.full((4096, 4096), 1, dtype=torch.bfloat16)
source.read("w", slice(0, 64), out=out[:64])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source.read("w", slice(4096, 8192), out=out)
assert not out.any()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    run = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 12 * 1024, f"{run.stdout} KiB beyond the destination"


# --- GGUF ----------------------------------------------------------------------------------------------------------------------


def test_the_table_of_types_is_ggufs() -> None:
    for kind in GGML_TYPES.values():
        assert GGMLQuantizationType(kind.code).name == kind.name
        assert gguf.GGML_QUANT_SIZES[GGMLQuantizationType(kind.code)] == (kind.block, kind.block_bytes)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_slice_of_every_type_equals_gguf(kind: GGMLQuantizationType, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(gguf_source, "CHUNK_VALUES", 2048)
    blocks = random_blocks(kind, 24, 2 * 256)
    tensors = {**llama_tensors(), "blk.0.ffn_down.weight": blocks}
    path = write_gguf(tmp_path / "m.gguf", "llama", LLAMA, tensors, {"blk.0.ffn_down.weight": kind})
    checkpoint = open_checkpoint(str(path))
    source, name = checkpoint.source, "model.layers.0.mlp.down_proj.weight"
    expected = torch.from_numpy(gguf.quants.dequantize(blocks, kind))
    assert source.shape(name) == (24, 512)
    whole = source.read(name)
    assert whole.dtype == torch.float32
    np.testing.assert_array_equal(whole.numpy(), expected.numpy())
    for rows, cols in ((slice(3, 9), None), (None, slice(256, 512)), (slice(5, 6), slice(250, 300)), (slice(0, 0), slice(1, 2))):
        part = expected[rows or slice(None), cols or slice(None)]
        np.testing.assert_array_equal(source.read(name, rows, cols).numpy(), part.numpy())
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            canvas = torch.full((len(part), part.shape[1] + 5), 7.0, dtype=dtype)
            source.read(name, rows, cols, out=canvas[:, 2:-3])
            np.testing.assert_array_equal(canvas[:, 2:-3].float().numpy(), part.to(dtype).float().numpy())
            assert bool((canvas[:, :2] == 7).all() and (canvas[:, -3:] == 7).all()), "memory beside the slice was written"


def test_columns_of_blocks_read_only_those_blocks(tmp_path: Path, bytes_read: list[int]) -> None:
    tensors = {**llama_tensors(), "blk.0.ffn_down.weight": random_blocks(GGMLQuantizationType.Q8_0, 64, 1024)}
    path = write_gguf(tmp_path / "m.gguf", "llama", LLAMA, tensors, {"blk.0.ffn_down.weight": GGMLQuantizationType.Q8_0})
    source, name = open_checkpoint(str(path)).source, "model.layers.0.mlp.down_proj.weight"
    bytes_read.clear()
    source.read(name, None, slice(256, 512))
    assert sum(bytes_read) == 64 * 256 // 32 * 34
    bytes_read.clear()
    source.read(name, slice(16, 32), slice(40, 50))
    assert sum(bytes_read) == 16 * 34


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rotated_rows_of_llama_come_back_in_hugging_face_order(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: Any, bytes_read: list[int]
) -> None:
    monkeypatch.setattr(gguf_source, "CHUNK_VALUES", 1024)
    q, k, bias = torch.randn(64, 64).to(dtype), torch.randn(32, 64).to(dtype), torch.randn(64)
    tensors = llama_tensors() | {"blk.0.attn_q.weight": interleave(q, 4), "blk.0.attn_k.weight": interleave(k, 2)}
    source = open_llama(tmp_path, tensors | {"blk.0.attn_q.bias": interleave(bias, 4)}).source
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(source.read(name), q)
    assert torch.equal(source.read("model.layers.0.self_attn.k_proj.weight"), k)
    assert torch.equal(source.read("model.layers.0.self_attn.q_proj.bias", slice(5, 40)), bias[5:40])
    for start in range(0, 64, 3):
        for stop in range(start, 65, 5):
            out = torch.full((stop - start, 100), 9.0, dtype=torch.float32)
            source.read(name, slice(start, stop), slice(7, 60), out=out[:, 20:73])
            assert torch.equal(out[:, 20:73], q[start:stop, 7:60].float())
    bytes_read.clear()
    source.read(name, slice(16, 32))
    assert sum(bytes_read) == 16 * 64 * dtype.itemsize


def test_a_tiny_gguf_equals_what_transformers_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "default", "rope_theta": 500000.0}
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=False, rope_parameters=rope, max_position_embeddings=128,
            rms_norm_eps=1e-5,
        )
    )  # fmt: skip
    state = model.state_dict()
    to_hf = {name: hf for hf in state for name in [gguf_name(hf)]}
    tensors = {name: state[hf] for name, hf in to_hf.items()}
    tensors["blk.0.attn_q.weight"] = interleave(tensors["blk.0.attn_q.weight"], 4)
    tensors["blk.0.attn_k.weight"] = interleave(tensors["blk.0.attn_k.weight"], 2)
    checkpoint = open_llama(tmp_path, tensors, vocab_size=32)
    reference = AutoModelForCausalLM.from_pretrained(str(tmp_path), gguf_file="m.gguf", dtype=torch.float32)
    theirs = reference.state_dict()
    assert set(checkpoint.source.names()) == set(state) == set(theirs)
    for name, tensor in state.items():
        assert torch.equal(checkpoint.source.read(name), tensor)
        assert torch.equal(theirs[name], tensor)
    shared = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    for key in (*shared, "vocab_size", "max_position_embeddings", "rms_norm_eps", "hidden_act", "tie_word_embeddings"):
        assert checkpoint.config[key] == pytest.approx(getattr(reference.config, key)), key


def gguf_name(hf: str) -> str:
    """By gguf's own table."""
    stem, suffix = hf.rsplit(".", 1)
    return f"{gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1).get_name(stem)}.{suffix}"


@pytest.mark.parametrize(("name", "architecture", "changes"), [
    ("qwen3", "qwen3", {}),
    ("qwen3", "qwen3", {"attention_bias": True}),
    ("qwen2", "qwen2", {}),
    ("llama-head-dim", "llama", {}),
    ("llama-bias", "llama", {}),
    ("llama-tied", "llama", {}),
])  # fmt: skip
def test_a_gguf_gives_the_logits_of_transformers(name: str, architecture: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(name, tmp_path, **changes)
    path = write_gguf(tmp_path / "m.gguf", architecture, *written_by_llama_cpp(model, architecture))
    checkpoint = open_checkpoint(str(path))
    spec = spec_from_config(checkpoint.config)
    kv = PagedKV(spec, Shard(0, 1), num_blocks=2, block_size=16, dtype=torch.float32, device=torch.device("cpu"))
    decoder = load_decoder(spec, checkpoint.source)
    tokens = torch.randint(VOCAB, (24,), generator=torch.Generator().manual_seed(0)).tolist()
    ours = decoder.logits(decoder.run([SeqStep(0, tokens, 0, [0, 1], 24, sample=True)], kv))
    with torch.inference_mode():
        theirs = model(torch.tensor([tokens])).logits[0]
    assert theirs.std() > 0.5
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_the_tensors_called_for_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    tiny_model(name, tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    assert called_for(spec_from_config(checkpoint.config)) == set(checkpoint.source.names())


@pytest.mark.parametrize(("architecture", "stems"), [
    ("QWEN2", ["model.embed_tokens", "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.norm", "lm_head"]),
    ("QWEN3", ["model.layers.0.self_attn.q_norm", "model.layers.0.self_attn.k_norm", "model.layers.0.post_attention_layernorm"]),
    ("BLOOM", ["word_embeddings_layernorm", "h.0.self_attention.query_key_value", "h.0.mlp.dense_4h_to_h", "ln_f"]),
    ("FALCON", ["transformer.h.0.input_layernorm", "transformer.h.0.self_attention.dense", "transformer.h.0.mlp.dense_h_to_4h"]),
    ("MPT", ["transformer.wte", "transformer.blocks.0.attn.Wqkv", "transformer.blocks.0.ffn.down_proj", "transformer.norm_f"]),
])  # fmt: skip
def test_names_follow_ggufs_table(architecture: str, stems: list[str]) -> None:
    from rowcast.runtime.checkpoint.gguf_names import NAME_MAPS, translate

    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture], 1)
    for stem in stems:
        found = translate(NAME_MAPS[architecture.lower()], f"{table.get_name(stem)}.weight")
        assert found is not None
        assert found[0].removeprefix("transformer.") == f"{stem}.weight".removeprefix("transformer.")


BLOOM = {
    "block_count": 1,
    "context_length": 64,
    "embedding_length": 32,
    "feed_forward_length": 128,
    "attention.head_count": 4,
    "attention.head_count_kv": 4,
    "attention.layer_norm_epsilon": 1e-5,
}


def test_bloom_rows_come_back_head_by_head(tmp_path: Path) -> None:
    by_head = torch.randn(4, 3, 8, 32)
    tensors = {"token_embd.weight": torch.randn(16, 32), "blk.0.attn_qkv.weight": by_head.transpose(0, 1).reshape(96, 32)}
    tensors["blk.0.attn_qkv.bias"] = by_head[..., 0].transpose(0, 1).reshape(96).clone()
    checkpoint = open_checkpoint(str(write_gguf(tmp_path / "m.gguf", "bloom", BLOOM, tensors)))
    name = "transformer.h.0.self_attention.query_key_value"
    assert torch.equal(checkpoint.source.read(f"{name}.weight"), by_head.view(96, 32))
    assert torch.equal(checkpoint.source.read(f"{name}.weight", slice(24, 50), slice(3, 9)), by_head.view(96, 32)[24:50, 3:9])
    assert torch.equal(checkpoint.source.read(f"{name}.bias"), by_head.view(96, 32)[:, 0])
    assert {"n_layer": 1, "n_head": 4, "hidden_size": 32, "vocab_size": 16, "tie_word_embeddings": True}.items() <= (
        checkpoint.config.items()
    )


@pytest.mark.parametrize(("groups", "two_norms"), [(1, False), (2, False), (2, True)])
def test_falcon_rows_come_back_group_by_group(groups: int, two_norms: bool, tmp_path: Path) -> None:
    by_group = torch.randn(groups, 4 // groups + 2, 8, 32)
    q, k, v = by_group[:, :-2].reshape(32, 32), by_group[:, -2].reshape(-1, 32), by_group[:, -1].reshape(-1, 32)
    tensors = {
        "token_embd.weight": torch.randn(16, 32),
        "blk.0.attn_qkv.weight": torch.cat([q, k, v]),
        "blk.0.attn_norm.weight": q[0],
    }
    if two_norms:
        tensors["blk.0.attn_norm_2.weight"] = q[1]
    path = write_gguf(tmp_path / "m.gguf", "falcon", BLOOM | {"attention.head_count_kv": groups}, tensors)
    source, config = open_checkpoint(str(path)).source, open_checkpoint(str(path)).config
    fused = by_group.view(-1, 32)
    assert torch.equal(source.read("transformer.h.0.self_attention.query_key_value.weight"), fused)
    assert torch.equal(source.read("transformer.h.0.self_attention.query_key_value.weight", slice(6, 33)), fused[6:33])
    assert torch.equal(source.read("transformer.h.0." + ("ln_mlp" if two_norms else "input_layernorm") + ".weight"), q[0])
    assert (config["num_kv_heads"], config["multi_query"]) == (groups, groups == 1)
    assert (config["new_decoder_architecture"], config["num_ln_in_parallel_attn"]) == (groups > 1, 2 if two_norms else 1)


def test_mpt_config(tmp_path: Path) -> None:
    metadata = BLOOM | {"attention.max_alibi_bias": 8.0, "attention.clamp_kqv": 6.0}
    tensors = {"token_embd.weight": torch.randn(16, 32), "blk.0.ffn_up.weight": torch.randn(64, 32)}
    config = open_checkpoint(str(write_gguf(tmp_path / "m.gguf", "mpt", metadata, tensors))).config
    assert config["attn_config"] == {"clip_qkv": 6.0, "alibi": True, "alibi_bias_max": 8.0}
    assert (config["d_model"], config["n_heads"], config["expansion_ratio"], config["no_bias"]) == (32, 4, 2, True)


@pytest.mark.parametrize(("metadata", "expected"), [
    ({}, None),
    ({"rope.scaling.type": "none"}, None),
    ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
    (
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    ),
])  # fmt: skip
def test_rope_scaling_of_the_metadata(metadata: dict[str, Any], expected: dict[str, Any] | None, tmp_path: Path) -> None:
    assert open_llama(tmp_path, **metadata).config["rope_scaling"] == expected


def test_llama3_scaling_is_derived_from_the_stored_divisors(tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, rope_parameters={**scaling, "rope_theta": 500000.0})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** (-torch.arange(0, 128, 2) / 128)
    np.testing.assert_allclose((plain / scaled).numpy(), llama3_divisors(500000.0, 128, 8.0), rtol=1e-5)

    divisors = torch.from_numpy(llama3_divisors(500000.0, 16, 8.0)).float()
    checkpoint = open_llama(tmp_path, llama_tensors() | {"rope_freqs.weight": divisors})
    assert checkpoint.config["rope_scaling"] == scaling
    assert "rope_freqs.weight" not in checkpoint.source


def test_sliding_windows_special_tokens_and_dtype(tmp_path: Path) -> None:
    halves = {name: tensor.half() for name, tensor in llama_tensors().items()}
    ids: dict[str, Any] = {"tokenizer.ggml.eos_token_id": 5, "tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.bos_token_id": 1}
    ids["attention.sliding_window"] = 16
    checkpoint = open_llama(tmp_path, halves, **ids)
    assert (checkpoint.config["model_type"], checkpoint.config["sliding_window"]) == ("mistral", 16)
    assert checkpoint.generation_config == {"eos_token_id": [5, 7], "bos_token_id": 1}
    assert (checkpoint.stored_dtype, checkpoint.config["dtype"]) == ("float16", "float16")
    assert checkpoint.gguf_metadata is not None
    assert checkpoint.gguf_metadata["tokenizer.ggml.eot_token_id"] == 7
    qwen = open_llama(tmp_path, halves, "qwen2", **ids).config
    assert (qwen["use_sliding_window"], qwen["max_window_layers"], qwen["architectures"]) == (True, 0, ["Qwen2ForCausalLM"])


def test_a_directory_with_one_gguf_is_that_file(tmp_path: Path) -> None:
    assert open_llama(tmp_path).path == open_checkpoint(str(tmp_path)).path == tmp_path / "m.gguf"


# --- the default model ---------------------------------------------------------------------------------------------------------


def test_the_default_model_equals_ggufs_reading() -> None:
    checkpoint = open_checkpoint(DEFAULT_MODEL)
    assert checkpoint.path.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert checkpoint.gguf_metadata is not None
    assert len(checkpoint.gguf_metadata["tokenizer.ggml.tokens"]) == checkpoint.config["vocab_size"] == 49152
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(checkpoint.path).tensors}
    for stored, hf in (
        ("blk.29.ffn_down.weight", "model.layers.29.mlp.down_proj.weight"),
        ("blk.3.attn_v.weight", "model.layers.3.self_attn.v_proj.weight"),
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output_norm.weight", "model.norm.weight"),
    ):
        expected = torch.from_numpy(gguf.quants.dequantize(tensors[stored].data.copy(), tensors[stored].tensor_type))
        assert torch.equal(checkpoint.source.read(hf), expected)
    q = torch.from_numpy(gguf.quants.dequantize(tensors["blk.7.attn_q.weight"].data, GGMLQuantizationType.Q4_1))
    assert torch.equal(interleave(checkpoint.source.read("model.layers.7.self_attn.q_proj.weight"), 9), q)
