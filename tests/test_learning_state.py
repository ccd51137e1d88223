"""The folder that training works in: settings, what a full disk leaves, how the result takes its place."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
from learning_runs import Ends
from safetensors import SafetensorError
from test_learning import make_trainer

from rowcast.calibration.learning import state, trainer
from rowcast.calibration.learning.part import Unfinished, World
from rowcast.calibration.learning.state import WorkFolder
from rowcast.calibration.owner import DESCRIPTION
from rowcast.errors import UserError

BEGUN = {"command": "distill"}


def test_a_full_disk_is_said_and_what_was_saved_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half a file")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with pytest.raises(Unfinished):
        make_trainer(tmp_path, stopping=Ends(3)).run()
    with monkeypatch.context() as patch:
        patch.setattr(state, "save_file", full)
        with pytest.raises(UserError, match=r"cannot be written \(.*No space left.*the same command goes on"):
            make_trainer(tmp_path).run()
    assert [path.name for path in tmp_path.iterdir()] == [trainer.STATE] and make_trainer(tmp_path).step == 4

    def writes(path: Path) -> None:
        (path / "model.gguf").write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = WorkFolder(tmp_path / "out", BEGUN, restart=False)
    with pytest.raises(UserError, match="No space left"):
        folder.publish(writes, {})
    assert not (tmp_path / "out").exists() and not (folder.path / state.RESULT).exists()


def test_a_work_folder_is_for_one_set_of_settings(tmp_path: Path) -> None:
    output = tmp_path / "out"
    folder = WorkFolder(output, {**BEGUN, "steps": 3, "texts": ("a",)}, restart=False)
    assert WorkFolder(output, {**BEGUN, "steps": 3, "texts": ["a"]}, restart=False).path == folder.path
    assert WorkFolder(output, {**BEGUN, "steps": 5}, restart=False).settings == {**BEGUN, "steps": 5}, "nothing is lost"
    folder = WorkFolder(output, {**BEGUN, "steps": 3, "texts": ["a"]}, restart=False)
    (folder.path / "training.safetensors").write_text("")
    with pytest.raises(UserError, match=r"other settings \(--steps\): add --restart"):
        WorkFolder(output, {**BEGUN, "steps": 4, "texts": ["a"]}, restart=False)

    def fails(path: Path) -> None:
        (path / "half").write_text("")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        folder.publish(fails, {})
    assert not output.exists()

    def writes(path: Path) -> None:
        (path / "x").write_text("y")

    folder.publish(writes, {"figure": 1})
    assert (output / "x").read_text() == "y" and not folder.path.exists()
    assert json.loads((output / DESCRIPTION).read_bytes()) == {"figure": 1, "settings": {**BEGUN, "steps": 3, "texts": ["a"]}}
    again = WorkFolder(output, {**BEGUN, "steps": 3, "texts": ["a"]}, restart=False)
    assert again.finished and again.description()["figure"] == 1 and not again.path.exists()
    with pytest.raises(UserError, match="other settings"):
        WorkFolder(output, {**BEGUN, "steps": 4, "texts": ["a"]}, restart=False)
    assert not WorkFolder(output, {**BEGUN, "steps": 4, "texts": ["a"]}, restart=True).finished
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    for restart in (False, True):
        with pytest.raises(UserError, match="not empty"):
            WorkFolder(tmp_path / "mine", BEGUN, restart=restart)
        (tmp_path / "new.state").mkdir(exist_ok=True)
        (tmp_path / "new.state" / "thesis.tex").write_text("")
        with pytest.raises(UserError, match="holds other things"):
            WorkFolder(tmp_path / "new", BEGUN, restart=restart)
    assert (tmp_path / "new.state" / "thesis.tex").exists()


def test_the_folder_one_is_in_can_be_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert WorkFolder(Path(), BEGUN, restart=False).path == tmp_path / "here.state"
    with pytest.raises(UserError, match="no folder to write"):
        WorkFolder(Path("/"), BEGUN, restart=False)


class Two:
    """A world of two, of which the other one does what it does up to each wait."""

    def __init__(self, leads: bool, *others: Callable[[], object]) -> None:
        self.leads, self.others = leads, list(others)

    def wait(self) -> None:
        self.others.pop(0)()


def together(world: Two, output: Path, restart: bool) -> WorkFolder:
    return WorkFolder.together(cast(World, world), output, BEGUN, restart=restart)


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("done", [False, True])
def test_other_processes_look_at_what_the_leading_one_left(done: bool, restart: bool, tmp_path: Path) -> None:
    for leads in (True, False):
        output, found = tmp_path / str(leads), list[bool]()
        if done:
            WorkFolder(output, BEGUN, restart=False).publish(lambda folder: None, {})
        else:
            output.with_suffix(".state").mkdir()
            (output.with_suffix(".state") / "removed.json").write_text(json.dumps(BEGUN))

        def other(output: Path = output, leads: bool = not leads, found: list[bool] = found) -> None:
            found.append(WorkFolder(output, BEGUN, restart=restart, leads=leads).finished)

        world = Two(leads, *([lambda: None, other] if leads else [other, lambda: None]))
        assert together(world, output, restart).finished == (done and not restart)
        assert found == [done and not restart] and not world.others


@pytest.mark.parametrize("restart", [False, True])
def test_what_the_leading_process_refuses_all_do(restart: bool, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    (tmp_path / "none").write_text("")
    for output in (tmp_path / "out", tmp_path / "none" / "out"):
        leads = Two(True, lambda: None)
        with pytest.raises(UserError):
            together(leads, output, restart)
        assert not leads.others, "the others wait for no one"
        with pytest.raises(UserError):
            together(Two(False, lambda: None), output, restart)
    with pytest.raises(UserError, match=r"settings\.json is damaged"):  # as where the leading one could not write it
        WorkFolder(tmp_path / "new", BEGUN, restart=restart, leads=False)


def test_a_state_that_cannot_be_removed_is_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link to another disk, or a mount."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "link.state").symlink_to(tmp_path / "disk")
    (tmp_path / "mount.state").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "mount.state")
    for name in ("link", "mount"):
        for restart in (False, True, True):
            folder = WorkFolder(tmp_path / name, BEGUN, restart=restart)
            (folder.path / "training.safetensors").write_text("")
            assert not WorkFolder(tmp_path / name, BEGUN, restart=True).saved
            folder.publish(lambda folder: None, {})
            assert (
                folder.path.is_dir()
                and not any(folder.path.iterdir())
                and WorkFolder(tmp_path / name, BEGUN, restart=False).finished
            )
    assert (tmp_path / "link.state").is_symlink()
