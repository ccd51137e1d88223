"""What llama.cpp's converter does to Hugging Face's tensors, undone: names, and the order of rows.

Tables by GGUF architecture. Sources: gguf's tensor_mapping.py for names, llama.cpp's convert_hf_to_gguf.py for rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]
"""For each row of the Hugging Face tensor, the row of the file that holds it."""
Reorder = Callable[[int, dict[str, Any]], Rows]
"""(rows of the tensor, config) -> Rows. Raises ValueError when the rows do not divide into heads."""


@dataclass(frozen=True, slots=True)
class NameMap:
    """The tensors of one architecture: GGUF stem -> Hugging Face stem."""

    block: str
    """What `blk.{n}.` becomes."""
    blocks: dict[str, str]
    others: dict[str, str]
    reorders: dict[str, Reorder] = field(default_factory=dict)
    """By GGUF stem, for stems inside blocks."""


def _interleaved(heads_key: str) -> Reorder:
    """llama.cpp rotates neighbours (0, 1), (2, 3), ..., Hugging Face halves: the even rows of a head, then the odd ones."""

    def order(rows: int, config: dict[str, Any]) -> Rows:
        by_pair: Rows = np.arange(rows).reshape(config[heads_key], -1, 2).swapaxes(1, 2)
        return by_pair.ravel()

    return order


def _fused_by_head(rows: int, config: dict[str, Any]) -> Rows:
    """BLOOM: the file holds [q; k; v], Hugging Face q, k, v of each head."""
    by_head: Rows = np.arange(rows).reshape(3, config["n_head"], -1).swapaxes(0, 1)
    return by_head.ravel()


def _fused_by_group(rows: int, config: dict[str, Any]) -> Rows:
    """Falcon: the file holds [q; k; v], Hugging Face the query heads of a group, then its k and v."""
    heads, groups = config["num_attention_heads"], config["num_kv_heads"]
    by_head = np.arange(rows).reshape(heads + 2 * groups, -1)
    parts = np.split(by_head, [heads, heads + groups])
    return np.concatenate([part.reshape(groups, -1, by_head.shape[1]) for part in parts], axis=1).reshape(-1)


_GATED = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GATED_OTHERS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_FUSED = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attention.query_key_value",
    "attn_output": "self_attention.dense",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
_FUSED_OTHERS = {"token_embd": "transformer.word_embeddings", "output_norm": "transformer.ln_f", "output": "lm_head"}

NAME_MAPS: dict[str, NameMap] = {
    "llama": NameMap(
        "model.layers.{}.",
        _GATED,
        _GATED_OTHERS,
        {"attn_q": _interleaved("num_attention_heads"), "attn_k": _interleaved("num_key_value_heads")},
    ),
    "qwen2": NameMap("model.layers.{}.", _GATED, _GATED_OTHERS),
    "qwen3": NameMap(
        "model.layers.{}.", _GATED | {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}, _GATED_OTHERS
    ),
    "bloom": NameMap(
        "transformer.h.{}.",
        _FUSED | {"ffn_norm": "post_attention_layernorm"},
        _FUSED_OTHERS | {"token_embd_norm": "transformer.word_embeddings_layernorm"},
        {"attn_qkv": _fused_by_head},
    ),
    "falcon": NameMap("transformer.h.{}.", _FUSED, _FUSED_OTHERS, {"attn_qkv": _fused_by_group}),
    "falcon, two norms": NameMap(
        "transformer.h.{}.",
        _FUSED | {"attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"},
        _FUSED_OTHERS,
        {"attn_qkv": _fused_by_group},
    ),
    "mpt": NameMap(
        "transformer.blocks.{}.",
        {
            "attn_norm": "norm_1",
            "attn_qkv": "attn.Wqkv",
            "attn_output": "attn.out_proj",
            "ffn_norm": "norm_2",
            "ffn_up": "ffn.up_proj",
            "ffn_down": "ffn.down_proj",
        },
        {"token_embd": "transformer.wte", "output_norm": "transformer.norm_f", "output": "lm_head"},
    ),
}
_STEM = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")


def translate(names: NameMap, gguf_name: str) -> tuple[str, Reorder | None] | None:
    """The Hugging Face name of a tensor and how its rows were reordered; None for a tensor that the architecture has not."""
    match = _STEM.fullmatch(gguf_name)
    if match is None:
        return None
    layer, stem, suffix = match.groups()
    if layer is None:
        return (f"{names.others[stem]}.{suffix}", None) if stem in names.others else None
    if stem not in names.blocks:
        return None
    return f"{names.block.format(int(layer))}{names.blocks[stem]}.{suffix}", names.reorders.get(stem)
