"""`--restart` begins a command's own work anew, and removes nothing that another command made or that is no work of ours."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import model_with_words, random_words

from rowcast.calibration import Settings, calibrate
from rowcast.calibration.learning.state import WorkFolder
from rowcast.calibration.owner import COMMANDS, made_by, worked_in_by
from rowcast.cli import main

SMALL = Settings(tokens=160, window=16, train_steps=0, measured_tokens=16)
OPTIONS = {
    "calibrate": ["--tokens", "160", "--window", "16", "--train-steps", "0", "--measure", "16"],
    "distill": ["--hidden", "32", "--layers", "1", "--heads", "1", "--window", "64", "--steps", "1", "--written", "0"],
    "adapt": ["--window", "16", "--batch", "16", "--steps", "1", "--written", "0", "--looks", "0", "--judged", "16"],
    "prune": ["--keep", "0.7", "--window", "16", "--tokens", "160", "--refit-tokens", "320", "--steps", "0", "--judged", "16"],
    "quantize": ["--group", "32", "--tokens", "160", "--window", "16", "--judged", "16"],
}

Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_with_words(tmp_path_factory.mktemp("llama"), "llama-gqa", intermediate_size=128)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_words(tmp_path_factory.mktemp("text") / "text.txt", 4000)


@pytest.fixture
def run(model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(command: str, output: Path, *more: str) -> tuple[int, str]:
        capsys.readouterr()
        code = main([command, str(model), "--text", str(text), "-o", str(output), *OPTIONS[command], *more])
        return code, capsys.readouterr().err

    return run


@pytest.fixture(scope="module")
def others(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each command leaves, finished and under way: COMMAND-made, COMMAND-begun or COMMAND-begun.state."""
    folder = tmp_path_factory.mktemp("others")
    calibrate(model, [text], folder / "calibrate-made", SMALL)
    (folder / "calibrate-begun" / "state").mkdir(parents=True)
    made_with = json.loads((folder / "calibrate-made" / "calibration.json").read_bytes())["settings"]
    (folder / "calibrate-begun" / "state" / "settings.json").write_text(json.dumps(made_with))
    (folder / "calibrate-begun" / "state" / "layer-0.safetensors").write_text("")
    for command in COMMANDS[1:]:
        work = WorkFolder(folder / f"{command}-made", {"command": command}, restart=False)
        work.publish(weights_into, {"figure": 1})
        work = WorkFolder(folder / f"{command}-begun", {"command": command}, restart=False)
        (work.path / "text.bin").write_text("")  # no more than that: it is another's all the same
    return folder


def weights_into(folder: Path) -> None:
    (folder / "model.safetensors").write_text("weights")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("restart", [(), ("--restart",)])
@pytest.mark.parametrize("command", COMMANDS)
def test_what_another_command_made_stays(command: str, restart: tuple[str, ...], others: Path, run: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(others, tmp_path / "out"))
    before = files(folder)
    for other in COMMANDS:
        if other == command:
            continue
        begun = f"{other}-begun" if other == "calibrate" else f"{other}-begun.state"
        for output, said in (
            (f"{other}-made", f"{other}-made was made by `rowcast {other}`: give another folder with -o."),
            (f"{other}-begun", f"{begun} is what `rowcast {other}` works in: give another folder with -o."),
            (begun, f"{begun} is what `rowcast {other}` works in: give another folder with -o."),
        ):
            code, error = run(command, folder / output, *restart)
            assert code == 2 and error == f"rowcast: {folder}/{said}\n"
    assert files(folder) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_is_no_work_of_ours_stays(command: str, run: Run, tmp_path: Path) -> None:
    theirs = {
        "a/rowcast.json": "{}",
        "b/rowcast.json": '{"settings": {"command": "deploy"}}',
        "c/calibration.json": '{"format": 1}',
        "d/report.html": "<p>of last year",
        "e/state/thesis.tex": "",
        "f/state/settings.json": '{"colour": "blue"}',
        "g/state/layer-0.safetensors": "",
        "g/calibration.safetensors": "",
        "h/calibration.json": "{half a file",
        "l/state/layer-0.safetensors": "",
        "m/state/removed.json": '{"colour": "blue"}',
    }
    if command != "calibrate":  # that looks at no such folder but for who works in it
        theirs |= {"i.state/settings.json": '{"colour": "blue"}', "j.state/settings.json": "{half a f", "k.state/text.bin": ""}
    for name, content in theirs.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    before = files(tmp_path)
    for name in sorted({name[0] for name in theirs}):
        for restart in ((), ("--restart",)):
            code, error = run(command, tmp_path / name, *restart)
            assert code == 2 and error.count("\n") == 1 and f"{tmp_path / name}" in error, name
    assert files(tmp_path) == before


@pytest.mark.parametrize("restart", [(), ("--restart",)])
@pytest.mark.parametrize("command", COMMANDS[1:])
def test_what_is_read_is_not_replaced(
    command: str, restart: tuple[str, ...], model: Path, text: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A model, a draft to start with or a text in a folder that the same command made, under any name of it."""
    made, link = Path(shutil.copytree(model, tmp_path / "made")), tmp_path / "link"
    (made / "rowcast.json").write_text(json.dumps({"settings": {"command": command}}))
    (tmp_path / "new.state").mkdir()
    for folder in (made, tmp_path / "new.state"):
        shutil.copy(text, folder / "text.txt")
    link.symlink_to(made)
    before = files(tmp_path)
    calls: list[tuple[Path, Path, Path, Path, tuple[str, ...]]] = [
        (made, text, made, made, ()),
        (link, text, made, made, ()),
        (made, text, link, link, ()),
        (model, made / "text.txt", made, made, ()),
        (model, tmp_path / "new.state" / "text.txt", tmp_path / "new", tmp_path / "new.state", ()),
    ]
    if command == "distill":
        calls.append((model, text, made, made, ("--start", str(link))))
    for read, learnt, output, replaced, more in calls:
        call = [command, str(read), "--text", str(learnt), "-o", str(output), *OPTIONS[command], *restart, *more]
        assert main(call) == 2
        path = learnt if learnt != text else more[1] if more else read
        said = f"rowcast: {replaced} would take the place of {path}, which is read: give another folder with -o.\n"
        assert capsys.readouterr().err == said
    assert files(tmp_path) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_own_work_is_begun_anew(command: str, others: Path, run: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(others, tmp_path / "out"))
    for output in (f"{command}-made", f"{command}-begun"):
        code, error = run(command, folder / output, "--restart")
        assert code == 0, error
        assert made_by(folder / output) == command and worked_in_by(folder / output) is None
        assert not (folder / f"{output}.state").exists() and not (folder / output / "state").exists()
        assert "figure" not in (folder / output / ("calibration.json" if command == "calibrate" else "rowcast.json")).read_text()
