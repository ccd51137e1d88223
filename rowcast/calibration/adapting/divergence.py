"""How far a student's laws of the next token are from its teacher's, a few rows of logits at a time.

Training asks for means over windows of one density (`mean_divergences`), which on a GPU are one kernel's; looks ask token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rowcast.calibration.learning.losses import Term

ROW_BYTES = {"cpu": 1 << 26, "cuda": 1 << 30}
"""Of one table of float32 logits that is held at a time."""


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> tuple[Tensor, Tensor]:
        found, overlap = (
            student.new_empty(len(student), dtype=torch.float32),
            student.new_empty(len(student), dtype=torch.float32),
        )
        pull = torch.empty_like(student)
        rows = max(1, ROW_BYTES.get(student.device.type, ROW_BYTES["cuda"]) // (4 * len(head)))
        for start in range(0, len(student), rows):
            span = slice(start, start + rows)
            with torch.autocast("cuda", enabled=False):
                log_p = F.linear(teacher[span], teacher_head).float().log_softmax(-1)
            log_q = F.linear(student[span], head).float().log_softmax(-1)
            p, q = log_p.exp(), log_q.exp()
            found[span] = log_p.sub_(log_q).mul_(p).sum(-1)
            overlap[span] = torch.minimum(p, q).sum(-1)
            pull[span] = (q.sub_(p).to(head.dtype) @ head).to(pull.dtype)
        ctx.save_for_backward(pull)
        ctx.mark_non_differentiable(overlap)
        return found, overlap

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (pull,) = ctx.saved_tensors
        return pull * grads[0][:, None].to(pull.dtype), None, None, None


def divergence(student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q) in nats and sum(min(p, q)) for each of T tokens, [T] float32 both.

    p and q: softmax of `teacher` [T, D] times `teacher_head` [V, D], and of `student` [T, D'] times `head` [V, D'], in the heads'
    number format. Gradients of the first reach `student` alone, heads are not trained.
    """
    student, teacher = student.to(head.dtype), teacher.to(teacher_head.dtype)
    found, overlap = _Divergence.apply(student, head.detach(), teacher.detach(), teacher_head.detach())  # type: ignore[no-untyped-call]
    return found, overlap


class _MeanDivergences(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, counts: Sequence[int], term: Term
    ) -> Tensor:
        found, pull, end = [], torch.empty_like(student), 0
        most = max(1, ROW_BYTES.get(student.device.type, ROW_BYTES["cuda"]) // (4 * len(head)))
        with torch.autocast("cuda", enabled=False):
            for count in counts:
                start, end, total = end, end + count, torch.zeros((), device=student.device)
                rows = -(-count // -(-count // most))
                for first in range(start, end, rows):
                    span = slice(first, min(end, first + rows))
                    divergence, slope = term(F.linear(student[span], head), F.linear(teacher[span], teacher_head))
                    total += divergence
                    torch.mm(slope.to(head.dtype), head, out=pull[span])
                found.append(total / count)
        ctx.save_for_backward(pull)
        ctx.counts = counts
        return torch.stack(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (pull,) = ctx.saved_tensors
        shares = [(grad / count).expand(count) for grad, count in zip(grads[0].unbind(), ctx.counts, strict=True)]
        return pull * torch.cat(shares)[:, None].to(pull.dtype), None, None, None, None, None


def mean_divergences(
    student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, counts: Sequence[int], term: Term
) -> Tensor:
    """Mean of `term` over runs of so many tokens, [len(counts)] float32; otherwise as `divergence`."""
    assert sum(counts) == len(student)
    student, teacher = student.to(head.dtype), teacher.to(teacher_head.dtype)
    found: Tensor = _MeanDivergences.apply(  # type: ignore[no-untyped-call]
        student, head.detach(), teacher.detach(), teacher_head.detach(), tuple(counts), term
    )
    return found
