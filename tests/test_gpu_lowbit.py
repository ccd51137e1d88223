"""Low-bit products on a GPU (in Triton's interpreter without one) against float64 products with the dequantised weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from triton_interpreting import take_arrays_as_bounds

from rowcast.kernels import lowbit as reference
from rowcast.kernels.gpu import lowbit
from rowcast.kernels.gpu.codes import Tiles
from rowcast.kernels.lowbit import LowBit
from rowcast.kernels.rows import ACTIVATIONS

take_arrays_as_bounds()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weight(rows: int, columns: int, bits: int, group: int = 64, seed: int = 0) -> LowBit:
    generator = torch.Generator().manual_seed(seed)
    q = reference.quantise(torch.randn(rows, columns, generator=generator), bits, group)
    return replace(q, codes=q.codes.to(DEVICE), scales=q.scales.to(DEVICE))


def inputs(tokens: int, columns: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def exact(q: LowBit, x: Tensor) -> Tensor:
    return x.double() @ reference.dequantise(q).double().T


def near(y: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Within a rounding to `dtype`, and 2^-16 of the largest."""
    assert y.dtype == dtype and y.shape == expected.shape
    error = (y.double() - expected).abs()
    assert (error <= 2.0**-16 * expected.abs().max() + torch.finfo(dtype).eps * expected.abs()).all(), error.max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_product(bits: int, dtype: torch.dtype) -> None:
    q, x = weight(100, 320, bits), inputs(3, 320, dtype)
    near(lowbit.product(q, x), exact(q, x))


@pytest.mark.parametrize(("columns", "group"), [(100, 64), (384, 64), (256, 128), (300, 128), (320, 128), (101, 64)])
def test_groups_and_padding(columns: int, group: int) -> None:
    for bits in (4, 8):
        q, x = weight(70, columns, bits, group), inputs(2, columns, torch.bfloat16)
        near(lowbit.product(q, x), exact(q, x))


def test_inputs_that_do_not_begin_at_a_word() -> None:
    for columns in (128, 101):
        q, x = weight(40, columns, 4), inputs(1, 2 * columns + 1, torch.bfloat16)[0, 1:].view(2, columns)
        near(lowbit.product(q, x), exact(q, x))


def test_bias_residual_and_dtype() -> None:
    q, x = weight(96, 192, 4), inputs(4, 192, torch.bfloat16)
    bias, residual = inputs(1, 96, torch.bfloat16, 2)[0], inputs(4, 96, torch.bfloat16, 3)
    y = lowbit.product(q, x, bias, dtype=torch.bfloat16, residual=residual)
    near(y, exact(q, x) + bias.double() + residual.double(), torch.bfloat16)


@pytest.mark.parametrize("count", [None, 0, 1, 37, 90])
def test_chosen_rows(count: int | None) -> None:
    q, x = weight(200, 256, 8), inputs(2, 256, torch.bfloat16)
    bias = inputs(1, 200, torch.float32, 2)[0]
    ids = torch.randperm(200, generator=torch.Generator().manual_seed(4))[:90].sort().values.to(DEVICE, torch.int32)
    on_device = None if count is None else torch.tensor([count], dtype=torch.int32, device=DEVICE)
    y = lowbit.product(q, x, bias, ids, on_device)[:, :count]
    whole = lowbit.product(q, x, bias)
    assert y.shape[1] == (90 if count is None else count)
    assert torch.allclose(y, whole[:, ids.long()][:, :count], rtol=0, atol=1e-4)
    if count is None or count:
        near(y, exact(q, x)[:, ids.long()][:, :count] + bias.double()[ids.long()][:count])


@pytest.mark.parametrize(("splits", "ahead"), [(1, 2), (3, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_number_of_tokens(dtype: torch.dtype, splits: int, ahead: int) -> None:
    q, x = weight(80, 384, 4), inputs(16, 384, dtype)
    tiles = Tiles(32, 2, 1, splits, ahead)
    whole = lowbit.product(q, x, tiles=tiles)
    for tokens in (1, 7):
        assert torch.equal(lowbit.product(q, x[:tokens], tiles=tiles), whole[:tokens])
    assert torch.equal(lowbit.product(q, x[3:4]), lowbit.product(q, x)[3:4])
    near(whole, exact(q, x))


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_scores(activation: str) -> None:
    q, x = weight(96, 128, 4), inputs(3, 128, torch.bfloat16)
    norms, bias = inputs(1, 96, torch.float32, 5)[0].abs(), inputs(1, 96, torch.float32, 6)[0]
    pre = exact(q, x) + bias.double()
    expected = pre * norms if activation == "relu" else ACTIVATIONS[activation](pre).abs() * norms
    near(lowbit.scores(q, x, norms, activation, bias), expected)
    gate, up = exact(q, x).chunk(2, 1)
    expected = (ACTIVATIONS[activation](gate) * up).abs() * norms[:48]
    near(lowbit.gated_scores(q, x, norms[:48], activation), expected)
    near(lowbit.ffn_hidden(q, x, activation), ACTIVATIONS[activation](gate) * up, torch.bfloat16)
    gate, up = pre.chunk(2, 1)
    near(lowbit.scores(q, x, norms[:48], activation, bias, gated=True), (ACTIVATIONS[activation](gate) * up).abs() * norms[:48])


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_of_models(bits: int, dtype: torch.dtype) -> None:
    for rows, columns in [(4096, 11008), (11008, 4096), (512, 12288), (12288, 512)]:
        generator = torch.Generator(DEVICE).manual_seed(7)
        q = _random(rows, columns, bits, generator)
        x = torch.randn(16, columns, device=DEVICE, generator=generator).to(dtype)
        y = lowbit.product(q, x)
        near(y, exact(q, x))
        for tokens in (1, 7):
            assert torch.equal(lowbit.product(q, x[:tokens]), y[:tokens])


@pytest.mark.gpu
def test_gated_sizes_of_models() -> None:
    generator = torch.Generator(DEVICE).manual_seed(8)
    for neurons, columns in [(16384, 2048), (11008, 4096)]:
        q = _random(2 * neurons, columns, 4, generator)
        x = torch.randn(16, columns, device=DEVICE, generator=generator).bfloat16()
        norms = torch.rand(neurons, device=DEVICE, generator=generator)
        y = lowbit.gated_scores(q, x, norms, "silu")
        gate, up = exact(q, x).chunk(2, 1)
        near(y, (ACTIVATIONS["silu"](gate) * up).abs() * norms)
        for tokens in (1, 7):
            assert torch.equal(lowbit.gated_scores(q, x[:tokens], norms, "silu"), y[:tokens])


@pytest.mark.gpu
@pytest.mark.parametrize("call", [lowbit.product, lambda q, x: lowbit.ffn_hidden(q, x, "silu")])
def test_replays(call: Callable[[LowBit, Tensor], Tensor]) -> None:
    q, x = weight(1024, 1024, 4), inputs(7, 1024, torch.bfloat16)
    call(q, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(q, x)
    for seed in range(5):
        x.copy_(inputs(7, 1024, torch.bfloat16, seed))
        graph.replay()
        assert torch.equal(y, call(q, x))


def _random(rows: int, columns: int, bits: int, generator: torch.Generator) -> LowBit:
    codes = torch.randint(256, (rows, columns * bits // 8), dtype=torch.uint8, device=DEVICE, generator=generator)
    scales = torch.rand(rows, columns // 64, device=DEVICE, generator=generator).half()
    return LowBit(codes, scales, bits, 64, columns)
