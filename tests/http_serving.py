"""A server for tests: a tiny model whose tokens are characters, its engine, and HTTP on free ports, in a thread of this process."""

from __future__ import annotations

import asyncio
import socket
import string
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import tokenizers
import uvicorn
from tiny import tiny_model
from transformers import PreTrainedTokenizerFast
from warm_ranks import WarmLauncher

from rowcast.cluster.gang import Limits
from rowcast.serving.app import make_app
from rowcast.serving.connections import ConnectionLimits, uvicorn_options
from rowcast.serving.security import AppSettings
from rowcast.serving.service import EngineService, ServiceSettings, engine_service

T = TypeVar("T")

WAIT_S = 60.0
"""For what happens in milliseconds on a machine that is not busy."""
NAME = "tiny"
CONTEXT = 1024
_SPECIAL = ["<unk>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def character_model(path: Path) -> Path:
    """A tiny llama over the printable ASCII characters, with a chat template."""
    tiny_model("llama-gqa", path, max_position_embeddings=CONTEXT)
    characters = [*_SPECIAL, *(string.digits + string.ascii_letters + string.punctuation + " ")]
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    made.decoder = tokenizers.decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>", additional_special_tokens=_SPECIAL[3:]
    )
    wrapped.chat_template = _TEMPLATE
    wrapped.save_pretrained(path)
    return path


class _Server(uvicorn.Server):
    """Says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()


@dataclass
class Served:
    """A server that runs."""

    port: int
    service: EngineService
    _loop: asyncio.AbstractEventLoop

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def call(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run it in the server's event loop."""
        return asyncio.run_coroutine_threadsafe(make(), self._loop).result(WAIT_S)

    def requests(self) -> dict[str, int]:
        """What the service says of its requests."""
        found: dict[str, int] = self.call(self.service.live)["requests"]
        return found

    def until(self, true: Callable[[dict[str, int]], bool]) -> None:
        """Until that is so of the requests."""
        end = time.monotonic() + WAIT_S
        while not true(found := self.requests()):
            assert time.monotonic() < end, found
            time.sleep(0.005)

    def settle(self) -> None:
        """Until the engine has no request."""
        self.until(lambda found: not found["running"] and not found["waiting"])

    @contextmanager
    def still(self) -> Iterator[None]:
        """The engine makes no step meanwhile: what runs is not over, however long a test takes to look."""
        assert self.service._llm is not None
        engine, go_on = self.service._llm.engine, threading.Event()
        step = engine.step

        def wait() -> None:
            assert go_on.wait(WAIT_S)
            step()

        engine.step = wait  # type: ignore[method-assign]
        try:
            yield
        finally:
            engine.step = step  # type: ignore[method-assign]
            go_on.set()

    @contextmanager
    def at(
        self, settings: AppSettings, limits: ConnectionLimits | None = None, *, send_buffer: int | None = None
    ) -> Iterator[Served]:
        """Another port of the same service. `send_buffer`: bytes that the system keeps for a client that does not read."""
        bound = socket.socket(proto=socket.IPPROTO_TCP)  # without it asyncio leaves Nagle on: 40 ms an answer
        if send_buffer is not None:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        bound.bind(("127.0.0.1", 0))
        app = make_app(self.service, settings, self.service.server_metrics.http)
        server = _Server(uvicorn.Config(app, timeout_graceful_shutdown=5, **uvicorn_options(limits)))
        running = asyncio.run_coroutine_threadsafe(server.serve(sockets=[bound]), self._loop)
        try:
            assert server.up.wait(WAIT_S)
            yield Served(bound.getsockname()[1], self.service, self._loop)
        finally:
            server.should_exit = True
            running.result(WAIT_S)


@contextmanager
def engine(model: Path, launcher: WarmLauncher, **service: Any) -> Iterator[Served]:
    """A service in an event loop in a thread, without a port; drained at the end. `service`: further `ServiceSettings`."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="served")
    thread.start()
    made = engine_service(
        model, ServiceSettings(name=NAME, **service), launcher=launcher, limits=Limits(start_s=60, step_s=30), ladder="ngram / plain",
        max_num_seqs=16, progress=False,
    )  # fmt: skip
    found = Served(0, made, loop)
    try:
        found.call(made.start)
        yield found
        assert found.call(lambda: made.drain(WAIT_S))
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(WAIT_S)
        loop.close()
