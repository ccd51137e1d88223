"""A client of OpenAI-compatible servers that holds hundreds of streams on little CPU, and what it saw of each request. Torch-free.

Each request has a connection of its own: asyncio's streams and h11, one small read a chunk. It knows neither what is asked nor what is
made of the times.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from rowcast.errors import UserError

try:
    import h11
except ModuleNotFoundError as error:
    raise UserError('a benchmark of servers takes h11, which is not installed: run pip install "rowcast[serve]"') from error

_READ_BYTES = 1 << 16
_ANSWER_BYTES = 1 << 26
"""More than any answer that is not a stream may be."""


@dataclass(frozen=True, slots=True)
class Server:
    """Where requests go."""

    host: str
    port: int
    tls: bool = False
    path: str = ""
    """In front of `/v1/...`."""
    api_key: str | None = field(default=None, repr=False)

    @classmethod
    def at(cls, url: str, api_key: str | None = None) -> Server:
        """From http://HOST[:PORT][/PATH], with or without the `/v1` that OpenAI's client wants. Raises UserError for anything else."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or parts.username:
            raise UserError(f"the server's address is {url!r:.80} but has to be http://HOST:PORT, as `rowcast serve` prints it")
        tls = parts.scheme == "https"
        path = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, (443 if tls else 80) if port is None else port, tls, path, api_key)

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{self.path}"


@dataclass(frozen=True, slots=True)
class Planned:
    """A request to come."""

    body: dict[str, Any]
    """Of `/v1/completions`; it has to ask for a stream with its usage."""
    at_s: float
    """After the start; inf: as soon as fewer than the most are in flight."""
    prompt_tokens: int
    long: bool = False
    """One of the long prompts that are mixed in."""


@dataclass(slots=True)
class Outcome:
    """What a client saw of one request. Times are seconds after the start."""

    planned: Planned
    arrived_s: float = 0.0
    """When it was to be sent: the planned time, and in a closed loop when there was room. Latencies count from here."""
    sent_s: float | None = None
    """When it first was."""
    chunks_s: list[float] = field(default_factory=list)
    """When text or tokens came."""
    end_s: float = 0.0
    tries: int = 0
    status: int = 0
    """HTTP's, of the last try; 0: no answer."""
    error: str | None = None
    """None: finished. "429" and the like, the `code` of an error within a stream, "connection", "truncated", "timeout"."""
    message: str = ""
    retry_after_s: float | None = None
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    """Empty where the server does not tell."""
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None

    @property
    def output_tokens(self) -> int:
        """By the server's count; without one the tokens that it told, or the chunks."""
        counted = (self.usage or {}).get("completion_tokens")
        return int(counted) if counted is not None else len(self.token_ids) or len(self.chunks_s)

    @property
    def ttft_s(self) -> float | None:
        return self.chunks_s[0] - self.arrived_s if self.chunks_s else None

    @property
    def e2el_s(self) -> float:
        return self.end_s - self.arrived_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token, without the first; None for a lone token."""
        if not self.chunks_s or self.output_tokens < 2:
            return None
        return (self.chunks_s[-1] - self.chunks_s[0]) / (self.output_tokens - 1)

    @property
    def itl_s(self) -> list[float]:
        """Between chunks, each of which may hold several tokens."""
        return [after - before for before, after in zip(self.chunks_s, self.chunks_s[1:], strict=False)]


@dataclass(slots=True)
class Reply:
    """An answer whose head has come."""

    status: int
    headers: dict[str, str]
    """Names in lower case."""
    body: AsyncIterator[bytes]

    async def read(self) -> bytes:
        found = bytearray()
        async for data in self.body:
            found += data
            if len(found) > _ANSWER_BYTES:
                raise UserError(f"the server's answer is longer than {_ANSWER_BYTES} bytes: is that an OpenAI-compatible server?")
        return bytes(found)


@asynccontextmanager
async def exchange(server: Server, method: str, path: str, body: object = None) -> AsyncIterator[Reply]:
    """Send a request, `body` as JSON. The connection closes with the context, which cancels what has not come.

    Raises OSError, and h11.RemoteProtocolError for an answer that is none or ends too early.
    """
    data = b"" if body is None else json.dumps(body).encode()
    headers = [("host", f"{server.host}:{server.port}"), ("connection", "close"), ("accept", "*/*")]
    if server.api_key is not None:
        headers.append(("authorization", f"Bearer {server.api_key}"))
    if body is not None:
        headers += [("content-type", "application/json"), ("content-length", f"{len(data)}")]
    connection = h11.Connection(h11.CLIENT)
    head = connection.send(h11.Request(method=method, target=server.path + path, headers=headers))
    assert head is not None
    reader, writer = await asyncio.open_connection(server.host, server.port, ssl=server.tls or None)
    try:
        writer.write(head + data)
        if data:
            connection.send(h11.Data(data=data))
        connection.send(h11.EndOfMessage())
        await writer.drain()
        event = await _next(connection, reader)
        while isinstance(event, h11.InformationalResponse):
            event = await _next(connection, reader)
        assert isinstance(event, h11.Response)
        names = {name.decode().lower(): value.decode("latin-1") for name, value in event.headers}
        yield Reply(event.status_code, names, _body(connection, reader))
    finally:
        writer.close()


async def _next(connection: h11.Connection, reader: asyncio.StreamReader) -> object:
    while (event := connection.next_event()) is h11.NEED_DATA:
        connection.receive_data(await reader.read(_READ_BYTES))
    return event


async def _body(connection: h11.Connection, reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while isinstance(event := await _next(connection, reader), h11.Data):
        yield bytes(event.data)


async def served_model(server: Server) -> str:
    """The first that the server lists. Raises UserError."""
    status, found = await ask(server, "GET", "/v1/models")
    if status == 401:
        raise UserError(
            f"{server.url} wants another API key than it was given (401): name a file with one by --api-key-file, or set OPENAI_API_KEY"
        )
    try:
        return f"{found['data'][0]['id']}"
    except (TypeError, KeyError, IndexError):
        raise UserError(
            f"{server.url}/v1/models answers {status} and names no model: is that an OpenAI-compatible server?"
        ) from None


async def ask(server: Server, method: str, path: str, body: object = None, timeout_s: float = 60.0) -> tuple[int, Any]:
    """Status and parsed JSON of an answer that is no stream; None for one that is not JSON. Raises UserError where none comes."""

    async def answer() -> tuple[int, bytes]:
        async with exchange(server, method, path, body) as reply:
            return reply.status, await reply.read()

    try:
        status, data = await asyncio.wait_for(answer(), timeout_s)
    except (OSError, asyncio.TimeoutError, h11.RemoteProtocolError) as error:
        raise UserError(
            f"nobody answers at {server.url}{path} ({error or type(error).__name__}): start `rowcast serve`"
        ) from error
    try:
        return status, json.loads(data)
    except ValueError:
        return status, None


async def events(body: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """The data of server-sent events (WHATWG HTML, 9.2), as they come; other fields are passed over."""
    rest = b""
    data: list[bytes] = []
    async for part in body:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
            elif not line and data:
                yield b"\n".join(data).decode()
                data = []


class Load:
    """Sends planned requests and notes what comes."""

    def __init__(
        self,
        server: Server,
        *,
        concurrency: int | None = None,
        retries: int = 0,
        timeout_s: float = 600.0,
        seed: int = 0,
        on_end: Callable[[Outcome], None] | None = None,
    ) -> None:
        """`concurrency`: most in flight; None: as many as come. `retries`: how often a request that is told to come again later does
        (429 and 503 with Retry-After), each time after that time and up to half as long again, so that not all come at once.
        `timeout_s`: for one try. `on_end` is called with each request that ended."""
        self.server = server
        self._concurrency = concurrency
        self._room: asyncio.Semaphore | None = None
        self._retries = retries
        self._timeout_s = timeout_s
        self._random = random.Random(seed)
        self._on_end = on_end
        self.start_s = 0.0
        """By `time.perf_counter`."""
        self.outcomes: list[Outcome] = []
        """Of the requests, in their order, while they run, too."""
        self.in_flight = 0
        self.most_in_flight = 0

    def now_s(self) -> float:
        return time.perf_counter() - self.start_s

    async def run(self, planned: Sequence[Planned]) -> list[Outcome]:
        """Send all of them, each at its time, and wait for their ends. Results in the same order."""
        self.outcomes = [Outcome(each) for each in planned]
        self._room = None if self._concurrency is None else asyncio.Semaphore(self._concurrency)  # of this event loop
        self.start_s = time.perf_counter()
        running = []
        for outcome in sorted(self.outcomes, key=lambda each: each.planned.at_s):
            at_s = outcome.planned.at_s
            if closed := at_s == float("inf"):
                assert self._room is not None
                await self._room.acquire()
                at_s = self.now_s()
            elif (wait_s := at_s - self.now_s()) > 0:
                await asyncio.sleep(wait_s)
            outcome.arrived_s = at_s
            running.append(asyncio.create_task(self._one(outcome, has_room=closed)))
        await asyncio.gather(*running)
        return self.outcomes

    async def _one(self, outcome: Outcome, has_room: bool) -> None:
        if self._room is not None and not has_room:
            await self._room.acquire()
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            while True:
                await self._try(outcome)
                if outcome.retry_after_s is None or outcome.tries > self._retries:
                    break
                await asyncio.sleep(outcome.retry_after_s * self._random.uniform(1.0, 1.5))
        finally:
            self.in_flight -= 1
            if self._room is not None:
                self._room.release()
        outcome.end_s = self.now_s()
        if self._on_end is not None:
            self._on_end(outcome)

    async def _try(self, outcome: Outcome) -> None:
        outcome.tries += 1
        outcome.status, outcome.error, outcome.message, outcome.retry_after_s = 0, None, "", None
        if outcome.sent_s is None:
            outcome.sent_s = self.now_s()
        try:
            await asyncio.wait_for(self._exchange(outcome), self._timeout_s)
        except asyncio.TimeoutError:  # an OSError, too, from Python 3.11 on
            outcome.error = "timeout"
        except OSError as error:
            outcome.error, outcome.message = "connection", str(error)
        except h11.RemoteProtocolError as error:
            outcome.error, outcome.message = "truncated", str(error)

    async def _exchange(self, outcome: Outcome) -> None:
        async with exchange(self.server, "POST", "/v1/completions", outcome.planned.body) as reply:
            outcome.status = reply.status
            if reply.status == 200:
                await self._stream(outcome, reply)
            else:
                outcome.error = f"{reply.status}"
                _refused(outcome, reply.headers, await reply.read())

    async def _stream(self, outcome: Outcome, reply: Reply) -> None:
        outcome.error = "truncated"  # until it says that it is over
        async for data in events(reply.body):
            now_s = self.now_s()
            if data == "[DONE]":
                if outcome.error == "truncated":
                    outcome.error = None
                continue
            try:
                chunk = json.loads(data)
            except ValueError:
                outcome.error, outcome.message = "malformed", data[:200]
                return
            if "error" in chunk:
                told = chunk["error"]
                outcome.error, outcome.message = f"{told.get('code') or told.get('type')}", f"{told.get('message')}"
                continue
            outcome.usage = chunk.get("usage") or outcome.usage
            for choice in chunk.get("choices", ()):
                text, ids = choice.get("text") or "", choice.get("token_ids") or []
                if text or ids or choice.get("finish_reason") is None:  # a token may have no text, or none yet
                    outcome.chunks_s.append(now_s)
                outcome.text += text
                outcome.token_ids += ids
                outcome.finish_reason = choice.get("finish_reason") or outcome.finish_reason


def _refused(outcome: Outcome, headers: dict[str, str], body: bytes) -> None:
    try:
        outcome.message = f"{json.loads(body)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        outcome.message = body[:200].decode(errors="replace")
    after = headers.get("retry-after", "")
    if outcome.status in (429, 503) and after.isdecimal():
        outcome.retry_after_s = float(after)
