"""What HTTP asks of whatever runs the model: an engine of this machine, or replicas on a Ray cluster. Torch-free."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from rowcast.runtime.outputs import FinishReason, Logprobs
from rowcast.runtime.params import SamplingParams
from rowcast.runtime.tokenizer import Tokenizer

State = Literal["starting", "ready", "recovering", "draining", "stopped"]
"""Requests are taken in `ready` and `recovering`, where they wait; only `ready` is ready."""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a server says of its model."""

    name: str
    created_s: int
    """Unix time at which it was loaded."""
    max_context: int
    """Tokens, prompt and output."""
    vocab_size: int
    ladder: str
    mode: str


@dataclass(frozen=True, slots=True)
class Ask:
    """One request for the model, whatever the route it came by."""

    request_id: str
    prompt: str | list[int]
    """Text with the chat template applied, or token ids."""
    params: SamplingParams
    client: str = ""
    """Clients share the engine evenly: the name of an API key, or an address."""
    deadline_s: float | None = None
    """Seconds from now; None: as the server says."""
    ladder: str | None = None
    """Rungs of the server's ladder that may draft for this request, as in "ngram / plain"; None: all."""
    mode: str | None = None
    """None: the server's."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a finished request took."""

    prompt_tokens: int
    cached_tokens: int
    """Of the prompt: those whose K/V were there already."""
    generated_tokens: int
    stats: dict[str, Any] = field(default_factory=dict)
    """`RequestStats.to_json()`."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What one sample of a request gained: joined, the texts are the final text and the ids the final ids."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[Logprobs] | None = None
    """One for each of `token_ids`, where they were asked for."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    prompt_token_ids: list[int] | None = None
    """On the first piece."""
    usage: Usage | None = None
    """On the last piece."""


class ServingError(Exception):
    """A request that cannot be served, through no fault of what it asks: one sentence for its client."""

    def __init__(self, sentence: str, *, status: int, kind: str, code: str, retry_after_s: float | None = None) -> None:
        """`status`: HTTP's. `kind` and `code`: `type` and `code` of OpenAI's error object. `retry_after_s`: when to try again."""
        super().__init__(sentence)
        self.status, self.kind, self.code, self.retry_after_s = status, kind, code, retry_after_s


def queue_full(waiting: int, retry_after_s: float) -> ServingError:
    """Too many requests wait."""
    return ServingError(
        f"{waiting} requests wait already, which is the most that this server lets wait: try again in {retry_after_s:g} s",
        status=429, kind="rate_limit_error", code="queue_full", retry_after_s=retry_after_s,
    )  # fmt: skip


def unavailable(reason: str, retry_after_s: float | None = None) -> ServingError:
    """The server starts, drains or has lost its model."""
    return ServingError(reason, status=503, kind="service_unavailable", code="unavailable", retry_after_s=retry_after_s)


def too_late(deadline_s: float) -> ServingError:
    """A request's deadline passed before it was finished."""
    return ServingError(
        f"the request was not finished within its deadline of {deadline_s:g} s",
        status=504, kind="timeout_error", code="deadline_exceeded",
    )  # fmt: skip


def engine_failed(reason: str) -> ServingError:
    """The request was lost with its engine."""
    return ServingError(reason, status=500, kind="server_error", code="engine_failed")


class Backend(Protocol):
    """Runs requests. Its methods are called in one event loop."""

    @property
    def card(self) -> ModelCard: ...

    @property
    def tokenizer(self) -> Tokenizer:
        """For chat templates, `/tokenize` and token texts. Raises UserError if the model has none."""
        ...

    def state(self) -> tuple[State, str]:
        """And why, in half a sentence; empty in `ready`."""
        ...

    async def submit(self, ask: Ask) -> AsyncIterator[Piece]:
        """Queue a request. Returns once it is taken; the pieces come as they are made, the last one with `usage`.

        Closing the iterator (`aclose`) cancels what is left. Raises UserError for what cannot be honoured, ServingError for what
        cannot be served now; the iterator raises ServingError for a request that was taken and lost, or came to its deadline.
        """
        ...

    async def live(self) -> dict[str, Any]:
        """What the page shows; JSON. See `docs/serving.md` for its keys."""
        ...

    async def metrics(self) -> bytes:
        """In Prometheus's text format."""
        ...

    async def drain(self, timeout_s: float) -> bool:
        """Take no more requests, finish those that were taken, and end; whether all were finished in time."""
        ...
