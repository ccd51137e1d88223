"""Divergence of two rows of logits, and its gradient, for training: the reference is `calibration.learning.losses`.

One program a row of any number, twice over its logits: first the two normalisers, then loss and gradient, which takes the place of the
student's logits; with total variation once more in between. In torch the same is a dozen passes over float32 copies. Not for decoding:
the convention of 16 tokens is not kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _divergence_kernel(
    student_ptr,  # [N, V] logits; overwritten with the gradient
    teacher_ptr,  # [N, V] logits
    loss_ptr,  # [N] float32
    size,  # V
    variation,  # weight of total variation beside KL
    MIXED: tl.constexpr,  # whether that is above 0
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * size
    teacher_ptr += row * size
    column = tl.arange(0, BLOCK)
    most_q = tl.full((), float("-inf"), tl.float32)
    most_p = tl.full((), float("-inf"), tl.float32)
    sum_q = tl.zeros((), tl.float32)
    sum_p = tl.zeros((), tl.float32)
    for start in range(0, size, BLOCK):
        inside = start + column < size
        q = tl.load(student_ptr + start + column, mask=inside, other=float("-inf")).to(tl.float32)
        p = tl.load(teacher_ptr + start + column, mask=inside, other=float("-inf")).to(tl.float32)
        higher_q = tl.maximum(most_q, tl.max(q, 0))
        higher_p = tl.maximum(most_p, tl.max(p, 0))
        sum_q = sum_q * tl.exp(most_q - higher_q) + tl.sum(tl.exp(q - higher_q), 0)
        sum_p = sum_p * tl.exp(most_p - higher_p) + tl.sum(tl.exp(p - higher_p), 0)
        most_q, most_p = higher_q, higher_p
    normal_q = most_q + tl.log(sum_q)
    normal_p = most_p + tl.log(sum_p)
    loss = tl.zeros((BLOCK,), tl.float32)
    tilt = tl.zeros((BLOCK,), tl.float32)  # sum of q sign(q - p)
    if MIXED:
        for start in range(0, size, BLOCK):
            inside = start + column < size
            log_q = tl.load(student_ptr + start + column, mask=inside, other=float("-inf")).to(tl.float32) - normal_q
            log_p = tl.load(teacher_ptr + start + column, mask=inside, other=float("-inf")).to(tl.float32) - normal_p
            q, p = tl.exp(log_q), tl.exp(log_p)
            tilt += tl.where(q > p, q, 0.0) - tl.where(q < p, q, 0.0)
            loss += 0.5 * variation * tl.abs(q - p)
    tilted = tl.sum(tilt, 0)
    for start in range(0, size, BLOCK):
        inside = start + column < size
        log_q = tl.load(student_ptr + start + column, mask=inside, other=0.0).to(tl.float32) - normal_q
        log_p = tl.load(teacher_ptr + start + column, mask=inside, other=0.0).to(tl.float32) - normal_p
        q, p = tl.exp(log_q), tl.exp(log_p)
        by_kl = tl.where(inside, p * (log_p - log_q), 0.0)
        slope = q - p
        if MIXED:
            by_kl *= 1 - variation
            sign = tl.where(q > p, 1.0, 0.0) - tl.where(q < p, 1.0, 0.0)
            slope = (1 - variation) * slope + 0.5 * variation * q * (sign - tilted)
        loss += by_kl
        tl.store(student_ptr + start + column, slope.to(student_ptr.dtype.element_ty), mask=inside)
    tl.store(loss_ptr + row, tl.sum(loss, 0))


def divergence_(student: Tensor, teacher: Tensor, variation: float = 0.0) -> tuple[Tensor, Tensor]:
    """Logits [N, V] of both -> (1 - variation) KL(teacher || student) + variation TV, summed, and its gradient for the student's
    logits, in the place of those."""
    assert student.is_contiguous() and teacher.is_contiguous() and student.shape == teacher.shape
    loss = torch.empty(len(student), dtype=torch.float32, device=student.device)
    _divergence_kernel[(len(student),)](
        student, teacher, loss, student.shape[1], variation, MIXED=variation > 0, BLOCK=BLOCK, num_warps=8
    )
    return loss.sum(), student
