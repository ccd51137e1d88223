"""How far a copy is from the original in its laws of the next token, teacher-forced over held-out text: acceptance and more."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURES = (1.0, 0.8)
LOGIT_ELEMENTS, CPU_LOGIT_ELEMENTS = 1 << 26, 1 << 22
"""Logits of each model that are held at a time on a GPU and on a CPU; what is made of them takes some ten times as much."""


class Subject(Protocol):
    """A model that is judged."""

    def hidden(self, ids: Tensor) -> Tensor:
        """What its LM head reads: ids [B, T] -> [B, T, D]."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, D] -> [N, V]."""
        ...


class ModuleSubject:
    """A Transformers model. Implements `Subject`."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def hidden(self, ids: Tensor) -> Tensor:
        return hidden_states(self.module, ids)

    def logits(self, hidden: Tensor) -> Tensor:
        head = self.module.get_output_embeddings()
        return head(hidden.to(head.weight.dtype))  # type: ignore[no-any-return]


def hidden_states(module: Any, ids: Tensor) -> Tensor:
    """What a Transformers module's LM head reads: ids [B, T] -> [B, T, D]. No K/V is kept."""
    return module.base_model(input_ids=ids, use_cache=False).last_hidden_state  # type: ignore[no-any-return]


@dataclass(slots=True)
class Acceptance:
    """Sums over tokens, of a copy's law q beside the original's p at one temperature."""

    maximal: float = 0.0
    coupled: float = 0.0

    def add(self, log_p: Tensor, log_q: Tensor) -> None:
        """[T, V] float32 each, normalised."""
        self.maximal += float(torch.minimum(log_p, log_q).exp().sum(-1).double().sum())
        self.coupled += float(coupled_acceptance(log_p, log_q).double().sum())


def coupled_acceptance(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Of proposals drawn with the verifier's own noise: sum_i 1 / sum_j max(p_j / p_i, q_j / q_i), [T, V] each -> [T].

    Sorted by p / q, descending: those before i have the greater ratio of p, those from i on that of q.
    """
    order = (log_p - log_q).argsort(-1, descending=True)
    p, q = log_p.double().exp().gather(-1, order), log_q.double().exp().gather(-1, order)
    before, from_here = p.cumsum(-1) - p, q.flip(-1).cumsum(-1).flip(-1)
    return (p * q / (before * q + from_here * p).clamp_min(torch.finfo(torch.float64).tiny)).sum(-1)


@dataclass(slots=True)
class Figures:
    """Of one copy beside the original, at one size of window; sums over tokens."""

    tokens: int = 0
    nll: float = 0.0
    original_nll: float = 0.0
    divergence: float = 0.0
    agreed: int = 0
    at: dict[float, Acceptance] = field(default_factory=dict)
    """By temperature."""

    def add(self, logits_p: Tensor, logits_q: Tensor, targets: Tensor, temperatures: Sequence[float]) -> None:
        """logits [T, V] of the original and the copy; targets [T]: the tokens that came."""
        logits_p, logits_q = logits_p.float(), logits_q.float()
        log_p, log_q = F.log_softmax(logits_p, -1), F.log_softmax(logits_q, -1)
        self.tokens += len(targets)
        self.nll -= float(log_q.gather(1, targets[:, None]).double().sum())
        self.original_nll -= float(log_p.gather(1, targets[:, None]).double().sum())
        self.divergence += float(((log_p - log_q) * log_p.exp()).sum(-1).double().sum())
        self.agreed += int((logits_p.argmax(-1) == logits_q.argmax(-1)).sum())
        for temperature in temperatures:
            warm = temperature == 1.0
            self.at.setdefault(temperature, Acceptance()).add(
                log_p if warm else F.log_softmax(logits_p / temperature, -1),
                log_q if warm else F.log_softmax(logits_q / temperature, -1),
            )

    @property
    def acceptance(self) -> float:
        """sum(min(p, q)) at temperature 1. Precondition: that was among the temperatures."""
        return self.at[1.0].maximal / self.tokens

    @property
    def greedy(self) -> float:
        """Share of the tokens after which both find the same one most likely: acceptance at temperature 0."""
        return self.agreed / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll / self.tokens)

    @property
    def original_perplexity(self) -> float:
        return math.exp(self.original_nll / self.tokens)

    @property
    def kl(self) -> float:
        """KL(p || q) in nats."""
        return self.divergence / self.tokens

    def to_json(self) -> dict[str, Any]:
        """Acceptance by temperature and rule: T = 0 is the same under both."""
        warm = {f"{t:g}": {"maximal": a.maximal / self.tokens, "coupled": a.coupled / self.tokens} for t, a in self.at.items()}
        return {
            "tokens": self.tokens,
            "acceptance": {"0": self.greedy, **warm},
            "perplexity": self.perplexity,
            "original_perplexity": self.original_perplexity,
            "kl": self.kl,
        }


@torch.no_grad()
def judge(
    original: Subject,
    copies: Mapping[str, Subject],
    windows: Tensor,
    *,
    device: torch.device,
    skip: int = 0,
    temperatures: Sequence[float] = TEMPERATURES,
    batch_tokens: int = 16384,
    advance: Callable[[int], None] = lambda tokens: None,
) -> dict[str, Figures]:
    """Figures of each copy beside the original over windows [W, T] of token ids, whose every token but the last predicts its successor.

    `skip`: so many first tokens of each window only give context. `advance` is told of tokens as they are done.
    """
    found = {name: Figures() for name in copies}
    count, size = windows.shape
    per_pass = max(1, batch_tokens // size)
    for start in range(0, count, per_pass):
        ids = windows[start : start + per_pass].to(device)
        targets = ids[:, skip + 1 :].flatten()
        p = original.hidden(ids)[:, skip:-1].flatten(0, 1)
        for name, copy in copies.items():
            q = copy.hidden(ids)[:, skip:-1].flatten(0, 1)
            most = LOGIT_ELEMENTS if device.type == "cuda" else CPU_LOGIT_ELEMENTS
            rows = max(1, most // original.logits(p[:1]).shape[-1])
            for first in range(0, len(targets), rows):
                part = slice(first, first + rows)
                found[name].add(original.logits(p[part]), copy.logits(q[part]), targets[part], temperatures)
        advance(ids.numel())
    return found
