"""A request and the sequences that it became. Torch-free."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from rowcast.runtime.detokenizer import Detokenizer
from rowcast.runtime.outputs import CompletionOutput, FinishReason, Logprobs, RequestOutput, RequestStats
from rowcast.runtime.params import SamplingParams


@dataclass(eq=False, slots=True)
class Sequence:
    """One sample of one request: the prompt, and what was generated so far."""

    seq_id: int
    sample_index: int
    request: Request
    detokenizer: Detokenizer | None
    output_ids: list[int] = field(default_factory=list)
    computed: int = 0
    """Tokens whose K/V are in the cache. All tokens but the newest, once the prefill is done."""
    blocks: list[int] = field(default_factory=list)
    cached: int | None = None
    """Tokens whose K/V were there when it was last admitted; None: it never was."""
    named: int = 0
    """Leading blocks that the prefix cache knows of."""
    block_names: list[bytes] = field(default_factory=list)
    """What the prefix cache calls them, as far as it has been asked."""
    logprobs: list[Logprobs] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    streamed_tokens: int = 0
    streamed: bool = False
    """Its last chunk was handed out."""

    @property
    def length(self) -> int:
        """Tokens, prompt and output."""
        return len(self.request.prompt_ids) + len(self.output_ids)

    @property
    def pending(self) -> int:
        """Tokens that have yet to be run: 1 when decoding, more before or during a prefill."""
        return self.length - self.computed

    @property
    def skippable(self) -> int:
        """Tokens at its beginning that nobody wants to see run, but for their K/V: log-probabilities of a prompt take its tokens."""
        known = self.request.prompt_logprobs
        if known is None or self.sample_index or len(known) >= len(self.request.prompt_ids):
            return self.length
        return len(known) - 1

    def tokens(self, start: int, stop: int) -> list[int]:
        """Tokens at positions start .. stop - 1."""
        prompt = self.request.prompt_ids
        split = len(prompt)
        return prompt[start:stop] + self.output_ids[max(0, start - split) : max(0, stop - split)]

    def output(self) -> CompletionOutput:
        wants_logprobs = self.request.params.logprobs is not None
        return CompletionOutput(
            self.sample_index,
            "" if self.detokenizer is None else self.detokenizer.text,
            list(self.output_ids),
            self.cumulative_logprob if wants_logprobs else None,
            self.logprobs if wants_logprobs else None,
            self.finish_reason,
            self.stop_reason,
        )


@dataclass(eq=False, slots=True)
class Request:
    """What a caller asked for, in token ids."""

    request_id: str
    prompt: str | None
    prompt_ids: list[int]
    params: SamplingParams
    seed: int
    max_length: int
    """Tokens, prompt and output, at which generation ends."""
    stats: RequestStats
    sequences: list[Sequence] = field(default_factory=list)
    prompt_logprobs: list[Logprobs | None] | None = None
    cache_key: str | None = ""
    """K/V are shared among requests with equal keys: what they depend on beside tokens and the engine's ladder. None: with none."""
    dropped: bool = False
    """Its owner has gone; the next step aborts it."""
    arrived_s: float = field(default_factory=time.perf_counter)
    first_token_s: float | None = None
    first_step_tokens: int = 0
    """Tokens that the first emitting step gave; they are part of the time to first token."""

    @property
    def finished(self) -> bool:
        return all(s.finish_reason is not None for s in self.sequences)

    def count(self, emitted: int) -> None:
        """Note that a step just gave `emitted` tokens to this request."""
        now = time.perf_counter()
        self.stats.generated_tokens += emitted
        if self.first_token_s is None:
            self.first_token_s = now
            self.first_step_tokens = emitted
            self.stats.ttft_s = now - self.arrived_s
        later = self.stats.generated_tokens - self.first_step_tokens
        if later and now > self.first_token_s:
            self.stats.tokens_per_s = later / (now - self.first_token_s)

    def output(self) -> RequestOutput:
        return RequestOutput(
            self.request_id,
            self.prompt,
            self.prompt_ids,
            [s.output() for s in self.sequences],
            self.finished,
            self.stats,
            self.prompt_logprobs,
        )
