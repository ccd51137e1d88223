"""Sensitivities of neurons, and levels of scores that are common to all layers."""

from __future__ import annotations

import logging
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCAB, model_with_words, random_words, tiny_model
from torch import Tensor

from rowcast.calibration import Settings, calibrate, levels, run
from rowcast.calibration.adapting.neurons import mlps_of
from rowcast.calibration.learning.module import load_module
from rowcast.calibration.recording import OneLayerKV, window_steps
from rowcast.calibration.sensitivity import needed_bytes, sensitivities
from rowcast.calibration.targets import Judge, choose_density
from rowcast.calibration.text import read_windows
from rowcast.cli import main
from rowcast.errors import UserError
from rowcast.runtime import device as devices
from rowcast.runtime.banks import BankWeights
from rowcast.runtime.checkpoint import open_checkpoint
from rowcast.runtime.comm import SoloComm
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.decoder import Decoder
from rowcast.runtime.ladder.spec import Rung, ScorerName
from rowcast.runtime.sparse.artefact import Calibration
from rowcast.runtime.sparse.build import build_view
from rowcast.runtime.sparse.scorers import Scored
from rowcast.runtime.sparse.weights import SparseWeights
from rowcast.runtime.tokenizer import load_tokenizer

CPU = torch.device("cpu")
WINDOW = 16
SMALL = Settings(
    tokens=40 * WINDOW, window=WINDOW, train_steps=0, measured_tokens=8 * WINDOW, sensitivity_tokens=10 * WINDOW, rank=8
)
FAMILIES = ("llama-gqa", "opt", "opt-350m", "qwen3", "bloom-residual", "mpt", "falcon-7b", "falcon-40b")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_with_words(tmp_path_factory.mktemp("llama"), "llama-gqa")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_words(tmp_path_factory.mktemp("text") / "text.txt", 400 * WINDOW)


@pytest.fixture(scope="module")
def calibrated(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    return calibrate(model, [text], tmp_path_factory.mktemp("out"), SMALL)


def drawn(law: Tensor, place: float) -> int:
    """The first token up to which the law [V] sums to more than `place`."""
    return int((law.cumsum(0) <= place * law.sum()).sum())


def by_fisher(module: Any, downs: list[Any], windows: Tensor, begins: int) -> list[Tensor]:
    """sqrt(w^T F w) / |w| as it is defined, of down projections [D, N]."""
    seen: dict[int, Tensor] = {}
    handles = [
        down.register_forward_hook(lambda _, args, output, i=i: seen.__setitem__(i, output)) for i, down in enumerate(downs)
    ]
    generator = torch.Generator().manual_seed(3)
    gradients: list[list[Tensor]] = [[] for _ in downs]
    for places, ids in zip(torch.rand(windows.shape, generator=generator), windows, strict=True):
        log_p = module(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
        ys = [drawn(law.detach().exp(), float(place)) for law, place in zip(log_p, places, strict=True)]
        loss = log_p[torch.arange(len(ids)), ys].sum()
        for i, grad in enumerate(torch.autograd.grad(loss, [seen[i] for i in range(len(downs))])):
            gradients[i].append(grad.reshape(len(ids), -1)[begins:])
    for handle in handles:
        handle.remove()
    found = []
    for down, parts in zip(downs, gradients, strict=True):
        g, w = torch.cat(parts).double(), down.weight.detach().double()
        found.append((w * (g.T @ g / len(g) @ w)).sum(0).sqrt() / w.norm(dim=0))
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sensitivity_is_what_the_fisher_matrix_says_of_a_neurons_column(name: str, tmp_path: Path) -> None:
    tiny_model(name, tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    spec = spec_from_config(checkpoint.config)
    module = load_module(checkpoint, torch.float32, CPU)
    downs = [mlp.down for mlp in mlps_of(module, spec)]
    windows = torch.randint(VOCAB, (6, WINDOW), generator=torch.Generator().manual_seed(5))
    expected = by_fisher(module, downs, windows, begins=2)
    wanted = [i % 2 == 0 for i, parameter in enumerate(module.parameters()) if parameter.requires_grad_(i % 2 == 0) is not None]
    told: list[int] = []
    found = sensitivities(module, spec, windows, device=CPU, seed=3, begins=2, batch_tokens=2 * WINDOW, advance=told.append)
    assert told == [2 * WINDOW] * 3
    assert [parameter.requires_grad for parameter in module.parameters()] == wanted
    assert all(parameter.grad is None for parameter in module.parameters())
    assert len(found) == spec.num_layers
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32 and one.shape == (spec.intermediate_size,)
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-7)


def test_neurons_that_nothing_depends_on_have_their_layers_mean(tmp_path: Path) -> None:
    tiny_model("llama-gqa", tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    spec = spec_from_config(checkpoint.config)
    module = load_module(checkpoint, torch.float32, CPU)
    with torch.no_grad():
        mlps_of(module, spec)[1].down.weight[:, 4] = 0
    windows = torch.randint(VOCAB, (2, WINDOW), generator=torch.Generator().manual_seed(5))
    found = sensitivities(module, spec, windows, device=CPU)[1]
    others = torch.cat([found[:4], found[5:]])
    assert float(found[4]) == pytest.approx(float(others.mean())) and (found > 0).all()
    downs = [mlp.down for mlp in mlps_of(module, spec)]
    with torch.no_grad():
        downs[1].weight.zero_()
    known, none = sensitivities(module, spec, windows, device=CPU)[:2]
    assert (none == none[0]).all() and float(none[0]) == pytest.approx(float(known.mean()))
    with torch.no_grad():
        for down in downs:
            down.weight.zero_()
    with pytest.raises(UserError, match="no gradient reaches any layer"):
        sensitivities(module, spec, windows, device=CPU)
    with torch.no_grad():
        module.get_output_embeddings().weight[3] = torch.inf
    with pytest.raises(UserError, match="not finite in float32: use --dtype float32"):
        sensitivities(module, spec, windows, device=CPU)


def test_a_calibration_holds_them_and_its_scores_are_by_them(calibrated: Calibration, model: Path) -> None:
    checkpoint = open_checkpoint(str(model))
    spec = spec_from_config(checkpoint.config)
    tokens = calibrated.description["sensitivity"]["tokens"]
    assert tokens == SMALL.sensitivity_tokens
    page = (calibrated.path / "report.html").read_text()
    assert f"found on {tokens:,} tokens" in page
    found = [calibrated.tensor(f"layers.{i}.sensitivity", (spec.intermediate_size,)) for i in range(spec.num_layers)]
    assert all((layer > 0).all() and layer.isfinite().all() for layer in found)
    bank = banks_of(model).ffn[0]
    h = torch.randn(200, spec.hidden_size, generator=torch.Generator().manual_seed(7))
    scores = bank.score(bank.hidden(h)) * found[0][bank.order]
    table = calibrated.tensor("layers.0.q8.thresholds")
    grid = calibrated.densities
    middle = [float((scores > float(table[grid.index(density)])).float().mean()) for density in (0.25, 0.5)]
    assert all(0.2 * density < share < 3 * density for share, density in zip(middle, (0.25, 0.5), strict=True))


def banks_of(model: Path) -> BankWeights:
    checkpoint = open_checkpoint(str(model))
    return BankWeights(spec_from_config(checkpoint.config), checkpoint.source, SoloComm(), dtype=torch.float32, device=CPU)


def held_out(model: Path, text: Path) -> Tensor:
    """Windows that `calibrate` has not seen."""
    checkpoint = open_checkpoint(str(model))
    return read_windows([text], load_tokenizer(checkpoint), tokens=400 * WINDOW, window=WINDOW).held


@torch.inference_mode()
def used(banks: BankWeights, calibration: Calibration, rung: Rung, windows: Tensor) -> Tensor:
    """The share of its neurons that each layer uses [L] in the engine's own passes."""
    view = build_view(banks, rung, calibration)
    assert isinstance(view, SparseWeights)
    kept: dict[int, list[Tensor]] = {}
    view.observe(lambda layer, selector, hidden, own: kept.setdefault(layer, []).append(own[1:].float().mean(1)), None)
    kv = OneLayerKV(banks.spec, 1, windows.shape[1], dtype=torch.float32, device=CPU)
    for window in windows:
        Decoder(view, SoloComm(), CPU).run(window_steps(window[None], prompt_length=1), kv)
        kv.free(0)
    return torch.stack([torch.cat(kept[layer]).mean() for layer in range(banks.spec.num_layers)])


@pytest.mark.parametrize("by", levels.LEVELLED)
def test_a_level_is_exceeded_by_its_density_in_sparse_passes(
    by: ScorerName, calibrated: Calibration, model: Path, text: Path
) -> None:
    grid = calibrated.densities
    table = calibrated.tensor(f"levels.{by}", (len(grid),))
    assert table.dtype == torch.float32 and (table.diff() <= 0).all()
    banks, windows = banks_of(model), held_out(model, text)
    shares = calibrated.tensor("levels.densities", (len(grid), banks.spec.num_layers))
    torch.testing.assert_close(shares.mean(1), torch.tensor(grid), rtol=0.02, atol=1e-3)
    for density in (0.1, 0.15, 0.25, 0.4, 0.6):
        found = used(banks, calibrated, Rung(kind="self", mlp=density, by=by, cut="threshold"), windows)
        assert float(found.mean()) == pytest.approx(density, rel=0.1)
        if by == "oracle":
            torch.testing.assert_close(found, shares[grid.index(density)], rtol=0.2, atol=0.02)


def test_a_level_is_found_where_scores_are_others_in_sparse_passes(
    calibrated: Calibration, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sparse passes, over one window in four, have scores at seven tenths of the dense passes' over these, and of some layers at less;
    the text's other windows have higher ones."""
    whole = [torch.randn(40000, generator=torch.Generator().manual_seed(i)).abs() for i in range(4)]
    factors = (0.7, 0.7, 0.5, 0.6)
    sparse = [scores * factor for scores, factor in zip(whole, factors, strict=True)]
    richer = [scores.repeat(3) * 1.3 for scores in whole]
    ran: list[tuple[int, bool]] = []

    class Passes:
        def __init__(self, *_: object) -> None:
            pass

        def scores(self, windows: Tensor, level: float) -> list[Tensor]:
            ran.append((len(windows), level == -math.inf))
            return sparse if level > -math.inf else whole if len(windows) == 2 else richer

    monkeypatch.setattr(levels, "_Passes", Passes)
    windows = torch.zeros(8, WINDOW, dtype=torch.long)
    found = levels.find_levels(banks_of(model), calibrated, "oracle", windows, dtype=torch.float32, device=CPU)
    assert ran == [(2, True), (6, True)] + [(2, False)] * len(levels.FOUND_AT)
    everywhere = [torch.cat([scores, scores.repeat(3) * 1.3]) for scores in sparse]
    for density, level, shares in zip(calibrated.densities, found.scores.tolist(), found.shares, strict=True):
        above = torch.stack([(scores > level).float().mean() for scores in everywhere])
        if 0.05 <= density < 1:
            assert float(above.mean()) == pytest.approx(density, rel=0.05)
            torch.testing.assert_close(shares, above, rtol=0.15, atol=0.01)


@pytest.mark.parametrize(("length", "skipped"), [(3, 1), (16, 4), (100, 16)])
def test_a_levels_sample_has_neither_prompts_nor_a_windows_first_tokens(
    length: int, skipped: int, calibrated: Calibration, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ByPlace:
        reads, bytes = "own", 0

        def __call__(self, x: Tensor) -> Scored:
            return Scored(torch.arange(float(len(x)))[:, None].expand(-1, neurons))

    monkeypatch.setattr(levels, "scorer", lambda *_: ByPlace())
    banks, windows = banks_of(model), torch.zeros(2, length, dtype=torch.long)
    neurons = banks.spec.intermediate_size
    passes = levels._Passes(banks, calibrated, "oracle", windows, torch.float32, CPU)
    for scores in passes.scores(windows, -math.inf):
        assert scores.long().bincount().tolist() == [0] * skipped + [2 * neurons] * (length - skipped)


def test_levels_are_found_on_pieces_of_all_of_the_text() -> None:
    """Each begins as a window does."""
    windows = torch.cat([torch.full((30, 1), -7), torch.arange(30 * 200).view(30, 200)], 1)
    found = levels.pieces(windows, begins=(-7,))
    assert found.shape == (levels.LEVEL_TOKENS // levels.PIECE, 1 + levels.PIECE) and (found[:, 0] == -7).all()
    body = found[:, 1:]
    assert (body.diff() == 1).all() and (body[:, 0] % 200 + levels.PIECE <= 200).all()
    starts = body[:, 0]
    assert starts[0] < 200 and starts[-1] >= 28 * 200 and (starts.diff() > 0).all() and len(set((starts % 200).tolist())) == 3
    assert levels.pieces(windows[:2, :50]).tolist() == windows[:2, :50].tolist()


@pytest.mark.parametrize("where", ["sensitivities", "fit_layer", "find_levels"])
def test_a_run_that_was_cut_off_goes_on_to_the_same_bytes(
    where: str, calibrated: Calibration, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def noted(name: str) -> None:
        original = getattr(run, name)

        def call(*args: Any, **settings: Any) -> Any:
            calls.append(name)
            if calls == (["sensitivities"] if where == "sensitivities" else ["sensitivities", where]):
                raise KeyboardInterrupt
            return original(*args, **settings)

        monkeypatch.setattr(run, name, call)

    for name in {"sensitivities", where}:
        noted(name)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, [text], tmp_path, SMALL)
    again = calibrate(model, [text], tmp_path, SMALL)
    assert calls.count("sensitivities") == (2 if where == "sensitivities" else 1)
    for name in ("calibration.safetensors", "calibration.json", "report.html"):
        assert (again.path / name).read_bytes() == (calibrated.path / name).read_bytes()


def short_of_memory(patch: pytest.MonkeyPatch, model: Path) -> None:
    """Calibrating fits, the module with what its passes keep does not."""
    spec = spec_from_config(open_checkpoint(str(model)).config)
    needed = needed_bytes(spec, torch.float32, WINDOW)
    patch.setattr(run, "_check_memory", lambda *_: None)
    patch.setattr(devices, "available_bytes", lambda device: needed - 1)


def unknown_to_transformers(patch: pytest.MonkeyPatch, model: Path) -> None:
    def load(*_: object) -> None:
        raise UserError("Transformers makes no model of this config")

    patch.setattr(run, "load_module", load)


@pytest.mark.parametrize(
    ("lacking", "told"), [(short_of_memory, "are free"), (unknown_to_transformers, "makes no model"), (None, None)]
)
def test_without_sensitivities_all_is_by_length_and_why_is_told(
    lacking: Any, told: str | None, calibrated: Calibration, model: Path, text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    settings = SMALL
    if lacking is None:
        settings = replace(SMALL, sensitivity_tokens=0)
        monkeypatch.setattr(run, "sensitivities", None)
    else:
        lacking(monkeypatch, model)
    with caplog.at_level(logging.WARNING):
        made = calibrate(model, [text], tmp_path, settings)
    assert not any("sensitivity" in name or name.startswith("levels.") for name in made._tensors)
    assert {name for name in calibrated._tensors if "sensitivity" not in name and not name.startswith("levels.")} == set(
        made._tensors
    )
    assert not any("cut=threshold" in rung for rung in made.description["quality"])
    found, page = made.description["sensitivity"], (made.path / "report.html").read_text()
    assert found["tokens"] == 0 and "sensitivities were not found" in page
    if told is None:
        assert "missing" not in found and not caplog.records
    else:
        assert told in found["missing"] and told in page and told in caplog.text


def test_densities_are_judged_and_chosen_by_level(calibrated: Calibration, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quality = calibrated.description["quality"]
    assert calibrated.description["density"] == 0.5
    for by, cut in (("oracle", ",cut=threshold"), ("q4", ",cut=threshold"), ("dejavu", "")):
        for density, both in ((0.25, False), (0.5, True)):
            lines = {f"self:mlp={density},by={by}{cut}"} | ({f"self:mlp={density},by={by}"} if both else set())
            assert {text for text in quality if re.fullmatch(rf"self:mlp={density},by={by}(,cut=\w+)?", text)} == lines
            assert all(quality[line]["bytes"] < 1 for line in lines)
    windows = torch.randint(VOCAB, (2, WINDOW), generator=torch.Generator().manual_seed(8))
    judge = Judge(banks_of(model), calibrated, windows, torch.float32, CPU)
    asked: list[Rung] = []
    original = Judge.draft_acceptance

    def noted(self: Judge, rung: Rung) -> float:
        asked.append(rung)
        return original(self, rung)

    monkeypatch.setattr(Judge, "draft_acceptance", noted)
    for by in ("q4", "dejavu"):
        asked.clear()
        choose_density(judge, by, accept=1e-6, bytes_share=None)  # type: ignore[arg-type]
        assert asked and all(
            rung.cut == ("threshold" if by == "q4" and (rung.mlp or 0) >= calibrated.densities[0] else "top") for rung in asked
        )
        assert min(rung.mlp or 0 for rung in asked) < calibrated.densities[0]


def test_other_tokens_are_another_calibration_and_too_few_are_refused(
    calibrated: Calibration, model: Path, text: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"sensitivity_tokens.*--restart"):
        calibrate(model, [text], calibrated.path, replace(SMALL, sensitivity_tokens=0))
    options = ["--text", str(text), "-o", str(tmp_path / "out"), "--window", str(WINDOW), "--sensitivity-tokens", "-1"]
    assert main(["calibrate", str(model), *options]) == 2
    assert "--sensitivity-tokens -1 is too low: give 0 or more" in capsys.readouterr().err
