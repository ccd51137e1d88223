"""The draft that is part of the package: found by its name, with the figures that its README has, and at work below the real model."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from rowcast import LLM, SamplingParams
from rowcast.errors import UserError
from rowcast.runtime.checkpoint import DEFAULT_MODEL, open_checkpoint
from rowcast.runtime.checkpoint.shipped import DEFAULT_DRAFT, SHIPPED, place_of
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.forecast import open_spec
from rowcast.runtime.ladder.drafts import open_drafts
from rowcast.runtime.ladder.spec import Ladder
from rowcast.runtime.spec import parameter_count
from rowcast.runtime.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
FOLDER = SHIPPED[DEFAULT_DRAFT]
LADDER = f"draft:model={DEFAULT_DRAFT},gamma=2 / self:kv=128,recent=32,gamma=4 / plain"


def test_it_is_found_by_name_and_fits_the_default_model() -> None:
    target = open_checkpoint(DEFAULT_MODEL)
    draft = open_drafts(Ladder.parse(LADDER), spec_from_config(target.config), load_tokenizer(target))[DEFAULT_DRAFT]
    assert draft.checkpoint.path == FOLDER / "model.gguf"
    assert draft.checkpoint.path.stat().st_size <= 16_000_000
    assert 10e6 < parameter_count(draft.spec) < 15e6
    assert open_spec(DEFAULT_DRAFT)[0] == draft.spec


def test_a_path_of_the_users_comes_first_and_another_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert place_of(DEFAULT_DRAFT) == FOLDER
    (tmp_path / DEFAULT_DRAFT).mkdir()
    assert place_of(DEFAULT_DRAFT) == Path(DEFAULT_DRAFT)
    with pytest.raises(UserError, match=r"holds no weights"):
        open_checkpoint(DEFAULT_DRAFT)
    with pytest.raises(UserError, match=r"No model 'smollm3-draft'"):
        open_checkpoint("smollm3-draft")


def test_its_figures_are_beside_it() -> None:
    told, page = json.loads((FOLDER / "rowcast.json").read_text()), (FOLDER / "README.md").read_text()
    assert told["bytes"] == (FOLDER / "model.gguf").stat().st_size
    assert told["settings"]["fingerprint"] == open_checkpoint(DEFAULT_MODEL).source.fingerprint()
    assert "/" not in told["target"] + "".join(text["name"] for text in told["texts"])
    for context, found in told["held_out"].items():
        acceptance = found["acceptance"]
        shares = [acceptance["0"], *(acceptance[t][rule] for t in ("0.8", "1") for rule in ("maximal", "coupled"))]
        assert f"| {int(context):,} tokens | " + " | ".join(f"{share:.3f}".lstrip("0") for share in shares) + " |" in page
    for text in told["texts"]:
        assert f"| {text['name']} |" in page and (text["held_out"] == text["tokens"]) == (text["name"] == "jack-sheppard.txt")


def test_three_rungs_give_the_tokens_of_plain_decoding() -> None:
    """On a novel that the draft has not learnt from, behind more tokens than its streaming cache has."""
    params = [SamplingParams(temperature=t, seed=5, max_tokens=16, ignore_eos=True) for t in (0.0, 0.8)]
    prompts = [(ROOT / "tests/data/jack-sheppard.txt").read_text(encoding="utf-8")[:1400]] * 2
    plain, found = (LLM(dtype="float32", ladder=ladder).generate(prompts, params) for ladder in ("plain", LADDER))
    assert [output.outputs[0].token_ids for output in found] == [output.outputs[0].token_ids for output in plain]
    for output in found:
        assert output.metrics.prompt_tokens > 256 + 16 and output.metrics.tokens_per_round > 2
        assert output.metrics.acceptance["draft"] > 0.35 and output.metrics.acceptance["self"] > 0.6


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """In short."""
    example = runpy.run_path(str(ROOT / "examples/ladder.py"))
    main = example["main"]
    main.__globals__.update(PROMPTS=(48,), GREEDY=SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    with pytest.raises(SystemExit) as ended:
        main()
    out = capsys.readouterr().out
    assert ended.value.code == 0 and out.count("identical") == 2 and "DIFFERS" not in out
