"""How far a student's laws of the next token are from its teacher's, a few rows of logits at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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
