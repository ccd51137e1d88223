"""What commands that train or round say while they work, where they stop, and what they leave of input that they refuse."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from learning_runs import CPU, QUIET, Ends
from test_learning import make_trainer
from test_learning_job import COMMANDS
from tiny import model_with_words, random_words, words_of

from rowcast.calibration.distill import distill
from rowcast.calibration.learning import progress, writing
from rowcast.calibration.learning.corpus import Corpus
from rowcast.calibration.learning.part import Part, Unfinished
from rowcast.calibration.learning.progress import LearningProgress, amount, rate
from rowcast.calibration.learning.state import WorkFolder
from rowcast.calibration.learning.writing import Writer, Writing, write
from rowcast.calibration.quantising.run import Settings as Rounding
from rowcast.calibration.quantising.run import quantise
from rowcast.cli import learning, main
from rowcast.errors import UserError
from rowcast.runtime.checkpoint import open_checkpoint
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.tokenizer import load_tokenizer

SMALL = (
    "--hidden", "32", "--layers", "1", "--heads", "1", "--streaming", "56", "--window", "64", "--batch", "2", "--prompt-tokens", "8",
    "--context", "32", "--device", "cpu", "--judged", "64",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_with_words(tmp_path_factory.mktemp("llama") / "model", "llama-gqa", intermediate_size=128)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_words(tmp_path_factory.mktemp("text") / "text.txt", 3000)


def corpus_of(model: Path, text: Path, folder: Path) -> Corpus:
    folder.mkdir(exist_ok=True)
    return Corpus.open(folder, [text], load_tokenizer(open_checkpoint(str(model))), 101, window=16)


def test_writing_tells_inside_a_file(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "LOOK_STEPS", 4)
    checkpoint, told = open_checkpoint(str(model)), list[int]()
    writer = Writer(checkpoint, spec_from_config(checkpoint.config), 3, 14, dtype=torch.float32, device=CPU)
    begins = (torch.full((3, 4), 5), torch.full((3,), 4))
    assert writer.write(*begins, 1.0, 0, Part(), advance=told.append) is not None
    assert told == [12, 12, 12, 6], "as many as are written"
    told.clear()
    assert writer.write(*begins, 1.0, 0, Ends(2), advance=told.append) is None
    assert told == [12, 12, -24], "what is vain is taken back"


def test_a_pipe_is_told_at_once_and_the_end_once(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(writing, "CPU_SEQUENCES", 2)
    corpus = corpus_of(model, text, tmp_path)
    write(open_checkpoint(str(model)), corpus, tmp_path, Writing(60, 16, 4), dtype=torch.float32, device=CPU)
    begun, ended = capsys.readouterr().err.splitlines()
    assert begun == "writing: 64 tokens" and ended.startswith("writing: 64 of 64 tokens, ")
    monkeypatch.setattr(progress, "LINE_SECONDS", -1.0)
    with LearningProgress("learning", 20, None) as bar:
        bar.advance(8)
        bar.advance(12)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "learning: 20 tokens", "learning: 8 of 20 tokens", "learning: 20 of 20 tokens",
    ]  # fmt: skip
    with LearningProgress("learning", 20, False) as bar:
        bar.tell("nothing")
    assert capsys.readouterr().err == ""


def test_what_takes_long_is_foretold_once(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(writing, "CPU_SEQUENCES", 2)
    monkeypatch.setattr(progress, "FORETELL_SECONDS", -1.0)
    corpus = corpus_of(model, text, tmp_path)

    def work(name: str) -> list[str]:
        caplog.clear()
        (tmp_path / name).mkdir()
        write(
            open_checkpoint(str(model)), corpus, tmp_path / name, Writing(96, 16, 4), dtype=torch.float32, device=CPU, show=False
        )
        make_trainer(tmp_path / name).run()
        return [record.getMessage() for record in caplog.records]

    assert work("short") == []
    monkeypatch.setattr(progress, "LONG_SECONDS", 0.0)
    first, second = work("long")
    assert first.startswith("writing takes about ") and "lower --written; " in first
    assert "hours at" in second and second.endswith("lower --steps, --batch or --window")


def test_units_go_by_size() -> None:
    assert [amount(count) for count in (0, 512, 65_536, 20_020_000)] == ["0", "512", "65.5 k", "20.02 M"]
    assert [rate(speed) for speed in (0, 8.46, 1234, 3_400_000)] == ["0.0", "8.5", "1.2 k", "3.4 M"]
    found = {"tokens": 768, "tokens_per_s": 93.21, "loss": 3.5, "steps": 6}
    assert learning.trained(found) == "768 tokens at 93.2 tokens/s, loss 3.500 (mean of the last 6 steps)"
    assert learning.trained({**found, "steps": 500}).endswith("loss 3.500 (mean of the last 20 steps)")
    assert learning.trained({**found, "steps": 1}).endswith("loss 3.500")


def test_only_what_is_saved_is_said_to_be(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["distill", str(model), "--text", str(text), "-o", str(tmp_path / "out"), *SMALL, "--steps", "3"]
    monkeypatch.setattr(Part, "over", True)
    monkeypatch.setattr(Part, "stop", lambda self: Unfinished(signal.SIGTERM))
    with monkeypatch.context() as patched:
        patched.setattr(Part, "asked", True)
        assert main([*call, "--written", "200"]) == 143
    error = capsys.readouterr().err
    assert "nothing is saved yet; the same command begins anew" in error and "go on" not in error
    assert main([*call, "--written", "200"]) == 143
    assert "saved; go on with the same command" in capsys.readouterr().err, "a file of text"
    assert main([*call, "--written", "0", "--restart"]) == 143
    assert "saved; go on with the same command" in capsys.readouterr().err
    monkeypatch.undo()
    assert main([*call, "--written", "0"]) == 0
    out, error = capsys.readouterr()
    assert "going on at step 2 of 3" in error.splitlines()
    assert f"wrote {tmp_path / 'out'}; try: rowcast generate -m {model} --draft {tmp_path / 'out'} ..." in out.splitlines()
    assert main([*call, "--written", "0", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["finished"]


def test_a_text_that_is_too_short_says_by_how_much(model: Path, text: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(open_checkpoint(str(model)))
    short = words_of(tmp_path / "short.txt", [3, 4, 5, 6, 7, 8, 9])
    tokens = len(tokenizer.encode(short.read_text(), add_special_tokens=False))
    (tmp_path / "c").mkdir()
    with pytest.raises(
        UserError,
        match=rf"^no held-out text has 64 tokens, the longest has {tokens}: give a longer one with --held-out, or lower",
    ):
        Corpus.open(tmp_path / "c", [text], tokenizer, 101, window=64, held_out=[short])
    middling = words_of(tmp_path / "middling.txt", [3, 4] * 50)
    with pytest.raises(UserError, match=r"the longest has 5: of one with fewer than 256 only 5% is held out, give a longer one"):
        Corpus.open(tmp_path / "c", [middling], tokenizer, 101, window=64)
    settings = Rounding(group=32, tokens=640, window=16)
    with pytest.raises(
        UserError, match=rf"the text \S*short.txt has {tokens} tokens, two windows of 16 .* give more text with --text "
    ):
        quantise(model, [short], tmp_path / "q", settings, progress=False)
    with pytest.raises(UserError, match=r"short.txt has .* give more text with --held-out "):
        quantise(model, [text], tmp_path / "q", settings, held_out=[short], progress=False)
    more = words_of(tmp_path / "more.txt", [3, 4, 5])
    with pytest.raises(UserError, match=r"the 2 texts of --held-out have "):
        quantise(model, [text], tmp_path / "q", settings, held_out=[short, more], progress=False)


@pytest.mark.parametrize("name", COMMANDS)
def test_of_refused_input_nothing_is_left(name: str, model: Path, text: Path, tmp_path: Path) -> None:
    command, output = COMMANDS[name], tmp_path / "out"
    short = words_of(tmp_path / "short.txt", [3, 4, 5])
    with pytest.raises(UserError, match="no held-out text has"):
        command.run(str(model), [text], output, command.settings, QUIET, held_out=[short])
    long_prompts = replace(command.settings, prompt_tokens=command.settings.window)
    with pytest.raises(UserError, match="tokens to learn from"):
        command.run(str(model), [short], output, command.settings, QUIET)
    if command.settings.written_tokens:
        with pytest.raises(UserError, match="leaves nothing to write"):
            command.run(str(model), [text], output, long_prompts, QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_rounding_leaves_and_says_no_more_than_there_is(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Rounding(group=32, tokens=640, window=16, judged=64)
    with pytest.raises(UserError, match="--part-minutes 0"):
        quantise(model, [text], tmp_path / "out", settings, part_minutes=0, progress=False)
    assert list(tmp_path.iterdir()) == []
    call = ["quantize", str(model), "--text", str(text), "-o", str(tmp_path / "out"), "--group", "32", "--tokens", "640"]
    for name in ("over", "asked"):
        monkeypatch.setattr(Part, name, True)
    monkeypatch.setattr(Part, "stop", lambda self: Unfinished(signal.SIGINT))
    assert main([*call, "--window", "16"]) == 130
    assert "nothing is saved yet" in capsys.readouterr().err


def test_what_was_saved_stays_where_input_is_refused(tmp_path: Path) -> None:
    for name, kept in (("training.safetensors", True), ("text.bin", False), ("training.safetensors.part", False)):
        folder = WorkFolder(tmp_path / name, {"command": "distill", "steps": 3}, restart=False)
        (folder.path / name).write_text("")
        with pytest.raises(UserError), folder.worked_in():
            raise UserError("no")
        assert folder.path.exists() == kept
    folder = WorkFolder(tmp_path / "training.safetensors", {"command": "distill", "steps": 3}, restart=False)
    (folder.path / "training.safetensors").unlink()
    with pytest.raises(UserError), folder.worked_in():
        raise UserError("no")
    assert folder.path.exists(), "another call began it"


def test_the_folder_of_another_command_is_no_case_for_restart(model: Path, text: Path, tmp_path: Path) -> None:
    quantise(model, [text], tmp_path / "out", Rounding(group=32, tokens=640, window=16, judged=64), progress=False)
    settings = COMMANDS["distill"].settings
    with pytest.raises(UserError, match=r"^\S*out was made by `rowcast quantize`: give another folder with -o\.$"):
        distill(str(model), [text], tmp_path / "out", settings, QUIET)  # type: ignore[arg-type]
    folder = WorkFolder(tmp_path / "left", {"command": "adapt", "steps": 3}, restart=False)
    (folder.path / "training.safetensors").write_text("")
    with pytest.raises(UserError, match=r"left\.state is what `rowcast adapt` works in: give another folder with -o\.$"):
        WorkFolder(tmp_path / "left", {"command": "prune", "steps": 3}, restart=False)


def test_other_settings_are_named_as_options(tmp_path: Path) -> None:
    begun = {"command": "distill", "fingerprint": "a", "model": "b", "judged_tokens": 1, "written_tokens": 2, "most_bytes": 3}
    folder = WorkFolder(tmp_path / "out", {**begun, "learning_rate": 0.1}, restart=False)
    (folder.path / "training.safetensors").write_text("")
    changed = {name: f"other {value}" for name, value in begun.items() if name != "command"}
    with pytest.raises(UserError, match=r"\(--judged, --learning-rate, --size, --written, the model\): add --restart"):
        WorkFolder(tmp_path / "out", {**changed, "command": "distill", "learning_rate": 0.2}, restart=False)
