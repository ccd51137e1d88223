"""What distilling, adapting and pruning promise alike: parts that get further, texts that are the same, laws in their own format."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from learning_runs import QUIET, sittings
from tiny import model_with_words, random_words, words_of
from torch import Tensor

from rowcast.calibration import distill
from rowcast.calibration.adapting import adapt
from rowcast.calibration.adapting import settings as adapting
from rowcast.calibration.learning.judge import hidden_states
from rowcast.calibration.learning.part import Part, Unfinished, World
from rowcast.calibration.learning.settings import LearningSettings
from rowcast.calibration.learning.trainer import Trainer
from rowcast.calibration.pruning import run as pruning
from rowcast.errors import UserError

WINDOW, LAYERS = 16, 2


@dataclass(frozen=True)
class Command:
    run: Callable[..., dict[str, Any]]
    module: str
    """That has its loss."""
    settings: LearningSettings
    parts: int
    """That it takes where each is over before it begins."""
    result: str = "model.safetensors"


COMMANDS = {
    "distill": Command(
        distill.distill,
        distill.__name__,
        distill.Settings(
            hidden=32, layers=1, heads=1, streaming=56, window=64, batch=2, steps=3, written_tokens=500, prompt_tokens=8, contexts=(32,)
        ),
        parts=2 + 3 + 1,  # files that the target writes, steps, judging
        result="model.gguf",
    ),
    "adapt": Command(
        adapt.adapt,
        adapt.__name__,
        adapting.Settings(
            density=0.2, window=WINDOW, batch=16, steps=3, written_tokens=512, prompt_tokens=4, judged_tokens=16, looks=0
        ),
        parts=8 + 3 + 1,
    ),
    "prune": Command(
        pruning.prune,
        pruning.__name__,
        pruning.Settings(
            keep=0.7, tokens=16 * WINDOW, refit_tokens=64 * WINDOW, window=WINDOW, steps=6, batch=4, warmup=2, judged_tokens=8 * WINDOW
        ),
        parts=8 + LAYERS + 6,  # passes that weigh, layers that are fitted, steps, of which the last one is the end
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_with_words(tmp_path_factory.mktemp("llama") / "model", "llama-gqa")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_words(tmp_path_factory.mktemp("text") / "text.txt", 12000)


@pytest.fixture(params=COMMANDS)
def command(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setattr("rowcast.calibration.learning.writing.CPU_SEQUENCES", 4)
    monkeypatch.setattr(pruning, "BATCH_TOKENS", 8 * WINDOW)
    return COMMANDS[request.param]


def test_every_part_gets_further(command: Command, model: Path, text: Path, tmp_path: Path) -> None:
    """Parts that are over before they begin, since loading alone takes longer, end as one whole run does."""

    def run(texts: Sequence[Path], output: Path) -> dict[str, Any]:
        return command.run(str(model), texts, output, command.settings, QUIET)

    run([text], tmp_path / "whole")
    assert sittings(run, [text], tmp_path / "parts") == command.parts
    whole, parts = ((tmp_path / name / command.result).read_bytes() for name in ("whole", "parts"))
    assert whole == parts


def test_a_text_that_changed_is_said(
    command: Command, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changing, held = tmp_path / "text.txt", tmp_path / "held.txt"

    def run() -> None:
        command.run(str(model), [changing], tmp_path / "out", command.settings, QUIET, held_out=[held])

    shutil.copyfile(text, changing)
    words_of(held, [3, 4] * 100)
    with monkeypatch.context() as patched:
        patched.setattr(Part, "over", True)
        with pytest.raises(Unfinished):
            run()
    changing.write_text(text.read_text() + " w1")
    with pytest.raises(UserError, match=r"other settings \(--text\): add --restart"):
        run()
    shutil.copyfile(text, changing)
    words_of(held, [3, 5] * 100)
    with pytest.raises(UserError, match=r"other settings \(--held-out\): add --restart"):
        run()


def test_the_original_runs_in_its_own_format(
    command: Command, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though a step runs under autocast on a GPU: here its switch alone is set, which changes nothing on a CPU."""
    seen: set[tuple[bool, bool]] = set()
    move = Trainer._move

    def moved(self: Trainer) -> Tensor:
        torch.set_autocast_enabled("cuda", True)
        try:
            return move(self)
        finally:
            torch.set_autocast_enabled("cuda", False)

    def watched(module: Any, ids: Tensor) -> Tensor:
        seen.add((any(value.requires_grad for value in module.parameters()), torch.is_autocast_enabled("cuda")))
        return hidden_states(module, ids)

    monkeypatch.setattr(Trainer, "_move", moved)
    for module in (command.module, "rowcast.calibration.learning.job"):
        monkeypatch.setattr(f"{module}.hidden_states", watched)
    command.run(str(model), [text], tmp_path / "out", replace(command.settings, steps=1, written_tokens=0), QUIET)
    assert seen == {(True, True), (False, False)}


def test_several_processes_share_a_batch_evenly(
    command: Command, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def three(self: World, device: str = "auto") -> None:
        asked.append(device)
        self.rank, self.size, self._state = 0, 3, None

    monkeypatch.setattr(World, "__init__", three)
    settings = replace(command.settings, batch=16, accumulate=2)
    with pytest.raises(
        UserError, match=r"--batch 16 is not shared evenly by 3 processes with --accumulate 2: give a multiple of 6"
    ):
        command.run(str(model), [text], tmp_path / "out", settings, QUIET)
    assert asked == ["cpu"] and not (tmp_path / "out.state").exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"window": 500}, "--window 500 is longer than the model's context of 128: lower it"),
        ({"batch": 0}, "--batch 0 is too low: give 1 or more"),
        ({"accumulate": 0}, "--accumulate 0 is too low: give 1 or more"),
        ({"batch": 9, "accumulate": 2}, "--accumulate 2 does not divide --batch 9: give a divisor"),
        ({"steps": -1}, "--steps -1 is too low: give 0 or more"),
        ({"warmup": -1}, "--warmup -1 is too low: give 0 or more"),
        ({"learning_rate": 0.0}, "--learning-rate 0 moves nothing: give a number above 0"),
        ({"muon_rate": 0.0}, "--muon-rate 0 moves nothing: give a number above 0"),
        ({"optimizer": "sgd"}, "--optimizer 'sgd' is none: use adamw or muon"),
        ({"written_tokens": -1}, "--written -1 is too low: give 0 or more"),
        ({"text_share": 1.5}, "--text-share 1.5 is not a share: give a number from 0 to 1"),
        ({"judged_tokens": 0}, "--judged 0 is too low: give 1 or more"),
        ({"seed": -1}, "--seed -1 is too low: give 0 or more"),
        ({"seed": 1 << 40}, r"--seed 1099511627776 is too high: give a number below 2\^32"),
    ],
)
def test_what_none_of_them_takes(
    command: Command, model: Path, text: Path, tmp_path: Path, wrong: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=rf"^{said}\.$"):
        command.run(str(model), [text], tmp_path / "out", replace(command.settings, **wrong), QUIET)
    assert list(tmp_path.iterdir()) == []
