"""What is trained on: texts as windows, and text that the model writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from learning_runs import CPU, Ends
from test_learning import FAMILIES, some_ids
from tiny import VOCAB, tiny_model, tiny_words

from rowcast.calibration.learning.corpus import Corpus
from rowcast.calibration.learning.part import Part, Unfinished, World
from rowcast.calibration.learning.writing import Writer, Writing, _sequences, write
from rowcast.calibration.text import tokens_before
from rowcast.errors import UserError
from rowcast.runtime.checkpoint import open_checkpoint
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.spec import kv_bytes_per_token, parameter_count
from rowcast.runtime.tokenizer import load_tokenizer


class Numbers:
    """A token for each number."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [int(word) for word in text.split()]


class Begun(Numbers):
    """Puts two tokens before a prompt, as others do one, and one behind it."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = super().encode(text)
        return [98, 99, *ids, 97] if add_special_tokens else ids


def text_of(path: Path, ids: Sequence[int]) -> Path:
    path.write_text(" ".join(map(str, ids)))
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    texts = [text_of(tmp_path / "a.txt", range(100)), text_of(tmp_path / "b.txt", range(99, -1, -1))]
    return Corpus.open(tmp_path, texts, Numbers(), VOCAB, window=8, seed=3)


def test_batches_are_a_function_of_the_step(corpus: Corpus, tmp_path: Path) -> None:
    again = Corpus.open(tmp_path, [tmp_path / "a.txt", tmp_path / "b.txt"], Numbers(), VOCAB, window=8, seed=3)
    batches = [corpus.batch(step, 4) for step in range(12)]
    assert all(torch.equal(again.batch(step, 4), batches[step]) for step in reversed(range(12)))
    other = Corpus.open(tmp_path, [tmp_path / "a.txt", tmp_path / "b.txt"], Numbers(), VOCAB, window=8, seed=4)
    assert not torch.equal(other.batch(0, 4), batches[0])
    windows = sum(corpus._text_windows())
    whole = torch.cat(batches)
    first, second = ({tuple(row.tolist()) for row in whole[k * windows : (k + 1) * windows]} for k in range(2))
    assert len(first) == len(second) == windows and first != second, "each once an epoch, cut elsewhere in the next"
    assert max(row[-1] for row in first | second if row[0] < row[-1]) < 92, "the ends are held out"


def test_the_ends_are_held_out_or_texts_of_their_own(corpus: Corpus, tmp_path: Path) -> None:
    assert [text["held_out"] for text in corpus.describe()] == [8, 8]
    apart = Corpus.open(tmp_path, [tmp_path / "a.txt"], Numbers(), VOCAB, window=8, held_out=[tmp_path / "b.txt"])
    assert [text["held_out"] for text in apart.describe()] == [0, 100]
    assert apart.held(50, 9).tolist() == [list(range(99, 49, -1)), list(range(49, -1, -1))]
    assert len(apart.held(50, 1)) == 1 and len(apart.held(101, 5)) == 0


def test_what_is_judged_by_is_not_learnt_from(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "copy.txt").write_bytes((tmp_path / "a.txt").read_bytes())
    with pytest.raises(UserError, match=r"copy\.txt is to be learnt from and to judge by"):
        Corpus.open(tmp_path, [tmp_path / "a.txt"], Numbers(), VOCAB, window=8, held_out=[tmp_path / "copy.txt"])
    held = set(corpus.held(8, 99).flatten().tolist())
    assert held == {*range(92, 100), *range(8)}
    up, down = (corpus.prompts(200, 4, number) for number in range(2))
    assert all(max(row) < 92 if row[0] < row[1] else min(row) > 7 for row in (*up.tolist(), *down.tolist()))


def test_written_text_takes_its_share(corpus: Corpus, tmp_path: Path) -> None:
    rows = np.full((5, 20), 99, dtype=np.uint16)
    (tmp_path / "w.bin").write_bytes(rows.tobytes())
    corpus.add_written(tmp_path / "w.bin", 20)
    corpus.text_share = 0.3
    found = [int((corpus.batch(step, 4) == 99).all(1).sum()) for step in range(10)]
    assert sum(found) == 28 and set(found) == {2, 3}
    assert corpus.written_tokens == 100


def test_windows_begin_as_what_the_engine_is_given_does(tmp_path: Path) -> None:
    text = text_of(tmp_path / "a.txt", range(90))
    corpus = Corpus.open(tmp_path, [text], Begun(), VOCAB, window=10, seed=3)
    windows, held, prompts = torch.cat([corpus.batch(step, 3) for step in range(3)]), corpus.held(6, 9), corpus.prompts(9, 5, 0)
    for rows, size in ((windows, 10), (held, 6), (prompts, 5)):
        assert rows.shape[1] == size and (rows[:, :2] == torch.tensor([98, 99])).all()
        assert (rows[:, 3:] == rows[:, 2:-1] + 1).all(), "then its text goes on"
    assert len(set(windows[:, 2:].flatten().tolist())) == windows[:, 2:].numel(), "each once an epoch"
    assert held[:, 2:].flatten().tolist() == list(range(80, 88)) and windows[:, 2:].max() < 80
    assert corpus.prompts(3, 1, 0).tolist() == [[98]] * 3 and corpus.held(1, 2).tolist() == [[98]] * 2
    assert [one["tokens"] for one in corpus.describe()] == [90]
    with pytest.raises(UserError, match="--window 9 is too short to learn from: give 10 tokens or more"):
        Corpus.open(tmp_path, [text], Begun(), VOCAB, window=9)
    with pytest.raises(UserError, match="prompts begin with the token id 99, the model has 99: use the model's own tokenizer"):
        Corpus.open(tmp_path, [text], Begun(), 99, window=10)


@pytest.mark.parametrize("bos", [False, True])
def test_what_a_tokenizer_puts_before_a_prompt(bos: bool, tmp_path: Path) -> None:
    tiny_model("llama-tied", tmp_path)
    tokenizer = load_tokenizer(open_checkpoint(str(tiny_words(tmp_path, bos=bos))))
    assert tokens_before(" w5 w1 w7", tokenizer) == tuple(tokenizer.encode("w9")[:-1]) == ((1,) if bos else ())


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"1 2 \xff", "not UTF-8 at byte 4"),
        (b"1 2 3", "a window has 8"),
        (b"7 " * 20, "no held-out text has 8 tokens"),
        (b"101 " * 400, "the model has 101"),
    ],
)
def test_a_text_that_is_none_is_refused(data: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(data)
    with pytest.raises(UserError, match=said):
        Corpus.open(tmp_path, [tmp_path / "t.txt"], Numbers(), VOCAB, window=8)


@pytest.mark.parametrize("name", [*FAMILIES, "llama-dynamic", "falcon-rw", "qwen2-window"])
def test_greedy_writing_is_the_models_own(name: str, tmp_path: Path) -> None:
    theirs = tiny_model(name, tmp_path)
    checkpoint, ids = open_checkpoint(str(tmp_path)), some_ids(12).view(3, 4)
    writer = Writer(checkpoint, spec_from_config(checkpoint.config), 3, 14, dtype=torch.float32, device=CPU)
    given = torch.tensor([4, 4, 1])
    found = writer.write(ids, given, 0.0, 0, Part())
    assert found is not None
    for row, count in zip(found, given.tolist(), strict=True):
        wanted = theirs.generate(row[None, :count], max_new_tokens=14 - count, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert row.tolist() == wanted[0].tolist()


class Follower(World):
    """A process that does not lead: it is told what the leading one says."""

    def __init__(self, told: list[int]) -> None:
        super().__init__()
        self.rank, self.size, self.told, self.calls = 1, 2, told, list[str]()

    def agree(self, number: int, device: torch.device) -> int:
        self.calls.append("agree")
        return self.told.pop(0)

    def wait(self) -> None:
        self.calls.append("wait")


def test_a_process_that_comes_late_asks_the_same(corpus: Corpus, tmp_path: Path) -> None:
    """The leading one has written its sizes by then: a process that left out its part of an agreement would hang all of them."""
    tiny_model("llama-tied", tmp_path / "model")
    spec = spec_from_config(open_checkpoint(str(tmp_path / "model")).config)
    how = (tmp_path, spec, Writing(60, 10, 4), torch.float32, CPU)
    assert _sequences(*how, World()) == 6
    late = Follower([0, 6])
    assert _sequences(*how, late) == 6 and late.calls == ["agree", "agree", "wait"]
    again = Follower([1])
    assert _sequences(*how, again) == 6 and again.calls == ["agree"]


def test_weights_have_their_room_beside_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama-tied", tmp_path / "model")
    spec = spec_from_config(open_checkpoint(str(tmp_path / "model")).config)
    room = 4 * parameter_count(spec) + 7 * 10 * kv_bytes_per_token(spec, 4)
    monkeypatch.setattr("rowcast.runtime.device.available_bytes", lambda device: room)
    assert _sequences(tmp_path, spec, Writing(600, 10, 4), torch.float32, CPU, World()) == 3


def test_writing_draws_from_the_models_law(tmp_path: Path) -> None:
    theirs = tiny_model("llama-tied", tmp_path)
    checkpoint, count = open_checkpoint(str(tmp_path)), 4000
    writer = Writer(checkpoint, spec_from_config(checkpoint.config), count, 3, dtype=torch.float32, device=CPU)
    found = writer.write(torch.tensor([[5, 7]]).expand(count, 2), torch.full((count,), 2), 0.8, 1, Part())
    assert found is not None
    wanted = (theirs(input_ids=torch.tensor([[5, 7]])).logits[0, -1] / 0.8).softmax(-1)
    seen = found[:, 2].bincount(minlength=VOCAB) / count
    assert 0.5 * (seen - wanted).abs().sum() < 0.09
    assert torch.equal(writer.write(torch.tensor([[5, 7]]).expand(count, 2), torch.full((count,), 2), 0.8, 1, Part()), found)  # type: ignore[arg-type]


def test_writing_goes_on_where_it_was_cut_off(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama-tied", tmp_path / "model")
    checkpoint = open_checkpoint(str(tmp_path / "model"))
    monkeypatch.setattr("rowcast.calibration.learning.writing.CPU_SEQUENCES", 2)

    def written(folder: Path, stopping: Part | None = None) -> bytes:
        folder.mkdir(exist_ok=True)
        write(checkpoint, corpus, folder, Writing(60, 10, 4), dtype=torch.float32, device=CPU, part=stopping, show=False)
        return b"".join(path.read_bytes() for path in sorted(folder.glob("*.bin")))

    whole = written(tmp_path / "whole")
    with pytest.raises(Unfinished):
        written(tmp_path / "cut", Ends(2))
    assert len(list((tmp_path / "cut").glob("*.bin"))) == 1
    assert written(tmp_path / "cut") == whole and len(whole) == 3 * 2 * 10 * 2
    assert corpus.written_tokens == 120
    with pytest.raises(UserError, match="other settings"):
        write(checkpoint, corpus, tmp_path / "cut", Writing(60, 10, 5), dtype=torch.float32, device=CPU, show=False)
    for sitting in range(3):
        with pytest.raises(Unfinished):
            written(tmp_path / "short", Ends(0))
        assert len(list((tmp_path / "short").glob("*.bin"))) == sitting + 1, "a part that has no time writes one file"
    assert written(tmp_path / "short", Ends(0)) == whole
    monkeypatch.setattr(Part, "asked", True)
    with pytest.raises(Unfinished):
        written(tmp_path / "asked", Ends(0))
    assert not list((tmp_path / "asked").glob("*.bin")), "a signal ends it at once"
    with pytest.raises(
        UserError, match="--prompt-tokens 10 leaves nothing to write of a --window of 10: give a number from 1 to 9"
    ):
        write(checkpoint, corpus, tmp_path / "none", Writing(60, 10, 10), dtype=torch.float32, device=CPU, show=False)
