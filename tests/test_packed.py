"""Weights as quantised checkpoints hold them: packing and products, also a GPU's (in Triton's interpreter without one)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_rows import level, seed  # noqa: F401
from torch import Tensor
from triton_interpreting import take_arrays_as_bounds

from rowcast.kernels import packed
from rowcast.kernels.codes import pack as pack_codes
from rowcast.kernels.gpu import packed as on_gpu
from rowcast.kernels.gpu.codes import Tiles
from rowcast.kernels.packed import Packed, dequantise, pack, pack_super
from rowcast.kernels.packed_sizes import Form
from rowcast.kernels.rows import ACTIVATIONS

take_arrays_as_bounds()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LEVELS = ("zero", "zeros", "minima")


def parts(rows: int, columns: int, bits: int, group: int, what: str, scales: torch.dtype = torch.float16) -> dict[str, Any]:
    """Random ones, and the weight that they stand for."""
    draw = torch.Generator().manual_seed(bits * 1000 + columns)
    groups, size = (1, columns) if group == -1 else (-(-columns // group), group)
    found: dict[str, Any] = {
        "codes": torch.randint(1 << bits, (rows, columns), generator=draw, dtype=torch.uint8),
        "scales": (torch.rand(rows, groups, generator=draw) + 0.1).to(scales),
    }
    of = torch.arange(columns) // size
    wide = found["codes"].float()
    if what == "zero":
        found["zero"] = 1 << bits - 1
        wide -= found["zero"]
    elif what == "zeros":
        found["zeros"] = torch.randint(1 << bits, (rows, groups), generator=draw, dtype=torch.uint8)
        wide -= found["zeros"].float()[:, of]
    weight = wide * found["scales"].float()[:, of]
    if what == "minima":
        found["minima"] = torch.randn(rows, groups, generator=draw).to(scales)
        weight += found["minima"].float()[:, of]
    return {**found, "weight": weight}


def made(rows: int, columns: int, bits: int, group: int, what: str, scales: torch.dtype = torch.float16) -> tuple[Packed, Tensor]:
    found = parts(rows, columns, bits, group, what, scales)
    weight = found.pop("weight")
    return pack(found.pop("codes"), found.pop("scales"), bits, group, **found).to(DEVICE), weight.to(DEVICE)


def made_super(rows: int, columns: int, bits: int) -> tuple[Packed, Tensor]:
    """With super-blocks of 256: a random one, and the weight that it stands for."""
    draw = torch.Generator().manual_seed(bits * 1000 + columns)

    def of(lowest: int, highest: int, size: int, dtype: torch.dtype) -> Tensor:
        return torch.randint(lowest, highest + 1, (rows, columns // size), generator=draw, dtype=dtype)

    codes, group = of(0, (1 << bits) - 1, 1, torch.uint8), 16 if bits == 6 else 32
    over = (torch.rand(rows, columns // 256, 1 if bits == 6 else 2, generator=draw) / 64).half()
    scales, minima = of(-128, 127, 16, torch.int8) if bits == 6 else of(0, 63, 32, torch.uint8), of(0, 63, 32, torch.uint8)
    within, above = torch.arange(columns) // group, torch.arange(columns) // 256
    wide = codes.float() - 32 if bits == 6 else codes.float()
    weight = scales.float()[:, within] * over[..., 0].float()[:, above] * wide
    if bits == 6:
        return pack_super(pack_codes(codes, bits), scales, None, over, 6, 32).to(DEVICE), weight.to(DEVICE)
    weight -= minima.float()[:, within] * over[..., 1].float()[:, above]
    return pack_super(pack_codes(codes, bits), scales, minima, over, bits).to(DEVICE), weight.to(DEVICE)


def inputs(tokens: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(7)).to(DEVICE, dtype)


def near(y: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Within a rounding to `dtype`, and 2^-15 of the largest."""
    assert y.dtype == dtype and y.shape == expected.shape
    error = (y.double() - expected).abs()
    assert (error <= 2.0**-15 * expected.abs().max() + torch.finfo(dtype).eps * expected.abs()).all(), error.max()


@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("what", LEVELS)
def test_the_weight_comes_back(what: str, group: int) -> None:
    for bits in (2, 3, 4, 8):
        for columns in (64, 100, 192):
            q, weight = made(20, columns, bits, group, what)
            assert torch.equal(dequantise(q), weight)
            assert q.bytes == Form(bits, group, what).stored_bytes(20, columns)  # type: ignore[arg-type]
    q, weight = made(10, 96, 4, group, what, torch.bfloat16)
    assert q.scales.dtype == torch.bfloat16 and torch.equal(dequantise(packed.stacked([q, q])), torch.cat([weight, weight]))


@pytest.mark.parametrize("bits", [4, 5, 6])
def test_the_weight_of_super_blocks(bits: int) -> None:
    q, weight = made_super(20, 512, bits)
    assert torch.equal(dequantise(q), weight) and q.padded == 512
    form = Form(bits, 16, "zero", 1, 256) if bits == 6 else Form(bits, 32, "minima", 1, 256)
    assert q.bytes == form.stored_bytes(20, 512)
    assert torch.equal(
        dequantise(packed.stacked([q, q.with_tensors([part.clone() for part in q.tensors])])), torch.cat([weight] * 2)
    )
    x, bias, residual = inputs(3, 512), inputs(1, 20)[0], inputs(3, 20)
    expected = x @ weight.T + bias
    assert (packed.product(q, x, bias, residual) - expected - residual).norm() < 1e-5 * expected.norm()
    gate, up = expected.chunk(2, 1)
    hidden = ACTIVATIONS["silu"](gate) * up
    assert (packed.ffn_hidden(q, bias, x, "silu", True) - hidden).norm() < 1e-5 * hidden.norm()


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("what", LEVELS)
def test_products_are_the_weights(what: str, group: int) -> None:
    for bits in (3, 4, 8):
        q, weight = made(70, 200, bits, group, what)
        x, bias, residual = inputs(3, 200), inputs(1, 70)[0], inputs(3, 70)
        expected = x @ weight.T + bias + residual
        found = packed.product(q, x, bias, residual)
        assert (found - expected).norm() < 1e-4 * expected.norm()
        gate, up = (x @ weight.T + bias).chunk(2, 1)
        found = packed.ffn_hidden(q, bias, x, "silu", True)
        assert (found - ACTIVATIONS["silu"](gate) * up).norm() < 1e-4 * (gate * up).norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("what", LEVELS)
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (4, 128), (8, 32), (8, -1), (3, 32), (3, 128), (2, 64)])
def test_a_gpus_product(bits: int, group: int, what: str, dtype: torch.dtype) -> None:
    q, weight = made(40, 200, bits, group, what)
    x = inputs(3, 200, dtype)
    near(on_gpu.product(q, x), x.double() @ weight.double().T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 5, 6])
@pytest.mark.parametrize("tiles", [None, Tiles(16, 2, 4, 1), Tiles(32, 2, 2, 2), Tiles(32, 4, 1, 1)])
def test_a_gpus_product_of_super_blocks(tiles: Tiles | None, bits: int, dtype: torch.dtype) -> None:
    """With 12 blocks the last step of the largest tiles is not whole. Tiles are of 8 tokens on a GPU, which has 9 in larger ones."""
    q, weight = made_super(40, 768, bits)
    x = inputs(9, 768, dtype)
    whole = on_gpu._run(q, x, 40, tiles=tiles)
    near(whole, x.double() @ weight.double().T)
    assert torch.equal(on_gpu._run(q, x[:3], 40, tiles=tiles), whole[:3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("what", ["zero", "minima"])
def test_a_gpus_product_of_five_bits(what: str, dtype: torch.dtype) -> None:
    q, weight = made(40, 200, 5, 32, what)
    assert torch.equal(dequantise(q), weight) and q.bytes == Form(5, 32, what).stored_bytes(40, 200)  # type: ignore[arg-type]
    x = inputs(9, 200, dtype)
    whole = on_gpu.product(q, x)
    near(whole, x.double() @ weight.double().T)
    assert torch.equal(on_gpu.product(q, x[:3]), whole[:3])
    gate, up = (x.double() @ weight.double().T / 64).chunk(2, 1)
    q = q.with_tensors([part / 64 if part.dtype == torch.float16 else part for part in q.tensors])
    near(on_gpu.ffn_hidden(q, x, "silu"), ACTIVATIONS["silu"](gate) * up, dtype)


@pytest.mark.parametrize("bits", [4, 5, 6])
def test_a_gpus_super_blocks_with_bias_residual_and_activation(bits: int) -> None:
    q, _ = made_super(96, 256, bits)
    q = q.with_tensors([*q.tensors[:-1], q.tensors[-1] / 64])  # activations are not all at their ends
    x, bias, residual = inputs(4, 256, torch.bfloat16), inputs(1, 96, torch.bfloat16)[0], inputs(4, 96, torch.bfloat16)
    exact = x.double() @ dequantise(q).double().T + bias.double()
    near(on_gpu.product(q, x, bias, torch.bfloat16, residual), exact + residual.double(), torch.bfloat16)
    gate, up = exact.chunk(2, 1)
    near(on_gpu.ffn_hidden(q, x, "silu", bias), ACTIVATIONS["silu"](gate) * up, torch.bfloat16)
    near(on_gpu.ffn_hidden(q, x, "gelu", bias, gated=False), ACTIVATIONS["gelu"](exact), torch.bfloat16)


def test_a_gpus_bias_residual_and_activation() -> None:
    q, weight = made(96, 192, 4, 32, "zeros", torch.bfloat16)
    x, bias, residual = inputs(4, 192, torch.bfloat16), inputs(1, 96, torch.bfloat16)[0], inputs(4, 96, torch.bfloat16)
    exact = x.double() @ weight.double().T + bias.double()
    near(on_gpu.product(q, x, bias, torch.bfloat16, residual), exact + residual.double(), torch.bfloat16)
    gate, up = exact.chunk(2, 1)
    near(on_gpu.ffn_hidden(q, x, "silu", bias), ACTIVATIONS["silu"](gate) * up, torch.bfloat16)
    near(on_gpu.ffn_hidden(q, x, "gelu", bias, gated=False), ACTIVATIONS["gelu"](exact), torch.bfloat16)


@pytest.mark.parametrize("splits", [1, 3])
def test_results_do_not_depend_on_the_number_of_tokens(splits: int) -> None:
    q, weight = made(40, 384, 4, 128, "zeros")
    x, tiles = inputs(16, 384, torch.bfloat16), Tiles(32, 2, 1, splits)
    whole = on_gpu._run(q, x, 40, tiles=tiles)
    assert torch.equal(on_gpu._run(q, x[:7], 40, tiles=tiles), whole[:7])
    near(whole, x.double() @ weight.double().T)


@pytest.mark.gpu
@pytest.mark.parametrize(("bits", "group", "what"), [(4, 128, "zero"), (4, 128, "zeros"), (4, 32, "minima"), (8, 32, "zero")])
def test_sizes_of_models(bits: int, group: int, what: str) -> None:
    for rows, columns in [(4096, 11008), (11008, 4096), (512, 12288)]:
        q, weight = made(rows, columns, bits, group, what)
        x = inputs(16, columns, torch.bfloat16)
        y = on_gpu.product(q, x)
        near(y, x.double() @ weight.double().T)
        for tokens in (1, 7):
            assert torch.equal(on_gpu.product(q, x[:tokens]), y[:tokens])


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 5, 6])
def test_sizes_of_models_with_super_blocks(bits: int) -> None:
    for rows, columns in [(4096, 11008), (11008, 4096), (512, 12288), (32000, 4096)]:
        q, weight = made_super(rows, columns, bits)
        x = inputs(16, columns, torch.bfloat16)
        y = on_gpu.product(q, x)
        near(y, x.double() @ weight.double().T)
        for tokens in (1, 7, 8, 9):
            assert torch.equal(on_gpu.product(q, x[:tokens]), y[:tokens])
