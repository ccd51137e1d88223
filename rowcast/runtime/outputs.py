"""What a caller gets back. Torch-free; names as in vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Literal

from rowcast.runtime.ladder.spec import Ladder
from rowcast.runtime.step import PREFILL, Moved, RungCounts

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
    """Rounds of the ladder, over all samples. A prefill, and the token that comes of it, is none."""
    round_tokens: int = 0
    """Tokens that the rounds emitted."""
    rungs: dict[str, RungCounts] = field(default_factory=dict)
    """What each rung proposed and ran: PREFILL, then the ladder's, cheapest first. Rungs that did nothing may be missing."""
    bytes_read: dict[str, int] = field(default_factory=dict)
    """By memory: weights and KV read for this request. A pass over the weights is shared evenly by the sequences in it."""
    dense_bytes: int = 0
    """What plain decoding in the same batches would have read for the same tokens, prompts included (`dense.DenseReads`)."""
    moved: Moved | None = None
    """What came from host memory and disk; None where nothing lies there."""
    preemptions: int = 0
    cached_tokens: int = 0
    """Of the prompt: those whose K/V other requests had left, when its first sample was begun."""
    seed: int = 0
    ladder: Ladder = field(default_factory=lambda: Ladder.parse("plain"))
    """The rungs that might run for it."""
    names: tuple[str, ...] | None = None
    """Their keys in `rungs`; None: `ladder.names`. Those of an engine with more rungs may say more."""
    verification: str = "coupled"

    def count(self, rungs: Mapping[str, RungCounts], memory: str) -> None:
        """Add what one sequence's step cost; its bytes came from `memory`, host or gpu."""
        for name, counts in rungs.items():
            self.rungs.setdefault(name, RungCounts()).add(counts)
            self.bytes_read[memory] = self.bytes_read.get(memory, 0) + counts.bytes_read
        names = self.ladder.names if self.names is None else self.names
        self.rungs = {name: self.rungs[name] for name in (PREFILL, *names) if name in self.rungs}

    def count_moved(self, moved: Moved | None) -> None:
        """Add what one sequence's step brought from elsewhere."""
        if moved is not None:
            self.moved = self.moved or Moved()
            self.moved.add(moved)

    @property
    def tokens_per_round(self) -> float:
        return self.round_tokens / self.rounds if self.rounds else 0.0

    @property
    def acceptance(self) -> dict[str, float]:
        """By rung that proposed: the share of its judged proposals that stood, whoever judged. Where rungs are left out at run time,
        that is not always the same rung: the verdicts of all of a rung's verifiers count together."""
        return {name: counts.acceptance for name, counts in self.rungs.items() if counts.acceptance is not None}

    @property
    def acceptance_by_position(self) -> dict[str, list[float]]:
        """Likewise, for the first token of a proposal, the second, ..., as far as any was judged."""
        return {
            name: [stood / judged for stood, judged in zip_longest(counts.accepted, counts.judged, fillvalue=0)]
            for name, counts in self.rungs.items()
            if counts.judged
        }

    @property
    def density(self) -> dict[str, float]:
        """By rung that runs a model: the share of the neurons that generated tokens used."""
        return {name: _share(c.neurons, c.neurons_of) for name, c in self.rungs.items() if c.tokens and name != PREFILL}

    @property
    def head_density(self) -> dict[str, float]:
        """Likewise, of the query heads."""
        return {name: _share(c.heads, c.heads_of) for name, c in self.rungs.items() if c.tokens and name != PREFILL}

    def to_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
            "ttft_s": self.ttft_s,
            "tokens_per_s": self.tokens_per_s,
            "rounds": self.rounds,
            "tokens_per_round": self.tokens_per_round,
            "ladder": str(self.ladder),
            "verification": self.verification,
            "acceptance": self.acceptance,
            "acceptance_by_position": self.acceptance_by_position,
            "refreshes": {name: counts.refreshes for name, counts in self.rungs.items() if counts.refreshes},
            "time_s": {name: counts.seconds for name, counts in self.rungs.items()},
            "density": self.density,
            "head_density": self.head_density,
            "overflows": {name: counts.overflows for name, counts in self.rungs.items() if counts.overflows},
            "fallbacks": {name: counts.fallbacks for name, counts in self.rungs.items() if counts.fallbacks},
            "bytes_read": self.bytes_read,
            "dense_bytes": self.dense_bytes,
            **({} if self.moved is None else {"offload": _moved_json(self.moved)}),
            "preemptions": self.preemptions,
            "cached_tokens": self.cached_tokens,
            "seed": self.seed,
        }


def _moved_json(moved: Moved) -> dict[str, Any]:
    """Bytes by link, and of what they are."""
    links = {
        "bus": {"weights": moved.weight_bytes, "rows": moved.row_bytes, "KV": moved.kv_bytes, "KV out": moved.kv_out_bytes},
        "disk": {"weights": moved.disk_bytes},
    }
    return {
        "rows": {"wanted": moved.rows_wanted, "hit": moved.rows_hit, "moved": moved.rows_moved},
        "bytes": {
            link: {what: size for what, size in found.items() if size} for link, found in links.items() if any(found.values())
        },
        "stalled_s": moved.stalled_s,
    }


def _share(used: int, of: int) -> float:
    """1 where nothing was counted: all were used."""
    return used / of if of else 1.0


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
    logprobs: list[Logprobs] | None = None
    """One for each of `token_ids`, where they were asked for."""
    stop_reason: int | str | None = None
    """As in `CompletionOutput`."""
