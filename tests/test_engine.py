"""The engine on a tiny model: batches, chunks, preemption, stops, and that a request's tokens depend on the request alone."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import VOCAB, tiny_model

from rowcast.errors import OutOfMemoryError, UserError
from rowcast.placement.plan import Plan
from rowcast.placement.resident import resident_plan
from rowcast.runtime.checkpoint.safetensors_file import SafetensorsSource
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.decoder import Decoder
from rowcast.runtime.engine import Engine
from rowcast.runtime.executor import LocalExecutor
from rowcast.runtime.kv import PagedKV
from rowcast.runtime.ladder.model_runner import ModelRunner
from rowcast.runtime.model import load_decoder
from rowcast.runtime.params import SamplingParams
from rowcast.runtime.request import Request
from rowcast.runtime.sampler import Sampler
from rowcast.runtime.shard import Shard
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.step import SeqStep

EOS = 5
Model = tuple[ModelSpec, Decoder]


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    path: Path = tmp_path_factory.mktemp("llama")
    tiny_model("llama-gqa", path)
    spec = spec_from_config(json.loads((path / "config.json").read_text()))
    return spec, load_decoder(spec, SafetensorsSource.open(path), device=torch.device(request.param))


def make_engine(model: Model, *, blocks: int = 200, block_size: int = 4, eos: tuple[int, ...] = (), **changes: Any) -> Engine:
    spec, decoder = model
    device = decoder.device
    plan: Plan = resident_plan(
        spec, fingerprint="", dtype="float32", device="cpu", budget_bytes=1 << 30, block_size=block_size, max_num_seqs=16
    )
    plan = replace(plan, num_blocks=blocks, **changes)
    kv = PagedKV(spec, Shard(), num_blocks=blocks, block_size=block_size, dtype=torch.float32, device=device)
    top = ModelRunner("plain", decoder, kv, max_batch_tokens=plan.max_batch_tokens)
    return Engine(plan, spec, LocalExecutor(top, Sampler(spec.vocab_size, device)), eos_ids=eos)


def run(engine: Engine, *requests: Request) -> list[list[list[int]]]:
    """Step until all is done, checking for leaks after every step; each request's samples' tokens."""
    while engine.has_work:
        engine.step()
        engine.check()
    return [[s.output_ids for s in r.sequences] for r in requests]


def prompts(count: int, *, shortest: int = 1, longest: int = 40) -> list[list[int]]:
    rng = random.Random(count)
    return [[rng.randrange(VOCAB) for _ in range(rng.randint(shortest, longest))] for _ in range(count)]


GREEDY = SamplingParams(temperature=0, max_tokens=20)
SEEDED = SamplingParams(temperature=0.8, seed=11, max_tokens=20)


def alone(model: Model, each: list[list[int]], params: SamplingParams) -> list[list[int]]:
    found = []
    for prompt in each:
        engine = make_engine(model)
        found.append(run(engine, engine.add(prompt, params))[0][0])
    return found


@pytest.mark.parametrize("params", [GREEDY, SEEDED, replace(SEEDED, top_k=7, repetition_penalty=1.3, presence_penalty=0.4)])
def test_a_batch_gives_each_request_its_own_tokens(model: Model, params: SamplingParams) -> None:
    each = prompts(8)
    engine = make_engine(model, max_batch_tokens=24)  # the longer prompts are prefilled in chunks, between others' decoding
    batched = [out[0] for out in run(engine, *[engine.add(prompt, params) for prompt in each])]
    assert batched == alone(model, each, params)
    assert len({tuple(out) for out in batched}) > 1


@pytest.mark.parametrize("params", [GREEDY, SEEDED])
def test_requests_join_and_leave_between_steps(model: Model, params: SamplingParams) -> None:
    each = prompts(6)
    engine = make_engine(model)
    requests = []
    for prompt in each:
        requests.append(engine.add(prompt, params))
        engine.step()
        engine.step()
    run(engine)
    assert [r.sequences[0].output_ids for r in requests] == alone(model, each, params)


@pytest.mark.parametrize("params", [GREEDY, SEEDED, replace(SEEDED, frequency_penalty=0.5, min_tokens=4)])
def test_preemption_changes_nothing(model: Model, params: SamplingParams) -> None:
    each = prompts(8, shortest=10)
    engine = make_engine(model, blocks=20)  # 80 positions for 8 requests of up to 60
    requests = [engine.add(prompt, params) for prompt in each]
    assert [out[0] for out in run(engine, *requests)] == alone(model, each, params)
    assert sum(r.stats.preemptions for r in requests) > 0


def test_a_request_that_fills_the_memory_exactly_runs(model: Model) -> None:
    engine = make_engine(model, blocks=5)
    [[tokens]] = run(engine, engine.add([1] * 11, replace(GREEDY, max_tokens=10)))  # the 21st token needs no K/V
    assert len(tokens) == 10
    with pytest.raises(OutOfMemoryError, match="KV memory"):
        engine.add([1] * 11, replace(GREEDY, max_tokens=11))


def test_samples_of_one_request_differ_and_repeat(model: Model) -> None:
    params = replace(SEEDED, n=3)
    engine = make_engine(model)
    first, second = run(engine, engine.add([3, 4, 5], params), engine.add([3, 4, 5], params))
    assert first == second
    assert len({tuple(sample) for sample in first}) == 3
    assert first[0] == alone(model, [[3, 4, 5]], SEEDED)[0]


def test_requests_without_a_seed_get_different_ones(model: Model) -> None:
    params = SamplingParams(max_tokens=12)
    engine = make_engine(model)
    [first], [second] = run(engine, engine.add([3, 4, 5], params), engine.add([3, 4, 5], params))
    assert first != second
    again = make_engine(model)
    assert run(again, again.add([3, 4, 5], params)) == [[first]]


def test_end_of_text_and_stop_ids(model: Model) -> None:
    [free] = alone(model, [[9, 8, 7]], GREEDY)
    end = free[6]
    first = free.index(end)
    engine = make_engine(model, eos=(end,))
    ended = engine.add([9, 8, 7], GREEDY)
    ignored = engine.add([9, 8, 7], replace(GREEDY, ignore_eos=True))
    assert run(engine, ended, ignored) == [[free[: first + 1]], [free]]
    assert (ended.sequences[0].finish_reason, ended.sequences[0].stop_reason) == ("stop", None)
    assert ignored.sequences[0].finish_reason == "length"

    engine = make_engine(model)
    stopped = engine.add([9, 8, 7], replace(GREEDY, stop_token_ids=[end]))
    assert run(engine, stopped) == [[free[: first + 1]]]
    assert (stopped.sequences[0].finish_reason, stopped.sequences[0].stop_reason) == ("stop", end)

    engine = make_engine(model, eos=(end,))
    late = engine.add([9, 8, 7], replace(GREEDY, min_tokens=first + 4))
    [[tokens]] = run(engine, late)
    assert len(tokens) >= first + 4 and end not in tokens[: first + 4]


def test_generation_ends_at_the_context(model: Model) -> None:
    engine = make_engine(model, max_context=16)
    request = engine.add([1] * 10, replace(GREEDY, max_tokens=None))
    [[tokens]] = run(engine, request)
    assert len(tokens) == 6 and request.sequences[0].finish_reason == "length"
    assert run(engine, engine.add([1] * 15, GREEDY))[0][0] != []
    with pytest.raises(UserError, match="16"):
        engine.add([1] * 16, GREEDY)


def test_refused_requests_leave_nothing_behind(model: Model) -> None:
    engine = make_engine(model)
    for ids, params in (
        ([], GREEDY),
        ([VOCAB], GREEDY),
        ([-1], GREEDY),
        ([1], replace(GREEDY, logit_bias={VOCAB: 1.0})),
        ([1], replace(GREEDY, allowed_token_ids=[VOCAB])),
    ):
        with pytest.raises(UserError):
            engine.add(ids, params)
    assert not engine.has_work
    engine.check()


def test_abort_frees_everything_and_disturbs_nobody(model: Model) -> None:
    each = prompts(3, shortest=8)
    engine = make_engine(model)
    requests = [engine.add(prompt, SEEDED) for prompt in each]
    for _ in range(4):
        engine.step()
    engine.abort(requests[1])
    assert requests[1].sequences[0].finish_reason == "abort"
    outputs = run(engine, requests[0], requests[2])
    assert [out[0] for out in outputs] == alone(model, [each[0], each[2]], SEEDED)


@pytest.mark.parametrize("trial", range(12))
def test_prompt_logprobs_are_those_of_one_pass(model: Model, trial: int) -> None:
    """In chunks, and with preemptions at any moment of the prefill, each prompt token is reported once."""
    spec, decoder = model
    rng = random.Random(trial)
    prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(9, 30))]
    blocks, batch = (200, 6) if trial < 2 else (rng.randint(9, 14), rng.randint(3, 9))
    engine = make_engine(model, blocks=blocks, max_batch_tokens=batch, max_num_seqs=3)
    others = [engine.add([rng.randrange(VOCAB) for _ in range(4)], replace(GREEDY, max_tokens=20)) for _ in range(2)]
    request = engine.add(prompt, replace(GREEDY, max_tokens=4, prompt_logprobs=2, logprobs=1))
    run(engine, *others, request)

    kv = PagedKV(spec, Shard(), num_blocks=8, block_size=4, dtype=torch.float32, device=decoder.device)
    logits = decoder.logits(decoder.run([SeqStep(0, prompt, 0, list(range(8)), len(prompt), True)], kv))
    expected = logits.log_softmax(-1)
    found = request.prompt_logprobs
    assert found is not None
    assert len(found) == len(prompt)
    assert found[0] is None
    for i, entry in enumerate(found[1:]):
        assert entry is not None
        assert entry[prompt[i + 1]].logprob == pytest.approx(expected[i, prompt[i + 1]].item(), abs=1e-4)
        assert entry[int(expected[i].argmax())].rank == 1
    sample = request.sequences[0]
    assert len(sample.logprobs) == 4
    assert sample.logprobs[0][sample.output_ids[0]].logprob == pytest.approx(expected[-1].max().item(), abs=1e-4)


def test_bytes_read_add_up(model: Model) -> None:
    """Each pass reads the weights once, and each sequence its own entries; this model has no windows."""
    engine = make_engine(model)
    requests = [engine.add(prompt, GREEDY) for prompt in prompts(3)]
    passes, entries = 0, 0
    model[1].weights.reads()  # what other tests ran
    while engine.has_work:
        entries += sum(s.length for s in (*engine.scheduler.running, *engine.scheduler.waiting))
        engine.step()
        passes += 1
    total = sum(r.stats.bytes_read["host" if engine.plan.device == "cpu" else "gpu"] for r in requests)
    expected = passes * engine.plan.pass_bytes + entries * engine.plan.kv_token_bytes
    assert expected - 3 * passes <= total <= expected  # a pass is shared in whole bytes


class Recorder:
    """Notes what the engine asks of its executor."""

    def __init__(self, engine: Engine) -> None:
        self.steps: list[list[SeqStep]] = []
        executor = engine._executor
        step = executor.step

        def recorded(steps: Any) -> Any:
            self.steps.append(list(steps))
            return step(steps)

        executor.step = recorded  # type: ignore[method-assign]


@pytest.mark.parametrize(("sequences", "tokens"), [(2, 64), (3, 3), (16, 16)])
def test_a_step_keeps_to_its_bounds(model: Model, sequences: int, tokens: int) -> None:
    engine = make_engine(model, max_num_seqs=sequences, max_batch_tokens=tokens)
    seen = Recorder(engine)
    run(engine, *[engine.add(prompt, GREEDY) for prompt in prompts(8)])
    assert max(len(steps) for steps in seen.steps) == min(sequences, 8)
    assert max(sum(len(s.tokens) for s in steps) for steps in seen.steps) <= tokens


def test_who_was_preempted_goes_on_before_who_waits(model: Model) -> None:
    engine = make_engine(model, blocks=12, max_num_seqs=3)
    seen = Recorder(engine)
    run(engine, *[engine.add(prompt, GREEDY) for prompt in prompts(6, shortest=12, longest=20)])
    firsts: list[int] = []
    for steps in seen.steps:
        firsts += [s.seq_id for s in steps if s.seq_id not in firsts]
        ids = [s.seq_id for s in steps]
        assert ids == sorted(ids)  # the older come first, always
    assert firsts == sorted(firsts)


def test_truncation_keeps_the_end_of_the_prompt(model: Model) -> None:
    prompt = prompts(1, shortest=20, longest=20)[0]
    engine = make_engine(model, max_context=16)
    short, fits = (
        engine.add(prompt, replace(GREEDY, truncate_prompt_tokens=5)),
        engine.add(prompt, replace(GREEDY, truncate_prompt_tokens=-1)),
    )
    assert (short.prompt_ids, fits.prompt_ids) == (prompt[-5:], prompt[-15:])


def test_speed_counts_tokens_after_the_first_step(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which each step of a request ends a second after the one before."""
    ticks = itertools.count()
    monkeypatch.setattr("rowcast.runtime.request.time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    engine = make_engine(model)
    request = engine.add([1, 2], replace(SEEDED, n=4, max_tokens=1))
    run(engine, request)
    assert request.stats.tokens_per_s is None
    stats = request.stats
    assert (stats.generated_tokens, stats.rounds, stats.tokens_per_round) == (4, 0, 0.0)  # the prefill gave them
    request = engine.add([1, 2], replace(SEEDED, n=2, max_tokens=5))
    engine.step()
    assert request.stats.tokens_per_s is None
    run(engine, request)
    assert request.stats.tokens_per_s == 8 / 4


def test_a_refused_request_does_not_shift_the_others_seeds(model: Model) -> None:
    engine, other = make_engine(model), make_engine(model)
    with pytest.raises(UserError):
        engine.add([1], SamplingParams(logit_bias={VOCAB: 1.0}))
    seeds = [e.add([1], SamplingParams()).seed for e in (engine, other)]
    assert seeds[0] == seeds[1] > 1 << 32


def test_a_step_that_fails_late_has_committed_nothing(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    params = replace(SEEDED, repetition_penalty=1.2)
    [expected] = alone(model, [[5, 6, 7]], params)
    engine = make_engine(model)
    request = engine.add([5, 6, 7], params)
    for _ in range(3):
        engine.step()
    executor = engine._executor
    assert isinstance(executor, LocalExecutor)
    for name in ("_verdicts", "_prompt_logprobs"):

        def fail(*_: Any) -> None:
            raise RuntimeError("planted")

        with monkeypatch.context() as patch:
            patch.setattr(executor, name, fail)
            with pytest.raises(RuntimeError, match="planted"):
                engine.step()
        engine.check()
        engine.step()
    assert run(engine, request) == [[expected]]


@pytest.mark.parametrize("params", [GREEDY, SEEDED, replace(SEEDED, top_k=5), replace(SEEDED, top_p=0.5)])
def test_logits_that_are_not_numbers_end_in_a_sentence(
    model: Model, params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(model)
    request = engine.add([1, 2], params)
    monkeypatch.setattr(
        model[1], "own_logits", lambda hidden: torch.full((len(hidden), VOCAB), float("nan"), device=hidden.device)
    )
    with pytest.raises(UserError, match="not numbers"):
        engine.step()
    engine.abort(request)
    engine.check()
