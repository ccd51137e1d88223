"""`rowcast prune`: what goes first, that a cut is a mask, what the fit gives back, that a run can be cut off, and what is refused."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from learning_runs import CPU, QUIET, ended, in_two, parts_of
from tiny import VOCAB, model_with_words, random_words, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from rowcast import LLM, SamplingParams
from rowcast.calibration.learning.module import load_module, save_module
from rowcast.calibration.learning.part import Part, Unfinished
from rowcast.calibration.pruning import Settings, prune, run
from rowcast.calibration.pruning.blocks import blocks_of
from rowcast.calibration.pruning.cut import Kept, choose, cut, kept_by
from rowcast.calibration.pruning.importance import By, Importance, measure
from rowcast.calibration.pruning.refit import refit
from rowcast.calibration.pruning.sizes import HEADS_FREE, Sizes, Target, candidates, neuron_unit
from rowcast.cli import main
from rowcast.placement.models import known_config
from rowcast.runtime.checkpoint import open_checkpoint
from rowcast.runtime.checkpoint.safetensors_header import read_metadata
from rowcast.runtime.config import ADAPTED, spec_from_config
from rowcast.runtime.spec import ModelSpec, layer_parameters

fitting = importlib.import_module("rowcast.calibration.pruning.refit")

WINDOW = 16
FAMILIES = ("llama-gqa", "llama-bias", "qwen2-window", "qwen3", "mistral-window", "opt", "opt-350m", "falcon-7b", "falcon-40b")
SMALL = Settings(
    keep=0.7, tokens=16 * WINDOW, refit_tokens=64 * WINDOW, window=WINDOW, steps=6, batch=4, warmup=2, judged_tokens=8 * WINDOW
)


class Model:
    """A tiny model of a family, as a module with its spec."""

    def __init__(self, family: str, folder: Path, **overrides: Any) -> None:
        tiny_model(family, folder, **overrides)
        self.checkpoint = open_checkpoint(str(folder))
        self.config = self.checkpoint.config
        self.spec = spec_from_config(self.config)
        self.module = load_module(self.checkpoint, torch.float32, CPU)

    def measure(self, by: By = "taylor", windows: Tensor | None = None) -> Importance:
        return measure(self.module, self.spec, ids(8) if windows is None else windows, by, device=CPU)

    def cut(self, kept: Kept) -> tuple[Any, ModelSpec]:
        smaller = cut(self.module, self.config, self.spec, kept, torch.float32)
        return smaller, spec_from_config(smaller.config.to_dict())


def ids(windows: int, seed: int = 0, window: int = WINDOW) -> Tensor:
    return torch.randint(VOCAB, (windows, window), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_with_words(tmp_path_factory.mktemp("model") / "model", "llama-gqa")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_words(tmp_path_factory.mktemp("text") / "text.txt", 12000)


@pytest.fixture(scope="module")
def pruned(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("out") / "pruned"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "BATCH_TOKENS", 8 * WINDOW)
        prune(str(model), [text], output, SMALL, QUIET)
    return output


@torch.no_grad()
def logits(module: Any, windows: Tensor) -> Tensor:
    found: Tensor = module(input_ids=windows, use_cache=False).logits
    return found


@pytest.mark.parametrize("by", ["taylor", "activation"])
def test_neurons_and_heads_that_add_nothing_go_first(tmp_path: Path, by: By) -> None:
    model = Model("llama-gqa", tmp_path)
    for i, block in enumerate(blocks_of(model.module, model.spec)):
        block.down.weight.data[:, [3 * n + i for n in range(26)]] = 0
        block.out.weight.data[:, 16 * (i + 1) : 16 * (i + 3)] = 0  # the groups of KV heads i + 1 and i + 2
    kept = kept_by(model.spec, model.measure(by), Sizes(64, 2, 2))
    assert kept.kv_heads.tolist() == [[0, 3], [0, 1]]
    assert kept.heads[0].tolist() == [0, 1, 6, 7] and kept.lost < 1e-6
    smaller, spec = model.cut(kept)
    assert (spec.intermediate_size, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (64, 4, 2, 8)
    torch.testing.assert_close(logits(smaller, ids(2)), logits(model.module, ids(2)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_model_is_a_masked_one(tmp_path: Path, family: str) -> None:
    model = Model(family, tmp_path)
    spec = model.spec
    sizes = Sizes(48, spec.num_kv_heads // 2, spec.group_size) if spec.family in HEADS_FREE else Sizes.of(spec)
    kept = kept_by(spec, model.measure("activation"), Sizes(48, sizes.kv_heads, sizes.group))
    smaller, smaller_spec = model.cut(kept)
    assert layer_parameters(smaller_spec) == kept.sizes.parameters(spec)
    for i, block in enumerate(blocks_of(model.module, spec)):
        dropped = [n for n in range(spec.intermediate_size) if n not in kept.neurons[i].tolist()]
        block.down.weight.data[:, dropped] = 0
        for head in set(range(spec.num_heads)) - set(kept.heads[i].tolist()):
            block.out.weight.data[:, head * spec.head_dim : (head + 1) * spec.head_dim] = 0
    torch.testing.assert_close(logits(smaller, ids(2)), logits(model.module, ids(2)), rtol=1e-4, atol=1e-4)


def test_query_heads_go_from_every_group_alike(tmp_path: Path) -> None:
    model = Model("llama-gqa", tmp_path, num_key_value_heads=2)
    for block in blocks_of(model.module, model.spec):
        for head in (1, 2, 4, 7):
            block.out.weight.data[:, head * 8 : head * 8 + 8] = 0
    kept = kept_by(model.spec, model.measure(), Sizes(90, 2, 2))
    assert kept.heads.tolist() == [[0, 3, 5, 6]] * 2 and kept.kv_heads.tolist() == [[0, 1]] * 2
    smaller, spec = model.cut(kept)
    assert (spec.num_heads, spec.num_kv_heads) == (4, 2)
    torch.testing.assert_close(logits(smaller, ids(2)), logits(model.module, ids(2)), rtol=1e-4, atol=1e-4)


def test_importance_is_the_loss_gradient_of_a_mask(tmp_path: Path) -> None:
    model = Model("llama-gqa", tmp_path)
    windows, layer = ids(3), 1
    found = model.measure("taylor", windows)
    assert all(value.requires_grad and value.grad is None for value in model.module.parameters())
    block = blocks_of(model.module, model.spec)[layer]
    neurons = torch.ones(*windows.shape, 90, requires_grad=True)
    heads = torch.ones(*windows.shape, 8, 1, requires_grad=True)
    block.down.register_forward_pre_hook(lambda _, args: args[0] * neurons)
    block.out.register_forward_pre_hook(lambda _, args: (args[0].view(*windows.shape, 8, 8) * heads).flatten(2))
    predicted = model.module(input_ids=windows).logits[:, :-1].flatten(0, 1)
    F.cross_entropy(predicted, windows[:, 1:].flatten(), reduction="sum").backward()  # type: ignore[no-untyped-call]
    assert neurons.grad is not None and heads.grad is not None
    torch.testing.assert_close(found.neurons[layer].float(), neurons.grad.square().mean((0, 1)), rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(found.heads[layer].float(), heads.grad.square().mean((0, 1))[:, 0], rtol=1e-3, atol=1e-7)


def test_activation_importance_is_what_is_added(tmp_path: Path) -> None:
    model = Model("qwen3", tmp_path)
    spec, block, seen = model.spec, blocks_of(model.module, model.spec)[0], []
    block.out.register_forward_hook(lambda _, args, output: seen.append(args[0].flatten(0, 1)))
    found = model.measure("activation")
    parts = torch.cat(seen).view(-1, spec.num_heads, spec.head_dim)
    columns = block.out.weight.detach().T.view(spec.num_heads, spec.head_dim, -1)
    added = torch.einsum("thd,hde->the", parts.detach(), columns).square().sum(2).mean(0)
    torch.testing.assert_close(found.heads[0].float(), added, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fit_brings_a_cut_model_closer(tmp_path: Path, family: str) -> None:
    model = Model(family, tmp_path)
    target = Target(keep=0.75)
    kept = choose(model.spec, model.measure(), candidates(model.spec, target))
    smaller, spec = model.cut(kept)
    fresh = ids(4, seed=7)
    wanted = logits(model.module, fresh)
    before = (logits(smaller, fresh) - wanted).square().sum()
    left = refit(model.module, smaller, model.spec, spec, ids(80, seed=2), device=CPU, batch_tokens=100)
    after = (logits(smaller, fresh) - wanted).square().sum()
    assert len(left) == spec.num_layers and all(0 <= part <= 1.000001 for pair in left for part in pair)
    assert after < 0.97 * before, (float(before), float(after))


@pytest.mark.parametrize("family", ["llama-gqa", "opt", "falcon-40b"])
def test_the_fit_gives_back_what_others_can_say(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(family, tmp_path)
    neurons = torch.arange(60)
    for block in blocks_of(model.module, model.spec):
        for linear in block.inner:
            linear.weight.data[60:] = linear.weight.data[:30]  # twins of those that stay
            if linear.bias is not None:
                linear.bias.data[60:] = linear.bias.data[:30]
    heads, kv_heads = torch.arange(model.spec.num_heads), torch.arange(model.spec.num_kv_heads)
    sizes = Sizes(60, model.spec.num_kv_heads, model.spec.group_size)
    neurons, heads, kv_heads = (rows.expand(2, -1) for rows in (neurons, heads, kv_heads))
    smaller, spec = model.cut(Kept(sizes, neurons, heads, kv_heads, lost=0.0))
    wanted = logits(model.module, ids(4))
    assert (logits(smaller, ids(4)) - wanted).abs().max() > 0.1
    monkeypatch.setattr(fitting, "RIDGES", (1e-7, 10.0))
    refit(model.module, smaller, model.spec, spec, ids(64, seed=3), device=CPU)
    torch.testing.assert_close(logits(smaller, ids(4)), wanted, rtol=5e-3, atol=5e-3)


def shape(name: str) -> ModelSpec:
    config = known_config(name)
    assert config is not None
    return spec_from_config(config)


@pytest.mark.parametrize("name", ["meta-llama/Llama-2-7b-hf", "meta-llama/Llama-3.1-8B", "facebook/opt-66b"])
@pytest.mark.parametrize("keep", [0.5, 0.8, 0.95])
def test_sizes_stay_below_the_share_and_fit_kernels(name: str, keep: float) -> None:
    spec = shape(name)
    for tp in (1, 4):
        found = candidates(spec, Target(keep=keep, tp=tp))
        assert len(set(found)) == len(found)
        for sizes in found:
            whole = sizes.neurons == spec.intermediate_size
            assert sizes.share(spec) <= keep and sizes.kv_heads % tp == 0
            assert whole or sizes.neurons % (64 * tp) == 0
            more = Sizes(sizes.neurons + 64 * tp, sizes.kv_heads, sizes.group)
            assert whole or more.neurons > spec.intermediate_size or more.share(spec) > keep
        assert name.startswith("meta") or [(sizes.kv_heads, sizes.group) for sizes in found] == [(72, 1)]


def test_shares_one_by_one() -> None:
    spec = shape("meta-llama/Llama-3.1-8B")
    assert neuron_unit(spec) == 64
    assert candidates(spec, Target(neurons=0.8)) == [Sizes(11456, 8, 4)]
    found = candidates(spec, Target(heads=0.76))
    assert {(sizes.kv_heads, sizes.group) for sizes in found} == {(8, 2), (4, 4)}  # 4096 is no multiple of 24
    free = replace(spec, family="mistral")
    found = candidates(free, Target(heads=0.76))
    assert {(sizes.neurons, sizes.heads) for sizes in found} == {(14336, 24)}
    assert {(sizes.kv_heads, sizes.group) for sizes in found} == {(8, 3), (6, 4)}
    assert [(s.kv_heads, s.group) for s in candidates(free, Target(heads=0.76, tp=4))] == [(8, 3)]


def test_the_result_is_an_ordinary_checkpoint(pruned: Path, model: Path) -> None:
    found = json.loads((pruned / "rowcast.json").read_bytes())
    config = json.loads((pruned / "config.json").read_bytes())
    assert config["intermediate_size"] == found["neurons"][1] < 90 == found["neurons"][0]
    assert config["head_dim"] == 8 and config["num_attention_heads"] == found["heads"][1]
    assert found["kept"] <= 0.7 and found["parameters"][1] < found["parameters"][0]
    assert read_metadata(pruned / "model.safetensors")["pruned_from"] == "model"
    assert not pruned.with_name("pruned.state").exists()
    theirs = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32).eval()
    assert sum(value.numel() for value in theirs.parameters()) == found["parameters"][1]
    prompt = ids(1, seed=5)[0].tolist()
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False, logprobs=3)
    out = LLM(str(pruned), ladder="plain", dtype="float32", progress=False).generate([prompt], params)[0].outputs[0]
    wanted = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert out.token_ids == wanted[0, WINDOW:].tolist()
    laws = logits(theirs, wanted)[0, WINDOW - 1 : -1].log_softmax(-1)
    assert out.logprobs is not None
    for position, (law, said) in enumerate(zip(laws, out.logprobs, strict=True)):
        for token, logprob in said.items():
            assert abs(float(law[token]) - logprob.logprob) < 1e-4, position
    tokenizer = PreTrainedTokenizerFast.from_pretrained(pruned)
    assert tokenizer.encode("w5 w7") == [5, 7]


def test_the_result_has_the_format_of_the_original(model: Path, text: Path, tmp_path: Path) -> None:
    """Whatever the machine computes in: a copy that is made smaller is smaller."""
    original = open_checkpoint(str(model))
    halves = tmp_path / "halves"
    save_module(load_module(original, torch.bfloat16, CPU), original, halves, {}, torch.bfloat16)
    prune(str(halves), [text], tmp_path / "out", replace(SMALL, steps=0), replace(QUIET, dtype="float32"))
    assert open_checkpoint(str(tmp_path / "out")).stored_dtype == "bfloat16"


def test_each_stage_brings_it_closer(model: Path, text: Path, tmp_path: Path) -> None:
    more = replace(SMALL, steps=60, batch=8, learning_rate=2e-3, refit_tokens=4096)
    held = prune(str(model), [text], tmp_path / "p", more, QUIET)["held_out"]
    assert held["recovered"]["kl"] < 0.95 * held["refitted"]["kl"] < 0.9 * held["cut"]["kl"]


@pytest.mark.parametrize("looks", [[1, 8, 1], [12, 2]])  # while it weighs, and fits twice; while it learns, twice
def test_a_run_that_was_cut_off_ends_in_the_same_bytes(
    model: Path, text: Path, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looks: Sequence[int]
) -> None:
    monkeypatch.setattr(run, "BATCH_TOKENS", 8 * WINDOW)
    output = tmp_path / "pruned"
    for count in looks:
        with monkeypatch.context() as patched:
            parts_of(count - 1, patched)
            with pytest.raises(Unfinished):
                prune(str(model), [text], output, SMALL, replace(QUIET, save_seconds=0))
        assert not output.exists()
    prune(str(model), [text], output, SMALL, QUIET)
    found, wanted = (open_checkpoint(str(path)).source for path in (output, pruned))
    assert list(found.names()) == list(wanted.names())
    assert all(torch.equal(found.read(name), wanted.read(name)) for name in wanted.names())


def test_a_signal_ends_the_fit_at_once(model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "BATCH_TOKENS", 8 * WINDOW)
    monkeypatch.setattr(Part, "asked", property(lambda self: (tmp_path / "pruned.state" / "fit-0.safetensors").exists()))
    with pytest.raises(Unfinished):
        prune(str(model), [text], tmp_path / "pruned", SMALL, QUIET)
    assert (tmp_path / "pruned.state" / "fit-0.safetensors").exists()
    assert not (tmp_path / "pruned.state" / "fit-1.safetensors").exists()


def test_a_signal_ends_judging(model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Part, "asked", True)
        with pytest.raises(Unfinished):
            prune(str(model), [text], tmp_path / "pruned", SMALL, QUIET)
    assert (tmp_path / "pruned.state" / run.IMPORTANCE).exists()
    assert not (tmp_path / "pruned.state" / "fit-0.safetensors").exists()
    prune(str(model), [text], tmp_path / "pruned", SMALL, QUIET)


def test_all_processes_stop_where_the_leading_one_does(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It alone weighs, cuts and judges, and the others wait for it."""
    pytest.importorskip("accelerate")
    sizes = ["--keep", "0.7", "--tokens", "256", "--refit-tokens", "1024", "--window", "16", "--judged", "128"]
    recovery = ["--steps", "2", "--batch", "4", "--device", "cpu"]
    command = ["prune", str(model), "--text", str(text), "-o", str(tmp_path / "two"), *sizes, *recovery]
    with monkeypatch.context() as patched:
        patched.setattr(Part, "over", True)
        ended(in_two(command))
    assert (tmp_path / "two.state" / run.IMPORTANCE).exists() and not (tmp_path / "two").exists()
    ended(in_two(command))
    assert json.loads((tmp_path / "two" / "rowcast.json").read_bytes())["settings"]["processes"] == 2


def test_what_adapting_measured_does_not_go_along(model: Path, text: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "adapted")
    config = json.loads((model / "config.json").read_bytes())
    (tmp_path / "adapted" / "config.json").write_text(
        json.dumps({**config, ADAPTED: {"density": 0.2, "acceptance": {"0.2": 0.9}}})
    )
    prune(str(tmp_path / "adapted"), [text], tmp_path / "p", replace(SMALL, steps=1, refit_tokens=0), QUIET)
    assert ADAPTED not in json.loads((tmp_path / "p" / "config.json").read_bytes())


def test_a_finished_run_is_left_alone(model: Path, text: Path, pruned: Path) -> None:
    before = (pruned / "model.safetensors").stat().st_mtime_ns
    assert prune(str(model), [text], pruned, SMALL, QUIET)["kept"] <= 0.7
    assert (pruned / "model.safetensors").stat().st_mtime_ns == before


def test_the_command_says_what_it_did(model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--neurons", "0.8", "--window", "16", "--steps", "0", "--refit-tokens", "512", "--judged", "64"]
    assert main(["prune", str(model), "--text", str(text), "-o", str(tmp_path / "p"), *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "neurons 90 -> 72" in lines[0] and [line.split(":")[0] for line in lines[1:4]] == ["original", "cut", "refitted"]
    assert json.loads(lines[-1])["neurons"] == [90, 72]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to prune"),
        (["--keep", "0.8", "--heads", "0.5"], "give it alone"),
        (["--keep", "1.2"], "--keep 1.2 is not a share"),
        (["--keep", "1"], "lower one of them"),
        (["--keep", "0.01"], "keep more"),
        (["--neurons", "0.01"], "keep more"),
        (["--heads", "0.1"], "keep more"),
        (["--keep", "0.8", "--tp", "3"], "does not divide the model's 4 KV heads"),
        (["--keep", "0.8", "--window", "400"], "longer than the model's context"),
        (["--keep", "0.8", "--steps", "-1"], "--steps -1 is too low"),
        (["--keep", "0.8", "--window", "100"], "text has"),
    ],
)
def test_bad_input_is_one_sentence(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("w1 w2 w3 " * 20)
    assert main(["prune", str(model), "--text", str(short), "-o", str(tmp_path / "p"), "--window", "16", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("family", "arguments", "said"),
    [
        ("bloom", ["--keep", "0.8"], "a model of type bloom has 4 neurons for each hidden dimension"),
        ("mpt", ["--neurons", "0.8"], "a model of type mpt has 4 neurons"),
        ("opt", ["--heads", "0.5"], "the heads of a model of type opt are hidden size / heads large"),
    ],
)
def test_what_a_family_has_no_config_for(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str], family: str, arguments: list[str], said: str
) -> None:
    tiny_model(family, tmp_path / "m")
    assert main(["prune", str(tmp_path / "m"), "--text", str(text), "-o", str(tmp_path / "p"), *arguments]) == 2
    assert said in capsys.readouterr().err
