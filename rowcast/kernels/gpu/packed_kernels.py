"""The kernel of `packed.py`: that of `lowbit_kernels` for another level of 0 and for groups of 32. Parts: `code_kernels`.

A block's sum is of code - b, b what is least work to take off. The weight of a code is scale * (code - zero), so that the sum of the
block's inputs, which the matrix units find as a product with ones, joins it times b - zero, by row; or scale * code + minimum, so that
it joins times b, and then by itself times the minimum. Half a block is one of its parts at 2, 3 and 4 bits; at 8 bits, where a block is
one part, inputs of the other half count as 0.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rowcast.kernels.gpu.code_kernels import (
    add_product,
    by_row,
    codes_at,
    end_product,
    inputs_at,
    levels_of,
    load_inputs,
    load_words,
    raised_by,
)


@triton.jit
def _groups(scales, zeros, minima, block, blocks, GROUP: tl.constexpr, HALVES: tl.constexpr, UNROLL: tl.constexpr):
    """Scale, zero point and minimum, of which there are, [4, 8, W, H] each, of every half of UNROLL blocks from `block` [W] on."""
    found = ()
    for u in tl.static_range(UNROLL):
        here = tl.minimum(block + u, blocks - 1)
        for half in tl.static_range(HALVES):
            at = here * 2 + half if HALVES == 2 else here // GROUP
            at = at[None, None, :, None]
            found = found + (tl.load(scales + at),)  # type: ignore[assignment]  # noqa: RUF005
            if zeros is not None:
                found = found + (tl.load(zeros + at),)  # type: ignore[assignment]  # noqa: RUF005
            if minima is not None:
                found = found + (tl.load(minima + at),)  # type: ignore[assignment]  # noqa: RUF005
    return found


@triton.jit
def _half_of(x, half: tl.constexpr, SPLIT: tl.constexpr):
    """Inputs [4, 8, W, N, ...] of a whole block; SPLIT: those of its other half are 0."""
    if SPLIT:
        quarter = tl.arange(0, 4)[:, None, None, None, None, None]
        x = tl.where(quarter // 2 == half, x, x * 0)
    return x


@triton.jit
def _sum_inputs(acc, u: tl.constexpr, half: tl.constexpr, inputs, PARTS: tl.constexpr, HALVES: tl.constexpr,
                DTYPE: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """Of a half of the u-th block, the same in every row: [W, R, T]."""
    SPLIT: tl.constexpr = HALVES == 2 and PARTS == 1
    FROM: tl.constexpr = half * PARTS // HALVES
    TO: tl.constexpr = FROM + (PARTS + HALVES - 1) // HALVES
    ones = tl.full([4, 8, acc.shape[0], acc.shape[1] // 8, 4 // PARTS, 2, 2], 1.0, tl.float32).to(DTYPE)
    y = tl.zeros(acc.shape, tl.float32)
    for part in tl.static_range(FROM, TO):
        y = add_product(y, ones, _half_of(inputs[u * PARTS + part], half, SPLIT), DTYPE, ASM)
    return y


@triton.jit
def _add_half(acc, sums, words, groups, u: tl.constexpr, half: tl.constexpr, inputs, high, block, blocks,
              BITS: tl.constexpr, RAISED: tl.constexpr, PARTS: tl.constexpr, HALVES: tl.constexpr, ZERO: tl.constexpr,
              ZEROS: tl.constexpr, MINIMA: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """acc [W, R, T] and the products of a half of the u-th block, of which `sums` are the inputs' sums."""
    SPLIT: tl.constexpr = HALVES == 2 and PARTS == 1
    FROM: tl.constexpr = half * PARTS // HALVES
    TO: tl.constexpr = FROM + (PARTS + HALVES - 1) // HALVES
    FIRST: tl.constexpr = (u * HALVES + half) * (2 if ZEROS or MINIMA else 1)
    OFF: tl.constexpr = -RAISED if RAISED else ((1 << BITS) - 1) / 2
    here = (block + u < blocks)[None, None, :, None, None]
    third = high + ((block + u) * (2 * BITS) + 4)[None, None, :, None, None]
    y = tl.zeros(acc.shape, tl.float32)
    for part in tl.static_range(FROM, TO):
        levels = levels_of(words[u], third, here, part, BITS, RAISED, DTYPE, ASM)
        y = add_product(y, levels, _half_of(inputs[u * PARTS + part], half, SPLIT), DTYPE, ASM)
    if ZEROS:
        y += sums * (OFF - by_row(groups[FIRST + 1], acc.shape))
    elif MINIMA:
        y += sums * OFF
    else:
        y += sums * (OFF - ZERO)
    acc += y * by_row(groups[FIRST], acc.shape)
    if MINIMA:
        acc += sums * by_row(groups[FIRST + 1], acc.shape)
    return acc


@triton.jit(do_not_specialize=["tokens"])
def packed_kernel(
    codes_ptr,  # uint8 [W, padded * bits / 8]
    scales_ptr,  # [W, G]
    zeros_ptr,  # uint8 [W, G] or None
    minima_ptr,  # [W, G] or None
    x_ptr,  # [T, columns]
    bias_ptr,  # [W] or None
    residual_ptr,  # [T, R] or None
    out_ptr,  # [T, R]
    partial_ptr,  # float32 [SPLITS, 1 + GATED, T, R] or None
    counter_ptr,  # int32 [row tiles]: zeros
    tokens,
    capacity,  # R
    columns,
    group_stride,  # G
    blocks,  # of 64 columns
    BITS: tl.constexpr,
    GROUP: tl.constexpr,  # blocks of a group; 0: half of one
    ZERO: tl.constexpr,
    GATED: tl.constexpr,  # rows R to 2 R - 1 are the up rows
    ACTIVATION: tl.constexpr,
    WHOLE: tl.constexpr,  # columns are whole steps
    SPLITS: tl.constexpr,
    WARPS: tl.constexpr,
    UNROLL: tl.constexpr,  # blocks of a warp in a step
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,  # columns of the tile
    OVERLAP: tl.constexpr,
    EARLY: tl.constexpr,
    ASM: tl.constexpr,
):
    """y = act(g) * u, or act(u); + bias before, + residual after."""
    DTYPE: tl.constexpr = tl.float16 if x_ptr.dtype.element_ty == tl.float16 else tl.bfloat16
    PARTS: tl.constexpr = 4 if BITS == 3 else 8 // BITS
    RAISED: tl.constexpr = raised_by(BITS, tl.float16 == DTYPE, True)
    PACKED: tl.constexpr = 1 if x_ptr.dtype.element_ty == tl.float32 else 2  # inputs of a word
    STRIDE: tl.constexpr = 64 // PACKED
    STEP: tl.constexpr = WARPS * UNROLL
    HALVES: tl.constexpr = 1 if GROUP else 2
    ZEROS: tl.constexpr = zeros_ptr is not None
    MINIMA: tl.constexpr = minima_ptr is not None
    split, tile = tl.program_id(0), tl.program_id(1)
    quarter, eighth, warp = tl.arange(0, 4), tl.arange(0, 8), tl.arange(0, WARPS)
    rows = tl.minimum(tile * ROWS + tl.arange(0, ROWS // 8)[None, :] * 8 + eighth[:, None], capacity - 1)
    rows = rows.to(tl.int64)[None, :, None, :] + (quarter * 0)[:, None, None, None] + (warp * 0)[None, None, :, None]
    words, high = codes_at(codes_ptr, rows, blocks, BITS, PARTS)
    scales, zeros, minima = scales_ptr + rows * group_stride, None, None
    if ZEROS:
        zeros = zeros_ptr + rows * group_stride
    if MINIMA:
        minima = minima_ptr + rows * group_stride
    x, within, token, width = inputs_at(x_ptr, columns, PARTS, PACKED, TOKENS)
    half_rows = (tl.program_id(0) * 0 + capacity).to(tl.int64)  # a capacity of 1 comes as a constant
    code_up = half_rows * (blocks * (2 * BITS))
    group_up = half_rows * group_stride
    scales_up, zeros_up, minima_up = scales + group_up, None, None
    if ZEROS:
        zeros_up = zeros + group_up
    if MINIMA:
        minima_up = minima + group_up
    steps = tl.cdiv(blocks, STEP)
    begin, end = split * steps // SPLITS * STEP, (split + 1) * steps // SPLITS * STEP
    acc = tl.zeros([WARPS, ROWS, TOKENS], tl.float32)
    acc_up = tl.zeros([WARPS, ROWS, TOKENS], tl.float32)
    last = end - STEP
    block = begin + warp * UNROLL
    coming = load_words(words, block, blocks, BITS, UNROLL, WHOLE)
    groups = _groups(scales, zeros, minima, block, blocks, GROUP, HALVES, UNROLL)
    coming_up, groups_up = coming, groups
    if GATED:
        coming_up = load_words(words + code_up, block, blocks, BITS, UNROLL, WHOLE)
        groups_up = _groups(scales_up, zeros_up, minima_up, block, blocks, GROUP, HALVES, UNROLL)
    if OVERLAP:
        gdc_wait()
    if OVERLAP and EARLY:
        gdc_launch_dependents()
    xs_coming = load_inputs(x, within, token < tokens, block, width, STRIDE, PARTS, UNROLL, WHOLE)
    for at in tl.range(begin, end, STEP):
        now, own, now_up, own_up, xs = coming, groups, coming_up, groups_up, xs_coming
        # The next step's are on their way while this one's products run.
        block = tl.minimum(at + STEP, last) + warp * UNROLL
        coming = load_words(words, block, blocks, BITS, UNROLL, WHOLE)
        groups = _groups(scales, zeros, minima, block, blocks, GROUP, HALVES, UNROLL)
        if GATED:
            coming_up = load_words(words + code_up, block, blocks, BITS, UNROLL, WHOLE)
            groups_up = _groups(scales_up, zeros_up, minima_up, block, blocks, GROUP, HALVES, UNROLL)
        xs_coming = load_inputs(x, within, token < tokens, block, width, STRIDE, PARTS, UNROLL, WHOLE)
        block = at + warp * UNROLL
        for u in tl.static_range(UNROLL):
            for half in tl.static_range(HALVES):
                sums = _sum_inputs(acc, u, half, xs, PARTS, HALVES, DTYPE, ASM)
                acc = _add_half(acc, sums, now, own, u, half, xs, high, block, blocks, BITS, RAISED, PARTS, HALVES, ZERO, ZEROS,
                                MINIMA, DTYPE, ASM)  # fmt: skip
                if GATED:
                    acc_up = _add_half(acc_up, sums, now_up, own_up, u, half, xs, high + code_up, block, blocks, BITS, RAISED,
                                       PARTS, HALVES, ZERO, ZEROS, MINIMA, DTYPE, ASM)  # fmt: skip
    if OVERLAP and not EARLY:
        gdc_launch_dependents()
    end_product(acc, acc_up, None, bias_ptr, None, residual_ptr, out_ptr, partial_ptr, counter_ptr, split, tile, tokens, capacity,
                capacity, GATED, ACTIVATION, False, SPLITS, ROWS, TOKENS)  # fmt: skip
