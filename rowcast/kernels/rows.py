"""Products with chosen rows of a table: neurons, heads, vocabulary.

A table [R, D] has contiguous rows at any row stride, so that one bank [N, 2, D] serves as two tables; ids are 0..R - 1. The torch
versions are the reference; they copy chosen rows out first. On a CPU, float32 and bfloat16 products of up to 16 tokens go to the native
part (`kernels/native.py`), which reads rows where they lie and accumulates in float32, on a GPU to `kernels/gpu/products.py`. In 16
bits they round differently.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import CDLL
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from rowcast.kernels import gpu, native

ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}
"""By the names of `rowcast.runtime.spec.Activation`."""


ACTIVATION_CODES: Final = {"relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
"""`Activation` in _rows.cpp."""
_IDENTITY = 0


def rows_in(table: Tensor, x: Tensor, ids: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """x W^T for the rows `ids` of the table (None: all rows), plus their bias: [R, D], [T, D], int64 [C], [R] -> [T, C]."""
    if gpu.takes(x):
        from rowcast.kernels.gpu import products

        return products.rows_in(table, x, ids, bias=bias)
    lib = library_for_tables(x, table)
    if lib is not None:
        y = _run(lib, None, table, None, None, x, None, ids, None, _IDENTITY)
        return y if bias is None else y.add_(bias if ids is None else bias[ids])
    return F.linear(x, table if ids is None else table[ids], bias if bias is None or ids is None else bias[ids])


def rows_out(
    table: Tensor, hidden: Tensor, ids: Tensor | None = None, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """The rows `ids` of the table (None: all), summed with the coefficients `hidden`, plus a bias and a residual, which stays as it is.

    table [R, D], hidden [T, C], ids int64 [C], bias [D], residual [T, D] -> [T, D].

    The native version skips rows whose coefficients are all 0. Its order of addition depends on the number of threads, not on T.
    """
    if gpu.takes(hidden):
        from rowcast.kernels.gpu import products

        return products.rows_out(table, hidden, ids, bias=bias, residual=residual)
    lib = library_for_tables(hidden, table)
    if lib is not None:
        y = _run(lib, None, None, None, table, None, hidden, ids, None, _IDENTITY)
    else:
        y = hidden @ (table if ids is None else table[ids])
    y = y if bias is None else y.add_(bias)
    return y if residual is None else y.add_(residual)


def ffn_hidden(gate: Tensor | None, up: Tensor, bias: Tensor | None, x: Tensor, ids: Tensor | None, activation: str) -> Tensor:
    """What the chosen neurons hand to the down projection: act(gate x) * (up x), or act(up x + bias) without a gate.

    gate, up [N, D], bias [N] (never with a gate), x [T, D], ids int64 [C] or None for all -> [T, C].
    """
    assert gate is None or bias is None
    if gpu.takes(x):
        from rowcast.kernels.gpu import products

        return products.ffn_hidden(gate, up, None, bias, x, ids, None, activation)
    lib = library_for_tables(x, up, gate, bias)
    if lib is not None:
        return _run(lib, gate, up, bias, None, x, None, ids, None, ACTIVATION_CODES[activation])
    act = ACTIVATIONS[activation]
    if gate is not None:
        return act(rows_in(gate, x, ids)) * rows_in(up, x, ids)
    chosen = bias if bias is None or ids is None else bias[ids]
    return act(F.linear(x, up if ids is None else up[ids], chosen))


def ffn(
    gate: Tensor | None,
    up: Tensor,
    bias: Tensor | None,
    down: Tensor,
    x: Tensor,
    ids: Tensor | None,
    own: Tensor | None,
    activation: str,
) -> Tensor:
    """`ffn_hidden`, kept to each token's `own` neurons, times the down rows: [T, D] in one pass over the rows.

    gate, up, down [N, D], bias [N] (never with a gate), x [T, D], ids int64 [C] or None for all, own bool [T, C] or None for all.
    """
    assert gate is None or bias is None
    lib = library_for_tables(x, up, down, gate, bias)
    if lib is not None:
        return _run(lib, gate, up, bias, down, x, None, ids, own, ACTIVATION_CODES[activation])
    hidden = ffn_hidden(gate, up, bias, x, ids, activation)
    return rows_out(down, hidden if own is None else hidden * own, ids)


def library_for_tables(x: Tensor, *tables: Tensor | None) -> CDLL | None:
    """The native part, if it multiplies x with rows of these."""
    dtype = x.dtype
    if dtype not in (torch.float32, torch.bfloat16):
        return None
    for table in tables:
        if table is not None and (table.dtype != dtype or table.stride(-1) != 1):
            return None
    return native.library_for(x)


def _run(
    lib: CDLL,
    gate: Tensor | None,
    up: Tensor | None,
    bias: Tensor | None,
    down: Tensor | None,
    x: Tensor | None,
    hidden: Tensor | None,
    ids: Tensor | None,
    own: Tensor | None,
    activation: int,
) -> Tensor:
    """`ffn`; without `up` from given hidden values, without `down` as far as these. Raises IndexError for ids outside the tables."""
    table = down if up is None else up
    given = hidden if x is None else x
    assert table is not None and given is not None
    given = given.contiguous()
    tokens, (total, columns) = given.shape[0], table.shape
    assert ids is None or (ids.dtype == torch.int64 and ids.dim() == 1)
    chosen = total if ids is None else ids.shape[0]
    assert given.shape == (tokens, chosen if up is None else columns)
    assert all(other is None or other.shape == table.shape for other in (gate, down))
    assert bias is None or bias.shape == (total,)
    assert own is None or (own.dtype == torch.bool and own.shape == (tokens, chosen))
    ids, own = (None if choice is None else choice.contiguous() for choice in (ids, own))
    out = given.new_empty(tokens, chosen if down is None else columns)
    outside = lib.rowcast_rows(
        given.dtype == torch.bfloat16,
        native.address(gate),
        native.address(up),
        native.address(bias),
        native.address(down),
        None if up is None else given.data_ptr(),
        (given if up is None else out).data_ptr(),
        native.address(ids),
        native.address(own),
        out.data_ptr(),
        0 if gate is None else gate.stride(0),
        0 if up is None else up.stride(0),
        0 if down is None else down.stride(0),
        tokens,
        columns,
        total,
        chosen,
        activation,
        native.threads(),
    )
    if outside:
        raise IndexError(f"row ids have to lie between 0 and {total - 1}")
    return out
