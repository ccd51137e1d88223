"""Calibration: what is collected, what is fitted to it, that a run can be cut off, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from tiny import VOCAB, model_with_words, random_words, tiny_model, tiny_words
from torch import Tensor

from rowcast.calibration import Settings, calibrate, fitting, progress, run
from rowcast.calibration.curves import Rows, found, lost_curve, thresholds
from rowcast.calibration.densities import water_fill
from rowcast.calibration.evaluate import drafts_of, laws_of
from rowcast.calibration.fits import Factors, least_squares, linear_map, low_rank
from rowcast.calibration.mlp import Mlp
from rowcast.calibration.moments import Moments
from rowcast.calibration.progress import CalibrationProgress
from rowcast.calibration.recording import RecordingWeights
from rowcast.calibration.stream import Collected, Stream
from rowcast.calibration.targets import SHOWN, Judge, by_level, choose_density
from rowcast.calibration.text import Windows, read_text, read_windows
from rowcast.calibration.training import train
from rowcast.cli import main
from rowcast.errors import OutOfMemoryError, UserError
from rowcast.kernels.linear import backend
from rowcast.runtime import device as devices
from rowcast.runtime.checkpoint import open_checkpoint
from rowcast.runtime.checkpoint.safetensors_header import read_metadata
from rowcast.runtime.comm import SoloComm
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.decoder import Decoder
from rowcast.runtime.kv import PagedKV
from rowcast.runtime.ladder.feasible import offered
from rowcast.runtime.ladder.presets import Circumstances, resolve
from rowcast.runtime.ladder.spec import Rung
from rowcast.runtime.protocols import WeightView
from rowcast.runtime.shard import Shard
from rowcast.runtime.sparse.artefact import TENSORS, Calibration
from rowcast.runtime.sparse.build import build_neurons, build_view
from rowcast.runtime.sparse.scorers import contribution
from rowcast.runtime.step import SeqStep
from rowcast.runtime.tokenizer import load_tokenizer
from rowcast.runtime.weights import DenseWeights

CPU = torch.device("cpu")
WINDOW = 16
SMALL = Settings(tokens=40 * WINDOW, window=WINDOW, train_steps=4, measured_tokens=2 * WINDOW)
FAMILIES = (
    "opt", "opt-350m", "llama-gqa", "llama-dynamic", "mistral-window", "qwen3", "bloom-residual", "mpt", "falcon-7b", "falcon-40b",
    "falcon-alibi-12-heads",
)  # fmt: skip


class Letters:
    """A token for each character."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) % VOCAB for letter in text]


class Begun(Letters):
    """Puts token 7 before a prompt."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [7] * add_special_tokens + super().encode(text)


class Spy(DenseWeights):
    """Keeps what the products of each layer are given."""

    seen: dict[tuple[str, int], list[Tensor]]

    def qkv(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.seen.setdefault(("attention", layer), []).append(x)
        return super().qkv(layer, x)

    def mlp(self, layer: int, x: Tensor, residual: Tensor | None = None) -> Tensor:
        self.seen.setdefault(("mlp", layer), []).append(x)
        return super().mlp(layer, x, residual)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_with_words(tmp_path_factory.mktemp("llama"), "llama-gqa")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_words(tmp_path_factory.mktemp("text") / "text.txt", 60 * WINDOW)


@pytest.fixture(scope="module")
def calibrated(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    return calibrate(model, [text], tmp_path_factory.mktemp("out"), SMALL)


def random_mlp(neurons: int, hidden: int, *, gated: bool) -> Mlp:
    generator = torch.Generator().manual_seed(0)
    rows = neurons * (2 if gated else 1)
    weight = torch.randn(rows, hidden, generator=generator) * hidden**-0.5
    down = torch.randn(neurons, hidden, generator=generator)
    bias = 0.1 * torch.randn(rows, generator=generator)
    return Mlp(weight, bias, down, down.norm(dim=1), "silu" if gated else "relu", gated)


def correlated(tokens: int, hidden: int) -> Tensor:
    """States [T, D] with a mean and a decaying spectrum."""
    generator = torch.Generator().manual_seed(2)
    mixing = torch.linalg.qr(torch.randn(hidden, hidden, generator=generator)).Q * torch.logspace(0.5, -1.5, hidden)
    states: Tensor = torch.randn(tokens, hidden, generator=generator) @ mixing.T + torch.randn(hidden, generator=generator)
    return states


def moments_of(x: Tensor, y: Tensor) -> Moments:
    moments = Moments.zero(x.shape[1], y.shape[1], CPU)
    for rows in torch.split(torch.arange(len(x)), 100):
        moments.add(x[rows], y[rows])
    return moments


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_collected_is_what_a_decoder_run_reads(name: str, tmp_path: Path) -> None:
    tiny_model(name, tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    spec = spec_from_config(checkpoint.config)
    ids = torch.randint(VOCAB, (9, WINDOW), generator=torch.Generator().manual_seed(3))
    weights = RecordingWeights(spec, checkpoint.source, SoloComm(), dtype=torch.float32, device=CPU)
    stream = Stream(weights, Windows(ids[:7], ids[7:], []), CPU, torch.float32, seed=0)
    residual = [torch.zeros(ids.numel(), spec.hidden_size) for _ in range(spec.num_layers + 1)]
    told: list[int] = []
    collected = [stream.run(i, residual[i], residual[i + 1], told.append) for i in range(spec.num_layers)]

    spy = Spy(spec, checkpoint.source, SoloComm(), dtype=torch.float32, device=CPU)
    spy.seen = {}
    decoder = Decoder(spy, SoloComm(), CPU)
    kv = PagedKV(spec, Shard(), num_blocks=4 * len(ids), block_size=WINDOW // 4, dtype=torch.float32, device=CPU)
    tables = [list(range(4 * i, 4 * i + 4)) for i in range(len(ids))]
    steps = [
        SeqStep(i, row, 0, table, WINDOW, sample=False) for i, (row, table) in enumerate(zip(ids.tolist(), tables, strict=True))
    ]
    final = torch.cat([decoder.run([step], kv) for step in steps])

    torch.testing.assert_close(residual[-1], final, atol=1e-4, rtol=1e-4)
    assert sum(told) == ids.numel() * spec.num_layers
    for layer, found_there in enumerate(collected):
        attention, mlp = (torch.cat(spy.seen[kind, layer])[: 7 * WINDOW].double() for kind in ("attention", "mlp"))
        torch.testing.assert_close(found_there.moments.xx, attention.T @ attention, atol=1e-2, rtol=1e-3)
        torch.testing.assert_close(found_there.moments.yx, mlp.T @ attention, atol=1e-2, rtol=1e-3)
        torch.testing.assert_close(found_there.moments.y_mean, mlp.mean(0), atol=1e-4, rtol=1e-3)
        assert found_there.moments.count == 7 * WINDOW
        held = torch.cat(spy.seen["mlp", layer])[7 * WINDOW :]
        torch.testing.assert_close(found_there.rows.held.mlp, held, atol=1e-4, rtol=1e-3)
        assert found_there.rows.fit.heads.shape == (7 * WINDOW, spec.num_heads)


def test_a_heads_contribution_is_what_its_rows_of_the_output_projection_add(model: Path) -> None:
    checkpoint = open_checkpoint(str(model))
    spec = spec_from_config(checkpoint.config)
    weights = RecordingWeights(spec, checkpoint.source, SoloComm(), dtype=torch.float32, device=CPU)
    stream = Stream(weights, Windows(torch.arange(WINDOW)[None], torch.arange(WINDOW)[None], []), CPU, torch.float32, seed=0)
    residual = torch.zeros(2 * WINDOW, spec.hidden_size)
    rows = stream.run(0, residual, residual, lambda _: None).rows
    alone = torch.eye(spec.num_heads)[:, None, :, None] * weights.head_outputs[WINDOW:, None].transpose(0, 1)  # [H, T, H, d]
    added = torch.stack([weights.attention[0].out(heads.flatten(1)) for heads in alone])
    torch.testing.assert_close(rows.held.heads, added.norm(dim=2).T, atol=1e-5, rtol=1e-4)


def test_full_rank_finds_every_neuron() -> None:
    mlp, h = random_mlp(90, 32, gated=True), correlated(600, 32)
    moments = moments_of(h, h)
    factors = low_rank(mlp.weight, mlp.bias, moments.y_covariance, moments.y_mean, rank=32)
    torch.testing.assert_close(factors.b @ factors.a, mlp.weight, atol=1e-4, rtol=1e-4)
    rows = Rows(h, h, h)
    result = found({"all": scores_of(mlp, factors)}, mlp, rows, [0.1, 0.5], recall=0.99)["all"]
    assert min(result.recall) > 0.999 and max(result.over) == 1.0


def scores_of(mlp: Mlp, factors: Factors) -> Callable[[Rows], Tensor]:
    def scores(rows: Rows) -> Tensor:
        pre = rows.mlp @ factors.a.T @ factors.b.T + factors.bias
        return contribution(pre, mlp.norms, mlp.activation, mlp.gated)

    return scores


def test_low_rank_is_fitted_to_the_states_and_finds_more_the_higher_its_rank() -> None:
    mlp, h = random_mlp(90, 32, gated=False), correlated(2000, 32)
    moments = moments_of(h, h)
    exact = mlp.pre(h)
    errors, recalls = [], []
    for rank in (4, 8, 16):
        factors = low_rank(mlp.weight, mlp.bias, moments.y_covariance, moments.y_mean, rank)
        assert factors.a.shape == (rank, 32)
        errors.append(float((h @ factors.a.T @ factors.b.T + factors.bias - exact).square().mean()))
        recalls += found({"low": scores_of(mlp, factors)}, mlp, Rows(h, h, h), [0.25], recall=0.99)["low"].recall
    best = torch.linalg.svdvals(exact - exact.mean(0)).square()
    for rank, error in zip((4, 8, 16), errors, strict=True):
        assert error * exact.numel() == pytest.approx(float(best[rank:].sum()), rel=0.02)
    assert recalls == sorted(recalls) and recalls[0] < 0.95 < recalls[-1]


def test_linear_maps_recover_a_planted_relation() -> None:
    x = correlated(3000, 24)
    planted, offset = torch.randn(24, 24, generator=torch.Generator().manual_seed(5)), torch.arange(24.0)
    torch.testing.assert_close(linear_map(moments_of(x, x @ planted.T)), planted, atol=0.05, rtol=0)
    found_there = least_squares(moments_of(x, x @ planted.T + offset))
    torch.testing.assert_close(found_there.weight, planted, atol=0.05, rtol=0)
    torch.testing.assert_close(found_there.bias, offset, atol=0.1, rtol=0)


@pytest.mark.parametrize("gated", [True, False])
def test_training_never_ends_below_where_it_began_and_mends_a_bad_beginning(gated: bool) -> None:
    mlp, h = random_mlp(64, 32, gated=gated), correlated(4000, 32)
    moments = moments_of(h, h)
    start = low_rank(mlp.weight, mlp.bias, moments.y_covariance, moments.y_mean, rank=16)
    noise = torch.randn(start.b.shape, generator=torch.Generator().manual_seed(6)) * start.b.std()
    worse = Factors(start.a, start.b + noise, start.bias)
    _, kept, initial = train(start, mlp, h, h, density=0.4, steps=8, seed=0)
    assert kept <= initial
    _, mended, initial = train(worse, mlp, h, h, density=0.4, steps=80, seed=0)
    assert mended < 0.9 * initial
    assert train(start, mlp, h, h, density=0.4, steps=0, seed=0)[0] is start


def test_lost_output_falls_to_nothing() -> None:
    lost = lost_curve(random_mlp(90, 32, gated=True), correlated(50, 32), [0.05, 0.3, 0.6, 1.0])
    assert lost == sorted(lost, reverse=True) and lost[0] < 1.5 and lost[-1] == 0


def test_layers_that_lose_alike_keep_alike_and_those_that_need_more_get_it() -> None:
    grid = [0.1, 0.25, 0.5, 1.0]
    easy, hard = [0.1, 0.02, 0.01, 0.0], [0.8, 0.6, 0.3, 0.0]
    assert water_fill(grid, [hard] * 3, 0.4) == pytest.approx([0.4] * 3)
    few, many = water_fill(grid, [easy, hard], 0.4)
    assert few < 0.2 < 0.6 < many and few + many == pytest.approx(0.8)
    assert water_fill(grid, [easy, hard], 1.0) == pytest.approx([1.0, 1.0])


def test_held_out_windows_are_the_last_of_each_text(tmp_path: Path) -> None:
    for name, letter in (("a", 10), ("b", 60)):
        (tmp_path / name).write_text("".join(chr(letter + i // WINDOW) for i in range(40 * WINDOW + 5)))
    windows = read_windows([tmp_path / "a", tmp_path / "b"], Letters(), tokens=10**6, window=WINDOW)
    assert windows.fit.shape == (76, WINDOW)
    assert windows.held[:, 0].tolist() == [48, 49, 98, 99]
    half = read_windows([tmp_path / "a", tmp_path / "b"], Letters(), tokens=40 * WINDOW, window=WINDOW)
    assert half.fit[:19, 0].tolist() == list(range(10, 48, 2)) and half.held.shape == (2, WINDOW)
    assert [text["tokens"] for text in windows.texts] == [40 * WINDOW + 5] * 2


def test_windows_begin_as_what_the_engine_is_given_does(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("".join(chr(40 + i // (WINDOW - 1)) for i in range(40 * (WINDOW - 1) + 5)))
    windows = read_windows([tmp_path / "a"], Begun(), tokens=10**6, window=WINDOW)
    assert windows.begins == (7,) and windows.settings == {"windows_begin_with": [7]}
    assert windows.fit.shape == (38, WINDOW) and windows.held.shape == (2, WINDOW)
    both = torch.cat([windows.fit, windows.held])
    assert (both[:, 0] == 7).all() and (both[:, 1:] == torch.arange(40, 80)[:, None]).all(), "no token of the text is left out"
    assert [text["tokens"] for text in windows.texts] == [40 * (WINDOW - 1) + 5]
    half = read_windows([tmp_path / "a"], Begun(), tokens=20 * WINDOW, window=WINDOW)
    assert len(half.fit) + len(half.held) == 20, "what windows begin with is among the tokens that are run"
    with pytest.raises(UserError, match="a window of 3 tokens leaves none to judge by, use 4 or more"):
        read_windows([tmp_path / "a"], Begun(), tokens=100, window=3)
    (tmp_path / "short").write_text("a" * (2 * WINDOW - 3))
    with pytest.raises(UserError, match=f"{2 * WINDOW - 3} tokens, two windows of {WINDOW - 1} are needed"):
        read_windows([tmp_path / "short"], Begun(), tokens=100, window=WINDOW)


def test_windows_of_a_tokenizer_without_bos_are_the_text_alone() -> None:
    novel, encoder = (
        Path(__file__).parent / "data" / "news-from-nowhere.txt",
        load_tokenizer(open_checkpoint("SmolLM2-135M-Instruct")),
    )
    windows = read_windows([novel], encoder, tokens=10**6, window=64)
    ids = torch.tensor(encoder.encode(read_text(novel)[0]))
    assert torch.equal(torch.cat([windows.fit, windows.held]), ids[: len(ids) // 64 * 64].view(-1, 64))
    assert windows.begins == () and windows.settings == {}


def test_nothing_is_learnt_of_what_windows_begin_with(model: Path) -> None:
    checkpoint = open_checkpoint(str(model))
    spec = spec_from_config(checkpoint.config)
    ids = torch.randint(VOCAB, (9, WINDOW), generator=torch.Generator().manual_seed(3))
    weights = RecordingWeights(spec, checkpoint.source, SoloComm(), dtype=torch.float32, device=CPU)
    found = {}
    for begins in ((), (7,)):
        stream = Stream(weights, Windows(ids[:7], ids[7:], [], begins), CPU, torch.float32, seed=0)
        residual = torch.zeros(ids.numel(), spec.hidden_size)
        found[begins] = stream.run(0, residual, residual, lambda _: None)
        assert stream.tokens == ids.numel()
    every, some = found[()], found[7,]
    behind = every.rows.fit.mlp.view(7, WINDOW, -1)[:, 1:].flatten(0, 1)
    torch.testing.assert_close(some.rows.fit.mlp, behind)
    torch.testing.assert_close(some.rows.held.heads, every.rows.held.heads.view(2, WINDOW, -1)[:, 1:].flatten(0, 1))
    assert some.moments.count == 7 * (WINDOW - 1)
    torch.testing.assert_close(some.moments.yy, behind.double().T @ behind.double(), atol=1e-3, rtol=1e-4)


def test_what_windows_begin_with_is_recorded(model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A calibration of windows without BOS, as older versions made them, does not go on with those that begin with it."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    begun = tiny_words(Path(shutil.copytree(model, tmp_path / "begun")), bos=True)
    settings, other = replace(SMALL, train_steps=0), r"other settings \(windows_begin_with\): add --restart"
    for first, then in ((model, begun), (begun, model)):
        output = tmp_path / f"of-{first.name}"
        with monkeypatch.context() as patch:
            patch.setattr(run, "fit_layer", killed)
            with pytest.raises(KeyboardInterrupt):
                calibrate(first, [text], output, settings)
        with pytest.raises(UserError, match=other):
            calibrate(then, [text], output, settings)
    windows: list[Tensor] = []
    laws = Judge._laws

    def noted(self: Judge, views: Any) -> Any:
        windows.append(self.windows)
        return laws(self, views)

    monkeypatch.setattr(Judge, "_laws", noted)
    made = calibrate(begun, [text], tmp_path / "of-begun", settings)
    assert made.description["settings"]["windows_begin_with"] == [1]
    assert windows and all((each[:, 0] == 1).all() for each in windows)
    with pytest.raises(UserError, match=other):
        calibrate(model, [text], tmp_path / "of-begun", settings)


def test_a_calibration_opens_and_its_scorers_run(calibrated: Calibration, model: Path) -> None:
    checkpoint = open_checkpoint(str(model))
    spec = spec_from_config(checkpoint.config)
    weights = RecordingWeights(spec, checkpoint.source, SoloComm(), dtype=torch.float32, device=CPU)
    h = torch.randn(5, spec.hidden_size, generator=torch.Generator().manual_seed(7))
    exact = build_neurons(weights, mlp=0.5, by="oracle", calibration=calibrated)[0].scorer(h).values
    for by, least in (
        ("q8", 0.99),
        ("lowrank", 0.6),
        ("dejavu", 0.6),
        ("q8-ahead", -1),
        ("lowrank-ahead", -1),
        ("dejavu-ahead", -1),
    ):
        values = build_neurons(weights, mlp=0.5, by=by, calibration=calibrated)[0].scorer(h).values
        assert torch.corrcoef(torch.stack([exact.flatten(), values.flatten()]))[0, 1] > least
    description = calibrated.description
    assert description["density"] == 0.5 and set(description["quality"]) >= {"dense", "self:mlp=0.5,by=q4"}
    assert {"q2", "q4-ahead", "lowrank", "dejavu-ahead"} <= set(description["scorers"])
    table = calibrated.tensor("densities")
    alike = torch.tensor(calibrated.densities)[:, None].expand_as(table)
    layerwise = description["layerwise"]
    assert torch.equal(table, alike) == (layerwise["filled"] <= layerwise["alike"])
    torch.testing.assert_close(table.mean(1), torch.tensor(calibrated.densities))
    directions = calibrated.tensor("head.directions")
    torch.testing.assert_close(directions @ directions.T, torch.eye(len(directions)), atol=1e-5, rtol=0)
    assert calibrated.tensor("layers.1.heads.ahead.weight").shape == (spec.num_heads, spec.hidden_size)
    assert "layers.0.heads.ahead.weight" not in calibrated
    assert not (calibrated.path / "state").exists()


def test_the_report_stands_alone(calibrated: Calibration) -> None:
    page = (calibrated.path / "report.html").read_text()
    assert page.count("<svg") == 4 and "llama" in page
    assert not any(foreign in page for foreign in ("http", "<script", "src=", "nan"))


@pytest.mark.parametrize("where", ["fit", "stream", "end", "quality"])
def test_a_run_that_was_cut_off_goes_on_to_the_same_bytes(
    where: str, calibrated: Calibration, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []
    original = Stream.run

    def counted(self: Stream, layer: int, entering: Tensor, leaving: Tensor, progress: Callable[[int], None]) -> Collected:
        runs.append(layer)
        if where == "stream" and layer == 1 and len(runs) == 2:
            leaving.fill_(7)
            raise KeyboardInterrupt
        return original(self, layer, entering, leaving, progress)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Stream, "run", counted)
    with monkeypatch.context() as patch:
        if where == "fit":
            patch.setattr(run, "fit_layer", lambda *args: killed() if len(runs) == 2 else fitting.fit_layer(*args))
        elif where == "end":
            patch.setattr(run, "directions", killed)
        elif where == "quality":
            patch.setattr(Judge, "quality", killed)
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, [text], tmp_path, SMALL)
    with pytest.raises(UserError, match="holds no calibration"):
        Calibration.open(tmp_path, calibrated.fingerprint)
    again = calibrate(model, [text], tmp_path, SMALL)
    assert runs == ([0, 1] if where in ("end", "quality") else [0, 1, 1])
    for name in ("calibration.safetensors", "calibration.json", "report.html"):
        assert (again.path / name).read_bytes() == (calibrated.path / name).read_bytes()


def test_other_settings_do_not_go_on_where_others_stopped(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "fit_layer", killed)
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, [text], tmp_path, SMALL)
    other = Settings(tokens=SMALL.tokens, window=WINDOW, train_steps=0, measured_tokens=WINDOW, rank=8)
    with pytest.raises(UserError, match=r"rank.*--restart"):
        calibrate(model, [text], tmp_path, other)
    assert calibrate(model, [text], tmp_path, other, restart=True).tensor("layers.0.lowrank.a").shape[0] == 8
    with pytest.raises(UserError, match=r"rank.*--restart"):
        calibrate(model, [text], tmp_path, SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(run, "fit_layer", killed)
        assert calibrate(model, [text], tmp_path, other).tensor("layers.0.lowrank.a").shape[0] == 8
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, [text], tmp_path, SMALL, restart=True)
    with pytest.raises(UserError, match="holds no calibration"):
        Calibration.open(tmp_path, "")


def test_a_finished_calibration_of_another_model_is_not_overwritten(calibrated: Calibration, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(calibrated.path, output)
    model_with_words(tmp_path / "opt", "opt")
    with pytest.raises(UserError, match=r"fingerprint.*--restart"):
        calibrate(tmp_path / "opt", [text], output, SMALL)
    assert Calibration.open(output, calibrated.fingerprint).identity == calibrated.identity


def test_presets_are_judged_as_they_will_run(model: Path, text: Path, tmp_path: Path) -> None:
    """At the density that --bytes chose; with all of the LM head where it is not held in rows, as in 16 bits on a CPU that packs it."""
    for dtype in ("float32", "bfloat16"):
        in_rows = dtype == "float32" or backend(torch.device("cpu"), torch.bfloat16) == "torch"
        made = calibrate(model, [text], tmp_path / dtype, replace(SMALL, bytes_share=0.7, train_steps=0), dtype=dtype)
        density = made.description["density"]
        assert density not in (0.5, *SHOWN)
        here = Circumstances(max_context=128, kv_bytes_per_token=0, pass_bytes=lambda _: 1, calibrated=offered(made))
        for name in ("hire", "dejavu"):
            [rung] = resolve(name, here, mode="approximate")[0].rungs
            had = str(rung if in_rows else replace(rung, lm="full"))
            assert f"mlp={density}" in had and had in made.description["quality"]
        assert any(("lm=hire" if in_rows else "by=q4") in rung for rung in made.description["quality"])
        assert ("lm_head_share" in made.description) == in_rows


def test_a_fixed_density_is_judged_by_other_windows_than_it_is_chosen_by(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows: dict[str, Tensor] = {}

    def noted(name: str) -> Callable[..., Any]:
        original = getattr(Judge, name)

        def method(self: Judge, *args: Any) -> Any:
            windows[name] = self.windows
            return original(self, *args)

        return method

    for name in ("layerwise", "quality"):
        monkeypatch.setattr(Judge, name, noted(name))
    other = tmp_path / "other.txt"
    other.write_text(" ".join("w5" for _ in range(60 * WINDOW)))
    settings = replace(SMALL, tokens=120 * WINDOW, train_steps=0)
    made = calibrate(model, [text, other], tmp_path / "out", settings)
    assert made.description["held_out"] == {"choosing": 2, "reporting": 2, "disjoint": True}
    chosen, reported = windows["layerwise"].tolist(), windows["quality"].tolist()
    assert not any(window in reported for window in chosen if set(window) != {5})
    assert [5] * WINDOW in reported and any(set(window) != {5} for window in reported)


def test_thresholds_are_exceeded_by_their_densities(calibrated: Calibration, model: Path) -> None:
    assert read_metadata(calibrated.path / TENSORS)["fingerprint"] == calibrated.fingerprint
    assert 0 < calibrated.description["lm_head_share"] < 2
    for name in calibrated.description["scorers"]:
        table = calibrated.tensor(f"layers.1.{name}.thresholds", (len(calibrated.densities),))
        assert table.dtype == torch.float32 and (table.diff() <= 0).all()
    scores = torch.randn(300, 40, generator=torch.Generator().manual_seed(9))
    shares = [float((scores > value).float().mean()) for value in thresholds(scores, [0.02, 0.5, 0.9, 1.0])]
    assert shares == pytest.approx([0.02, 0.5, 0.9, 1.0], abs=1e-3)


def test_line_breaks_are_those_of_text_mode(tmp_path: Path) -> None:
    for name, data in (("unix", b"a\nb\n\nc"), ("windows", b"a\r\nb\r\n\r\nc"), ("mac", b"a\rb\r\rc")):
        (tmp_path / name).write_bytes(data)
        assert read_text(tmp_path / name)[0] == (tmp_path / name).read_text() == "a\nb\n\nc"


def test_few_windows_are_shared_out_over_many_texts(tmp_path: Path) -> None:
    paths = [tmp_path / str(i) for i in range(10)]
    for path in paths:
        path.write_text("x" * WINDOW)
    windows = read_windows(paths, Letters(), tokens=4 * WINDOW, window=WINDOW)
    assert (len(windows.fit), len(windows.held)) == (2, 2)


def test_a_foreign_or_stale_calibration_is_refused(calibrated: Calibration, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="was made for weights"):
        Calibration.open(calibrated.path, "0" * 16)
    description = dict(calibrated.description) | {"format": 0}
    (tmp_path / "calibration.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="calibration format 0"):
        Calibration.open(tmp_path, calibrated.fingerprint)


def test_targets_choose_the_density(calibrated: Calibration, model: Path, text: Path) -> None:
    checkpoint = open_checkpoint(str(model))
    weights = RecordingWeights(
        spec_from_config(checkpoint.config), checkpoint.source, SoloComm(), dtype=torch.float32, device=CPU
    )
    windows = torch.randint(VOCAB, (2, WINDOW), generator=torch.Generator().manual_seed(8))
    judge = Judge(weights, calibrated, windows, torch.float32, CPU)

    def acceptance(density: float) -> float:
        rung = by_level(calibrated, Rung(kind="self", mlp=density, by="oracle"))
        return judge.quality([rung])[str(rung)]["draft_acceptance"]

    assert acceptance(1.0) == pytest.approx(1.0, abs=1e-5)
    density = choose_density(judge, "oracle", accept=0.9, bytes_share=None)
    assert 0 < density < 1 and acceptance(density) >= 0.9 > acceptance(density / 2)
    smaller = choose_density(judge, "q4", accept=None, bytes_share=0.75)
    rungs = [by_level(calibrated, Rung(kind="self", mlp=share, by="q4")) for share in (smaller, smaller + 0.01)]
    shares = [judge.bytes_share(rung) for rung in rungs]
    assert shares[0] <= 0.75 < shares[1]


def test_quality_is_told_by_itself_and_as_a_draft(calibrated: Calibration, model: Path) -> None:
    checkpoint = open_checkpoint(str(model))
    spec = spec_from_config(checkpoint.config)
    weights = RecordingWeights(spec, checkpoint.source, SoloComm(), dtype=torch.float32, device=CPU)
    windows = torch.randint(VOCAB, (2, WINDOW), generator=torch.Generator().manual_seed(9))
    rung = Rung(kind="self", mlp=0.25, by="oracle")
    judge = Judge(weights, calibrated, windows, torch.float32, CPU)
    found = judge.quality([rung])
    views: dict[str, WeightView] = {"it": build_view(weights, rung, calibrated)}
    _, alone = laws_of(weights, views, windows.tolist(), device=CPU, dtype=torch.float32)
    drafts = drafts_of(weights, views, windows.tolist(), device=CPU, dtype=torch.float32)
    assert found[str(rung)]["perplexity"] == pytest.approx(alone["it"].perplexity, rel=1e-6)
    assert found[str(rung)]["acceptance"] == pytest.approx(alone["it"].acceptance, rel=1e-6)
    assert found[str(rung)]["draft_acceptance"] == pytest.approx(drafts["it"].acceptance, rel=1e-6)
    assert judge.draft_acceptance(rung) == pytest.approx(drafts["it"].acceptance, rel=1e-6)
    assert abs(alone["it"].acceptance - drafts["it"].acceptance) > 1e-4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--text", "{empty}"], "is empty"),
        (["--text", "{short}"], "two windows of 16 are needed"),
        (["--text", "{missing}"], "cannot be read"),
        (["--text", "{latin}"], "is not UTF-8 at byte 1"),
        (["--text", "{text}", "--accept", "0.9", "--bytes", "0.5"], "give one of them"),
        (["--text", "{text}", "--recall", "1.5"], "--recall 1.5 is not a share"),
        (["--text", "{text}", "--rank", "0"], "--rank 0 is too low"),
        (["--text", "{text}", "--window", "4096"], "longer than the model's context of 128"),
        (["--text", "{text}", "--tokens", "20"], "fewer than two windows"),
        (["--text", "{text}", "--window", "2"], "use 3 or more"),
        (["--text", "{text}", "--seed", "99999999999999999999"], "is too high"),
        (["--text", "{text}", "--measure", "0"], "--measure 0 is too low"),
        (["--text", "{text}", "--by", "q4"], "give one of them, or leave --by out"),
        (["--text", "{text}", "-o", "{full}"], "holds other files"),
        (["--text", "{text}", "-o", "{text}"], "cannot be written"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(
    options: Sequence[str], said: str, model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {name: tmp_path / name for name in ("empty", "short", "latin", "missing", "full", "out")} | {"text": text}
    names["empty"].write_text(" \n")
    names["short"].write_text("w1 w2 w3")
    names["latin"].write_bytes(b"w\xe9")
    names["full"].mkdir()
    (names["full"] / "thesis.tex").write_text("")
    given = [option.format(**names) for option in options]
    output = [] if "-o" in given else ["-o", str(names["out"])]
    window = [] if "--window" in given else ["--window", str(WINDOW)]
    assert main(["calibrate", str(model), *given, *output, *window]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize("target", ["--accept", "--bytes"])
def test_a_scorer_that_the_model_cannot_have_is_refused_before_the_pass(
    target: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "State", None)
    path = str(model_with_words(tmp_path / "opt", "opt"))
    options = ["--text", str(text), "-o", str(tmp_path / "out"), "--window", str(WINDOW), "--by", "gate", target, "0.8"]
    assert main(["calibrate", path, *options]) == 2
    assert "by=gate needs a gated MLP" in capsys.readouterr().err


def test_too_little_memory_is_said_before_anything_is_read(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "available_bytes", lambda device: 1000)
    with pytest.raises(OutOfMemoryError, match="1000 B are free"):
        calibrate(model, [text], tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists()


def test_the_command_ends_in_one_json_object_but_on_a_terminal(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--window", str(WINDOW), "--tokens", "320", "--train-steps", "0", "--measure", "32", "--bytes", "0.7"]
    assert main(["calibrate", str(model), "--text", str(text), "-o", str(tmp_path), *options, "--json"]) == 0
    [line] = capsys.readouterr().out.splitlines()
    told = json.loads(line)
    assert told["tokens"] == 320 and told["density"] != 0.5 and told["quality"]["dense"]["acceptance"] == pytest.approx(1.0)
    finished = ["calibrate", str(model), "--text", str(text), "-o", str(tmp_path), *options]
    assert main(finished) == 0
    piped = capsys.readouterr().out.splitlines()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(finished) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown == piped[:-1] and piped[-1] == line and not any(text.startswith("{") for text in shown)


def test_a_pipe_is_told_how_far_a_calibration_is(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = Event()

    def fit(*args: Any) -> Any:
        """Of the second layer, for as long as nothing is told: the first one says how long it takes."""
        fits.append(None)
        if len(fits) == 2:
            told.clear()
            assert told.wait(30)
        return fitting.fit_layer(*args)

    def print_line(bar: CalibrationProgress) -> str:
        told.set()
        return line(bar)

    fits, line = list[None](), CalibrationProgress._line
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.01)
    monkeypatch.setattr(CalibrationProgress, "_line", print_line)
    monkeypatch.setattr(run, "fit_layer", fit)
    calibrate(model, [text], tmp_path / "told", SMALL)
    lines = capsys.readouterr().err.splitlines()
    assert any(re.fullmatch(r"calibrating: layer 2 of 2, \d+%, about \d+\.\d min left", line) for line in lines), lines
    assert all(line.startswith("calibrating: ") for line in lines)
    calibrate(model, [text], tmp_path / "silent", replace(SMALL, train_steps=0), progress=False)
    assert capsys.readouterr().err == ""


def test_heads_chosen_ahead_are_evaluated(
    calibrated: Calibration, text: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside those chosen by their own input, in a model whose output they change."""
    ladder = "self:heads=0.5 / self:heads=0.5,heads_by=ahead / plain"
    arguments = ("--text", str(text), "--calibration", str(calibrated.path), "--tokens", "128", "--window", "64", "--json")
    assert main(["eval", str(model), "--ladder", ladder, *arguments]) == 0
    [found] = json.loads(capsys.readouterr().out)["texts"].values()
    own, ahead = found["views"]["heads=0.5"], found["views"]["heads=0.5,heads_by=ahead"]
    assert own["heads"]["density"] == ahead["heads"]["density"] == 0.5
    assert own["perplexity"] != ahead["perplexity"] and own["heads_by_layer"][0] == ahead["heads_by_layer"][0]
