"""The engine as a service: ranks that die, models that do not come back, steps and texts that fail, and a server that ends."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from service_harness import LONG, WAIT_S, Gate, Output, ask, expected, mix, offline_outputs, service_of, settled, until
from warm_ranks import WarmLauncher

from rowcast import LLM, SamplingParams
from rowcast.errors import GangError, OutOfMemoryError, UserError
from rowcast.runtime.detokenizer import Detokenizer
from rowcast.serving.backend import Ask, ServingError
from rowcast.serving.service import EngineService

pytest_plugins = ["shared_engine", "shared_service"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_a_rank_that_is_gone_changes_nothing(
    number: signal.Signals, service: EngineService, offline_llm: LLM, loop: asyncio.AbstractEventLoop
) -> None:
    params = [replace(param, max_tokens=30) for param in mix(12)]
    states: list[str] = []

    async def under_load() -> list[Output]:
        failures = service._desk.counts.rank_failures
        tasks = [asyncio.ensure_future(ask(service, i, param)) for i, param in enumerate(params)]
        await until(lambda: any(taken.first_token_s for taken in service._desk.taken))
        [victim] = service.rank_pids
        os.kill(victim, number)
        await until(lambda: service.state()[0] == "recovering")
        during = asyncio.ensure_future(ask(service, 99, params[0]))
        await until(lambda: service.state()[0] == "ready")
        states.append(service.state()[0])
        assert service.rank_pids != [victim] and service._desk.counts.rank_failures == failures + 1
        return list(await asyncio.gather(*tasks, during))

    found = loop.run_until_complete(under_load())
    assert found == offline_outputs(offline_llm, [*range(12), 99], [*params, params[0]])


def test_a_rank_that_dies_idle_is_started_again(service: EngineService, loop: asyncio.AbstractEventLoop) -> None:
    async def idle() -> None:
        await settled(service)
        [victim] = service.rank_pids
        os.kill(victim, signal.SIGKILL)
        await until(lambda: bool(service.rank_pids) and service.rank_pids != [victim])
        await settled(service)

    loop.run_until_complete(idle())


def test_ranks_that_fail_too_often(service: EngineService, warm_launcher: WarmLauncher, loop: asyncio.AbstractEventLoop) -> None:
    async def lose() -> None:
        starts, model = service._desk.counts.starts, service._llm
        tasks = [asyncio.ensure_future(ask(service, i, SamplingParams(**LONG))) for i in range(20)]
        await until(lambda: any(taken.first_token_s for taken in service._desk.taken))
        warm_launcher.faults = [{0: "die@load"}] * 3
        os.kill(service.rank_pids[0], signal.SIGKILL)
        for task in tasks:
            with pytest.raises(ServingError) as told:
                await task
            assert (told.value.status, told.value.code) == (500, "engine_failed")
            assert "ranks are gone" in str(told.value)
        warm_launcher.faults = []
        await until(lambda: service.state()[0] == "ready")
        assert service._desk.counts.starts == starts + 1 and service._llm is not model
        await ask(service, 1, SamplingParams(max_tokens=2))

    loop.run_until_complete(lose())


def test_a_model_that_cannot_be_started_again(
    service: EngineService, monkeypatch: pytest.MonkeyPatch, loop: asyncio.AbstractEventLoop
) -> None:
    make = service._driver._make
    attempts: list[float] = []

    def fail(exporter: Any) -> Any:
        attempts.append(time.monotonic())
        if len(attempts) < 4:
            raise UserError("the disk is gone")
        return make(exporter)

    async def lose() -> None:
        engine = service._driver._llm.engine  # type: ignore[union-attr]
        monkeypatch.setattr(service._driver, "_make", fail)

        def lost() -> None:
            raise GangError("the model's ranks are gone")

        monkeypatch.setattr(engine, "step", lost, raising=False)
        with pytest.raises(ServingError, match="ranks are gone"):
            await ask(service, 1, SamplingParams())
        assert service.state()[0] == "recovering"
        with pytest.raises(ServingError, match="cannot be started again: the disk is gone") as told:
            await ask(service, 2, SamplingParams(max_tokens=2))  # taken, waits, and is told
        assert told.value.code == "engine_failed"
        await until(lambda: service.state()[0] == "ready")
        await ask(service, 2, SamplingParams(max_tokens=2))

    loop.run_until_complete(lose())
    pauses = [then - now for now, then in itertools.pairwise(attempts)]
    assert len(attempts) == 4 and pauses[2] > 0.08 > 0.04 <= pauses[0], "each pause twice as long, up to a limit"


def test_a_panic_in_the_engines_thread(
    service: EngineService, monkeypatch: pytest.MonkeyPatch, loop: asyncio.AbstractEventLoop
) -> None:
    """Libraries in Rust raise what is no Exception, and ranks may not end in order: nobody waits for ever, and the model comes back."""

    class Panic(BaseException):
        pass

    def panic() -> None:
        raise Panic("called `Option::unwrap()` on a `None` value")

    async def lose() -> None:
        starts, model = service._desk.counts.starts, service._driver._llm
        assert model is not None
        shutdown = model.shutdown

        def not_in_order() -> None:
            shutdown()
            raise OSError("the socket is gone")

        monkeypatch.setattr(model, "shutdown", not_in_order)
        monkeypatch.setattr(model.engine, "step", panic)
        for error in await asyncio.gather(*(ask(service, i, SamplingParams(**LONG)) for i in range(3)), return_exceptions=True):
            assert isinstance(error, ServingError) and error.code == "engine_failed", error
        await until(lambda: service.state()[0] == "ready")
        assert service._desk.counts.starts == starts + 1
        await ask(service, 2, SamplingParams(max_tokens=2))

    loop.run_until_complete(lose())


def test_ranks_that_cannot_be_started_again(
    service: EngineService, monkeypatch: pytest.MonkeyPatch, loop: asyncio.AbstractEventLoop
) -> None:
    """No request is to blame for it, whichever asks them first."""

    def refuse() -> Any:
        raise UserError("the model's files are gone")

    async def lose() -> None:
        starts = service._desk.counts.starts
        tasks = [asyncio.ensure_future(ask(service, i, SamplingParams(**LONG))) for i in range(12)]
        await until(lambda: any(taken.first_token_s for taken in service._desk.taken))
        monkeypatch.setattr(service._driver._llm.gang_executor, "_make", refuse)  # type: ignore[union-attr]
        os.kill(service.rank_pids[0], signal.SIGKILL)
        for error in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(error, ServingError) and error.code == "engine_failed", error
        await until(lambda: service.state()[0] == "ready")
        assert service._desk.counts.starts == starts + 1
        await ask(service, 2, SamplingParams(max_tokens=2))

    loop.run_until_complete(lose())


def test_a_text_that_cannot_be_made_ends_its_request_only(
    service: EngineService, offline_llm: LLM, monkeypatch: pytest.MonkeyPatch, loop: asyncio.AbstractEventLoop
) -> None:
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    push = Detokenizer.push

    def faulty(self: Detokenizer, token_id: int, *, check_stop: bool = True) -> Any:
        if self._include_stop and len(self.text) > 20:
            raise IndexError("no such character")
        return push(self, token_id, check_stop=check_stop)

    monkeypatch.setattr(Detokenizer, "push", faulty)

    async def run() -> list[Output | BaseException]:
        wrong = replace(params, include_stop_str_in_output=True)
        return list(
            await asyncio.gather(*(ask(service, i, wrong if i == 2 else params) for i in range(5)), return_exceptions=True)
        )

    found = loop.run_until_complete(run())
    assert isinstance(found[2], ServingError) and found[2].code == "engine_failed" and "IndexError" in str(found[2])
    assert [found[i] for i in (0, 1, 3, 4)] == [expected(offline_llm, i, params) for i in (0, 1, 3, 4)]


@pytest.mark.parametrize("faults", [1, 3])
def test_a_step_that_fails_with_living_ranks(
    faults: int, service: EngineService, offline_llm: LLM, monkeypatch: pytest.MonkeyPatch, loop: asyncio.AbstractEventLoop
) -> None:
    """Once is nothing; where it goes on, the youngest go."""
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    monkeypatch.setattr(service._driver, "_mishap_s", float("-inf"))
    executor = service._driver._llm.gang_executor  # type: ignore[union-attr]
    step = executor.step
    left = [faults]

    def starving(steps: Any) -> Any:
        if len(steps) == 5 and left[0]:
            left[0] -= 1
            raise OutOfMemoryError("the device ran out of memory, as was asked for")
        return step(steps)

    monkeypatch.setattr(executor, "step", starving)

    async def run() -> list[Output | BaseException]:
        return list(await asyncio.gather(*(ask(service, i, params) for i in range(5)), return_exceptions=True))

    found = loop.run_until_complete(run())
    lost = [i for i, output in enumerate(found) if isinstance(output, BaseException)]
    assert lost == ([] if faults == 1 else [4]), found
    assert [output for i, output in enumerate(found) if i not in lost] == [
        expected(offline_llm, i, params) for i in range(5) if i not in lost
    ]


def test_a_drain_finishes_what_was_taken(
    characters: Path, warm_launcher: WarmLauncher, offline_llm: LLM, loop: asyncio.AbstractEventLoop
) -> None:
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)

    async def drain() -> None:
        service = service_of(characters, warm_launcher)
        assert service.state()[0] == "starting"
        with pytest.raises(ServingError, match="takes no requests"):
            await service.submit(Ask("r", [1], params))
        await service.start()
        gate = Gate(service)
        tasks = [asyncio.ensure_future(ask(service, i, params)) for i in range(12)]
        await until(lambda: service._desk.load[:2] == (8, 4))
        draining = asyncio.ensure_future(service.drain(WAIT_S))
        await until(lambda: service.state()[0] == "draining")
        with pytest.raises(ServingError) as refused:
            await service.submit(Ask("r", [1], params))
        assert (refused.value.status, refused.value.code) == (503, "unavailable")
        [pid] = service.rank_pids
        gate.open.set()
        assert await draining and service.state()[0] == "stopped"
        assert [await task for task in tasks] == offline_outputs(offline_llm, range(12), [params] * 12)
        assert not Path(f"/proc/{pid}").exists()
        assert await service.drain(0.0), "may be called twice"

    loop.run_until_complete(drain())


def test_a_drain_that_takes_too_long(characters: Path, warm_launcher: WarmLauncher, loop: asyncio.AbstractEventLoop) -> None:
    async def drain() -> None:
        service = service_of(characters, warm_launcher)
        await service.start()
        gate = Gate(service)
        task = asyncio.ensure_future(ask(service, 1, SamplingParams(**LONG)))
        await until(lambda: service._desk.load[0] == 1)
        draining = asyncio.ensure_future(service.drain(0.01))
        with pytest.raises(ServingError, match="shut down") as told:
            await task
        assert told.value.code == "unavailable"
        gate.open.set()
        assert not await draining and service.state()[0] == "stopped"

    loop.run_until_complete(drain())


def test_a_model_that_is_none(tmp_path: Path, warm_launcher: WarmLauncher, loop: asyncio.AbstractEventLoop) -> None:
    service = service_of(tmp_path / "nothing", warm_launcher)
    with pytest.raises(UserError, match="nothing"):
        loop.run_until_complete(service.start())
    loop.run_until_complete(until(lambda: service.state()[0] == "stopped"))
