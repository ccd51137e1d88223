"""Products with packed weights: torch's own as the reference, and what is kept for numbers of tokens that are not met again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from rowcast.kernels.linear import OneDnnLinear, backend, make_linear

pytestmark = pytest.mark.skipif(
    backend(torch.device("cpu"), torch.float32) == "torch", reason="this build of torch packs no weights"
)


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.parametrize("tokens", [1, 3, 64])
def test_a_packed_product_is_torchs(tokens: int) -> None:
    weight, bias, x = torch.randn(90, 64), torch.randn(90), torch.randn(tokens, 64)
    product = make_linear(weight.clone(), bias)
    assert isinstance(product, OneDnnLinear)
    torch.testing.assert_close(product(x), F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not tell")
def test_memory_does_not_grow_with_the_numbers_of_tokens_met() -> None:
    """A server meets hundreds of them."""
    products = [make_linear(torch.randn(n, k)) for n, k in ((192, 96), (96, 96), (512, 96))]
    with torch.inference_mode():
        sizes = []
        for tokens in range(1, 401):
            x = torch.zeros(tokens, 96)
            for product in products:
                product(x)
            if tokens % 200 == 0:
                sizes.append(resident_mib())
    assert sizes[1] - sizes[0] < 40, sizes
