"""What products with weights in codes share: where a code lies, which rows are taken at a time, and tokens by parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rowcast.kernels import codes, gpu


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_where_a_code_lies(bits: int) -> None:
    levels = torch.randint(1 << bits, (3, 192), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    packed = codes.pack(levels, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 24 * bits)
    assert torch.equal(codes.unpack(packed, bits), levels)
    width = 2 if bits == 3 else bits
    for column in (0, 1, 15, 16, 33, 63):
        block = packed.view(3, 3, 8 * bits)[:, 1].int()
        found = block[:, column % (8 * width)] >> column // (8 * width) * width & (1 << width) - 1
        if bits == 3:
            found |= (block[:, 16 + column // 8] >> column % 8 & 1) << 2
        assert torch.equal(found, levels[:, 64 + column].int())


@pytest.mark.parametrize("bits", [5, 6])
def test_where_a_code_of_two_parts_lies(bits: int) -> None:
    levels = torch.randint(1 << bits, (3, 192), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    packed = codes.pack(levels, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 24 * bits)
    assert torch.equal(codes.unpack(packed, bits), levels)
    block = packed.view(3, 3, 8 * bits)[:, 1].int()
    for column in range(64):
        part, lane, byte = column // 16, column // 4 % 4, column % 4
        found = block[:, 8 * lane + 4 * (part // 2) + byte] >> part % 2 * 4 & 15
        if bits == 6:
            found |= (block[:, 32 + 4 * lane + byte] >> 2 * part & 3) << 4
        else:
            found |= (block[:, 32 + 4 * (lane // 2) + byte] >> 4 * (lane % 2) + part & 1) << 4
        assert torch.equal(found, levels[:, 64 + column].int())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_packed_codes_lie_row_by_row(bits: int) -> None:
    """However the codes lie: many checkpoints have inputs first."""
    levels = torch.randint(1 << bits, (5, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    packed = codes.pack(levels.T.contiguous().T, bits)
    assert torch.equal(packed, codes.pack(levels, bits)) and packed.is_contiguous()


def test_rows_at_a_time() -> None:
    assert list(codes.row_blocks(5, 100, 250)) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert list(codes.row_blocks(2, 100, 1)) == [slice(0, 1), slice(1, 2)]
    assert list(codes.row_blocks(5000, 1)) == [slice(0, 2048), slice(2048, 4096), slice(4096, 5000)]
    assert list(codes.row_blocks(0, 0)) == []


@pytest.mark.parametrize("tokens", [1, 16, 17, 40])
def test_tokens_by_parts(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    weight, x, residual = (torch.randn(*shape, generator=generator) for shape in ((5, 8), (tokens, 8), (tokens, 5)))
    taken: list[int] = []

    def product(part: Tensor, added: Tensor | None) -> Tensor:
        taken.append(len(part))
        return part @ weight.T + (0 if added is None else added)

    torch.testing.assert_close(codes.in_parts(product, x, residual), x @ weight.T + residual)
    torch.testing.assert_close(codes.in_parts(product, x), x @ weight.T)
    assert max(taken) <= gpu.MOST_TOKENS and sum(taken) == 2 * tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_by_torch_is_rounded_once(dtype: torch.dtype) -> None:
    """In the dtype of x where that is asked for; else in float32, whatever is asked for."""
    generator = torch.Generator().manual_seed(3)
    levels = torch.randint(16, (70, 128), dtype=torch.uint8, generator=generator)
    scales = torch.rand(70, 2, generator=generator).half()
    weight = list(codes.dequantised(codes.pack(levels, 4), scales, 4, 64, 100, 7.5))
    whole = torch.cat([part for _, part in weight])
    assert torch.equal(whole, ((levels.float() - 7.5).view(70, 2, 64) * scales[:, :, None].float()).flatten(1)[:, :100])
    x = torch.randn(3, 100, generator=generator)
    assert codes.by_torch(weight, 70, x, dtype).dtype == torch.float32
    assert codes.by_torch(weight, 70, x.to(dtype), dtype).dtype == dtype
    torch.testing.assert_close(codes.by_torch(weight, 70, x, dtype), x @ whole.T)
