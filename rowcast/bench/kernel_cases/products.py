"""Dense and row-gather products and norms, beside cuBLAS and torch. bf16, random weights and inputs.

Together a case's tables exceed several times the L2: a table that does not has copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from rowcast.bench.kernel_cases.case import Case
from rowcast.kernels.gpu import norms, products

_READ_BYTES: Final = 300_000_000
_DENSE: Final = ((12288, 4096), (32000, 4096), (128256, 4096), (36864, 12288), (1536, 576), (49152, 576))
_GATED: Final = ((11008, 4096), (1536, 576))
_OUT: Final = ((4096, 4096), (11008, 4096), (12288, 12288), (1536, 576))
_TOKENS: Final = (1, 7)


def cases(device_name: str) -> Iterator[Case]:
    """All rows for 1 and 7 tokens; a tenth of the neurons of an OPT-175B layer split over 4 ranks; norms."""
    for rows, columns in _DENSE:
        tables = _copies(rows, columns)
        for tokens in _TOKENS:
            yield _dense(tables, tokens)
    for rows, columns in _GATED:
        gates, ups = _copies(rows, columns, shares=2), _copies(rows, columns, shares=2)
        for tokens in _TOKENS:
            yield _gated(gates, ups, tokens)
    for rows, columns in _OUT:
        banks = [torch.stack((table, table), 1)[:, 1] for table in _copies(rows, columns)]
        for tokens in _TOKENS:
            yield _out(banks, tokens)
    yield from _sparse(12288, 12288, 1229)
    for columns in (4096, 12288):
        yield _norm(columns)


def _random(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)


def _copies(rows: int, columns: int, shares: int = 1) -> list[Tensor]:
    """Tables of a case that reads as many bytes from each of `shares` such lists."""
    number = max(2, -(-_READ_BYTES // (shares * rows * columns * 2)))
    return [_random(rows, columns) for _ in range(number)]


def _shape(table: Tensor, tokens: int, what: str = "") -> str:
    return f"{table.shape[0]} x {table.shape[1]}{what}, bf16, {tokens} token{'s' if tokens > 1 else ''}"


def _dense(tables: list[Tensor], tokens: int) -> Case:
    def ours(table: Tensor, x: Tensor) -> Callable[[], object]:
        return lambda: products.rows_in(table, x)

    def cublas(table: Tensor, x: Tensor) -> Callable[[], object]:
        return lambda: F.linear(x, table)

    inputs = [(table, _random(tokens, table.shape[1])) for table in tables]
    moved = tables[0].nbytes + tokens * 2 * sum(tables[0].shape)
    shape = _shape(tables[0], tokens)
    return Case("rows in", shape, moved, [ours(*each) for each in inputs], {"cublas": [cublas(*each) for each in inputs]})


def _gated(gates: list[Tensor], ups: list[Tensor], tokens: int) -> Case:
    def ours(gate: Tensor, up: Tensor, x: Tensor) -> Callable[[], object]:
        return lambda: products.ffn_hidden(gate, up, None, None, x, None, None, "silu")

    def cublas(gate: Tensor, up: Tensor, x: Tensor) -> Callable[[], object]:
        return lambda: F.silu(F.linear(x, gate)) * F.linear(x, up)

    inputs = [(gate, up, _random(tokens, up.shape[1])) for gate, up in zip(gates, ups, strict=True)]
    moved = 2 * ups[0].nbytes + tokens * 2 * sum(ups[0].shape)
    shape = _shape(ups[0], tokens, ", gated")
    return Case("ffn hidden", shape, moved, [ours(*each) for each in inputs], {"cublas": [cublas(*each) for each in inputs]})


def _out(tables: list[Tensor], tokens: int) -> Case:
    """Every other row of a bank, as the down projection lies."""

    def ours(table: Tensor, hidden: Tensor, residual: Tensor) -> Callable[[], object]:
        return lambda: products.rows_out(table, hidden, residual=residual)

    def cublas(table: Tensor, hidden: Tensor, residual: Tensor) -> Callable[[], object]:
        return lambda: torch.addmm(residual, hidden, table)

    inputs = [(table, _random(tokens, table.shape[0]), _random(tokens, table.shape[1])) for table in tables]
    table = tables[0]
    moved = table.numel() * 2 + tokens * 2 * (table.shape[0] + 2 * table.shape[1])
    calls, peers = [ours(*each) for each in inputs], {"cublas": [cublas(*each) for each in inputs]}
    return Case("rows out", _shape(table, tokens, ", residual"), moved, calls, peers)


def _sparse(rows: int, columns: int, chosen: int) -> Iterator[Case]:
    """`chosen` neurons of a bank; each call chooses others, from a list with room for twice as many. The peer runs all of them."""
    bank = _random(rows, 2, columns)
    up, down = bank[:, 0], bank[:, 1]
    number = -(-_READ_BYTES // (chosen * columns * 2))
    lists = [torch.randperm(rows, device="cuda")[: 2 * chosen].int() for _ in range(number)]
    for ids in lists:
        ids[:chosen] = ids[:chosen].sort().values
    count = torch.full((1,), chosen, dtype=torch.int32, device="cuda")

    def hidden(ids: Tensor, x: Tensor) -> Callable[[], object]:
        return lambda: products.ffn_hidden(None, up, None, None, x, ids, count, "relu")

    def out(ids: Tensor, values: Tensor) -> Callable[[], object]:
        return lambda: products.rows_out(down, values, ids, count)

    def all_hidden(x: Tensor) -> Callable[[], object]:
        return lambda: F.relu(F.linear(x, up))

    def all_out(values: Tensor) -> Callable[[], object]:
        return lambda: values @ down

    for tokens in _TOKENS:
        moved = chosen * columns * 2
        shape = f"{chosen} of {_shape(up, tokens)}"
        xs = [_random(tokens, columns) for _ in lists]
        peers = {"cublas, all rows": [all_hidden(x) for x in xs[:2]]}
        yield Case("ffn hidden", shape, moved, [hidden(*each) for each in zip(lists, xs, strict=True)], peers)
        values = [_random(tokens, 2 * chosen) for _ in lists]
        peers = {"cublas, all rows": [all_out(_random(tokens, rows)) for _ in range(2)]}
        yield Case("rows out", shape, moved, [out(*each) for each in zip(lists, values, strict=True)], peers)


def _norm(columns: int) -> Case:
    def ours(x: Tensor, delta: Tensor, weight: Tensor) -> Callable[[], object]:
        return lambda: norms.add_norm(x, delta, weight, None, 1e-6, True)

    def theirs(x: Tensor, delta: Tensor, weight: Tensor) -> Callable[[], object]:
        return lambda: F.rms_norm(x + delta, (columns,), weight, 1e-6)

    inputs = [(_random(1, columns), _random(1, columns), _random(columns)) for _ in range(16)]
    shape = f"{columns}, RMS, bf16, 1 token"
    return Case(
        "add norm", shape, 5 * 2 * columns, [ours(*each) for each in inputs], {"torch": [theirs(*each) for each in inputs]}
    )
