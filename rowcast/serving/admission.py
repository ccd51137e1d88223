"""Who may run next: clients share the engine evenly, each one's requests in the order of their arrival. Torch-free.

It knows neither threads nor the engine; one caller at a time uses it.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

GENERATED_WEIGHT = 2.0
"""What a generated token counts for, where one of a prompt counts for 1: the virtual token counter's own weights (arXiv 2401.00588)."""

_LEAST_RETRY_S, _MOST_RETRY_S = 1.0, 60.0
_UNKNOWN_RETRY_S = 5.0
"""Where nothing was finished lately."""
_RATE_S = 60.0
_RATE_KEPT = 256


@dataclass(slots=True)
class _Client(Generic[T]):
    waiting: deque[tuple[int, T]] = field(default_factory=deque)
    """With the number of their arrival."""
    running: int = 0
    """Requests."""
    served: float = 0.0
    """Weighted tokens; only differences between clients say anything."""


class FairQueue(Generic[T]):
    """Waiting requests of any number of clients. The next one is of the client that was served the fewest tokens so far.

    A virtual token counter for each client (arXiv 2401.00588): prompts count when they are taken, generated tokens as they come. A
    client that comes, or comes back, starts level with the least served one that is here, so that nobody saves up; one that has
    neither waiting nor running requests is forgotten.
    """

    def __init__(self) -> None:
        self._clients: dict[str, _Client[T]] = {}
        self._arrivals = itertools.count()
        self._waiting = 0

    def __len__(self) -> int:
        """Requests that wait."""
        return self._waiting

    def __iter__(self) -> Iterator[T]:
        """Those that wait, client by client."""
        return (item for client in self._clients.values() for _, item in client.waiting)

    @property
    def clients(self) -> int:
        """That have requests here, waiting or running."""
        return len(self._clients)

    def push(self, name: str, item: T) -> None:
        """The client's newest request."""
        client = self._clients.get(name)
        if client is None or not client.waiting:
            level = min((each.served for each in self._clients.values() if each is not client), default=0.0)
            if client is None:
                client = self._clients[name] = _Client()
            client.served = max(client.served, level)
        client.waiting.append((next(self._arrivals), item))
        self._waiting += 1

    def first(self) -> T | None:
        """What `pop` would give."""
        name = self._next()
        return None if name is None else self._clients[name].waiting[0][1]

    def pop(self, tokens: int) -> T:
        """Take the next request, of a prompt of `tokens`; it runs until `done`. Precondition: one waits."""
        name = self._next()
        assert name is not None
        client = self._clients[name]
        _, item = client.waiting.popleft()
        client.running += 1
        client.served += tokens
        self._waiting -= 1
        return item

    def generated(self, name: str, tokens: int) -> None:
        """A running request of that client was given so many."""
        self._clients[name].served += GENERATED_WEIGHT * tokens

    def done(self, name: str) -> None:
        """A request that ran does so no more."""
        self._clients[name].running -= 1
        self._forget(name)

    def remove(self, name: str, item: T) -> bool:
        """Take a waiting request out; whether it was there."""
        client = self._clients.get(name)
        for i, (_, other) in enumerate(client.waiting if client is not None else ()):
            if other is item and client is not None:
                del client.waiting[i]
                self._waiting -= 1
                self._forget(name)
                return True
        return False

    def _next(self) -> str | None:
        """The least served client of those that wait; among equals the one with the fewest running requests, then the first come."""
        waiting = (name for name, client in self._clients.items() if client.waiting)
        return min(waiting, key=self._rank, default=None)

    def _rank(self, name: str) -> tuple[float, int, int]:
        client = self._clients[name]
        return client.served, client.running, client.waiting[0][0]

    def _forget(self, name: str) -> None:
        client = self._clients[name]
        if not client.waiting and not client.running:
            del self._clients[name]


class FinishRate:
    """How many requests finish a second, lately."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=_RATE_KEPT)

    def finished(self, now_s: float) -> None:
        """One has, at that time of any steady clock."""
        self._times.append(now_s)

    def retry_after_s(self, waiting: int, now_s: float) -> float:
        """Whole seconds until as many as wait now will have begun, if requests go on finishing as they do; from 1 to 60."""
        while self._times and now_s - self._times[0] > _RATE_S:
            self._times.popleft()
        if len(self._times) < 2:
            return _UNKNOWN_RETRY_S
        per_second = len(self._times) / max(now_s - self._times[0], 1e-3)
        return float(math.ceil(min(max(waiting / per_second, _LEAST_RETRY_S), _MOST_RETRY_S)))
