"""What takes long is done beside the event loop, and what long requests of one client take there, others do not wait for."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from fastapi.exceptions import HTTPException, RequestValidationError
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rowcast.runtime.outputs import Logprob
from rowcast.serving import app, asks, bodies, stream
from rowcast.serving.answers import ChatAnswer
from rowcast.serving.asks import Asker
from rowcast.serving.backend import Ask, ModelCard, Piece, State
from rowcast.serving.errors import ApiError, ClientGone
from rowcast.serving.logs import Exchange
from rowcast.serving.protocol import CompletionRequest, TokenizeRequest
from rowcast.serving.security import AppSettings

WAIT_S = 60.0
CARD = ModelCard("tiny", 0, 16, 100, "plain", "exact")


class Slow:
    """A backend whose tokenizer takes as long over a text of many characters as it is told to."""

    card = CARD

    def __init__(self) -> None:
        self.let_go = threading.Event()
        self.encoding = threading.Event()
        self.snapshots = 0

    @property
    def tokenizer(self) -> Any:
        return self

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        if len(text) > asks._LONG_CHARS:
            self.encoding.set()
            assert self.let_go.wait(WAIT_S)
        return [1] * min(len(text), 3)

    def state(self) -> tuple[State, str]:
        return "ready", ""

    async def submit(self, ask: Ask) -> AsyncIterator[Piece]:
        raise AssertionError("its client has gone")

    async def live(self) -> dict[str, Any]:
        self.snapshots += 1
        await asyncio.sleep(0)
        return {"snapshot": self.snapshots}


def run(case: Callable[[], Any]) -> None:
    asyncio.run(asyncio.wait_for(case(), WAIT_S))


def test_long_texts_wait_for_each_other_only() -> None:
    async def case() -> None:
        backend = Slow()
        asker = Asker(backend, AppSettings())  # type: ignore[arg-type]
        long = TokenizeRequest(prompt="x" * (asks._LONG_CHARS + 1))
        waiting = [asyncio.ensure_future(asker.tokenize(long)) for _ in range(8)]
        for size in (10, asks._SHORT_CHARS + 1, asks._LONG_CHARS):
            assert await asker.tokenize(TokenizeRequest(prompt="y" * size)) == ([1, 1, 1], None)
        assert not any(task.done() for task in waiting)
        backend.let_go.set()
        assert await asyncio.gather(*waiting) == [([1, 1, 1], None)] * 8
        asker.close()

    run(case)


def test_a_client_that_goes_while_its_prompt_is_tokenised() -> None:
    async def case() -> None:
        backend = Slow()
        made = app.make_app(backend, AppSettings(log_requests=False))  # type: ignore[arg-type]
        body = b'{"prompt": "%s"}' % (b"x" * (asks._LONG_CHARS + 1))
        messages: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await asyncio.to_thread(backend.encoding.wait, WAIT_S)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            raise AssertionError(message)

        scope: dict[str, Any] = {
            "type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "http_version": "1.1", "scheme": "http",
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")], "client": ("127.0.0.1", 1),
        }  # fmt: skip
        async with made.router.lifespan_context(made):
            await made(scope, receive, send)
            backend.let_go.set()
        assert scope["exchange"].status == 499

    run(case)


@pytest.mark.parametrize("tokens", [3, 2000])
def test_answers_with_many_log_probabilities_are_written_in_a_thread(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    where: list[threading.Thread] = []

    class Answer(ChatAnswer):
        def whole(self) -> str:
            where.append(threading.current_thread())
            return super().whole()

    class Streams:
        async def submit(self, ask: Any) -> AsyncIterator[Piece]:
            return self._pieces()

        async def _pieces(self) -> AsyncIterator[Piece]:
            yield Piece(0, "x", [1] * tokens, [{1: Logprob(-0.5, 1, "x")}] * tokens, "length")

    async def case() -> None:
        running = await stream.Running.start(Streams(), [None], Exchange("1", "POST"))  # type: ignore[arg-type, list-item]
        assert '"logprob":-0.5' in await stream.whole_answer(running, Answer("chatcmpl-1", 1, "tiny", CARD, 1, 1))

    run(case)
    assert (where == [threading.main_thread()]) is (tokens == 3)


def test_many_token_ids_are_looked_at_quickly() -> None:
    ids = list(range(1, 200_001))
    started = time.process_time()
    assert CompletionRequest.model_validate({"prompt": ids}).prompt == [ids]
    assert CompletionRequest.model_validate({"prompt": [ids, ids]}).prompt == [ids, ids]
    assert time.process_time() - started < 0.5, "one look at each takes hundredths of a second"
    for wrong in ([True], [1, 2.0], [-1], [1 << 31], [[1], [True]], [[1], []], [[[1]]], [None], []):
        with pytest.raises(ValidationError, match="should"):
            CompletionRequest.model_validate({"prompt": wrong})


def test_all_who_watch_see_one_snapshot() -> None:
    async def case() -> None:
        backend = Slow()
        backend.state = lambda: ("draining", "")  # type: ignore[method-assign]  # so that streams end
        made = app.make_app(backend, AppSettings(log_requests=False))  # type: ignore[arg-type]
        sent: list[bytes] = []

        async def receive() -> Any:
            await asyncio.sleep(WAIT_S)

        async def send(message: Any) -> None:
            sent.append(message.get("body", b""))

        scope: dict[str, Any] = {
            "type": "http", "method": "GET", "path": "/live/stream", "query_string": b"", "http_version": "1.1", "scheme": "http",
            "headers": [(b"host", b"localhost")], "client": ("127.0.0.1", 1),
        }  # fmt: skip
        await asyncio.gather(*(made(dict(scope), receive, send) for _ in range(5)))
        assert sent.count(b'data: {"snapshot":1}\n\n') == 5 and backend.snapshots == 1

    run(case)


def test_a_client_that_goes_is_told_apart() -> None:
    """`unless_gone` gives what was made, where both happen at the same time."""

    async def case() -> None:
        async def gone() -> Any:
            return {"type": "http.disconnect"}

        async def made() -> int:
            return 1

        assert await stream.unless_gone(gone, made()) == 1
        with pytest.raises(ClientGone):
            await stream.unless_gone(gone, asyncio.sleep(WAIT_S))

    run(case)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner, max_size=3) | st.lists(st.integers(0, 99))
    ),
    max_leaves=30,
)


@given(VALUES, st.sampled_from([None, 1, "\t"]), st.integers(1, 40))
def test_json_in_pieces(value: object, indent: int | str | None, piece: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bodies, "_PIECE", piece)
        assert bodies._Decoder().decode(json.dumps(value, indent=indent)) == value


@pytest.mark.parametrize(
    "text", ["[1,]", "[1,2,]", "[,1]", "[1,,2]", "[ , 1]", "[1 2,3]", "[01,2]", "[1,2", "[1,2}", "[1,2]]", "[1,-]", "[1, ]"]
)
def test_json_in_pieces_refuses_what_is_none(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "_PIECE", 2)
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    with pytest.raises(json.JSONDecodeError) as found:
        bodies._Decoder().decode(text)
    assert abs(found.value.pos - expected.value.pos) <= 2


def test_bodies_of_many_parts() -> None:
    """Each would cost microseconds."""
    with pytest.raises(ApiError, match="more than 100000 lists and objects") as error:
        bodies.read_body(CompletionRequest, b'{"prompt":[' + b"[]," * 100_000 + b"[]]}")
    assert error.value.status == 400


@pytest.mark.parametrize(
    "body", [b"{", b"[" * 40_000, b"\xff\xfe{", b'{"n": 1e999}', b"9" * 5000, b"null", b"[]", b'"x"', b'{"prompt": "\\ud800"}']
)
def test_large_bodies_that_are_none(body: bytes) -> None:
    with pytest.raises((RequestValidationError, HTTPException)):
        bodies.read_body(CompletionRequest, body)


@pytest.mark.parametrize("size", [bodies.LARGE_BYTES - 1, bodies.LARGE_BYTES])
def test_large_bodies_are_read_beside_the_event_loop(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And answered as small ones are, right or wrong."""
    answers: list[tuple[int, Any]] = []

    async def case() -> None:
        made = app.make_app(Slow(), AppSettings(log_requests=False))  # type: ignore[arg-type]

        async def post(route: str, given: dict[str, Any]) -> None:
            messages: list[Any] = [{"type": "http.request", "body": json.dumps(given).encode().ljust(size), "more_body": False}]
            sent: list[Any] = []

            async def receive() -> Any:
                if messages:
                    return messages.pop()
                return await asyncio.Event().wait()

            async def send(message: Any) -> None:
                sent.append(message)

            scope: dict[str, Any] = {
                "type": "http", "method": "POST", "path": route, "query_string": b"", "http_version": "1.1", "scheme": "http",
                "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")], "client": ("127.0.0.1", 1),
            }  # fmt: skip
            await made(scope, receive, send)
            answers.append((sent[0]["status"], json.loads(sent[1]["body"])))

        async with made.router.lifespan_context(made):
            await post("/tokenize", {"prompt": "abc"})
            await post("/v1/completions", {"prompt": [5], "temprature": 1})
            await post("/v1/completions", {"prompt": [5], "max_tokens": 0})
            await post("/v1/completions", {"prompt": [5, -1]})
            await post("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2})

    threads: list[str] = []
    read = bodies.read_body

    def noted(*arguments: Any) -> Any:
        threads.append(threading.current_thread().name)
        return read(*arguments)

    monkeypatch.setattr(bodies, "read_body", noted)
    run(case)
    assert [name.partition("_")[0] for name in threads] == ["rowcast-read"] * (5 if size >= bodies.LARGE_BYTES else 0)
    assert answers[0] == (200, {"count": 3, "max_model_len": 16, "tokens": [1, 1, 1], "token_strs": None})
    told = [(status, found["error"]["param"], found["error"]["code"]) for status, found in answers[1:]]
    assert told == [
        (400, "temprature", "unknown_field"),
        (400, "max_tokens", "invalid_value"),
        (400, "prompt", "invalid_value"),
        (400, "top_logprobs", "conflict"),
    ]
