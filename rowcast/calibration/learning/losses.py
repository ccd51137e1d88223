"""Divergences over a whole vocabulary that never hold all logits: by chunks of tokens, forward and backward in one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rowcast.kernels import gpu

CHUNK_ELEMENTS = 1 << 28
"""Logits of each of the two models that are held at a time on a GPU, ..."""
CPU_CHUNK_ELEMENTS = 1 << 23
"""... and on a CPU."""

Term = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Logits of student and teacher [n, V] -> their divergence, summed, and its gradient for the student's logits [n, V]."""


def kl_term(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher || student), a `Term`."""
    log_q, log_p = F.log_softmax(student.float(), -1), F.log_softmax(teacher.float(), -1)
    p = log_p.exp()
    return (p * (log_p - log_q)).sum(), log_q.exp() - p


def variation_term(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Total variation, 1 - acceptance under rejection sampling (arXiv 2310.08461, section 3), a `Term`."""
    q, p = F.softmax(student.float(), -1), F.softmax(teacher.float(), -1)
    sign = (q > p).float() - (q < p).float()
    slope = q * (sign - (q * sign).sum(-1, keepdim=True))
    return 0.5 * (q - p).abs().sum(), 0.5 * slope


def mixed_term(variation: float) -> Term:
    """A weighted mean of the two: `variation` 0 is KL alone. On a GPU one kernel, whose gradient takes the place of the student's
    logits."""

    def term(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        if gpu.serves(student.device):
            from rowcast.kernels.gpu.divergence import divergence_

            return divergence_(student, teacher, variation)
        loss, slope = kl_term(student, teacher)
        if not variation:
            return loss, slope
        other, other_slope = variation_term(student, teacher)
        return (1 - variation) * loss + variation * other, (1 - variation) * slope + variation * other_slope

    return term


_KL = mixed_term(0.0)


def head_divergence(student: Tensor, student_head: Tensor, teacher: Tensor, teacher_head: Tensor, *, term: Term = _KL) -> Tensor:
    """Mean divergence over N tokens, with gradients for `student` [N, d] and `student_head` [V, d].

    teacher [N, D] and teacher_head [V, D] are what the teacher's LM head multiplies. Products run in bfloat16 under autocast, sums in
    float32. Takes two chunks of logits and a gradient of the head's size.
    """
    mixed = torch.is_autocast_enabled("cuda") and student.is_cuda
    found: Tensor = _HeadDivergence.apply(  # type: ignore[no-untyped-call]
        student, student_head, teacher, teacher_head, term, torch.bfloat16 if mixed else None
    )
    return found


class _HeadDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        student_head: Tensor,
        teacher: Tensor,
        teacher_head: Tensor,
        term: Term,
        dtype: torch.dtype | None,
    ) -> Tensor:
        count, vocabulary = len(student), len(student_head)
        dtype = dtype or student.dtype
        head, theirs = student_head.to(dtype), teacher_head
        most = CHUNK_ELEMENTS if student.is_cuda else CPU_CHUNK_ELEMENTS
        chunks = -(-count * vocabulary // most)
        rows = -(-count // chunks)
        loss = torch.zeros((), device=student.device)
        slope = torch.empty_like(student)
        head_slope = torch.zeros_like(student_head)
        with torch.no_grad(), torch.autocast("cuda", enabled=False):
            for start in range(0, count, rows):
                part = slice(start, start + rows)
                x = student[part].to(dtype)
                found, by_logit = term(x @ head.T, teacher[part].to(theirs.dtype) @ theirs.T)
                loss += found
                by_logit = (by_logit / count).to(dtype)
                slope[part] = by_logit @ head
                head_slope += by_logit.T @ x
        ctx.save_for_backward(slope, head_slope)
        return loss / count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        slope, head_slope = ctx.saved_tensors
        return grads[0] * slope, grads[0] * head_slope, None, None, None, None
