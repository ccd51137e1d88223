"""Quantised safetensors, as GPTQ, AWQ and compressed-tensors write them, as a `Source` of the weights that they stand for.

A linear layer of N outputs and K inputs lies in several tensors: codes of some bits, packed into words of 32 bits, a scale and mostly a
zero point for each output and group of inputs, of which there are G. Its weight [N, K] is scale * (code - zero point):

- GPTQ: `qweight` [K bits / 32, N], along K; `qzeros` [G, N bits / 32], along N, less 1 but in `gptq_v2`; `scales` [G, N]; `g_idx` [K].
- AWQ (gemm): `qweight` [K, N bits / 32], along N, interleaved; `qzeros` [G, N bits / 32], likewise; `scales` [G, N].
- compressed-tensors: `weight_packed` [N, K bits / 32], along K, or `weight`, int8; `weight_zero_point`, along N, or none;
  `weight_scale` [N, G]; `weight_g_idx` [K], or none.

Sources: the files of AutoGPTQ and GPTQModel, of AutoAWQ, and compressed-tensors' formats `pack-quantized` and `int-quantized`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rowcast.errors import UserError
from rowcast.kernels.packed import Packed
from rowcast.kernels.packed_sizes import Form
from rowcast.runtime.checkpoint.packed_layer import WORD, Layer
from rowcast.runtime.checkpoint.packing import Packing
from rowcast.runtime.checkpoint.safetensors_file import SafetensorsSource
from rowcast.runtime.checkpoint.slices import STAGE_BYTES, Window

_WIDE = 24
"""Bytes that one weight takes at most while it is unpacked."""


class PackedSource:
    """Implements `Source` and `PackedTensors`: quantised layers as what they stand for, in float32, or as they are; other tensors as
    they are stored."""

    def __init__(self, inner: SafetensorsSource, packing: Packing) -> None:
        """Reads no codes. Raises UserError where a layer's tensors do not go together."""
        self._inner = inner
        ending = f".{packing.codes}"
        stems = [name.removesuffix(ending) for name in inner.names() if name.endswith(ending)]
        stems = [stem for stem in stems if f"{stem}.{packing.scales}" in inner]
        if not stems:
            raise UserError(
                f"the config says that weights are quantised by {packing.method}, but no layer is: remove quantization_config from it"
            )
        self._layers = {f"{stem}.weight": Layer.of(inner, stem, packing) for stem in stems}
        suffixes = (packing.codes, packing.scales, packing.zeros, packing.groups, "weight_shape")
        parts = {f"{stem}.{suffix}" for stem in stems for suffix in suffixes}
        self._plain = {name: None for name in inner.names() if name not in parts}

    def names(self) -> Sequence[str]:
        return [*self._plain, *self._layers]

    def __contains__(self, name: str) -> bool:
        return name in self._layers or name in self._plain

    def shape(self, name: str) -> tuple[int, ...]:
        return self._layers[name].shape if name in self._layers else self._inner.shape(name)

    def read(self, name: str, rows: slice | None = None, cols: slice | None = None, *, out: Tensor | None = None) -> Tensor:
        layer = self._layers.get(name)
        if layer is None:
            return self._inner.read(name, rows, cols, out=out)
        window = Window.of(layer.shape, rows, cols)
        result, target = window.target(out, torch.float32)
        inputs = range(window.column, window.column + window.columns)
        height = max(
            WORD, STAGE_BYTES // (_WIDE * max(1, window.columns)) // WORD * WORD
        )  # whole words, where outputs share them
        for top in range(0, window.rows, height):
            last = min(top + height, window.rows)
            target[top:last].copy_(layer.weight(range(window.row + top, window.row + last), inputs))
        return result

    def form(self, name: str) -> Form | str:
        layer = self._layers.get(name)
        return "it is not quantised" if layer is None else layer.form()

    def packed(self, name: str, rows: slice, cols: slice) -> Packed:
        return self._layers[name].packed(range(rows.start, rows.stop), range(cols.start, cols.stop))

    def fingerprint(self) -> str:
        return self._inner.fingerprint()
