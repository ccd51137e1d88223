"""Clients that are slow, silent, rude or gone: they hold nobody up, and what they take is given back."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from http_serving import NAME, WAIT_S, Served
from openai import OpenAI

from rowcast import LLM, SamplingParams
from rowcast.serving.connections import ConnectionLimits
from rowcast.serving.security import AppSettings

pytest_plugins = ["shared_engine"]

LIMITS = ConnectionLimits(head_s=1.0, write_s=0.5)
BODY_BYTES = 100_000
GOOD: dict[str, Any] = {"model": NAME, "prompt": "good", "seed": 3, "max_tokens": 8}


@pytest.fixture(scope="module")
def served(shared_engine: Served) -> Iterator[Served]:
    settings = AppSettings(log_requests=False, max_body_bytes=BODY_BYTES, body_timeout_s=1.0)
    with shared_engine.at(settings, LIMITS, send_buffer=4096) as server:
        yield server


@pytest.fixture
def good(served: Served, offline_llm: LLM) -> Iterator[Any]:
    """Asks as a client does that does nothing wrong, and checks the answer; a connection for each time, as others would have."""
    expected = offline_llm.generate("good", SamplingParams(seed=3, max_tokens=8))[0].outputs[0].text

    def ask() -> None:
        with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=WAIT_S) as client:
            assert client.completions.create(**GOOD).choices[0].text == expected

    yield ask
    ask()
    served.settle()


@contextmanager
def connection(served: Served, *, receive_buffer: int | None = None) -> Iterator[socket.socket]:
    with socket.socket() as made:
        if receive_buffer is not None:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        made.settimeout(WAIT_S)
        made.connect(("127.0.0.1", served.port))
        yield made


def request(body: Any, path: str = "/v1/completions", **headers: str) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = {"host": "localhost", "content_type": "application/json", "content_length": str(len(data)), **headers}
    head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in lines.items() if value)
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + data


def rest(connected: socket.socket) -> bytes:
    """All that comes until the server closes."""
    found = b""
    try:
        while data := connected.recv(65536):
            found += data
    except ConnectionResetError:
        pass
    return found


def error_of(response: bytes) -> tuple[int, str]:
    head, _, body = response.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


def long_stream(n: int) -> bytes:
    more = {"logprobs": 5, "ignore_eos": True, "stream": True, "n": n}
    return request({"model": NAME, "prompt": "slow", "max_tokens": 900, **more})


def test_readers_that_read_nothing(served: Served, good: Any) -> None:
    before = served.requests()["cancelled"]
    with ExitStack() as stack:
        slow = [stack.enter_context(connection(served, receive_buffer=2048)) for _ in range(3)]
        for each in slow:
            each.sendall(long_stream(5))
        served.until(lambda found: found["running"] == 3)
        good()
        served.until(lambda found: found["cancelled"] == before + 3)
        assert all(rest(each).startswith(b"HTTP/1.1 200") for each in slow)


def test_a_reader_that_is_slow_gets_everything(shared_engine: Served, good: Any) -> None:
    """Its pieces grow while it does not read; the good one does not wait for it."""
    asked = {"model": NAME, "prompt": "good", "seed": 3, "max_tokens": 200, "ignore_eos": True, "stream": True, "logprobs": 5}
    patient = shared_engine.at(AppSettings(log_requests=False), ConnectionLimits(write_s=WAIT_S), send_buffer=16384)
    with patient as served, connection(served, receive_buffer=16384) as slow:
        slow.sendall(request(asked, connection="close"))
        good()
        response = rest(slow)
    assert response.count(b"data: [DONE]") == 1 and response.count(b'"finish_reason":"length"') == 1
    events = [json.loads(part) for part in re.findall(rb"data: (\{.*\})\n", response)]
    assert sum(len(event["choices"][0]["logprobs"]["tokens"]) for event in events) == 200


def test_heads_that_never_end(served: Served, good: Any) -> None:
    with ExitStack() as stack:
        slow = [stack.enter_context(connection(served)) for _ in range(12)]
        for each in slow[:6]:
            each.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nx-a: b")
        good()
        for _ in range(3):
            for each in slow[:6]:
                try:
                    each.sendall(b"b")
                except OSError:
                    break
            good()
        assert all(rest(each) == b"" for each in slow)


def test_more_connections_than_there_may_be(shared_engine: Served, good: Any) -> None:
    """The ones that ask for nothing give way, the longest idle first."""
    limits = ConnectionLimits(connections=16, head_s=WAIT_S)
    with shared_engine.at(AppSettings(log_requests=False), limits) as served, ExitStack() as stack:
        busy = stack.enter_context(connection(served))
        busy.sendall(request({**GOOD, "max_tokens": 200, "ignore_eos": True}, connection="close"))
        served.until(lambda found: found["running"] == 1)
        idle = [stack.enter_context(connection(served)) for _ in range(24)]
        assert rest(idle[0]) == b"" and rest(idle[8]) == b""
        idle[-1].sendall(request(GOOD, connection="close"))
        assert rest(idle[-1]).startswith(b"HTTP/1.1 200") and rest(busy).startswith(b"HTTP/1.1 200")


def test_bodies_that_never_end(served: Served, good: Any) -> None:
    with connection(served) as slow:
        slow.sendall(request(GOOD)[:-5])
        good()
        assert error_of(rest(slow)) == (408, "request_timeout")


@pytest.mark.parametrize("told", ["a length", "another length", "none"])
def test_bodies_that_are_too_large(served: Served, good: Any, told: str) -> None:
    body = b" " * (3 * BODY_BYTES)
    with connection(served) as large:
        if told == "none":
            chunk = f"{BODY_BYTES:x}\r\n".encode() + b" " * BODY_BYTES + b"\r\n"
            large.sendall(request(b"", transfer_encoding="chunked", content_length="") + 3 * chunk + b"0\r\n\r\n")
        else:
            large.sendall(request(body, content_length=str(len(body) if told == "a length" else 10**15)))
            if told == "another length":
                large.shutdown(socket.SHUT_WR)
        response = rest(large)
        assert told == "another length" or error_of(response) == (413, "body_too_large")
    with connection(served) as asks_first:
        asks_first.sendall(request(b"", content_length=str(10 * BODY_BYTES), expect="100-continue"))
        assert error_of(rest(asks_first)) == (413, "body_too_large")


@pytest.mark.parametrize(
    "garbage",
    [b"\x16\x03\x01\x02\x00\x01\x00\x01", b"GET\r\n\r\n", b"POST / HTTP/1.1\r\ncontent-length: -1\r\n\r\n", b"\x00" * 100_000,
     b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 200_000 + b"\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"],
    ids=["tls", "no path", "length", "zeros", "head", "http2"],
)  # fmt: skip
def test_what_is_no_http(served: Served, good: Any, garbage: bytes) -> None:
    with connection(served) as rude:
        rude.sendall(garbage)
        response = rest(rude)
        assert not response or (response.startswith(b"HTTP/1.1 4") and b"invalid_http" in response)
        good()


def test_requests_behind_each_other(served: Served, good: Any) -> None:
    """Answered in order, on one connection; a wrong one behind a right one ends it."""
    with connection(served) as eager:
        eager.sendall(request(GOOD) + request({**GOOD, "model": "none"}) + request(GOOD, connection="close"))
        response = rest(eager)
    assert [part.split(b" ")[0] for part in response.split(b"HTTP/1.1 ")[1:]] == [b"200", b"404", b"200"]
    with connection(served) as rude:
        rude.sendall(request(GOOD) + b"\x00\x00 garbage\r\n\r\n")
        assert rest(rude).startswith(b"HTTP/1.1 200")


def test_clients_that_end_their_side_are_gone(served: Served, good: Any) -> None:
    before = served.requests()["cancelled"]
    with connection(served) as half:
        half.sendall(long_stream(1))
        half.recv(100)
        half.shutdown(socket.SHUT_WR)
        rest(half)
        good()
    served.settle()
    assert served.requests()["cancelled"] == before + 1


def test_a_stream_is_read_to_its_end_after_it_was_made(served: Served, good: Any) -> None:
    """What was written stays for its reader for a while, though the engine has forgotten the request."""
    with connection(served) as late:
        late.sendall(request({**GOOD, "stream": True}, connection="close"))
        served.settle()
        assert rest(late).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
