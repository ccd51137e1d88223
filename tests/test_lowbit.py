"""Few-bit weights: packing, rounding, and their products."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from test_rows import level, reference, seed  # noqa: F401
from torch import Tensor

from rowcast.errors import UserError
from rowcast.kernels import lowbit, rows, select
from rowcast.kernels.lowbit import dequantise, quantise

BITS = (2, 3, 4, 8)
CORRELATION = {2: 0.93, 3: 0.98, 4: 0.994, 8: 0.9999}
"""At least this between Gaussian weights and their quantised form."""


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


@pytest.mark.parametrize("bits", BITS)
def test_what_can_be_represented_comes_back(bits: int) -> None:
    """Every code in every column, and scales that are powers of two: packing loses nothing."""
    codes = torch.stack([torch.randperm(2**bits).repeat(-(-192 // 2**bits))[:192] for _ in range(40)])
    codes[:, ::64] = 2**bits - 1  # the largest weight of each group
    weight = (codes - (2**bits - 1) / 2).view(40, 3, 64) * torch.tensor([0.25, 1.0, 4.0])[:, None]
    q = quantise(weight.flatten(1), bits)
    assert torch.equal(dequantise(q), weight.flatten(1))
    assert q.rows == 40 and q.columns == 192
    assert q.bytes == 40 * 192 * bits // 8 + 40 * 3 * 2


@pytest.mark.parametrize("bits", BITS)
def test_correlation_with_gaussian_weights(bits: int) -> None:
    weight = torch.randn(500, 576)
    assert correlation(weight, dequantise(quantise(weight, bits))) > CORRELATION[bits]


@pytest.mark.parametrize("columns", [37, 64, 200])
def test_columns_are_padded(columns: int) -> None:
    weight = torch.randn(10, columns)
    q = quantise(weight, 8, group=128)
    assert q.padded % 128 == 0 and dequantise(q).shape == (10, columns)
    assert (dequantise(q) - weight).norm() < 0.01 * weight.norm()


def test_zeros_and_16_bit_weights() -> None:
    assert torch.equal(dequantise(quantise(torch.zeros(4, 64), 4)), torch.zeros(4, 64))
    weight = torch.randn(4, 64)
    assert torch.equal(dequantise(quantise(weight.bfloat16(), 4)), dequantise(quantise(weight.bfloat16().float(), 4)))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tokens", [1, 3, 16, 20])
def test_product_is_the_dequantised_weights(tokens: int, bits: int, group: int) -> None:
    for columns in (576, 37, 2000):
        q = quantise(torch.randn(101, columns), bits, group)
        x = torch.randn(tokens, columns)
        x[:, 3] *= 50  # hidden states have outliers
        expected = x @ dequantise(q).T
        assert (lowbit.product(q, x) - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("activation", ["silu", "relu", "gelu_tanh"])
def test_gated_scores(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, norms = quantise(torch.randn(2 * 77, 576) / 24, 4), torch.rand(77)
    for tokens in (1, 5):
        x = torch.randn(tokens, 576)
        expected = reference(partial(lowbit.gated_scores, q, x, norms, activation), monkeypatch)
        torch.testing.assert_close(lowbit.gated_scores(q, x, norms, activation), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("level")
def test_a_token_has_the_same_scores_alone_and_among_others() -> None:
    q, x, norms = quantise(torch.randn(128, 576), 2), torch.randn(5, 576), torch.rand(64)
    alone = torch.cat([lowbit.gated_scores(q, token[None], norms, "silu") for token in x])
    assert torch.equal(lowbit.gated_scores(q, x, norms, "silu"), alone)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gated_ffn_is_its_three_parts(dtype: torch.dtype) -> None:
    gate, bank = (torch.randn(203, 576) / 24).to(dtype), torch.randn(203, 2, 576).to(dtype)
    up, down = bank[:, 0], bank[:, 1]
    q, norms, x = quantise(torch.cat([gate, up]), 3), down.float().norm(dim=1), torch.randn(1, 576).to(dtype)
    ids, own = select.top_union(lowbit.gated_scores(q, x, norms, "silu"), 77)
    expected = rows.ffn(gate, up, None, down, x, ids, own, "silu")
    assert torch.equal(lowbit.gated_ffn(q, norms, 77, gate, up, down, x, "silu"), expected)


@pytest.mark.usefixtures("level")
def test_tiny_inputs_stay_tiny() -> None:
    q, x = quantise(torch.randn(64, 128), 4), torch.randn(1, 128)
    for size in (1e-30, 5e-35, 1e-40):
        assert (lowbit.product(q, x * size) - (x * size) @ dequantise(q).T).abs().max() < 1e-4 * size + 1e-31
    x[:, 64:] *= 5e-35
    torch.testing.assert_close(lowbit.product(q, x), x @ dequantise(q).T, atol=1e-3, rtol=1e-4)


def test_shapes_that_do_not_belong_together() -> None:
    gate, up, down = (torch.randn(10, 64) for _ in range(3))
    q, norms, x = quantise(torch.cat([gate, up]), 4), torch.rand(10), torch.randn(1, 64)
    whole = lowbit.gated_ffn(q, norms.repeat(2)[:10], 5, gate, up, down, x, "silu")
    assert torch.equal(lowbit.gated_ffn(q, torch.stack([norms, -norms], 1)[:, 0], 5, gate, up, down, x, "silu"), whole)
    for wrong in (
        partial(lowbit.gated_ffn, q, norms, 5, gate, up, down, torch.randn(1, 32), "silu"),
        partial(lowbit.gated_ffn, q, norms[:8], 5, gate, up, down, x, "silu"),
        partial(lowbit.gated_ffn, q, norms, 5, gate[:5], up, down, x, "silu"),
        partial(lowbit.gated_scores, q, x, norms[:8], "silu"),
        partial(lowbit.product, q, torch.randn(2, 32)),
    ):
        with pytest.raises((AssertionError, RuntimeError)):
            wrong()


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(UserError, match="5 bits cannot be packed, use one of 2, 3, 4, 8"):
        quantise(torch.randn(2, 64), 5)
    with pytest.raises(UserError, match="a group of 32 columns cannot be packed, use a multiple of 64"):
        quantise(torch.randn(2, 64), 4, group=32)
