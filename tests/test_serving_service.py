"""The engine as a service: what comes out is what comes out offline, whoever leaves or has to wait meanwhile."""

from __future__ import annotations

import asyncio
import gc
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from service_harness import LONG, WAIT_S, Gate, Output, ask, expected, mix, offline_outputs, prompt, read, settled, until
from tiny import VOCAB

from rowcast import LLM, SamplingParams
from rowcast.errors import UserError
from rowcast.runtime.metrics import EngineMetrics, Exporter
from rowcast.serving.backend import Ask, Piece, ServingError
from rowcast.serving.service import EngineService, ServiceSettings

pytest_plugins = ["shared_engine", "shared_service"]


def test_forty_at_once_get_what_they_get_alone(service: EngineService, offline_llm: LLM, loop: asyncio.AbstractEventLoop) -> None:
    params = mix(40)

    async def all_of_them() -> list[Output]:
        return list(await asyncio.gather(*(ask(service, i, param, f"c{i % 3}") for i, param in enumerate(params))))

    found = loop.run_until_complete(all_of_them())
    assert found == offline_outputs(offline_llm, range(40), params)


def test_pieces(service: EngineService, offline_llm: LLM, loop: asyncio.AbstractEventLoop) -> None:
    params = SamplingParams(temperature=0.9, seed=3, logprobs=2, n=2, max_tokens=8, ignore_eos=True)

    async def stream() -> tuple[list[Piece], Output]:
        output, pieces = await read(await service.submit(Ask("r", "Once", params)))
        return pieces, output

    pieces, output = loop.run_until_complete(stream())
    [whole] = offline_llm.generate("Once", params)
    assert pieces[0].prompt_token_ids == list(whole.prompt_token_ids) and not any(piece.prompt_token_ids for piece in pieces[1:])
    for sample in whole.outputs:
        logprobs = [entry for piece in pieces if piece.index == sample.index for entry in piece.logprobs or []]
        assert [list(entry) for entry in logprobs] == [list(entry) for entry in sample.logprobs or []]
        assert len(logprobs) == len(output[sample.index][0])
    usage = pieces[-1].usage
    assert usage is not None and (usage.prompt_tokens, usage.generated_tokens) == (4, 16)
    assert usage.stats["seed"] == 3 and usage.stats["queued_s"] >= 0


def test_without_a_seed_no_two_are_alike(service: EngineService, loop: asyncio.AbstractEventLoop) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True)

    async def several() -> list[Output]:
        return list(await asyncio.gather(*(ask(service, 1, params) for _ in range(4))))

    assert len({tuple(output[0][0]) for output in loop.run_until_complete(several())}) == 4


def test_what_cannot_be_honoured_is_refused_at_once(service: EngineService, loop: asyncio.AbstractEventLoop) -> None:
    plain = SamplingParams()
    rejected = service._desk.counts.rejected
    wrong = [
        (Ask("r", [], plain), "no tokens"),
        (Ask("r", [VOCAB], plain), "outside the vocabulary"),
        (Ask("r", [1] * 2000, plain), "shorten the prompt"),
        (Ask("r", "x \ud800", plain), "not valid UTF-8"),
        (Ask("r", [1], SamplingParams(allowed_token_ids=[VOCAB])), "allowed_token_ids has token id"),
        (Ask("r", [1], SamplingParams(logit_bias={VOCAB: 1.0})), "logit_bias has token id"),
        (Ask("r", [1], plain, ladder="nothing / plain"), "none of the rungs"),
        (Ask("r", [1], plain, mode="approximate"), "mode=approximate"),
    ]
    for wrong_ask, words in wrong:
        with pytest.raises(UserError, match=words):
            loop.run_until_complete(service.submit(wrong_ask))
    assert service._desk.counts.rejected == rejected + len(wrong)
    cut = SamplingParams(truncate_prompt_tokens=-1, max_tokens=1)
    [(ids, _, _)] = loop.run_until_complete(ask(service, [1] * 2000, cut)).values()
    assert len(ids) == 1


def test_a_ladder_for_one_request(service: EngineService, offline_llm: LLM, loop: asyncio.AbstractEventLoop) -> None:
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)

    async def stream() -> tuple[Output, list[Piece]]:
        return await read(await service.submit(Ask("r", [3, 4, 5, 3, 4], params, ladder="plain")))

    output, pieces = loop.run_until_complete(stream())
    assert output == expected(offline_llm, [3, 4, 5, 3, 4], params)
    assert pieces[-1].usage is not None and pieces[-1].usage.stats["ladder"] == "plain"


def test_cancelled_requests_leave(service: EngineService, gate: Gate, loop: asyncio.AbstractEventLoop) -> None:
    async def leave() -> None:
        cancelled = service._desk.counts.cancelled
        running = [await service.submit(Ask("r", prompt(i), SamplingParams(**LONG))) for i in range(8)]
        await until(lambda: service._desk.load[:2] == (8, 0))
        waiting = [await service.submit(Ask("w", prompt(i), SamplingParams(**LONG))) for i in range(3)]
        assert service._desk.load[:2] == (8, 3)
        await waiting[1].aclose()  # type: ignore[attr-defined]
        assert service._desk.load[:2] == (8, 2), "a waiting one leaves at once"
        with pytest.raises(StopAsyncIteration):
            await waiting[1].__anext__()
        gate.open.set()
        await running[0].__anext__()
        for pieces in [*running, waiting[0], waiting[1]]:
            await pieces.aclose()  # type: ignore[attr-defined]
        await read(waiting[2])
        assert service._desk.counts.cancelled == cancelled + 10
        assert gate.steps < 150

    loop.run_until_complete(leave())


def test_a_dropped_iterator_cancels(service: EngineService, gate: Gate, loop: asyncio.AbstractEventLoop) -> None:
    async def drop() -> None:
        pieces = await service.submit(Ask("r", prompt(1), SamplingParams(**LONG)))
        await until(lambda: service._desk.load[0] == 1)
        del pieces
        gc.collect()
        gate.open.set()
        await settled(service)
        assert gate.steps < 5

    loop.run_until_complete(drop())


def test_a_reader_that_is_cancelled(service: EngineService, loop: asyncio.AbstractEventLoop) -> None:
    async def give_up() -> None:
        pieces = await service.submit(Ask("r", prompt(1), SamplingParams(**LONG)))

        async def reader() -> None:
            try:
                async for _ in pieces:
                    pass
            finally:
                await pieces.aclose()  # type: ignore[attr-defined]

        task = asyncio.ensure_future(reader())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await settled(service)

    loop.run_until_complete(give_up())


def test_a_slow_reader_gets_it_all_in_few_pieces(
    service: EngineService, offline_llm: LLM, loop: asyncio.AbstractEventLoop
) -> None:
    params = SamplingParams(temperature=0.9, seed=5, n=3, max_tokens=30, ignore_eos=True, logprobs=0)

    async def slow() -> tuple[Output, list[Piece]]:
        pieces = await service.submit(Ask("r", prompt(4), params))
        await settled(service)
        return await read(pieces)

    output, pieces = loop.run_until_complete(slow())
    assert output == expected(offline_llm, 4, params)
    assert len(pieces) == 3 and pieces[0].prompt_token_ids == prompt(4)
    assert all(len(piece.logprobs or []) == 30 for piece in pieces)


def test_too_many_wait(
    service: EngineService, gate: Gate, monkeypatch: pytest.MonkeyPatch, loop: asyncio.AbstractEventLoop
) -> None:
    monkeypatch.setattr(service, "settings", replace(service.settings, max_waiting=2))

    async def fill() -> None:
        params = SamplingParams(temperature=0, max_tokens=2)
        taken = [asyncio.ensure_future(ask(service, i, params)) for i in range(8)]
        await until(lambda: service._desk.load[:2] == (8, 0))
        taken += [asyncio.ensure_future(ask(service, i, params)) for i in range(2)]
        await until(lambda: service._desk.load[:2] == (8, 2))
        with pytest.raises(ServingError) as refused:
            await ask(service, 1, params)
        assert (refused.value.status, refused.value.code) == (429, "queue_full")
        assert refused.value.retry_after_s is not None and 1 <= refused.value.retry_after_s <= 60
        gate.open.set()
        await asyncio.gather(*taken)
        await ask(service, 1, params)

    loop.run_until_complete(fill())


def test_a_client_with_a_hundred_requests_does_not_delay_another(
    service: EngineService, gate: Gate, loop: asyncio.AbstractEventLoop
) -> None:
    async def race() -> int:
        finished: list[str] = []

        async def one(i: int, client: str) -> None:
            await ask(service, i, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), client)
            finished.append(client)

        greedy = [asyncio.ensure_future(one(i, "greedy")) for i in range(100)]
        await until(lambda: sum(service._desk.load[:2]) == 100)
        modest = asyncio.ensure_future(one(3, "modest"))
        await until(lambda: sum(service._desk.load[:2]) == 101)
        gate.open.set()
        await asyncio.gather(*greedy, modest)
        return finished.index("modest")

    assert loop.run_until_complete(race()) <= 16, "behind those that ran, before those that waited"


@pytest.mark.parametrize("runs", [True, False], ids=["running", "waiting"])
def test_deadlines(runs: bool, service: EngineService, gate: Gate, loop: asyncio.AbstractEventLoop) -> None:
    async def late() -> None:
        missed = service._desk.counts.missed
        held = [await service.submit(Ask("r", prompt(i), SamplingParams(**LONG))) for i in range(0 if runs else 8)]
        await until(lambda: service._desk.load[0] == len(held))
        pieces = await service.submit(Ask("late", prompt(1), SamplingParams(**LONG), deadline_s=0.05))
        with pytest.raises(ServingError) as told:
            await pieces.__anext__()
        assert (told.value.status, told.value.code) == (504, "deadline_exceeded")
        with pytest.raises(StopAsyncIteration):
            await pieces.__anext__()
        assert service._desk.counts.missed == missed + 1
        for other in held:
            await other.aclose()  # type: ignore[attr-defined]
        gate.open.set()

    loop.run_until_complete(late())


def test_a_deadline_that_is_met(service: EngineService, loop: asyncio.AbstractEventLoop) -> None:
    async def in_time() -> None:
        pieces = await service.submit(Ask("r", prompt(1), SamplingParams(temperature=0, max_tokens=2), deadline_s=WAIT_S))
        [taken] = service._desk.taken
        await read(pieces)
        assert taken.alarm is None, "the event loop would keep the request until then"

    loop.run_until_complete(in_time())


def test_the_page_gets_what_the_document_says(service: EngineService, loop: asyncio.AbstractEventLoop) -> None:
    loop.run_until_complete(ask(service, [3, 4, 5] * 10, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)))
    found = loop.run_until_complete(service.live())
    text = (Path(__file__).parents[1] / "docs" / "serving.md").read_text()
    section = text.partition("## What the page shows")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
    named = {name for first, _ in rows for name in re.findall(r"`(\w+)`", first)}
    assert named == set(found)
    for key in ("requests", "model", "kv", "failures"):
        [told] = [second for first, second in rows if f"`{key}`" in first]
        assert set(re.findall(r"`(\w+)`", told)) == set(found[key]), key
    ngram, plain = found["rungs"]
    assert (ngram["name"], plain["name"]) == ("ngram", "plain") and plain["total"]["tokens"] > 0
    assert service.slots == 8
    assert sum(found["memory"][0]["classes"].values()) == found["memory"][0]["budget_bytes"]
    assert found["bytes"]["read"] > 0 and found["bytes"]["dense"] > 0 and found["tokens_per_s"] > 0
    assert found["ttft_s"]["p99"] >= found["ttft_s"]["p50"] > 0


def test_metrics(service: EngineService, loop: asyncio.AbstractEventLoop) -> None:
    loop.run_until_complete(ask(service, 1, SamplingParams(max_tokens=2)))
    service.server_metrics.http("/v1/completions", 200)
    text = loop.run_until_complete(service.metrics()).decode()
    for line in (
        'rowcast_server_state{state="ready"} 1.0',
        "rowcast_server_queue 0.0",
        'rowcast_http_requests_total{route="/v1/completions",status="200"} 1.0',
        'rowcast_requests_running{replica="0"}',
    ):
        assert line in text, line
    assert float(re.findall(r"^rowcast_server_finished_total (\S+)$", text, re.MULTILINE)[0]) == service._desk.counts.finished


def test_another_exporter_gets_the_engines_metrics() -> None:
    class Recorder:
        def __init__(self) -> None:
            self.seen: list[tuple[str, float]] = []

        def add(self, name: str, amount: float, labels: Mapping[str, str]) -> None:
            self.seen.append((name, amount))

        set = observe = add

    made: list[Exporter] = []

    def make(exporter: Exporter) -> Any:
        made.append(exporter)
        raise UserError("no model")

    async def start() -> None:
        with pytest.raises(UserError, match="no model"):
            await service.start()
        with pytest.raises(ServingError):
            _ = service.slots

    recorder = Recorder()
    service = EngineService(make, ServiceSettings(name="x"), also=recorder)
    asyncio.run(start())
    EngineMetrics(made[0], memory="host").rank_failure()
    [(name, amount)] = recorder.seen
    assert amount == 1 and f'{name}_total{{replica="0"}} 1.0' in service.server_metrics.render().decode()


@pytest.mark.parametrize(("settings", "words"), [({"max_waiting": -1}, "max_waiting=-1"), ({"deadline_s": 0.0}, "deadline=0")])
def test_settings_that_cannot_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        ServiceSettings(name="x", **settings)
