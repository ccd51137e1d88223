"""The maths of sampling, row by row: penalties, truncation, log-probabilities. Pure functions of logits and parameter tensors.

It does not know requests; `sampler` decides which rows need what.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rowcast.runtime.step import TokenLogprobs


def penalise_(
    logits: Tensor, in_prompt: Tensor, generated: Tensor, repetition: Tensor, frequency: Tensor, presence: Tensor
) -> None:
    """In place: logits [N, V] float32, in_prompt [N, V] bool, generated [N, V] counts, penalties [N, 1] float32.

    Repetition (arXiv 1909.05858, section 4.1) first, over prompt and output; then frequency and presence, over the output.
    """
    present = generated > 0
    factor = torch.where(logits > 0, 1 / repetition, repetition)
    logits.mul_(torch.where(in_prompt | present, factor, 1.0))
    logits.sub_(frequency * generated).sub_(presence * present)


def keep_min_p_(logits: Tensor, log_min_p: Tensor) -> None:
    """In place: forbid what is less likely than min_p times the likeliest (arXiv 2407.01082, section 3).

    logits [N, V] float32, log_min_p [N, 1] float32 (-inf: off).
    """
    floor = logits.amax(-1, keepdim=True) + log_min_p
    logits.masked_fill_(logits < floor, -torch.inf)


def keep_top_(logits: Tensor, top_k: Tensor, top_p: Tensor, max_k: int) -> None:
    """In place: forbid all but the top-k tokens, then all but the nucleus of what is left, renormalised.

    logits [N, V] float32, top_k [N, 1] int64 in 1..max_k, top_p [N, 1] float64 (inf: off). Tokens as likely as the last one kept
    are kept, too, so the result does not depend on an order of ties. max_k bounds the work, not the result.
    """
    values = logits.topk(max_k, -1).values if max_k < logits.shape[-1] else logits.sort(-1, descending=True).values  # [N, max_k]
    ranks = torch.arange(max_k, device=logits.device)
    weights = (values - values[:, :1]).double().exp_().mul_(ranks < top_k)
    mass = weights.cumsum(-1)
    # Kept while the mass before a token is short of top_p; the first always is.
    kept = ((mass - weights < top_p * mass[:, -1:]) & (ranks < top_k)).sum(-1, keepdim=True)
    kept = kept.clamp(min=1)  # 0 where logits are NaN
    logits.masked_fill_(logits < values.gather(-1, kept - 1), -torch.inf)


def token_logprobs(logits: Tensor, token_ids: Tensor, top: Sequence[int]) -> list[TokenLogprobs]:
    """Log-probabilities under softmax(logits), in float32, of `token_ids` and of the `top[i]` likeliest (-1: all) in row i.

    logits [N, V], token_ids [N] int64. Waits for the device.
    """
    logits = logits.float()
    logprobs = logits.log_softmax(-1)
    chosen = token_ids[:, None]
    ranks = (logits > logits.gather(-1, chosen)).sum(-1) + 1
    counts = [logits.shape[-1] if k < 0 else k for k in top]
    top_ids = logits.topk(max(counts), -1).indices  # [N, max k]
    rows = zip(
        token_ids.tolist(),
        logprobs.gather(-1, chosen)[:, 0].tolist(),
        ranks.tolist(),
        top_ids.tolist(),
        logprobs.gather(-1, top_ids).tolist(),
        counts,
        strict=True,
    )
    return [TokenLogprobs(token, logprob, rank, ids[:k], values[:k]) for token, logprob, rank, ids, values, k in rows]


def prompt_logprobs(logits: Tensor, next_ids: Sequence[int], k: int) -> list[TokenLogprobs]:
    """The same for a piece of a prompt: logits [T, V], the T tokens that follow, the `k` likeliest (-1: all) at each."""
    return token_logprobs(logits, torch.tensor(next_ids, device=logits.device), [k] * len(next_ids)) if next_ids else []
