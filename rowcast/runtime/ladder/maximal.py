"""The maximal rule: rejection sampling, the law of plain decoding at the highest acceptance there is, 1 - TV.

Speculative sampling (arXiv 2211.17192, section 2.3 and appendix A.1; arXiv 2302.01318, algorithm 2) at every rung of a ladder:
wherever a rejection happens, the residual is drawn from, and no random number serves twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from rowcast.runtime.ladder.coupled import Coupled, judging_rows, leading
from rowcast.runtime.ladder.rule import Law, Proposal, Verdict
from rowcast.runtime.philox import Purpose
from rowcast.runtime.sampler import Row, Sampler
from rowcast.runtime.sampling_batch import upload
from rowcast.runtime.sharded_logits import Logits, whole


class Dice(Protocol):
    """Where chance comes from. `rounds`: for each row, a number that its sequence has not had before."""

    def accept(self, rung: int, rows: Sequence[Row], rounds: Sequence[int], p: Tensor, q: Tensor) -> Tensor:
        """True with probability min(1, p / q), each row by itself: p, q [n] float64 -> [n] bool. False where either is NaN."""
        ...

    def draw(self, rung: int, rows: Sequence[Row], rounds: Sequence[int], law: Tensor) -> Tensor:
        """One token of each row's law: logits [n, V] -> ids [n] int64, -1 where NaN."""
        ...


class PhiloxDice:
    """Implements `Dice` with the sampler's noise, which depends on the request, position, rung and round alone."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def accept(self, rung: int, rows: Sequence[Row], rounds: Sequence[int], p: Tensor, q: Tensor) -> Tensor:
        return self._sampler.uniforms(rows, purpose=Purpose.ACCEPT, rung=rung, rounds=rounds) * q < p

    def draw(self, rung: int, rows: Sequence[Row], rounds: Sequence[int], law: Tensor) -> Tensor:
        return self._sampler.draw(rows, law, purpose=Purpose.RESIDUAL, rung=rung, rounds=rounds)


class Maximal:
    """Implements `Rule`. The laws that it gives may share memory with the logits that it was given."""

    def __init__(self, sampler: Sampler, dice: Dice | None = None) -> None:
        self._sampler = sampler
        self._dice = dice or PhiloxDice(sampler)
        self._greedy = Coupled(sampler)

    def verify(self, rung: int, proposals: Sequence[Proposal], logits: Logits) -> list[Verdict]:
        greedy = [self._sampler.greedy(proposal.seq_id) for proposal in proposals]
        if not any(greedy):
            return self._verify_random(rung, proposals, logits)
        # One-hot laws stand or fall without chance and without laws: both rules are the same.
        if all(greedy):
            return self._greedy.verify(rung, proposals, logits)
        parts = torch.split(whole(logits), [len(proposal.tokens) + 1 for proposal in proposals])
        verdicts: dict[int, Verdict] = {}
        for kind, verify in ((True, self._greedy.verify), (False, self._verify_random)):
            some = [i for i, is_greedy in enumerate(greedy) if is_greedy == kind]
            judged = verify(rung, [proposals[i] for i in some], torch.cat([parts[i] for i in some]))
            verdicts.update(zip(some, judged, strict=True))
        return [verdicts[i] for i in range(len(proposals))]

    def _verify_random(self, rung: int, proposals: Sequence[Proposal], logits: Logits) -> list[Verdict]:
        rows = [row for proposal in proposals for row in judging_rows(proposal)]
        rounds = [self._sampler.next_round(proposal.seq_id) for proposal in proposals]
        law = self._sampler.process(rows, logits)  # [R, V]
        starts = [0, *accumulate(len(proposal.tokens) + 1 for proposal in proposals)][:-1]

        accepted = self._accept(rung, proposals, rows, rounds, starts, law)
        last = [start + count for start, count in zip(starts, accepted, strict=True)]
        final = _pick(law, last)  # [B, V]
        rejected = [b for b, proposal in enumerate(proposals) if accepted[b] < len(proposal.tokens)]
        if rejected:
            theirs = [_logits(proposals[b].laws[accepted[b]], proposals[b].tokens[accepted[b]], final[b]) for b in rejected]
            rest = residual(_probabilities(_pick(final, rejected)), _probabilities(torch.stack(theirs)))
            final = final.double().index_copy(0, _ids(rejected, law), rest.log())
        tokens = self._dice.draw(rung, [rows[i] for i in last], rounds, final).tolist()
        laws = law.unbind()
        return [
            Verdict(end - start, token, list(laws[start : end + 1]))
            for start, end, token in zip(starts, last, tokens, strict=True)
        ]

    def _accept(
        self,
        rung: int,
        proposals: Sequence[Proposal],
        rows: Sequence[Row],
        rounds: Sequence[int],
        starts: Sequence[int],
        law: Tensor,
    ) -> list[int]:
        """How many tokens of each proposal stand, by the verifier's law [R, V]."""
        judged = [start + j for start, proposal in zip(starts, proposals, strict=True) for j in range(len(proposal.tokens))]
        if not judged:
            return [0] * len(proposals)
        tokens = _ids([token for proposal in proposals for token in proposal.tokens], law)
        p = _chances(_pick(law, judged), tokens)
        q = torch.ones_like(p)
        proposed = enumerate(own for proposal in proposals for own in proposal.laws)
        uncertain = [(i, own) for i, own in proposed if own is not None]
        if uncertain:
            drawn, theirs = zip(*uncertain, strict=True)
            where = _ids(drawn, law)
            q[where] = _chances(torch.stack(theirs), tokens[where])
        by_token = [number for proposal, number in zip(proposals, rounds, strict=True) for _ in proposal.tokens]
        stands = iter(self._dice.accept(rung, [rows[i] for i in judged], by_token, p, q).tolist())
        return [leading([next(stands) for _ in proposal.tokens]) for proposal in proposals]


def residual(p: Tensor, q: Tensor) -> Tensor:
    """What a rejected token's replacement is drawn from: max(p - q, 0), not normalised; p where rounding leaves nothing.

    p, q [n, V] float64 -> [n, V].
    """
    rest = (p - q).clamp_(min=0)
    return rest.where(rest.sum(-1, keepdim=True) > 0, p)


def _ids(values: Sequence[int], like: Tensor) -> Tensor:
    return upload(values, torch.int64, like.device)


def _pick(x: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows of x, in ascending order; x itself where they are all."""
    return x if len(rows) == len(x) else x[_ids(rows, x)]


def _probabilities(law: Tensor) -> Tensor:
    """Logits [..., V] -> float64. Both sides of a verdict take them this way, so equal laws have equal probabilities."""
    return law.double().softmax(-1)


def _chances(law: Tensor, tokens: Tensor) -> Tensor:
    """Logits [n, V], tokens [n] -> the tokens' probabilities [n] float64."""
    return _probabilities(law).gather(-1, tokens[:, None])[:, 0]


def _logits(law: Law, token: int, like: Tensor) -> Tensor:
    """A law as logits [V]: -inf but at `token` where it was certain."""
    if law is not None:
        return law
    certain = torch.full_like(like, -math.inf)
    certain[token] = 0
    return certain
