"""The executor of world size 1: one rank in this process."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from rowcast.errors import OutOfMemoryError, UserError
from rowcast.placement.resident import LOGIT_ELEMENTS
from rowcast.runtime.decoder import Decoder
from rowcast.runtime.kv import PagedKV
from rowcast.runtime.sampler import Sampler, prompt_logprobs
from rowcast.runtime.step import SeqResult, SeqSetup, SeqStep, TokenLogprobs


class LocalExecutor:
    """Implements `Executor` with the plain rung: every weight, every KV entry, one token a round."""

    def __init__(self, decoder: Decoder, kv: PagedKV, sampler: Sampler) -> None:
        self._decoder = decoder
        self._kv = kv
        self._sampler = sampler
        self._prompts: dict[int, list[int]] = {}
        self._logit_rows = max(1, LOGIT_ELEMENTS // sampler.vocab_size)

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
        self._sampler.commit(setup.seq_id, setup.output_ids)
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
        hidden = self._decoder.run(steps, self._kv)
        ends = list(accumulate(len(step.tokens) for step in steps))
        prompts = [self._prompt_logprobs(s, hidden[end - len(s.tokens) : end]) for s, end in zip(steps, ends, strict=True)]
        drawn = self._sample(steps, hidden, ends)
        # Nothing is committed before everything has succeeded.
        results = []
        for step, prompt in zip(steps, prompts, strict=True):
            tokens, logprobs = drawn.get(step.seq_id, ([], None))
            self._kv.commit(step.seq_id, len(step.tokens))
            self._sampler.commit(step.seq_id, tokens)
            results.append(SeqResult(step.seq_id, tokens, logprobs, prompt))
        return results

    def free_kv(self, seq_id: int) -> None:
        self._kv.free(seq_id)
        self._sampler.suspend(seq_id)

    def remove(self, seq_id: int) -> None:
        self._kv.free(seq_id)
        self._sampler.remove(seq_id)
        self._prompts.pop(seq_id, None)

    def _sample(
        self, steps: Sequence[SeqStep], hidden: Tensor, ends: list[int]
    ) -> dict[int, tuple[list[int], list[TokenLogprobs] | None]]:
        """The next token, and its log-probabilities where asked for, of every sequence whose last token ran."""
        chosen = [(step.seq_id, end - 1) for step, end in zip(steps, ends, strict=True) if step.sample]
        found: dict[int, tuple[list[int], list[TokenLogprobs] | None]] = {}
        for i in range(0, len(chosen), self._logit_rows):
            seq_ids, rows = zip(*chosen[i : i + self._logit_rows], strict=True)
            wanted = hidden if len(rows) == hidden.shape[0] else hidden[list(rows)]
            drawn = self._sampler.sample(seq_ids, self._decoder.logits(wanted))
            logprobs = drawn.logprobs or [None] * len(seq_ids)
            for seq_id, token, entry in zip(seq_ids, drawn.token_ids.tolist(), logprobs, strict=True):
                if token < 0:
                    raise UserError(
                        "the model's logits are not numbers, as when float16 overflows: use dtype bfloat16 or float32, or a sound copy"
                    )
                found[seq_id] = [token], None if entry is None else [entry]
        return found

    def _prompt_logprobs(self, step: SeqStep, hidden: Tensor) -> list[TokenLogprobs] | None:
        # hidden [t, D]: row i predicts the prompt token at position start + i + 1, where there is one
        if step.prompt_logprobs is None:
            return None
        successors = self._prompts[step.seq_id][step.start + 1 : step.start + 1 + len(step.tokens)]
        found: list[TokenLogprobs] = []
        for i in range(0, len(successors), self._logit_rows):
            ids = successors[i : i + self._logit_rows]
            found += prompt_logprobs(self._decoder.logits(hidden[i : i + len(ids)]), ids, step.prompt_logprobs)
        return found

    def check(self, seq_ids: Collection[int]) -> None:
        """It remembers these sequences and no others. For tests and idle moments."""
        assert set(self._prompts) == set(seq_ids) == self._sampler.seq_ids
        assert self._kv.seq_ids <= set(seq_ids)
