"""The real model: SmolLM2-135M-Instruct from its GGUF file, float32 on the CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from rowcast import LLM, RequestOutput, SamplingParams

NEAR_TIE = 1e-4
"""Two logits closer than this may swap places between two ways of summing them in float32."""

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "1, 1, 2, 3, 5, 8, 13,",
    "Once upon a time, in a village by the sea, there lived an old fisherman who",
    "Ingredients: 2 eggs, 200 g of flour, a pinch of salt. Method:",
    "Der schnelle braune Fuchs springt",
    "Q: Why is the sky blue?\nA:",
    "<|im_start|>user\nName three uses of a brick.<|im_end|>\n<|im_start|>assistant\n",
]
GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.8, seed=7, max_tokens=24)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(dtype="float32", ladder="plain")


@pytest.fixture(scope="module")
def greedy(llm: LLM) -> list[RequestOutput]:
    """Each prompt alone."""
    return [llm.generate(prompt, GREEDY)[0] for prompt in PROMPTS]


@pytest.fixture(scope="module")
def seeded(llm: LLM) -> list[RequestOutput]:
    """All prompts at once."""
    return llm.generate(PROMPTS, SEEDED)


@pytest.fixture(scope="module")
def transformers_model(llm: LLM) -> Any:
    from transformers import AutoModelForCausalLM

    path = llm.checkpoint.path
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


def test_greedy_tokens_are_those_of_transformers(greedy: list[RequestOutput], transformers_model: Any) -> None:
    excused = []
    for output in greedy:
        prompt, ours = output.prompt_token_ids, output.outputs[0].token_ids
        assert len(ours) == 64
        with torch.inference_mode():
            logits = transformers_model(torch.tensor([prompt + ours])).logits[0, -len(ours) - 1 : -1]
        for at, token in enumerate(ours):
            best = logits[at].max()
            if token != logits[at].argmax():
                assert best - logits[at, token] < NEAR_TIE, f"{output.prompt!r}: token {at} is {token}"
                excused.append((output.prompt, at))
                break
    assert len(excused) <= 1, f"near ties: {excused}"


def test_generate_of_transformers_agrees(greedy: list[RequestOutput], transformers_model: Any) -> None:
    """The above, token by token through Transformers' own cache, for one prompt."""
    output = greedy[3]
    ids = torch.tensor([output.prompt_token_ids])
    theirs = transformers_model.generate(ids, max_new_tokens=64, min_new_tokens=64, do_sample=False, eos_token_id=None)
    assert output.outputs[0].token_ids == theirs[0, ids.shape[1] :].tolist()


def test_a_batch_is_eight_requests_alone(llm: LLM, greedy: list[RequestOutput]) -> None:
    batched = llm.generate(PROMPTS, GREEDY)
    assert [b.outputs[0].token_ids for b in batched] == [a.outputs[0].token_ids for a in greedy]
    assert [b.outputs[0].text for b in batched] == [a.outputs[0].text for a in greedy]
    llm.engine.check()


def test_a_seeded_batch_is_eight_requests_alone(llm: LLM, seeded: list[RequestOutput]) -> None:
    alone = [llm.generate(prompt, SEEDED)[0].outputs[0] for prompt in PROMPTS]
    assert [b.outputs[0].token_ids for b in seeded] == [a.token_ids for a in alone]


@pytest.mark.parametrize("params", [replace(GREEDY, max_tokens=24), SEEDED], ids=["greedy", "seeded"])
def test_little_kv_memory_changes_nothing(
    llm: LLM, greedy: list[RequestOutput], seeded: list[RequestOutput], params: SamplingParams
) -> None:
    expected = [output.outputs[0].token_ids[:24] for output in (seeded if params is SEEDED else greedy)]
    small = LLM(plan=replace(llm.plan, num_blocks=14, kv_bytes=14 * 16 * llm.plan.kv_token_bytes))
    outputs = small.generate(PROMPTS, params)
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert sum(output.metrics.preemptions for output in outputs) > 0
    small.engine.check()


def test_a_stream_is_the_same_text_in_pieces(llm: LLM, greedy: list[RequestOutput]) -> None:
    chunks = list(llm.stream(PROMPTS[3], GREEDY))
    assert len(chunks) > 32
    assert "".join(c.text for c in chunks) == greedy[3].outputs[0].text
    assert [t for c in chunks for t in c.token_ids] == greedy[3].outputs[0].token_ids
    last = chunks[-1]
    assert last.finish_reason == "length" and last.output is not None and last.output.outputs[0].text == greedy[3].outputs[0].text
    assert all(c.output is None for c in chunks[:-1])


def test_a_dropped_stream_is_cancelled(llm: LLM) -> None:
    stream = llm.stream(PROMPTS[0], GREEDY)
    next(stream)
    stream.close()
    assert not llm.engine.has_work and list(stream) == []
    unread = llm.stream(PROMPTS[0], GREEDY)
    del stream, unread
    assert not llm.engine.has_work
    llm.engine.check()


def test_streams_run_side_by_side(llm: LLM, greedy: list[RequestOutput]) -> None:
    """Each step moves both; neither loses what the other's steps gave it, nor what `generate` in between does."""
    first, second = llm.stream(PROMPTS[0], GREEDY), llm.stream(PROMPTS[3], GREEDY)
    texts = [next(first).text, ""]
    assert llm.generate(PROMPTS[5], GREEDY)[0].outputs[0].text == greedy[5].outputs[0].text
    texts[1] += "".join(chunk.text for chunk in second)
    texts[0] += "".join(chunk.text for chunk in first)
    assert texts == [greedy[0].outputs[0].text, greedy[3].outputs[0].text]


def test_a_stop_string_cuts_the_text_and_is_never_shown(llm: LLM, greedy: list[RequestOutput]) -> None:
    text = greedy[3].outputs[0].text
    stop = text[20:31]  # across tokens
    params = replace(GREEDY, stop=[stop])
    chunks = list(llm.stream(PROMPTS[3], params))
    assert "".join(c.text for c in chunks) == text[: text.index(stop)]
    assert (chunks[-1].finish_reason, chunks[-1].output.outputs[0].stop_reason) == ("stop", stop)  # type: ignore[union-attr]
    assert not any(stop[:4] in c.text for c in chunks)


def test_chat_uses_the_models_template_and_ends_by_itself(llm: LLM) -> None:
    messages = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    [output] = llm.chat(messages, SamplingParams(temperature=0, max_tokens=48))
    rendered = llm.tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False)
    question = messages[0]["content"]
    assert rendered.endswith(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
    assert rendered.count("<|im_start|>system") == 1
    assert "Paris" in output.outputs[0].text
    assert output.outputs[0].finish_reason == "stop"


def test_chunked_prefill_changes_nothing(llm: LLM) -> None:
    prompt = "It was a dark night, and the rain fell upon the roofs of the town. " * 12
    params = replace(GREEDY, max_tokens=16)
    chunked = LLM(plan=replace(llm.plan, max_batch_tokens=50, num_blocks=64))
    assert chunked.generate(prompt, params)[0].outputs[0].token_ids == llm.generate(prompt, params)[0].outputs[0].token_ids


def test_bad_words_and_included_stop_strings(llm: LLM, greedy: list[RequestOutput]) -> None:
    text = greedy[3].outputs[0].text
    word = next(w.strip(",.") for w in text.split() if len(w) > 4)
    without = llm.generate(PROMPTS[3], replace(GREEDY, bad_words=[word]))[0].outputs[0].text
    assert word in text and word not in without
    stop = text[20:31]
    kept = llm.generate(PROMPTS[3], replace(GREEDY, stop=[stop], include_stop_str_in_output=True))[0].outputs[0]
    assert kept.text == text[: text.index(stop) + len(stop)]


NEAR_TIE_BFLOAT16 = 0.25
"""In bfloat16 library products round by the number of tokens in the call; logits near 20 have a spacing of 0.125."""


def test_bfloat16_is_the_same_up_to_near_ties(transformers_model: Any) -> None:
    """Every token is within half a logit of the float32 model's best, and a batch leaves a request alone only at near ties."""
    half = LLM(dtype="bfloat16", max_model_len=512)
    params = replace(GREEDY, max_tokens=16)
    alone = [half.generate(prompt, params)[0] for prompt in PROMPTS]
    batched = half.generate(PROMPTS, params)
    for one, other in zip(alone, batched, strict=True):
        ours, theirs = one.outputs[0].token_ids, other.outputs[0].token_ids
        with torch.inference_mode():
            logits = transformers_model(torch.tensor([one.prompt_token_ids + ours])).logits[0, -len(ours) - 1 : -1]
        gaps = logits.max(-1).values - logits[torch.arange(len(ours)), torch.tensor(ours)]
        assert gaps.max() < 0.5
        split = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
        if split is not None:
            assert (logits[split, ours[split]] - logits[split, theirs[split]]).abs() < NEAR_TIE_BFLOAT16
