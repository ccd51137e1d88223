"""The kernel of `lowbit.py`: weights of 2, 3, 4 or 8 bits times up to 16 tokens.

Tokens are the columns of the tile that the matrix units take, y^T [rows, 16] = W [rows, K] x^T [K, 16]. Codes become levels in
registers: code - (2^bits - 1) / 2 has at most 8 significant bits, which bfloat16 and float16 hold exactly. Of 2 and 4 bits they
may be raised, code + 2^e: taking that off every number costs more than to begin a block's sum with what it adds, negative (`_start`).
Each block of 64 columns is one product of exact numbers in float32, times its scale. float32 inputs are two bfloat16 parts, whose sum
is within 2^-17 of them.

Codes go from memory straight to the registers that the matrix units read, and no warp waits for another: each has blocks of its own,
and sums are added at the end. For lane 4 g + q of a warp those units (mma.sync.m16n8k16) want some columns of the rows g and g + 8, and
as a sum does not care for the order of its columns, lane q gets the q-th quarter of a block's bytes, which lie together. So tensors are
indexed [q, g, warp, h, ...], row or token 8 h + g, and what `_add_product` does to them only renames registers. That the compiler
deals out the axes like this was seen in its code for sm_90; elsewhere it may move numbers between lanes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rowcast.kernels.gpu.product_kernels import _activate, _arrive, _sum_partials


@triton.constexpr_function
def _raised(bits, half, shared):
    """2^e where levels are code + 2^e, else 0: of 2 or 4 bits, and `shared`, where what is taken off a sum serves two tiles of rows."""
    return 0 if bits not in (2, 4) or not shared else 1 << (bits + 2 if half else bits)


@triton.constexpr_function
def _unpack(bits, part, half, raised):
    """PTX that makes of a word, 4 packed bytes, the four 16-bit levels of one part: 2 or 4 bits, at bit `bits * part`.

    A code goes into the mantissa of 2^e: of bfloat16 the upper of 7 bits, of float16 bits 4 to 7 or 6 to 7, so that one permutation of
    bytes with the constant upper byte makes two numbers. Unless they are to be raised, 2^e and the middle level are then taken off.
    """
    top = 8 if half else 7
    left = top - bits - bits * part
    shift = f"shl.b32 v, $4, {left};" if left >= 0 else f"shr.u32 v, $4, {-left};"
    mask = ((1 << bits) - 1) << (top - bits)
    exponent = bits + 2 if half else bits
    number = (15 + exponent) << 10 if half else (127 + exponent) << 7
    low, high = number & 255, number >> 8
    off = number + (((1 << bits) - 1 << (10 if half else 7)) >> exponent + 1)
    kind = "f16x2" if half else "bf16x2"
    lower = "" if raised else f"mov.b32 c, {off * 0x00010001}; sub.rn.{kind} a, a, c; sub.rn.{kind} b, b, c;"
    return f"""{{
        .reg .b32 v, c, a, b;
        {shift}
        lop3.b32 v, v, {mask * 0x01010101}, {low * 0x01010101}, 0xEA;
        mov.b32 c, {high * 0x01010101};
        prmt.b32 a, v, c, 0x4140;
        prmt.b32 b, v, c, 0x4342;
        {lower}
        mov.b32 {{$0, $1}}, a;
        mov.b32 {{$2, $3}}, b;
    }}"""


_EIGHT_BFLOAT16 = tl.constexpr("""{
    .reg .b32 a, b, c, d, k;
    .reg .f32 e, f, g, h;
    mov.b32 k, 0x47000000;
    prmt.b32 a, $4, k, 0x7404;
    prmt.b32 b, $4, k, 0x7414;
    prmt.b32 c, $4, k, 0x7424;
    prmt.b32 d, $4, k, 0x7434;
    mov.b32 e, a;
    mov.b32 f, b;
    mov.b32 g, c;
    mov.b32 h, d;
    add.f32 e, e, 0fC7007F80;
    add.f32 f, f, 0fC7007F80;
    add.f32 g, g, 0fC7007F80;
    add.f32 h, h, 0fC7007F80;
    cvt.rn.bf16x2.f32 a, f, e;
    cvt.rn.bf16x2.f32 b, h, g;
    mov.b32 {$0, $1}, a;
    mov.b32 {$2, $3}, b;
}""")
"""4 bytes into the mantissa of 2^15 in float32, less 2^15 + 127.5."""
_EIGHT_FLOAT16 = tl.constexpr("""{
    .reg .b32 a, b, c, d;
    mov.b32 c, 0x64646464;
    prmt.b32 a, $4, c, 0x4140;
    prmt.b32 b, $4, c, 0x4342;
    mov.b32 c, 0xE400E400;
    mov.b32 d, 0xD7F8D7F8;
    add.rn.f16x2 a, a, c;
    add.rn.f16x2 b, b, c;
    add.rn.f16x2 a, a, d;
    add.rn.f16x2 b, b, d;
    mov.b32 {$0, $1}, a;
    mov.b32 {$2, $3}, b;
}""")
"""4 bytes into the mantissa of 1024, less 1024 and 127.5."""


@triton.jit
def _levels(word, high, here, part: tl.constexpr, BITS: tl.constexpr, RAISED: tl.constexpr, DTYPE: tl.constexpr,
            ASM: tl.constexpr):  # fmt: skip
    """Levels of one part of the words [4, 8, W, H, J] of a block: [4, 8, W, H, J, 2, 2], that of byte c + 2 b at [..., c, b].

    `high` points at the two words of the 3-bit codes' high bits, which are read of blocks that are `here`. They are not read as bytes,
    since the compiler would deal columns to lanes by that, too many for 16 columns. ASM: not in the interpreter.
    """
    if BITS == 3 or not ASM:
        WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
        bits = word >> (part * WIDTH)
        more = word
        if BITS == 3:
            quarter = tl.arange(0, 4)[:, None, None, None, None]
            more = tl.load(high + part // 2, mask=here, other=0) >> (2 * part % 4 + quarter // 2) * 8 + quarter % 2 * 4
        a = _level(bits, more, 0, WIDTH, BITS, RAISED, DTYPE)
        b = _level(bits, more, 1, WIDTH, BITS, RAISED, DTYPE)
        c = _level(bits, more, 2, WIDTH, BITS, RAISED, DTYPE)
        d = _level(bits, more, 3, WIDTH, BITS, RAISED, DTYPE)
    elif tl.float16 == DTYPE:
        half: tl.constexpr = _EIGHT_FLOAT16 if BITS == 8 else _unpack(BITS, part, True, RAISED)
        a, b, c, d = tl.inline_asm_elementwise(
            half, "=h,=h,=h,=h,r", [word], dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=1
        )
    else:
        ptx: tl.constexpr = _EIGHT_BFLOAT16 if BITS == 8 else _unpack(BITS, part, False, RAISED)
        a, b, c, d = tl.inline_asm_elementwise(
            ptx, "=h,=h,=h,=h,r", [word], dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=1
        )
    return tl.join(tl.join(a, b), tl.join(c, d))


@triton.jit
def _level(bits, more, byte: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, RAISED: tl.constexpr, DTYPE: tl.constexpr):
    """That of a byte of a word, of whose codes `more` has the third bits."""
    code = (bits >> (8 * byte)) & ((1 << WIDTH) - 1)
    if BITS == 3:
        code = code | (more >> byte & 1) << 2
    return (code.to(tl.float32) + (RAISED or -((1 << BITS) - 1) / 2)).to(DTYPE)


@triton.jit
def _halves(word, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """The two numbers of 16 bits that a word is, along a last axis."""
    if not ASM:
        low, high = word.to(tl.int16).to(DTYPE, bitcast=True), (word >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    elif tl.float16 == DTYPE:
        low, high = tl.inline_asm_elementwise(
            "mov.b32 {$0, $1}, $2;", "=h,=h,r", [word], dtype=(tl.float16, tl.float16), is_pure=True, pack=1
        )
    else:
        low, high = tl.inline_asm_elementwise(
            "mov.b32 {$0, $1}, $2;", "=h,=h,r", [word], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=1
        )
    return tl.join(low, high)


@triton.jit
def _dot(levels, x, acc, ASM: tl.constexpr):
    if not ASM:  # The interpreter knows no bfloat16 products.
        levels, x = levels.to(tl.float32), x.to(tl.float32)
    return tl.dot(levels, tl.permute(x, (0, 2, 1)), acc)


@triton.jit
def _add_product(acc, levels, x, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """acc [W, R, T] + levels x^T: levels [4, 8, W, H, J, 2, 2], x [4, 8, W, N, ...] the same columns, float32 or words of two."""
    WARPS: tl.constexpr = levels.shape[2]
    WORDS: tl.constexpr = levels.shape[4]
    levels = tl.reshape(tl.permute(levels, (2, 3, 1, 4, 0, 6, 5)), [WARPS, acc.shape[1], WORDS * 16])
    if x.dtype == tl.int32:
        x = _halves(x, DTYPE, ASM)
    x = tl.reshape(x, [4, 8, WARPS, acc.shape[2] // 8, WORDS, 4])
    x = tl.reshape(tl.permute(x, (2, 3, 1, 4, 0, 5)), [WARPS, acc.shape[2], WORDS * 16])
    if x.dtype == tl.float32:  # in two bfloat16 parts
        large = x.to(DTYPE)
        acc = _dot(levels, (x - large.to(tl.float32)).to(DTYPE), acc, ASM)
        acc = _dot(levels, large, acc, ASM)
    else:
        acc = _dot(levels, x, acc, ASM)
    return acc


@triton.jit
def _weights(words, scales, block, blocks,
             BITS: tl.constexpr, GROUP: tl.constexpr, UNROLL: tl.constexpr, WORD: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """Words [4, 8, W, H, J] of UNROLL blocks from `block` [W] on, then their scales [4, 8, W, H], WORD neighbours in one integer."""
    found = ()
    for u in tl.static_range(UNROLL):
        at = words + ((block + u) * (2 * BITS))[None, None, :, None, None]
        if WHOLE:
            word = tl.load(at, eviction_policy="evict_first")
        else:
            word = tl.load(at, mask=(block + u < blocks)[None, None, :, None, None], other=0, eviction_policy="evict_first")
        found = found + (word,)  # type: ignore[assignment]  # noqa: RUF005
    for u in tl.static_range(0, UNROLL, WORD):
        at = scales + (tl.minimum(block + u, blocks - WORD) // GROUP)[None, None, :, None]
        if WORD == 4:
            scale = tl.load(at.to(tl.pointer_type(tl.int64), bitcast=True))
        elif WORD == 2:
            scale = tl.load(at.to(tl.pointer_type(tl.int32), bitcast=True))
        else:
            scale = tl.load(at)
        found = found + (scale,)  # type: ignore[assignment]  # noqa: RUF005
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
def _inputs(x, within, present, block, width,
            STRIDE: tl.constexpr, PARTS: tl.constexpr, UNROLL: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """x [4, 8, W, N, ...] for each part of UNROLL blocks from `block` [W] on, STRIDE words each, none beyond `width` words."""
    found = ()
    for u in tl.static_range(UNROLL):
        for part in tl.static_range(PARTS):
            first = ((block + u) * STRIDE + part * (STRIDE // PARTS))[None, None, :, None, None, None]
            mask = present if WHOLE else present & (first + within < width)
            found = found + (tl.load(x + first, mask=mask, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
    return found


@triton.jit
def _products(acc, weights, FIRST: tl.constexpr, u: tl.constexpr, inputs, y, high, block, blocks, BITS: tl.constexpr,
              RAISED: tl.constexpr, PARTS: tl.constexpr, UNROLL: tl.constexpr, WORD: tl.constexpr, DTYPE: tl.constexpr,
              ASM: tl.constexpr):  # fmt: skip
    """acc [W, R, T] and the products, from y on, of the u-th block from `block` [W] on, its words and scales from weights[FIRST:]."""
    here = (block + u < blocks)[None, None, :, None, None]
    third = high + ((block + u) * (2 * BITS) + 4)[None, None, :, None, None]
    for part in tl.static_range(PARTS):
        levels = _levels(weights[FIRST + u], third, here, part, BITS, RAISED, DTYPE, ASM)
        y = _add_product(y, levels, inputs[u * PARTS + part], DTYPE, ASM)
    scale = weights[FIRST + UNROLL + u // WORD]
    if WORD > 1:
        scale = (scale >> 16 * (u % WORD)).to(tl.int16).to(tl.float16, bitcast=True)
    wide = scale.to(tl.float32)[:, :, :, :, None, None]  # for each token 8 n + 2 q + c of the tile, as lanes have it
    wide = tl.broadcast_to(wide, [4, 8, scale.shape[2], scale.shape[3], acc.shape[2] // 8, 2])
    return acc + y * tl.reshape(tl.permute(wide, (2, 3, 1, 4, 0, 5)), acc.shape)


@triton.jit
def _start(acc, u: tl.constexpr, inputs, BITS: tl.constexpr, RAISED: tl.constexpr, PARTS: tl.constexpr, DTYPE: tl.constexpr,
           ASM: tl.constexpr):  # fmt: skip
    """Where a block's sum [W, R, T] begins: below 0 by what raised levels add."""
    y = tl.zeros(acc.shape, tl.float32)
    if RAISED:
        level = -RAISED - ((1 << BITS) - 1) / 2
        level = tl.full([4, 8, acc.shape[0], acc.shape[1] // 8, 4 // PARTS, 2, 2], level, tl.float32).to(DTYPE)
        for part in tl.static_range(PARTS):
            y = _add_product(y, level, inputs[u * PARTS + part], DTYPE, ASM)
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
    RAISED: tl.constexpr = _raised(BITS, tl.float16 == DTYPE, GATED or ROWS > 16)
    PACKED: tl.constexpr = 1 if x_ptr.dtype.element_ty == tl.float32 else 2  # inputs of a word
    OWN: tl.constexpr = 16 // PARTS // PACKED  # words of a part that a lane reads
    VECTOR: tl.constexpr = min(OWN, 4)
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
    high = (codes_ptr.to(tl.pointer_type(tl.int32)) + rows * (code_stride * (2 * BITS)))[:, :, :, :, None]
    words = high + quarter[:, None, None, None, None] * (4 // PARTS) + tl.arange(0, 4 // PARTS)[None, None, None, None, :]
    scales = scales_ptr + rows * scale_stride
    token = (tl.arange(0, TOKENS // 8)[None, :] * 8 + eighth[:, None])[None, :, None, :, None, None]
    within = (tl.arange(0, OWN // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :])[None, None, None, None, :, :]
    within = within + (quarter * OWN)[:, None, None, None, None, None]
    x = x_ptr
    if PACKED == 2:
        x = x_ptr.to(tl.pointer_type(tl.int32))
    width = columns // PACKED
    x = x + token * width + within
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
    xs_coming = _inputs(x, within, token < tokens, begin + warp * UNROLL, width, STRIDE, PARTS, UNROLL, WHOLE)
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
        xs_coming = _inputs(x, within, token < tokens, block, width, STRIDE, PARTS, UNROLL, WHOLE)
        block = at + warp * UNROLL
        for u in tl.static_range(UNROLL):
            y = _start(acc, u, xs, BITS, RAISED, PARTS, DTYPE, ASM)
            acc = _products(acc, now, 0, u, xs, y, high, block, blocks, BITS, RAISED, PARTS, UNROLL, WORD, DTYPE, ASM)
            if GATED:
                third = high + code_up
                acc_up = _products(acc_up, now, UP, u, xs, y, third, block, blocks, BITS, RAISED, PARTS, UNROLL, WORD, DTYPE, ASM)
    if OVERLAP and not EARLY:
        gdc_launch_dependents()
    acc, acc_up = tl.sum(acc, 0), tl.sum(acc_up, 0)
    places = tile * ROWS + tl.arange(0, ROWS)
    rows = tl.minimum(places, limit - 1)
    if ids_ptr is not None:
        rows = tl.load(ids_ptr + rows)
    valid = places < limit
    column = tl.arange(0, TOKENS)[None, :]
    at = column * capacity + places[:, None]
    mask = valid[:, None] & (column < tokens)
    if SPLITS > 1:
        size = tokens * capacity
        step = (2 if GATED else 1) * size
        tl.store(partial_ptr + split * step + at, acc, mask=mask)
        if GATED:
            tl.store(partial_ptr + split * step + size + at, acc_up, mask=mask)
        if _arrive(counter_ptr + tile, SPLITS):
            acc = _sum_partials(partial_ptr, at, mask, step, SPLITS)
            if GATED:
                acc_up = _sum_partials(partial_ptr + size, at, mask, step, SPLITS)
            _finish(acc, acc_up, bias_ptr, norms_ptr, residual_ptr, out_ptr, rows, valid, capacity, at, mask,
                    GATED, ACTIVATION, SIGNED)  # fmt: skip
    else:
        _finish(acc, acc_up, bias_ptr, norms_ptr, residual_ptr, out_ptr, rows, valid, capacity, at, mask,
                GATED, ACTIVATION, SIGNED)  # fmt: skip


@triton.jit
def _finish(acc, acc_up, bias_ptr, norms_ptr, residual_ptr, out_ptr, rows, valid, capacity, at, mask,
            GATED: tl.constexpr, ACTIVATION: tl.constexpr, SIGNED: tl.constexpr):  # fmt: skip
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + rows, mask=valid, other=0.0).to(tl.float32)[:, None]
        if GATED:
            acc_up += tl.load(bias_ptr + capacity + rows, mask=valid, other=0.0).to(tl.float32)[:, None]
    y = acc if SIGNED else _activate(acc, ACTIVATION)
    if GATED:
        y = y * acc_up
    if norms_ptr is not None:
        y = (y if SIGNED else tl.abs(y)) * tl.load(norms_ptr + rows, mask=valid, other=0.0)[:, None]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=mask)
