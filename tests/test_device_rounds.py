"""Rounds that the device runs by itself give what rounds give that the host drives. Here through Triton's interpreter; on a GPU the
tests of ladders and of the engine run on them, captured in graphs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_speculation import SELF, disturbed_copy, ids, prompts
from tiny import tiny_model
from triton_interpreting import take_arrays_as_bounds

from rowcast import LLM, SamplingParams
from rowcast.kernels import gpu

take_arrays_as_bounds()
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False)
SEEDED = replace(GREEDY, temperature=0.8, seed=11)
LADDERS = {
    "ngram": "ngram:gamma=4 / plain",
    "draft": "draft:kv=full,gamma=2 / plain",
    "triforce": f"draft:kv=48,sinks=4,gamma=2 / {SELF},gamma=4 / plain",
}

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    target, good = (tmp_path_factory.mktemp(name) for name in ("target", "good"))
    tiny_model("llama-gqa", target, num_hidden_layers=1)
    disturbed_copy(target, good)
    return {"target": target, "good": good}


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "interpreted", True)


def make_llm(models: dict[str, Path], ladder: str, **keywords: Any) -> LLM:
    if "draft" in ladder:
        keywords["draft"] = models["good"]
    return LLM(models["target"], dtype="float32", device="cpu", ladder=ladder, block_size=4, **keywords)


SOME = [prompt[-34:] for prompt in prompts(4, shortest=28)][:2]


@pytest.fixture(scope="module")
def plain(models: dict[str, Path]) -> dict[str, list[list[int]]]:
    llm = make_llm(models, "plain")
    return {name: ids(llm.generate(SOME, params)) for name, params in (("greedy", GREEDY), ("seeded", SEEDED))}


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("ladder", [None, *LADDERS])
def test_output_is_plain_output(models: dict[str, Path], plain: dict[str, list[list[int]]], ladder: str | None) -> None:
    llm = make_llm(models, "plain" if ladder is None else LADDERS[ladder])
    rounds = llm.engine._executor._rounds  # type: ignore[attr-defined]
    assert rounds is not None
    outputs = llm.generate(SOME, [GREEDY, SEEDED])
    assert ids(outputs) == [plain["greedy"][0], plain["seeded"][1]]
    llm.engine.check()
    if ladder is not None:
        stats = [output.metrics for output in outputs]
        assert any(sum(counts.judged) for found in stats for counts in found.rungs.values())
