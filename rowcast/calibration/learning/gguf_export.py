"""A small Llama as one GGUF file with 8-bit weights (Q8_0: groups of 32 with a float16 scale), which the engine and
Transformers read. It has no tokenizer, as a draft goes by its target's: llama.cpp, which asks for one, does not open it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from rowcast.calibration.learning.module import stored_tensors
from rowcast.errors import UserError
from rowcast.runtime.checkpoint.gguf_names import NAME_MAPS

GROUP = 32
FILE = "model.gguf"
_SPECIAL = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


def q8_bytes(elements: int) -> int:
    """What so many weights take in groups of 32."""
    return elements // GROUP * (GROUP + 2)


def write_gguf(module: Any, folder: Path, name: str) -> Path:
    """The module's matrices in 8 bits and its norms in float32, as `folder`/model.gguf. `name`: written into it.

    Raises UserError for another family than Llama without biases and rotary scaling, and for widths that are no multiple of 32.
    """
    config = module.config.to_dict()
    check_exportable(config)
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or hidden // heads
    path = folder / FILE
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(config["rope_parameters"]["rope_theta"]))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    for key, short in _SPECIAL.items():
        if isinstance(config.get(key), int):
            writer.add_uint32(f"tokenizer.ggml.{short}_token_id", config[key])
    names = _gguf_names(config["num_hidden_layers"])
    reorders = NAME_MAPS["llama"].reorders
    for own, tensor in stored_tensors(module):
        stored, stem = names[own.removesuffix(".weight")]
        values: npt.NDArray[Any] = tensor.float().cpu().numpy()
        if stem in reorders:
            order, filed = reorders[stem](len(values), config), np.empty_like(values)
            filed[order] = values
            values = filed
        if values.ndim == 1:
            writer.add_tensor(f"{stored}.weight", values)
        else:
            packed = gguf.quants.quantize(np.ascontiguousarray(values), GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{stored}.weight", packed, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def check_exportable(config: dict[str, Any]) -> None:
    """Raise UserError for what `write_gguf` does not write, before anything is trained."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    widths = {"hidden size": config["hidden_size"], "number of neurons": config["intermediate_size"],
              "width of all heads": config["num_attention_heads"] * head_dim}  # fmt: skip
    rope = config.get("rope_parameters") or {}
    if config.get("model_type") != "llama" or config.get("attention_bias") or config.get("mlp_bias"):
        raise UserError(f"8 bits are written of Llamas without biases, this is a {config.get('model_type')}: use --bits 16")
    if rope.get("rope_type", "default") != "default":
        raise UserError(f"8 bits are written of models without scaled positions, this has {rope['rope_type']}: use --bits 16")
    for what, width in widths.items():
        if width % GROUP:
            raise UserError(
                f"8 bits come in groups of {GROUP}, which a {what} of {width} is no multiple of: change it or use --bits 16"
            )


def _gguf_names(layers: int) -> dict[str, tuple[str, str]]:
    """Hugging Face's stem -> the file's, and the file's without its layer."""
    names = NAME_MAPS["llama"]
    found = {theirs: (ours, ours) for ours, theirs in names.others.items()}
    for layer in range(layers):
        for ours, theirs in names.blocks.items():
            found[f"{names.block.format(layer)}{theirs}"] = (f"blk.{layer}.{ours}", ours)
    return found
