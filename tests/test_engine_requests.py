"""What one request asks of an engine, beside others that ask for something else: who drafts for it, which law it has, what it reads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_offload_llm import away, shares
from test_sparse_ladder import calibrate
from tiny import VOCAB, tiny_model
from warm_ranks import WarmLauncher

from rowcast import LLM, SamplingParams
from rowcast.cluster.gang import Limits
from rowcast.errors import UserError
from rowcast.runtime.densities import Densities
from rowcast.runtime.engine import Engine
from rowcast.runtime.ladder.by_request import Choices
from rowcast.runtime.ladder.spec import Ladder
from rowcast.runtime.request import Request
from rowcast.runtime.step import RungCounts, SeqResult, SeqStep
from rowcast.runtime.stream import take_chunks

GREEDY = SamplingParams(temperature=0, max_tokens=12, detokenize=False, ignore_eos=True)
SEEDED = replace(GREEDY, temperature=0.8, seed=5)
PROMPTS = [[(7 * i + j * j) % VOCAB for j in range(5 + 6 * i)] for i in range(4)] + [[11, 12, 13, 14, 15] * 6] * 2
PARAMS = [GREEDY, SEEDED, SEEDED, GREEDY, GREEDY, GREEDY]
SPARSE, ROUNDED = "self:mlp=0.5,by=q4", "self:bits=4"
VIEW = "self:kv=24,chunk=4,sinks=4,recent=8"

Asked = Sequence[tuple[str | None, str | None]]
"""For each prompt: ladder and mode."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    tiny_model("llama-gqa", path)
    return path


def make(model: Path, ladder: str, **keywords: Any) -> LLM:
    return LLM(model, ladder=ladder, dtype="float32", device="cpu", block_size=4, progress=False, **keywords)


def run(engine: Engine, asked: Asked) -> list[Request]:
    """All prompts together."""
    requests = [
        engine.add(prompt, params, ladder=ladder, mode=mode)
        for prompt, params, (ladder, mode) in zip(PROMPTS, PARAMS, asked, strict=True)
    ]
    while engine.has_work:
        engine.step()
    engine.check()
    return requests


def tokens(requests: Sequence[Request]) -> list[list[int]]:
    return [request.sequences[0].output_ids for request in requests]


@pytest.fixture(scope="module")
def alone(model: Path) -> dict[str, list[list[int]]]:
    """What engines give whose ladder is one rung."""
    nothing = [(None, None)] * len(PROMPTS)
    found = {"plain": tokens(run(make(model, "plain").engine, nothing))}
    for rung in (SPARSE, ROUNDED):
        found[rung] = tokens(run(make(model, rung, mode="approximate").engine, nothing))
        assert all(one != other for one, other in zip(found[rung], found["plain"], strict=True))
    return found


def test_choices_of_a_ladder() -> None:
    choices = Choices(Ladder.parse(f"ngram / {VIEW} / {SPARSE},gamma=3 / self:bits=4 / plain"))
    assert choices.modes == ["exact", "approximate"] and choices.mode == "exact"
    names = ("ngram", VIEW, SPARSE, "self:bits=4", "plain")
    everything = choices.choose()
    assert everything.names == names and everything.drafters is None and everything.last is None
    for text, places in {
        "plain": [],
        "ngram / full": [0],
        f"ngram / {SPARSE} / plain": [0, 2],
        f"{VIEW}/{SPARSE},gamma=3/plain": [1, 2],
    }.items():
        found = choices.choose(text)
        assert found.drafters == [names[place] for place in places] and found.last is None
        assert found.ladder.rungs == (*(choices._ladder.rungs[place] for place in places), choices._ladder.rungs[-1])
    found = choices.choose(mode="approximate")
    assert found.last == "self:bits=4" and found.drafters is None and str(found.ladder).endswith("self:bits=4")
    found = choices.choose(f"ngram / {SPARSE}", "approximate")
    assert found.last == SPARSE and found.drafters == ["ngram"] and str(found.ladder) == f"ngram / {SPARSE}"
    assert Choices(Ladder.parse(f"ngram / {SPARSE}")).choose("self").names == ("self",)
    assert Choices(Ladder.parse(f"ngram / {SPARSE}")).choose(mode="exact").names == ("ngram", "plain")


@pytest.mark.parametrize(
    ("ladder", "text", "mode", "words"),
    [
        ("ngram / plain", "draft / plain", None, "'draft' in .* none of the rungs.* ladder is ngram / plain, mode exact"),
        ("ngram / plain", "plain / ngram", None, "does not end in plain; this server's ladder is ngram / plain"),
        ("ngram / plain", "", None, "does not end in plain"),
        ("ngram / plain", "ngram / ngram / plain", None, "'ngram' in .* none"),
        ("ngram / plain", "ngram:gamma=2 / plain", None, "'ngram:gamma=2' in"),
        ("ngram / plain", "auto", None, "does not end in plain"),
        (f"ngram / {SPARSE} / plain", "self / ngram / plain", None, "'ngram' in"),
        (f"ngram / {SPARSE} / plain", "ngram / self", "exact", "does not end in plain; .* modes exact and approximate"),
        (f"ngram / {SPARSE} / plain", "ngram / plain", "approximate", "does not end in self;"),
        (f"ngram / {VIEW} / plain", None, "approximate", "takes a sparse or low-bit rung .* mode exact: give"),
        (f"ngram / {ROUNDED}", None, "exact", "takes all of the model's weights; .* mode approximate: give"),
        ("plain", None, "fast", "mode='fast' is not known"),
    ],
)
def test_what_is_not_to_be_had(ladder: str, text: str | None, mode: str | None, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Choices(Ladder.parse(ladder)).choose(text, mode)


def test_rungs_that_were_not_asked_for_propose_nothing(model: Path, alone: dict[str, list[list[int]]]) -> None:
    """Gammas are pinned, so that every rung that may does draft."""
    llm = make(model, f"ngram:gamma=3 / {VIEW},gamma=4 / plain")
    texts = ["plain", "ngram / plain", "self / plain", f"ngram:gamma=3 / {VIEW} / plain", None, "ngram / plain"]
    step = llm.engine._executor.step
    ran: defaultdict[int, set[str]] = defaultdict(set)

    def noting(steps: Sequence[SeqStep]) -> list[SeqResult]:
        results = step(steps)
        for result in results:
            ran[result.seq_id] |= {name for name in result.rungs if name not in ("prefill", "plain")}
        return results

    llm.engine._executor.step = noting  # type: ignore[method-assign]
    requests = run(llm.engine, [(text, None) for text in texts])
    assert tokens(requests) == alone["plain"]
    allowed = [(), ("ngram",), ("self",), ("ngram", "self"), ("ngram", "self"), ("ngram",)]
    for request, names in zip(requests, allowed, strict=True):
        assert ran[request.sequences[0].seq_id] == set(names)
        assert request.stats.ladder.names == (*names, "plain")
        assert request.output().metrics.to_json()["ladder"] == str(request.stats.ladder)
    with pytest.raises(UserError, match="none of the rungs"):
        llm._add([1, 2], GREEDY, ladder="draft / plain")
    llm.engine.check()


def test_memory_stays_flat_where_nothing_may_draft(model: Path) -> None:
    """The controller, which nobody asks, is not told of rounds."""
    engine = make(model, "ngram / plain").engine
    run(engine, [("plain", None)] * len(PROMPTS))
    controller = engine._executor._lasts[0].controller  # type: ignore[attr-defined]
    assert not controller._passes


APPROXIMATE = "approximate"
MIXED: dict[str, tuple[str, Asked]] = {
    "one sparse": (f"ngram:gamma=2 / {SPARSE},gamma=3 / plain", [(None, APPROXIMATE), (None, None)] * 3),
    "controlled": (f"ngram / {SPARSE} / plain", [("self", APPROXIMATE), (None, APPROXIMATE), ("self / plain", None)] * 2),
    "three laws": (
        f"{SPARSE},gamma=2 / {ROUNDED},gamma=2 / plain",
        [
            (None, APPROXIMATE),
            (SPARSE, APPROXIMATE),
            (None, None),
            (SPARSE, APPROXIMATE),
            (ROUNDED, APPROXIMATE),
            ("plain", "exact"),
        ],
    ),
    "view below": (f"{VIEW},gamma=3 / {SPARSE},gamma=2 / plain", [(None, None), (None, APPROXIMATE), (SPARSE, APPROXIMATE)] * 2),
    "plain above": (f"ngram:gamma=3 / {SPARSE}", [(None, "exact"), (None, None), ("plain", "exact")] * 2),
}
"""Ladders, and what each prompt asks of them."""


def as_asked(requests: Sequence[Request], alone: dict[str, list[list[int]]]) -> set[str]:
    """Each has the tokens of an engine whose only rung is its last one. Returns these rungs."""
    lasts = [str(request.stats.ladder.rungs[-1]) for request in requests]
    for place, (request, last) in enumerate(zip(requests, lasts, strict=True)):
        assert tokens([request]) == [alone[last][place]], (place, last)
    return set(lasts)


@pytest.mark.parametrize(("name", "short"), [("three laws", False), *((name, True) for name in MIXED)])
def test_laws_in_one_batch(model: Path, alone: dict[str, list[list[int]]], name: str, short: bool) -> None:
    """With short memory sequences are preempted. Blocks of others are found, but only those that the same rung wrote."""
    ladder, asked = MIXED[name]
    llm = make(model, ladder, mode="exact" if ladder.endswith("plain") else APPROXIMATE)
    engine = llm.engine
    if short:
        engine = Engine(replace(llm.plan, num_blocks=20), llm.spec, engine._executor)
    for _ in range(2 if name == "three laws" else 1):
        requests = run(engine, asked)
        assert len(as_asked(requests, alone)) == (3 if name == "three laws" else 2)
        assert (sum(request.stats.preemptions for request in requests) > 0) == short
    for request, (_, mode) in zip(requests, asked, strict=True):
        assert request.stats.ladder.approximate == ((mode or llm.plan.mode) == APPROXIMATE)
        assert request.stats.names is not None and set(request.stats.rungs) <= {"prefill", *request.stats.names}
        assert request.stats.rungs[request.stats.names[-1]].tokens > 0


@pytest.mark.parametrize("above", [True, False])
def test_skipped_heads_decide_and_draft(tmp_path: Path, above: bool) -> None:
    """K/V of heads that drafts skip are late, and so are those of a last rung, but not of one that shares the store with plain."""
    tiny_model("llama-mha", tmp_path / "model")
    keywords = {"calibration": calibrate(tmp_path / "model", tmp_path / "calibration")}
    sparse = "self:mlp=0.6,by=dejavu,heads=0.5"
    asked: Asked = [(None, "exact"), (None, APPROXIMATE)] * 3
    last = run(make(tmp_path / "model", sparse, mode=APPROXIMATE, **keywords).engine, [(None, None)] * 6)
    plain = run(make(tmp_path / "model", "plain").engine, [(None, None)] * 6)
    if above:
        llm = make(tmp_path / "model", f"ngram:gamma=2 / {sparse}", mode=APPROXIMATE, **keywords)
    else:
        llm = make(tmp_path / "model", f"{sparse},gamma=2 / plain", **keywords)
    found = tokens(run(llm.engine, asked))
    assert found[::2] == tokens(plain)[::2] and found[1::2] == tokens(last)[1::2] != tokens(plain)[1::2]
    layers = llm.engine.densities.heads["self"]
    assert len(layers) == 2 and all(0.4 < share < 0.7 for share in layers)


@pytest.mark.parametrize("name", ["three laws", "plain above"])
def test_laws_over_parts_elsewhere(model: Path, alone: dict[str, list[list[int]]], name: str) -> None:
    """Weights and KV in host memory, as a GPU would have them."""
    ladder, asked = MIXED[name]
    plan = make(model, ladder, mode="exact" if ladder.endswith("plain") else APPROXIMATE).plan
    engine = LLM(model, plan=away(plan, shares(1, 2)), progress=False).engine
    assert len(as_asked(run(engine, asked), alone)) == (3 if name == "three laws" else 2)


@pytest.fixture(scope="module")
def launcher() -> Iterator[WarmLauncher]:
    started = WarmLauncher()
    yield started
    started.close()


def test_laws_on_two_ranks(launcher: WarmLauncher, model: Path, alone: dict[str, list[list[int]]]) -> None:
    """Ranks that fail are told again what each sequence had asked for."""
    ladder, asked = MIXED["plain above"]
    launcher.faults = [{1: "die@9"}]
    limits = Limits(start_s=60, step_s=20, silence_s=1.0)
    with make(model, ladder, mode=APPROXIMATE, tensor_parallel_size=2, launcher=launcher, limits=limits) as llm:
        requests = run(llm.engine, asked)
        assert as_asked(requests, alone) == {SPARSE, "plain"}
        assert llm.engine._executor.failures == 1  # type: ignore[attr-defined]
        assert llm.engine.densities.neurons["self"] == [pytest.approx(0.5, abs=0.03)] * 2


def test_plain_above_takes_no_memory(model: Path) -> None:
    """Its weights are those that the sparse rung chooses among."""
    executor = make(model, SPARSE, mode=APPROXIMATE).engine._executor
    sparse, plain = (last.runner for last in executor._lasts)  # type: ignore[attr-defined]
    assert plain.decoder.weights is sparse.decoder.weights._banks and plain.view is sparse.view


@pytest.mark.parametrize("ladder", ["plain", f"{SPARSE},gamma=2 / plain"])
def test_bytes_of_plain_decoding(model: Path, ladder: str) -> None:
    """What a plain ladder reads is what it is compared with, whatever the batch; a draft's passes come on top."""
    engine = make(model, ladder).engine
    requests = run(engine, [(None, None)] * len(PROMPTS))
    read, dense = (
        sum(counts) for counts in zip(*[(r.stats.bytes_read["host"], r.stats.dense_bytes) for r in requests], strict=True)
    )
    assert requests[0].output().metrics.to_json()["dense_bytes"] == requests[0].stats.dense_bytes
    if ladder == "plain":
        assert read == pytest.approx(dense, rel=1e-5)
    else:
        one = engine._dense.bytes(len(PROMPTS[0]), 1, 1)
        assert dense < read and requests[0].stats.dense_bytes < 12 * (one + 12 * engine.plan.kv_token_bytes)


def test_density_by_layer(model: Path) -> None:
    llm = make(model, f"{SPARSE},gamma=2 / plain")
    assert llm.engine.densities.neurons == {}
    [output] = llm.generate(PROMPTS[:1], GREEDY)
    counts = output.metrics.rungs["self"]
    assert len(counts.neurons_by_layer) == 2 and sum(counts.neurons_by_layer) == counts.neurons
    assert llm.engine.densities.neurons == {"self": [pytest.approx(counts.neurons / counts.neurons_of)] * 2}
    assert llm.engine.densities.heads == {} and counts.heads_by_layer == []


def test_densities_forget() -> None:
    found = Densities(2)

    def step(by_layer: list[int]) -> None:
        counts = RungCounts(tokens=64, neurons=sum(by_layer), neurons_of=200, neurons_by_layer=by_layer)
        found.step([SeqResult(0, [1], rungs={"self": counts, "plain": RungCounts(tokens=64, neurons_of=200)})])

    step([100])
    assert found.neurons == {"self": [1.0, 0.0]}
    step([0, 100])
    assert found.neurons == {"self": [pytest.approx(1 / 3), pytest.approx(2 / 3)]}


@pytest.mark.parametrize("n", [1, 2])
def test_chunks_for_whoever_steps_the_engine(model: Path, n: int) -> None:
    engine = make(model, "ngram:gamma=3 / plain").engine
    params = replace(SEEDED, n=n, logprobs=2, stop_token_ids=list(range(50, 60)))
    request = engine.add(PROMPTS[4], params)
    chunks = []
    while not request.finished:
        engine.step()
        chunks += take_chunks(request)
    assert take_chunks(request) == []
    output = request.output()
    assert chunks[-1].output == output and all(chunk.output is None for chunk in chunks[:-1])
    for sample in output.outputs:
        mine = [chunk for chunk in chunks if chunk.index == sample.index]
        assert [token for chunk in mine for token in chunk.token_ids] == sample.token_ids
        assert [entry for chunk in mine for entry in chunk.logprobs or ()] == sample.logprobs
        assert all(chunk.logprobs is not None and len(chunk.logprobs) == len(chunk.token_ids) for chunk in mine)
        assert mine[-1].finish_reason == sample.finish_reason and mine[-1].stop_reason == sample.stop_reason
    assert any(sample.stop_reason in range(50, 60) for sample in output.outputs)


def test_a_seed_is_all_that_another_engine_needs(model: Path) -> None:
    """Nothing of an engine is in what a request with a seed gets: its own seed, its number, what else it runs."""
    one, other = make(model, "plain", seed=1).engine, make(model, "ngram / plain", seed=2).engine
    derived = one.add(PROMPTS[0], replace(SEEDED, seed=None, n=2))
    other.add(PROMPTS[1], GREEDY)
    same = other.add(PROMPTS[0], replace(SEEDED, seed=derived.seed, n=2))
    for engine in (one, other):
        while engine.has_work:
            engine.step()
    assert [sample.output_ids for sample in same.sequences] == [sample.output_ids for sample in derived.sequences]
    assert same.seed == derived.seed != other.add(PROMPTS[0], replace(SEEDED, seed=None)).seed
