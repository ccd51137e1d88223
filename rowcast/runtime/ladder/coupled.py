"""The coupled rule: every rung draws with the same noise, so the output is plain decoding's, token for token.

The Gumbel noise of a token depends on its position and id alone. A proposal is the proposing rung's draw with that noise; it stands
when the verifier's own draw is the same token, and the first draw that differs takes its place. Acceptance of one token is
sum_i 1 / sum_j max(p_j / p_i, q_j / q_i), at least (1 - TV) / (1 + TV).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile

from rowcast.runtime.ladder.rule import Proposal, Verdict
from rowcast.runtime.sampler import Row, Sampler
from rowcast.runtime.sharded_logits import Logits


class Coupled:
    """Implements `Rule`. Needs no laws."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def verify(self, rung: int, proposals: Sequence[Proposal], logits: Logits) -> list[Verdict]:
        rows = [row for proposal in proposals for row in judging_rows(proposal)]
        drawn = iter(self._sampler.sample(rows, logits).tolist())
        verdicts = []
        for proposal in proposals:
            own = [next(drawn) for _ in range(len(proposal.tokens) + 1)]
            accepted = leading(theirs == ours for theirs, ours in zip(proposal.tokens, own, strict=False))
            verdicts.append(Verdict(accepted, own[accepted], []))
        return verdicts


def judging_rows(proposal: Proposal) -> list[Row]:
    """The rows that predict each of its tokens, and the token after its last."""
    ids = (*proposal.drafted, *proposal.tokens)
    return [Row(proposal.seq_id, ids[:end]) for end in range(len(proposal.drafted), len(ids) + 1)]


def leading(stands: Iterable[bool]) -> int:
    """How many are true before the first that is not."""
    return sum(takewhile(bool, stands))
