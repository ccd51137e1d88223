"""The driver API on tiny models: what it refuses, in which order results come, what an error leaves behind."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from tiny import VOCAB, tiny_model
from transformers import PreTrainedTokenizerFast

from rowcast import LLM, Ladder, Rung, SamplingParams, UserError

PARAMS = SamplingParams(temperature=0.8, seed=4, max_tokens=8, detokenize=False)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    tiny_model("llama-gqa", path)
    return path


@pytest.fixture(scope="module")
def llm(directory: Path) -> LLM:
    return LLM(str(directory))


def refused(*words: str, **arguments: Any) -> None:
    with pytest.raises(UserError) as caught:
        LLM(**arguments)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_plan_stands_alone(directory: Path, llm: LLM, tmp_path: Path) -> None:
    llm.plan.save(tmp_path / "plan")
    planned = LLM(str(directory), plan=tmp_path / "plan", mode="exact", tensor_parallel_size=1)
    assert planned.plan == llm.plan
    for name, value in {
        "ladder": "plain",
        "draft": "ngram",
        "kv_budget": 64,
        "verification": "maximal",
        "dtype": "bfloat16",
        "device": "cpu",
        "host_memory": "1GiB",
        "gpu_memory": 1 << 30,
        "max_model_len": 16,
        "max_num_seqs": 2,
        "max_num_batched_tokens": 64,
        "block_size": 8,
    }.items():
        refused(f"{name}={value}", "plan", model=str(directory), plan=llm.plan, **{name: value})


def test_a_plan_of_another_model_is_refused(directory: Path, llm: LLM) -> None:
    refused("plan=5", model=str(directory), plan=5)
    refused("other weights", model=str(directory), plan=replace(llm.plan, fingerprint="0" * 16))
    refused("1000", "128", model=str(directory), plan=replace(llm.plan, max_context=1000))
    refused("ladder", "hire", model=str(directory), plan=replace(llm.plan, ladder=["hire", "plain"]))
    refused("mode=approximate", "mode=exact", model=directory, plan=replace(llm.plan, mode="approximate"))
    refused("the plan is for 2 ranks", "tensor_parallel_size=1 is not", model=directory, plan=replace(llm.plan, world=2))
    pinned = replace(llm.plan, ladder=["self:kv=100,gamma=9", "plain"], speculating_seqs=1)
    refused("lookahead of 8", "9", "gamma=9", model=directory, plan=replace(pinned, lookahead=8))
    refused("speculating_seqs=0", "self:kv=100", model=directory, plan=replace(pinned, lookahead=9, speculating_seqs=0))
    refused("kv=100", "100 tokens", model=directory, plan=replace(pinned, lookahead=9, max_context=100))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tensor_parallel_size": 3}, ["tensor_parallel_size=3", "4 KV heads"]),
        ({"tensor_parallel_size": 0}, ["tensor_parallel_size=0"]),
        ({"ladder": "triforce"}, ["draft", "without a model"]),
        ({"ladder": "stairs"}, ["stairs", "triforce"]),
        ({"ladder": 5}, ["ladder=5"]),
        ({"ladder": "ngram", "kv_budget": 128}, ["kv_budget=128", "ngram"]),
        ({"ladder": "plain", "draft": "ngram"}, ["draft='ngram'", "plain"]),
        ({"draft": "no-such-model"}, ["no-such-model"]),
        ({"draft": 7}, ["draft=7"]),
        ({"kv_budget": "many"}, ["kv_budget='many'", "whole number"]),
        ({"kv_budget": 5}, ["kv=5"]),
        ({"verification": "sloppy"}, ["sloppy", "coupled or maximal"]),
        ({"ladder": "self:kv=120 / plain", "block_size": 4}, ["chunk=8", "4"]),
        ({"ladder": "self:kv=128 / plain"}, ["kv=128", "128 tokens", "smaller kv"]),
        ({"kv_budget": 100, "max_model_len": 100}, ["kv=100", "100 tokens", "kv_budget"]),
        ({"mode": "approximate"}, ["approximate"]),
        ({"mode": "fast"}, ["fast"]),
        ({"dtype": "int8"}, ["int8", "bfloat16"]),
        ({"device": "tpu"}, ["tpu"]),
        ({"device": "cuda:99"}, ["cuda:99"]),
        ({"host_memory": "many"}, ["host_memory='many'"]),
        ({"host_memory": "1KiB"}, ["not enough memory", "--host-memory"]),
        ({"host_memory": "900TiB"}, ["host_memory=900.0 TiB", "free"]),
        ({"gpu_memory": "1GiB"}, ["gpu_memory", "CPU"]),
        ({"max_model_len": 129}, ["129", "128"]),
        ({"max_num_seqs": 0}, ["max_num_seqs=0"]),
        ({"max_num_batched_tokens": -1}, ["max_num_batched_tokens=-1"]),
        ({"block_size": 0}, ["block_size=0"]),
        ({"max_model_len": "abc"}, ["max_model_len='abc'", "whole number"]),
        ({"max_model_len": 64.5}, ["max_model_len=64.5"]),
        ({"max_model_len": True}, ["max_model_len=True"]),
        ({"seed": 1.5}, ["seed=1.5"]),
        ({"device": None}, ["device=None"]),
    ],
)
def test_arguments_that_cannot_be(directory: Path, arguments: dict[str, Any], words: list[str]) -> None:
    refused(*words, model=str(directory), **({"device": "cpu"} | arguments))


def test_unknown_arguments_are_refused(directory: Path) -> None:
    with pytest.raises(TypeError, match="gpu_memroy"):
        LLM(str(directory), gpu_memroy="1GiB")


@pytest.mark.parametrize("value", ["abc", {}, [[1]], [None], 1e400, -1, VOCAB, True])
def test_end_tokens_that_are_none(value: Any, tmp_path: Path) -> None:
    tiny_model("llama-gqa", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": value}))
    refused("eos_token_id", str(VOCAB - 1), model=str(tmp_path))


def test_end_tokens_come_from_the_generation_config_first(tmp_path: Path) -> None:
    tiny_model("llama-gqa", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": 3}))
    generation = tmp_path / "generation_config.json"
    for content, expected in (({"eos_token_id": [7, 9]}, [7, 9]), ({"eos_token_id": None}, [3]), ({}, [3])):
        generation.write_text(json.dumps(content))
        assert LLM(str(tmp_path)).engine._eos_ids == expected


def test_results_come_in_order_as_they_finish(llm: LLM) -> None:
    lengths = [12, 3, 6]
    params = [replace(PARAMS, max_tokens=n, ignore_eos=True) for n in lengths]
    found = llm.iterate([[1, 2], [3], [4, 5, 6]], params)
    first = next(found)
    assert len(first.outputs[0].token_ids) == 12
    assert not llm.engine.has_work  # the others ran with it
    assert [len(o.outputs[0].token_ids) for o in found] == lengths[1:]


def test_one_bad_prompt_is_named_and_cancels_the_others(llm: LLM) -> None:
    with pytest.raises(UserError, match=f"prompt 2 of 3: .*{VOCAB}"):
        llm.generate([[1], [VOCAB], [2]], PARAMS)
    assert not llm.engine.has_work
    with pytest.raises(UserError, match="2 SamplingParams"):
        llm.generate([[1]], [PARAMS, PARAMS])
    llm.engine.check()


@pytest.mark.parametrize(
    "prompt",
    ["", 5, None, [None], {"text": "x"}, {"prompt": None}, {"prompt_token_ids": 5}, {"prompt": "a", "prompt_token_ids": [1]}, [1, "a"],
     [[1.5]], [[True]], [["a"]], b"bytes", [""], {}],
)  # fmt: skip
def test_prompts_that_are_none(llm: LLM, prompt: Any) -> None:
    with pytest.raises(UserError, match="prompt") as caught:
        llm.generate(prompt, PARAMS)
    assert "\n" not in str(caught.value)
    assert not llm.engine.has_work


def test_prompts_of_many_kinds(llm: LLM) -> None:
    expected = llm.generate([1, 2], PARAMS)[0].outputs[0].token_ids
    for prompt in (np.array([1, 2]), torch.tensor([1, 2]), (1, 2), {"prompt_token_ids": [1, 2]}, [np.int64(1), np.int32(2)]):
        assert [o.outputs[0].token_ids for o in llm.generate(prompt, PARAMS)] == [expected]  # type: ignore[arg-type]
    assert [o.outputs[0].token_ids for o in llm.generate(np.array([[1, 2], [1, 2]]), PARAMS)] == [expected, expected]  # type: ignore[arg-type]
    assert llm.generate([], PARAMS) == []


@pytest.mark.parametrize("params", [{"temperature": 0}, [None], "y", 3])
def test_sampling_params_that_are_none(llm: LLM, params: Any) -> None:
    with pytest.raises(UserError, match="sampling_params"):
        llm.generate([[1]], params)
    with pytest.raises(UserError, match="sampling_params"):
        llm.stream([1], params)


def test_a_stream_has_one_prompt(llm: LLM) -> None:
    with pytest.raises(UserError, match="one prompt, not 2"):
        llm.stream([[1], [2]], PARAMS)  # type: ignore[list-item]


def test_dropping_it_frees_it(directory: Path) -> None:
    llm = LLM(str(directory))
    llm.generate([1], PARAMS)
    gone = weakref.ref(llm.engine)
    del llm
    assert gone() is None


def test_json_of_several_samples(llm: LLM) -> None:
    params = replace(PARAMS, n=2, logprobs=1, max_tokens=2, stop_token_ids=[3], ignore_eos=True)
    [output] = llm.generate([1, 2], params)
    found = json.loads(json.dumps(output.to_json()))
    assert found["stats"]["generated_tokens"] == sum(len(o.token_ids) for o in output.outputs)
    assert [o["token_ids"] for o in found["outputs"]] == [o.token_ids for o in output.outputs]
    for sample in (found, *found["outputs"]):
        assert {"text", "token_ids", "finish_reason", "stop_reason", "logprobs"} <= sample.keys()
        assert [entry[0]["id"] for entry in sample["logprobs"]] == sample["token_ids"]


def test_text_needs_a_tokenizer_and_ids_do_not(llm: LLM) -> None:
    assert len(llm.generate([1, 2, 3], PARAMS)[0].outputs[0].token_ids) > 0
    with pytest.raises(UserError, match=r"no tokenizer.*; copy one there, or pass prompts as token ids\.$"):
        llm.generate("text", PARAMS)
    with pytest.raises(UserError, match=r"no tokenizer.*; copy one there, or .*SamplingParams\(detokenize=False\)\.$"):
        llm.generate([1, 2, 3], replace(PARAMS, detokenize=True))
    with pytest.raises(UserError, match="logit_bias"):
        llm.generate([1, 2, 3], replace(PARAMS, n=2, logit_bias={VOCAB: 1.0}))
    assert not llm.engine.has_work
    assert not llm.engine._executor._sequences and not llm.engine._executor._sampler._sequences  # type: ignore[attr-defined]
    llm.engine.check()


# Ladders


def tiny_tokenizer(path: Path, words: list[str]) -> None:
    """A tokenizer of whole words for the model under `path`."""
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0])
    PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model), unk_token=words[0]).save_pretrained(path)


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("draft")
    tiny_model("llama-tied", path)
    return path


WHOLE = "draft:kv=full,gamma=2 / self:kv=40,chunk=4,sinks=4,recent=8,gamma=3 / plain"


@pytest.mark.parametrize(
    ("arguments", "expected", "adaptive"),
    [
        ({}, "ngram / plain", True),
        ({"ladder": "plain"}, "plain", False),
        ({"ladder": "ngram"}, "ngram / plain", False),
        ({"ladder": "triforce", "kv_budget": 100}, "draft:model={} / self:kv=100 / plain", False),
        ({"kv_budget": 100}, "ngram / draft:model={} / self:kv=100 / plain", True),
        ({"ladder": Ladder((Rung(kind="self", kv=100), Rung(kind="plain")))}, "self:kv=100 / plain", False),
        ({"ladder": WHOLE}, WHOLE.replace("draft:", "draft:model={},"), False),
        ({"ladder": WHOLE, "verification": "maximal"}, WHOLE.replace("draft:", "draft:model={},"), False),
    ],
)
def test_ladders(directory: Path, draft: Path, arguments: dict[str, Any], expected: str, adaptive: bool) -> None:
    """What each name means, what the plan counts for it, and that greedy output is plain decoding's."""
    params = replace(PARAMS, temperature=0, max_tokens=40, ignore_eos=True)
    prompt = [5, 6, 7] * 15
    reference = LLM(directory, ladder="plain").generate(prompt, params)[0]
    llm = LLM(directory, draft=draft if "draft" in expected else None, **arguments)
    plan = llm.plan
    assert (plan.ladder_text, plan.adaptive) == (expected.format(draft), adaptive)
    [output] = llm.generate(prompt, params)
    assert output.outputs[0].token_ids == reference.outputs[0].token_ids

    executor: Any = llm.engine._executor
    views = [rung.view for rung in (*executor._lower, executor._top) if hasattr(rung, "view")]
    queries = plan.max_num_seqs * llm.spec.num_layers * llm.spec.num_heads * llm.spec.head_dim * 4
    queries *= executor._top.view.keep_queries
    assert plan.kv_bytes + plan.rung_kv_bytes == sum(view.bytes for view in views) + queries
    draft_bytes = LLM(draft, ladder="plain").plan.weight_bytes
    assert plan.rung_weight_bytes == (draft_bytes if "draft" in expected else 0)
    assert plan.margin_bytes >= 0


def test_a_rung_that_never_runs_is_noted(directory: Path) -> None:
    for gamma, noted in (("", True), (",gamma=2", False)):
        notes = LLM(directory, ladder=f"self:kv=100{gamma} / plain").plan.notes
        assert any("self:kv=100 never runs: 200 tokens" in note for note in notes) == noted
    assert not any("never runs" in note for note in LLM(directory, ladder="self:kv=63,recent=8 / plain").plan.notes)


def test_auto_leaves_plain_its_kv(directory: Path) -> None:
    """A rung whose caches would take more than a quarter of the KV that plain alone gets is left out, with both figures."""
    keywords: dict[str, Any] = {"max_num_seqs": 64, "block_size": 8}
    roomy = LLM(directory, **keywords).plan
    found = set()
    for blocks in (200, 800, 4000):
        keywords["host_memory"] = roomy.weight_bytes + roomy.work_bytes + blocks * 8 * roomy.kv_token_bytes
        alone, auto = LLM(directory, **keywords).plan, LLM(directory, kv_budget=100, **keywords).plan
        assert auto.kv_tokens >= 0.75 * alone.kv_tokens
        short = [note for note in auto.notes if "memory is too short" in note]
        assert bool(short) != ("self" in auto.ladder_text)
        assert all(note.endswith(f"without lower rungs {alone.kv_tokens}") for note in short)
        found.add(bool(short))
    assert found == {True, False}


def test_statistics_of_a_ladder(directory: Path, draft: Path) -> None:
    llm = LLM(directory, ladder=WHOLE, draft=draft)
    [output] = llm.generate([5, 6, 7] * 20, replace(PARAMS, max_tokens=30, ignore_eos=True))
    stats = json.loads(json.dumps(output.to_json()))["stats"]
    assert (stats["ladder"], stats["verification"]) == (llm.plan.ladder_text, "coupled")
    assert list(stats["time_s"]) == ["prefill", *stats["density"]] == ["prefill", "draft", "self", "plain"]
    assert list(stats["acceptance"]) == list(stats["acceptance_by_position"]) == ["draft", "self"]
    assert stats["density"] == dict.fromkeys(stats["density"], 1.0)
    assert stats["refreshes"]["self"] > 0
    assert len(stats["acceptance_by_position"]["draft"]) <= 2 and len(stats["acceptance_by_position"]["self"]) <= 3
    for rung, share in stats["acceptance"].items():
        assert min(stats["acceptance_by_position"][rung]) <= share <= max(stats["acceptance_by_position"][rung])
    assert stats["tokens_per_round"] == 29 / stats["rounds"]  # the first token came of the prefill
    assert sum(stats["time_s"].values()) > 0


def test_a_ladders_plan_stands_alone(directory: Path, draft: Path, tmp_path: Path) -> None:
    given = LLM(directory, ladder=WHOLE, draft=draft, verification="maximal")
    given.plan.save(tmp_path / "plan")
    planned = LLM(directory, plan=tmp_path / "plan")
    assert planned.plan == given.plan
    assert planned.generate([1, 2, 3], PARAMS)[0].outputs == given.generate([1, 2, 3], PARAMS)[0].outputs
    assert planned.plan.draft_fingerprints != []
    refused("other draft weights", model=directory, plan=replace(given.plan, draft_fingerprints=["0" * 16]))
    refused("other draft weights", model=directory, plan=replace(given.plan, draft_fingerprints=[]))


def test_a_draft_of_another_vocabulary_is_refused(directory: Path, tmp_path: Path) -> None:
    tiny_model("llama-tied", tmp_path, vocab_size=VOCAB + 3)
    refused(f"{VOCAB + 3} tokens", f"one of {VOCAB}", model=directory, draft=tmp_path)


def test_a_draft_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    words = [f"w{i}" for i in range(VOCAB)]
    target, same, other, bare = (tmp_path / name for name in ("target", "same", "other", "bare"))
    for path in (target, same, other, bare):
        tiny_model("llama-tied", path)
    tiny_tokenizer(target, words)
    tiny_tokenizer(same, words)
    tiny_tokenizer(other, [*words[:30], words[31], words[30], *words[32:]])
    for draft in (same, bare):
        assert LLM(target, draft=draft).plan.ladder[1].startswith("draft:")
    refused("token 30", "'w31'", "'w30'", str(other), model=target, draft=other)


def test_the_same_vocabulary_padded_to_another_size_is_refused(tmp_path: Path) -> None:
    words = [f"w{i}" for i in range(VOCAB - 4)]
    target, padded, longer = (tmp_path / name for name in ("target", "padded", "longer"))
    for path, size in ((target, VOCAB), (padded, VOCAB - 2), (longer, VOCAB - 2)):
        tiny_model("llama-tied", path, vocab_size=size)
        tiny_tokenizer(path, [*words, "more"] if path == longer else words)
    refused("padded to another size", f"{VOCAB} rows", model=target, draft=padded)
    refused(f"{VOCAB - 2} tokens", "this model's tokenizer", model=target, draft=longer)


def test_a_draft_that_cannot_be_opened_says_why_itself(directory: Path, tmp_path: Path) -> None:
    refused(f"the draft {tmp_path} cannot be opened", "holds no weights", "draft=MODEL", model=directory, draft=tmp_path)
    ladder = f"draft:model={tmp_path}/self:kv=100 / plain"
    refused("No model", "rungs are separated by ' / '", "' / self'", model=directory, ladder=ladder)
    tiny_model("llama-tied", tmp_path)
    (tmp_path / "config.json").write_text("{")
    refused("config.json", "not valid JSON", model=directory, draft=tmp_path)


def test_a_draft_that_cannot_stream(directory: Path, tmp_path: Path) -> None:
    """Learned positions cannot slide: `auto` keeps all of the draft's KV, a ladder that was spelled is refused."""
    tiny_model("opt", tmp_path)
    llm = LLM(directory, draft=tmp_path)
    assert llm.plan.ladder[1] == f"draft:model={tmp_path},kv=full"
    assert any("learned" in note for note in llm.plan.notes)
    params = replace(PARAMS, temperature=0)
    expected = LLM(directory, ladder="plain").generate([1, 2, 3], params)[0].outputs[0].token_ids
    assert llm.generate([1, 2, 3], params)[0].outputs[0].token_ids == expected
    refused("learned", "kv=full", model=directory, draft=tmp_path, ladder="draft / plain")


def test_auto_leaves_out_what_does_not_fit(directory: Path, draft: Path) -> None:
    plain = LLM(directory, ladder="plain", max_model_len=128, max_num_seqs=2).plan
    budget = plain.weight_bytes + plain.work_bytes + 5 * 64 * plain.kv_token_bytes
    keywords: dict[str, Any] = {"max_model_len": 128, "max_num_seqs": 2, "draft": draft, "kv_budget": 100}
    llm = LLM(directory, **keywords)
    assert [rung.split(":")[0] for rung in llm.plan.ladder] == ["ngram", "draft", "self", "plain"]
    llm = LLM(directory, host_memory=budget, **keywords)
    assert llm.plan.ladder == ["ngram", "plain"]
    assert sum("memory is too short" in note for note in llm.plan.notes) == 2
    refused("not enough memory", "the rungs of draft", "--ladder plain", model=directory, host_memory=budget,
            ladder="triforce", **keywords)  # fmt: skip


def test_a_failed_step_is_run_again(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in the middle of the layers, after some of them wrote K/V: a stream that was running gives its tokens all the same."""
    llm = LLM(str(directory))
    params = replace(PARAMS, ignore_eos=True)
    expected = llm.generate([5, 6, 7], params)[0].outputs[0].token_ids
    stream = llm.stream([5, 6, 7], params)
    tokens = next(stream).token_ids
    kv = llm.engine._executor._top.view  # type: ignore[attr-defined]
    attend = kv.attend

    def fail(layer: int, q: Any, heads: Any = None) -> Any:
        if layer == 1:
            raise RuntimeError("planted")
        return attend(layer, q, heads)

    monkeypatch.setattr(kv, "attend", fail)
    with pytest.raises(RuntimeError, match="planted"):
        llm.generate([[9]], PARAMS)
    monkeypatch.undo()
    for chunk in stream:
        tokens = tokens + chunk.token_ids
    assert tokens == expected
    llm.engine.check()
