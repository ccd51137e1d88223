"""Two GPUs give the tokens of one: rounds that they run by themselves, captured in graphs, sums and draws across ranks among it."""

from __future__ import annotations

import os
import random
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sparse_ladder import calibrate
from test_speculation import SELF
from tiny import VOCAB, tiny_model

from rowcast import LLM, RequestOutput, SamplingParams
from rowcast.cluster.executor import GangExecutor

WORLD = 2
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < WORLD, reason="needs two GPUs")]

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False)
SEEDED = replace(GREEDY, temperature=0.8, seed=11)
PARAMS = [GREEDY, SEEDED, replace(SEEDED, min_p=0.05), replace(SEEDED, top_k=5, top_p=0.8)]
COMMON: dict[str, Any] = {"dtype": "float32", "device": "cuda", "block_size": 4, "progress": False}


def prompts() -> list[list[int]]:
    draw = random.Random(0)
    return [[*(draw.randrange(VOCAB) for _ in range(20)), *[11, 12, 13, 14] * 3] for _ in PARAMS]


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def one_by_one_and_together(llm: LLM) -> list[list[int]]:
    """Alone each request has its own graphs, and its rounds are launched ahead."""
    return [token for p, s in zip(prompts(), PARAMS, strict=True) for token in tokens(llm.generate([p], s))] + tokens(
        llm.generate(prompts(), PARAMS)
    )


def ranks(model: Path, **arguments: Any) -> LLM:
    return LLM(model, tensor_parallel_size=WORLD, launcher="local", **COMMON, **arguments)


@pytest.mark.parametrize("ladder", ["plain", f"ngram:gamma=2 / {SELF},gamma=3 / plain", "self:mlp=0.5,by=q4,gamma=2 / plain"])
def test_two_gpus_give_the_tokens_of_one(
    tmp_path: Path, ladder: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny_model("llama-gqa", tmp_path)
    expected = one_by_one_and_together(LLM(tmp_path, ladder=ladder, **COMMON))
    monkeypatch.setenv("ROWCAST_LOG", "info")
    capfd.readouterr()
    with ranks(tmp_path, ladder=ladder) as llm:
        found = one_by_one_and_together(llm)
        llm.engine.check()
    assert found == expected
    said = capfd.readouterr().err
    assert said.count("rounds run on the device, captured in graphs") >= WORLD
    assert said.count("all-reduce") >= WORLD


@pytest.mark.parametrize("rung", ["self:mlp=0.4,by=dejavu,heads=0.5", "self:mlp=0.3,by=q4,over=1.5"])
def test_neurons_and_heads_are_chosen_where_they_lie(tmp_path: Path, rung: str) -> None:
    tiny_model("opt", tmp_path / "model", hidden_size=128, word_embed_proj_dim=128, num_attention_heads=16)
    calibration = calibrate(tmp_path / "model", tmp_path / "calibration")
    arguments: dict[str, Any] = {"ladder": rung, "mode": "approximate", "calibration": calibration}
    expected = one_by_one_and_together(LLM(tmp_path / "model", **COMMON, **arguments))
    with ranks(tmp_path / "model", **arguments) as llm:
        assert one_by_one_and_together(llm) == expected


def test_ranks_as_actors(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    tiny_model("llama-gqa", tmp_path)
    expected = one_by_one_and_together(LLM(tmp_path, ladder="plain", **COMMON))
    with LLM(tmp_path, tensor_parallel_size=WORLD, launcher="ray", ladder="plain", **COMMON) as llm:
        assert one_by_one_and_together(llm) == expected


def test_a_rank_that_is_killed_between_replays(tmp_path: Path) -> None:
    """The other one then waits on its GPU for a sum that will not come."""
    tiny_model("llama-gqa", tmp_path)
    params = replace(SEEDED, max_tokens=60)
    expected = tokens(LLM(tmp_path, ladder="plain", **COMMON).generate(prompts()[:1], params))[0]
    with ranks(tmp_path, ladder="plain") as llm:
        executor = llm.engine._executor
        assert isinstance(executor, GangExecutor) and executor.gang is not None
        found: list[int] = []
        for chunk in llm.stream(prompts()[0], params):
            if len(found) < 10 <= len(found) + len(chunk.token_ids):
                os.kill(executor.gang.pids[1], signal.SIGKILL)
            found += chunk.token_ids
        assert executor.failures == 1
    assert found == expected
