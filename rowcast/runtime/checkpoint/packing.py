"""What a config's `quantization_config` says of how a checkpoint's layers are packed. Torch-free; `packed_source` has the formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rowcast.errors import UserError
from rowcast.kernels.packed_sizes import Form, fits

_MOST_GROUP = 1 << 20


@dataclass(frozen=True, slots=True)
class Packing:
    """How a checkpoint's layers are packed; what is called by a suffix is the tensor NAME.suffix."""

    method: Literal["gptq", "awq", "compressed-tensors"]
    bits: int
    group: int
    """Inputs that share a scale; -1: all of them."""
    codes: str
    scales: str
    zeros: str
    groups: str
    """The group of each input, if a layer has this tensor."""
    inputs_first: bool
    """Codes are [inputs, outputs], scales and zero points [groups, outputs]; else the other way round."""
    zero: int
    """The zero point, where none is stored."""
    zero_offset: int = 0
    """What is added to a stored one."""
    stored_zeros: bool = True
    """Whether the config says that zero points are stored; the tensors decide."""
    packed: bool = True
    """Codes and zero points lie in words of 32 bits; else each is a number of its own."""

    @property
    def along_outputs(self) -> bool:
        """Whether a word of codes holds those of several outputs."""
        return self.method == "awq"

    def form(self, inputs: int, *, zeros: bool | None = None, scale_bytes: int = 2) -> Form | None:
        """In which `kernels.packed` holds a layer of so many inputs as it is; None: it cannot. `zeros`: whether zero points are stored;
        None: as the config says."""
        if not fits(self.group, inputs):
            return None
        stored = self.stored_zeros if zeros is None else zeros
        return Form(self.bits, self.group, "zeros" if stored else "zero", scale_bytes)


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
    bits = _choice(weights, "num_bits", (2, 3, 4, 8) if packed else (8,))
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
        stored_zeros=not weights.get("symmetric", True),
        packed=packed,
    )


_METHODS: dict[str, Callable[[Mapping[str, Any]], Packing]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
}


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
