"""The kernel of `packed.py` for GGUF's K-quants, whose groups count in numbers of a super-block: of 4 and 5 bits with minima in groups
of 32, of 6 bits without in groups of 16. And for 5 bits in groups of 32 with numbers of their own. Parts: `code_kernels`.

What a block's scales are, and minima, is one word, of four bytes or of two numbers, which all four lanes of a row read. In groups of 32
levels are raised, code + 2^e: the sum of a group's inputs, which the matrix units find as a product with ones, takes that off together
with the minimum. Of 6 bits 32 is taken off each code, and one step of the matrix units is a group of 16.
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


@triton.constexpr_function
def _raised(bits, half):
    """2^e, which raised levels of 4 and 5 bits lie above; 0 of 6 bits."""
    return raised_by(4, half, True) if bits == 4 else (1 << (bits + 2 if half else bits)) * (bits == 5)


@triton.constexpr_function
def _unpack(bits, part, half):
    """PTX that makes the four 16-bit levels of one part of a word of low bits, 4 packed bytes, and of a word of high ones: 5 or 6 bits.

    As `code_kernels` does it of 2 or 4 bits, but that a code is put together in the mantissa of 2^e.
    """
    top, exponent = (8, bits + 2) if half else (7, bits)
    left = top - bits  # of a code in its byte
    number = (15 + exponent) << 10 if half else (127 + exponent) << 7
    low, high = number & 255, number >> 8
    moved = left - 4 * (part % 2)
    shift = f"shl.b32 v, $4, {moved};" if moved >= 0 else f"shr.u32 v, $4, {-moved};"
    more = left + 4 - (bits - 4) * part
    shift_more = f"shl.b32 w, $5, {more};" if more >= 0 else f"shr.u32 w, $5, {-more};"
    mask, mask_more = 15 << left, ((1 << bits - 4) - 1) << left + 4
    off = number + ((32 << (10 if half else 7)) >> exponent)
    kind = "f16x2" if half else "bf16x2"
    lower = f"mov.b32 c, {off * 0x00010001}; sub.rn.{kind} a, a, c; sub.rn.{kind} b, b, c;" if bits == 6 else ""
    return f"""{{
        .reg .b32 v, w, c, a, b;
        {shift}
        {shift_more}
        lop3.b32 v, v, {mask * 0x01010101}, {low * 0x01010101}, 0xEA;
        lop3.b32 v, w, {mask_more * 0x01010101}, v, 0xEA;
        mov.b32 c, {high * 0x01010101};
        prmt.b32 a, v, c, 0x4140;
        prmt.b32 b, v, c, 0x4342;
        {lower}
        mov.b32 {{$0, $1}}, a;
        mov.b32 {{$2, $3}}, b;
    }}"""


@triton.jit
def _level(low, more, byte: tl.constexpr, part: tl.constexpr, BITS: tl.constexpr, RAISED: tl.constexpr, DTYPE: tl.constexpr):
    more = more >> (8 * byte + (BITS - 4) * part) & ((1 << BITS - 4) - 1)
    code = (low >> (8 * byte + part % 2 * 4) & 15) | more << 4
    return (code.to(tl.float32) + (RAISED or -32)).to(DTYPE)


@triton.jit
def _levels(low, more, part: tl.constexpr, BITS: tl.constexpr, RAISED: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Levels of 5 or 6 bits of one part, 16 columns, of a block: low [4, 8, W, H, 2], more [4, 8, W, H, 1] -> [4, 8, W, H, 1, 2, 2]."""
    if BITS == 5:  # Two lanes share a word.
        more = more >> (tl.arange(0, 4) % 2 * 4)[:, None, None, None, None]
    first, second = tl.split(low)
    own = (first if part < 2 else second)[:, :, :, :, None]
    if not ASM:
        a, b = _level(own, more, 0, part, BITS, RAISED, DTYPE), _level(own, more, 1, part, BITS, RAISED, DTYPE)
        c, d = _level(own, more, 2, part, BITS, RAISED, DTYPE), _level(own, more, 3, part, BITS, RAISED, DTYPE)
    elif tl.float16 == DTYPE:
        half: tl.constexpr = _unpack(BITS, part, True)
        a, b, c, d = tl.inline_asm_elementwise(
            half, "=h,=h,=h,=h,r,r", [own, more], dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=1
        )
    else:
        ptx: tl.constexpr = _unpack(BITS, part, False)
        a, b, c, d = tl.inline_asm_elementwise(
            ptx, "=h,=h,=h,=h,r,r", [own, more], dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=1
        )
    return tl.join(tl.join(a, b), tl.join(c, d))


@triton.jit
def _weights(words, high, counts, over, minima, block, blocks, BITS: tl.constexpr, UNROLL: tl.constexpr, WHOLE: tl.constexpr):
    """Of UNROLL blocks from `block` [W] on: low words [4, 8, W, H, 2], words of scales [4, 8, W, H], of 5 and 6 bits high words
    [4, 8, W, H, 1], and then what scales count in, in their one super-block, or words of minima, [4, 8, W, H], if there are such."""
    found = load_words(words, block, blocks, BITS, UNROLL, WHOLE)
    for u in tl.static_range(UNROLL):
        found = found + (tl.load(counts + tl.minimum(block + u, blocks - 1)[None, None, :, None]),)  # noqa: RUF005
    if BITS > 4:
        found = found + load_words(high, block, blocks, BITS, UNROLL, WHOLE)
    if over is not None:
        found = found + (tl.load(over + (tl.minimum(block, blocks - 1) // 4)[None, None, :, None]),)  # noqa: RUF005
    if minima is not None:
        for u in tl.static_range(UNROLL):
            found = found + (tl.load(minima + tl.minimum(block + u, blocks - 1)[None, None, :, None]),)  # noqa: RUF005
    return found


@triton.jit
def _halves(word):
    """The two float16 numbers that a word is, as float32."""
    low, high = word.to(tl.int16).to(tl.float16, bitcast=True), (word >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def _sum_inputs(acc, u: tl.constexpr, group: tl.constexpr, inputs, PARTS: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Of a group of 32 of the u-th block, the same in every row: [W, R, T]."""
    ones = tl.full([4, 8, acc.shape[0], acc.shape[1] // 8, 4 // PARTS, 2, 2], 1.0, tl.float32).to(DTYPE)
    y = tl.zeros(acc.shape, tl.float32)
    for part in tl.static_range(group * PARTS // 2, (group + 1) * PARTS // 2):
        y = add_product(y, ones, inputs[u * PARTS + part], DTYPE, ASM)
    return y


@triton.jit
def _add_group(acc, sums, weights, u: tl.constexpr, group: tl.constexpr, inputs, BITS: tl.constexpr, RAISED: tl.constexpr,
               ZERO: tl.constexpr, OVER: tl.constexpr, MINIMA: tl.constexpr, PARTS: tl.constexpr, UNROLL: tl.constexpr,
               DTYPE: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """acc [W, R, T] and the products of a group of 32 of the u-th block, of which `sums` are the inputs' sums."""
    y = tl.zeros(acc.shape, tl.float32)
    for part in tl.static_range(group * PARTS // 2, (group + 1) * PARTS // 2):
        if BITS == 4:
            levels = levels_of(weights[u], None, None, part, BITS, RAISED, DTYPE, ASM)
        else:
            levels = _levels(weights[u], weights[2 * UNROLL + u], part, BITS, RAISED, DTYPE, ASM)
        y = add_product(y, levels, inputs[u * PARTS + part], DTYPE, ASM)
    OWN: tl.constexpr = UNROLL * (2 if BITS == 4 else 3)  # what belongs to scales
    count = weights[UNROLL + u]
    if OVER:
        scale_one, least_one = _halves(weights[OWN])
        scale = (count >> 8 * group & 255).to(tl.float32) * scale_one
        shift = -RAISED * scale - (count >> 8 * group + 16 & 255).to(tl.float32) * least_one
    else:
        scale = _halves(count)[group]
        shift = -(RAISED + ZERO) * scale
        if MINIMA:
            shift += _halves(weights[OWN + u])[group]
    acc += sums * by_row(shift, acc.shape)
    return acc + y * by_row(scale, acc.shape)


@triton.jit
def _add_block(acc, weights, u: tl.constexpr, inputs, BITS: tl.constexpr, UNROLL: tl.constexpr, DTYPE: tl.constexpr,
               ASM: tl.constexpr):  # fmt: skip
    """acc [W, R, T] and the products of the four groups of 16 of the u-th block."""
    block = tl.zeros(acc.shape, tl.float32)
    for part in tl.static_range(4):
        levels = _levels(weights[u], weights[2 * UNROLL + u], part, BITS, 0, DTYPE, ASM)
        y = add_product(tl.zeros(acc.shape, tl.float32), levels, inputs[u * 4 + part], DTYPE, ASM)
        block += y * by_row(weights[UNROLL + u] << 24 - 8 * part >> 24, acc.shape)
    return acc + block * by_row(weights[3 * UNROLL], acc.shape)


@triton.jit(do_not_specialize=["tokens"])
def super_kernel(
    codes_ptr,  # uint8 [W, blocks * 8 bits]
    scales_ptr,  # bytes [W, blocks, 4], or float16 [W, blocks, 2]
    over_ptr,  # float16 [W, blocks / 4, 2 where there are minima]; None: scales are numbers
    minima_ptr,  # float16 [W, blocks, 2] or None
    x_ptr,  # [T, columns]
    bias_ptr,  # [W] or None
    residual_ptr,  # [T, R] or None
    out_ptr,  # [T, R]
    partial_ptr,  # float32 [SPLITS, 1 + GATED, T, R] or None
    counter_ptr,  # int32 [row tiles]: zeros
    tokens,
    capacity,  # R
    columns,
    blocks,  # of 64 columns
    BITS: tl.constexpr,
    ZERO: tl.constexpr,  # the zero point of scales that are numbers
    GATED: tl.constexpr,  # rows R to 2 R - 1 are the up rows
    ACTIVATION: tl.constexpr,
    WHOLE: tl.constexpr,  # columns are whole steps
    SPLITS: tl.constexpr,
    WARPS: tl.constexpr,
    UNROLL: tl.constexpr,  # blocks of a warp in a step: 1, 2 or 4
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,  # columns of the tile
    OVERLAP: tl.constexpr,
    EARLY: tl.constexpr,
    ASM: tl.constexpr,
):
    """y = act(g) * u, or act(u); + bias before, + residual after."""
    DTYPE: tl.constexpr = tl.float16 if x_ptr.dtype.element_ty == tl.float16 else tl.bfloat16
    PARTS: tl.constexpr = 2 if BITS == 4 else 4
    RAISED: tl.constexpr = _raised(BITS, tl.float16 == DTYPE)
    PACKED: tl.constexpr = 1 if x_ptr.dtype.element_ty == tl.float32 else 2  # inputs of a word
    STRIDE: tl.constexpr = 64 // PACKED
    STEP: tl.constexpr = WARPS * UNROLL
    OVER: tl.constexpr = over_ptr is not None
    MINIMA: tl.constexpr = minima_ptr is not None
    tl.static_assert(4 % UNROLL == 0)
    split, tile = tl.program_id(0), tl.program_id(1)
    quarter, eighth, warp = tl.arange(0, 4), tl.arange(0, 8), tl.arange(0, WARPS)
    rows = tl.minimum(tile * ROWS + tl.arange(0, ROWS // 8)[None, :] * 8 + eighth[:, None], capacity - 1)
    rows = rows.to(tl.int64)[None, :, None, :] + (quarter * 0)[:, None, None, None] + (warp * 0)[None, None, :, None]
    words, high = codes_at(codes_ptr, rows, blocks, BITS, 2)
    # Of 6 bits 5 q % 4 is q: seen to be neighbours, the words of four lanes would be dealt to one.
    high += 8 + (quarter // 2 if BITS == 5 else quarter * 5 % 4)[:, None, None, None, None]
    counts = scales_ptr.to(tl.pointer_type(tl.int32)) + rows * blocks
    over, minima = None, None
    if OVER:
        over = over_ptr if BITS == 6 else over_ptr.to(tl.pointer_type(tl.int32))
        over += rows * (blocks // 4)
    if MINIMA:
        minima = minima_ptr.to(tl.pointer_type(tl.int32)) + rows * blocks
    x, within, token, width = inputs_at(x_ptr, columns, PARTS, PACKED, TOKENS)
    half_rows = (tl.program_id(0) * 0 + capacity).to(tl.int64)  # a capacity of 1 comes as a constant
    code_up = half_rows * (blocks * (2 * BITS))
    counts_up, over_up, minima_up = counts + half_rows * blocks, None, None
    if OVER:
        over_up = over + half_rows * (blocks // 4)
    if MINIMA:
        minima_up = minima + half_rows * blocks
    steps = tl.cdiv(blocks, STEP)
    begin, end = split * steps // SPLITS * STEP, (split + 1) * steps // SPLITS * STEP
    acc = tl.zeros([WARPS, ROWS, TOKENS], tl.float32)
    acc_up = tl.zeros([WARPS, ROWS, TOKENS], tl.float32)
    last = end - STEP
    block = begin + warp * UNROLL
    coming = _weights(words, high, counts, over, minima, block, blocks, BITS, UNROLL, WHOLE)
    coming_up = coming
    if GATED:
        coming_up = _weights(words + code_up, high + code_up, counts_up, over_up, minima_up, block, blocks, BITS, UNROLL, WHOLE)
    if OVERLAP:
        gdc_wait()
    if OVERLAP and EARLY:
        gdc_launch_dependents()
    xs_coming = load_inputs(x, within, token < tokens, block, width, STRIDE, PARTS, UNROLL, WHOLE)
    for at in tl.range(begin, end, STEP):
        now, now_up, xs = coming, coming_up, xs_coming
        # The next step's are on their way while this one's products run.
        block = tl.minimum(at + STEP, last) + warp * UNROLL
        coming = _weights(words, high, counts, over, minima, block, blocks, BITS, UNROLL, WHOLE)
        if GATED:
            coming_up = _weights(
                words + code_up, high + code_up, counts_up, over_up, minima_up, block, blocks, BITS, UNROLL, WHOLE
            )
        xs_coming = load_inputs(x, within, token < tokens, block, width, STRIDE, PARTS, UNROLL, WHOLE)
        for u in tl.static_range(UNROLL):
            if BITS == 6:
                acc = _add_block(acc, now, u, xs, BITS, UNROLL, DTYPE, ASM)
                if GATED:
                    acc_up = _add_block(acc_up, now_up, u, xs, BITS, UNROLL, DTYPE, ASM)
            else:
                for group in tl.static_range(2):
                    sums = _sum_inputs(acc, u, group, xs, PARTS, DTYPE, ASM)
                    acc = _add_group(acc, sums, now, u, group, xs, BITS, RAISED, ZERO, OVER, MINIMA, PARTS, UNROLL, DTYPE, ASM)
                    if GATED:
                        acc_up = _add_group(acc_up, sums, now_up, u, group, xs, BITS, RAISED, ZERO, OVER, MINIMA, PARTS, UNROLL, DTYPE,
                                            ASM)  # fmt: skip
    if OVERLAP and not EARLY:
        gdc_launch_dependents()
    end_product(acc, acc_up, None, bias_ptr, None, residual_ptr, out_ptr, partial_ptr, counter_ptr, split, tile, tokens, capacity,
                capacity, GATED, ACTIVATION, False, SPLITS, ROWS, TOKENS)  # fmt: skip
