"""Norms of the GPU's kernels against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rowcast.kernels.gpu import norms
from rowcast.kernels.gpu.late import RING, Ring

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
DTYPES = tuple(TOLERANCE)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def expected(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool) -> Tensor:
    x, weight, bias = (None if each is None else each.double() for each in (x, weight, bias))  # type: ignore[assignment]
    y = F.rms_norm(x, x.shape[-1:], weight, eps) if rms else F.layer_norm(x, x.shape[-1:], weight, None, eps)
    return y if bias is None else y + bias


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rms", [False, True], ids=("layer", "rms"))
@pytest.mark.parametrize("shape", [(4, 576), (2, 4096), (1, 100), (3, 2, 80)], ids=str)
def test_norm(shape: tuple[int, ...], rms: bool, dtype: torch.dtype) -> None:
    x = (3 * torch.randn(shape, device=DEVICE) + 1).to(dtype)
    weight, bias = torch.randn(2, shape[-1], device=DEVICE).to(dtype)
    for w, b in ((weight, bias), (weight, None), (None, None)):
        found = norms.norm(x, w, b, 1e-5, rms)
        assert found.shape == x.shape and found.dtype == dtype
        torch.testing.assert_close(found.double(), expected(x, w, b, 1e-5, rms), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    found = norms.norm(x, weight, bias, 1e-5, rms)
    assert torch.equal(norms.norm(x[:1], weight, bias, 1e-5, rms), found[:1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rms", [False, True], ids=("layer", "rms"))
def test_add_norm(rms: bool, dtype: torch.dtype) -> None:
    x, delta = torch.randn(2, 7, 576, device=DEVICE).to(dtype)
    weight, bias = torch.randn(2, 576, device=DEVICE).to(dtype)
    total, found = norms.add_norm(x, delta, weight, bias, 1e-6, rms)
    if DEVICE == "cuda" or dtype != torch.bfloat16:  # Which the interpreter cuts off instead of rounding it.
        assert torch.equal(total, x + delta)
    torch.testing.assert_close(
        found.double(), expected(total, weight, bias, 1e-6, rms), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )


@pytest.mark.parametrize(("start", "tokens", "count"), [(0, 1, 1), (30, 5, 3), (21, 16, 16), (7, 2, 0)])
def test_what_is_kept_in_a_ring(start: int, tokens: int, count: int) -> None:
    """Of the real tokens, each by its place; the rest of the ring stays as it is."""
    x, weight, bias = torch.randn(tokens, 100, device=DEVICE), *torch.randn(2, 100, device=DEVICE)
    rows, numbers = torch.full((RING, 100), 7.0, device=DEVICE), torch.tensor([start, count], dtype=torch.int32, device=DEVICE)
    wanted = rows.clone()
    found = norms.norm(x, weight, bias, 1e-5, False, Ring(rows, numbers[:1], numbers[1:]))
    assert torch.equal(found, norms.norm(x, weight, bias, 1e-5, False))
    for token in range(count):
        wanted[(start + token) % RING] = found[token]
    assert torch.equal(rows, wanted)


def test_heads_inside_a_wider_row() -> None:
    qkv = torch.randn(5, 3 * 4 * 64, device=DEVICE)
    q, k = qkv[:, :256].view(5, 4, 64), qkv[:, 256:512].view(5, 4, 64)
    weight = torch.randn(64, device=DEVICE)
    torch.testing.assert_close(norms.norm(q, weight, None, 1e-6, True), F.rms_norm(q, (64,), weight, 1e-6))
    total, found = norms.add_norm(k, q, None, None, 1e-6, False)
    torch.testing.assert_close(total, k + q)
    torch.testing.assert_close(found, F.layer_norm(k + q, (64,), None, None, 1e-6))
