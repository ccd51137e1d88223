"""Several ranks give the tokens of one, whatever the family, the ladder and the batch: float32, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import CASES, VOCAB, tiny_model
from warm_ranks import WarmLauncher

from rowcast import LLM, RequestOutput, SamplingParams
from rowcast.errors import UserError
from rowcast.runtime.progress import LoadProgress

GREEDY = SamplingParams(temperature=0, max_tokens=12, detokenize=False, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.8, seed=5, max_tokens=12, detokenize=False, ignore_eos=True)
PROMPTS = [[(7 * i + j * j) % VOCAB for j in range(5 + 3 * i)] for i in range(3)]
REPEATING = [[11, 12, 13, 14, 15] * 14, [3, 1, 4, 1, 5, 9, 2, 6] * 8]


@pytest.fixture(scope="module")
def launcher() -> Iterator[WarmLauncher]:
    started = WarmLauncher()
    yield started
    started.close()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    tiny_model("llama-gqa", path)
    return path


def found(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    return [[sample.token_ids for sample in output.outputs] for output in outputs]


def same_tokens(
    launcher: WarmLauncher, model: Path, prompts: list[list[int]], params: Any, *, world: int = 2, **arguments: Any
) -> tuple[list[RequestOutput], list[RequestOutput]]:
    """What one rank and what `world` ranks give, once it is known to be the same."""
    alone = LLM(model, dtype="float32", **arguments).generate(prompts, params)
    with LLM(model, dtype="float32", tensor_parallel_size=world, launcher=launcher, **arguments) as llm:
        together = llm.generate(prompts, params)
        llm.engine.check()
    assert found(together) == found(alone)
    return alone, together


@pytest.mark.parametrize("name", CASES)
def test_every_family(launcher: WarmLauncher, name: str, tmp_path: Path) -> None:
    tiny_model(name, tmp_path)
    same_tokens(launcher, tmp_path, [*PROMPTS, *PROMPTS], [GREEDY] * 3 + [SEEDED] * 3, ladder="plain")


@pytest.mark.parametrize(
    "ladder",
    [
        "ngram / plain",
        "ngram:gamma=3 / plain",
        "self:kv=40,sinks=8,recent=8,gamma=3 / plain",
        "self:kv=40,sinks=8,recent=8,view=eviction,gamma=2 / plain",
        "ngram:gamma=2 / self:kv=40,sinks=8,recent=8,gamma=4 / plain",
        "self:bits=8,gamma=2 / plain",
        "self:mlp=0.5,by=q4,gamma=3 / plain",
        "auto",
    ],
)
def test_ladders(launcher: WarmLauncher, llama: Path, ladder: str) -> None:
    prompts = [*REPEATING, [5, 6, 7] * 20]
    _, together = same_tokens(launcher, llama, prompts, [GREEDY, SEEDED, SEEDED], ladder=ladder)
    if "self" in ladder:
        assert any(output.metrics.acceptance for output in together)


def test_choices_by_the_clock_are_made_once(launcher: WarmLauncher, llama: Path) -> None:
    """Controllers that choose by chance, each rank's differently: the first rank's choices are everybody's."""
    launcher.faults = [{0: "whim", 1: "whim"}]
    _, together = same_tokens(
        launcher, llama, REPEATING * 2, [GREEDY, GREEDY, SEEDED, SEEDED], ladder="ngram / self:kv=40,sinks=8,recent=8 / plain"
    )
    assert any(output.metrics.acceptance for output in together)


def test_a_draft_is_whole_on_every_rank(launcher: WarmLauncher, llama: Path, tmp_path: Path) -> None:
    tiny_model("llama-mqa", tmp_path, num_hidden_layers=1)
    for ladder in (
        f"draft:model={tmp_path},gamma=3 / plain",
        f"draft:model={tmp_path},kv=50,gamma=2 / self:kv=40,sinks=8,recent=8,gamma=4 / plain",
    ):
        same_tokens(launcher, llama, REPEATING, [GREEDY, SEEDED], ladder=ladder)


def test_a_batch_with_parameters_of_many_kinds(launcher: WarmLauncher, llama: Path) -> None:
    base: dict[str, Any] = {"detokenize": False, "ignore_eos": True, "max_tokens": 15}
    params = [
        GREEDY,
        SamplingParams(temperature=1.1, seed=1, top_k=7, **base),
        SamplingParams(temperature=0.9, seed=2, top_p=0.7, n=3, **base),
        SamplingParams(temperature=0.7, seed=3, min_p=0.1, repetition_penalty=1.3, presence_penalty=0.5, **base),
        SamplingParams(temperature=0.6, seed=4, logit_bias={5: 2.5, 9: -3.0}, frequency_penalty=0.7, **base),
        SamplingParams(temperature=1.0, seed=5, allowed_token_ids=[1, 2, 3, 50], min_tokens=3, stop_token_ids=[2], **base),
        SamplingParams(temperature=1.0, logprobs=3, prompt_logprobs=2, **base),
    ]
    prompts = (PROMPTS * 3)[: len(params)]
    alone, together = same_tokens(
        launcher, llama, prompts, params, ladder="ngram / plain", max_num_batched_tokens=16, max_num_seqs=4, seed=3
    )
    ours, theirs = alone[-1].outputs[0].logprobs, together[-1].outputs[0].logprobs
    assert ours is not None and theirs is not None and len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert list(one) == list(other)
        assert [entry.logprob for entry in one.values()] == pytest.approx([entry.logprob for entry in other.values()], abs=1e-4)
    assert together[-1].prompt_logprobs is not None


def test_ranks_make_random_weights_alike(launcher: WarmLauncher, llama: Path) -> None:
    """From the shape of a config.json; each makes its own share."""
    model: Any = f"random:{llama / 'config.json'}"
    same_tokens(launcher, model, PROMPTS, GREEDY, ladder="ngram / plain")


def test_maximal_draws_the_same_on_all_ranks(launcher: WarmLauncher, llama: Path) -> None:
    """Its tokens depend on the batch and on timing; that ranks agree on them is checked in every round."""
    with LLM(
        llama,
        tensor_parallel_size=2,
        launcher=launcher,
        ladder="ngram / self:kv=40,sinks=8,recent=8 / plain",
        verification="maximal",
    ) as llm:
        outputs = llm.generate(REPEATING, SEEDED)
    assert all(len(output.outputs[0].token_ids) == 12 for output in outputs)


@pytest.mark.parametrize(("name", "world"), [("llama-gqa", 4), ("llama-gqa", 8), ("llama-mqa", 4), ("opt", 4), ("falcon-40b", 4)])
def test_more_ranks_and_shared_kv_heads(launcher: WarmLauncher, name: str, world: int, tmp_path: Path) -> None:
    tiny_model(name, tmp_path)
    if world <= 4:
        same_tokens(launcher, tmp_path, PROMPTS[:2], [GREEDY, SEEDED], world=world, ladder="ngram:gamma=2 / plain")
    else:
        same_tokens(launcher, tmp_path, PROMPTS[:1], replace(GREEDY, max_tokens=4), world=world, ladder="plain")


def test_one_bar_shows_what_all_ranks_load(launcher: WarmLauncher, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    placed: list[int] = []
    totals: list[int] = []
    monkeypatch.setattr(LoadProgress, "advance", lambda _, count: placed.append(count))
    monkeypatch.setattr(LoadProgress, "expect", lambda _, total: totals.append(total))
    with LLM(llama, tensor_parallel_size=2, launcher=launcher, ladder="plain") as llm:
        assert totals[-1] == 2 * llm.plan.weight_bytes
    assert 0.95 * totals[-1] < sum(placed) <= 1.01 * totals[-1]


def test_what_cannot_be_divided_is_refused(llama: Path) -> None:
    for world, words in ((3, "does not divide the model's 4 KV heads"), (0, "tensor_parallel_size=0"), (5000, "from 1 to")):
        with pytest.raises(UserError, match=words):
            LLM(llama, tensor_parallel_size=world)
    with pytest.raises(UserError, match="launcher='mpi'"):
        LLM(llama, tensor_parallel_size=2, launcher="mpi")


def test_bad_parameters_are_carried_back(launcher: WarmLauncher, llama: Path) -> None:
    with LLM(llama, tensor_parallel_size=2, launcher=launcher, ladder="plain") as llm:
        started = launcher.started
        with pytest.raises(UserError, match="ids end at 100"):
            llm.generate(PROMPTS[:1], SamplingParams(logit_bias={500: 1.0}, detokenize=False))
        assert found(llm.generate(PROMPTS[:1], GREEDY)) == found(LLM(llama, ladder="plain").generate(PROMPTS[:1], GREEDY))
        llm.engine.check()
        assert launcher.started == started
