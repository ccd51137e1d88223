"""One request between the event loop, which waits for its pieces, and the engine's thread, which makes them. Torch-free."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from rowcast.runtime.params import SamplingParams
from rowcast.runtime.request import Request
from rowcast.serving.backend import Ask, Piece

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(eq=False, slots=True)
class Taken:
    """A request that was taken. The event loop owns what is above `request`, the engine's thread what is below."""

    ask: Ask
    params: SamplingParams
    """With its seed."""
    prompt_ids: list[int]
    bad_word_ids: list[list[int]]
    pieces: deque[Piece] = field(default_factory=deque)
    """That nobody has taken yet; at most one for each sample, and a last one."""
    error: Exception | None = None
    over: bool = False
    """Nothing comes any more."""
    cancelled: bool = False
    """Nobody wants it any more. Set by any thread, never unset."""
    alarm: asyncio.TimerHandle | None = None
    """Of its deadline."""
    woken: asyncio.Future[None] | None = None
    """What its reader waits for."""
    arrived_s: float = field(default_factory=time.monotonic)
    request: Request | None = None
    begun_s: float | None = None
    """When the engine got it."""
    first_token_s: float | None = None

    def give(self, pieces: list[Piece], error: Exception | None = None) -> None:
        """In the event loop: what was gained; `error`, or a piece with `usage`, is the last. A slow reader's pieces grow into one."""
        if self.over:
            return
        for piece in pieces:
            if piece.prompt_token_ids is not None:
                self.prompt_ids = piece.prompt_token_ids
            untaken = next((other for other in self.pieces if other.index == piece.index), None)
            if untaken is not None:
                self.pieces.remove(untaken)
                piece = joined(untaken, piece)
            self.pieces.append(piece)
            self.over = self.over or piece.usage is not None
        if error is not None:
            self.error, self.over = error, True
        if self.over and self.alarm is not None:
            self.alarm.cancel()
            self.alarm = None
        if self.woken is not None and not self.woken.done():
            self.woken.set_result(None)


class Pieces(AsyncIterator[Piece]):
    """What `Backend.submit` returns: for one reader."""

    def __init__(self, taken: Taken, cancel: Callable[[Taken], None]) -> None:
        """`cancel`: called in the event loop, at most once."""
        self._taken = taken
        self._cancel = cancel
        self._first = True

    async def __anext__(self) -> Piece:
        taken = self._taken
        while not taken.pieces:
            if taken.error is not None:
                error, taken.error = taken.error, None
                raise error
            if taken.over or taken.cancelled:
                raise StopAsyncIteration
            taken.woken = asyncio.get_running_loop().create_future()
            try:
                await taken.woken
            finally:
                taken.woken = None
        piece = taken.pieces.popleft()
        if self._first:
            self._first = False
            return replace(piece, prompt_token_ids=taken.prompt_ids)
        return piece

    async def aclose(self) -> None:
        """Cancel what is left. May be called twice."""
        taken = self._taken
        if not taken.cancelled:
            self._cancel(taken)
        taken.pieces.clear()
        taken.error = None

    def __del__(self) -> None:
        self._taken.cancelled = True


def joined(first: Piece, then: Piece) -> Piece:
    """Two pieces of one sample as one."""
    logprobs = None if first.logprobs is None and then.logprobs is None else [*(first.logprobs or []), *(then.logprobs or [])]
    return replace(
        then,
        text=first.text + then.text,
        token_ids=first.token_ids + then.token_ids,
        logprobs=logprobs,
    )
