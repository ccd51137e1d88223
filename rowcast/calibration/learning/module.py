"""Between checkpoints and Transformers' modules: weights read by slice, never unpickled; no code of a checkpoint runs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rowcast.calibration.learning.attention import without_masks
from rowcast.errors import UserError
from rowcast.runtime.checkpoint import Checkpoint
from rowcast.runtime.checkpoint.safetensors_file import INDEX_FILE, SINGLE_FILE
from rowcast.runtime.config import ADAPTED
from rowcast.runtime.device import DTYPES
from rowcast.runtime.tokenizer import load_tokenizer

SHARD_BYTES = 4 << 30
_OF_A_CHECKPOINT = ("quantization_config", ADAPTED)
"""Of a config, what its weights on disk are like: what is trained or cut has others."""
_OTHER_FILES = ("model*.safetensors", INDEX_FILE, "config.json", "generation_config.json", "*.gguf", "*.bin", "*.pt", "*.pth")
"""Of a checkpoint's directory, what is not its tokenizer."""
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "*.jinja")


def make_module(config: Mapping[str, Any], dtype: torch.dtype, device: torch.device | str) -> Any:
    """A Transformers model (`PreTrainedModel`) of a config.json, with the library's own initial weights, for evaluation
    over whole windows (`attention`).

    Without what the config says of a checkpoint's own weights: how they are quantised, what adapting measured.
    Draws from torch's global generator. Raises UserError where Transformers does not know the config.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        known = AutoConfig.for_model(**{key: value for key, value in config.items() if key not in _OF_A_CHECKPOINT})
        with torch.device(device):
            module = AutoModelForCausalLM.from_config(known, dtype=dtype, trust_remote_code=False).eval()
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"Transformers makes no model of this config ({str(error).splitlines()[0]:.200})") from error
    without_masks(module)
    return module


def load_module(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | str) -> Any:
    """The checkpoint as a Transformers model (`PreTrainedModel`), for evaluation: safetensors, GGUF or packed weights.

    Raises UserError where a tensor is missing or has another shape than the config says.
    """
    module = make_module(checkpoint.config, dtype, device)
    source, prefix = checkpoint.source, f"{module.base_model_prefix}."
    with torch.no_grad():
        for name, tensor in stored_tensors(module):
            stored = name if name in source else name.removeprefix(prefix)
            if stored not in source:
                raise UserError(
                    f"{checkpoint.path} has no tensor {name}, which its config calls for: use a complete copy of the model"
                )
            if source.shape(stored) != tuple(tensor.shape):
                raise UserError(
                    f"tensor {stored} has shape {list(source.shape(stored))}, its config calls for {list(tensor.shape)}: take "
                    "config.json and weights from the same copy of the model"
                )
            if tensor.device.type == "cpu":
                source.read(stored, out=tensor)
            else:
                tensor.copy_(source.read(stored))
    return module


def stored_tensors(module: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint of it holds: parameters, each once, and persistent buffers."""
    kept = module.state_dict(keep_vars=True)
    seen: set[int] = set()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name in kept and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor.detach()


def save_module(
    module: Any, tokenizer_from: Checkpoint | None, output: Path, metadata: Mapping[str, str], dtype: torch.dtype
) -> None:
    """Write an ordinary checkpoint directory, which the engine and Transformers open: whole or not at all.

    config.json, safetensors shards with `metadata`, generation_config.json and the tokenizer's files of `tokenizer_from`, also where
    that is a GGUF file. Replaces nothing: raises UserError where `output` exists and is not empty, or cannot be written.
    """
    part = output.with_name(f".{output.name}.part")
    try:
        if output.exists() and any(output.iterdir()):
            raise UserError(f"{output} is there already and not empty: give a folder of its own with -o")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        write_module(module, tokenizer_from, part, metadata, dtype)
        os.replace(part, output)
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror}): give another folder with -o") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_module(
    module: Any, tokenizer_from: Checkpoint | None, folder: Path, metadata: Mapping[str, str], dtype: torch.dtype
) -> None:
    """As `save_module`, file by file into a folder that is there."""
    tensors = {
        name: tensor.to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in stored_tensors(module)
    }
    _write_shards(tensors, folder, {"format": "pt", **metadata})
    write_config(module.config, type(module).__name__, folder, dtype)
    if tokenizer_from is not None:
        if tokenizer_from.generation_config:
            (folder / "generation_config.json").write_text(json.dumps(tokenizer_from.generation_config, indent=2) + "\n")
        copy_tokenizer(tokenizer_from, folder)


def write_config(config: Any, architecture: str, folder: Path, dtype: torch.dtype) -> None:
    """config.json of a Transformers config."""
    values = config.to_dict()
    values |= {"architectures": [architecture], "dtype": str(dtype).removeprefix("torch.")}
    for key in ("_name_or_path", "quantization_config", "_attn_implementation_internal", "_attn_implementation_autoset"):
        values.pop(key, None)
    (folder / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def copy_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    """The tokenizer's files, made of the metadata where it is a GGUF file; none where the checkpoint has no tokenizer."""
    if checkpoint.format == "gguf":
        try:
            tokenizer = load_tokenizer(checkpoint)
        except UserError:
            return
        tokenizer.transformers.save_pretrained(folder)
        return
    if checkpoint.format != "safetensors":
        return
    for pattern in _TOKENIZER_FILES:
        for path in checkpoint.path.glob(pattern):
            if path.is_file() and not any(path.match(other) for other in _OTHER_FILES):
                shutil.copyfile(path, folder / path.name)


def _write_shards(tensors: dict[str, Tensor], folder: Path, metadata: dict[str, str]) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    room = SHARD_BYTES
    for name, tensor in tensors.items():
        if shards[-1] and tensor.nbytes > room:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = tensor
        room -= tensor.nbytes
    if len(shards) == 1:
        _save(shards[0], folder / SINGLE_FILE, metadata)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _save(shard, folder / file, metadata)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Of a model that is made of this one, wherever it is made: the checkpoint's own; 16 bits where it was packed in fewer."""
    return torch.bfloat16 if checkpoint.format == "gguf" else DTYPES.get(checkpoint.stored_dtype, torch.float32)


def as_others(path: Path) -> None:
    """Give a file the mode that new ones have: safetensors writes it for its owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def _save(tensors: dict[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """The same tensors and metadata make the same bytes: the library writes metadata in an order that varies, here they are sorted."""
    save_file(tensors, path, dict(metadata))
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        assert len(ordered) == length, "a header with its entries in another order is as long"
        file.seek(8)
        file.write(ordered)
    as_others(path)
