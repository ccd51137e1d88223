"""`rowcast quantize`: the algorithm, the files, that a run can be cut off, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from learning_runs import sittings
from tiny import model_with_words, random_words, tiny_words
from torch import Tensor

from rowcast import LLM, SamplingParams
from rowcast.calibration.learning.judge import ModuleSubject, judge
from rowcast.calibration.learning.module import load_module
from rowcast.calibration.learning.part import Part, Unfinished
from rowcast.calibration.quantising import run
from rowcast.calibration.quantising.gptq import Rounded, gptq, nearest
from rowcast.calibration.quantising.run import Settings, quantise
from rowcast.calibration.quantising.writing import Stored, packed_tensors, words, write_tensors
from rowcast.calibration.text import read_windows
from rowcast.cli import main
from rowcast.errors import UserError
from rowcast.runtime.checkpoint import open_checkpoint
from rowcast.runtime.checkpoint.packed_layer import unpack
from rowcast.runtime.checkpoint.safetensors_file import SafetensorsSource
from rowcast.runtime.config import ADAPTED
from rowcast.runtime.tokenizer import load_tokenizer

WINDOW = 16
SMALL = Settings(group=32, tokens=40 * WINDOW, window=WINDOW, judged=4 * WINDOW)
FAMILIES: dict[str, dict[str, int]] = {
    "llama-gqa": {"intermediate_size": 128},
    "llama-bias": {"intermediate_size": 128},
    "qwen3": {"intermediate_size": 128},
    "opt": {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128},
    "bloom": {},
    "mpt": {},
    "falcon-40b": {"ffn_hidden_size": 128},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_words(tmp_path_factory.mktemp("text") / "text.txt", 60 * WINDOW)


def model_of(path: Path, family: str) -> Path:
    return model_with_words(path, family, **FAMILIES[family])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_of(tmp_path_factory.mktemp("llama"), "llama-gqa")


def correlated(tokens: int, size: int) -> tuple[Tensor, Tensor]:
    """Inputs [T, K] and a weight [N, K]."""
    draw = torch.Generator().manual_seed(0)
    mixed = torch.randn(tokens, size // 2, generator=draw) @ torch.randn(size // 2, size, generator=draw)
    return mixed + 0.1 * torch.randn(tokens, size, generator=draw), torch.randn(48, size, generator=draw)


@pytest.mark.parametrize("bits", [3, 4])
def test_what_columns_behind_make_good(bits: int) -> None:
    x, weight = correlated(2000, 192)

    def off(rounded: Rounded) -> float:
        return float((x @ (rounded.weight() - weight).T).square().mean())

    ours, plain = (gptq(weight, x.T @ x, bits, 64, torch.float16), nearest(weight, bits, 64, torch.float16))
    assert ours.codes.max() <= (1 << bits) - 1
    assert off(ours) < 0.4 * off(plain)


def test_inputs_that_have_nothing_in_common_are_rounded_alone() -> None:
    _, weight = correlated(1, 192)
    ours, plain = gptq(weight, torch.eye(192), 4, 32, torch.float16), nearest(weight, 4, 32, torch.float16)
    assert torch.equal(ours.scales, plain.scales) and torch.equal(ours.zeros, plain.zeros)
    assert (ours.codes != plain.codes).float().mean() < 1e-3  # ties


def test_inputs_that_never_come() -> None:
    x, weight = correlated(50, 64)
    x[:, 5] = 0
    rounded = gptq(weight, x.T @ x, 4, 32, torch.float16)  # fewer tokens than inputs are no obstacle, either
    step = rounded.scales.float().repeat_interleave(32, 1)
    assert (rounded.weight()[:, 5] - weight[:, 5]).abs().le(step[:, 5]).float().mean() > 0.9  # rounded alone, or cut at its range
    assert torch.isfinite(rounded.weight()).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [32, 37, 96])
def test_words(bits: int, count: int) -> None:
    codes = torch.randint(1 << bits, (5, count), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    found = words(codes, bits)
    assert found.shape == (5, -(-count * bits // 32)) and found.dtype == torch.int32
    assert torch.equal(unpack(found, bits)[:, :count].to(torch.uint8), codes)


@pytest.mark.skipif(find_spec("compressed_tensors") is None, reason="compressed-tensors is not installed")
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_its_own_library_reads_it(bits: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32  # type: ignore[import-not-found]

    rounded = nearest(correlated(1, 96)[1], bits, 32, torch.float16)
    tensors = packed_tensors("a", rounded)
    middle, shape = 1 << bits - 1, torch.Size(rounded.codes.shape)
    assert torch.equal(unpack_from_int32(tensors["a.weight_packed"], bits, shape).int() + middle, rounded.codes.int())
    zeros = unpack_from_int32(tensors["a.weight_zero_point"], bits, torch.Size(rounded.zeros.shape), packed_dim=0)
    assert torch.equal(zeros.int() + middle, rounded.zeros.int())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_is_the_model_but_for_what_it_lost(family: str, text: Path, tmp_path: Path) -> None:
    path = model_of(tmp_path / "model", family)
    found = quantise(path, [text], tmp_path / "copy", Settings(8, 32, "gptq", 40 * WINDOW, WINDOW, 4 * WINDOW), progress=False)
    quality = found["quality"]
    assert quality["kl"] < 0.01 and quality["acceptance"]["1"]["maximal"] > 0.95
    copy, source = open_checkpoint(str(tmp_path / "copy")), open_checkpoint(str(path)).source
    for name in source.names():
        whole = source.read(name)
        assert (copy.source.read(name) - whole).norm() < 0.02 * whole.norm(), name
    ids = list(range(3, 20))
    params = SamplingParams(max_tokens=6, ignore_eos=True, detokenize=False, prompt_logprobs=0)
    held = {}
    for weights in ("packed", "unpacked"):
        llm = LLM(tmp_path / "copy", ladder="plain", dtype="float32", device="cpu", weights=weights, progress=False)
        assert llm.plan.weights == weights
        [output] = llm.generate([ids], params)
        assert output.prompt_logprobs is not None
        held[weights] = [next(iter(each.values())).logprob for each in output.prompt_logprobs if each is not None]
    assert held["packed"] == pytest.approx(held["unpacked"], abs=1e-3)


def test_nearer_than_the_nearest(model: Path, text: Path, tmp_path: Path) -> None:
    """The text is noise, which says something about what a tiny random model's layers read all the same."""
    few = {"group": 64, "tokens": 50 * WINDOW, "window": WINDOW, "judged": 8 * WINDOW}
    kl = {
        method: quantise(model, [text], tmp_path / method, Settings(3, method=method, **few), progress=False)["quality"]["kl"]
        for method in ("gptq", "nearest")
    }
    assert kl["gptq"] < kl["nearest"]


def test_cut_off_and_gone_on(model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quantise(model, [text], tmp_path / "whole", SMALL, progress=False)
    asked = iter([False, True])
    with monkeypatch.context() as patched:
        patched.setattr(Part, "over", property(lambda self: next(asked)))
        with pytest.raises(Unfinished):
            quantise(model, [text], tmp_path / "cut", SMALL, progress=False)
    assert (tmp_path / "cut.state" / "layer-0.safetensors").exists() and not (tmp_path / "cut").exists()
    assert not (tmp_path / "cut.state" / "layer-1.safetensors").exists()
    with pytest.raises(UserError, match=r"other settings .*bits"):
        quantise(model, [text], tmp_path / "cut", Settings(8, 32, "gptq", 40 * WINDOW, WINDOW, 4 * WINDOW), progress=False)
    assert quantise(model, [text], tmp_path / "cut", SMALL, progress=False) == whole
    for name in ("model.safetensors", "config.json", "rowcast.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "cut.state").exists()
    monkeypatch.setattr(run, "OpenLayers", None)  # nothing is loaded where all is done
    assert quantise(model, [text], tmp_path / "cut", SMALL, progress=False) == whole


def test_every_part_gets_further(model: Path, text: Path, tmp_path: Path) -> None:
    def run(texts: Sequence[Path], output: Path) -> dict[str, Any]:
        return quantise(model, texts, output, SMALL, progress=False)

    run([text], tmp_path / "whole")
    layers = 2
    assert sittings(run, [text], tmp_path / "parts") == layers
    whole, parts = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts


def test_windows_begin_with_bos(model: Path, text: Path, tmp_path: Path) -> None:
    """The original's perplexity is Transformers', over windows that begin with what the tokenizer puts before a prompt."""
    begun = tiny_words(Path(shutil.copytree(model, tmp_path / "model")), bos=True)
    checkpoint = open_checkpoint(str(begun))
    found = quantise(begun, [text], tmp_path / "copy", SMALL, progress=False)
    held = read_windows([text], load_tokenizer(checkpoint), tokens=SMALL.tokens, window=WINDOW).held
    assert held.shape == (2, WINDOW) and (held[:, 0] == 1).all()
    subject = ModuleSubject(load_module(checkpoint, torch.float32, "cpu"))
    wanted = judge(subject, {"same": subject}, held, device=torch.device("cpu"))["same"]
    assert found["quality"]["tokens"] == wanted.tokens == 2 * (WINDOW - 1)
    assert found["quality"]["original_perplexity"] == pytest.approx(wanted.perplexity, rel=1e-4)
    assert found["settings"]["windows_begin_with"] == [1]
    with pytest.raises(UserError, match=r"other settings \(what windows begin with\): add --restart"):
        quantise(model, [text], tmp_path / "copy", SMALL, progress=False)


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rowcast.calibration.quantising.writing.SHARD_BYTES", 100)
    tensors = {f"t{i}": torch.full((20,), float(i)) for i in range(4)}
    write_tensors(tmp_path, [Stored(name, t.nbytes, lambda t=t: t) for name, t in tensors.items()])  # type: ignore[misc]
    source = SafetensorsSource.open(tmp_path)
    assert len(list(tmp_path.glob("model-*-of-00004.safetensors"))) == 4
    assert all(torch.equal(source.read(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(("wish", "words"), [
    ({"bits": 5}, "--bits 5 is not one of 3, 4, 8"),
    ({"group": 48}, "--group 48 does not divide the model's 64, 64, 128 inputs.*one of 32, 64"),
    ({"window": 4096}, "--window 4096 is longer than the model's context"),
    ({"method": "awq"}, "--method 'awq' is not known"),
])  # fmt: skip
def test_what_is_refused(model: Path, text: Path, tmp_path: Path, wish: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        quantise(model, [text], tmp_path / "out", Settings(**{"group": 32, "window": WINDOW, **wish}), progress=False)


def test_a_text_to_fit_and_to_judge_by_is_refused(model: Path, text: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.txt"
    shutil.copyfile(text, again)
    with pytest.raises(UserError, match=r"again\.txt is to be learnt from and to judge by"):
        quantise(model, [text], tmp_path / "out", SMALL, held_out=[again], progress=False)
    again.write_text(text.read_text() + " w1")
    assert quantise(model, [text], tmp_path / "out", SMALL, held_out=[again], progress=False)["settings"]["held_out"]


def test_of_an_adapted_model_the_density_stays(model: Path, text: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "adapted")
    config = json.loads((model / "config.json").read_bytes())
    (tmp_path / "adapted" / "config.json").write_text(
        json.dumps({**config, ADAPTED: {"density": 0.2, "acceptance": {"0.2": 0.9}}})
    )
    nearest_level = Settings(group=32, method="nearest", tokens=40 * WINDOW, window=WINDOW, judged=4 * WINDOW)
    quantise(tmp_path / "adapted", [text], tmp_path / "copy", nearest_level, progress=False)
    assert json.loads((tmp_path / "copy" / "config.json").read_bytes())[ADAPTED] == {"density": 0.2}


def test_the_command(model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "copy"
    small = ["--group", "32", "--tokens", "320", "--window", "16", "--judged", "32"]
    assert main(["quantize", str(model), "--text", str(text), "-o", str(out), *small]) == 0
    told = capsys.readouterr().out.splitlines()
    assert "bits a weight; on" in told[0]
    assert told[1] == f"wrote {out}; try: rowcast generate -m {out} --weights packed ..."
    assert json.loads(told[-1])["finished"] and json.loads(told[-1])["output"] == str(out)
    (tmp_path / "empty.txt").write_text(" ")
    assert main(["quantize", str(model), "--text", str(tmp_path / "empty.txt"), "-o", str(tmp_path / "no"), *small]) == 2
    assert "is empty, name a file that holds text" in capsys.readouterr().err
