"""Weights of 2, 3, 4 or 8 bits, and products with them: whole weights of a rung, and the proxies of HiRE-Q (arXiv 2402.09360).

A weight is scale * (code - (2^bits - 1) / 2), one float16 scale for a group of columns: symmetric, and 0 lies between two levels,
which at 2 bits is much closer than a level at 0 would be. Codes are unsigned: an operand of 8-bit dot products as they are.

Codes lie as `codes` packs them, columns padded with zeros to whole groups. On a GPU products go to `kernels/gpu/lowbit.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ctypes import CDLL
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rowcast.errors import UserError
from rowcast.kernels import codes, native, select
from rowcast.kernels.lowbit_sizes import BLOCK as BLOCK
from rowcast.kernels.lowbit_sizes import ELEMENTS_AT_ONCE
from rowcast.kernels.rows import ACTIVATION_CODES, ffn, library_for_tables

BITS = (2, 3, 4, 8)
INPUT_ROUNDING = 2.0**-12
"""Bound of |x - x'| / |x| for the input x' that `product` multiplies by: 16-bit fixed point, one scale for 64 columns."""
_CACHED_ELEMENTS = 1 << 20
"""In float32 at the same time, at most, while a CPU looks for scales: it goes over them dozens of times, from its cache."""
_MOST_COLUMNS = 1 << 15
"""Wider weights are torch's."""
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
    packed = torch.empty(rows, (columns + padding) * bits // 8, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(rows, (columns + padding) // group, dtype=torch.float16, device=weight.device)
    elements = _CACHED_ELEMENTS if weight.device.type == "cpu" else ELEMENTS_AT_ONCE
    for span in codes.row_blocks(rows, columns + padding, elements):
        part = F.pad(weight[span].float(), (0, padding)).contiguous()
        grouped = part.view(part.shape[0], -1, group)
        scales[span] = scale = _best_scale(grouped, bits)
        packed[span] = codes.pack(_codes(grouped, scale, bits).flatten(1), bits)
    return LowBit(packed, scales, bits, group, columns)


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
    if codes.on_gpu(x):
        from rowcast.kernels.gpu import lowbit

        return codes.in_parts(lambda part, added: lowbit.product(q, part, bias, residual=added, dtype=dtype), x, residual)
    lib = library_for(q, x)
    out = codes.by_torch(_dequantised(q), q.rows, x, dtype) if lib is None else _run(lib, q, x, None, 0)
    return codes.finished(out, bias, residual, dtype)


def ffn_hidden(q: LowBit, bias: Tensor | None, x: Tensor, activation: str, gated: bool) -> Tensor:
    """What an MLP's neurons hand to its down projection, in the dtype of x: act(g) * u with the N rows of g and then the N of u in
    `q` where it is gated, else act(q x). x [T, D], bias [2 N] or [N] -> [T, N]."""
    if codes.on_gpu(x):
        from rowcast.kernels.gpu import lowbit

        return codes.in_parts(lambda part, _: lowbit.ffn_hidden(q, part, activation, bias, gated), x)
    return codes.activated(product(q, x, bias, dtype=x.dtype), activation, gated)


def gated_scores(q: LowBit, x: Tensor, norms: Tensor, activation: str) -> Tensor:  # [T, D], [N] -> float32 [T, N]
    """|act(g) * u| * norms, with the N rows of g and then the N of u in `q`: each neuron's contribution to a gated MLP's output."""
    if codes.on_gpu(x) and norms.dtype == torch.float32:
        from rowcast.kernels.gpu import lowbit

        return codes.in_parts(lambda part, _: lowbit.gated_scores(q, part, norms, activation), x)
    lib = library_for(q, x)
    if lib is not None and norms.dtype == torch.float32:
        return _run(lib, q, x, norms.contiguous(), ACTIVATION_CODES[activation])
    return codes.activated(product(q, x), activation, gated=True).abs() * norms


def gated_ffn(
    q: LowBit, norms: Tensor, keep: int, gate: Tensor, up: Tensor, down: Tensor, x: Tensor, activation: str, shards: int = 8
) -> Tensor:
    """One token through a gated MLP's best `keep` neurons: `gated_scores`, `select.top_union` and `rows.ffn` in one native call.

    gate, up, down [N, D], q and norms as for `gated_scores`, x [1, D] -> [1, D].
    """
    assert x.shape == (1, q.columns) and q.rows == 2 * len(norms)
    assert gate.shape == up.shape == down.shape == (len(norms), q.columns)
    lib = library_for_tables(x, gate, up, down) if library_for(q, x) is not None and norms.dtype == torch.float32 else None
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


def library_for(q: LowBit, x: Tensor) -> CDLL | None:
    """The native part where it multiplies x [T, D] with this weight: whatever the number of tokens, so that a token's products do not
    depend on how many others there are."""
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
    return codes.dequantised(q.codes, q.scales, q.bits, q.group, q.columns, ((1 << q.bits) - 1) / 2)


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
