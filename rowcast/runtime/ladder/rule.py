"""What a verification rule is asked and what it answers. The rules themselves: `coupled`, `maximal`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from rowcast.runtime.sharded_logits import Logits

Law = Tensor | None
"""The law that a token was drawn from, as processed logits [V] (softmax gives the probabilities). None: the token was certain."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """Tokens that a rung proposes to the next one, for one sequence. May be none."""

    seq_id: int
    drafted: tuple[int, ...]
    """Tokens drafted in this round before these; they count for penalties and positions like generated ones."""
    tokens: list[int]
    laws: list[Law]
    """One for each token where the rule needs laws, else empty."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a proposal: its first `accepted` tokens stand, then comes `token`, the verifier's own."""

    accepted: int
    token: int
    """-1 where the verifier's logits are NaN: then it has no token of its own."""
    laws: list[Law]
    """The verifier's law of each of these accepted + 1 tokens where the rule needs laws, else empty."""


class Rule(Protocol):
    """Decides which proposals stand, so that the output's law is the verifier's."""

    def verify(self, rung: int, proposals: Sequence[Proposal], logits: Logits) -> list[Verdict]:
        """Judge proposals, ragged, by the logits of the verifying rung.

        logits [sum(len(p.tokens) + 1), V]: for each proposal in order, the rows that predict its first token, its second, ..., and the
        token after its last. An empty proposal has one row: the verifier just draws. Given what came before it, each token that a
        verdict gives has the verifier's law. Does not modify `logits`.
        """
        ...
