"""A draft on all ranks, on rank 0 alone or in the driver: the same tokens, after faults, too. Float32, on the CPU."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import model_with_words, tiny_model
from warm_ranks import WarmLauncher

from rowcast import LLM, RequestOutput, SamplingParams
from rowcast.cli import main
from rowcast.cluster.drafting import DriverDraft
from rowcast.cluster.executor import GangExecutor
from rowcast.cluster.gang import Limits
from rowcast.errors import DraftError, UserError
from rowcast.runtime.device import choose_device
from rowcast.runtime.ladder.model_runner import ModelRunner
from rowcast.runtime.ladder.spec import Ladder, Rung

BASE: dict[str, Any] = {"max_tokens": 12, "detokenize": False, "ignore_eos": True}
PARAMS = [
    SamplingParams(temperature=0, **BASE),
    SamplingParams(temperature=0.8, seed=5, **BASE),
    SamplingParams(temperature=0.9, seed=6, n=2, repetition_penalty=1.2, **BASE),
]
PROMPTS = [[11, 12, 13, 14, 15] * 14, [3, 1, 4, 1, 5, 9, 2, 6] * 8, [5, 6, 7] * 4]
TWO = "draft:model={draft},kv=full,at={at},gamma=3 / plain"
FOUR = "ngram:gamma=1 / draft:model={draft},kv=60,at={at},gamma=2 / self:kv=40,sinks=8,recent=8,gamma=4 / plain"
LIMITS = Limits(start_s=60, step_s=20, silence_s=2.0)


@pytest.fixture(scope="module")
def launcher() -> Iterator[WarmLauncher]:
    started = WarmLauncher()
    yield started
    started.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The target and its twin, which is often right."""
    folder = tmp_path_factory.mktemp("models")
    tiny_model("llama-gqa", folder / "target")
    tiny_model("llama-gqa", folder / "draft")
    return folder / "target", folder / "draft"


def gang(launcher: WarmLauncher, models: tuple[Path, Path], ladder: str, at: str, **arguments: Any) -> LLM:
    target, draft = models
    ranks = {"tensor_parallel_size": 2, "launcher": launcher, "limits": LIMITS}
    return LLM(target, dtype="float32", ladder=ladder.format(draft=draft, at=at), **{**ranks, **arguments})


def tokens(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    return [[sample.token_ids for sample in output.outputs] for output in outputs]


def driver_draft(llm: LLM) -> DriverDraft:
    executor = llm.engine._executor
    assert isinstance(executor, GangExecutor) and executor.draft is not None
    return executor.draft


@pytest.fixture(scope="module")
def alone(models: tuple[Path, Path]) -> dict[tuple[str, str], list[list[list[int]]]]:
    """What one rank gives, by ladder and rule."""
    return {
        (ladder, rule): tokens(
            LLM(models[0], dtype="float32", ladder=ladder.format(draft=models[1], at="driver"), verification=rule).generate(
                PROMPTS, PARAMS
            )
        )
        for ladder in (TWO, FOUR)
        for rule in ("coupled", "maximal")
    }


@pytest.mark.parametrize("at", ["ranks", "first", "driver"])
@pytest.mark.parametrize("rule", ["coupled", "maximal"])
@pytest.mark.parametrize("ladder", [TWO, FOUR])
def test_the_same_tokens_wherever_the_draft_runs(
    launcher: WarmLauncher,
    models: tuple[Path, Path],
    alone: dict[tuple[str, str], list[list[list[int]]]],
    ladder: str,
    rule: str,
    at: str,
) -> None:
    with gang(launcher, models, ladder, at, verification=rule) as llm:
        outputs = llm.generate(PROMPTS, PARAMS)
        llm.engine.check()
    assert tokens(outputs) == alone[ladder, rule]
    assert any(output.metrics.acceptance["draft"] for output in outputs)


def test_every_rank_but_the_first_loads_no_draft(launcher: WarmLauncher, models: tuple[Path, Path]) -> None:
    """The ranks' plan counts a draft that only the driver has as nothing."""
    held = {}
    for at in ("ranks", "driver"):
        with gang(launcher, models, TWO, at) as llm:
            held[at] = llm.plan.rung_weight_bytes, llm.plan.rung_kv_bytes
    assert held["driver"] == (0, 0) and all(held["ranks"])


@pytest.mark.parametrize(("at", "fault"), [("first", {0: "die@5"}), ("driver", {0: "die@5"}), ("driver", {1: "raise@6"})])
def test_a_rank_that_dies_changes_nothing(
    launcher: WarmLauncher,
    models: tuple[Path, Path],
    alone: dict[tuple[str, str], list[list[list[int]]]],
    at: str,
    fault: dict[int, str],
) -> None:
    launcher.faults = [fault]
    with gang(launcher, models, FOUR, at) as llm:
        found = tokens(llm.generate(PROMPTS, PARAMS))
        executor = llm.engine._executor
        assert isinstance(executor, GangExecutor) and executor.failures == 1
        llm.engine.check()
    assert found == alone[FOUR, "coupled"]


def test_a_draft_that_fails_is_one_error(
    launcher: WarmLauncher,
    models: tuple[Path, Path],
    alone: dict[tuple[str, str], list[list[list[int]]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The ranks live on, and so do later requests."""
    with gang(launcher, models, TWO, "driver") as llm:
        with monkeypatch.context() as patch:

            def forward(*_: object) -> None:
                raise RuntimeError("CUDA error: the draft's device is gone\nand so on")

            patch.setattr(ModelRunner, "forward", forward)
            with pytest.raises(
                DraftError, match="driver's device cpu: CUDA error: the draft's device is gone; use at=ranks"
            ) as raised:
                llm.generate(PROMPTS, PARAMS)
            assert isinstance(raised.value.__cause__, RuntimeError)
        executor = llm.engine._executor
        assert isinstance(executor, GangExecutor) and executor.failures == 0
        assert not driver_draft(llm).seq_ids
        assert tokens(llm.generate(PROMPTS, PARAMS)) == alone[TWO, "coupled"]


def test_a_cancelled_request_leaves_nothing_in_the_driver(launcher: WarmLauncher, models: tuple[Path, Path]) -> None:
    with gang(launcher, models, FOUR, "driver") as llm:
        stream = llm.stream(PROMPTS[0], PARAMS[0])
        next(stream)
        next(stream)
        assert driver_draft(llm).seq_ids
        stream.close()
        assert not driver_draft(llm).seq_ids
        llm.engine.check()


def test_draft_device_on_the_command_line(
    launcher: WarmLauncher, models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target, draft = model_with_words(models[0].parent / "words", "llama-gqa"), models[1]
    asked: list[str] = []

    def choose(device: str, name: str) -> tuple[torch.device, str]:
        asked.append(device)
        return choose_device(device, name)

    monkeypatch.setattr("rowcast.cluster.llm.choose_device", choose)
    monkeypatch.setattr("rowcast.cluster.launcher.choose_launcher", lambda *_, **__: launcher)
    run = [
        "generate",
        "w3 w1 w4",
        "--model",
        str(target),
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--max-tokens",
        "4",
        "--tp",
        "2",
    ]
    at_driver = ["--ladder", f"draft:model={draft},kv=full,at=driver / plain"]
    assert main([*run, "--ladder", "plain"]) == 0
    plain = capsys.readouterr().out
    for device in ("cpu", "auto"):
        assert main([*run, *at_driver, "--draft-device", device]) == 0
        assert capsys.readouterr().out == plain
    assert asked == ["cpu", "cpu"]
    for arguments, said in (
        (
            [*at_driver, "--draft-device", "cuda:99"],
            r"--draft-device 'cuda:99' is not there: \d+ GPUs are visible, use cpu or auto\.",
        ),
        ([*at_driver, "--draft-device", "tpu"], r"--draft-device 'tpu' is not known: use auto, cpu or cuda\."),
        (
            ["--ladder", "plain", "--draft-device", "cpu"],
            r"--draft-device 'cpu' is for a rung draft with at=driver, and the ladder .*",
        ),
    ):
        assert main([*run, *arguments]) == 2
        assert re.fullmatch(f"rowcast: {said}", capsys.readouterr().err.splitlines()[-1])


def test_what_cannot_be_is_refused(models: tuple[Path, Path]) -> None:
    target, draft = models
    assert str(Rung.parse(f"draft:model={draft},at=first")) == f"draft:model={draft},at=first"
    with pytest.raises(UserError, match="at='second' of the rung draft is not one of ranks, first, driver; choose one"):
        Rung.parse("draft:at=second")
    with pytest.raises(UserError, match="is not a setting of a rung self"):
        Rung.parse("self:bits=4,at=first")
    with pytest.raises(UserError, match="stands above self, and only ngram may be below a draft with at=first"):
        Ladder.parse("self:bits=4 / draft:at=first / plain")
    with pytest.raises(UserError, match="is for several ranks, and there is one"):
        LLM(target, ladder="plain", draft_device="cpu")
    with pytest.raises(UserError, match="is for a rung draft with at=driver, and the ladder 'plain' has none"):
        LLM(target, ladder="plain", draft_device="cpu", tensor_parallel_size=2)
