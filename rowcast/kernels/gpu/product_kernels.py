"""The kernels of `products.py`: chosen rows of a table times up to 16 tokens, along the rows and across them.

Tokens are the columns of the tile that the matrix units take, y^T [rows, 16] = W [rows, K] x^T [K, 16], so that weights go from memory
to shared memory to the matrix units without passing through registers. Sums that several CTAs share: `scratch.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rowcast.kernels.gpu.scratch import arrive, sum_partials


@triton.jit
def _dot(a, b, acc, UPCAST: tl.constexpr):
    """acc + a b in float32. UPCAST: for the interpreter, which knows no bfloat16 products."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _load_rows(at, row_valid, column_valid, WHOLE_ROWS: tl.constexpr, WHOLE_COLUMNS: tl.constexpr):
    """A tile of weights, read once; 0 where it is not valid. Masks are left out where tiles are whole."""
    if WHOLE_ROWS and WHOLE_COLUMNS:
        return tl.load(at, eviction_policy="evict_first")
    elif WHOLE_COLUMNS:
        return tl.load(at, mask=row_valid[:, None], other=0.0, eviction_policy="evict_first")
    else:
        return tl.load(at, mask=row_valid[:, None] & column_valid[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def activate(v, ACTIVATION: tl.constexpr):
    """One of `rowcast.kernels.rows.ACTIVATIONS`, or "none", of float32 values."""
    if ACTIVATION == "relu":
        v = tl.where(v < 0, 0.0, v)
    elif ACTIVATION == "silu":
        v = v / (1 + tl.exp(-v))
    elif ACTIVATION == "gelu":
        v = 0.5 * v * (1 + tl.erf(v * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        v = v / (1 + tl.exp(-1.5957691216057308 * (v + 0.044715 * v * v * v)))
    return v


@triton.jit
def _finish_rows(acc, gate_bias_ptr, up_bias_ptr, residual_ptr, own_ptr, out_ptr, rows, position, total, token, tokens, capacity,
                 out_stride, GATED: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    """Bias, activation, residual and own, all in float32; then one rounding. With a gate, `acc` has the up rows above the gates."""
    valid = position < total
    if GATED:
        up, gate = tl.split(tl.permute(tl.reshape(acc, (2, BLOCK_R, TOKENS)), (1, 2, 0)))
    else:
        up = acc
    if up_bias_ptr is not None:
        up += tl.load(up_bias_ptr + rows, mask=valid, other=0.0).to(tl.float32)[:, None]
    if GATED:
        if gate_bias_ptr is not None:
            gate += tl.load(gate_bias_ptr + rows, mask=valid, other=0.0).to(tl.float32)[:, None]
        y = activate(gate, ACTIVATION) * up
    else:
        y = activate(up, ACTIVATION)
    at = token[None, :] * capacity + position[:, None]
    mask = (token[None, :] < tokens) & valid[:, None]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if own_ptr is not None:
        y = tl.where(tl.load(own_ptr + at, mask=mask, other=0) != 0, y, 0.0)
    tl.store(out_ptr + token[None, :] * out_stride + position[:, None], y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def rows_in_kernel(
    gate_ptr,
    up_ptr,
    gate_bias_ptr,
    up_bias_ptr,
    x_ptr,  # [tokens, columns]
    ids_ptr,  # [capacity] or None: rows 0, 1, ...
    count_ptr,  # [1] or None: capacity
    residual_ptr,  # [tokens, capacity] or None
    own_ptr,  # [tokens, capacity] or None
    out_ptr,  # [tokens, capacity], rows out_stride apart
    partial_ptr,  # float32 [1 or 2, SPLITS, tokens, capacity]; unused with one split
    counter_ptr,  # int32 [row tiles]: zeros; unused with one split
    tokens,
    capacity,
    columns,
    gate_stride,
    up_stride,
    out_stride,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PARTS: tl.constexpr,  # of the sum, added in order at the end
    SPLITS: tl.constexpr,  # 1: a program adds all parts; PARTS: one each
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE_R: tl.constexpr,  # every row tile is full: no ids, no count, BLOCK_R divides capacity
    WHOLE_K: tl.constexpr,  # BLOCK_K divides columns
    TOKENS: tl.constexpr,
    UPCAST: tl.constexpr,
    OVERLAP: tl.constexpr,  # see overlap.py
):
    """act(gate x + b) * (up x + b), or act(up x + b) + residual, for the chosen rows.

    Each program takes several pairs of a row tile and a split of the columns.
    """
    total = capacity
    token = tl.arange(0, TOKENS)
    depth = tl.arange(0, BLOCK_K)
    HEIGHT: tl.constexpr = 2 * BLOCK_R if GATED else BLOCK_R
    line = tl.arange(0, HEIGHT)
    is_gate = line >= BLOCK_R
    part_size = tl.cdiv(tl.cdiv(columns, BLOCK_K), PARTS) * BLOCK_K
    position = tl.program_id(0) // SPLITS * BLOCK_R + line % BLOCK_R
    rows = position
    if OVERLAP:
        gdc_wait()
    if count_ptr is not None:
        total = tl.minimum(tl.load(count_ptr), capacity)
    if ids_ptr is not None:  # Not waiting for the count: what lies beyond it is masked later.
        rows = tl.load(ids_ptr + position, mask=position < capacity, other=0)
    for item in range(tl.program_id(0), tl.cdiv(total, BLOCK_R) * SPLITS, tl.num_programs(0)):
        tile = item // SPLITS
        split = item % SPLITS
        position = tile * BLOCK_R + line % BLOCK_R
        valid = position < total
        if ids_ptr is None:
            rows = position if WHOLE_R else tl.where(valid, position, 0)
        begin = split * part_size
        end = columns if SPLITS == 1 else tl.minimum(begin + part_size, columns)
        row_at = up_ptr + rows.to(tl.int64) * up_stride
        if GATED:
            row_at = tl.where(is_gate, gate_ptr + rows.to(tl.int64) * gate_stride, row_at)
        weights_at = row_at[:, None] + (begin + depth)[None, :]
        x_at = x_ptr + token[None, :] * columns + (begin + depth)[:, None]
        part = tl.zeros((HEIGHT, TOKENS), tl.float32)
        acc = tl.zeros((HEIGHT, TOKENS), tl.float32)
        for k in range(begin, end, BLOCK_K):
            inside = k + depth < columns
            if WHOLE_K:
                x = tl.load(x_at, mask=token[None, :] < tokens, other=0.0)
            else:
                x = tl.load(x_at, mask=(token[None, :] < tokens) & inside[:, None], other=0.0)
            part = _dot(_load_rows(weights_at, valid, inside, WHOLE_R, WHOLE_K), x, part, UPCAST)
            weights_at += BLOCK_K
            x_at += BLOCK_K
            if PARTS > SPLITS:
                ends = (k + BLOCK_K) % part_size == 0
                acc = tl.where(ends, acc + part, acc)
                part = tl.where(ends, 0.0, part)
        acc += part
        if OVERLAP:
            gdc_launch_dependents()
        lane = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        lane_rows = lane
        if ids_ptr is not None:
            lane_rows = tl.load(ids_ptr + lane, mask=lane < total, other=0)
        if SPLITS == 1:
            _finish_rows(acc, gate_bias_ptr, up_bias_ptr, residual_ptr, own_ptr, out_ptr, lane_rows, lane, total, token, tokens,
                         capacity, out_stride, GATED, ACTIVATION, BLOCK_R, TOKENS)  # fmt: skip
        else:
            step = tokens * capacity
            at = token[None, :] * capacity + position[:, None] + tl.where(is_gate, SPLITS * step, 0)[:, None]
            mask = (token[None, :] < tokens) & valid[:, None]
            tl.store(partial_ptr + split * step + at, acc, mask=mask)
            if arrive(counter_ptr + tile, SPLITS):
                acc = sum_partials(partial_ptr, at, mask, step, SPLITS)
                _finish_rows(acc, gate_bias_ptr, up_bias_ptr, residual_ptr, own_ptr, out_ptr, lane_rows, lane, total, token, tokens,
                             capacity, out_stride, GATED, ACTIVATION, BLOCK_R, TOKENS)  # fmt: skip
        if ids_ptr is not None:
            position = (item + tl.num_programs(0)) // SPLITS * BLOCK_R + line % BLOCK_R
            rows = tl.load(ids_ptr + position, mask=position < capacity, other=0)
    if count_ptr is not None:  # What was not chosen is 0.
        for tile in range(total // BLOCK_R + tl.program_id(0), tl.cdiv(capacity, BLOCK_R), tl.num_programs(0)):
            lane = tile * BLOCK_R + tl.arange(0, BLOCK_R)
            mask = (token[None, :] < tokens) & ((lane >= total) & (lane < capacity))[:, None]
            nothing = tl.zeros((BLOCK_R, TOKENS), out_ptr.dtype.element_ty)
            tl.store(out_ptr + token[None, :] * out_stride + lane[:, None], nothing, mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def rows_out_kernel(
    table_ptr,
    hidden_ptr,  # [tokens, capacity]
    ids_ptr,  # [capacity] or None: rows 0, 1, ...
    count_ptr,  # [1] or None: capacity
    bias_ptr,  # [columns] or None
    residual_ptr,  # [tokens, columns] or None
    out_ptr,  # [tokens, columns]
    partial_ptr,  # float32 [SPLITS, tokens, columns]; unused with one split
    counter_ptr,  # int32 [column tiles]: zeros; unused with one split
    tokens,
    capacity,
    columns,
    table_stride,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE_N: tl.constexpr,  # every block of rows is full: no count, BLOCK_N divides capacity
    WHOLE_C: tl.constexpr,  # BLOCK_N divides capacity: hidden is read up to the end of a block
    WHOLE_D: tl.constexpr,  # BLOCK_D divides columns
    TOKENS: tl.constexpr,
    UPCAST: tl.constexpr,
    OVERLAP: tl.constexpr,  # see overlap.py
):
    """sum over n of hidden[n] * row n, for a tile of columns. Split s takes the blocks s, s + SPLITS, ... of BLOCK_N positions."""
    total = capacity
    tile = tl.program_id(0)
    split = tl.program_id(1)
    token = tl.arange(0, TOKENS)
    column = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < columns
    lane = tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_D, TOKENS), tl.float32)
    position = split * BLOCK_N + lane
    rows = position
    if OVERLAP:
        gdc_wait()
    if count_ptr is not None:
        total = tl.minimum(tl.load(count_ptr), capacity)
    if ids_ptr is not None:  # Not waiting for the count: what lies beyond it is masked later.
        rows = tl.load(ids_ptr + position, mask=position < capacity, other=0)
    for first in range(split * BLOCK_N, total, SPLITS * BLOCK_N):
        position = first + lane
        valid = position < total
        weights = _load_rows(
            table_ptr + rows.to(tl.int64)[:, None] * table_stride + column[None, :], valid, inside, WHOLE_N, WHOLE_D
        )
        rows = position + SPLITS * BLOCK_N  # One step ahead, since addresses wait for them.
        if ids_ptr is not None:
            rows = tl.load(ids_ptr + rows, mask=rows < capacity, other=0)
        hidden_at = hidden_ptr + token[None, :] * capacity + position[:, None]
        if WHOLE_C:
            hidden = tl.load(hidden_at, mask=token[None, :] < tokens, other=0.0)
        else:
            hidden = tl.load(hidden_at, mask=(token[None, :] < tokens) & valid[:, None], other=0.0)
        acc = _dot(tl.trans(weights), hidden, acc, UPCAST)
    if OVERLAP:
        gdc_launch_dependents()
    at = token[None, :] * columns + column[:, None]
    mask = (token[None, :] < tokens) & inside[:, None]
    if SPLITS == 1:
        _finish_columns(acc, bias_ptr, residual_ptr, out_ptr, column, inside, at, mask)
    else:
        step = tokens * columns
        tl.store(partial_ptr + split * step + at, acc, mask=mask)
        if arrive(counter_ptr + tile, SPLITS):
            acc = sum_partials(partial_ptr, at, mask, step, SPLITS)
            _finish_columns(acc, bias_ptr, residual_ptr, out_ptr, column, inside, at, mask)


@triton.jit
def _finish_columns(acc, bias_ptr, residual_ptr, out_ptr, column, inside, at, mask):
    """Bias and residual in float32; then one rounding."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[:, None]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=mask)
