"""Requests while they run: their pieces, a client that goes, and server-sent events. Torch-free.

Slow readers hold nobody up. A response that a client does not read blocks in `send`, and what comes meanwhile waits in the backend,
where one sample's pieces grow into one; `connections` closes connections that take too long.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from fastapi.responses import Response

from rowcast.serving.answers import Answer
from rowcast.serving.backend import Ask, Backend, Piece, unavailable
from rowcast.serving.errors import ClientGone, as_api_error, json_text
from rowcast.serving.logs import Exchange, RequestLog
from rowcast.serving.security import Receive, Scope, Send

T = TypeVar("T")

_ENTRIES_AT_ONCE = 1000
"""Log-probabilities of an answer that is written in the event loop; more of them take so long that other streams would pause."""

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_PIECES_AHEAD = 16
"""Of each of several prompts, that are taken from the backend before they can be written."""


class Running:
    """The backend's requests of one HTTP request: all of them, or none."""

    def __init__(self, streams: Sequence[AsyncIterator[Piece]], exchange: Exchange) -> None:
        self._streams = list(streams)
        self._exchange = exchange
        self._first: tuple[int, Piece] | None = None
        self._pieces = self._one() if len(self._streams) == 1 else self._several()

    @classmethod
    async def start(cls, backend: Backend, asks: Sequence[Ask], exchange: Exchange) -> Running:
        """Submit them. Where one is not taken, none is left. Raises what `submit` raises."""
        streams: list[AsyncIterator[Piece]] = []
        try:
            for ask in asks:
                streams.append(await backend.submit(ask))
        except BaseException:
            for stream in streams:
                await _close(stream)
            raise
        return cls(streams, exchange)

    async def wait(self) -> Running:
        """Until the first piece is there. Raises what it comes to instead."""
        async for found in self._pieces:
            self._first = found
            return self
        raise unavailable("the request was ended before it was begun", retry_after_s=1.0)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        """(number of the prompt, piece), as they come. Raises ServingError for a request that is lost or late."""
        if self._first is not None:
            yield self._first
            self._first = None
        async for found in self._pieces:
            yield found

    async def aclose(self) -> None:
        """Cancel what is left. May be called twice."""
        await _close(self._pieces)
        for stream in self._streams:
            await _close(stream)

    def _note(self, piece: Piece) -> None:
        """For the log."""
        exchange = self._exchange
        exchange.first_piece()
        exchange.generated_tokens = (exchange.generated_tokens or 0) + len(piece.token_ids)
        if piece.prompt_token_ids is not None:
            exchange.prompt_tokens = (exchange.prompt_tokens or 0) + len(piece.prompt_token_ids)
        if piece.finish_reason is not None:
            exchange.finish_reasons.append(piece.finish_reason)
        if piece.usage is not None:
            exchange.cached_tokens = (exchange.cached_tokens or 0) + piece.usage.cached_tokens
        if piece.finish_reason == "abort":
            raise unavailable("the request was ended before it was finished", retry_after_s=1.0)

    async def _one(self) -> AsyncIterator[tuple[int, Piece]]:
        async for piece in self._streams[0]:
            self._note(piece)
            yield 0, piece

    async def _several(self) -> AsyncIterator[tuple[int, Piece]]:
        queue: asyncio.Queue[tuple[int, Piece] | BaseException | None] = asyncio.Queue(_PIECES_AHEAD * len(self._streams))

        async def pump(number: int, stream: AsyncIterator[Piece]) -> None:
            try:
                async for piece in stream:
                    await queue.put((number, piece))
            except Exception as error:
                await queue.put(error)
            else:
                await queue.put(None)

        tasks = [asyncio.ensure_future(pump(number, stream)) for number, stream in enumerate(self._streams)]
        left = len(tasks)
        try:
            while left:
                found = await queue.get()
                if isinstance(found, BaseException):
                    raise found
                if found is None:
                    left -= 1
                else:
                    self._note(found[1])
                    yield found
        finally:
            await _cancel(*tasks)


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """What `work` gives. Raises ClientGone, with `work` cancelled, when the client goes first.

    Precondition: the request's body was read.
    """
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        await _cancel(working, gone)


class EventStream(Response):
    """A response of server-sent events, cancelled as soon as its client goes."""

    def __init__(
        self,
        events: Callable[[], AsyncIterator[str]],
        *,
        close: Callable[[], Awaitable[None]] | None = None,
        exchange: Exchange,
        log: RequestLog,
    ) -> None:
        """`events`: of whole events, one or several at a time. `close`: called at the end, however it comes."""
        super().__init__()
        self._events = events
        self._close = close
        self._exchange = exchange
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._write(send))
        except ClientGone:
            self._exchange.status = 499
        finally:
            if self._close is not None:
                await self._close()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        try:
            async for text in self._events():
                if text:
                    await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        except Exception as error:  # it has begun: what is wrong can only be an event
            told = as_api_error(error, self._exchange.request_id, self._exchange.prompt_field)
            if told.code == "internal":
                self._log.failure(error, self._exchange.request_id)
            self._exchange.error = told.code
            last = f"data: {json_text(told.to_json())}\n\n"
            await send({"type": "http.response.body", "body": last.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def answer_events(running: Running, answer: Answer) -> Callable[[], AsyncIterator[str]]:
    """The events of an answer. Ends without `[DONE]` where an error comes first."""

    async def events() -> AsyncIterator[str]:
        async for prompt, piece in running:
            yield answer.events(prompt, piece)
        yield answer.last_events()

    return events


async def whole_answer(running: Running, answer: Answer) -> str:
    """The answer as one object, once it is complete."""
    async for prompt, piece in running:
        answer.take(prompt, piece, keep=True)
    if answer.entries <= _ENTRIES_AT_ONCE:
        return answer.whole()
    return await asyncio.to_thread(answer.whole)


async def _gone(receive: Receive) -> None:
    """Returns when the client goes."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _close(stream: AsyncIterator[Any]) -> None:
    close = getattr(stream, "aclose", None)
    if close is not None:
        await close()
