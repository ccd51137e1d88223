"""Products of 1 to 16 tokens with rows of a table: all of them, or those that a device-side list names.

The reference is `rowcast.kernels.rows`. A table [R, D] has contiguous rows at any row stride, so that one bank [N, 2, D] serves as two
tables. ids int32 or int64 [C], each in 0..R - 1, with a fixed capacity C, of which the first `count` (int32 [1] on the device; None:
all) are valid; a count above C means C. Everything is summed in float32 and rounded once. A result depends neither on the number of
tokens nor on the other tokens. That of `rows_in` and `ffn_hidden` is the row's own: whether it is one of all rows or a chosen one, and
where it stands among the ids, changes no bit. That of `rows_out` depends on the order of the ids.
"""

from __future__ import annotations

import triton
from torch import Tensor

from rowcast.kernels.gpu import MOST_TOKENS, multiprocessors
from rowcast.kernels.gpu.overlap import overlap
from rowcast.kernels.gpu.product_kernels import rows_in_kernel, rows_out_kernel
from rowcast.kernels.gpu.product_tiles import tiles_in, tiles_out
from rowcast.kernels.gpu.scratch import partial_sums


def rows_in(
    table: Tensor,
    x: Tensor,
    ids: Tensor | None = None,
    count: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x W^T for the chosen rows, plus bias[row] and residual. Entries beyond the count are 0.

    table [R, D], x [T, D], bias [R], residual [T, C], out [T, C] with contiguous rows -> [T, C] (`out` if given); without ids C is R.
    """
    return _rows(None, table, None, bias, x, ids, count, "none", None, residual, out)


def ffn_hidden(
    gate: Tensor | None,
    up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    x: Tensor,
    ids: Tensor | None,
    count: Tensor | None,
    activation: str,
    own: Tensor | None = None,
) -> Tensor:
    """act(gate x + b) * (up x + b) of the chosen neurons, or act(up x + b) without a gate; 0 beyond the count and where not `own`.

    gate, up [N, D], biases [N], x [T, D], own bool [T, C], activation one of `rowcast.kernels.rows.ACTIVATIONS` -> [T, C].
    """
    return _rows(gate, up, gate_bias, up_bias, x, ids, count, activation, own, None, None)


def rows_out(
    table: Tensor,
    hidden: Tensor,
    ids: Tensor | None = None,
    count: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The chosen rows, summed with the coefficients `hidden`, plus bias and residual. Coefficients beyond the count have to be finite.

    table [R, D], hidden [T, C], bias [D], residual [T, D] -> [T, D]; without ids C is R.
    """
    tokens, capacity = hidden.shape
    total, columns = table.shape
    assert 0 < tokens <= MOST_TOKENS and table.stride(1) == 1 and capacity == (total if ids is None else ids.shape[0])
    hidden = hidden.contiguous()
    residual = None if residual is None else residual.contiguous()
    assert residual is None or residual.shape == (tokens, columns)
    out = hidden.new_empty(tokens, columns)
    tiles = tiles_out(capacity, columns, table.element_size(), ids is not None, multiprocessors(table.device))
    grid = (triton.cdiv(columns, tiles.rows), tiles.splits)
    partial, counters = partial_sums(out.device, tiles.splits, tokens * columns, grid[0])
    rows_out_kernel[grid](
        table,
        hidden,
        ids,
        count,
        bias,
        residual,
        out,
        partial,
        counters,
        tokens,
        capacity,
        columns,
        table.stride(0),
        SPLITS=tiles.splits,
        BLOCK_N=tiles.depth,
        BLOCK_D=tiles.rows,
        WHOLE_N=count is None and capacity % tiles.depth == 0,
        WHOLE_C=capacity % tiles.depth == 0,
        WHOLE_D=columns % tiles.rows == 0,
        TOKENS=MOST_TOKENS,
        UPCAST=not table.is_cuda,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **overlap(table),
    )
    return out


def _rows(
    gate: Tensor | None,
    up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    x: Tensor,
    ids: Tensor | None,
    count: Tensor | None,
    activation: str,
    own: Tensor | None,
    residual: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """`rows_in` (activation "none") and `ffn_hidden`."""
    tokens, columns = x.shape
    capacity = up.shape[0] if ids is None else ids.shape[0]
    assert 0 < tokens <= MOST_TOKENS and up.shape[1] == columns and up.stride(1) == 1
    assert gate is None or (gate.shape == up.shape and gate.stride(1) == 1)
    x = x.contiguous()
    own, residual = (None if each is None else each.contiguous() for each in (own, residual))
    assert all(each is None or each.shape == (tokens, capacity) for each in (own, residual, out))
    if out is None:
        out = x.new_empty(tokens, capacity)
    assert out.stride(1) == 1
    tiles = tiles_in(
        capacity,
        columns,
        up.element_size(),
        1 if gate is None else 2,
        ids is not None,
        count is not None,
        multiprocessors(up.device),
    )
    row_tiles = triton.cdiv(capacity, tiles.rows)
    partial, counters = partial_sums(out.device, tiles.splits, (1 if gate is None else 2) * tokens * capacity, row_tiles)
    rows_in_kernel[(max(1, min(tiles.programs, row_tiles * tiles.splits)),)](
        gate,
        up,
        gate_bias,
        up_bias,
        x,
        ids,
        count,
        residual,
        own,
        out,
        partial,
        counters,
        tokens,
        capacity,
        columns,
        0 if gate is None else gate.stride(0),
        up.stride(0),
        out.stride(0),
        GATED=gate is not None,
        ACTIVATION=activation,
        PARTS=tiles.parts,
        SPLITS=tiles.splits,
        BLOCK_R=tiles.rows,
        BLOCK_K=tiles.depth,
        WHOLE_R=ids is None and count is None and capacity % tiles.rows == 0,
        WHOLE_K=columns % tiles.depth == 0,
        TOKENS=MOST_TOKENS,
        UPCAST=not up.is_cuda,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **overlap(x),
    )
    return out
