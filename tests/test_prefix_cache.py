"""Blocks shared by content: the output is that of an engine that shares none, nothing shared is written to, nothing leaks."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cluster_faults import LIMITS, executor, gone, pids
from test_offload_llm import away, shares
from test_scheduler import sequence
from test_sparse_ladder import calibrate
from test_speculation import disturbed_copy
from tiny import VOCAB, tiny_model
from warm_ranks import WarmLauncher

from rowcast import LLM, SamplingParams
from rowcast.errors import UserError
from rowcast.runtime.blocks import BlockPool
from rowcast.runtime.kv.hosted import HostedKV
from rowcast.runtime.kv.paged import PagedKV
from rowcast.runtime.metrics import TABLE, EngineMetrics
from rowcast.runtime.prefix_cache import PrefixCache, WrittenBy
from rowcast.runtime.request import Request

BASE: dict[str, Any] = {"detokenize": False, "ignore_eos": True, "max_tokens": 14}
PARAMS = [
    SamplingParams(temperature=0, **BASE),
    SamplingParams(temperature=0.9, seed=7, n=2, **BASE),
    SamplingParams(temperature=0.8, seed=8, repetition_penalty=1.2, logprobs=1, **BASE),
    SamplingParams(temperature=0, logit_bias={3: 1.0}, **BASE),
]
SIZE = 4
"""Tokens to a block."""


def tokens(count: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCAB) for _ in range(count)]


PROMPTS = [tokens(26) + tokens(2 * i + 1, i + 1) for i in range(3)] + [tokens(28)]
"""Of the last one all but the last token are whole blocks."""


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    target, draft = (tmp_path_factory.mktemp(name) for name in ("target", "draft"))
    tiny_model("llama-gqa", target)
    disturbed_copy(target, draft)
    return {"target": target, "draft": draft}


def make(model: Path, ladder: str = "plain", **arguments: Any) -> LLM:
    return LLM(model, **{"ladder": ladder, "dtype": "float32", "device": "cpu", "block_size": SIZE, **arguments})


def small(model: Path, blocks: int, ladder: str = "plain", **arguments: Any) -> LLM:
    """As `make`, with so few blocks of KV."""
    plan = make(model, ladder, **arguments).plan
    given = {name: value for name, value in arguments.items() if name in ("calibration", "prefix_cache", "prefill_stall_s")}
    return LLM(model, plan=replace(plan, num_blocks=blocks, max_context=64, max_num_seqs=6), **given)


def ids(request: Request) -> list[list[int]]:
    return [sample.output_ids for sample in request.sequences]


class Watch:
    """Bytes of the blocks that are known by their content: as long as a block has its name, they do not change."""

    def __init__(self, llm: LLM) -> None:
        self._engine = llm.engine
        view = llm.engine._executor._top.view  # type: ignore[attr-defined]
        assert isinstance(view, PagedKV)
        self._view = view
        self._seen: dict[bytes, tuple[int, torch.Tensor]] = {}

    def look(self) -> None:
        pool, view = self._engine.scheduler.pool, self._view
        now = {}
        for name, block in pool._named.items():
            parts = [view._keys[:, block], view._values[:, block]]
            parts += [summaries.kept[:, :, :, block] for summaries in view._summaries.values()]
            if isinstance(view, HostedKV):
                two, layers, heads, _, width = view._entries.shape
                parts.append(view._entries.view(two, layers, heads, -1, SIZE, width)[:, :, :, block])
            now[name] = block, torch.cat([part.flatten().cpu() for part in parts])
            before = self._seen.get(name)
            if before is not None and before[0] == block:
                assert torch.equal(before[1], now[name][1]), f"block {block} is shared and was written to"
        self._seen = now


def run(llm: LLM, requests: Sequence[Request]) -> list[list[list[int]]]:
    """Step until all is done, and look for leaks and writes after every step."""
    watch = Watch(llm)
    while llm.engine.has_work:
        llm.engine.step()
        llm.engine.check()
        watch.look()
    return [ids(request) for request in requests]


def turns(llm: LLM) -> tuple[list[list[list[int]]], list[Request]]:
    """Prompts that begin alike, twice, and a second turn of each: the prompt, its answer and more."""
    engine = llm.engine
    requests = [engine.add(prompt, params) for prompt, params in zip(PROMPTS, PARAMS, strict=True)]
    found = run(llm, requests)
    again = [engine.add(request.prompt_ids + ids(request)[0] + tokens(3, 9), PARAMS[0]) for request in requests]
    again += [engine.add(prompt, params) for prompt, params in zip(PROMPTS, PARAMS, strict=True)]
    found += run(llm, again)
    return found, [*requests, *again]


@pytest.fixture(scope="module")
def plain(models: dict[str, Path], device: str) -> list[list[list[int]]]:
    return turns(make(models["target"], prefix_cache=False, device=device))[0]


SELF = "self:kv=24,chunk=4,sinks=4,recent=8"
LADDERS = {
    "plain": "plain",
    "ngram": "ngram:gamma=3 / plain",
    "retrieval": f"{SELF},gamma=3 / plain",
    "streaming": "self:kv=24,view=streaming,sinks=4,gamma=2 / plain",
    "eviction": "self:kv=24,view=eviction,sinks=4,recent=8,gamma=2 / plain",
    "shared": "self:mlp=0.5,gamma=3 / plain",
    "draft": "draft:kv=48,sinks=4,gamma=3 / plain",
    "draft-full": f"draft:kv=full,gamma=2 / {SELF},gamma=3 / plain",
}


@pytest.mark.parametrize("ladder", LADDERS)
def test_output_is_that_without_the_cache(
    models: dict[str, Path], plain: list[list[list[int]]], device: str, ladder: str
) -> None:
    draft = {"draft": models["draft"]} if "draft" in ladder else {}
    llm = make(models["target"], LADDERS[ladder], device=device, **draft)
    found, requests = turns(llm)
    assert found == plain
    # Of the first four the later ones wait for what the first one runs; at most the prompt's last token has to be run.
    assert [request.stats.cached_tokens for request in requests] == [0, 24, 24, 24, 40, 40, 44, 40, 24, 28, 28, 24]
    if ladder != "plain":
        assert any(counts.proposed for request in requests[4:] for counts in request.stats.rungs.values())
    cache = llm.engine.scheduler.cache
    assert cache is not None and 0 < cache.hit_tokens < cache.asked_tokens


@pytest.mark.parametrize("ladder", ["plain", "draft-full"])
def test_a_small_pool_changes_nothing(models: dict[str, Path], plain: list[list[list[int]]], device: str, ladder: str) -> None:
    """KV memory for two sequences or so: blocks are evicted, sequences preempted, and find some of theirs again."""
    draft = {"draft": models["draft"]} if "draft" in ladder else {}
    llm = small(models["target"], 26, LADDERS[ladder], device=device, **draft)
    found, requests = turns(llm)
    assert found == plain
    assert sum(request.stats.preemptions for request in requests) > 0
    assert any(request.stats.cached_tokens for request in requests)


@pytest.mark.parametrize("name", ["mistral-window", "llama-mqa", "bloom", "llama-dynamic"])
def test_families(tmp_path: Path, name: str) -> None:
    """Windows, one KV head, ALiBi, and frequencies that go by the prompt's length, where prompts of other lengths share nothing."""
    tiny_model(name, tmp_path)
    most: dict[str, Any] = {} if name != "llama-dynamic" else {"max_model_len": 64}
    expected, _ = turns(make(tmp_path, prefix_cache=False, **most))
    found, requests = turns(make(tmp_path, **most))
    assert found == expected
    cached = [request.stats.cached_tokens for request in requests]
    assert cached[8:] == [24, 28, 28, 24]
    assert cached[1:4] == ([24, 24, 24] if name != "llama-dynamic" else [0, 0, 0])


def test_random_histories(models: dict[str, Path]) -> None:
    """Requests join, are aborted and preempted; they begin as what ran before or runs now; with a limit on prefills and without."""
    alone = make(models["target"], prefix_cache=False)
    for trial in range(3):
        rng = random.Random(trial)
        llm = small(models["target"], rng.choice([24, 40]), rng.choice(["plain", "ngram:gamma=2 / plain"]), **_limits(trial))
        watch, requests, texts = Watch(llm), [], [tokens(40, trial)]
        for _ in range(70):
            if rng.random() < 0.3:
                text = rng.choice(texts)[: rng.randint(1, 40)] + tokens(rng.randint(0, 6), rng.randrange(3))
                params = replace(rng.choice(PARAMS), max_tokens=rng.randint(1, 9))
                requests.append(llm.engine.add(text, params))
            if requests and rng.random() < 0.05:
                llm.engine.abort(rng.choice(requests))
            if llm.engine.has_work:
                llm.engine.step()
            llm.engine.check()
            watch.look()
            texts += [r.prompt_ids + ids(r)[0] for r in requests[-2:] if r.finished]
        run(llm, requests)
        whole = [r for r in requests if all(s.finish_reason == "length" for s in r.sequences)]
        assert len(whole) > len(requests) // 2 and sum(r.stats.cached_tokens for r in whole) > 100
        expected = alone.generate([r.prompt_ids for r in whole], [replace(r.params, seed=r.seed) for r in whole])
        assert [ids(r) for r in whole] == [[s.token_ids for s in output.outputs] for output in expected]


def _limits(trial: int) -> dict[str, Any]:
    return {"prefill_stall_s": 0.001} if trial % 2 else {}


def test_samples_share_their_prompt(models: dict[str, Path]) -> None:
    """They wait until the first one has run it. An exporter is told."""
    told: Counter[str] = Counter()

    class Exporter:
        def add(self, name: str, amount: float, labels: Mapping[str, str]) -> None:
            told[name] += int(amount)

        def set(self, name: str, value: float, labels: Mapping[str, str]) -> None:
            told[name] = int(value)

        def observe(self, name: str, value: float, labels: Mapping[str, str]) -> None:
            pass

    llm = make(models["target"])
    llm.engine.metrics = EngineMetrics(Exporter(), memory="host")
    request = llm.engine.add(tokens(17), replace(PARAMS[1], n=5))
    run(llm, [request])
    assert request.stats.rungs["prefill"].tokens == 17 and request.stats.cached_tokens == 0
    assert llm.engine.scheduler.pool.cached_blocks == 4 + 5 * 3  # 30 positions have K/V, 4 blocks are the prompt's
    names = [f"rowcast_prefix_cache_{name}" for name in ("queries", "hits", "blocks")]
    assert [told[name] for name in names] == [5 * 17, 4 * 16, 19] and {metric.name for metric in TABLE} >= set(names)


def test_a_prompt_whose_log_probabilities_are_wanted_is_run(models: dict[str, Path]) -> None:
    params = replace(PARAMS[1], prompt_logprobs=1, max_tokens=2)
    expected = make(models["target"], prefix_cache=False).generate(PROMPTS[2], params)[0].prompt_logprobs
    for blocks in (200, 13):  # the smaller pool preempts it in mid-prompt, and then it goes on where it was
        llm = small(models["target"], blocks)
        requests = [llm.engine.add(PROMPTS[2], params) for _ in range(2)]
        requests[1:1] = [llm.engine.add(tokens(5, 5), PARAMS[0])]
        run(llm, requests)
        for request in (requests[0], requests[2]):
            assert request.stats.cached_tokens == 0
            found = request.prompt_logprobs
            assert found is not None and expected is not None and len(found) == len(expected)
            for mine, theirs in zip(found[1:], expected[1:], strict=True):
                assert mine is not None and theirs is not None
                assert {token: entry.logprob for token, entry in mine.items()} == pytest.approx(
                    {token: entry.logprob for token, entry in theirs.items()}, abs=1e-4
                )


@pytest.mark.parametrize("ladder", ["self:mlp=0.3,by=q4", "ngram:gamma=2 / self:bits=4"])
def test_approximate_output_depends_on_the_request_alone(models: dict[str, Path], device: str, ladder: str) -> None:
    """What was generated sparsely is not taken for a part of a prompt, which all weights read."""
    expected, _ = turns(make(models["target"], ladder, mode="approximate", prefix_cache=False, device=device))
    for llm in (
        make(models["target"], ladder, mode="approximate", device=device),
        small(models["target"], 26, ladder, mode="approximate", device=device),
    ):
        found, requests = turns(llm)
        assert found == expected
        if not any(request.stats.preemptions for request in requests):  # of the second turns the first prompt is known, no more
            assert [request.stats.cached_tokens for request in requests[4:]] == [24, 28, 28, 28, 24, 28, 28, 24]


def test_entries_that_come_late_are_not_shared(tmp_path: Path, device: str) -> None:
    """A last rung that skips heads completes the K/V of generated tokens later: only prompts are shared."""
    tiny_model("opt", tmp_path / "model", max_position_embeddings=64)
    ladder, calibration = "self:mlp=0.4,by=dejavu,heads=0.5", calibrate(tmp_path / "model", tmp_path / "calibration")
    arguments: dict[str, Any] = {"mode": "approximate", "calibration": calibration, "device": device}
    expected, _ = turns(make(tmp_path / "model", ladder, prefix_cache=False, **arguments))
    for blocks in (200, 26):
        llm = small(tmp_path / "model", blocks, ladder, **arguments)
        assert llm.engine._executor._top.view.lazy  # type: ignore[attr-defined]
        found, requests = turns(llm)
        assert found == expected
        if blocks == 200:
            assert [request.stats.cached_tokens for request in requests[4:]] == [24, 28, 28, 28, 24, 28, 28, 24]
            assert llm.engine.scheduler.pool.cached_blocks < 30
        else:
            assert sum(request.stats.preemptions for request in requests) > 0


def test_entries_in_host_memory(models: dict[str, Path], plain: list[list[list[int]]], device: str) -> None:
    plan = make(models["target"], f"{SELF},gamma=3 / plain", device=device).plan
    plan = away(replace(plan, num_blocks=40, max_context=64), shares(3, 2, KV=("resident", "streamed")))
    llm = LLM(models["target"], plan=plan, progress=False)
    assert isinstance(llm.engine._executor._top.view, HostedKV)  # type: ignore[attr-defined]
    found, requests = turns(llm)
    assert found == plain
    assert sum(request.stats.cached_tokens for request in requests) > 100


@pytest.fixture(scope="module")
def launcher() -> Iterator[WarmLauncher]:
    started = WarmLauncher()
    yield started
    started.close()


def test_two_ranks_and_what_a_lost_gang_leaves(
    models: dict[str, Path], launcher: WarmLauncher, plain: list[list[list[int]]]
) -> None:
    """Nothing: the first step after it is lost, and the blocks are filled again."""
    with make(models["target"], "ngram:gamma=3 / plain", tensor_parallel_size=2, launcher=launcher, limits=LIMITS) as llm:
        engine = llm.engine

        def told() -> list[int]:
            requests = [engine.add(prompt, params) for prompt, params in zip(PROMPTS, PARAMS, strict=True)]
            while engine.has_work:
                engine.step()
                engine.check()
            assert [ids(request) for request in requests] == plain[:4]
            return [request.stats.cached_tokens for request in requests]

        assert told() == [0, 24, 24, 24]
        assert told() == [24, 28, 28, 24]
        for while_idle in (True, False):
            found, cached = pids(llm), engine.scheduler.pool.cached_blocks
            assert cached
            if not while_idle:
                engine.add(PROMPTS[0], PARAMS[0])
                engine.step()
            os.kill(found[1], signal.SIGKILL)
            assert gone(found[1:], 10)
            if while_idle:
                executor(llm).look()
            assert told()[0] in (0, 24)  # as it was admitted once in vain
            assert executor(llm).failures == 1 + (not while_idle)
            assert told() == [24, 28, 28, 24]


def test_a_failed_step_leaves_nothing(models: dict[str, Path], plain: list[list[list[int]]]) -> None:
    llm = make(models["target"])
    run(llm, [llm.engine.add(PROMPTS[0], PARAMS[0])])
    pool, broken = llm.engine.scheduler.pool, llm.engine._executor.step

    def fail(_: object) -> Any:
        raise UserError("as was asked for")

    llm.engine._executor.step = fail  # type: ignore[method-assign, assignment]
    request = llm.engine.add(PROMPTS[0], PARAMS[0])
    with pytest.raises(UserError, match="asked for"):
        llm.engine.step()
    assert not pool.cached_blocks
    llm.engine._executor.step = broken  # type: ignore[method-assign]
    assert run(llm, [request]) == [plain[0]]


def test_it_can_be_left_out(models: dict[str, Path]) -> None:
    llm = make(models["target"], prefix_cache=False)
    _, requests = turns(llm)
    assert not any(request.stats.cached_tokens for request in requests) and llm.engine.scheduler.cache is None
    with pytest.raises(UserError, match="prefix_cache='yes' has to be True or False"):
        make(models["target"], prefix_cache="yes")


def test_who_was_used_longest_ago_goes_first() -> None:
    pool = BlockPool(6)
    old, new = pool.take(3), pool.take(2)
    for block in (*old, *new):
        pool.name(block, bytes([block]))
    kept = list(new)
    pool.give_back(old)
    pool.give_back(new)
    assert (pool.free_blocks, pool.cached_blocks) == (6, 5)
    pool.share([0])  # the first of the old ones is used again
    assert pool.take(1) == [5]  # what nobody knows goes first
    assert pool.take(2) == [1, 2]  # then the old ones, the end of a sequence before its beginning
    assert [pool.find(bytes([block])) for block in range(5)] == [0, None, None, *kept]
    pool.check()
    newest = pool.take(1)
    assert newest == [kept[1]]
    pool.name(newest[0], bytes([0]))  # another has the name
    assert pool.find(bytes([0])) == 0 and pool.name_of(newest[0]) is None
    pool.forget_names()
    pool.give_back(newest)
    pool.check()
    assert pool.cached_blocks == 0 and pool.free_blocks == 2


def test_a_name_is_that_of_all_tokens_before() -> None:
    """And of who wrote them: equal keys share, others do not."""
    pool = BlockPool(20)

    plain = WrittenBy("plain")

    def known(prompt: list[int], *, key: str | None = "", by: WrittenBy = plain) -> int:
        seq = sequence(0, 0)
        seq.request.prompt_ids, seq.request.cache_key = prompt, key
        return len(PrefixCache(pool, SIZE, by).find(seq))

    cache = PrefixCache(pool, SIZE, plain)
    seq = sequence(0, 0)
    seq.request.prompt_ids = list(range(13))
    seq.blocks, seq.computed = pool.take(4), 13
    cache.filled(seq)
    assert known(list(range(13))) == known(list(range(20))) == 3
    assert known(list(range(12))) == 2  # the last token has to be run
    assert known(list(range(8)) + [9] * 9) == 2
    assert known([1, *range(1, 13)]) == 0
    assert known(list(range(13)), key="self") == known(list(range(13)), key=None) == 0
    assert known(list(range(13)), by=WrittenBy("self")) == 0
    assert known(list(range(13)), by=WrittenBy("plain", stretches_from=20)) == 3
    assert known(list(range(13)), by=WrittenBy("plain", stretches_from=12)) == 0
