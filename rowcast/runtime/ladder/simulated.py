"""Acceptance at given rates, for timing shapes whose weights are not there."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from rowcast.runtime.ladder.coupled import leading
from rowcast.runtime.ladder.rule import Proposal, Rule, Verdict
from rowcast.runtime.sharded_logits import Logits


class Simulated:
    """Implements `Rule`, but breaks the law: for timing only.

    Does all of `rule`'s work, then overrides what it accepted: each proposed token stands with its verifier's rate, all before it
    standing.
    """

    def __init__(self, rule: Rule, rates: Mapping[int, float], *, seed: int = 0) -> None:
        """`rates`: acceptance of one token, by verifying rung."""
        self.rule = rule
        self.rates = rates
        self._random = random.Random(seed)

    def verify(self, rung: int, proposals: Sequence[Proposal], logits: Logits) -> list[Verdict]:
        verdicts = self.rule.verify(rung, proposals, logits)
        return [self._override(self.rates.get(rung, 0.0), p, verdict) for p, verdict in zip(proposals, verdicts, strict=True)]

    def _override(self, rate: float, proposal: Proposal, verdict: Verdict) -> Verdict:
        accepted = leading(self._random.random() < rate for _ in proposal.tokens)
        # The verifier's laws of tokens that it rejected are the proposer's here: any law of the right shape does.
        return Verdict(accepted, verdict.token, [*proposal.laws[:accepted], *verdict.laws[-1:]])
