"""The executor of world size 1: one rank in this process."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rowcast.errors import OutOfMemoryError
from rowcast.runtime.decoder import Decoder
from rowcast.runtime.kv import PagedKV
from rowcast.runtime.sampler import Sampler, prompt_logprobs
from rowcast.runtime.step import SeqResult, SeqSetup, SeqStep, TokenLogprobs

LOGIT_ROWS = 256
"""Most rows of logits held at once while prompt log-probabilities are taken."""


class LocalExecutor:
    """Implements `Executor` with the plain rung: every weight, every KV entry, one token a round."""

    def __init__(self, decoder: Decoder, kv: PagedKV, sampler: Sampler) -> None:
        self._decoder = decoder
        self._kv = kv
        self._sampler = sampler
        self._prompts: dict[int, list[int]] = {}

    def add(self, setup: SeqSetup) -> None:
        self._sampler.add(
            setup.seq_id,
            setup.params,
            seed=setup.seed,
            sample_index=setup.sample_index,
            prompt_ids=setup.prompt_ids,
            eos_ids=setup.eos_ids,
            bad_word_ids=setup.bad_word_ids,
        )
        self._prompts[setup.seq_id] = setup.prompt_ids

    @torch.inference_mode()
    def step(self, steps: Sequence[SeqStep]) -> list[SeqResult]:
        try:
            return self._step(steps)
        except torch.OutOfMemoryError as error:
            tokens = sum(len(step.tokens) for step in steps)
            raise OutOfMemoryError(
                f"the device ran out of memory in a step of {tokens} tokens and {len(steps)} sequences: lower max_num_batched_tokens "
                "or max_num_seqs, or free memory on it"
            ) from error

    def _step(self, steps: Sequence[SeqStep]) -> list[SeqResult]:
        hidden = self._decoder.forward(steps, self._kv)
        for step in steps:
            self._kv.commit(step.seq_id, len(step.tokens))
        ends, end = [], 0
        for step in steps:
            end += len(step.tokens)
            ends.append(end)
        tokens, logprobs = self._sample(steps, hidden, ends)
        return [
            SeqResult(
                step.seq_id,
                tokens.get(step.seq_id, []),
                logprobs.get(step.seq_id),
                self._prompt_logprobs(step, hidden[end - len(step.tokens) : end]),
            )
            for step, end in zip(steps, ends, strict=True)
        ]

    def free_kv(self, seq_id: int) -> None:
        self._kv.free(seq_id)

    def remove(self, seq_id: int) -> None:
        self._kv.free(seq_id)
        self._sampler.remove(seq_id)
        self._prompts.pop(seq_id, None)

    def _sample(
        self, steps: Sequence[SeqStep], hidden: Tensor, ends: list[int]
    ) -> tuple[dict[int, list[int]], dict[int, list[TokenLogprobs]]]:
        """The next token of every sequence whose last token ran."""
        chosen = [(step.seq_id, end - 1) for step, end in zip(steps, ends, strict=True) if step.sample]
        if not chosen:
            return {}, {}
        seq_ids = [seq_id for seq_id, _ in chosen]
        rows = [row for _, row in chosen]
        if len(rows) < hidden.shape[0]:
            hidden = hidden[rows]
        drawn = self._sampler.sample(seq_ids, self._decoder.logits(hidden))
        tokens = {seq_id: [token] for seq_id, token in zip(seq_ids, drawn.token_ids.tolist(), strict=True)}
        for seq_id, ids in tokens.items():
            self._sampler.commit(seq_id, ids)
        wanted = zip(seq_ids, drawn.logprobs or [], strict=False)
        return tokens, {seq_id: [entry] for seq_id, entry in wanted if entry is not None}

    def _prompt_logprobs(self, step: SeqStep, hidden: Tensor) -> list[TokenLogprobs] | None:
        # hidden [t, D]: row i predicts the prompt token at position start + i + 1, where there is one
        if step.prompt_logprobs is None:
            return None
        successors = self._prompts[step.seq_id][step.start + 1 : step.start + 1 + len(step.tokens)]
        found: list[TokenLogprobs] = []
        for i in range(0, len(successors), LOGIT_ROWS):
            ids = successors[i : i + LOGIT_ROWS]
            found += prompt_logprobs(self._decoder.logits(hidden[i : i + len(ids)]), ids, step.prompt_logprobs)
        return found
