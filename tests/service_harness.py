"""An engine service for tests: on a tiny model whose ranks start quickly, with what is asked of it and what it should say."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tiny import VOCAB
from warm_ranks import WarmLauncher

from rowcast import LLM, SamplingParams
from rowcast.cluster.gang import Limits
from rowcast.serving.backend import Ask, Piece
from rowcast.serving.driver import Pauses
from rowcast.serving.service import EngineService, ServiceSettings, engine_service

WAIT_S = 60.0
"""For what happens in milliseconds on a machine that is not busy."""
LIMITS = Limits(start_s=60, step_s=30, silence_s=3.0)
LONG: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "max_tokens": 90}
Output = dict[int, tuple[list[int], str, str | None]]
"""By sample: ids, text and finish reason."""


def service_of(model: Path, launcher: WarmLauncher, **settings: Any) -> EngineService:
    return engine_service(
        model,
        ServiceSettings(name="tiny", pauses=Pauses(0.02, 0.1), **settings),
        launcher=launcher,
        limits=LIMITS,
        ladder="ngram / plain",
        max_num_seqs=8,
        prefill_stall_s=None,
        progress=False,
    )


async def settled(service: EngineService) -> None:
    await until(lambda: service._desk.load == (0, 0, 0) and not service._driver._running and service.state()[0] == "ready")


async def until(true: Callable[[], bool]) -> None:
    async def look() -> None:
        while not true():
            await asyncio.sleep(0.005)

    await asyncio.wait_for(look(), WAIT_S)


class Gate:
    """While it is closed the engine's steps do nothing, so that requests come and go as far as that goes without them."""

    def __init__(self, service: EngineService) -> None:
        llm = service._driver._llm
        assert llm is not None
        self._engine = llm.engine
        self.open = threading.Event()
        self.steps = 0
        step = llm.engine.step

        def gated() -> None:
            if self.open.wait(0.005):
                self.steps += 1
                step()

        self._engine.step = gated  # type: ignore[method-assign]

    def remove(self) -> None:
        self.open.set()
        del self._engine.step  # the class's again


def prompt(i: int) -> list[int]:
    return [(5 * i + j * j) % VOCAB for j in range(6 + i % 30)]


async def read(pieces: Any) -> tuple[Output, list[Piece]]:
    """Everything, joined by sample; the last piece alone has the usage."""
    gained: dict[int, tuple[list[int], list[str], list[str | None]]] = {}
    every: list[Piece] = []
    async for piece in pieces:
        ids, texts, reasons = gained.setdefault(piece.index, ([], [], []))
        assert not any(reasons), "a piece behind the last one"
        ids += piece.token_ids
        texts.append(piece.text)
        reasons.append(piece.finish_reason)
        every.append(piece)
    assert [piece.usage is not None for piece in every] == [False] * (len(every) - 1) + [True]
    return {index: (ids, "".join(texts), reasons[-1]) for index, (ids, texts, reasons) in gained.items()}, every


async def ask(service: EngineService, i: int | list[int] | str, params: SamplingParams, client: str = "", **more: Any) -> Output:
    given = prompt(i) if isinstance(i, int) else i
    return (await read(await service.submit(Ask("r", given, params, client, **more))))[0]


def expected(offline: LLM, i: int | list[int] | str, params: SamplingParams) -> Output:
    [output] = offline.generate([prompt(i) if isinstance(i, int) else i], params)
    return {sample.index: (sample.token_ids, sample.text, sample.finish_reason) for sample in output.outputs}


def offline_outputs(offline: LLM, numbers: Iterable[int], params: list[SamplingParams]) -> list[Output]:
    """Of prompts by number."""
    outputs = offline.generate([prompt(i) for i in numbers], params)
    return [
        {sample.index: (sample.token_ids, sample.text, sample.finish_reason) for sample in output.outputs} for output in outputs
    ]


def mix(count: int) -> list[SamplingParams]:
    kinds: list[dict[str, Any]] = [
        {"temperature": 0, "max_tokens": 20},
        {"temperature": 0.9, "n": 3, "max_tokens": 12},
        {"temperature": 0.8, "stop": ["q", "Zz", "e"], "max_tokens": 40},
        {"temperature": 1.0, "stop": ["7"], "include_stop_str_in_output": True, "logprobs": 2, "max_tokens": 30},
        {"temperature": 0.7, "repetition_penalty": 1.3, "bad_words": ["k"], "max_tokens": 10, "logit_bias": {9: 2.0}},
        {"temperature": 1.0, "detokenize": False, "stop_token_ids": [1, 2, 3, 4], "max_tokens": 30},
    ]
    return [SamplingParams(seed=i, ignore_eos=i % 2 == 0, **kinds[i % len(kinds)]) for i in range(count)]
