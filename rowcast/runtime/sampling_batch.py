"""Which rows of a sampling step ask for what, as device tensors: built once, used while the same sequences run.

It does no maths (`logits`) and keeps no state (`sampler`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from rowcast.runtime.params import SamplingParams

Rows: TypeAlias = Tensor | slice
"""Some rows of a batch: int64 indices on the device, or slice(None) for all."""


class Row(NamedTuple):
    """One row of logits: it predicts the next token of a sequence, behind tokens that are drafted but not committed."""

    seq_id: int
    drafted: tuple[int, ...] = ()
    """They count as generated, for this row only."""


@dataclass(slots=True)
class SampledSequence:
    """What the sampler remembers of one sequence, on the host."""

    params: SamplingParams
    seed: int
    sample_index: int
    prompt_ids: list[int]
    stop_ids: tuple[int, ...]
    """Forbidden until min_tokens are generated."""
    bad_words: list[list[int]]
    generated: list[int] = field(default_factory=list)
    slot: int | None = None
    """Its row in the token counts, while it is penalised and running."""
    rounds: int = 0
    """Verdicts passed on it so far, modulo 2**16. It keys the noise of rejection sampling."""

    @property
    def position(self) -> int:
        """Of the next token, in the whole sequence. With the number of drafted tokens added, it keys the noise."""
        return len(self.prompt_ids) + len(self.generated)

    def forbidden(self, drafted: tuple[int, ...]) -> list[int]:
        """By min_tokens and bad words, behind `drafted`."""
        ids = list(self.stop_ids) if len(self.generated) + len(drafted) < self.params.min_tokens else []
        recent = [*self.generated[-max(map(len, self.bad_words), default=1) :], *drafted]
        for *prefix, last in self.bad_words:
            if not prefix or recent[-len(prefix) :] == prefix:
                ids.append(last)
        return ids


@dataclass(frozen=True, slots=True)
class Penalties:
    """N rows with a presence, frequency or repetition penalty."""

    rows: Rows
    numbers: list[int]
    """The same, on the host."""
    slots: Tensor
    """[N] int64."""
    strengths: tuple[Tensor, Tensor, Tensor]
    """Repetition, frequency, presence, each [N, 1] float32."""


@dataclass(frozen=True, slots=True)
class Truncation:
    """N rows with top_k or top_p: arguments of `keep_top_`."""

    rows: Rows
    top_k: Tensor
    top_p: Tensor
    max_k: int
    nucleus: bool
    """Whether top_p keeps fewer than top_k does, in any row."""


@dataclass(frozen=True, slots=True)
class Batch:
    """B rows. None or empty where no row asks. It holds for any drafted tokens."""

    sequences: list[SampledSequence]
    """Of each row."""
    allowed: list[tuple[int, Tensor]]
    """Rows with allowed_token_ids, and these."""
    forbidding: list[int]
    """Rows with min_tokens or bad words."""
    bias: tuple[Tensor, Tensor, Tensor] | None
    """Rows, token ids and what to add."""
    penalties: Penalties | None
    temperature: Tensor | None
    """[B, 1] float32, 1 for greedy rows."""
    log_min_p: Tensor | None
    """[B, 1] float32, -inf for rows without."""
    truncations: list[Truncation]
    random: Rows | None
    """Rows that are not greedy."""
    seeds: Tensor
    sample_index: Tensor
    """[B] int64, as are the seeds: the requests' part of the noise key."""

    @property
    def edits(self) -> bool:
        """Whether logits change before the temperature."""
        return bool(self.allowed or self.forbidding or self.bias or self.penalties)

    @property
    def truncates(self) -> bool:
        return self.log_min_p is not None or bool(self.truncations)


def upload(values: Iterable[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[n] on the device, without waiting for it (a copy from memory that is not pinned would)."""
    return torch.tensor(list(values), dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def make_batch(sequences: list[SampledSequence], vocab_size: int, device: torch.device) -> Batch:
    """`sequences`: of each row, so one with drafted tokens comes several times."""
    params = [sequence.params for sequence in sequences]
    random = [row for row, p in enumerate(params) if not p.greedy]
    penalised = [row for row, p in enumerate(params) if p.penalises]
    biased = [(row, token, bias) for row, p in enumerate(params) for token, bias in (p.logit_bias or {}).items()]

    def ids(values: Iterable[int]) -> Tensor:
        return upload(values, torch.int64, device)

    def column(values: Iterable[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return upload(values, dtype, device)[:, None]

    def index(rows: list[int]) -> Rows:
        return slice(None) if len(rows) == len(sequences) else ids(rows)

    def of_random(value: Callable[[SamplingParams], float], off: float) -> Tensor | None:
        """[B, 1]: `off` for greedy rows; None where it is `off` for all."""
        values = [off if p.greedy else value(p) for p in params]
        return column(values) if any(v != off for v in values) else None

    def truncation(rows: list[int]) -> Truncation:
        top_k = [params[row].top_k if _keeps_k(params[row], vocab_size) else vocab_size for row in rows]
        nucleus = any(params[row].top_p < 1 for row in rows)
        top_p = (params[row].top_p if params[row].top_p < 1 else math.inf for row in rows)
        return Truncation(index(rows), ids(top_k)[:, None], column(top_p, torch.float64), max(top_k), nucleus)

    # Two groups, so that a row with top_p alone, which needs the whole vocabulary sorted, does not make the others sort it.
    with_k = [row for row in random if _keeps_k(params[row], vocab_size)]
    with_p_alone = [row for row in random if params[row].top_p < 1 and row not in with_k]

    return Batch(
        sequences=sequences,
        allowed=[(row, ids(p.allowed_token_ids)) for row, p in enumerate(params) if p.allowed_token_ids],
        forbidding=[row for row, sequence in enumerate(sequences) if sequence.bad_words or sequence.params.min_tokens],
        bias=(ids(b[0] for b in biased), ids(b[1] for b in biased), upload((b[2] for b in biased), torch.float32, device))
        if biased
        else None,
        penalties=Penalties(
            index(penalised),
            penalised,
            ids(slot for sequence in sequences if (slot := sequence.slot) is not None),
            (
                column(params[row].repetition_penalty for row in penalised),
                column(params[row].frequency_penalty for row in penalised),
                column(params[row].presence_penalty for row in penalised),
            ),
        )
        if penalised
        else None,
        temperature=of_random(lambda p: p.temperature, 1.0),
        log_min_p=of_random(lambda p: math.log(p.min_p) if p.min_p else -math.inf, -math.inf),
        truncations=[truncation(rows) for rows in (with_k, with_p_alone) if rows],
        random=index(random) if random else None,
        seeds=ids(sequence.seed for sequence in sequences),
        sample_index=ids(sequence.sample_index for sequence in sequences),
    )


def _keeps_k(params: SamplingParams, vocab_size: int) -> bool:
    return 0 < params.top_k < vocab_size
