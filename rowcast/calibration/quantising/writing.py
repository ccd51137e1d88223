"""A quantised checkpoint on disk, in compressed-tensors' format `pack-quantized`, which Transformers and the engine open."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rowcast.calibration.learning.module import as_others
from rowcast.calibration.quantising.gptq import Rounded
from rowcast.runtime.checkpoint.packed_layer import WORD
from rowcast.runtime.checkpoint.safetensors_file import INDEX_FILE, SINGLE_FILE

SHARD_BYTES = 4 << 30


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor that is to be written."""

    name: str
    nbytes: int
    read: Callable[[], Tensor]


def packed_tensors(stem: str, rounded: Rounded) -> dict[str, Tensor]:
    """A weight's tensors by their names."""
    rows, columns = rounded.codes.shape
    return {
        f"{stem}.weight_packed": words(rounded.codes, rounded.bits),
        f"{stem}.weight_scale": rounded.scales.contiguous(),
        f"{stem}.weight_zero_point": words(rounded.zeros.T, rounded.bits).T.contiguous(),
        f"{stem}.weight_shape": torch.tensor([rows, columns]),
    }


def words(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [r, n] one after the other in words of 32 bits, lowest bits first: int32 [r, ceil(n bits / 32)]."""
    rows, count = codes.shape
    length = -(-count * bits // WORD)
    places = torch.arange(WORD, device=codes.device)
    found = []
    for part in torch.split(codes, max(1, (1 << 22) // max(1, count * bits))):
        stream = ((part[..., None] >> torch.arange(bits, dtype=torch.uint8, device=codes.device)) & 1).flatten(1)
        stream = torch.nn.functional.pad(stream, (0, length * WORD - count * bits))
        whole = (stream.view(len(part), length, WORD).long() << places).sum(-1)
        found.append(torch.where(whole >= 1 << WORD - 1, whole - (1 << WORD), whole).int())
    return torch.cat(found) if rows else codes.new_empty((0, length), dtype=torch.int32)


def quantization_config(bits: int, group: int, ignored: Sequence[str]) -> dict[str, Any]:
    """Of config.json. `ignored`: modules with a matrix that stays whole."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": group,
        "dynamic": False,
        "actorder": "static",
    }
    scheme = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": "pack-quantized",
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": list(ignored),
        "kv_cache_scheme": None,
    }


def write_tensors(folder: Path, tensors: Iterable[Stored]) -> None:
    """One file, or shards with an index. No more than a shard is in memory."""
    shards: list[list[Stored]] = [[]]
    room = SHARD_BYTES
    for each in tensors:
        if shards[-1] and each.nbytes > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(each)
        room -= each.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({each.name: each.read().cpu().contiguous() for each in shard}, folder / file, {"format": "pt"})
        as_others(folder / file)
        weight_map |= {each.name: file for each in shard}
    if len(shards) > 1:
        total = sum(each.nbytes for shard in shards for each in shard)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
