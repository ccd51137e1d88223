"""One linear layer of quantised weights: where its tensors lie and how they are packed. `packed_source` has the formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rowcast.errors import UserError
from rowcast.kernels.packed import Packed, pack, stacked
from rowcast.kernels.packed_sizes import Form
from rowcast.runtime.checkpoint.packing import Packing

WORD = 32
"""Bits of a word of codes."""
_ELEMENTS = 1 << 20
"""Of codes that are packed anew at once."""
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Of eight outputs, output c lies in the nibble AWQ_ORDER[c] of their word."""


class Tensors(Protocol):
    """A part of `Source`."""

    def __contains__(self, name: str) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, rows: slice | None = None, cols: slice | None = None) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Layer:
    """A weight [N, K]: scale * (code - zero point)."""

    tensors: Tensors
    stem: str
    packing: Packing
    shape: tuple[int, int]
    num_groups: int

    @staticmethod
    def of(tensors: Tensors, stem: str, packing: Packing) -> Layer:
        """Raises UserError where the layer's tensors do not go together."""
        codes, scales = tensors.shape(f"{stem}.{packing.codes}"), tensors.shape(f"{stem}.{packing.scales}")
        if len(codes) != 2 or len(scales) != 2:
            raise _unlike(stem, packing, codes, scales)
        held = WORD // packing.bits if packing.packed else 1  # 3 bits: 32 of them in 3 words
        if packing.along_outputs:
            inputs, outputs = codes[0], codes[1] * held
        else:
            across, outputs = codes if packing.inputs_first else (codes[1], codes[0])
            inputs = across * WORD // packing.bits if packing.packed else across
        groups, scaled = scales if packing.inputs_first else (scales[1], scales[0])
        if scaled != outputs:
            raise _unlike(stem, packing, codes, scales)
        stored = inputs
        inputs = _unpadded(tensors, stem, inputs)
        if packing.packed and not packing.along_outputs and stored != -(-inputs * packing.bits // WORD) * WORD // packing.bits:
            raise _unlike(stem, packing, codes, scales)  # early compressed-tensors filled words of 3 bits otherwise
        wanted = 1 if packing.group == -1 else -(-inputs // packing.group)
        if groups != wanted and f"{stem}.{packing.groups}" not in tensors:
            raise _unlike(stem, packing, codes, scales)
        _check_zeros(tensors, stem, packing, outputs, groups)
        return Layer(tensors, stem, packing, (outputs, inputs), groups)

    def weight(self, outputs: range, inputs: range) -> Tensor:
        """A part of the weight, float32 [n, k]."""
        of = self._group_of(inputs)
        first, last = (int(of.min()), int(of.max()) + 1) if len(inputs) else (0, 0)
        scales, zeros = self._scales(outputs, range(first, last)), self._zeros(outputs, range(first, last))
        of = of - first
        codes = self._codes(outputs, inputs)
        if zeros is None:
            return (codes - self.packing.zero).float().mul_(scales[:, of])
        return (codes - zeros[:, of]).float().mul_(scales[:, of])

    def form(self) -> Form | str:
        """In which `kernels.packed` holds it as it is, or why it cannot."""
        name, packing = f"{self.stem}.{self.packing.groups}", self.packing
        if name in self.tensors:
            size = self.shape[1] if packing.group == -1 else packing.group
            if not torch.equal(self.tensors.read(name).long(), torch.arange(self.shape[1]) // size):
                return "its inputs are grouped in the order of their activations"
        stored = f"{self.stem}.{packing.zeros}" in self.tensors
        width = self.tensors.read(f"{self.stem}.{packing.scales}", slice(0, 1), slice(0, 1)).itemsize
        return (
            packing.form(self.shape[1], zeros=stored, scale_bytes=width)
            or f"groups of {packing.group} inputs are not held packed"
        )

    def packed(self, outputs: range, inputs: range) -> Packed:
        """A part of the weight as it is packed. Precondition: `form` found one, and inputs begin and end where groups do."""
        group, bits = self.packing.group, self.packing.bits
        groups = range(1) if group == -1 else range(inputs.start // group, -(-inputs.stop // group))
        raised = 0 if self.packing.packed else 1 << bits - 1  # signed codes
        height = max(WORD, _ELEMENTS // max(1, len(inputs)) // WORD * WORD)  # whole words, where outputs share them
        parts = []
        for top in range(outputs.start, outputs.stop, height):
            part = range(top, min(top + height, outputs.stop))
            zeros = self._zeros(part, groups)
            codes = (self._codes(part, inputs) + raised).to(torch.uint8)
            scales = self._part(self.packing.scales, part, groups).contiguous()
            whole = None if zeros is None else (zeros + raised).to(torch.uint8)
            parts.append(pack(codes, scales, bits, group, zeros=whole, zero=self.packing.zero + raised))
        return stacked(parts)

    def _group_of(self, inputs: range) -> Tensor:  # int64 [k]
        name = f"{self.stem}.{self.packing.groups}"
        if name in self.tensors:
            found = self.tensors.read(name, slice(inputs.start, inputs.stop)).long()
            if len(found) and not 0 <= int(found.min()) <= int(found.max()) < self.num_groups:
                raise UserError(f"{name} names a group outside 0 to {self.num_groups - 1}: fetch the checkpoint again")
            return found
        if self.packing.group == -1:
            return torch.zeros(len(inputs), dtype=torch.int64)
        return torch.arange(inputs.start, inputs.stop) // self.packing.group

    def _scales(self, outputs: range, groups: range) -> Tensor:  # float32 [n, g]
        return self._part(self.packing.scales, outputs, groups).float()

    def _zeros(self, outputs: range, groups: range) -> Tensor | None:  # int32 [n, g]
        packing = self.packing
        if f"{self.stem}.{packing.zeros}" not in self.tensors:
            return None
        if not packing.packed:
            return self._part(packing.zeros, outputs, groups).int()
        words, skipped = _words(outputs, packing.bits)
        stored = self._part(packing.zeros, words, groups)  # [w, g]
        found = self._unpacked(stored.T, skipped, len(outputs)).T
        return (found + packing.zero_offset) & ((1 << packing.bits) - 1)

    def _codes(self, outputs: range, inputs: range) -> Tensor:  # int32 [n, k]
        packing = self.packing
        if not packing.packed:
            return self._part(packing.codes, outputs, inputs).int()
        if packing.along_outputs:
            words, skipped = _words(outputs, packing.bits)
            return self._unpacked(self._part(packing.codes, words, inputs).T, skipped, len(outputs)).T
        words, skipped = _words(inputs, packing.bits)
        return self._unpacked(self._part(packing.codes, outputs, words), skipped, len(inputs))

    def _unpacked(self, words: Tensor, skipped: int, count: int) -> Tensor:
        # int32 [r, w] -> int32 [r, count]
        return unpack(words, self.packing.bits, interleaved=self.packing.method == "awq")[:, skipped : skipped + count]

    def _part(self, suffix: str, outputs: range, inputs: range) -> Tensor:
        """[n, k] of a tensor that lies either way round."""
        down, across = slice(outputs.start, outputs.stop), slice(inputs.start, inputs.stop)
        name = f"{self.stem}.{suffix}"
        if self.packing.inputs_first:
            return self.tensors.read(name, across, down).T
        return self.tensors.read(name, down, across)


def unpack(words: Tensor, bits: int, *, interleaved: bool = False) -> Tensor:
    """Codes from words of 32 bits, lowest bits first, across words where they do not divide: int32 [r, w] -> int32 [r, 32 w / bits].

    `interleaved`: eight codes of 4 bits in AWQ's order. Precondition: w is a multiple of 3 where bits is 3.
    """
    mask = (1 << bits) - 1
    if WORD % bits == 0:
        shifts = torch.arange(0, WORD, bits, dtype=torch.int32)
        if interleaved:
            shifts = shifts[list(AWQ_ORDER)]
        return ((words[:, :, None] >> shifts) & mask).flatten(1)
    wide = words.long() & 0xFFFFFFFF
    start = torch.arange(0, words.shape[1] * WORD, bits)
    word, shift = start // WORD, start % WORD
    following = wide[:, (word + 1).clamp_max(words.shape[1] - 1)] << (WORD - shift)
    return (((wide[:, word] >> shift) | following) & mask).int()


def _words(codes: range, bits: int) -> tuple[range, int]:
    """The words that hold them, whole runs of words for 3 bits; and how many codes of the first one come before."""
    run = WORD if WORD % bits else WORD // bits
    per_run = run * bits // WORD
    first, last = codes.start // run, -(-codes.stop // run)
    return range(first * per_run, last * per_run), codes.start - first * run


def _unpadded(tensors: Tensors, stem: str, inputs: int) -> int:
    """compressed-tensors says how many inputs there are; those behind them fill a word."""
    name = f"{stem}.weight_shape"
    if name not in tensors:
        return inputs
    found = int(tensors.read(name)[1]) if tensors.shape(name) == (2,) else 0
    if not 0 < found <= inputs:
        raise UserError(f"{name} says {found} inputs, the codes hold {inputs}: fetch the checkpoint again")
    return found


def _check_zeros(tensors: Tensors, stem: str, packing: Packing, outputs: int, groups: int) -> None:
    """Raises UserError for zero points that lie otherwise: early files of compressed-tensors have a byte for each."""
    name = f"{stem}.{packing.zeros}"
    if name not in tensors:
        return
    words = -(-outputs * packing.bits // WORD) if packing.packed else outputs
    wanted = (groups, words) if packing.inputs_first else (words, groups)
    if tensors.shape(name) != wanted:
        raise UserError(
            f"{name} has the shape {list(tensors.shape(name))}, not {list(wanted)}: use a checkpoint whose zero points are packed as "
            "its codes are"
        )


def _unlike(stem: str, packing: Packing, codes: tuple[int, ...], scales: tuple[int, ...]) -> UserError:
    return UserError(
        f"{stem}.{packing.codes} of shape {list(codes)} and {packing.scales} of shape {list(scales)} are not one layer of "
        f"{packing.bits} bits in groups of {packing.group}: correct quantization_config in config.json, or fetch the checkpoint again"
    )
