"""What the kernels of `lowbit.py` and `packed.py` are made of: codes of 2, 3, 4 or 8 bits times up to 16 tokens.

Tokens are the columns of the tile that the matrix units take, y^T [rows, 16] = W [rows, K] x^T [K, 16]. Codes become levels in
registers: code - (2^bits - 1) / 2 has at most 8 significant bits, which bfloat16 and float16 hold exactly. Of 2 and 4 bits they
may be raised, code + 2^e, where taking that off every number costs more than taking it off a block's sum. float32 inputs are two
bfloat16 parts, whose sum is within 2^-17 of them.

Codes go from memory straight to the registers that the matrix units read, and no warp waits for another: each has blocks of its own,
and sums are added at the end. For lane 4 g + q of a warp those units (mma.sync.m16n8k16) want some columns of the rows g and g + 8, and
as a sum does not care for the order of its columns, lane q gets the q-th quarter of a block's bytes, which lie together. So tensors are
indexed [q, g, warp, h, ...], row or token 8 h + g, and what `add_product` does to them only renames registers. That the compiler
deals out the axes like this was seen in its code for sm_90; elsewhere it may move numbers between lanes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rowcast.kernels.gpu.product_kernels import activate
from rowcast.kernels.gpu.scratch import arrive, sum_partials


@triton.constexpr_function
def raised_by(bits, half, shared):
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
def levels_of(word, high, here, part: tl.constexpr, BITS: tl.constexpr, RAISED: tl.constexpr, DTYPE: tl.constexpr,
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
def add_product(acc, levels, x, DTYPE: tl.constexpr, ASM: tl.constexpr):
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
def by_row(value, shape: tl.constexpr):
    """[4, 8, W, H] as float32 for each row and token of a sum of `shape` [W, R, T]: for tokens 8 n + 2 q + c, as lanes have it."""
    wide = value.to(tl.float32)[:, :, :, :, None, None]
    wide = tl.broadcast_to(wide, [4, 8, value.shape[2], value.shape[3], shape[2] // 8, 2])
    return tl.reshape(tl.permute(wide, (2, 3, 1, 4, 0, 5)), shape)


@triton.jit
def codes_at(codes_ptr, rows, row_blocks, BITS: tl.constexpr, PARTS: tl.constexpr):
    """Pointers to the first words of rows [4, 8, W, H] that are `row_blocks` blocks apart: to a lane's own [4, 8, W, H, J], and to the
    row's [4, 8, W, H, 1]."""
    whole = (codes_ptr.to(tl.pointer_type(tl.int32)) + rows * (row_blocks * (2 * BITS)))[:, :, :, :, None]
    quarter = tl.arange(0, 4)[:, None, None, None, None]
    return whole + quarter * (4 // PARTS) + tl.arange(0, 4 // PARTS)[None, None, None, None, :], whole


@triton.jit
def load_words(words, block, blocks, BITS: tl.constexpr, UNROLL: tl.constexpr, WHOLE: tl.constexpr):
    """Words [4, 8, W, H, J] of UNROLL blocks from `block` [W] on."""
    found = ()
    for u in tl.static_range(UNROLL):
        at = words + ((block + u) * (2 * BITS))[None, None, :, None, None]
        if WHOLE:
            word = tl.load(at, eviction_policy="evict_first")
        else:
            word = tl.load(at, mask=(block + u < blocks)[None, None, :, None, None], other=0, eviction_policy="evict_first")
        found = found + (word,)  # type: ignore[assignment]  # noqa: RUF005
    return found


@triton.jit
def inputs_at(x_ptr, columns, PARTS: tl.constexpr, PACKED: tl.constexpr, TOKENS: tl.constexpr):
    """Of x [T, columns] in words of PACKED inputs: pointers to those that a lane reads of a block's first part [4, 8, 1, N, ...], their
    places in it, which token is whose, and the words of a token."""
    OWN: tl.constexpr = 16 // PARTS // PACKED  # words of a part that a lane reads
    VECTOR: tl.constexpr = min(OWN, 4)
    quarter, eighth = tl.arange(0, 4), tl.arange(0, 8)
    token = (tl.arange(0, TOKENS // 8)[None, :] * 8 + eighth[:, None])[None, :, None, :, None, None]
    within = (tl.arange(0, OWN // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :])[None, None, None, None, :, :]
    within = within + (quarter * OWN)[:, None, None, None, None, None]
    x = x_ptr
    if PACKED == 2:
        x = x_ptr.to(tl.pointer_type(tl.int32))
    width = columns // PACKED
    return x + token * width + within, within, token, width


@triton.jit
def load_inputs(x, within, present, block, width,
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
def end_product(acc, acc_up, ids_ptr, bias_ptr, norms_ptr, residual_ptr, out_ptr, partial_ptr, counter_ptr, split, tile, tokens, limit,
                capacity, GATED: tl.constexpr, ACTIVATION: tl.constexpr, SIGNED: tl.constexpr, SPLITS: tl.constexpr,
                ROWS: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    """Results [T, capacity] of a tile's rows below `limit` from sums of each warp [W, R, T], acc_up: of the up rows where GATED. With
    splits, the last of the tile's programs to arrive makes them."""
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
        if arrive(counter_ptr + tile, SPLITS):
            acc = sum_partials(partial_ptr, at, mask, step, SPLITS)
            if GATED:
                acc_up = sum_partials(partial_ptr + size, at, mask, step, SPLITS)
            _finish(acc, acc_up, bias_ptr, norms_ptr, residual_ptr, out_ptr, rows, valid, capacity, at, mask,
                    GATED, ACTIVATION, SIGNED)  # fmt: skip
    else:
        _finish(acc, acc_up, bias_ptr, norms_ptr, residual_ptr, out_ptr, rows, valid, capacity, at, mask,
                GATED, ACTIVATION, SIGNED)  # fmt: skip


@triton.jit
def _finish(acc, acc_up, bias_ptr, norms_ptr, residual_ptr, out_ptr, rows, valid, capacity, at, mask,
            GATED: tl.constexpr, ACTIVATION: tl.constexpr, SIGNED: tl.constexpr):  # fmt: skip
    """act(g) * u, or act(u), or |y| * norms, of sums [R, T]; + bias before, + residual after; then one rounding."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + rows, mask=valid, other=0.0).to(tl.float32)[:, None]
        if GATED:
            acc_up += tl.load(bias_ptr + capacity + rows, mask=valid, other=0.0).to(tl.float32)[:, None]
    y = acc if SIGNED else activate(acc, ACTIVATION)
    if GATED:
        y = y * acc_up
    if norms_ptr is not None:
        y = (y if SIGNED else tl.abs(y)) * tl.load(norms_ptr + rows, mask=valid, other=0.0)[:, None]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=mask)
