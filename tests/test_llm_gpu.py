"""The driver API on a GPU: the CPU's tokens, and a budget that holds."""

from __future__ import annotations

import gc
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import VOCAB, tiny_model

from rowcast import LLM, SamplingParams, UserError
from rowcast.runtime.gpu_ceiling import outside_bytes, peak_bytes

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)

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
def test_half_precision_runs(dtype: str, tmp_path: Path) -> None:
    """Its tokens are near those of float32, given the same tokens before: log-probabilities within what 16 bits round away."""
    tiny_model("llama-gqa", tmp_path)
    llm = LLM(str(tmp_path), device="cuda", dtype=dtype)
    exact = LLM(str(tmp_path), device="cuda", dtype="float32")
    outputs = llm.generate(prompts(), replace(PARAMS, temperature=0, top_k=0, logprobs=0))
    assert all(len(output.outputs[0].token_ids) == 40 for output in outputs)
    for output in outputs:
        ids = output.prompt_token_ids + output.outputs[0].token_ids
        [scored] = exact.generate(ids, replace(PARAMS, max_tokens=1, prompt_logprobs=0))
        assert scored.prompt_logprobs is not None and output.outputs[0].logprobs is not None
        for token, mine, theirs in zip(
            output.outputs[0].token_ids,
            output.outputs[0].logprobs,
            scored.prompt_logprobs[len(output.prompt_token_ids) :],
            strict=True,
        ):
            assert theirs is not None
            assert abs(mine[token].logprob - theirs[token].logprob) < 0.3
    assert llm.plan.dtype == dtype and llm.plan.device.startswith("cuda")


def test_the_budget_is_a_hard_limit(tmp_path: Path) -> None:
    tiny_model("llama-gqa", tmp_path)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, outside = torch.cuda.memory_allocated(), outside_bytes(DEVICE, 1)
    llm = LLM(str(tmp_path), device="cuda", gpu_memory=outside + (512 << 20))
    llm.generate(prompts(), PARAMS)
    assert torch.cuda.max_memory_reserved() - before <= 512 << 20
    with pytest.raises(UserError, match="gpu_memory"):
        LLM(str(tmp_path), device="cuda", gpu_memory="100TiB")
    with pytest.raises(UserError, match="does not fit on 1 x"):
        LLM(str(tmp_path), device="cuda", gpu_memory=outside_bytes(DEVICE, 1) + (1 << 20))
    with pytest.raises(UserError, match="context and libraries take: ask for more"):
        LLM(str(tmp_path), device="cuda", gpu_memory="1MiB")


@pytest.mark.parametrize("ladder", ["plain", "self:kv=256,gamma=4 / plain"])
def test_the_driver_counts_no_more_than_the_ceiling(ladder: str, tmp_path: Path) -> None:
    """Context, kernels and captured graphs included, where KV takes all that the ceiling leaves."""
    tiny_model("llama-gqa", tmp_path, max_position_embeddings=8192, vocab_size=32_000)
    gc.collect()
    torch.cuda.empty_cache()
    torch.zeros(1, device=DEVICE)
    torch.cuda.reset_peak_memory_stats()
    before, ceiling = torch.cuda.memory_allocated(), outside_bytes(DEVICE, 1) + (300 << 20)
    if peak_bytes(DEVICE) is None:
        pytest.skip("the driver does not tell this process from others")
    llm = LLM(str(tmp_path), device="cuda", ladder=ladder, gpu_memory=ceiling, progress=False)
    assert llm.plan.ceiling_bytes == ceiling
    for count in (1, 8):
        llm.generate([[7, 8, 9] * 200] * count, PARAMS)
    peak = peak_bytes(DEVICE)
    assert peak is not None
    print(f"{ladder}: {peak}, ceiling {ceiling}, before {before}, reserved at most {torch.cuda.max_memory_reserved()}")
    assert peak.bytes - before <= ceiling


def test_a_full_batch_with_a_large_vocabulary_stays_within_the_budget(tmp_path: Path) -> None:
    """64 sequences x 152k tokens, with all that sampling can ask for; KV takes what the plan leaves, so nothing else has room."""
    tiny_model("llama-gqa", tmp_path, vocab_size=151_936)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, memory = torch.cuda.memory_reserved(), outside_bytes(DEVICE, 1) + (700 << 20)
    llm = LLM(str(tmp_path), device="cuda", dtype="float32", gpu_memory=memory, max_num_batched_tokens=256)
    params = replace(
        PARAMS, top_k=0, top_p=0.9, min_p=0.01, repetition_penalty=1.1, frequency_penalty=0.1, max_tokens=6, logprobs=2
    )
    outputs = llm.generate([[i, i + 1] for i in range(64)], params)
    assert all(len(output.outputs[0].token_ids) == 6 for output in outputs)
    assert torch.cuda.max_memory_reserved() - before <= 700 << 20


def test_a_second_model_in_the_same_process(tmp_path: Path) -> None:
    tiny_model("llama-gqa", tmp_path)
    first = LLM(str(tmp_path), device="cuda")
    second = LLM(str(tmp_path), device="cuda")
    assert len(second.generate([1, 2], PARAMS)[0].outputs[0].token_ids) == 40
    assert len(first.generate([1, 2], PARAMS)[0].outputs[0].token_ids) == 40
    del first, second
    free = torch.cuda.mem_get_info()[0]
    third = LLM(str(tmp_path), device="cuda", gpu_memory=int(free * 0.8))
    assert len(third.generate([1, 2], PARAMS)[0].outputs[0].token_ids) == 40
