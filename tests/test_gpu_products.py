"""Products of the GPU's kernels against float64: shapes, ids, counts, and the same bits for every number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from triton_interpreting import take_arrays_as_bounds

from rowcast.kernels.gpu import norms, products, scratch
from rowcast.kernels.gpu.product_tiles import Tiles, tiles_in
from rowcast.kernels.rows import ACTIVATIONS

take_arrays_as_bounds()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16) if DEVICE == "cuda" else (torch.float32, torch.bfloat16)
MOST_DTYPES = DTYPES if DEVICE == "cuda" else DTYPES[1:]
FEWER = (1, 2, 7) if DEVICE == "cuda" else (1, 7)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}
SHAPES = ((192, 192), (131, 100))
"""Rows and columns: some that tiles divide, some that they do not."""


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    """And no call leaves a counter behind that is not 0."""
    torch.manual_seed(0)
    yield
    assert not any(counters._zeros.any() for counters in scratch._made.values())


@pytest.fixture(params=(1, 3), ids=("whole", "split"))
def splits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Sums of three parts by one program and by three; few programs, each of which has several tiles."""
    wanted: int = request.param

    def cut(capacity: int, columns: int, width: int, *_: object) -> Tiles:
        return Tiles(64, 32 if width == 4 and DEVICE == "cuda" else 64, wanted, 2, 4, 5, 3)

    monkeypatch.setattr(products, "tiles_in", cut)
    monkeypatch.setattr(products, "tiles_out", cut)
    return wanted


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def bank(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """gate [N, D]; up and down as views of one bank [N, 2, D]."""
    both = random(rows, 2, columns, dtype=dtype)
    return random(rows, columns, dtype=dtype), both[:, 0], both[:, 1]


def chosen(rows: int, capacity: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.randperm(rows, device=DEVICE)[:capacity].sort().values.to(dtype)


def counted(count: int) -> Tensor:
    return torch.tensor([count], dtype=torch.int32, device=DEVICE)


def close(found: Tensor, expected: Tensor) -> None:
    """To the dtype's rounding, relative to the whole and, more loosely, entry by entry."""
    assert found.shape == expected.shape
    error = found.double() - expected
    scale = expected.norm() / max(1, expected.numel()) ** 0.5
    assert error.norm() <= TOLERANCE[found.dtype] * expected.norm() + 1e-12
    assert (error.abs() <= 8 * TOLERANCE[found.dtype] * torch.maximum(expected.abs(), scale)).all()


def same_bits(run: Callable[[int], Tensor], tokens: int = 16) -> None:
    """The first t tokens get what they get among 16."""
    most = run(tokens)
    for fewer in FEWER:
        assert torch.equal(run(fewer), most[:fewer])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_rows(shape: tuple[int, int], dtype: torch.dtype, splits: int) -> None:
    rows, columns = shape
    _, table, _ = bank(rows, columns, dtype)
    x, bias, residual = random(16, columns, dtype=dtype), random(rows, dtype=dtype), random(16, rows, dtype=dtype)
    expected = x.double() @ table.double().T
    close(products.rows_in(table, x), expected)
    out = torch.full((16, 2 * rows), 7.0, dtype=dtype, device=DEVICE)
    given = products.rows_in(table, x[:7], bias=bias, residual=residual[:7], out=out[:7, :rows])
    close(given, (expected + bias.double() + residual.double())[:7])
    assert given.data_ptr() == out.data_ptr() and (out[:, rows:] == 7).all() and (out[7:] == 7).all()
    same_bits(lambda t: products.rows_in(table, x[:t], bias=bias, residual=residual[:t]))


@pytest.mark.parametrize("dtype", MOST_DTYPES, ids=str)
@pytest.mark.parametrize("count", [None, 0, 70, 9999])
def test_chosen_rows(count: int | None, dtype: torch.dtype, splits: int) -> None:
    rows, columns, capacity = 200, 192, 131
    _, table, _ = bank(rows, columns, dtype)
    ids = chosen(rows, capacity, torch.int64 if count is None else torch.int32)
    x, bias = random(16, columns, dtype=dtype), random(rows, dtype=dtype)
    device_count = None if count is None else counted(count)
    valid = capacity if count is None else min(count, capacity)
    expected = x.double() @ table[ids.long()].double().T + bias[ids.long()].double()
    expected[:, valid:] = 0
    found = products.rows_in(table, x, ids, device_count, bias)
    close(found, expected)
    assert (found[:, valid:] == 0).all()
    same_bits(lambda t: products.rows_in(table, x[:t], ids, device_count, bias))


def same(found: Tensor, expected: Tensor) -> None:
    """Bit by bit; numpy, which multiplies for the interpreter, treats rows by their places."""
    if DEVICE == "cuda":
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found, expected, rtol=4 * TOLERANCE[found.dtype], atol=4 * TOLERANCE[found.dtype])


@pytest.mark.parametrize("columns", [64, 576, 1024, 4096, 12288])
@pytest.mark.parametrize("tables", [1, 2])
def test_columns_alone_set_the_order_of_addition(columns: int, tables: int) -> None:
    cuts = [
        tiles_in(capacity, columns, 2, tables, chosen, counted, units)
        for capacity in (1, 4096, 200_000)
        for chosen in (False, True)
        for counted in (False, True)
        for units in (4, 132)
    ]
    assert {(cut.rows * tables, cut.parts) for cut in cuts} == {(64, cuts[0].parts)}
    assert all(cut.splits in (1, cut.parts) and (cut.parts == 1 or cut.depth == 128) for cut in cuts)


@pytest.mark.parametrize("dtype", MOST_DTYPES, ids=str)
@pytest.mark.parametrize("columns", [192, 200, 2304] if DEVICE == "cuda" else [200])
def test_a_row_s_bits_are_its_own(columns: int, dtype: torch.dtype) -> None:
    """Among all rows, among chosen ones in any order, with as many programs as the heuristic takes for each."""
    rows = 20_000 if DEVICE == "cuda" else 200
    _, table, _ = bank(rows, columns, dtype)
    x, ids = random(3, columns, dtype=dtype), chosen(rows, 150).flip(0)
    every = products.rows_in(table, x)
    same(products.rows_in(table, x, ids), every[:, ids.long()])
    same(products.rows_in(table, x, ids, counted(77))[:, :77], every[:, ids.long()[:77]])
    same(products.rows_in(table, x, count=counted(90))[:, :90], every[:, :90])
    same(products.rows_in(table[:64], x), every[:, :64])
    gated = products.ffn_hidden(table, table, None, None, x, None, None, "silu")
    same(products.ffn_hidden(table, table, None, None, x, ids, None, "silu"), gated[:, ids.long()])


@pytest.mark.parametrize("dtype", MOST_DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True], ids=("plain", "gated"))
def test_hidden(gated: bool, activation: str, dtype: torch.dtype, splits: int) -> None:
    rows, columns, capacity, count = 150, 128, 90, 71
    gate, up, _ = bank(rows, columns, dtype)
    gate_bias, up_bias = random(rows, dtype=dtype), random(rows, dtype=dtype)
    ids, own = chosen(rows, capacity), torch.rand(16, capacity, device=DEVICE) < 0.6
    x = random(16, columns, dtype=dtype)
    at = ids.long()
    up_part = x.double() @ up[at].double().T + up_bias[at].double()
    gate_part = x.double() @ gate[at].double().T + gate_bias[at].double()
    act = ACTIVATIONS[activation]
    expected = (act(gate_part) * up_part if gated else act(up_part)) * own
    expected[:, count:] = 0

    def run(tokens: int) -> Tensor:
        return products.ffn_hidden(
            gate if gated else None,
            up,
            gate_bias if gated else None,
            up_bias,
            x[:tokens],
            ids,
            counted(count),
            activation,
            own[:tokens],
        )

    close(run(16), expected)
    same_bits(run)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_rows_out(shape: tuple[int, int], dtype: torch.dtype, splits: int) -> None:
    rows, columns = shape
    _, _, table = bank(rows, columns, dtype)
    hidden, bias, residual = random(16, rows, dtype=dtype), random(columns, dtype=dtype), random(16, columns, dtype=dtype)
    expected = hidden.double() @ table.double()
    close(products.rows_out(table, hidden), expected)
    close(products.rows_out(table, hidden[:7], bias=bias, residual=residual[:7]), (expected + bias + residual)[:7])
    same_bits(lambda t: products.rows_out(table, hidden[:t], bias=bias, residual=residual[:t]))


@pytest.mark.parametrize("dtype", MOST_DTYPES, ids=str)
@pytest.mark.parametrize(("count", "capacity"), [(None, 131), (0, 128), (1, 131), (70, 128), (9999, 128)])
def test_chosen_rows_out(count: int | None, capacity: int, dtype: torch.dtype, splits: int) -> None:
    rows, columns = 200, 192
    _, _, table = bank(rows, columns, dtype)
    table[0] = torch.nan  # Nothing but chosen rows is added, not even times 0.
    ids = 1 + chosen(rows - 1, capacity, torch.int64 if count is None else torch.int32)
    valid = capacity if count is None else min(count, capacity)
    hidden, residual = random(16, capacity, dtype=dtype), random(16, columns, dtype=dtype)
    device_count = None if count is None else counted(count)
    expected = hidden[:, :valid].double() @ table[ids.long()[:valid]].double() + residual.double()
    close(products.rows_out(table, hidden, ids, device_count, None, residual), expected)
    same_bits(lambda t: products.rows_out(table, hidden[:t], ids, device_count, None, residual[:t]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_default_tiles(dtype: torch.dtype) -> None:
    gate, up, down = bank(200, 320, dtype)
    x, ids = random(5, 320, dtype=dtype), chosen(200, 160)
    hidden = products.ffn_hidden(gate, up, None, None, x, ids, counted(97), "silu")
    at = ids.long()[:97]
    expected = torch.nn.functional.silu(x.double() @ gate[at].double().T) * (x.double() @ up[at].double().T)
    close(hidden[:, :97], expected)
    close(products.rows_out(down, hidden, ids, counted(97)), hidden[:, :97].double() @ down[at].double())
    close(products.rows_in(up, x), x.double() @ up.double().T)


@pytest.mark.gpu
def test_replays_follow_ids_and_counts(splits: int) -> None:
    rows, columns, capacity = 200, 192, 131
    gate, up, down = bank(rows, columns, torch.bfloat16)
    x, ids, count = random(7, columns, dtype=torch.bfloat16), chosen(rows, capacity), counted(0)

    def run() -> Tensor:
        return products.rows_out(down, products.ffn_hidden(gate, up, None, None, x, ids, count, "silu"), ids, count)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for number in (0, 1, 64, 131, 50, 5000):
        ids.copy_(chosen(rows, capacity))
        count.fill_(number)
        x.normal_()
        for _ in range(3):
            graph.replay()
        assert torch.equal(out, run())


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(12288, 4096), (4096, 4096), (1000, 12288)], ids=str)
def test_large_tables(shape: tuple[int, int]) -> None:
    rows, columns = shape
    gate, up, down = bank(rows, columns, torch.bfloat16)
    x = random(16, columns, dtype=torch.bfloat16)
    close(products.rows_in(up, x), (x.float() @ up.float().T).double())
    same_bits(lambda t: products.rows_in(up, x[:t]))
    hidden = products.ffn_hidden(gate, up, None, None, x, None, None, "silu")
    same_bits(lambda t: products.ffn_hidden(gate, up, None, None, x[:t], None, None, "silu"))
    close(products.rows_out(down, hidden), (hidden.float() @ down.float()).double())
    same_bits(lambda t: products.rows_out(down, hidden[:t]))


@pytest.mark.gpu
def test_kernels_that_start_early_wait_for_what_they_read() -> None:
    """Long chains of launches that overlap, in a graph, with a side stream that is joined again: the same bits as one by one."""
    wide, square, narrow = (random(rows, 4096, dtype=torch.bfloat16) / 64 for rows in (12288, 4096, 512))
    x = random(3, 4096, dtype=torch.bfloat16)
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def run(pause: Callable[[], None]) -> Tensor:
        y = x
        for _ in range(6):
            pause()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                late = products.rows_in(wide, y)
                pause()
            short = products.rows_in(narrow, y)
            pause()
            torch.cuda.current_stream().wait_stream(side)
            y = products.rows_out(square, late[:, :4096] + short.sum(1, keepdim=True), residual=y)
            pause()
            y = products.rows_out(wide, products.rows_in(wide, norms.norm(y, None, None, 1e-6, True)), residual=y)
        return y

    expected = run(torch.cuda.synchronize)
    run(lambda: None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(lambda: None)
    for _ in range(20):
        found.zero_()
        graph.replay()
        assert torch.equal(found, expected)
        assert torch.equal(run(lambda: None), expected)
