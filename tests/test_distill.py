"""`rowcast distill`: what it makes is a draft, better than none; a killed run goes on to the same bytes; what it refuses."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from learning_runs import QUIET, ended, in_child, in_two
from tiny import VOCAB, model_with_words, tiny_model, tiny_words, words_of
from torch import Tensor
from transformers import AutoModelForCausalLM

from rowcast import LLM, SamplingParams
from rowcast.calibration.distill import Settings, distill, draft_config, parameters, reduced
from rowcast.calibration.learning.gguf_export import q8_bytes
from rowcast.calibration.learning.judge import hidden_states
from rowcast.calibration.learning.part import Part, Unfinished
from rowcast.cli import main
from rowcast.errors import UserError
from rowcast.runtime.checkpoint import open_checkpoint
from rowcast.runtime.config import ADAPTED, spec_from_config

SMALL = (
    "--hidden", "32", "--layers", "1", "--heads", "1", "--neurons", "64", "--streaming", "56", "--window", "64", "--batch", "8",
    "--warmup", "5", "--learning-rate", "0.01", "--muon-rate", "0.01", "--written", "4096", "--prompt-tokens", "8",
    "--context", "32", "--context", "100",
)  # fmt: skip


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_with_words(tmp_path_factory.mktemp("target") / "model", "llama-gqa")


@pytest.fixture(scope="module")
def text(target: Path) -> Path:
    """Written by the target, so that its own text is what it is judged on."""
    llm = LLM(str(target), ladder="plain", progress=False)
    params = SamplingParams(max_tokens=120, ignore_eos=True, detokenize=False, seed=1)
    ids = [i for out in llm.generate([[5 + k] for k in range(30)], params) for i in out.outputs[0].token_ids]
    return words_of(target.parent / "text.txt", ids)


def command(target: Path, text: Path, output: Path, *more: str) -> list[str]:
    return ["distill", str(target), "--text", str(text), "-o", str(output), *SMALL, *more]


def made(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "rowcast.json").read_bytes())
    return found


@pytest.fixture(scope="module")
def draft(target: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("draft") / "draft"
    assert main(command(target, text, output, "--steps", "80")) == 0
    return output


def test_training_raises_acceptance(draft: Path, target: Path, text: Path, tmp_path: Path) -> None:
    assert main(command(target, text, tmp_path / "untrained", "--steps", "0", "--written", "0")) == 0
    before, after = made(tmp_path / "untrained")["held_out"], made(draft)["held_out"]
    for context in ("32", "100"):
        for temperature in ("1", "0.8"):
            for rule in ("maximal", "coupled"):
                was, now = (found[context]["acceptance"][temperature][rule] for found in (before, after))
                assert now > was + 0.2, (context, temperature, rule, was, now)
        assert after[context]["kl"] < before[context]["kl"] / 4


def test_what_is_written_says_how_it_was_made(draft: Path, target: Path, text: Path) -> None:
    found = made(draft)
    assert {path.name for path in draft.iterdir()} == {"model.gguf", "rowcast.json"}
    assert found["bytes"] == (draft / "model.gguf").stat().st_size
    assert found["texts"][0]["name"] == "text.txt" and len(found["texts"][0]["sha256"]) == 64
    assert found["training"]["steps"] == 80 and found["written_tokens"] >= 4096
    assert found["settings"]["streaming"] == 56 and found["settings"]["fingerprint"]
    assert found["settings"]["optimizer"] == "muon" and found["settings"]["muon_rate"] > 0
    assert not draft.with_name("draft.state").exists()


def test_the_draft_opens_everywhere_and_drafts(draft: Path, target: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(draft, gguf_file="model.gguf", dtype=torch.float32).eval()
    ids = torch.randint(VOCAB, (20,), generator=torch.Generator().manual_seed(3)).tolist()
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    alone = LLM(str(draft), ladder="plain", dtype="float32", progress=False).generate([ids], greedy)[0].outputs[0].token_ids
    wanted = theirs.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert alone == wanted[0, 20:].tolist()
    plain = LLM(str(target), ladder="plain", dtype="float32", progress=False).generate([ids], greedy)[0]
    laddered = LLM(str(target), ladder=f"draft:model={draft},kv=56,gamma=3 / plain", dtype="float32", progress=False)
    found = laddered.generate([ids], greedy)[0]
    assert found.outputs[0].token_ids == plain.outputs[0].token_ids
    assert sum(sum(counts.proposed) for counts in found.metrics.rungs.values()) > 0


def test_sixteen_bits_are_a_directory_like_the_targets(target: Path, text: Path, tmp_path: Path) -> None:
    assert main(command(target, text, tmp_path / "d", "--steps", "3", "--bits", "16", "--written", "0")) == 0
    names = {path.name for path in (tmp_path / "d").iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "rowcast.json"}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "d", dtype=torch.float32).eval()
    ids = list(range(10, 30))
    found = LLM(str(tmp_path / "d"), ladder="plain", dtype="float32", progress=False).generate(
        [ids], SamplingParams(temperature=0, max_tokens=1, logprobs=5, ignore_eos=True)
    )[0]
    logprobs = found.outputs[0].logprobs
    assert logprobs is not None
    wanted = theirs(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    for token, told in logprobs[0].items():
        assert told.logprob == pytest.approx(float(wanted[token].detach()), abs=1e-4)
    # It can be gone on from.
    assert main(command(target, text, tmp_path / "e", "--steps", "2", "--start", str(tmp_path / "d"), "--written", "0")) == 0


def test_of_an_adapted_start_nothing_is_claimed(target: Path, text: Path, tmp_path: Path) -> None:
    """What adapting measured is not so of weights that were trained on."""
    claimed = {ADAPTED: {"density": 0.2, "acceptance": {"0.2": 0.9}}}
    start = model_with_words(tmp_path / "start", "llama-tied", **claimed)
    assert spec_from_config(open_checkpoint(str(start)).config).adapted is not None
    more = ("--steps", "1", "--bits", "16", "--written", "0", "--start", str(start))
    assert main(command(target, text, tmp_path / "d", *more)) == 0
    assert ADAPTED not in json.loads((tmp_path / "d" / "config.json").read_bytes())


def test_parts_and_kills_change_nothing(
    target: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(target, text, tmp_path / "whole", "--steps", "9")) == 0
    looks = [0]
    monkeypatch.setattr(Part, "over", property(lambda self: looks.__setitem__(0, looks[0] + 1) or looks[0] % 5 == 0))
    for _ in range(20):
        capsys.readouterr()
        assert main(command(target, text, tmp_path / "parts", "--steps", "9")) == 0
        told = json.loads(capsys.readouterr().out.splitlines()[-1])
        if told["finished"]:
            break
        assert told == {"finished": False} and not (tmp_path / "parts").exists()
    assert looks[0] > 10, "several sittings"
    monkeypatch.undo()

    process = in_child(command(target, text, tmp_path / "killed", "--steps", "9", "--save-seconds", "0"))
    state = tmp_path / "killed.state" / "training.safetensors"
    while not state.exists() and process.is_alive():
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and state.exists()
    assert main(command(target, text, tmp_path / "killed", "--steps", "9")) == 0
    whole = (tmp_path / "whole" / "model.gguf").read_bytes()
    for other in ("parts", "killed"):
        assert (tmp_path / other / "model.gguf").read_bytes() == whole, other
        assert made(tmp_path / other)["held_out"] == made(tmp_path / "whole")["held_out"]


def test_a_draft_learns_prompts_as_the_engine_has_them(
    target: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a tokenizer that puts a BOS token before them begin with it: texts and what the target writes, learnt and judged."""
    seen: list[Tensor] = []

    def watched(module: Any, ids: Tensor) -> Tensor:
        seen.append(ids)
        return hidden_states(module, ids)

    for module in ("job", "judge"):
        monkeypatch.setattr(f"rowcast.calibration.learning.{module}.hidden_states", watched)
    shutil.copytree(target, tmp_path / "target")
    assert open_checkpoint(str(tiny_words(tmp_path / "target", bos=True))).config["bos_token_id"] == 1
    assert main(command(tmp_path / "target", text, tmp_path / "out", "--steps", "2", "--text-share", "0.5")) == 0
    assert {ids.shape[1] for ids in seen} == {64, 32, 100}
    assert all((ids[:, 0] == 1).all() and (ids[:, 1] != 1).any() for ids in seen)


@pytest.mark.parametrize(("number", "code"), [(None, 0), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_part_ends_with_the_code_of_its_signal(
    number: int | None, code: int, target: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Part, "over", True)
    monkeypatch.setattr(Part, "stop", lambda self: Unfinished(number))
    assert main(command(target, text, tmp_path / "out", "--steps", "2", "--written", "0")) == code
    assert (tmp_path / "out.state" / "training.safetensors").exists()


def test_a_signal_ends_judging(target: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = command(target, text, tmp_path / "out", "--steps", "1", "--written", "0")
    monkeypatch.setattr(Part, "asked", property(lambda self: (tmp_path / "out.state" / "stored").exists()))
    monkeypatch.setattr(Part, "stop", lambda self: Unfinished(signal.SIGTERM))
    assert main(call) == 143 and not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert main(call) == 0 and made(tmp_path / "out")["training"]["steps"] == 1


def test_two_processes_train_as_one(target: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    monkeypatch.setattr("rowcast.calibration.learning.writing.CPU_SEQUENCES", 3)
    more = ("--steps", "4", "--written", "900", "--bits", "16")
    both = in_two(command(target, text, tmp_path / "two", *more))
    assert main(command(target, text, tmp_path / "one", *more)) == 0
    ended(both)
    one, two = (open_checkpoint(str(tmp_path / name)).source for name in ("one", "two"))
    for name in one.names():
        torch.testing.assert_close(two.read(name), one.read(name), rtol=2e-3, atol=2e-3)
    assert made(tmp_path / "two")["settings"]["processes"] == 2


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], *said: str) -> None:
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and all(part in error for part in said), error


def test_what_it_refuses(target: Path, text: Path, draft: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def of(*more: str, texts: Path = text, output: Path = tmp_path / "out") -> list[str]:
        return command(target, texts, output, "--steps", "1", "--written", "0", *more)

    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    (tmp_path / "short.txt").write_text("w1 w2 w3")
    refused(capsys, of(texts=tmp_path / "empty.txt"), "empty.txt is empty")
    refused(capsys, of(texts=tmp_path / "latin.txt"), "latin.txt is not UTF-8 at byte 3")
    refused(capsys, of(texts=tmp_path / "none.txt"), "none.txt cannot be read")
    refused(capsys, of(texts=tmp_path / "short.txt"), "3 tokens to learn from", "--window")
    tiny_model("llama-tied", tmp_path / "other", vocab_size=90)
    refused(capsys, of("--start", str(tmp_path / "other")), "a vocabulary of 90 tokens and the model one of 101")
    refused(capsys, of("--window", "129"), "--window 129", "context of 128")
    refused(capsys, of("--streaming", "48"), "16 sinks and a stride of 32")
    refused(capsys, of("--hidden", "40"), "groups of 32", "--bits 16")
    refused(capsys, of("--bits", "4"), "--bits 4")
    refused(capsys, of("--text-share", "1.5"), "--text-share 1.5")
    refused(capsys, of("--part-minutes", "0"), "--part-minutes 0")
    refused(capsys, of("--accumulate", "3"), "--accumulate 3 does not divide")
    refused(capsys, of("--accumulate", "0"), "--accumulate 0 is too low")
    refused(capsys, of("--context", "1"), "--context 1 is too low")
    refused(capsys, of("--seed", str(1 << 40)), "--seed 1099511627776 is too high")
    refused(capsys, of("--held-out", str(text)), "to be learnt from and to judge by")
    refused(capsys, of("--learning-rate", "0", "--written", "4096"), "--learning-rate 0")
    refused(capsys, of(output=target), "would take the place of", "which is read")
    refused(capsys, of(output=tmp_path / "other"), "not empty")
    refused(capsys, command(target, text, draft, "--steps", "81"), "other settings (--steps)", "--restart")
    refused(capsys, ["distill", str(tmp_path / "nothing"), "--text", str(text), "-o", str(tmp_path / "out")], "No model")
    assert not (tmp_path / "out").exists()


def test_the_default_width_is_what_fits() -> None:
    target = open_checkpoint("SmolLM2-135M-Instruct")
    spec = spec_from_config(target.config)
    config = draft_config(target, spec, Settings())
    assert config["hidden_size"] == 224 and config["eos_token_id"] == 2
    count = parameters(spec.vocab_size, 224, Settings())
    assert 10e6 < count < 15e6 and q8_bytes(count) < 16e6 < q8_bytes(parameters(spec.vocab_size, 256, Settings()))
    with pytest.raises(UserError, match=r"--size allows 1\.0"):
        draft_config(target, spec, Settings(most_bytes=1_000_000))


def test_embeddings_along_their_main_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(50, 12, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -2, 12)
    found = reduced(rows, 5)
    u, s, _ = torch.linalg.svd(rows, full_matrices=False)
    torch.testing.assert_close((found @ found.T), (u[:, :5] * s[:5] ** 2) @ u[:, :5].T, rtol=1e-3, atol=1e-4)
    assert torch.equal(reduced(rows, 5), found)
    assert reduced(rows, 16)[:, 12:].abs().max() == 0
    monkeypatch.setattr("rowcast.calibration.distill.GRAM_ROWS", 16)
    torch.testing.assert_close(reduced(rows, 5), found)


def test_a_text_that_is_too_short_for_a_context_is_said(
    target: Path, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(
        hidden=32, layers=1, heads=1, streaming=56, window=64, batch=2, steps=0, written_tokens=0, contexts=(64, 128, 5000)
    )
    (tmp_path / "t.txt").write_text(" ".join(text.read_text().split()[:800]))
    found = distill(str(target), [tmp_path / "t.txt"], tmp_path / "out", settings, QUIET)
    assert list(found["held_out"]) == ["64"] and "no held-out text has 128 tokens" in caplog.text
