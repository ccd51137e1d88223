"""Killed at any step of removing or publishing, a command's folder stays its own, and nothing goes on with a part of what was there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from rowcast.calibration.learning.state import WorkFolder, load_tensors
from rowcast.calibration.owner import made_by
from rowcast.calibration.state import State
from rowcast.errors import UserError

T = TypeVar("T")
ONE, TWO = ({"format": 1, "fingerprint": "f", "recall": 0.99, "seed": seed} for seed in (1, 2))
OLD, NEW = ({"command": "prune", "steps": steps} for steps in (3, 4))
LAYERS = 3


class Killed(BaseException):
    pass


def killed_everywhere(folder: Path, begin: Callable[[Path], T], work: Callable[[Path, T], object]) -> Iterator[Path]:
    """Outputs where `work`, on what `begin` left, was killed before the first change of a name, before the second, and so on."""
    for most in range(60):
        output, count = folder / str(most) / "out", 0

        def counted(change: Callable[..., Any], most: int = most) -> Callable[..., Any]:
            def changed(*args: Any, **options: Any) -> Any:
                nonlocal count
                count += 1
                if count > most:
                    raise Killed
                return change(*args, **options)

            return changed

        output.parent.mkdir(parents=True)
        begun = begin(output)
        with pytest.MonkeyPatch.context() as patch:
            for name in ("replace", "unlink", "rmdir"):
                patch.setattr(os, name, counted(getattr(os, name)))
            try:
                work(output, begun)
            except Killed:
                pass
            else:
                assert most > 3
                return
        yield output
    raise AssertionError("it does not end")


def refused(begin: Callable[[], T], option: str) -> T | None:
    """What `begin` makes; None where it says that this was begun with another value."""
    try:
        return begin()
    except UserError as error:
        if f"other settings ({option}): add --restart" in str(error):
            return None
        raise


def fit(output: Path, settings: dict[str, Any]) -> State:
    """A calibration's layers, each of which says what it was made with."""
    state, seed = State(output, settings, restart=False), torch.tensor(settings["seed"])
    for layer in range(state.layers_done, LAYERS):
        state.save(layer, {"seed": seed}, {}, {"seed": seed})
    return state


def publish(output: Path, settings: dict[str, Any]) -> None:
    state = fit(output, settings)
    description = {"format": 1, "fingerprint": "f", "settings": settings}
    state.draft(state.tensors(LAYERS - 1), description)
    state.publish(output, description, "report")


def calibrated(output: Path, settings: dict[str, Any]) -> None:
    """As a user would, with --restart where the command says so. Whatever was there, the result is of these settings."""
    state = refused(lambda: State(output, settings, restart=False), "seed") or State(output, settings, restart=True)
    layers = sorted((output / "state").glob("layer-*.safetensors"))
    assert len(layers) == state.layers_done and state.layers_done in (0, LAYERS), "nothing goes on without the stream behind it"
    if not state.finished:
        publish(output, settings)
    made = load_tensors(output / "calibration.safetensors")[0]
    assert [int(seed) for seed in made.values()] == [settings["seed"]]
    assert json.loads((output / "calibration.json").read_bytes())["settings"] == settings


@pytest.mark.parametrize("then", [ONE, TWO])
@pytest.mark.parametrize("begin", [fit, publish])
def test_a_calibration_begun_anew(begin: Callable[[Path, dict[str, Any]], object], then: dict[str, Any], tmp_path: Path) -> None:
    for output in killed_everywhere(
        tmp_path, lambda output: begin(output, ONE), lambda output, _: State(output, TWO, restart=True)
    ):
        calibrated(output, then)


@pytest.mark.parametrize("then", [ONE, TWO])
def test_a_calibration_published(then: dict[str, Any], tmp_path: Path) -> None:
    """Where the description of another one was left without its tensors."""

    def begin(output: Path) -> None:
        publish(output, ONE)
        (output / "calibration.safetensors").unlink()
        assert not State(output, ONE, restart=False).finished
        State(output, ONE, restart=False).remove()
        fit(output, TWO)

    for output in killed_everywhere(tmp_path, begin, lambda output, _: publish(output, TWO)):
        if then is TWO:
            State(output, TWO, restart=False)  # goes on
        calibrated(output, then)


def weights(name: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "weights").write_text(name)

    return write


def made_and_begun(output: Path) -> WorkFolder:
    """A result, and a training with other settings that is to take its place."""
    WorkFolder(output, OLD, restart=False).publish(weights("old"), {})
    work = WorkFolder(output, NEW, restart=True)
    (work.path / "training.safetensors").write_text("half trained")
    (work.path / "cut").mkdir()
    for name in ("figures.json", "weights"):
        (work.path / "cut" / name).write_text("")
    assert (output / "weights").read_text() == "old"
    return work


def test_a_training_begun_anew(tmp_path: Path) -> None:
    for output in killed_everywhere(tmp_path, made_and_begun, lambda output, _: WorkFolder(output, OLD, restart=True)):
        assert (output / "weights").read_text() == "old"
        state = output.with_name("out.state")
        again = refused(partial(WorkFolder, output, NEW, restart=False), "--steps")
        assert again is None or not again.finished
        left = {str(path.relative_to(state)) for path in state.rglob("*")} - {"settings.json", "settings.json.part"}
        assert left in (set(), {"training.safetensors", "cut", "cut/figures.json", "cut/weights"})


def begun_first(output: Path) -> WorkFolder:
    """A training where there was no result."""
    work = WorkFolder(output, NEW, restart=False)
    (work.path / "training.safetensors").write_text("half trained")
    return work


@pytest.mark.parametrize("begin", [made_and_begun, begun_first])
def test_a_training_published(begin: Callable[[Path], WorkFolder], tmp_path: Path) -> None:
    """What is whole is finished, and what is left of its state goes."""

    def work(output: Path, begun: WorkFolder) -> None:
        begun.publish(weights("new"), {})

    seen = set()
    for output in killed_everywhere(tmp_path, begin, work):
        again = WorkFolder(output, NEW, restart=False)
        seen.add(found := (output / "weights").read_text() if output.exists() else "")
        assert again.finished == (found == "new")
        if not again.finished:
            assert (again.path / "training.safetensors").read_text() == "half trained"
            again.publish(weights("new"), {})
        assert (output / "weights").read_text() == "new" and made_by(output) == "prune"
        assert json.loads((output / "rowcast.json").read_bytes())["settings"] == NEW
        assert {path.name for path in output.parent.rglob("*") if path.is_file()} == {"weights", "rowcast.json"}
    assert seen == {"old" if begin is made_and_begun else "", "new"}


@pytest.mark.parametrize("begin", [made_and_begun, begun_first])
def test_only_the_result_that_it_was_begun_to_replace_goes(begin: Callable[[Path], WorkFolder], tmp_path: Path) -> None:
    """Put there since then: a result of other settings, one of the same, what is no work of ours, a file."""
    output, kept = tmp_path / "out", tmp_path / "kept"
    work = begin(output)
    WorkFolder(tmp_path / "other", {**OLD, "steps": 9}, restart=False).publish(weights("other"), {})
    WorkFolder(tmp_path / "same", NEW, restart=False).publish(weights("same"), {})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "weights").write_text("mine")
    (tmp_path / "file").write_text("mine")
    if output.exists():
        output.rename(kept)
    for name in ("other", "same", "mine", "file"):
        before = (tmp_path / name).rename(output)
        with pytest.raises(UserError, match=r"out holds something else than when .*out\.state was begun: move it away"):
            work.publish(weights("new"), {})
        if name == "other" or (name == "same" and kept.exists()):
            with pytest.raises(UserError, match="move it away, and the same command goes on without --restart"):
                WorkFolder(output, NEW, restart=False)
        content = (before if name == "file" else before / "weights").read_text()
        assert content == ("mine" if name == "file" else name)
        assert (work.path / "training.safetensors").read_text() == "half trained"
        output.rename(tmp_path / name)
    if kept.exists():
        kept.rename(output)
    again = WorkFolder(output, NEW, restart=False)
    again.publish(weights("new"), {})
    assert (output / "weights").read_text() == "new" and not work.path.exists()


def test_a_result_goes_when_the_next_one_is_whole(tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        (folder / "weights").write_text("half")
        raise OSError(28, "No space left on device")

    work = made_and_begun(tmp_path / "out")
    with pytest.raises(UserError, match="No space left"):
        work.publish(fails, {})
    assert (tmp_path / "out" / "weights").read_text() == "old"
    assert WorkFolder(tmp_path / "out", OLD, restart=False).finished
    assert (work.path / "training.safetensors").exists(), "of other settings, which may go on"
    with pytest.raises(UserError, match="other settings"):
        WorkFolder(tmp_path / "out", {**NEW, "steps": 5}, restart=False)
