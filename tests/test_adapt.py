"""Adapting: masks that are the engine's choice, a mix with both ends, rounding as the engine's, a run that can be cut off."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from learning_runs import CPU, QUIET, ended, in_two, parts_of
from tiny import VOCAB, model_with_words, random_words, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from rowcast import LLM, SamplingParams
from rowcast.calibration import Settings as CalibrationSettings
from rowcast.calibration import calibrate
from rowcast.calibration import run as calibration_run
from rowcast.calibration.adapting.adapt import adapt, balanced
from rowcast.calibration.adapting.divergence import divergence, mean_divergences
from rowcast.calibration.adapting.mix import Mix
from rowcast.calibration.adapting.neurons import Neurons, top
from rowcast.calibration.adapting.rounding import Rounding
from rowcast.calibration.adapting.settings import Settings
from rowcast.calibration.adapting.streams import Streams
from rowcast.calibration.adapting.table import Row, from_json, measure
from rowcast.calibration.evaluate import drafts_of, laws_of
from rowcast.calibration.learning.losses import mixed_term
from rowcast.calibration.learning.module import load_module
from rowcast.calibration.learning.part import Unfinished
from rowcast.calibration.learning.settings import Optimizer
from rowcast.calibration.learning.trainer import Trainer
from rowcast.calibration.recording import OneLayerKV, window_steps
from rowcast.cli import main
from rowcast.errors import UserError
from rowcast.kernels import select
from rowcast.runtime.banks import BankWeights, neuron_order
from rowcast.runtime.checkpoint import Checkpoint, open_checkpoint
from rowcast.runtime.checkpoint.safetensors_header import read_metadata
from rowcast.runtime.comm import SoloComm
from rowcast.runtime.config import ADAPTED, spec_from_config
from rowcast.runtime.decoder import Decoder
from rowcast.runtime.forecast import LadderWish, candidates, spec_digest, workload
from rowcast.runtime.ladder.spec import Rung
from rowcast.runtime.lowbit_weights import LowBitWeights
from rowcast.runtime.protocols import WeightView
from rowcast.runtime.shard import Shard
from rowcast.runtime.sparse.artefact import BESIDE, Calibration
from rowcast.runtime.sparse.build import build_view
from rowcast.runtime.sparse.scorers import Oracle
from rowcast.runtime.sparse.selection import Selector, shards_for
from rowcast.runtime.spec import ModelSpec

FAMILIES = ("opt", "llama-gqa", "llama-bias", "qwen3", "bloom", "mpt", "falcon-40b")
SMALL = Settings(
    density=0.2, window=16, batch=16, steps=60, learning_rate=2e-3, warmup=5, written_tokens=1024, prompt_tokens=4, judged_tokens=256,
    looks=2, dense_weight=2.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_with_words(tmp_path_factory.mktemp("opt"), "opt")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_words(tmp_path_factory.mktemp("text") / "text.txt", 1200)


@pytest.fixture(scope="module")
def adapted(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("adapted") / "model"
    return output, adapt(str(model), [text], output, SMALL, QUIET)


def banks_of(checkpoint: Checkpoint) -> BankWeights:
    return BankWeights(spec_from_config(checkpoint.config), checkpoint.source, SoloComm(), dtype=torch.float32, device=CPU)


def logits_of(view: WeightView, ids: Tensor) -> Tensor:
    decoder = Decoder(view, SoloComm(), CPU)
    return decoder.logits(decoder.run(window_steps(ids, 1), OneLayerKV(view.spec, *ids.shape, dtype=torch.float32, device=CPU)))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_masked_module_uses_the_neurons_that_the_engine_chooses(name: str, tmp_path: Path) -> None:
    tiny_model(name, tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    banks, spec = banks_of(checkpoint), spec_from_config(checkpoint.config)
    module = load_module(checkpoint, torch.float32, CPU)
    ids = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(2))
    before = module(input_ids=ids).logits
    found = Neurons(module, spec)
    found.permute()
    torch.testing.assert_close(module(input_ids=ids).logits, before)
    found.hook()
    torch.testing.assert_close(module(input_ids=ids).logits, before)
    found.densities = [1.0, 0.3]
    seen: list[tuple[Tensor, Tensor]] = []
    for mlp in found.mlps:
        inputs: list[Tensor] = []
        mlp.inner[0].register_forward_hook(lambda _, x, y, inputs=inputs: inputs.append(x[0].view(2, 12, -1)))
        mlp.down.register_forward_hook(lambda _, x, y, inputs=inputs: seen.append((inputs[-1], y.view(2, 12, -1).clone())))
    module(input_ids=ids)
    assert len(seen) == spec.num_layers
    for bank, (x, y) in zip(banks.ffn, seen, strict=True):
        hidden = bank.hidden(x[1])
        own = Selector(Oracle(bank), spec.intermediate_size, keep=round(0.3 * spec.intermediate_size))(x[1], few=False).own
        assert own is not None and own.float().mean() == pytest.approx(0.3, abs=0.01)
        torch.testing.assert_close(y[1], bank.out(hidden * own), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(y[0], bank.out(bank.hidden(x[0])), rtol=1e-4, atol=1e-4)
    found.unhook()
    found.permute(back=True)
    assert torch.equal(module(input_ids=ids).logits, before)


@pytest.mark.parametrize("neurons", [90, 96])
def test_the_best_of_each_shard_are_kept_compiled_or_not(neurons: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randint(1000, (40, neurons), generator=torch.Generator().manual_seed(0)) / 1e3
    scores[:, ::7] = 0
    plain = [top(scores, density) for density in (0.01, 0.1, 0.3, 0.75, 0.99)]
    for low, high in pairwise(plain):
        assert (low <= high).all() and low.sum() < high.sum()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for density, mask in zip((0.01, 0.1, 0.3, 0.75, 0.99), plain, strict=True):
        assert torch.equal(top(scores, density), mask)


@pytest.mark.parametrize(("name", "neurons"), [("llama-gqa", {"intermediate_size": 96}), ("opt", {"ffn_dim": 96})])
def test_all_densities_at_once_choose_the_same(name: str, neurons: dict[str, int], tmp_path: Path) -> None:
    tiny_model(name, tmp_path, **neurons)
    checkpoint = open_checkpoint(str(tmp_path))
    module, spec = load_module(checkpoint, torch.float32, CPU), spec_from_config(checkpoint.config)
    ids = torch.randint(VOCAB, (4, 12), generator=torch.Generator().manual_seed(2))
    found = Neurons(module, spec)
    found.permute()
    found.hook()
    wanted = []
    for found.at_once in (False, True):
        found.densities = [1.0, 0.5, 0.15, 0.15]
        assert (found._keeps is not None) == found.at_once
        wanted.append(module(input_ids=ids).logits)
    torch.testing.assert_close(*wanted)
    found.densities = [1.0] * 4
    assert (module(input_ids=ids).logits - wanted[0]).abs().max() > 1e-3


def test_streams_are_beside_the_teachers_layer_by_layer(tmp_path: Path) -> None:
    tiny_model("llama-gqa", tmp_path, num_hidden_layers=3)
    checkpoint = open_checkpoint(str(tmp_path))
    spec = spec_from_config(checkpoint.config)
    teacher, student = (load_module(checkpoint, torch.float32, CPU) for _ in range(2))
    ids = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(2))
    streams = Streams(teacher, student, spec)
    streams.watch()
    with torch.no_grad():
        student.model.layers[1].mlp.down_proj.weight *= 1.5
        teacher(input_ids=ids)
        theirs = teacher.model(input_ids=ids, output_hidden_states=True).hidden_states
    ours = student.model(input_ids=ids, output_hidden_states=True).hidden_states
    errors = streams.errors()
    assert errors.shape == (spec.num_layers, 2) and errors[0].eq(0).all() and (errors[1:] > 0).all()
    parts = (ours[2] - theirs[2]).square().sum(-1) / theirs[2].square().sum(-1)
    torch.testing.assert_close(errors[1], parts.mean(1))
    errors.sum().backward()  # type: ignore[no-untyped-call]
    assert all(value.grad is None for value in teacher.parameters())
    assert student.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0
    streams.unwatch()
    student(input_ids=ids)
    assert streams._seen == [[None] * spec.num_layers] * 2


@pytest.mark.parametrize("neurons", [96, 18_432])
def test_shards_are_those_of_the_engine(neurons: int) -> None:
    """Wide layers have more of them."""
    scores = torch.rand(3, neurons, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
    wanted = select.top_mask(scores, round(0.2 * neurons), shards_for(neurons))
    assert (top(scores, 0.2) == wanted).float().mean() > 0.9999  # but for equal scores


def test_levels_are_found_and_followed(tmp_path: Path) -> None:
    """One level for all layers, of contributions weighed by sensitivities: as many neurons as wanted on average, not of each layer."""
    tiny_model("llama-gqa", tmp_path, num_hidden_layers=3, intermediate_size=96)
    checkpoint = open_checkpoint(str(tmp_path))
    module, spec = load_module(checkpoint, torch.float32, CPU), spec_from_config(checkpoint.config)
    draws = torch.Generator().manual_seed(2)
    ids = torch.randint(VOCAB, (8, 24), generator=draws)
    weights = [(layer + 1) * torch.rand(96, generator=draws).add(0.1) for layer in range(3)]
    found = Neurons(module, spec, "threshold", sensitivities=weights, densities=(1.0, 0.5, 0.2))
    found.permute()
    found.hook()
    assert found.wanted.tolist() == pytest.approx([0.2, 0.5, 1])
    found.find_levels(ids, 8)
    levels = found.levels.clone()
    assert levels[0] > levels[1] > 0 and levels[2] == -1
    kept: dict[int, list[Tensor]] = {0: [], 1: [], 2: []}
    for layer, mlp in enumerate(found.mlps):  # behind the hook that masks
        mlp.down.register_forward_pre_hook(lambda _, x, layer=layer: kept[layer].append(x[0]))
    for density, level in ((0.2, levels[0]), (0.5, levels[1])):
        for seen in kept.values():
            seen.clear()
        found.densities = [1.0] + [density] * 7
        module(input_ids=ids)
        used = []
        for layer, mlp in enumerate(found.mlps):
            back = found_order(spec, layer)
            (masked,) = kept[layer]
            scores = masked[1:].abs() * mlp.down.weight.norm(dim=0) * weights[layer][back]
            assert (scores[masked[1:] != 0] > level).all() and (masked[0] != 0).all()
            used.append(float((masked[1:] != 0).float().mean()))
        assert sum(used) / 3 == pytest.approx(density, rel=0.1) and max(used) > 1.3 * min(used)
    found.follows = True
    found.levels[0] *= 2
    for _ in range(30):
        found.densities = [0.2] * 8
        module(input_ids=ids)
        found.follow()
    assert float(found.levels[0]) == pytest.approx(float(levels[0]), rel=0.1) and torch.equal(found.levels[1:], levels[1:])
    found.find_levels(ids, 4)  # in parts, as training has them
    torch.testing.assert_close(found.levels, levels, rtol=0.1, atol=0)
    found.follows = True
    found.levels[0] = 0
    for _ in range(60):
        found.densities = [0.2] * 8
        module(input_ids=ids)
        found.follow(0.5)
    assert float(found.levels[0]) == pytest.approx(float(levels[0]), rel=0.1)
    found.unhook()
    assert not hasattr(found.mlps[0].down, "sensitivity")


def found_order(spec: ModelSpec, layer: int) -> Tensor:
    return neuron_order(spec, Shard(), layer, seed=0)


def test_a_mix_has_both_ends_in_every_sixteen_windows() -> None:
    mix = Mix.around(0.15)
    assert mix.densities == (1.0, 0.5, 0.2, 0.15, 0.25, 0.1)
    for first in (0, 5, 48):
        batch = mix.of(first, 16)
        assert batch == sorted(batch, reverse=True) and batch.count(1.0) == 4 and set(batch) == set(mix.densities)
    assert mix.of(0, 3) + mix.of(3, 13) != mix.of(0, 16) and sorted(mix.of(0, 3) + mix.of(3, 13)) == sorted(mix.of(0, 16))
    assert all(0 < one <= 1 for one in Mix.around(0.9).densities) and Mix.around(0.9).densities[1] > 0.9


def test_divergences_and_their_gradients_are_those_of_whole_laws(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = torch.Generator().manual_seed(0)
    student, head = torch.randn(7, 4, generator=draws, requires_grad=True), torch.randn(11, 4, generator=draws)
    teacher, theirs = torch.randn(7, 6, generator=draws), torch.randn(11, 6, generator=draws)
    log_q, log_p = (student @ head.T).log_softmax(-1), (teacher @ theirs.T).log_softmax(-1)
    wanted = (log_p.exp() * (log_p - log_q)).sum(-1)
    weights = torch.rand(7, generator=draws)
    (slope,) = torch.autograd.grad((wanted * weights).sum(), student)
    monkeypatch.setitem(masks_of_divergence(), "cpu", 4 * 11 * 3)  # three rows at a time
    found, overlap = divergence(student, head, teacher, theirs)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(overlap, torch.minimum(log_p.exp(), log_q.exp()).sum(-1))
    torch.testing.assert_close(torch.autograd.grad((found * weights).sum(), student)[0], slope)


def test_means_of_runs_have_the_gradients_of_whole_laws(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = torch.Generator().manual_seed(0)
    student, head = torch.randn(9, 4, generator=draws, requires_grad=True), torch.randn(11, 4, generator=draws)
    teacher, theirs = torch.randn(9, 6, generator=draws), torch.randn(11, 6, generator=draws)
    log_q, log_p = (student @ head.T).log_softmax(-1), (teacher @ theirs.T).log_softmax(-1)
    whole = (log_p.exp() * (log_p - log_q)).sum(-1)
    wanted = torch.stack([whole[:7].mean(), whole[7:].mean()])
    weights = torch.tensor([0.7, 2.0])
    (slope,) = torch.autograd.grad(wanted @ weights, student)
    monkeypatch.setitem(masks_of_divergence(), "cpu", 4 * 11 * 3)
    found = mean_divergences(student, head, teacher, theirs, [7, 2], mixed_term(0.0))
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found @ weights, student)[0], slope)


def masks_of_divergence() -> dict[str, int]:
    from rowcast.calibration.adapting import divergence as module

    return module.ROW_BYTES


def test_the_loss_weighs_densities_by_windows() -> None:
    found = torch.tensor([0.04, 0.0, 0.36, 0.36])
    loss = balanced(found, [1.0, 1.0, 0.2, 0.2], 3.0)
    ends = ((0.02 + 1e-3) ** 0.5 - 1e-3**0.5, (0.36 + 1e-3) ** 0.5 - 1e-3**0.5)
    assert float(loss) == pytest.approx((3 * ends[0] + ends[1]) / 4)
    two = torch.stack([found, torch.zeros(4)])
    assert balanced(two, [1.0, 1.0, 0.2, 0.2], 3.0).tolist() == pytest.approx([float(loss), 0], abs=1e-7)
    parts = [balanced(found[i::2], [1.0, 0.2], 3.0) for i in range(2)]  # each with roots of its own
    assert float(sum(parts)) / 2 < float(loss) - 0.01


@pytest.mark.parametrize(("name", "bits"), [("llama-bias", 4), ("opt", 8), ("falcon-40b", 4)])
def test_rounded_passes_are_those_of_the_engines_rung(name: str, bits: int, tmp_path: Path) -> None:
    tiny_model(name, tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    spec, module = spec_from_config(checkpoint.config), load_module(checkpoint, torch.float32, CPU)
    ids = torch.randint(VOCAB, (1, 12), generator=torch.Generator().manual_seed(2))
    before = module(input_ids=ids).logits
    found = Neurons(module, spec)
    found.permute()
    rounding = Rounding(module, spec, bits, torch.float32)
    with rounding.on():
        hidden = module.base_model(input_ids=ids).last_hidden_state
        hidden.sum().backward()
    view = LowBitWeights.of_banks(banks_of(checkpoint), bits)
    torch.testing.assert_close(hidden[0] @ rounding.head.T, logits_of(view, ids), rtol=2e-3, atol=2e-3)
    assert (hidden[0] @ rounding.head.T - before[0]).abs().max() > 5e-3
    weight = dict(module.named_parameters())[
        next(name for name, _ in module.named_parameters() if name.endswith("weight.original"))
    ]
    assert weight.grad is not None and weight.grad.abs().max() > 0
    rounding.remove()
    found.permute(back=True)
    assert torch.equal(module(input_ids=ids).logits, before)


def row(found: dict[str, Any], model: str, density: float, by: str = "oracle") -> dict[str, Any]:
    (one,) = (one for one in found["table"] if (one["model"], one["density"], one["by"]) == (model, density, by))
    return one  # type: ignore[no-any-return]


def test_adapting_raises_the_low_end_and_holds_the_dense_one(adapted: tuple[Path, dict[str, Any]]) -> None:
    _, found = adapted
    for by in ("oracle", "q4"):
        before, after = row(found, "original", 0.2, by), row(found, "adapted", 0.2, by)
        assert after["acceptance"] > before["acceptance"] + 0.08
    assert row(found, "adapted", 1.0, "")["acceptance"] > 0.85
    assert set(found["looks"]) == {"0", "30", "60"}
    assert found["looks"]["0"]["acceptance"]["1"] == pytest.approx(1.0)
    assert found["looks"]["60"]["acceptance"]["0.2"] > found["looks"]["0"]["acceptance"]["0.2"] + 0.08


def test_the_result_is_an_ordinary_checkpoint(adapted: tuple[Path, dict[str, Any]], model: Path) -> None:
    output, found = adapted
    ids = torch.randint(VOCAB, (1, 12), generator=torch.Generator().manual_seed(2))
    theirs = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    checkpoint = open_checkpoint(str(output))
    torch.testing.assert_close(theirs(input_ids=ids).logits[0], logits_of(banks_of(checkpoint), ids), rtol=1e-4, atol=1e-4)
    assert {path.name for path in output.iterdir()} >= {path.name for path in model.iterdir()} | {"rowcast.json"}
    assert not output.with_name("model.state").exists()
    assert read_metadata(output / "model.safetensors")["adapted_to"] == "0.2"
    spec = spec_from_config(checkpoint.config)
    assert spec.adapted is not None and (spec.adapted.density, spec.adapted.cut) == (0.2, "threshold")
    assert dict(spec.adapted.acceptance)[0.2] == pytest.approx(row(found, "adapted", 0.2, "q4")["draft"], abs=1e-3)
    assert spec_digest(spec) == spec_digest(spec_from_config(open_checkpoint(str(model)).config))


def test_the_table_is_of_each_model_by_itself_and_as_its_own_draft(adapted: tuple[Path, dict[str, Any]], model: Path) -> None:
    output, _ = adapted
    checkpoints = {"original": open_checkpoint(str(model)), "adapted": open_checkpoint(str(output))}
    banks, rung = {name: banks_of(each) for name, each in checkpoints.items()}, Rung(kind="self", mlp=0.2, by="oracle")
    windows = [torch.randint(VOCAB, (24,), generator=torch.Generator().manual_seed(4)).tolist()]
    settings: Any = {"dtype": torch.float32, "device": torch.device("cpu")}
    rows = measure(checkpoints["original"], checkpoints["adapted"], [1.0, 0.2], windows, **settings)
    for name, own in banks.items():
        [found] = [one for one in rows if (one.model, one.density, one.by) == (name, 0.2, "oracle")]
        view: dict[str, WeightView] = {"it": build_view(own, rung, None)}
        alone = laws_of(banks["original"], view, windows, **settings)[1]["it"]
        assert found.acceptance == pytest.approx(alone.acceptance, rel=1e-5)
        assert found.perplexity == pytest.approx(alone.perplexity, rel=1e-5)
        assert found.draft == pytest.approx(drafts_of(own, view, windows, **settings)["it"].acceptance, rel=1e-5)
        assert abs(found.draft - found.acceptance) > 1e-3
    calibration = Calibration.open(output / BESIDE, None)
    with pytest.raises(UserError, match=f"mlp=0.001 is below {calibration.densities[0]}, the least density"):
        measure(checkpoints["original"], checkpoints["adapted"], [0.2, 0.001], windows, calibration=calibration, **settings)
    older = [{**asdict(one), "own": 0.5} for one in rows]
    for one in older:
        del one["draft"]
    assert [one.acceptance for one in from_json(older)] == [one.acceptance for one in rows]
    assert all(math.isnan(one.draft) for one in from_json(older))


def test_its_density_is_the_default_of_its_rungs(
    adapted: tuple[Path, dict[str, Any]], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, _ = adapted
    spec = spec_from_config(open_checkpoint(str(output)).config)
    wish = LadderWish(context=64)
    assert any(rung.mlp == 0.2 for ladder in candidates(spec, wish) for rung in ladder.rungs)
    assert not any(rung.mlp for ladder in candidates(replace(spec, adapted=None), wish) for rung in ladder.rungs)
    work = workload(model=str(output), context=64)
    assert next(one for one in work.inputs if one.name == "density").value == 0.2
    out = LLM(str(output), ladder="hire", mode="approximate", device="cpu").generate(
        ["w1 w2 w3"], SamplingParams(temperature=0, max_tokens=4)
    )[0]
    assert str(out.metrics.ladder) == "self:mlp=0.2,by=q4,cut=threshold,lm=hire", "it was trained by levels"
    for find in (LLM, workload):
        with pytest.raises(UserError, match="the ladder dejavu needs a calibration with predictors"):
            find(model=str(output), ladder="dejavu")
    assert main(["eval", str(output), "--text", str(text), "--tokens", "64", "--device", "cpu", "--json"]) == 0
    assert "mlp=0.2,by=q4" in next(iter(json.loads(capsys.readouterr().out)["texts"].values()))["views"]
    settings = CalibrationSettings(tokens=320, window=16, train_steps=0, measured_tokens=32)
    assert calibrate(output, [text], tmp_path / "calibration", settings).description["density"] == 0.2


def test_a_calibration_takes_the_place_of_the_one_that_it_carries(
    adapted: tuple[Path, dict[str, Any]], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it is asked to, and not before it is whole."""
    model = Path(shutil.copytree(adapted[0], tmp_path / "model"))
    own, settings = model / BESIDE, CalibrationSettings(tokens=320, window=16, train_steps=0, measured_tokens=32)
    before = {path.name: path.read_bytes() for path in own.iterdir()}

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(UserError, match=r"the calibration that `rowcast adapt` left: add --restart to take its place"):
        calibrate(model, [text], own, settings)
    with monkeypatch.context() as patch:
        patch.setattr(calibration_run, "fit_layer", killed)
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, [text], own, settings, restart=True)
    assert {path.name: path.read_bytes() for path in own.iterdir() if path.is_file()} == before
    made = calibrate(model, [text], own, settings)
    assert made.description["settings"] and "made_by" not in made.description and "layers.0.dejavu.a" in made
    assert LLM(str(model), ladder="dejavu", device="cpu").plan.calibration == made.identity
    assert calibrate(model, [text], own, settings).identity == made.identity
    foreign = Path(shutil.copytree(adapted[0] / BESIDE, tmp_path / "other"))
    (foreign / "notes").touch()
    with pytest.raises(UserError, match=r"holds other files \(notes\)"):
        calibrate(model, [text], foreign, settings, restart=True)


def test_a_config_that_says_nonsense_of_it_is_refused(model: Path) -> None:
    config = json.loads((model / "config.json").read_bytes())
    wrong: list[Any] = [3, {}, {"density": 0}]
    wrong += [{"density": 0.2, **more} for more in ({"acceptance": {"0.1": 2}}, {"acceptance": [1]}, {"cut": "bottom"})]
    for value in wrong:
        with pytest.raises(UserError, match=ADAPTED):
            spec_from_config({**config, ADAPTED: value})


@pytest.mark.parametrize(("bits", "optimizer"), [(None, "adamw"), (8, "muon")])
def test_a_run_that_was_cut_off_gives_the_same_bits(
    bits: int | None, optimizer: Optimizer, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SMALL, steps=7, written_tokens=256, judged_tokens=16, looks=1, bits=bits, optimizer=optimizer)
    parts = {}
    for name, most in (("whole", 10**6), ("cut", 5)):
        for attempt in range(20):
            parts_of(most, monkeypatch)
            try:
                found = adapt(str(model), [text], tmp_path / name, settings, QUIET)
                break
            except Unfinished:
                assert not (tmp_path / name).exists() and attempt < 19
        parts[name] = attempt
    assert parts["whole"] == 0 < parts["cut"]
    whole, cut = (open_checkpoint(str(tmp_path / name)).source for name in parts)
    assert all(torch.equal(whole.read(name), cut.read(name)) for name in whole.names())
    assert adapt(str(model), [text], tmp_path / "cut", settings, QUIET)["table"] == found["table"]
    with pytest.raises(UserError, match=r"other settings \(--density\): add --restart"):
        adapt(str(model), [text], tmp_path / "cut", replace(settings, density=0.3), QUIET)


def test_two_processes_adapt_together(model: Path, text: Path, tmp_path: Path) -> None:
    """To levels that both have, and the leading one measures while the other waits."""
    pytest.importorskip("accelerate")
    command = [
        "adapt",
        str(model),
        "--text",
        str(text),
        "-o",
        str(tmp_path / "two"),
        "--window",
        "16",
        "--batch",
        "16",
        "--looks",
        "0",
    ]
    command += ["--steps", "3", "--written", "0", "--judged", "64", "--device", "cpu"]
    ended(in_two(command))
    made = json.loads((tmp_path / "two" / "rowcast.json").read_bytes())
    assert made["settings"]["processes"] == 2 and made["training"]["steps"] == 3
    assert (tmp_path / "two" / "calibration" / "calibration.json").exists()


def test_a_signal_ends_measuring(model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is not saved half done: the same command measures anew what it has trained."""
    settings = replace(SMALL, steps=2, written_tokens=0, judged_tokens=16, looks=0)

    def told_to_stop(*arguments: Any, **more: Any) -> list[Row]:
        os.kill(os.getpid(), signal.SIGTERM)
        return measure(*arguments, **more)

    with monkeypatch.context() as patched:
        patched.setattr("rowcast.calibration.adapting.adapt.measure", told_to_stop)
        with pytest.raises(Unfinished) as stopped:
            adapt(str(model), [text], tmp_path / "out", settings, QUIET)
    assert stopped.value.by_signal == signal.SIGTERM and not (tmp_path / "out").exists()
    trained = (tmp_path / "out.state" / "training.safetensors").read_bytes()
    monkeypatch.setattr(Trainer, "_move", None)  # nothing is trained again
    found = adapt(str(model), [text], tmp_path / "out", settings, QUIET)
    assert trained and found["training"]["steps"] == 2 and len(found["table"]) > 2


def test_no_steps_are_told_as_such(model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--steps", "0", "--window", "16", "--judged", "16", "--density", "0.2", "--device", "cpu"]
    assert main(["adapt", str(model), "--text", str(text), "-o", str(tmp_path / "out"), *more]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "0 tokens at 0.0 tokens/s, no steps; default density 0.2"
    assert json.loads(lines[-1])["training"]["loss"] is None


def test_relu_is_what_the_result_says_and_runs(text: Path, tmp_path: Path) -> None:
    model = model_with_words(tmp_path / "llama", "llama-gqa")
    settings = replace(SMALL, choice="relu", steps=10, written_tokens=0, judged_tokens=16, looks=3)
    found = adapt(str(model), [text], tmp_path / "out", settings, QUIET)
    assert open_checkpoint(str(tmp_path / "out")).config["hidden_act"] == "relu"
    assert set(found["looks"]) == {"0", "4", "8", "10"}
    assert found["looks"]["10"]["used"]["1"] < 0.7 < found["looks"]["10"]["acceptance"]["1"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--density", "1"], "--density 1 is no part of the neurons: give a number above 0 and below 1"),
        (["--window", "16", "--bits", "3"], "--bits 3 is no rung's: use 4 or 8"),
        (["--window", "4096"], "--window 4096 is longer than the model's context of 64: lower it"),
        (["--window", "16", "--batch", "9", "--accumulate", "2"], "--accumulate 2 does not divide --batch 9: give a divisor"),
        (["--window", "16", "--steps", "-1"], "--steps -1 is too low: give 0 or more"),
        (["--window", "16", "--dense-weight", "0"], "--dense-weight 0 weighs nothing: give a number above 0"),
        (["--window", "16", "--stream-weight", "-1"], "--stream-weight -1 is no weight: give 0 or more"),
    ],
)
def test_bad_input_is_one_sentence(
    options: list[str], said: str, model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["adapt", str(model), "--text", str(text), "-o", str(tmp_path / "out"), "--written", "0", "--device", "cpu"]
    assert main([*command, *options]) == 2
    assert capsys.readouterr().err == f"rowcast: {said}.\n"
    assert not (tmp_path / "out").exists()


def test_relu_needs_a_config_that_names_its_activation(text: Path, tmp_path: Path) -> None:
    model = model_with_words(tmp_path / "bloom", "bloom")
    with pytest.raises(UserError, match="--choice relu cannot be had of a bloom"):
        adapt(str(model), [text], tmp_path / "out", replace(SMALL, choice="relu"), QUIET)
    shutil.rmtree(model)


def test_rungs_are_weighed_by_what_the_config_measured(adapted: tuple[Path, dict[str, Any]]) -> None:
    from rowcast.runtime.acceptances import Acceptance, Acceptances

    output, found = adapted
    spec = spec_from_config(open_checkpoint(str(output)).config)
    assert spec.adapted is not None and spec.adapted.cut == "threshold"
    older = replace(spec, adapted=replace(spec.adapted, cut="top"))

    def chance(spec: ModelSpec, rung: str) -> Acceptance:
        return Acceptances.of(None, spec, None).find(Rung.parse(rung), Rung(kind="plain"), top=True)

    measured = pytest.approx(row(found, "adapted", 0.2, "q4")["draft"], abs=1e-3)
    for by in ("q4", "oracle"):
        above, best = f"self:mlp=0.2,by={by},cut=threshold", f"self:mlp=0.2,by={by}"
        for known, rung in ((spec, above), (older, best)):
            assert chance(known, rung).origin == "measured" and chance(known, rung).value == measured
        for unknown, rung, cut in ((spec, best, "threshold"), (older, above, "top")):
            assumed = chance(unknown, rung)
            assert assumed == replace(chance(replace(spec, adapted=None), rung), source=assumed.source)
            assert assumed.origin == "assumed" and f"the model's config knows of cut={cut} alone" in assumed.source
    assert chance(spec, "self:mlp=0.2,by=q4,over=1.5").origin == "assumed"
