"""Block-quantised rows of a GGUF file to float32, equal bit for bit to what the gguf package gives.

Q4_0, Q4_1 and Q8_0 have a path of their own here, 3 to 5 times gguf's speed (1.1 against 3.6 ns a weight for Q4_1); gguf
dequantises the other types.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rowcast.kernels.codes import pack as pack_codes
from rowcast.kernels.packed import Packed, pack, pack_super
from rowcast.kernels.packed_sizes import SUPER_BLOCK, Form

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


class GGMLType(NamedTuple):
    """How values are stored: `block` of them, neighbours in a row, take `block_bytes`."""

    code: int
    name: str
    block: int
    block_bytes: int
    dtype: torch.dtype | None = None
    """The torch dtype of a type that is not quantised."""


GGML_TYPES: dict[int, GGMLType] = {
    kind.code: kind
    for kind in (
        GGMLType(0, "F32", 1, 4, torch.float32),
        GGMLType(1, "F16", 1, 2, torch.float16),
        GGMLType(30, "BF16", 1, 2, torch.bfloat16),
        GGMLType(2, "Q4_0", 32, 18),
        GGMLType(3, "Q4_1", 32, 20),
        GGMLType(6, "Q5_0", 32, 22),
        GGMLType(7, "Q5_1", 32, 24),
        GGMLType(8, "Q8_0", 32, 34),
        GGMLType(10, "Q2_K", 256, 84),
        GGMLType(11, "Q3_K", 256, 110),
        GGMLType(12, "Q4_K", 256, 144),
        GGMLType(13, "Q5_K", 256, 176),
        GGMLType(14, "Q6_K", 256, 210),
        GGMLType(16, "IQ2_XXS", 256, 66),
        GGMLType(17, "IQ2_XS", 256, 74),
        GGMLType(22, "IQ2_S", 256, 82),
        GGMLType(18, "IQ3_XXS", 256, 98),
        GGMLType(21, "IQ3_S", 256, 110),
        GGMLType(19, "IQ1_S", 256, 50),
        GGMLType(29, "IQ1_M", 256, 56),
        GGMLType(20, "IQ4_NL", 32, 18),
        GGMLType(23, "IQ4_XS", 256, 136),
        GGMLType(34, "TQ1_0", 256, 54),
        GGMLType(35, "TQ2_0", 256, 66),
        GGMLType(39, "MXFP4", 32, 17),
    )
}


def type_name(code: int) -> str:
    """GGML's name of a type, known to this module or not."""
    from gguf.constants import GGMLQuantizationType

    try:
        return str(GGMLQuantizationType(code).name)
    except ValueError:
        return f"GGML type {code}"


def decode(data: Tensor, kind: GGMLType, out: Tensor | None = None) -> Tensor:
    """data [r, bytes] uint8 -> values [r, c]: a view in the type's own dtype, or for quantised types float32.

    With `out` (float32, contiguous) the values are written there.
    """
    if kind.dtype is not None:
        stored = data.view(kind.dtype)
        return stored if out is None else out.copy_(stored)
    rows, blocks = data.shape[0], data.shape[1] // kind.block_bytes
    values = torch.empty(rows, blocks * kind.block) if out is None else out
    raw = data.numpy()
    if kind.name in _FAST:
        _FAST[kind.name](raw.reshape(-1, kind.block_bytes), values.view(-1, kind.block).numpy())
    else:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        values.copy_(torch.from_numpy(dequantize(raw, GGMLQuantizationType(kind.code))))
    return values


def _half(blocks: Bytes, column: int) -> Floats:
    """The float16 at byte `column` of each block: [n, bytes] -> [n, 1]."""
    return blocks[:, column : column + 2].view(np.float16).astype(np.float32)


def _q4_0(blocks: Bytes, out: Floats) -> None:
    """[n, 18] -> [n, 32]: scale, 16 bytes of two 4-bit values (first half low, second half high), x = d (q - 8)."""
    nibbles = blocks[:, 2:]
    out[:, :16] = nibbles & 15
    out[:, 16:] = nibbles >> 4
    out -= 8
    out *= _half(blocks, 0)


def _q4_1(blocks: Bytes, out: Floats) -> None:
    """[n, 20] -> [n, 32]: scale, minimum, 4-bit values as in Q4_0, x = d q + m."""
    nibbles = blocks[:, 4:]
    out[:, :16] = nibbles & 15
    out[:, 16:] = nibbles >> 4
    out *= _half(blocks, 0)
    out += _half(blocks, 2)


def _q8_0(blocks: Bytes, out: Floats) -> None:
    """[n, 34] -> [n, 32]: scale, 32 signed bytes, x = d q."""
    out[...] = blocks[:, 2:].view(np.int8)
    out *= _half(blocks, 0)


_FAST: dict[str, Callable[[Any, Any], None]] = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q8_0": _q8_0}


FORMS = {
    "Q4_0": Form(4, 32, "zero"),
    "Q4_1": Form(4, 32, "minima"),
    "Q5_0": Form(5, 32, "zero"),
    "Q5_1": Form(5, 32, "minima"),
    "Q8_0": Form(8, 32, "zero"),
    "Q4_K": Form(4, 32, "minima", 1, SUPER_BLOCK),
    "Q5_K": Form(5, 32, "minima", 1, SUPER_BLOCK),
    "Q6_K": Form(6, 16, "zero", 1, SUPER_BLOCK),
}
"""Types whose blocks `kernels.packed` holds as they are. Q2_K and Q3_K are not among them: no kernel is made for 2 or 3 bits in groups
of 16."""


def repack(data: Tensor, kind: GGMLType) -> Packed:
    """Rows of whole blocks, data [r, bytes] uint8, of a type in `FORMS`."""
    blocks = data.view(data.shape[0], -1, kind.block_bytes)
    form = FORMS[kind.name]
    if form.super_block:
        return _q6_k(blocks) if kind.name == "Q6_K" else _q45_k(blocks, form.bits)
    halves = 2 if form.level == "minima" else 1
    heads = blocks[..., : 2 * halves].contiguous().view(torch.float16)
    rest = blocks[..., 2 * halves :]
    low = rest[..., -16:]
    codes = rest ^ 128 if form.bits == 8 else torch.cat([low & 15, low >> 4], dim=-1)  # signed bytes as unsigned ones
    if form.bits == 5:  # of which a word has the high bits, from the first column's up
        codes |= (rest[..., :4, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(2) << 4
    minima = heads[..., 1] if form.level == "minima" else None
    return pack(codes.flatten(1), heads[..., 0], form.bits, form.group, minima=minima, zero=1 << form.bits - 1)


def _q45_k(blocks: Tensor, bits: int) -> Packed:
    """[r, n, 144 or 176]: d and e, 12 bytes of eight scales and minima of 6 bits, of 5 bits 32 bytes of the columns' high bits, and 128
    of low ones, where a group of 32 has the low halves of its bytes and the next the high ones; x = d s q - e m. Codes of 4 bits lie as
    `codes` packs them."""
    each = blocks.shape[:2]
    first, second, mixed = blocks[..., 4:16].reshape(*each, 3, 4).unbind(2)
    scales = torch.cat([first & 63, mixed & 15 | first >> 2 & 48], dim=-1)
    minima = torch.cat([second & 63, mixed >> 4 | second >> 2 & 48], dim=-1)
    codes = blocks[..., -128:]
    if bits == 5:
        low = codes.reshape(*each, 4, 1, 32)
        high = blocks[..., None, 16:48] >> torch.arange(8, dtype=torch.uint8)[:, None] & 1  # [r, n, 8, 32]
        codes = pack_codes((torch.cat([low & 15, low >> 4], dim=-2).flatten(2, 3) | high << 4).flatten(1), 5)
    over = blocks[..., :4].contiguous().view(torch.float16)
    return pack_super(codes.flatten(1), scales.flatten(1), minima.flatten(1), over, bits)


def _q6_k(blocks: Tensor) -> Packed:
    """[r, n, 210]: 128 bytes of low bits, 64 for 64 columns in their low halves and the next 64 in their high ones, 64 of two high
    bits, 32 for four times 32 columns, 16 signed scales, d; x = d s (q - 32)."""
    each = blocks.shape[:2]
    low = blocks[..., :128].reshape(*each, 2, 1, 64)
    high = blocks[..., 128:192].reshape(*each, 2, 1, 32) >> torch.arange(0, 8, 2, dtype=torch.uint8)[:, None] & 3
    codes = torch.cat([low & 15, low >> 4], dim=-2).flatten(2) | high.flatten(2) << 4
    scales, over = blocks[..., 192:208].contiguous().view(torch.int8), blocks[..., 208:].contiguous().view(torch.float16)
    return pack_super(pack_codes(codes.flatten(1), 6), scales.flatten(1), None, over, 6, zero=32)
