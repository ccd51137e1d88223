"""The law and the draw of a sequence's next token: vLLM's law, Gumbel noise that depends on the request alone.

Order, as in vLLM V1: log-probabilities of the raw logits; allowed_token_ids, bad_words, min_tokens, logit_bias; penalties; then
greedy rows take the argmax, the others temperature, min_p, top_k, top_p and the Gumbel-max draw.

A row may stand behind drafted tokens, which then count like generated ones; `commit` alone makes them so.

It does not know text, KV, the model or who proposes what. Host state says what each row needs, so that nothing is computed that
nobody asked for; device tensors carry the numbers, so that one call serves rows with different parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rowcast.errors import UserError
from rowcast.runtime.logits import keep_min_p_, keep_top_, penalise_, prompt_logprobs, token_logprobs
from rowcast.runtime.params import SamplingParams
from rowcast.runtime.philox import Purpose, gumbel, uniform32, unit
from rowcast.runtime.sampling_batch import Batch, Row, Rows, SampledSequence, make_batch, upload
from rowcast.runtime.sharded_logits import Exchanged, Logits, ShardedLogits, best, kth_largest, largest, whole
from rowcast.runtime.step import TokenLogprobs

__all__ = ["Row", "Sampler", "prompt_logprobs"]

_BATCHES = 64
"""Row patterns remembered. A ladder alternates between few: a draft's single rows, a verifier's runs of rows."""


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
        self._batches: dict[tuple[int, ...], Batch] = {}
        """By the rows' sequences, least recently used first."""
        self.exchanged = Exchanged()
        """Between ranks, to draw from `ShardedLogits`."""

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

    @property
    def seq_ids(self) -> set[int]:
        """Sequences it was told of."""
        return set(self._sequences)

    def sequence(self, seq_id: int) -> SampledSequence:
        """What it remembers of a sequence."""
        return self._sequences[seq_id]

    def rewind(self, seq_id: int, generated: int) -> None:
        """The sequence has generated so many tokens and not more, and will not be sampled for a while."""
        del self._sequences[seq_id].generated[generated:]
        self.suspend(seq_id)

    def suspend(self, seq_id: int) -> None:
        """The sequence will not be sampled for a while: give back its device memory, which the next `sample` fills again."""
        sequence = self._sequences[seq_id]
        if sequence.slot is not None:
            self._counts.remove(sequence.slot)
            sequence.slot = None
            self._batches.clear()

    def remove(self, seq_id: int) -> None:
        """Forget a sequence. Raises KeyError for an unknown one."""
        self.suspend(seq_id)
        del self._sequences[seq_id]
        self._batches.clear()

    def commit(self, seq_id: int, token_ids: Sequence[int]) -> None:
        """`token_ids` are now part of the output: position, penalties, min_tokens and bad words count them."""
        sequence = self._sequences[seq_id]
        sequence.generated.extend(token_ids)
        if sequence.slot is not None:
            self._counts.count(sequence.slot, self._ids(token_ids))

    def greedy(self, seq_id: int) -> bool:
        """Whether its law is one-hot."""
        return self._sequences[seq_id].params.greedy

    def next_round(self, seq_id: int) -> int:
        """A number in 0..2**16 - 1 that this sequence was not given in its last 2**16 - 1 calls: for noise that is used once."""
        sequence = self._sequences[seq_id]
        sequence.rounds = (sequence.rounds + 1) % (1 << 16)
        return sequence.rounds

    def rounds(self, seq_id: int) -> int:
        """The last number of `next_round`."""
        return self._sequences[seq_id].rounds

    def resume_rounds(self, seq_id: int, last: int) -> None:
        """Go on after `last`, which another sampler of the sequence gave."""
        self._sequences[seq_id].rounds = last

    def process(self, rows: Sequence[Row], logits: Logits) -> Tensor:
        """The law of each row's next token: logits [B, V] -> float32 [B, V], -inf where forbidden.

        A row is drawn from softmax of its result. A greedy row takes the argmax: temperature and truncation leave it alone.
        Does not modify `logits`, but returns it where nothing applies. Logits that ranks share are gathered.
        """
        logits = whole(logits)
        assert logits.shape == (len(rows), self.vocab_size)
        batch = self._batch(rows)
        x = logits.float()
        if batch.edits:
            x = _own(x, logits)
            self._edit_(x, batch, rows)
        if batch.temperature is not None:
            x = x / batch.temperature
        if batch.truncates:
            x = _own(x, logits)
            if batch.log_min_p is not None:
                keep_min_p_(x, batch.log_min_p)
            for t in batch.truncations:
                _change_(x, t.rows, keep_top_, t.top_k, t.top_p, t.max_k)
        return x

    def sample(self, rows: Sequence[Row], logits: Logits) -> Tensor:
        """Draw each row's next token from logits [B, V] -> ids [B] int64, with the noise that all rungs and rounds share.

        Does not modify `logits`, does not wait for the device and counts nothing: `commit` does. Otherwise as `draw`. Logits that ranks
        share are gathered only where edits, penalties or top_p ask for all of them; where top_k asks it waits.
        """
        if isinstance(logits, ShardedLogits):
            batch = self._batch(rows)
            if not batch.edits and not any(t.nucleus for t in batch.truncations):
                return self._draw_sharded(batch, rows, logits)
        return self.draw(rows, self.process(rows, logits), purpose=Purpose.TOKEN)

    def draw(
        self, rows: Sequence[Row], law: Tensor, *, purpose: Purpose, rung: int = 0, rounds: Sequence[int] | None = None
    ) -> Tensor:
        """Gumbel-max by the noise of (position, purpose, rung, round); argmax for greedy rows.

        law [B, V], logits as `process` gives them, of any floating dtype -> ids [B] int64. The lowest id wins a tie; -1 where the law
        is NaN. `rounds`: of each row, default 0.
        """
        batch = self._batch(rows)
        if batch.random is None:
            token_ids = law.argmax(-1)
        else:
            some = batch.random
            noise = gumbel(
                batch.seeds[some],
                batch.sample_index[some],
                self._positions(batch, rows)[some],
                range(self.vocab_size),
                purpose=purpose,
                rung=rung,
                round_index=self._ids(rounds)[some] if rounds else 0,
            )
            drawn = noise.add_(law[some]).argmax(-1)
            token_ids = drawn if isinstance(some, slice) else law.argmax(-1).index_copy_(0, some, drawn)
        return token_ids.where(~law.gather(-1, token_ids[:, None])[:, 0].isnan(), -1)  # argmax prefers NaN

    def _draw_sharded(self, batch: Batch, rows: Sequence[Row], logits: ShardedLogits) -> Tensor:
        """`draw` of `process`, where each rank does its part of the vocabulary: the same ids, on every rank."""
        comm, counts = logits.comm, self.exchanged
        x = logits.local.float()
        if batch.temperature is not None:
            x = x / batch.temperature
        if batch.truncates:
            x = _own(x, logits.local)
            if batch.log_min_p is not None:
                x.masked_fill_(x < largest(x, comm, counts) + batch.log_min_p, -math.inf)
            for t in batch.truncations:
                part = x[t.rows]
                part.masked_fill_(part < kth_largest(part, t.top_k, t.max_k, comm, self.vocab_size, counts), -math.inf)
                if not isinstance(t.rows, slice):
                    x[t.rows] = part
        score = x.double()
        if batch.random is not None:
            some, ids = batch.random, range(logits.first, logits.first + logits.local.shape[1])
            positions = self._positions(batch, rows)[some]
            noise = gumbel(batch.seeds[some], batch.sample_index[some], positions, ids, purpose=Purpose.TOKEN)
            score[some] = noise.add_(x[some]).double()
        values, token_ids = best(score, logits.first, comm, counts)
        return token_ids.where(~values.isnan(), -1)

    def uniforms(self, rows: Sequence[Row], *, purpose: Purpose, rung: int, rounds: Sequence[int]) -> Tensor:
        """One number in (0, 1) a row, [B] float64, keyed as in `draw`."""
        batch = self._batch(rows)
        words = uniform32(
            batch.seeds,
            batch.sample_index,
            self._positions(batch, rows),
            range(1),
            purpose=purpose,
            rung=rung,
            round_index=self._ids(rounds),
        )
        return unit(words[:, 0])

    def report(self, seq_id: int, logits: Logits, token_ids: Sequence[int]) -> list[TokenLogprobs] | None:
        """Log-probabilities of `token_ids` [n] under the raw logits [n, V], where the sequence asks for them; then waits for the
        device."""
        k = self._sequences[seq_id].params.logprobs
        return None if k is None else token_logprobs(whole(logits), self._ids(token_ids).clamp(min=0), [k] * len(token_ids))

    def _batch(self, rows: Sequence[Row]) -> Batch:
        pattern = tuple([row.seq_id for row in rows])
        batch = self._batches.pop(pattern, None)
        if batch is None:
            sequences = [self._sequences[seq_id] for seq_id in pattern]
            for sequence in sequences:
                if sequence.params.penalises and sequence.slot is None:
                    sequence.slot = self._counts.add(self._ids(sequence.prompt_ids))
                    self._counts.count(sequence.slot, self._ids(sequence.generated))
            batch = make_batch(sequences, self.vocab_size, self.device)
            if len(self._batches) == _BATCHES:
                del self._batches[next(iter(self._batches))]
        self._batches[pattern] = batch
        return batch

    def _positions(self, batch: Batch, rows: Sequence[Row]) -> Tensor:
        return self._ids([sequence.position + len(row.drafted) for sequence, row in zip(batch.sequences, rows, strict=True)])

    def _check(self, params: SamplingParams, forbidden: set[int]) -> None:
        """`forbidden`: all that min_tokens or a bad word may forbid at some position."""
        for name, ids in (("allowed_token_ids", params.allowed_token_ids), ("logit_bias", params.logit_bias)):
            if ids and max(ids) >= self.vocab_size:
                raise UserError(f"{name} has token id {max(ids)} but the model's ids end at {self.vocab_size - 1}; leave it out.")
        if params.allowed_token_ids and forbidden.issuperset(params.allowed_token_ids):
            raise UserError("allowed_token_ids has no token that min_tokens and bad_words never forbid; allow at least one more.")

    def _edit_(self, x: Tensor, batch: Batch, rows: Sequence[Row]) -> None:
        """Allowed ids, bad words, min_tokens, bias and penalties, in place on x [B, V] float32."""
        for row, ids in batch.allowed:
            kept = x[row, ids]
            x[row] = -math.inf
            x[row, ids] = kept
        forbidden = [(row, i) for row in batch.forbidding for i in batch.sequences[row].forbidden(rows[row].drafted)]
        if forbidden:
            row_ids, token_ids = zip(*forbidden, strict=True)
            x[self._ids(row_ids), self._ids(token_ids)] = -math.inf
        if batch.bias is not None:
            *where, values = batch.bias
            x.index_put_(tuple(where), values, accumulate=True)
        if batch.penalties is not None:
            p = batch.penalties
            generated = self._counts.generated[p.slots]  # [N, V], a copy
            drafted = [(n, token) for n, row in enumerate(p.numbers) for token in rows[row].drafted]
            if drafted:
                numbers, token_ids = zip(*drafted, strict=True)
                generated.index_put_((self._ids(numbers), self._ids(token_ids)), generated.new_ones(()), accumulate=True)
            _change_(x, p.rows, penalise_, self._counts.in_prompt[p.slots], generated, *p.strengths)

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
