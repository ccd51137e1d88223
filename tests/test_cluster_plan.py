"""Plans for several ranks count what one of them holds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from thread_comm import run_ranks
from tiny import CASES, tiny_model
from warm_ranks import WarmLauncher

from rowcast import LLM, SamplingParams
from rowcast.errors import OutOfMemoryError, UserError
from rowcast.placement.resident import pass_bytes, rank_share
from rowcast.runtime.checkpoint.safetensors_file import SafetensorsSource
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.kv import PagedKV
from rowcast.runtime.protocols import Comm
from rowcast.runtime.shard import Shard
from rowcast.runtime.spec import ModelSpec, kv_bytes_per_token
from rowcast.runtime.weights import DenseWeights


@pytest.fixture(scope="module")
def launcher() -> Iterator[WarmLauncher]:
    started = WarmLauncher()
    yield started
    started.close()


def spec_of(path: Path) -> ModelSpec:
    return spec_from_config(json.loads((path / "config.json").read_text()))


@pytest.mark.parametrize("name", CASES)
def test_a_share_is_what_the_fullest_rank_holds(name: str, tmp_path: Path) -> None:
    tiny_model(name, tmp_path)
    spec = spec_of(tmp_path)

    def held(comm: Comm) -> tuple[int, int]:
        source, device = SafetensorsSource.open(tmp_path), torch.device("cpu")
        kv = PagedKV(spec, Shard(comm.rank, comm.world), num_blocks=3, block_size=4, dtype=torch.float32, device=device)
        return DenseWeights(spec, source, comm, dtype=torch.float32, device=device).bytes, kv.num_kv_heads

    for world in (2, 4, 8):
        if spec.num_heads % world:
            continue
        share = rank_share(spec, world)
        ranks = run_ranks(world, held)
        fullest = max(size for size, _ in ranks)
        row = 4 * (spec.hidden_size * 3 * spec.num_layers + spec.hidden_size)  # of a neuron, and biases, which rank 0 alone has
        assert fullest <= pass_bytes(share, 4) <= fullest + row * 2
        assert {heads for _, heads in ranks} == {share.num_kv_heads}
        assert kv_bytes_per_token(share, 4) == 2 * spec.num_layers * share.num_kv_heads * spec.head_dim * 4


def test_one_rank_holds_everything(tmp_path: Path) -> None:
    tiny_model("llama-gqa", tmp_path)
    spec = spec_of(tmp_path)
    assert rank_share(spec, 1) == spec


@pytest.mark.parametrize(("name", "kv_share"), [("llama-gqa", 2), ("llama-mqa", 1)])
def test_a_plan_of_two_ranks(launcher: WarmLauncher, name: str, kv_share: int, tmp_path: Path) -> None:
    tiny_model(name, tmp_path / "model")
    one = LLM(tmp_path / "model", ladder="ngram / plain", host_memory="400MiB").plan
    arguments: dict[str, Any] = {"tensor_parallel_size": 2, "launcher": launcher}
    with LLM(tmp_path / "model", ladder="ngram / plain", host_memory="400MiB", **arguments) as llm:
        two = llm.plan
    assert (two.world, two.budget_bytes) == (2, one.budget_bytes // 2)
    assert two.kv_token_bytes * kv_share == one.kv_token_bytes
    assert 0.45 * one.weight_bytes < two.weight_bytes < 0.6 * one.weight_bytes
    two.save(tmp_path / "plan")
    with LLM(tmp_path / "model", plan=tmp_path / "plan", **arguments) as llm:
        assert llm.plan == two
        assert llm.generate([[1, 2, 3]], SamplingParams(detokenize=False, max_tokens=3))[0].finished
    for plan, world in ((two, 1), (one, 2)):
        with pytest.raises(UserError, match=f"is for {plan.world} ranks? and .* run it with tensor_parallel_size={plan.world},"):
            LLM(tmp_path / "model", plan=plan, tensor_parallel_size=world, launcher=launcher)


def test_memory_that_is_too_little_for_a_rank(launcher: WarmLauncher, tmp_path: Path) -> None:
    tiny_model("llama-gqa", tmp_path)
    with pytest.raises(OutOfMemoryError, match="not enough memory"):
        LLM(tmp_path, tensor_parallel_size=2, host_memory="100MiB", launcher=launcher)
