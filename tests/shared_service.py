"""Fixtures of test modules that name this one in `pytest_plugins`: they share an engine service and its event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from service_harness import WAIT_S, Gate, service_of, settled
from warm_ranks import WarmLauncher

from rowcast.serving.service import EngineService


@pytest.fixture(scope="session")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    made = asyncio.new_event_loop()
    yield made
    made.close()


@pytest.fixture(scope="session")
def shared(characters: Path, warm_launcher: WarmLauncher, loop: asyncio.AbstractEventLoop) -> Iterator[EngineService]:
    made = service_of(characters, warm_launcher)
    loop.run_until_complete(made.start())
    yield made
    assert loop.run_until_complete(made.drain(WAIT_S))
    assert made.state()[0] == "stopped" and not made.rank_pids


@pytest.fixture
def service(shared: EngineService, loop: asyncio.AbstractEventLoop) -> Iterator[EngineService]:
    """Nothing of a test's requests is left behind it."""
    yield shared
    loop.run_until_complete(settled(shared))
    assert not shared._desk.taken and not list(shared._desk.queue) and shared._desk.queue.clients == 0
    assert not shared._driver._running
    llm = shared._driver._llm
    assert llm is not None and not llm.engine._live and not llm.gang_executor._sequences


@pytest.fixture
def gate(service: EngineService) -> Iterator[Gate]:
    made = Gate(service)
    yield made
    made.remove()
