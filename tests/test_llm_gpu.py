"""The driver API on a GPU: the CPU's tokens, and a budget that holds."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from tiny import VOCAB, tiny_model

from rowcast import LLM, SamplingParams, UserError

pytestmark = pytest.mark.gpu

PARAMS = SamplingParams(temperature=0.8, seed=3, max_tokens=40, detokenize=False, top_k=20, ignore_eos=True)


def prompts() -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(VOCAB) for _ in range(draw.randint(2, 40))] for _ in range(6)]


@pytest.mark.parametrize("case", ["llama-gqa", "opt", "bloom", "falcon-rw", "mistral-window"])
def test_float32_tokens_are_the_cpus(case: str, tmp_path: Path) -> None:
    tiny_model(case, tmp_path)
    found = {}
    for device in ("cpu", "cuda"):
        llm = LLM(str(tmp_path), device=device, dtype="float32")
        found[device] = [output.outputs[0].token_ids for output in llm.generate(prompts(), PARAMS)]
        llm.engine.check()
    assert found["cuda"] == found["cpu"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs_alone_and_in_a_batch(dtype: str, tmp_path: Path) -> None:
    tiny_model("llama-gqa", tmp_path)
    llm = LLM(str(tmp_path), device="cuda", dtype=dtype)
    outputs = llm.generate(prompts(), PARAMS)
    assert all(len(output.outputs[0].token_ids) == 40 for output in outputs)
    assert llm.plan.dtype == dtype and llm.plan.device.startswith("cuda")


def test_the_budget_is_a_hard_limit(tmp_path: Path) -> None:
    tiny_model("llama-gqa", tmp_path)
    before = torch.cuda.memory_allocated()
    llm = LLM(str(tmp_path), device="cuda", gpu_memory="512MiB")
    llm.generate(prompts(), PARAMS)
    assert torch.cuda.max_memory_reserved() - before <= 512 << 20
    with pytest.raises(UserError, match="gpu_memory"):
        LLM(str(tmp_path), device="cuda", gpu_memory="100TiB")
    with pytest.raises(UserError, match="not enough memory"):
        LLM(str(tmp_path), device="cuda", gpu_memory="1MiB")
