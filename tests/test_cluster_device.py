"""Rounds that the device runs by itself, over several ranks: the tokens of one. Here call by call, by Triton's interpreter and gloo."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cluster_ranks import found
from test_device_rounds import ALL_STAND, GREEDY, SEEDED, SOME
from test_offload_llm import away, shares
from test_sparse_ladder import calibrate
from test_speculation import SELF
from tiny import tiny_model
from triton_interpreting import take_arrays_as_bounds
from warm_ranks import WarmLauncher

from rowcast import LLM, SamplingParams
from rowcast.cluster.gang import Limits

take_arrays_as_bounds()
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
WORLD = 2
LONG = replace(GREEDY, max_tokens=8)
MIN_P = replace(SEEDED, min_p=0.05)
TRUNCATED = replace(SEEDED, top_k=5, top_p=0.8)
LADDERS = {
    "plain": "plain",
    "ngram and self": f"ngram:gamma=2 / {SELF},gamma=3 / plain",
    "sparse": "self:mlp=0.5,by=q4,gamma=2 / plain",
}


@pytest.fixture(scope="module")
def launcher() -> Iterator[WarmLauncher]:
    started = WarmLauncher()
    yield started
    started.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama-gqa", path, num_hidden_layers=1)
    return path


def same_tokens(launcher: WarmLauncher, model: Path, turns: list[list[SamplingParams]], **arguments: Any) -> None:
    """What one rank gives, driven by the host, and two by themselves, for the same requests."""
    arguments = {"dtype": "float32", "device": "cpu", "block_size": 4, **arguments}
    alone = LLM(model, **arguments)
    expected = [found(alone.generate(SOME[: len(params)], params)) for params in turns]
    launcher.faults = [dict.fromkeys(range(WORLD), "interpret")]
    once = Limits(failures=1)  # ranks that are started again would be driven by the host
    with LLM(model, tensor_parallel_size=WORLD, launcher=launcher, limits=once, **arguments) as llm:
        assert [found(llm.generate(SOME[: len(params)], params)) for params in turns] == expected
        llm.engine.check()


@pytest.mark.parametrize("name", LADDERS)
def test_two_ranks_give_the_tokens_of_one(launcher: WarmLauncher, model: Path, name: str) -> None:
    turns = [[GREEDY, SEEDED], [MIN_P, SEEDED], [TRUNCATED, GREEDY]]
    same_tokens(launcher, model, turns if name == "plain" else turns[:1], ladder=LADDERS[name])


def test_two_ranks_leave_out_the_same_passes(launcher: WarmLauncher, model: Path, tmp_path: Path) -> None:
    """A sum that one rank runs and the other does not would never end."""
    files = [tmp_path / str(rank) for rank in range(WORLD)]
    launcher.faults = [{rank: f"interpret@{file}" for rank, file in enumerate(files)}]
    once = Limits(failures=1, step_s=60)
    how: dict[str, Any] = {"dtype": "float32", "device": "cpu", "block_size": 4, "draft": model, "ladder": ALL_STAND}
    with LLM(model, tensor_parallel_size=WORLD, launcher=launcher, limits=once, **how) as llm:
        llm.generate([SOME[1][:24]], replace(GREEDY, max_tokens=15))
    ran = [file.read_text().splitlines() for file in files]
    assert ran[0] == ran[1]
    assert "0 0 1 0 0 1 0 0 2" in ran[0]


@pytest.mark.parametrize(("rung", "sequences"), [("self:mlp=0.4,by=dejavu,heads=0.5", 1), ("self:heads=0.5", 2)])
def test_neurons_and_heads_are_chosen_where_they_lie(launcher: WarmLauncher, tmp_path: Path, rung: str, sequences: int) -> None:
    """Two shards of heads, one a rank. A lone sequence has late K/V, which are written when a head is next used."""
    tiny_model("opt", tmp_path / "model", hidden_size=64, word_embed_proj_dim=64, num_attention_heads=16, num_hidden_layers=1)
    calibration = calibrate(tmp_path / "model", tmp_path / "calibration")
    same_tokens(launcher, tmp_path / "model", [[LONG] * sequences], ladder=rung, mode="approximate", calibration=calibration)


def test_ranks_that_are_not_alike(launcher: WarmLauncher, model: Path) -> None:
    """A plan for unlike cards may have the KV of one rank in host memory and that of the other not: all of them run the same passes,
    in the same way."""
    ladder = "self:kv=16,chunk=4,sinks=4,recent=4,score=mean,gamma=2 / plain"
    how: dict[str, Any] = {"dtype": "float32", "device": "cpu", "block_size": 4}
    alone = LLM(model, ladder=ladder, **how)
    turns = [[SEEDED, GREEDY], [SEEDED, replace(SEEDED, repetition_penalty=1.3)]]
    expected = [found(alone.generate(SOME[:2], params)) for params in turns]
    resident = dict.fromkeys(("attention", "neurons", "LM_head", "embeddings"), ("resident",))
    plan = away(replace(alone.plan, world=WORLD), shares(None, alone.spec.num_layers, KV=("streamed",), **resident))
    launcher.faults = [dict.fromkeys(range(WORLD), "interpret")]
    once = Limits(failures=1, step_s=20)
    with LLM(model, plan=plan, tensor_parallel_size=WORLD, launcher=launcher, limits=once) as llm:
        assert [found(llm.generate(SOME[:2], params)) for params in turns] == expected
