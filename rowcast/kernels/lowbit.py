"""Weights of 2, 3, 4 or 8 bits, and products with them: whole weights of a rung, and the proxies of HiRE-Q (arXiv 2402.09360).

A weight is scale * (code - (2^bits - 1) / 2), one float16 scale for a group of columns: symmetric, and 0 lies between two levels,
which at 2 bits is much closer than a level at 0 would be. Codes are unsigned: an operand of 8-bit dot products as they are.

Packing, for each block of 64 columns: byte j of 2 bits holds columns j, j + 16, j + 32, j + 48 from its low bits up; of 4 bits
columns j and j + 32; of 8 bits column j. 3 bits are the 16 bytes of the low 2 bits, then 8 bytes with the high bits, column 8 i + k
in bit k of byte i. Columns are padded with zeros to whole groups.

On a GPU products go to `kernels/gpu/lowbit.py`, some tokens at a time; with many tokens, a block of rows at a time is dequantised for
torch's product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ctypes import CDLL
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rowcast.errors import UserError
from rowcast.kernels import gpu, native, select
from rowcast.kernels.lowbit_sizes import BLOCK as BLOCK
from rowcast.kernels.lowbit_sizes import ELEMENTS_AT_ONCE
from rowcast.kernels.rows import ACTIVATION_CODES, ACTIVATIONS, ffn, library_for_tables

BITS = (2, 3, 4, 8)
INPUT_ROUNDING = 2.0**-12
"""Bound of |x - x'| / |x| for the input x' that `product` multiplies by: 16-bit fixed point, one scale for 64 columns."""
_ROWS_AT_ONCE = 2048
"""In float32 at the same time, at most, beside `ELEMENTS_AT_ONCE`."""
_CACHED_ELEMENTS = 1 << 20
"""Likewise while a CPU looks for scales: it goes over them dozens of times, from its cache."""
_MOST_COLUMNS = 1 << 15
"""Wider weights are torch's."""
_MOST_GPU_TOKENS = 256
"""With more, dequantising the weight once takes less time than reading its codes once for every `gpu.MOST_TOKENS` of them."""
_SMALLEST_SCALE = {2: 0.5, 3: 0.6, 4: 0.7, 8: 0.95}
"""Where the search begins, as a share of the scale that represents a group's largest weight."""
_CANDIDATES = 12


@dataclass(frozen=True, slots=True)
class LowBit:
    """A weight [rows, columns] in `bits` bits. codes uint8 [rows, padded * bits / 8], scales float16 [rows, padded / group]."""

    codes: Tensor
    scales: Tensor
    bits: int
    group: int
    columns: int

    @property
    def rows(self) -> int:
        return self.codes.shape[0]

    @property
    def padded(self) -> int:
        """Columns with the padding."""
        return self.scales.shape[1] * self.group

    @property
    def bytes(self) -> int:
        """Of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes


def quantise(weight: Tensor, bits: int, group: int = BLOCK) -> LowBit:
    """Round a weight [R, D] to nearest, each group with the scale of least squared error among some candidates.

    Raises UserError for bits other than 2, 3, 4, 8 and for a group that is not a multiple of 64.
    """
    if bits not in BITS:
        raise UserError(f"{bits} bits cannot be packed, use one of 2, 3, 4, 8")
    if group < BLOCK or group % BLOCK:
        raise UserError(f"a group of {group} columns cannot be packed, use a multiple of {BLOCK}")
    rows, columns = weight.shape
    padding = -columns % group
    codes = torch.empty(rows, (columns + padding) * bits // 8, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(rows, (columns + padding) // group, dtype=torch.float16, device=weight.device)
    piece = _rows_at_once(columns + padding, _CACHED_ELEMENTS if weight.device.type == "cpu" else ELEMENTS_AT_ONCE)
    for start in range(0, rows, piece):
        span = slice(start, start + piece)
        part = F.pad(weight[span].float(), (0, padding)).contiguous()
        grouped = part.view(part.shape[0], -1, group)
        scales[span] = scale = _best_scale(grouped, bits)
        codes[span] = _pack(_codes(grouped, scale, bits).flatten(1), bits)
    return LowBit(codes, scales, bits, group, columns)


def stacked(parts: Sequence[LowBit]) -> LowBit:
    """Their rows, one below the other; bits, groups and columns are the same."""
    first = parts[0]
    return LowBit(
        torch.cat([q.codes for q in parts]), torch.cat([q.scales for q in parts]), first.bits, first.group, first.columns
    )


def dequantise(q: LowBit) -> Tensor:
    """The weight that the codes stand for: float32 [R, D]."""
    return torch.cat([part for _, part in _dequantised(q)])


def product(
    q: LowBit, x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """x W^T with the dequantised weight, plus a bias [R] and a residual [T, R], which is not modified: [T, D] -> [T, R] in `dtype`.

    Natively x is in 16-bit fixed point, one scale for 64 columns: within 1e-4 of it; a block of columns whose largest is below 1e-33
    counts as 0. Where torch multiplies, a result that is wanted in the 16 bits of x is a product in them.
    """
    if _on_gpu(x):
        from rowcast.kernels.gpu import lowbit

        parts = torch.split(x, gpu.MOST_TOKENS)
        residuals = [None] * len(parts) if residual is None else torch.split(residual, gpu.MOST_TOKENS)
        return _joined([lowbit.product(q, p, bias, residual=r, dtype=dtype) for p, r in zip(parts, residuals, strict=True)])
    lib = _library(q, x)
    if lib is not None:
        out = _run(lib, q, x, None, 0)
    else:
        wide = x.to(dtype if dtype == x.dtype else torch.float32)
        out = torch.empty(x.shape[0], q.rows, dtype=dtype, device=x.device)
        for rows, part in _dequantised(q):
            out[:, rows] = F.linear(wide, part.to(wide.dtype))
    for term in (bias, residual):
        if term is not None:
            out.add_(term)
    return out.to(dtype)


def ffn_hidden(q: LowBit, bias: Tensor | None, x: Tensor, activation: str, gated: bool) -> Tensor:
    """What an MLP's neurons hand to its down projection, in the dtype of x: act(g) * u with the N rows of g and then the N of u in
    `q` where it is gated, else act(q x). x [T, D], bias [2 N] or [N] -> [T, N]."""
    if _on_gpu(x):
        from rowcast.kernels.gpu import lowbit

        return _joined([lowbit.ffn_hidden(q, part, activation, bias, gated) for part in torch.split(x, gpu.MOST_TOKENS)])
    act, hidden = ACTIVATIONS[activation], product(q, x, bias, dtype=x.dtype)
    if not gated:
        return act(hidden)
    gate, up = hidden.chunk(2, dim=1)
    return act(gate).mul_(up)


def gated_scores(q: LowBit, x: Tensor, norms: Tensor, activation: str) -> Tensor:  # [T, D], [N] -> float32 [T, N]
    """|act(g) * u| * norms, with the N rows of g and then the N of u in `q`: each neuron's contribution to a gated MLP's output."""
    if _on_gpu(x) and norms.dtype == torch.float32:
        from rowcast.kernels.gpu import lowbit

        return _joined([lowbit.gated_scores(q, part, norms, activation) for part in torch.split(x, gpu.MOST_TOKENS)])
    lib = _library(q, x)
    if lib is not None and norms.dtype == torch.float32:
        return _run(lib, q, x, norms.contiguous(), ACTIVATION_CODES[activation])
    gate, up = product(q, x).chunk(2, dim=1)
    return (ACTIVATIONS[activation](gate) * up).abs() * norms


def gated_ffn(
    q: LowBit, norms: Tensor, keep: int, gate: Tensor, up: Tensor, down: Tensor, x: Tensor, activation: str, shards: int = 8
) -> Tensor:
    """One token through a gated MLP's best `keep` neurons: `gated_scores`, `select.top_union` and `rows.ffn` in one native call.

    gate, up, down [N, D], q and norms as for `gated_scores`, x [1, D] -> [1, D].
    """
    assert x.shape == (1, q.columns) and q.rows == 2 * len(norms)
    assert gate.shape == up.shape == down.shape == (len(norms), q.columns)
    lib = library_for_tables(x, gate, up, down) if _library(q, x) is not None and norms.dtype == torch.float32 else None
    if lib is None:
        ids, own = select.top_union(gated_scores(q, x, norms, activation), keep, shards)
        return ffn(gate, up, None, down, x, ids, own, activation)
    total = norms.shape[0]
    select.check_keep(total, keep, shards)
    x, wide, norms = x.contiguous(), x.float().contiguous(), norms.contiguous()
    out, work = torch.empty_like(x), torch.empty(total * 13, dtype=torch.uint8)
    lib.rowcast_gated_ffn(
        x.dtype == torch.bfloat16,
        q.codes.data_ptr(),
        q.scales.data_ptr(),
        norms.data_ptr(),
        gate.data_ptr(),
        up.data_ptr(),
        down.data_ptr(),
        x.data_ptr(),
        wide.data_ptr(),
        out.data_ptr(),
        work.data_ptr(),
        gate.stride(0),
        up.stride(0),
        down.stride(0),
        q.columns,
        total,
        keep,
        shards,
        q.padded // BLOCK,
        q.group // BLOCK,
        q.bits,
        ACTIVATION_CODES[activation],
        native.threads(),
    )
    return out


def _on_gpu(x: Tensor) -> bool:
    return x.shape[0] <= _MOST_GPU_TOKENS and gpu.takes(x[: gpu.MOST_TOKENS])


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _library(q: LowBit, x: Tensor) -> CDLL | None:
    """For any number of tokens, so that a token's products do not depend on how many others there are."""
    return native.library() if x.device.type == "cpu" and len(x) and q.padded <= _MOST_COLUMNS else None


def _run(lib: CDLL, q: LowBit, x: Tensor, norms: Tensor | None, activation: int) -> Tensor:
    x = x.float().contiguous()
    assert x.shape[1] == q.columns and (norms is None or norms.shape == (q.rows / 2,))
    tokens, blocks = x.shape[0], q.padded // BLOCK
    out = torch.empty(tokens, q.rows if norms is None else norms.shape[0])
    for start in range(0, tokens, native.MOST_TOKENS):
        lib.rowcast_lowbit(
            q.codes.data_ptr(),
            q.scales.data_ptr(),
            x[start].data_ptr(),
            native.address(norms),
            out[start].data_ptr(),
            min(native.MOST_TOKENS, tokens - start),
            q.columns,
            q.rows,
            blocks,
            q.group // BLOCK,
            q.bits,
            activation,
            native.threads(),
        )
    return out


def _dequantised(q: LowBit) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows, so that no second weight is ever whole in memory."""
    middle, piece = ((1 << q.bits) - 1) / 2, _rows_at_once(q.padded, ELEMENTS_AT_ONCE)
    for start in range(0, q.rows, piece):
        rows = slice(start, min(start + piece, q.rows))
        levels = _unpack(q.codes[rows], q.bits).float().sub_(middle).view(rows.stop - start, -1, q.group)
        part = levels.mul_(q.scales[rows, :, None]).flatten(1)
        yield rows, part[:, : q.columns]


def _rows_at_once(columns: int, elements: int) -> int:
    return max(1, min(_ROWS_AT_ONCE, elements // max(1, columns)))


def _codes(grouped: Tensor, scale: Tensor, bits: int) -> Tensor:  # [R, G, group], [R, G] -> uint8 [R, G, group]
    return _levels(grouped, scale.float()[:, :, None], bits, torch.empty_like(grouped)).to(torch.uint8)


def _levels(grouped: Tensor, scale: Tensor, bits: int, out: Tensor) -> Tensor:
    """The nearest levels as numbers from 0, written to `out`: [R, G, group] with the float32 scales [R, G, 1]."""
    torch.div(grouped, scale.clamp_min(torch.finfo(torch.float32).tiny), out=out)
    return out.add_((1 << bits - 1) - 0.5).round_().clamp_(0, (1 << bits) - 1)


def _best_scale(grouped: Tensor, bits: int) -> Tensor:  # [R, G, group] -> float16 [R, G]
    middle = ((1 << bits) - 1) / 2
    largest = grouped.abs().amax(-1) / middle
    best, least, work = largest.half(), torch.full_like(largest, torch.inf), torch.empty_like(grouped)
    for share in torch.linspace(_SMALLEST_SCALE[bits], 1.0, _CANDIDATES).tolist():
        scale = (largest * share).half()
        wide = scale.float()[:, :, None]
        off = _levels(grouped, wide, bits, work).sub_(middle).mul_(wide).sub_(grouped)
        error = off.square_().sum(-1)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


def _pack(codes: Tensor, bits: int) -> Tensor:  # uint8 [R, padded] -> uint8 [R, padded * bits / 8]
    blocks = codes.view(codes.shape[0], -1, BLOCK)
    if bits == 3:
        high = (blocks >> 2).view(*blocks.shape[:2], 8, 8) << torch.arange(8, dtype=torch.uint8, device=codes.device)
        packed = torch.cat([_fold(blocks & 3, 2), high.sum(-1, dtype=torch.uint8)], dim=-1)
    else:
        packed = _fold(blocks, bits)
    return packed.flatten(1)


def _unpack(packed: Tensor, bits: int) -> Tensor:  # uint8 [R, padded * bits / 8] -> uint8 [R, padded]
    blocks = packed.view(packed.shape[0], -1, BLOCK * bits // 8)
    if bits == 3:
        high = (blocks[..., 16:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
        return (_unfold(blocks[..., :16], 2) | (high.flatten(2) << 2)).flatten(1)
    return _unfold(blocks, bits).flatten(1)


def _fold(blocks: Tensor, bits: int) -> Tensor:  # uint8 [R, B, 64] -> uint8 [R, B, 8 * bits]
    parts = blocks.view(*blocks.shape[:2], 8 // bits, -1)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=blocks.device)
    return (parts << shifts[:, None]).sum(2, dtype=torch.uint8)


def _unfold(packed: Tensor, bits: int) -> Tensor:  # uint8 [R, B, 8 * bits] -> uint8 [R, B, 64]
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed[:, :, None] >> shifts[:, None]) & ((1 << bits) - 1)).flatten(2)
