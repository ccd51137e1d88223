"""Draws the next token of each sequence: vLLM's law, Gumbel noise that depends on the request alone.

Order, as in vLLM V1: log-probabilities of the raw logits; allowed_token_ids, bad_words, min_tokens, logit_bias; penalties; then
greedy rows take the argmax, the others temperature, min_p, top_k, top_p and the Gumbel-max draw.

It does not know text, KV or the model. Host state says what each row needs, so that nothing is computed that nobody asked for;
device tensors carry the numbers, so that one call serves rows with different parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rowcast.errors import UserError
from rowcast.runtime.logits import keep_min_p_, keep_top_, penalise_, prompt_logprobs, token_logprobs
from rowcast.runtime.params import SamplingParams
from rowcast.runtime.philox import gumbel
from rowcast.runtime.sampling_batch import Batch, Draws, Rows, SampledSequence, make_batch, upload
from rowcast.runtime.step import TokenLogprobs

__all__ = ["SampleOutput", "Sampler", "prompt_logprobs"]


@dataclass(frozen=True, slots=True)
class SampleOutput:
    token_ids: Tensor
    """[B] int64, on the device."""
    logprobs: list[TokenLogprobs | None] | None
    """For each row, where it asked; None where no row did."""


class TokenCounts:
    """Which tokens each penalised sequence has seen: one slot each, 5 bytes for each token of the vocabulary."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.in_prompt = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)
        self.generated = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._free: list[int] = []

    def add(self, prompt_ids: Tensor) -> int:
        """A slot that has seen the prompt, [P] int64, and nothing generated."""
        if not self._free:
            slots, vocab_size = self.in_prompt.shape
            more = max(slots, 1)
            self.in_prompt = torch.cat([self.in_prompt, self.in_prompt.new_empty(more, vocab_size)])
            self.generated = torch.cat([self.generated, self.generated.new_empty(more, vocab_size)])
            self._free.extend(range(slots, slots + more))
        slot = self._free.pop()
        self.in_prompt[slot].zero_().index_fill_(0, prompt_ids, True)
        self.generated[slot].zero_()
        return slot

    def count(self, slot: int, token_ids: Tensor) -> None:
        """`token_ids` [n] int64 were generated."""
        self.generated[slot].index_add_(0, token_ids, torch.ones_like(token_ids, dtype=torch.int32))

    def remove(self, slot: int) -> None:
        self._free.append(slot)


class Sampler:
    """Samples for the sequences it was told of, and remembers them from `add` to `remove`, whatever happens to their KV."""

    def __init__(self, vocab_size: int, device: torch.device | str = "cpu") -> None:
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self._sequences: dict[int, SampledSequence] = {}
        self._counts = TokenCounts(vocab_size, self.device)
        self._last: tuple[list[int], Batch] | None = None

    def add(
        self,
        seq_id: int,
        params: SamplingParams,
        *,
        seed: int,
        sample_index: int,
        prompt_ids: Sequence[int],
        eos_ids: Sequence[int],
        bad_word_ids: Sequence[Sequence[int]] = (),
    ) -> None:
        """Start a sequence. `seed` is the request's, resolved, in 0..2**63 - 1; `sample_index` in 0..n - 1.

        `bad_word_ids` are the token sequences of params.bad_words, with and without a leading space. Raises UserError for
        token ids outside the vocabulary and for parameters that may leave no token to generate.
        """
        assert seq_id not in self._sequences
        assert 0 <= seed < 1 << 63
        stop_ids = tuple(i for i in sorted({*eos_ids, *(params.stop_token_ids or ())}) if i < self.vocab_size)
        bad_words = [list(word) for word in bad_word_ids if word]
        self._check(params, {*(stop_ids if params.min_tokens else ()), *(word[-1] for word in bad_words)})
        self._sequences[seq_id] = SampledSequence(params, seed, sample_index, list(prompt_ids), stop_ids, bad_words)
        self._last = None

    @property
    def seq_ids(self) -> set[int]:
        """Sequences it was told of."""
        return set(self._sequences)

    def suspend(self, seq_id: int) -> None:
        """The sequence will not be sampled for a while: give back its device memory, which the next `sample` fills again."""
        sequence = self._sequences[seq_id]
        if sequence.slot is not None:
            self._counts.remove(sequence.slot)
            sequence.slot = None
            self._last = None

    def remove(self, seq_id: int) -> None:
        """Forget a sequence. Raises KeyError for an unknown one."""
        self.suspend(seq_id)
        del self._sequences[seq_id]
        self._last = None

    def commit(self, seq_id: int, token_ids: Sequence[int]) -> None:
        """`token_ids` are now part of the output: position, penalties, min_tokens and bad words count them."""
        sequence = self._sequences[seq_id]
        sequence.generated.extend(token_ids)
        if sequence.slot is not None:
            self._counts.count(sequence.slot, self._ids(token_ids))

    def process(self, rows: Sequence[int], logits: Tensor) -> Tensor:
        """The law of the next token of the sequences `rows`: logits [B, V] -> float32 [B, V], -inf where forbidden.

        A row is drawn from softmax of its result. A greedy row takes the argmax: temperature and truncation leave it alone.
        Does not modify `logits`, but returns it where nothing applies.
        """
        assert logits.shape == (len(rows), self.vocab_size)
        batch = self._batch(rows)
        x = logits.float()
        if batch.edits:
            x = _own(x, logits)
            self._edit_(x, batch)
        if batch.temperature is not None:
            x = x / batch.temperature
        if batch.truncates:
            x = _own(x, logits)
            if batch.log_min_p is not None:
                keep_min_p_(x, batch.log_min_p)
            for t in batch.truncations:
                _change_(x, t.rows, keep_top_, t.top_k, t.top_p, t.max_k)
        return x

    def sample(self, rows: Sequence[int], logits: Tensor) -> SampleOutput:
        """Draw the next token of the sequences `rows` from logits [B, V]; the lowest id wins a tie; -1 where logits are NaN.

        Does not modify `logits` and counts nothing: `commit` does. Waits for the device only if log-probabilities are asked for.
        """
        batch = self._batch(rows)
        x = self.process(rows, logits)
        token_ids = x.argmax(-1) if batch.draws is None else self._draw(batch, batch.draws, x)
        token_ids = token_ids.where(~x.gather(-1, token_ids[:, None])[:, 0].isnan(), -1)  # argmax prefers NaN
        return SampleOutput(token_ids, _report(batch, logits, token_ids.clamp(min=0)) if batch.logprobs else None)

    def _batch(self, rows: Sequence[int]) -> Batch:
        if self._last is None or self._last[0] != list(rows):
            sequences = [self._sequences[seq_id] for seq_id in rows]
            for sequence in sequences:
                if sequence.params.penalises and sequence.slot is None:
                    sequence.slot = self._counts.add(self._ids(sequence.prompt_ids))
                    self._counts.count(sequence.slot, self._ids(sequence.generated))
            self._last = list(rows), make_batch(sequences, self.vocab_size, self.device)
        return self._last[1]

    def _check(self, params: SamplingParams, forbidden: set[int]) -> None:
        """`forbidden`: all that min_tokens or a bad word may forbid at some position."""
        for name, ids in (("allowed_token_ids", params.allowed_token_ids), ("logit_bias", params.logit_bias)):
            if ids and max(ids) >= self.vocab_size:
                raise UserError(f"{name} has token id {max(ids)} but the model's ids end at {self.vocab_size - 1}; leave it out.")
        if params.allowed_token_ids and forbidden.issuperset(params.allowed_token_ids):
            raise UserError("allowed_token_ids has no token that min_tokens and bad_words never forbid; allow at least one more.")

    def _edit_(self, x: Tensor, batch: Batch) -> None:
        """Allowed ids, bad words, min_tokens, bias and penalties, in place on x [B, V] float32."""
        for row, ids in batch.allowed:
            kept = x[row, ids]
            x[row] = -math.inf
            x[row, ids] = kept
        forbidden = [(row, i) for row in batch.forbidding for i in batch.sequences[row].forbidden()]
        if forbidden:
            row_ids, token_ids = zip(*forbidden, strict=True)
            x[self._ids(row_ids), self._ids(token_ids)] = -math.inf
        if batch.bias is not None:
            *where, values = batch.bias
            x.index_put_(tuple(where), values, accumulate=True)
        if batch.penalties is not None:
            p = batch.penalties
            _change_(x, p.rows, penalise_, self._counts.in_prompt[p.slots], self._counts.generated[p.slots], *p.strengths)

    def _draw(self, batch: Batch, draws: Draws, x: Tensor) -> Tensor:
        """Gumbel-max where a row is not greedy: processed logits x [B, V] -> ids [B]."""
        positions = self._ids([sequence.position for sequence in batch.sequences if not sequence.params.greedy])
        noise = gumbel(draws.seeds, draws.sample_index, positions, range(self.vocab_size))
        drawn = noise.add_(x[draws.rows]).argmax(-1)
        return drawn if isinstance(draws.rows, slice) else x.argmax(-1).index_copy_(0, draws.rows, drawn)

    def _ids(self, values: Sequence[int]) -> Tensor:
        return upload(values, torch.int64, self.device)


def _own(x: Tensor, source: Tensor) -> Tensor:
    """`x`, fit to be written to: a copy where it is `source` itself."""
    return x.clone() if x is source else x


def _change_(x: Tensor, rows: Rows, change_: Callable[..., None], *arguments: Any) -> None:
    """Run an in-place function on some rows of x [B, V]."""
    part = x[rows]
    change_(part, *arguments)
    if not isinstance(rows, slice):
        x[rows] = part


def _report(batch: Batch, logits: Tensor, token_ids: Tensor) -> list[TokenLogprobs | None]:
    """Log-probabilities of token_ids [B] under the raw logits [B, V], for the rows that asked."""
    rows = list(batch.logprobs)
    some = slice(None) if len(rows) == len(batch.sequences) else rows
    found = dict(zip(rows, token_logprobs(logits[some], token_ids[some], list(batch.logprobs.values())), strict=True))
    return [found.get(row) for row in range(len(batch.sequences))]
