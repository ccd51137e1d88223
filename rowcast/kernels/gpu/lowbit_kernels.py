"""The kernel of `lowbit.py`: weights of 2, 3, 4 or 8 bits times up to 16 tokens, made of what `code_kernels` has.

Each block of 64 columns is one product of exact numbers in float32, times its scale. Where levels are raised, a block's sum begins with
what that adds, negative (`_start`).
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
def _weights(words, scales, block, blocks,
             BITS: tl.constexpr, GROUP: tl.constexpr, UNROLL: tl.constexpr, WORD: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """Words [4, 8, W, H, J] of UNROLL blocks from `block` [W] on, then their scales [4, 8, W, H], WORD neighbours in one integer."""
    found = load_words(words, block, blocks, BITS, UNROLL, WHOLE)
    for u in tl.static_range(0, UNROLL, WORD):
        at = scales + (tl.minimum(block + u, blocks - WORD) // GROUP)[None, None, :, None]
        if WORD == 4:
            scale = tl.load(at.to(tl.pointer_type(tl.int64), bitcast=True))
        elif WORD == 2:
            scale = tl.load(at.to(tl.pointer_type(tl.int32), bitcast=True))
        else:
            scale = tl.load(at)
        found = found + (scale,)  # noqa: RUF005
    return found


@triton.jit
def _both(words, scales, code_up, scale_up, block, blocks, BITS: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr,
          UNROLL: tl.constexpr, WORD: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """`_weights`, of the up rows, too, where it is gated."""
    found = _weights(words, scales, block, blocks, BITS, GROUP, UNROLL, WORD, WHOLE)
    if GATED:
        found = found + _weights(words + code_up, scales + scale_up, block, blocks, BITS, GROUP, UNROLL, WORD, WHOLE)
    return found


@triton.jit
def _products(acc, weights, FIRST: tl.constexpr, u: tl.constexpr, inputs, y, high, block, blocks, BITS: tl.constexpr,
              RAISED: tl.constexpr, PARTS: tl.constexpr, UNROLL: tl.constexpr, WORD: tl.constexpr, DTYPE: tl.constexpr,
              ASM: tl.constexpr):  # fmt: skip
    """acc [W, R, T] and the products, from y on, of the u-th block from `block` [W] on, its words and scales from weights[FIRST:]."""
    here = (block + u < blocks)[None, None, :, None, None]
    third = high + ((block + u) * (2 * BITS) + 4)[None, None, :, None, None]
    for part in tl.static_range(PARTS):
        levels = levels_of(weights[FIRST + u], third, here, part, BITS, RAISED, DTYPE, ASM)
        y = add_product(y, levels, inputs[u * PARTS + part], DTYPE, ASM)
    scale = weights[FIRST + UNROLL + u // WORD]
    if WORD > 1:
        scale = (scale >> 16 * (u % WORD)).to(tl.int16).to(tl.float16, bitcast=True)
    return acc + y * by_row(scale, acc.shape)


@triton.jit
def _start(acc, u: tl.constexpr, inputs, BITS: tl.constexpr, RAISED: tl.constexpr, PARTS: tl.constexpr, DTYPE: tl.constexpr,
           ASM: tl.constexpr):  # fmt: skip
    """Where a block's sum [W, R, T] begins: below 0 by what raised levels add."""
    y = tl.zeros(acc.shape, tl.float32)
    if RAISED:
        level = -RAISED - ((1 << BITS) - 1) / 2
        level = tl.full([4, 8, acc.shape[0], acc.shape[1] // 8, 4 // PARTS, 2, 2], level, tl.float32).to(DTYPE)
        for part in tl.static_range(PARTS):
            y = add_product(y, level, inputs[u * PARTS + part], DTYPE, ASM)
    return y


@triton.jit(do_not_specialize=["tokens"])
def lowbit_kernel(
    codes_ptr,  # uint8 [W, padded * bits / 8]
    scales_ptr,  # float16 [W, padded / group]
    x_ptr,  # [T, columns]
    ids_ptr,  # int32 [R] or None
    count_ptr,  # int32 [1] or None
    bias_ptr,  # [W] or None
    norms_ptr,  # float32 [R] or None
    residual_ptr,  # [T, R] or None
    out_ptr,  # [T, R]
    partial_ptr,  # float32 [SPLITS, 1 + GATED, T, R] or None
    counter_ptr,  # int32 [row tiles]: zeros
    tokens,
    capacity,  # R
    columns,
    code_stride,  # in blocks
    scale_stride,
    blocks,  # of 64 columns
    WORD: tl.constexpr,  # neighbouring scales of a row that are one aligned integer
    BITS: tl.constexpr,
    GROUP: tl.constexpr,  # blocks of a group
    GATED: tl.constexpr,  # rows R to 2 R - 1 are the up rows
    ACTIVATION: tl.constexpr,
    SIGNED: tl.constexpr,  # with norms: the signed pre-activation counts
    WHOLE: tl.constexpr,  # columns are whole steps
    SPLITS: tl.constexpr,
    WARPS: tl.constexpr,
    UNROLL: tl.constexpr,  # blocks of a warp in a step
    AHEAD: tl.constexpr,  # steps whose weights are on their way: 1 or 2
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,  # columns of the tile
    OVERLAP: tl.constexpr,
    EARLY: tl.constexpr,  # programs of the next kernel may start as soon as one of these ends
    ASM: tl.constexpr,
):
    """y = act(g) * u, or act(u), or |y| * norms; + bias before, + residual after."""
    DTYPE: tl.constexpr = tl.float16 if x_ptr.dtype.element_ty == tl.float16 else tl.bfloat16
    PARTS: tl.constexpr = 4 if BITS == 3 else 8 // BITS
    RAISED: tl.constexpr = raised_by(BITS, tl.float16 == DTYPE, GATED or ROWS > 16)
    PACKED: tl.constexpr = 1 if x_ptr.dtype.element_ty == tl.float32 else 2  # inputs of a word
    STRIDE: tl.constexpr = 64 // PACKED
    STEP: tl.constexpr = WARPS * UNROLL
    split, tile = tl.program_id(0), tl.program_id(1)
    limit = capacity
    if OVERLAP and (ids_ptr is not None or count_ptr is not None):
        gdc_wait()
    if count_ptr is not None:
        limit = tl.minimum(tl.load(count_ptr), capacity)
        if tile * ROWS >= limit:
            return
    quarter, eighth, warp = tl.arange(0, 4), tl.arange(0, 8), tl.arange(0, WARPS)
    rows = tl.minimum(tile * ROWS + tl.arange(0, ROWS // 8)[None, :] * 8 + eighth[:, None], limit - 1)
    if ids_ptr is not None:
        rows = tl.load(ids_ptr + rows)
    rows = rows.to(tl.int64)[None, :, None, :] + (quarter * 0)[:, None, None, None] + (warp * 0)[None, None, :, None]
    words, high = codes_at(codes_ptr, rows, code_stride, BITS, PARTS)
    scales = scales_ptr + rows * scale_stride
    x, within, token, width = inputs_at(x_ptr, columns, PARTS, PACKED, TOKENS)
    half = (tl.program_id(0) * 0 + capacity).to(tl.int64)  # a capacity of 1 comes as a constant
    code_up = half * (code_stride * (2 * BITS))
    scale_up = half * scale_stride
    steps = tl.cdiv(blocks, STEP)
    begin, end = split * steps // SPLITS * STEP, (split + 1) * steps // SPLITS * STEP
    acc = tl.zeros([WARPS, ROWS, TOKENS], tl.float32)
    acc_up = tl.zeros([WARPS, ROWS, TOKENS], tl.float32)
    last = end - STEP
    block = begin + warp * UNROLL
    coming = _both(words, scales, code_up, scale_up, block, blocks, BITS, GROUP, GATED, UNROLL, WORD, WHOLE)
    later = coming
    if AHEAD == 2:
        block = tl.minimum(begin + STEP, last) + warp * UNROLL
        later = _both(words, scales, code_up, scale_up, block, blocks, BITS, GROUP, GATED, UNROLL, WORD, WHOLE)
    if OVERLAP:
        gdc_wait()
    if OVERLAP and EARLY:
        gdc_launch_dependents()
    xs_coming = load_inputs(x, within, token < tokens, begin + warp * UNROLL, width, STRIDE, PARTS, UNROLL, WHOLE)
    UP: tl.constexpr = len(coming) // 2
    for at in tl.range(begin, end, STEP):
        now, xs = coming, xs_coming  # The next steps' are on their way while this one's products run.
        block = tl.minimum(at + AHEAD * STEP, last) + warp * UNROLL
        if AHEAD == 2:
            coming = later
            later = _both(words, scales, code_up, scale_up, block, blocks, BITS, GROUP, GATED, UNROLL, WORD, WHOLE)
        else:
            coming = _both(words, scales, code_up, scale_up, block, blocks, BITS, GROUP, GATED, UNROLL, WORD, WHOLE)
        block = tl.minimum(at + STEP, last) + warp * UNROLL
        xs_coming = load_inputs(x, within, token < tokens, block, width, STRIDE, PARTS, UNROLL, WHOLE)
        block = at + warp * UNROLL
        starts = ()
        if TOKENS == 8:  # Those of a step first, which wait for no weights; with more tokens they take too many registers.
            for u in tl.static_range(UNROLL):
                starts = starts + (_start(acc, u, xs, BITS, RAISED, PARTS, DTYPE, ASM),)  # type: ignore[assignment]  # noqa: RUF005
        for u in tl.static_range(UNROLL):
            y = starts[u] if TOKENS == 8 else _start(acc, u, xs, BITS, RAISED, PARTS, DTYPE, ASM)
            acc = _products(acc, now, 0, u, xs, y, high, block, blocks, BITS, RAISED, PARTS, UNROLL, WORD, DTYPE, ASM)
            if GATED:
                third = high + code_up
                acc_up = _products(acc_up, now, UP, u, xs, y, third, block, blocks, BITS, RAISED, PARTS, UNROLL, WORD, DTYPE, ASM)
    if OVERLAP and not EARLY:
        gdc_launch_dependents()
    end_product(acc, acc_up, ids_ptr, bias_ptr, norms_ptr, residual_ptr, out_ptr, partial_ptr, counter_ptr, split, tile, tokens, limit,
                capacity, GATED, ACTIVATION, SIGNED, SPLITS, ROWS, TOKENS)  # fmt: skip
