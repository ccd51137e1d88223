"""`rowcast bench latency` of shapes: random weights on both sides, a context before decoding, and the floor with its KV."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import rowcast.cli
from rowcast.bench.latency import kv_bytes_read, random_peer
from rowcast.bench.shapes import open_shape
from rowcast.errors import UserError
from rowcast.runtime.checkpoint.random_source import RandomSource
from rowcast.runtime.config import spec_from_config

CONFIG = {
    "model_type": "llama",
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 90,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}


@pytest.fixture
def shape(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


ARGUMENTS = ["--prompt-tokens", "16", "--max-tokens", "8", "--repeat", "1", "--device", "cpu", "--dtype", "bfloat16"]


def test_a_shape_beside_transformers(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "latency", "--shape", shape, "--context", "40", "--against", "transformers", *ARGUMENTS]
    assert rowcast.cli.main(command) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert (report["model"], report["random_weights"], report["context"], report["dtype"]) == (shape, True, 40, "bfloat16")
    assert report["device_name"] is None and not report["eager"]
    for side in ("rowcast", "transformers"):
        assert report[side]["decode_ms_per_token"] == pytest.approx(1e3 / report[side]["decode_tokens_per_s"])
    floor = report["floor"]
    assert floor["kv_bytes"] == 44 * 2 * 2 * 4 * 8 * 2  # 40 and half of 8 entries, 2 layers, K and V, 4 heads of 8, 2 bytes
    assert floor["decode_tokens_per_s"] == pytest.approx(
        floor["bandwidth_bytes_per_s"] / (floor["weight_bytes"] + floor["kv_bytes"])
    )
    assert floor["share"] == pytest.approx(report["rowcast"]["decode_tokens_per_s"] / floor["decode_tokens_per_s"])
    assert "random weights" in err and "decode after 40" in err and "of KV" in err


def test_without_a_context_a_shape_has_a_short_prompt(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert rowcast.cli.main(["bench", "latency", "--shape", shape, "--json", *ARGUMENTS]) == 0
    assert json.loads(capsys.readouterr().out)["context"] == 32


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shape", "llama-2-7b", "--model", "m"], "--shape llama-2-7b has random weights and --model m its own: give one"),
        (["--shape", "llama-9"], "no shape 'llama-9'"),
        (["--context", "0"], "--context"),
    ],
)
def test_what_is_refused(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert rowcast.cli.main(["bench", "latency", *arguments]) == 2
    out, err = capsys.readouterr()
    assert not out and words in err


def test_a_config_that_transformers_does_not_know() -> None:
    with pytest.raises(UserError, match="Transformers makes no model of this config"):
        random_peer({"model_type": "lama"}, torch.float32, "cpu")


def test_the_peer_has_the_shape() -> None:
    model = random_peer(CONFIG, torch.bfloat16, "cpu")
    assert (model.config.num_key_value_heads, model.dtype) == (4, torch.bfloat16)
    assert model.model.layers[0].mlp.up_proj.weight.std() > 0


def test_kv_bytes_end_at_windows() -> None:
    spec = spec_from_config({**CONFIG, "model_type": "mistral", "sliding_window": 32})
    assert kv_bytes_read(spec, 2, 100) == 32 * 2 * 2 * 4 * 8 * 2
    assert kv_bytes_read(spec_from_config(open_shape("llama-2-7b").config), 2, 1024) == 1024 * 2 * 32 * 4096 * 2


@pytest.mark.gpu
def test_random_tensors_are_the_same_on_a_gpu() -> None:
    spec, name, device = spec_from_config(CONFIG), "model.layers.1.mlp.down_proj.weight", torch.device("cuda")
    here, there = RandomSource(spec), RandomSource(spec, device=device)
    assert torch.equal(there.read(name).cpu(), here.read(name))
    out = torch.empty(90, 20, dtype=torch.bfloat16, device=device).T
    assert torch.equal(there.read(name, slice(20, 40), out=out).cpu(), here.read(name)[20:40].bfloat16())
    assert there.read("model.norm.weight").is_cuda
