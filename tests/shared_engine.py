"""Fixtures of test modules that name this one in `pytest_plugins`: they share an engine, which takes long to start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from http_serving import Served, character_model, engine
from warm_ranks import WarmLauncher

from rowcast import LLM


@pytest.fixture(scope="session")
def characters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return character_model(tmp_path_factory.mktemp("characters"))


@pytest.fixture(scope="session")
def offline_llm(characters: Path) -> LLM:
    return LLM(characters, ladder="plain")


@pytest.fixture(scope="session")
def warm_launcher() -> Iterator[WarmLauncher]:
    started = WarmLauncher()
    yield started
    started.close()


@pytest.fixture(scope="session")
def shared_engine(characters: Path, warm_launcher: WarmLauncher) -> Iterator[Served]:
    """At most 4 requests wait, 16 sequences run."""
    with engine(characters, warm_launcher, max_waiting=4) as found:
        yield found
