"""Ladders on tiny models, end to end: the output is plain decoding's, whatever the rungs, the batch and the memory."""

from __future__ import annotations

import importlib
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCAB, tiny_model
from torch import Tensor

from rowcast import LLM, Plan, RequestOutput, SamplingParams
from rowcast.errors import UserError
from rowcast.runtime.kv import why_not_streaming
from rowcast.runtime.ladder.control import Controller

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
SEEDED = SamplingParams(temperature=0.8, seed=11, max_tokens=24, ignore_eos=True, detokenize=False)
PARAMS = {
    "greedy": GREEDY,
    "seeded": SEEDED,
    "truncated": replace(SEEDED, top_k=9, top_p=0.9, min_p=0.02),
    "penalised": replace(SEEDED, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.4),
    "edited": replace(SEEDED, min_tokens=9, stop_token_ids=list(range(0, 60, 2)), logit_bias={7: 2.0, 8: -3.0}),
    "greedy-penalised": replace(GREEDY, repetition_penalty=1.5, logit_bias={3: 1.0}),
}
SELF = "self:kv=24,chunk=4,sinks=4,recent=8"
LADDERS = {
    "ngram": "ngram:gamma=5 / plain",
    "retrieval": f"{SELF},gamma=3 / plain",
    "mean": f"{SELF},score=mean,refresh=2,gamma=4 / plain",
    "streaming": "self:kv=24,view=streaming,sinks=4,gamma=2 / plain",
    "eviction": "self:kv=24,view=eviction,sinks=4,recent=8,gamma=3 / plain",
    "draft": "draft:kv=48,sinks=4,gamma=3 / plain",
    "draft-full": "draft:kv=full,gamma=2 / plain",
    "triforce": f"draft:kv=48,sinks=4,gamma=2 / {SELF},gamma=5 / plain",
    "no-sinks": "draft:kv=40,sinks=0,gamma=3 / self:kv=24,chunk=4,sinks=0,recent=8,gamma=4 / plain",
    "four": f"ngram:gamma=2 / draft:kv=48,sinks=4,gamma=3 / {SELF},gamma=4 / plain",
    "controlled": f"ngram / draft:kv=48,sinks=4 / {SELF} / plain",
    "auto": "auto",
}


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A target, a bad draft (another random model) and a good one (the target, its weights disturbed)."""
    target, bad, good = (tmp_path_factory.mktemp(name) for name in ("target", "bad", "good"))
    tiny_model("llama-gqa", target)
    tiny_model("llama-tied", bad)
    disturbed_copy(target, good)
    return {"target": target, "bad": bad, "good": good}


def disturbed_copy(source: Path, path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in source.iterdir():
        if file.suffix == ".safetensors":
            generator = torch.Generator().manual_seed(5)
            tensors = {
                name: tensor + 0.1 * tensor.std() * torch.randn(tensor.shape, generator=generator)
                for name, tensor in load_file(file).items()
            }
            save_file(tensors, path / file.name, metadata={"format": "pt"})
        else:
            (path / file.name).write_bytes(file.read_bytes())


def make_llm(models: dict[str, Path], ladder: str, device: str = "cpu", draft: str = "good", **keywords: Any) -> LLM:
    if "draft" in ladder:
        keywords["draft"] = models[draft]
    keywords.setdefault("block_size", 4)
    return LLM(models["target"], dtype="float32", device=device, ladder=ladder, **keywords)


def prompts(count: int, shortest: int = 1, longest: int = 70) -> list[list[int]]:
    """Half of them repeat themselves."""
    rng = random.Random(count)
    found = []
    for i in range(count):
        period = rng.randint(3, 9) if i % 2 else longest
        piece = [rng.randrange(VOCAB) for _ in range(period)]
        found.append((piece * longest)[: rng.randint(shortest, longest)])
    return found


def ids(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    return [completion.token_ids for output in outputs for completion in output.outputs]


@pytest.fixture(scope="module")
def plain(models: dict[str, Path], device: str) -> dict[str, list[list[int]]]:
    """What plain decoding gives each prompt alone."""
    llm = make_llm(models, "plain", device)
    return {name: [ids(llm.generate(prompt, params))[0] for prompt in prompts(6)] for name, params in PARAMS.items()}


@pytest.mark.parametrize("ladder", LADDERS)
def test_coupled_output_is_plain_output(
    models: dict[str, Path], plain: dict[str, list[list[int]]], device: str, ladder: str
) -> None:
    """Token for token, in a batch of six with prompts of different lengths, under all sampling parameters; alone, under some."""
    llm = make_llm(models, LADDERS[ladder], device)
    for name, params in PARAMS.items():
        outputs = llm.generate(prompts(6), params)
        assert ids(outputs) == plain[name], name
        if name in ("greedy", "penalised"):
            assert ids(llm.generate(prompts(6)[3], params)) == [plain[name][3]], name
        llm.engine.check()
    mixed = [PARAMS[name] for name in PARAMS]
    assert ids(llm.generate(prompts(6), mixed)) == [plain[name][i] for i, name in enumerate(PARAMS)]
    if ladder not in ("auto", "controlled"):
        first = llm.plan.ladder[0].split(":")[0]
        stats = [output.metrics for output in outputs]
        assert sum(sum(s.rungs[first].judged) for s in stats if first in s.rungs) > 0
        assert all(s.rounds <= s.generated_tokens for s in stats)


@pytest.mark.parametrize(
    ("draft", "ladder"),
    [("none", "retrieval"), *((draft, ladder) for draft in ("good", "bad") for ladder in ("triforce", "four"))],
)
def test_maximal_is_exact_when_greedy_and_repeats_itself_by_seed(
    models: dict[str, Path], plain: dict[str, list[list[int]]], ladder: str, draft: str
) -> None:
    llm = make_llm(models, LADDERS[ladder], draft=draft, verification="maximal")
    for name in ("greedy", "greedy-penalised"):
        assert ids(llm.generate(prompts(6), PARAMS[name])) == plain[name]
    alone = [ids(llm.generate(prompt, SEEDED))[0] for prompt in prompts(6)]
    assert ids(llm.generate(prompts(6), SEEDED)) == alone  # gammas are pinned
    assert alone != plain["seeded"]
    assert all(0 <= token < VOCAB for tokens in alone for token in tokens)


def test_a_good_draft_is_accepted_more_often_than_a_bad_one(models: dict[str, Path]) -> None:
    rates = []
    for draft in ("good", "bad"):
        outputs = make_llm(models, LADDERS["draft-full"], draft=draft).generate(prompts(6), SEEDED)
        accepted = sum(sum(o.metrics.rungs["draft"].accepted) for o in outputs)
        rates.append(accepted / sum(sum(o.metrics.rungs["draft"].judged) for o in outputs))
    assert rates[0] > 0.5 > rates[1]


def test_a_view_of_everything_is_always_accepted(models: dict[str, Path]) -> None:
    """A retrieval rung whose budget holds the whole sequence is the plain model: nothing is ever rejected."""
    llm = make_llm(models, "self:kv=120,chunk=4,sinks=4,recent=8,gamma=4 / plain")
    for output in llm.generate(prompts(6), [replace(SEEDED, max_tokens=25)] * 6):
        counts = output.metrics.rungs["self"]
        assert counts.acceptance == 1.0
        assert output.metrics.tokens_per_round == pytest.approx(24 / 5)  # after the prefill's own: 5, 5, 5, 5 and what is left, 4


@pytest.mark.parametrize("ladder", ["retrieval", "triforce", "streaming", "draft-full", "four"])
@pytest.mark.parametrize("name", ["greedy", "penalised"])
def test_preemption_changes_nothing(models: dict[str, Path], plain: dict[str, list[list[int]]], ladder: str, name: str) -> None:
    """KV memory for two sequences or so, six to run."""
    plan = make_llm(models, LADDERS[ladder]).plan
    llm = LLM(models["target"], plan=replace(plan, num_blocks=40, max_context=120))
    outputs = llm.generate(prompts(6), PARAMS[name])
    assert ids(outputs) == plain[name]
    assert sum(output.metrics.preemptions for output in outputs) > 0
    llm.engine.check()


def test_more_sequences_than_places_for_drafts(models: dict[str, Path], plain: dict[str, list[list[int]]]) -> None:
    plan: Plan = make_llm(models, LADDERS["triforce"]).plan
    llm = LLM(models["target"], plan=replace(plan, speculating_seqs=2))
    engine = llm.engine
    requests = [engine.add(prompt, SEEDED) for prompt in prompts(6)]
    most = 0
    while engine.has_work:
        engine.step()
        engine.check()
        most = max(most, sum("self" in r.stats.rungs for r in requests if not r.finished))
    assert [request.sequences[0].output_ids for request in requests] == plain["seeded"]
    assert most == 2


def test_generation_ends_where_it_should(models: dict[str, Path]) -> None:
    """At max_tokens, at the context, at a stop token in the middle of an accepted draft; nothing comes after."""
    plain, llm = make_llm(models, "plain", max_model_len=64), make_llm(models, LADDERS["retrieval"], max_model_len=64)
    prompt = prompts(6)[1][:30] or [1]
    for tokens in range(1, 12):
        params = replace(SEEDED, max_tokens=tokens)
        [output] = llm.generate(prompt, params)
        assert ids([output]) == ids(plain.generate(prompt, params))
        assert output.outputs[0].finish_reason == "length"
    endless = replace(SEEDED, max_tokens=None)
    [output] = llm.generate(prompt, endless)
    assert ids([output]) == ids(plain.generate(prompt, endless)) and len(prompt) + len(ids([output])[0]) == 64
    free = ids([output])[0]
    for at in range(1, 20):
        params = replace(endless, stop_token_ids=[free[at]])
        [output] = llm.generate(prompt, params)
        assert ids([output]) == [free[: free.index(free[at]) + 1]]
        assert output.outputs[0].stop_reason == free[at]


def test_logprobs_are_those_of_plain_decoding(models: dict[str, Path]) -> None:
    params = replace(SEEDED, logprobs=3, prompt_logprobs=2)
    plain, llm = make_llm(models, "plain"), make_llm(models, LADDERS["triforce"])
    for expected, found in zip(plain.generate(prompts(4), params), llm.generate(prompts(4), params), strict=True):
        assert ids([found]) == ids([expected])
        for theirs, ours in (
            (expected.outputs[0].logprobs or [], found.outputs[0].logprobs or []),
            ((expected.prompt_logprobs or [])[1:], (found.prompt_logprobs or [])[1:]),
        ):
            assert len(ours) == len(theirs)
            for a, b in zip(theirs, ours, strict=True):
                assert a is not None and b is not None and list(a) == list(b)
                assert [x.logprob for x in a.values()] == pytest.approx([x.logprob for x in b.values()], abs=1e-4)
                assert [x.rank for x in a.values()] == [x.rank for x in b.values()]


def test_samples_of_one_request_differ_and_are_plain_ones(models: dict[str, Path]) -> None:
    params = replace(SEEDED, n=4)
    expected = ids(make_llm(models, "plain").generate(prompts(6)[5], params))
    assert ids(make_llm(models, LADDERS["triforce"]).generate(prompts(6)[5], params)) == expected
    assert len({tuple(sample) for sample in expected}) == 4


PLACES = {
    "inner forward": "rowcast.runtime.ladder.model_runner.ModelRunner.logits",
    "catching up": "rowcast.runtime.kv.StreamingKV.append",
    "last forward": "rowcast.runtime.kv.PagedKV.append",
    "verdict": "rowcast.runtime.ladder.coupled.Coupled.verify",
    "commit of a view": "rowcast.runtime.kv.PagedKV.commit",
    "commit of a summary": "rowcast.runtime.kv.summaries.Summaries.update",
    "control": "rowcast.runtime.ladder.control.Controller.observe_outcome",
    "commit of tokens": "rowcast.runtime.engine.Engine._commit",
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_round_leaves_nothing_behind(
    models: dict[str, Path], place: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever a round breaks off, and though a request is aborted then, the others go on to plain decoding's output."""
    params = replace(PARAMS["penalised"], n=1)
    expected = ids(make_llm(models, "plain").generate(prompts(6), params))
    engine = make_llm(models, LADDERS["triforce"]).engine
    requests = [engine.add(prompt, params) for prompt in prompts(6)]
    for _ in range(3):
        engine.step()
    owner, name = PLACES[place].rsplit(".", 1)
    module, kind = owner.rsplit(".", 1)
    found = getattr(importlib.import_module(module), kind)
    run, calls = getattr(found, name), 0

    def fails_once(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise error("planted")
        return run(*arguments, **keywords)

    monkeypatch.setattr(found, name, fails_once)
    failures = 0
    while engine.has_work:
        try:
            engine.step()
        except error:
            failures += 1
            if not requests[4].finished:
                engine.abort(requests[4])
        engine.check()
    assert failures == 1
    for i, request in enumerate(requests):
        if request.sequences[0].finish_reason != "abort":
            assert request.sequences[0].output_ids == expected[i], i


def test_a_draft_that_cannot_count_proposes_nothing(
    models: dict[str, Path], plain: dict[str, list[list[int]]], device: str
) -> None:
    """Its logits are NaN from some round on; the model's own are sound."""
    for verification in ("coupled", "maximal"):
        llm = make_llm(models, LADDERS["triforce"], device, verification=verification)
        executor: Any = llm.engine._executor
        draft = executor._lower[0]
        logits, calls = draft.logits, 0

        def broken(hidden: Tensor, logits: Any = logits) -> Tensor:
            nonlocal calls
            calls += 1
            found: Tensor = logits(hidden)
            return found if calls < 8 else torch.full_like(found, float("nan"))

        draft.logits = broken
        name = "penalised" if verification == "coupled" else "greedy"
        assert ids(llm.generate(prompts(6), PARAMS[name])) == plain[name]
        assert calls > 8


def test_a_model_that_cannot_count_is_an_error_and_not_the_end(
    models: dict[str, Path], plain: dict[str, list[list[int]]]
) -> None:
    llm = make_llm(models, LADDERS["retrieval"])
    executor: Any = llm.engine._executor
    logits, calls = executor._top.logits, 0

    def broken(hidden: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        found: Tensor = logits(hidden)
        return found if calls != 5 else torch.full_like(found, float("nan"))

    executor._top.logits = broken
    with pytest.raises(UserError, match="not numbers"):
        llm.generate(prompts(6), SEEDED)
    assert ids(llm.generate(prompts(6), SEEDED)) == plain["seeded"]


@pytest.mark.parametrize("ladder", ["draft:kv=full,gamma=3 / plain", "draft:kv=120,sinks=4,gamma=3 / plain"])
@pytest.mark.parametrize("limits", [{}, {"max_num_batched_tokens": 16, "max_num_seqs": 6}])
def test_a_draft_that_is_the_model_is_always_right(
    models: dict[str, Path], ladder: str, limits: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its cache went through: reading the prompt late and in pieces, rounds without it, preemption. Anything stale in its
    K/V would cost acceptance."""
    choose = Controller.choose

    def now_and_then(self: Controller, group: int, *, path: Any, **keywords: Any) -> tuple[int, ...]:
        found = choose(self, group, path=path, **keywords)
        return found if path.committed % 3 else (0,)

    monkeypatch.setattr(Controller, "choose", now_and_then)
    plan = LLM(models["target"], ladder=ladder, draft=models["target"], dtype="float32", block_size=4, **limits).plan
    for blocks in (400, 45):
        llm = LLM(models["target"], plan=replace(plan, num_blocks=blocks, max_context=120))
        requests = [llm.engine.add(prompt, SEEDED) for prompt in prompts(6)]
        while llm.engine.has_work:
            llm.engine.step()
            llm.engine.check()
        judged = [r.stats.rungs["draft"] for r in requests if "draft" in r.stats.rungs and r.stats.rungs["draft"].judged]
        assert judged and all(counts.acceptance == 1.0 for counts in judged)
        assert (sum(r.stats.preemptions for r in requests) > 0) == (blocks == 45)


@pytest.mark.parametrize("family", ["opt", "bloom", "falcon-rw", "qwen3-window", "llama-dynamic-grows", "mpt"])
@pytest.mark.parametrize("ladder", ["triforce", "eviction", "draft-full"])
def test_every_kind_of_position_and_window(tmp_path: Path, family: str, ladder: str) -> None:
    """The model drafts for itself, too, over a streaming cache where its positions are relative, else over all of its KV."""
    tiny_model(family, tmp_path)
    prompt = [ids_[:20] for ids_ in prompts(4)]
    plain = LLM(tmp_path, ladder="plain", dtype="float32", block_size=4)
    expected = ids(plain.generate(prompt, SEEDED))
    text = LADDERS[ladder].replace("kv=24", "kv=20")
    if why_not_streaming(plain.spec) is not None:
        text = text.replace("draft:kv=48,sinks=4", "draft:kv=full")
    llm = LLM(tmp_path, ladder=text, draft=tmp_path if "draft" in text else None, dtype="float32", block_size=4)
    outputs = llm.generate(prompt, SEEDED)
    assert ids(outputs) == expected
    assert sum(sum(c.accepted) for o in outputs for c in o.metrics.rungs.values()) > 0
