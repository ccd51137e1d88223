"""`rowcast bench speculation`: random shapes, what is refused, what is measured and what is said of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model

import rowcast.cli
from rowcast import LLM, SamplingParams
from rowcast.bench import speculation
from rowcast.bench.shapes import open_shape
from rowcast.bench.speculation import Sample, Settings, run
from rowcast.bench.speculation_report import lines
from rowcast.errors import UserError
from rowcast.runtime.checkpoint import DEFAULT_MODEL, open_checkpoint
from rowcast.runtime.checkpoint.random_source import RandomSource, tensor_shapes
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.kv import PagedKV
from rowcast.runtime.model import load_decoder
from rowcast.runtime.shard import Shard
from rowcast.runtime.spec import parameter_count
from rowcast.runtime.step import SeqStep
from rowcast.runtime.tokenizer import load_tokenizer

NOVEL = Path(__file__).parent / "data" / "news-from-nowhere.txt"
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


@pytest.mark.parametrize("family", ["llama-gqa", "opt-350m", "bloom", "mpt", "falcon-40b", "falcon-11b", "qwen2", "qwen3-window"])
def test_random_weights_make_a_model_of_every_family(family: str, tmp_path: Path) -> None:
    tiny_model(family, tmp_path)
    spec = spec_from_config(json.loads((tmp_path / "config.json").read_text()))
    assert sum(torch.Size(size).numel() for size in tensor_shapes(spec).values()) == parameter_count(spec)
    decoder = load_decoder(spec, RandomSource(spec))
    kv = PagedKV(spec, Shard(), num_blocks=1, block_size=16, dtype=torch.float32, device=decoder.device)
    logits = decoder.logits(decoder.run([SeqStep(0, [1, 2, 3, 4], 0, [0], 4, sample=True)], kv))
    assert logits.isfinite().all()
    assert 0.1 < logits.std() < 10


def test_slices_of_random_tensors_are_those_of_the_whole() -> None:
    spec = spec_from_config(CONFIG)
    source, name = RandomSource(spec, seed=3), "model.layers.1.mlp.down_proj.weight"
    whole = source.read(name)
    assert whole.shape == source.shape(name) == (64, 90)
    assert whole.std().item() == pytest.approx(90**-0.5, rel=0.05)
    assert torch.equal(source.read(name, slice(5, 40), slice(7, 80)), whole[5:40, 7:80])
    out = torch.empty(90, 20, dtype=torch.bfloat16).T
    assert torch.equal(source.read(name, slice(20, 40), out=out), whole[20:40].bfloat16())
    assert torch.equal(RandomSource(spec, seed=3).read(name), whole)
    assert not torch.equal(source.read("model.layers.0.mlp.down_proj.weight"), whole)
    assert RandomSource(spec).fingerprint() != source.fingerprint()


def test_a_random_tensor_longer_than_the_noise_has_no_equal_rows() -> None:
    spec = spec_from_config({**CONFIG, "vocab_size": 80_000})
    table = RandomSource(spec).read("model.embed_tokens.weight")
    assert table.numel() > 4 << 20
    assert len({tuple(row) for row in table[:, :4].tolist()}) == len(table)


@pytest.mark.parametrize(("name", "billions"), [("yarn-llama-2-7b-128k", 6.738), ("llama-3.1-8b", 8.03), ("llama-68m", 0.068)])
def test_known_shapes_have_the_published_size(name: str, billions: float) -> None:
    assert parameter_count(spec_from_config(open_shape(name).config)) / 1e9 == pytest.approx(billions, rel=0.005)


def test_an_unknown_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="llama-68m"):
        open_shape("gpt-5")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="object"):
        open_shape(str(tmp_path / "config.json"))
    with pytest.raises(UserError, match="no shape 'gpt-5'"):
        open_checkpoint("random:gpt-5")


def test_a_shape_is_a_model(tmp_path: Path) -> None:
    checkpoint = open_checkpoint("random:OPT-66b")
    assert checkpoint.source.fingerprint() == open_shape("facebook/opt-66b").source.fingerprint()
    assert (checkpoint.format, checkpoint.stored_dtype) == ("random", "bfloat16")
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(checkpoint)


ON_TEXT = {"model": DEFAULT_MODEL, "prompt_file": str(NOVEL), "prompt_tokens": 96, "max_tokens": 24}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt_file": "f", "simulate": "0.9"}, "--shape"),
        ({"shape": "llama-68m"}, "--simulate"),
        ({}, "--prompt-file"),
        ({"shape": "llama-68m", "simulate": "0.9", "prompt_file": "f"}, "--prompt-file"),
        ({"shape": "llama-68m", "simulate": "0.9", "model": "m"}, "--model"),
        ({"shape": "llama-68m", "simulate": "0.9"}, "--prompt-tokens"),
        ({"shape": "llama-68m", "simulate": "1.5", "prompt_tokens": 8}, "0 to 1"),
        ({"shape": "llama-68m", "simulate": "0.9,0.8,0.7", "prompt_tokens": 8}, "one or two"),
        ({"model": "m", "prompt_file": "f", "against_transformers": True}, "--draft"),
        ({"model": "m", "prompt_file": "f", "against_transformers": True, "draft": "d", "batch": 2}, "--batch 1"),
        ({"model": "m", "prompt_file": "f", "draft": "d", "ladder": ("ngram",)}, "--draft d"),
        ({"model": "m", "prompt_file": "f", "kv_budget": 512, "ladder": ("ngram", "self:kv=256 / plain")}, "--kv-budget 512"),
        ({"model": DEFAULT_MODEL, "prompt_file": "nowhere.txt"}, "nowhere.txt"),
        ({"model": DEFAULT_MODEL, "prompt_file": str(NOVEL), "prompt_tokens": 30_000, "batch": 2}, "--prompt-tokens"),
        ({"model": DEFAULT_MODEL, "prompt_file": str(NOVEL)}, "context of 8192: give --prompt-tokens 7936 or less"),
        ({"model": DEFAULT_MODEL, "prompt_file": str(NOVEL), "prompt_tokens": 9, "max_tokens": 8192}, "lower --max-tokens"),
        ({"model": DEFAULT_MODEL, "prompt_file": str(NOVEL), "prompt_tokens": 9, "temperature": -1.0}, "temperature is -1"),
        ({**ON_TEXT, "ladder": ("ngram", "self:kv=256,gamma=many / plain")}, "gamma='many'"),
        ({**ON_TEXT, "ladder": ("ngram", "triforce")}, "draft=MODEL"),
        ({**ON_TEXT, "ladder": ("ngram", "draft:model=nowhere / plain")}, "draft nowhere cannot be opened"),
        ({**ON_TEXT, "draft": "nowhere"}, "draft nowhere cannot be opened"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All before any model is loaded, whichever ladder is wrong."""
    monkeypatch.setattr(speculation, "_load", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=words) as caught:
        run(Settings(**options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "ladders"),
    [
        ({}, ["plain", "auto", "ngram"]),
        ({"draft": "ngram"}, ["plain", "auto", "ngram"]),
        ({"draft": "d", "kv_budget": 512}, ["plain", "auto", "ngram", "draft / plain", "triforce", "self:kv=512 / plain"]),
        ({"ladder": ("ngram", "plain", "ngram")}, ["plain", "ngram"]),
    ],
)
def test_plain_stands_first_beside_what_there_is(options: dict[str, Any], ladders: list[str]) -> None:
    assert Settings(model="m", prompt_file="f", **options).ladders == ladders


def test_simulated_acceptance_is_named_in_every_line(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    ladder = "draft:gamma=2,kv=64,sinks=4 / self:kv=128,gamma=4 / plain"
    arguments = ["bench", "speculation", "--shape", shape, "--simulate", "0.9,0.5", "--draft", shape, "--ladder", ladder]
    arguments += ["--prompt-tokens", "200", "--max-tokens", "96", "--repeat", "1", "--batch", "2", "--verification", "maximal"]
    arguments += ["--temperature", "1", "--dtype", "float32", "--device", "cpu"]
    assert rowcast.cli.main(arguments) == 0
    out, err = capsys.readouterr()
    said = "simulated acceptance, rule maximal, outer rate 0.9, inner rate 0.5"
    assert len(err.splitlines()) == 7
    assert all(said in line for line in (out + err).splitlines())
    report = json.loads(out)
    assert report["label"] == said and report["rates"] == [0.9, 0.5]
    measured = report["ladders"][ladder]
    assert measured["acceptance"]["self"] == pytest.approx(0.9, abs=0.1)
    assert measured["acceptance"]["draft"] == pytest.approx(0.5, abs=0.15)
    assert len(measured["acceptance_by_position"]["self"]) == 4
    assert measured["refreshes"]["self"] > 10
    assert list(measured["time_s_per_token"]) == ["draft", "self", "plain"]
    assert measured["tokens_per_round"] > 2.5
    assert "identical" not in measured
    assert report["ladders"]["plain"]["speedup"] == 1


PINNED = "ngram:gamma=4 / plain"
UNUSED = "self:kv=100 / plain"
"""Run-time control has no use for it: the context is hardly longer."""


@pytest.fixture(scope="module")
def on_text() -> dict[str, Any]:
    """A run on real text. The pinned ladder's sixth token is changed after the fact."""
    decode = speculation.decode

    def flawed(llm: LLM, prompts: Sequence[list[int]], params: SamplingParams) -> Sample:
        sample = decode(llm, prompts, params)
        if llm.plan.ladder[0] == "ngram:gamma=4":
            sample.outputs[0][5] += 1
        return sample

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculation, "decode", flawed)
        return run(
            Settings(
                model=DEFAULT_MODEL,
                dtype="float32",
                device="cpu",
                prompt_file=str(NOVEL),
                prompt_tokens=96,
                max_tokens=12,
                repeat=1,
                ladder=("ngram", PINNED, UNUSED),
            )
        )


def test_real_text(on_text: dict[str, Any]) -> None:
    assert "label" not in on_text and on_text["prompt_tokens"] == 96
    plain, ngram = on_text["ladders"]["plain"], on_text["ladders"]["ngram"]
    assert plain["identical"] and ngram["identical"] and ngram["differences"] == []
    assert plain["tokens_per_round"] == 1 and plain["acceptance"] == {}
    assert 0 < plain["floor_reached"] < 1
    assert plain["run_per_token"] == {"plain": 1}
    assert ngram["ladder"] == "ngram / plain"
    assert plain["time_s_per_token"]["plain"] == pytest.approx(plain["s_per_token"], rel=0.5)
    unused = on_text["ladders"][UNUSED]
    assert (plain["not_used"], unused["not_used"]) == ([], ["self"])
    assert json.loads(json.dumps(on_text)) == {**on_text, "ladder": ["ngram", PINNED, UNUSED]}
    text = list(lines(on_text))
    assert text[-1] == "    self: not used"
    assert any(line.startswith("ngram = ngram / plain") and "identical to plain's" in line for line in text)
    assert not any("simulated" in line for line in text)


def test_outputs_that_differ_are_shown_with_plains_gap(on_text: dict[str, Any]) -> None:
    found = on_text["ladders"][PINNED]
    assert not found["identical"]
    [difference] = found["differences"]
    assert difference["gap"] > 0
    assert {key: difference[key] for key in ("round", "prompt", "position")} == {"round": 0, "prompt": 0, "position": 5}
    assert any("differs from plain" in line and "at token 5" in line for line in lines(on_text))


def test_the_novel_is_long_enough_for_long_contexts() -> None:
    ids = load_tokenizer(open_checkpoint(DEFAULT_MODEL)).encode(NOVEL.read_text(encoding="utf-8"))
    assert len(ids) > 8200
