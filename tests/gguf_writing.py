"""Small GGUF files for the tests, written by the gguf package; row orders as llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

LLAMA = {
    "block_count": 1,
    "context_length": 128,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.dimension_count": 16,
    "rope.freq_base": 500000.0,
}
"""Metadata of a model with one layer, 4 heads of 16 and 2 KV heads."""
LLAMA_SHAPES = {
    "token_embd.weight": (32, 64),
    "blk.0.attn_norm.weight": (64,),
    "blk.0.attn_q.weight": (64, 64),
    "blk.0.attn_k.weight": (32, 64),
    "blk.0.attn_v.weight": (32, 64),
    "blk.0.attn_output.weight": (64, 64),
    "blk.0.ffn_norm.weight": (64,),
    "blk.0.ffn_gate.weight": (96, 64),
    "blk.0.ffn_up.weight": (96, 64),
    "blk.0.ffn_down.weight": (64, 96),
    "output_norm.weight": (64,),
}


def write_gguf(
    path: Path,
    architecture: str,
    metadata: dict[str, Any],
    tensors: dict[str, Any],
    kinds: dict[str, GGMLQuantizationType] | None = None,
) -> Path:
    """Metadata keys of no other group get the architecture's prefix; `kinds` marks tensors given as raw bytes."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        name = key if key.startswith(("tokenizer.", "general.", "split.")) else f"{architecture}.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)
    for name, data in tensors.items():
        array = data.numpy() if isinstance(data, Tensor) else data
        writer.add_tensor(name, array, raw_dtype=(kinds or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama_tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in LLAMA_SHAPES.items()}


def written_by_llama_cpp(model: Any, architecture: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of a gated model of Transformers, as the converter writes them: only Llama says how much it rotates."""
    config, state = model.config, model.state_dict()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    metadata = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.freq_base": config.rope_parameters["rope_theta"],
    }
    if architecture == "llama":
        metadata["rope.dimension_count"] = head_dim
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    tensors = {}
    for name, tensor in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, suffix = name.rsplit(".", 1)
        for projection, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if architecture == "llama" and stem.endswith(projection):
                tensor = interleave(tensor, heads)
        tensors[f"{table.get_name(stem)}.{suffix}"] = tensor.contiguous()
    return metadata, tensors


def interleave(weight: Tensor, heads: int) -> Tensor:
    """Rows in halves -> rows in neighbouring pairs, as the converter permutes q and k of the architecture llama."""
    return weight.view(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def random_blocks(kind: GGMLQuantizationType, rows: int, columns: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Rows of blocks [rows, bytes]: quantised normal numbers where gguf can quantise, else random bytes."""
    random = np.random.default_rng(seed)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    try:
        blocks = gguf.quants.quantize(random.standard_normal((rows, columns)).astype(np.float32), kind)
        return np.ascontiguousarray(blocks).view(np.uint8)
    except NotImplementedError:
        return random.integers(0, 256, (rows, columns // block * block_bytes), np.uint8)


def super_blocks(kind: GGMLQuantizationType, rows: int, columns: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Rows of random super-blocks [rows, bytes] of Q4_K, Q5_K or Q6_K, whose numbers are around 0 and about 0.05 apart."""
    random = np.random.default_rng(seed)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (rows, columns // block, block_bytes), np.uint8)
    numbers = random.uniform(0.5, 1, (rows, columns // block, 2)).astype(np.float32)
    if kind == GGMLQuantizationType.Q6_K:
        blocks[..., -2:] = (numbers[..., :1] * 5e-5).astype(np.float16).view(np.uint8)
    else:
        levels = 31 if kind == GGMLQuantizationType.Q5_K else 15
        blocks[..., :4] = (numbers * np.array([0.006 / levels, 0.003], np.float32)).astype(np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)
