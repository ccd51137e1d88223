"""The kernel of `lowbit.py`: weights of 2, 3, 4 or 8 bits times up to 16 tokens.

Tokens are the columns of the tile that the matrix units take, y^T [rows, 16] = W [rows, K] x^T [K, 16]. Codes become levels in
registers: code - (2^bits - 1) / 2 has at most 8 significant bits, which bfloat16 and float16 hold exactly. Each block of 64 columns
is one product of exact numbers in float32, times its scale. float32 inputs are two bfloat16 parts, whose sum is within 2^-17 of them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rowcast.kernels.gpu.product_kernels import _activate, _arrive


@triton.constexpr_function
def _above_zero(bits, half):
    """What `_unpack` leaves added to the level: the power of two whose mantissa the code was put into, plus the middle level."""
    return (2 ** (bits + 2) if half else 2**bits) + (2**bits - 1) / 2


@triton.constexpr_function
def _unpack(bits, part, half):
    """PTX that makes of 4 packed bytes the 16-bit numbers 2^e + code for the codes of one part: 2 or 4 bits, at bit `bits * part`.

    A code goes into the mantissa of 2^e: of bfloat16 the upper of 7 bits, of float16 bits 4 to 7 or 6 to 7, so that one permutation of
    bytes with the constant upper byte makes two numbers.
    """
    top = 8 if half else 7
    left = top - bits - bits * part
    shift = f"shl.b32 v, $2, {left};" if left >= 0 else f"shr.u32 v, $2, {-left};"
    mask = ((1 << bits) - 1) << (top - bits)
    number = (15 + bits + 2) << 10 if half else (127 + bits) << 7
    low, high = number & 255, number >> 8
    return f"""{{
        .reg .b32 v, c;
        {shift}
        lop3.b32 v, v, {mask * 0x01010101}, {low * 0x01010101}, 0xEA;
        mov.b32 c, {high * 0x01010101};
        prmt.b32 $0, v, c, 0x4140;
        prmt.b32 $1, v, c, 0x4342;
    }}"""


_EIGHT_BFLOAT16 = tl.constexpr("""{
    .reg .b32 a, b, c, d, k;
    .reg .f32 e, f, g, h;
    mov.b32 k, 0x47000000;
    prmt.b32 a, $2, k, 0x7404;
    prmt.b32 b, $2, k, 0x7414;
    prmt.b32 c, $2, k, 0x7424;
    prmt.b32 d, $2, k, 0x7434;
    mov.b32 e, a;
    mov.b32 f, b;
    mov.b32 g, c;
    mov.b32 h, d;
    add.f32 e, e, 0fC7007F80;
    add.f32 f, f, 0fC7007F80;
    add.f32 g, g, 0fC7007F80;
    add.f32 h, h, 0fC7007F80;
    cvt.rn.bf16x2.f32 $0, f, e;
    cvt.rn.bf16x2.f32 $1, h, g;
}""")
"""4 bytes into the mantissa of 2^15 in float32, less 2^15 + 127.5."""
_EIGHT_FLOAT16 = tl.constexpr("""{
    .reg .b32 c;
    mov.b32 c, 0x64646464;
    prmt.b32 $0, $2, c, 0x4140;
    prmt.b32 $1, $2, c, 0x4342;
}""")
"""4 bytes into the mantissa of 1024."""


@triton.jit
def _levels(packed, part: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Codes less the middle level, in DTYPE, of one part of packed bytes. ASM: not in the interpreter."""
    HALF: tl.constexpr = tl.float16 == DTYPE
    if not ASM:
        v = (((packed >> (part * BITS)) & ((1 << BITS) - 1)).to(tl.float32) - ((1 << BITS) - 1) / 2).to(DTYPE)
    elif BITS == 8:
        if HALF:
            v = tl.inline_asm_elementwise(_EIGHT_FLOAT16, "=r,=r,r", [packed], dtype=tl.float16, is_pure=True, pack=4)
            v = (v - 1024.0) - 127.5
        else:
            v = tl.inline_asm_elementwise(_EIGHT_BFLOAT16, "=r,=r,r", [packed], dtype=tl.bfloat16, is_pure=True, pack=4)
    else:
        ptx: tl.constexpr = _unpack(BITS, part, HALF)
        if HALF:
            v = tl.inline_asm_elementwise(ptx, "=r,=r,r", [packed], dtype=tl.float16, is_pure=True, pack=4)
        else:
            v = tl.inline_asm_elementwise(ptx, "=r,=r,r", [packed], dtype=tl.bfloat16, is_pure=True, pack=4)
        v = v - _above_zero(BITS, HALF)
    return v


@triton.jit
def _part(codes, high, part: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Levels of one part of a block; `high` points at the 3-bit codes' high bits."""
    if BITS == 3:
        j = tl.arange(0, 16)
        bit = (tl.load(high + 2 * part + j[None, :] // 8) >> (j[None, :] % 8).to(tl.uint8)) & 1
        v = ((((codes >> (2 * part)) & 3) | (bit << 2)).to(tl.float32) - 3.5).to(DTYPE)
    else:
        v = _levels(codes, part, BITS, DTYPE, ASM)
    return v


@triton.jit
def _dot(levels, x, acc, UPCAST: tl.constexpr):
    if UPCAST:  # The interpreter knows no bfloat16 products.
        levels, x = levels.to(tl.float32), x.to(tl.float32)
    return tl.dot(levels, tl.trans(x), acc)


@triton.jit
def _add_product(acc, levels, x, DTYPE: tl.constexpr, UPCAST: tl.constexpr):
    """acc + levels [R, J] x^T, x [T, J] float32 in two bfloat16 parts, or in DTYPE."""
    if x.dtype == tl.float32:
        large = x.to(DTYPE)
        acc = _dot(levels, (x - large.to(tl.float32)).to(DTYPE), acc, UPCAST)
        acc = _dot(levels, large, acc, UPCAST)
    else:
        acc = _dot(levels, x, acc, UPCAST)
    return acc


@triton.jit
def _sum_partials(partial_ptr, at, mask, step, SPLITS: tl.constexpr):
    """The partial sums at `at`, `at + step`, ... added in order."""
    total = tl.load(partial_ptr + at, mask=mask, other=0.0, cache_modifier=".cg")
    for split in tl.range(1, SPLITS, loop_unroll_factor=4):
        total += tl.load(partial_ptr + split * step + at, mask=mask, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def _scales(scales, first, last, GROUP: tl.constexpr, UNROLL: tl.constexpr, WORD: tl.constexpr):
    """The rows' scales of UNROLL blocks from `first` on, none beyond the block `last`: WORD neighbours are one integer."""
    found = ()
    for u in tl.static_range(0, UNROLL, WORD):
        block = tl.minimum(first + u, last)
        if WORD == 4:
            word = tl.load((scales + block).to(tl.pointer_type(tl.int64), bitcast=True))
        elif WORD == 2:
            word = tl.load((scales + block).to(tl.pointer_type(tl.int32), bitcast=True))
        else:
            word = tl.load(scales + block // GROUP)
        found = found + (word,)  # type: ignore[assignment]  # noqa: RUF005
    return found


@triton.jit
def _scale(found, u: tl.constexpr, WORD: tl.constexpr):
    """Of block u, as a column of float32."""
    half = found[u // WORD]
    if WORD > 1:
        half = (half >> 16 * (u % WORD)).to(tl.int16).to(tl.float16, bitcast=True)
    return half.to(tl.float32)[:, None]


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
    code_stride,
    scale_stride,
    steps,  # blocks of 64 columns / UNROLL
    WORD: tl.constexpr,  # neighbouring scales of a row that are one aligned integer
    BITS: tl.constexpr,
    GROUP: tl.constexpr,  # blocks of a group
    GATED: tl.constexpr,  # rows R to 2 R - 1 are the up rows
    ACTIVATION: tl.constexpr,
    SIGNED: tl.constexpr,  # with norms: the signed pre-activation counts
    WHOLE: tl.constexpr,  # columns are whole blocks
    SPLITS: tl.constexpr,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,  # columns of the tile
    OVERLAP: tl.constexpr,
    ASM: tl.constexpr,
):
    """y = act(g) * u, or act(u), or |y| * norms; + bias before, + residual after."""
    UPCAST: tl.constexpr = not ASM
    DTYPE: tl.constexpr = tl.float16 if x_ptr.dtype.element_ty == tl.float16 else tl.bfloat16
    PARTS: tl.constexpr = 4 if BITS == 3 else 8 // BITS
    EACH: tl.constexpr = 64 // PARTS
    BYTES: tl.constexpr = 8 * BITS
    tile, split = tl.program_id(0), tl.program_id(1)
    if OVERLAP:
        gdc_wait()
    limit = capacity
    if count_ptr is not None:
        limit = tl.minimum(tl.load(count_ptr), capacity)
        if tile * ROWS >= limit:
            return
    places = tile * ROWS + tl.arange(0, ROWS)
    token, j = tl.arange(0, TOKENS), tl.arange(0, EACH)
    rows = tl.minimum(places, limit - 1)
    if ids_ptr is not None:
        rows = tl.load(ids_ptr + rows)
    first = codes_ptr + rows.to(tl.int64) * code_stride
    codes = first[:, None] + tl.arange(0, EACH)[None, :]
    scales = scales_ptr + rows.to(tl.int64) * scale_stride
    x_at = x_ptr + token[:, None] * columns + j[None, :]
    present = token[:, None] < tokens
    half = (tl.program_id(0) * 0 + capacity).to(tl.int64)  # a capacity of 1 comes as a constant
    code_up = half * code_stride
    scale_up = half * scale_stride
    begin, end = split * steps // SPLITS * UNROLL, (split + 1) * steps // SPLITS * UNROLL
    acc = tl.zeros([ROWS, TOKENS], tl.float32)
    acc_up = tl.zeros([ROWS, TOKENS], tl.float32)
    last = steps * UNROLL - WORD
    coming = _scales(scales, begin, last, GROUP, UNROLL, WORD)
    coming_up = _scales(scales + scale_up, begin, last, GROUP, UNROLL, WORD) if GATED else coming
    for at in tl.range(begin, end, UNROLL):
        found, found_up = coming, coming_up  # The next step's are on their way while this one's products run.
        coming = _scales(scales, at + UNROLL, last, GROUP, UNROLL, WORD)
        if GATED:
            coming_up = _scales(scales + scale_up, at + UNROLL, last, GROUP, UNROLL, WORD)
        for u in tl.static_range(UNROLL):
            block = at + u
            packed = tl.load(codes + block * BYTES, eviction_policy="evict_first")
            y = tl.zeros([ROWS, TOKENS], tl.float32)
            if GATED:
                packed_u = tl.load(codes + code_up + block * BYTES, eviction_policy="evict_first")
                y_u = tl.zeros([ROWS, TOKENS], tl.float32)
            for part in tl.static_range(PARTS):
                column = block * 64 + part * EACH
                if WHOLE:
                    x = tl.load(x_at + column, mask=present, other=0.0)
                else:
                    x = tl.load(x_at + column, mask=present & (column + j[None, :] < columns), other=0.0)
                high = first[:, None] + block * BYTES + 16
                y = _add_product(y, _part(packed, high, part, BITS, DTYPE, ASM), x, DTYPE, UPCAST)
                if GATED:
                    y_u = _add_product(y_u, _part(packed_u, high + code_up, part, BITS, DTYPE, ASM), x, DTYPE, UPCAST)
            acc += y * _scale(found, u, WORD)
            if GATED:
                acc_up += y_u * _scale(found_up, u, WORD)
    if OVERLAP:
        gdc_launch_dependents()
    valid = places < limit
    at = token[None, :] * capacity + places[:, None]
    mask = valid[:, None] & (token[None, :] < tokens)
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
            _finish(
                acc,
                acc_up,
                bias_ptr,
                norms_ptr,
                residual_ptr,
                out_ptr,
                rows,
                valid,
                capacity,
                at,
                mask,
                GATED,
                ACTIVATION,
                SIGNED,
            )
    else:
        _finish(
            acc, acc_up, bias_ptr, norms_ptr, residual_ptr, out_ptr, rows, valid, capacity, at, mask, GATED, ACTIVATION, SIGNED
        )


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
