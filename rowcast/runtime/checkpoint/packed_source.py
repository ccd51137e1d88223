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

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rowcast.errors import UserError
from rowcast.runtime.checkpoint.packed_layer import WORD, Layer, Packing
from rowcast.runtime.checkpoint.safetensors_file import SafetensorsSource
from rowcast.runtime.checkpoint.slices import STAGE_BYTES, Window

_MOST_GROUP = 1 << 20
_WIDE = 24
"""Bytes that one weight takes at most while it is unpacked."""


def packing_of(config: Mapping[str, Any]) -> Packing:
    """From a config's `quantization_config`. Raises UserError for a method or a variant that is not read."""
    found = config.get("quantization_config")
    method = found.get("quant_method") if isinstance(found, Mapping) else found
    parse = _METHODS.get(method) if isinstance(method, str) else None
    if parse is None or not isinstance(found, Mapping):
        raise _refused(f"weights quantised by {method!r:.60}")
    return parse(found)


def _gptq(found: Mapping[str, Any]) -> Packing:
    if found.get("dynamic"):
        raise _refused("GPTQ weights whose layers differ in their settings (`dynamic`)")
    layout = found.get("checkpoint_format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        raise _refused(f"GPTQ weights in the layout {layout!r:.40}")
    bits, group = _choice(found, "bits", (2, 3, 4, 8)), _group(found, "group_size")
    return Packing("gptq", bits, group, "qweight", "scales", "qzeros", "g_idx", True, 1 << bits - 1, int(layout == "gptq"))


def _awq(found: Mapping[str, Any]) -> Packing:
    version = str(found.get("version", "gemm")).lower()
    if version != "gemm":
        raise _refused(f"AWQ weights of the version {version!r:.40}")
    bits = _choice(found, "w_bit" if "w_bit" in found else "bits", (4,))
    group = _group(found, "q_group_size" if "q_group_size" in found else "group_size")
    return Packing("awq", bits, group, "qweight", "scales", "qzeros", "g_idx", True, 0)


def _compressed(found: Mapping[str, Any]) -> Packing:
    groups = found.get("config_groups")
    schemes = [each for each in groups.values() if isinstance(each, Mapping)] if isinstance(groups, Mapping) else []
    weights = schemes[0].get("weights") if len(schemes) == 1 else None
    layout = (schemes[0].get("format") if len(schemes) == 1 else None) or found.get("format")
    if (
        layout not in ("pack-quantized", "int-quantized")
        or not isinstance(weights, Mapping)
        or weights.get("type", "int") != "int"
    ):
        raise _refused(f"compressed-tensors weights of the format {layout!r:.40} with {len(schemes)} schemes")
    if schemes[0].get("input_activations") is not None or schemes[0].get("output_activations") is not None:
        raise _refused("compressed-tensors weights whose activations are quantised, too")
    packed = layout == "pack-quantized"
    bits = _choice(weights, "num_bits", (4, 8) if packed else (8,))
    group = -1 if weights.get("group_size") is None else _group(weights, "group_size")
    return Packing(
        "compressed-tensors",
        bits,
        group,
        "weight_packed" if packed else "weight",
        "weight_scale",
        "weight_zero_point",
        "weight_g_idx",
        False,
        1 << bits - 1 if packed else 0,
        packed=packed,
    )


_METHODS: dict[str, Callable[[Mapping[str, Any]], Packing]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
}


class PackedSource:
    """Implements `Source`: quantised layers as what they stand for, in float32; other tensors as they are stored."""

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

    def fingerprint(self) -> str:
        return self._inner.fingerprint()


def _choice(found: Mapping[str, Any], key: str, known: tuple[int, ...]) -> int:
    value = found.get(key)
    if value not in known or not isinstance(value, int):
        raise _refused(f"quantised weights with {key} {value!r:.40} (known: {', '.join(map(str, known))})")
    return value


def _group(found: Mapping[str, Any], key: str) -> int:
    value = found.get(key, 128)
    if not isinstance(value, int) or not (value == -1 or 1 <= value <= _MOST_GROUP):
        raise _refused(f"quantised weights with {key} {value!r:.40}")
    return value


def _refused(what: str) -> UserError:
    return UserError(
        f"{what} are not read: use float32, float16 or bfloat16 safetensors, a GGUF file, or 2- to 8-bit weights of GPTQ, 4-bit ones "
        "of AWQ (gemm), or weight-only ones of compressed-tensors (pack-quantized or int-quantized)"
    )
