"""What a caller gets back. Torch-free; names as in vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's log-probability under the unprocessed logits."""

    logprob: float
    rank: int
    """1 for the most likely token of the vocabulary."""
    decoded_token: str | None = None


Logprobs = dict[int, Logprob]
"""By token id: the token that was chosen and the most likely ones."""


@dataclass(slots=True)
class CompletionOutput:
    """One of a request's `n` samples."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[Logprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop string or stop token id that ended it; None for the model's own end of text."""

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "index": self.index,
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "stop_reason": self.stop_reason,
        }
        if self.logprobs is not None:
            found["logprobs"] = [_logprobs_json(entry) for entry in self.logprobs]
        return found


@dataclass(slots=True)
class RequestStats:
    """What a request cost. Times are in seconds, counts over all of its samples."""

    prompt_tokens: int
    generated_tokens: int = 0
    ttft_s: float | None = None
    """From the request's arrival to its first token."""
    tokens_per_s: float | None = None
    """Tokens after the first step that emitted any, over the time they took. None where there were none."""
    rounds: int = 0
    """Steps of the ladder that emitted tokens, over all samples."""
    acceptance: dict[str, float] = field(default_factory=dict)
    """By rung: the share of its proposals that stood. Empty where nothing was proposed."""
    density: dict[str, float] = field(default_factory=dict)
    """By rung: weights read over weights there are."""
    bytes_read: dict[str, int] = field(default_factory=dict)
    """By memory: weights and KV read for this request. A pass over the weights is shared evenly by the sequences in it."""
    preemptions: int = 0
    seed: int = 0

    @property
    def tokens_per_round(self) -> float:
        return self.generated_tokens / self.rounds if self.rounds else 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
            "ttft_s": self.ttft_s,
            "tokens_per_s": self.tokens_per_s,
            "rounds": self.rounds,
            "tokens_per_round": self.tokens_per_round,
            "acceptance": self.acceptance,
            "density": self.density,
            "bytes_read": self.bytes_read,
            "preemptions": self.preemptions,
            "seed": self.seed,
        }


@dataclass(slots=True)
class RequestOutput:
    """A finished request."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestStats
    prompt_logprobs: list[Logprobs | None] | None = None
    """One for each prompt token, None for the first."""

    def to_json(self) -> dict[str, Any]:
        """The command line's object: the first sample's text, ids and finish reason, `stats`; `outputs` where n > 1."""
        samples = [output.to_json() for output in self.outputs]
        found = {key: value for key, value in samples[0].items() if key != "index"}
        found["stats"] = self.metrics.to_json()
        if self.prompt_logprobs is not None:
            found["prompt_logprobs"] = [None if entry is None else _logprobs_json(entry) for entry in self.prompt_logprobs]
        if len(samples) > 1:
            found["outputs"] = samples
        return found


def _logprobs_json(logprobs: Logprobs) -> list[dict[str, Any]]:
    return [
        {"id": token_id, "token": entry.decoded_token, "logprob": entry.logprob, "rank": entry.rank}
        for token_id, entry in logprobs.items()
    ]


@dataclass(frozen=True, slots=True)
class StreamChunk:
    """What a streamed request gained: joined, the texts are the final text and the ids the final ids."""

    text: str
    token_ids: list[int]
    index: int
    """Which of the request's samples."""
    finish_reason: FinishReason | None = None
    output: RequestOutput | None = None
    """The whole result, on the last chunk only."""
