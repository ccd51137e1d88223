"""What the engine tells an executor, and what it hears back: plain numbers, fit for msgpack. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SeqStep:
    """The tokens of one sequence to run in one step."""

    seq_id: int
    tokens: list[int]
    start: int
    """Position of the first token = tokens of this sequence already in the KV cache."""
    blocks: list[int]
    """Block table: block i holds positions [i * block_size, (i + 1) * block_size)."""
    prompt_length: int
    """Tokens of the request's prompt. Dynamic NTK scaling reads it."""
    sample: bool
    """Whether the last token's logits are sampled from. False for all but the last chunk of a prefill."""
    prompt_logprobs: int | None = None
    """Return the log-probabilities of the *next* prompt token at each of `tokens` whose successor is a prompt token."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The chosen token's log-probability and the most likely ones, from the unprocessed logits."""

    token_id: int
    logprob: float
    rank: int
    """1 for the most likely token."""
    top_ids: list[int]
    top_logprobs: list[float]


@dataclass(frozen=True, slots=True)
class SeqResult:
    """What one sequence gained in one step. `tokens` is empty where nothing was sampled."""

    seq_id: int
    tokens: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
