"""Deja Vu predictors (arXiv 2310.17157, section 4): low-rank factors trained to tell a token's best neurons from the others."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rowcast.calibration.curves import blocks, lost_output
from rowcast.calibration.fits import Factors
from rowcast.calibration.mlp import Mlp, kept
from rowcast.runtime.sparse.scorers import contribution

BATCH = 1024
LEARNING_RATE = 3e-4
WEIGHT_DECAY = 0.01
SHARPNESS = 2.0
"""Logits for each unit of the logarithm of a score, or for each standard deviation of a ReLU neuron's pre-activation."""
FLOOR = 0.05
"""Added to scores before the logarithm, as a share of the threshold."""
MAX_WEIGHT = 8.0
VALIDATION = 0.05
LOOKS = 4
"""Times that the validation rows judge in a run."""


def train(
    start: Factors, mlp: Mlp, x: Tensor, h: Tensor, *, density: float, steps: int, seed: int
) -> tuple[Factors, float, float]:
    """Train factors that read x [S, D] to find the best `density` of the neurons at h [S, D], the MLP's input of the same tokens.

    Cross-entropy, by how far a neuron's exact score is from the token's threshold; for ReLU on being active, inactive ones weighted
    by the share of active ones. The last 5% of the rows judge by the share of the output that is lost at `density`: of the values at a
    few points the best are returned, the initial ones included, with what they lose and what the initial ones lose.
    """
    split = min(len(x) - 1, round(len(x) * (1 - VALIDATION)))
    keep = kept(mlp.neurons, density)
    initial = least = _lost(start, mlp, x[split:], h[split:], keep)
    best = start
    values = [tensor.clone().requires_grad_() for tensor in (start.a, start.b, start.bias)]
    optimiser = torch.optim.AdamW(values, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    generator = torch.Generator().manual_seed(seed)
    scale = start.b.norm(dim=1).clamp_min(1e-6)
    look = -(-steps // LOOKS)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        rows = torch.randint(split, (BATCH,), generator=generator).to(x.device)
        pre = F.linear(F.linear(x[rows], values[0]), values[1], values[2])
        loss = _active_loss(pre / scale, mlp, h[rows]) if mlp.signed else _score_loss(pre, mlp, h[rows], keep)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        if (step + 1) % look and step + 1 < steps:
            continue
        now = Factors(*(value.detach().clone() for value in values))
        lost = _lost(now, mlp, x[split:], h[split:], keep)
        if lost < least:
            best, least = now, lost
        elif best is not start:
            break
    return best, least, initial


def _active_loss(logits: Tensor, mlp: Mlp, h: Tensor) -> Tensor:
    # logits [T, N] / SHARPNESS
    with torch.no_grad():
        active = (mlp.pre(h) > 0).float()
        weight = torch.where(active > 0, 1.0, active.mean())
    return F.binary_cross_entropy_with_logits(SHARPNESS * logits, active, weight)


def _score_loss(pre: Tensor, mlp: Mlp, h: Tensor, keep: int) -> Tensor:
    # pre [T, J N]
    with torch.no_grad():
        exact = mlp.scores(h)
        threshold = exact.kthvalue(mlp.neurons - keep + 1, dim=1, keepdim=True).values.clamp_min(1e-12)
        relative = exact / threshold
        weight = (relative - 1).abs().clamp_max(MAX_WEIGHT)
    scores = mlp.hidden(pre).abs() * mlp.norms / threshold
    logits = SHARPNESS * ((scores + FLOOR) / (1 + FLOOR)).log()
    return F.binary_cross_entropy_with_logits(logits, (relative >= 1).float(), weight)


@torch.no_grad()
def _lost(factors: Factors, mlp: Mlp, x: Tensor, h: Tensor, keep: int) -> float:
    """Mean share of the output that is lost where each token keeps the best by these factors."""
    lost = 0.0
    for rows in blocks(len(x), mlp.neurons):
        pre = F.linear(F.linear(x[rows], factors.a), factors.b, factors.bias)
        scores = contribution(pre, mlp.norms, mlp.activation, mlp.gated)
        dropped = scores.topk(mlp.neurons - keep, 1, largest=False).indices
        lost += float(lost_output(mlp, mlp.hidden(mlp.pre(h[rows])), dropped).double().sum())
    return lost / len(x)
