"""A GGUF file's metadata as the config.json and generation_config.json that Hugging Face would have beside the same weights.

What the metadata says and we cannot express is refused, never ignored: a model that runs with a wrong rotation speaks nonsense.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rowcast.errors import UserError
from rowcast.runtime.checkpoint.gguf_file import GGUFFile
from rowcast.runtime.checkpoint.gguf_names import NAME_MAPS, NameMap
from rowcast.runtime.checkpoint.slices import read_dense
from rowcast.runtime.fields import short

ROPE_FACTORS = "rope_freqs.weight"
"""Divisors of the rotation's frequencies, [head_dim / 2]: how llama.cpp stores llama3 scaling."""
ARCHITECTURES = tuple(name for name in NAME_MAPS if "," not in name)
_SCALING_KEYS = {"type", "factor", "original_context_length", "attn_factor", "yarn_beta_fast", "yarn_beta_slow", "finetuned"}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The constants of every published Llama 3 model; the file keeps only their result."""


@dataclass(frozen=True, slots=True)
class _Keys:
    """Typed access to the metadata of one architecture. Raises UserError for a missing or ill-typed value."""

    gguf: GGUFFile
    architecture: str

    def number(self, key: str, default: float | None = None) -> float:
        name = f"{self.architecture}.{key}"
        value = self.gguf.metadata.get(name, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if isinstance(value, list):
            raise self.refuse(f"another {name} in each layer")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            what = "lacks" if value is None else f"has the value {value!r} for"
            raise UserError(f"{self.gguf.file.path} {what} the metadata key {name}; convert the model again.")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        return int(self.number(key, default))

    def __contains__(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.gguf.metadata

    def refuse(self, what: str) -> UserError:
        known = ", ".join(ARCHITECTURES)
        return UserError(f"{self.gguf.file.path} has {what}, which is not supported; GGUF models read: plain {known}.")


def hf_config(gguf: GGUFFile) -> tuple[dict[str, Any], NameMap]:
    """config.json of the model and how its tensors are named. Raises UserError for what we cannot run."""
    architecture = gguf.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"{gguf.file.path} is a model of the GGUF architecture {architecture!r}; supported: {known}.")
    keys = _Keys(gguf, architecture)
    if keys.integer("expert_count", 0):
        raise keys.refuse("a mixture of experts")
    if "token_embd.weight" not in gguf.tensors:
        raise UserError(f"{gguf.file.path} holds no tensor 'token_embd.weight'; use a GGUF file of a whole language model.")
    builders = {"bloom": _bloom, "falcon": _falcon, "mpt": _mpt}
    config = builders.get(architecture, _gated)(keys)
    shared = {
        "vocab_size": gguf.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "dtype": stored_dtype(gguf),
    }
    two_norms = architecture == "falcon" and "blk.0.attn_norm_2.weight" in gguf.tensors
    return config | shared | generation_config(gguf), NAME_MAPS["falcon, two norms" if two_norms else architecture]


def generation_config(gguf: GGUFFile) -> dict[str, Any]:
    """bos_token_id, pad_token_id and eos_token_id, the last a list when a turn's and a text's end differ.

    Raises UserError for an id that is no whole number of at least 0.
    """
    ids: dict[str, int] = {}
    for key in ("bos", "padding", "eos", "eot", "eom"):
        name = f"tokenizer.ggml.{key}_token_id"
        value = gguf.metadata.get(name)
        if value is None:
            continue
        if type(value) is not int or value < 0:
            raise UserError(f"{gguf.file.path} has the value {short(value)} for {name}, not a token id; convert the model again.")
        ids[key] = value
    ends = list(dict.fromkeys(ids[key] for key in ("eos", "eot", "eom") if key in ids))
    result: dict[str, Any] = {"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {}
    for key, name in (("bos", "bos_token_id"), ("padding", "pad_token_id")):
        if key in ids:
            result[name] = ids[key]
    return result


def stored_dtype(gguf: GGUFFile) -> str:
    """The dtype that holds the most weights, e.g. float16; float32 when they are quantised."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in gguf.tensors.values():
        dtype = tensor.kind.dtype or torch.float32
        sizes[dtype] = sizes.get(dtype, 0) + math.prod(tensor.shape)
    return str(max(sizes, key=sizes.__getitem__, default=torch.float32)).removeprefix("torch.")


def _gated(keys: _Keys) -> dict[str, Any]:
    """Llama, Mistral, SmolLM, Qwen2, Qwen3."""
    tensors = keys.gguf.tensors
    hidden, heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    if heads <= 0:
        raise keys.refuse(f"{heads} attention heads")
    head_dim = keys.integer("attention.key_length", hidden // heads)
    rotated = keys.integer("rope.dimension_count", head_dim)
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise keys.refuse("values of another size than keys")
    if rotated != head_dim:
        raise keys.refuse(f"a rotation of {rotated} of the {head_dim} dimensions of a head")
    config: dict[str, Any] = {
        "model_type": keys.architecture,
        "hidden_size": hidden,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "rope_theta": keys.number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(keys, head_dim),
    }
    if keys.architecture in ("llama", "qwen3"):
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if keys.architecture == "llama":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    if "attention.sliding_window" in keys:
        config["sliding_window"] = keys.integer("attention.sliding_window")
        if keys.architecture == "llama":
            config["model_type"] = "mistral"
        else:
            config |= {"use_sliding_window": True, "max_window_layers": 0}
    class_name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[config["model_type"]]
    return config | {"architectures": [f"{class_name}ForCausalLM"]}


def _rope_scaling(keys: _Keys, head_dim: int) -> dict[str, Any] | None:
    """Hugging Face's `rope_scaling`; None when positions are not scaled."""
    prefix = f"{keys.architecture}.rope.scaling."
    unknown = [key for key in keys.gguf.metadata if key.startswith(prefix) and key.removeprefix(prefix) not in _SCALING_KEYS]
    if unknown:
        raise keys.refuse(f"the metadata key {unknown[0]}")
    legacy = keys.number("rope.scale_linear", 1.0)
    kind = keys.gguf.metadata.get(prefix + "type", "linear" if legacy != 1.0 else "none")
    if ROPE_FACTORS in keys.gguf.tensors:
        if kind != "none":
            raise keys.refuse(f"both {ROPE_FACTORS} and {kind} scaling of positions")
        return _llama3_scaling(keys, head_dim)
    if kind == "none":
        return None
    factor = float(keys.number("rope.scaling.factor", legacy))
    if factor <= 0:
        raise keys.refuse(f"positions scaled by {factor}")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "linear":
        return scaling
    if kind != "yarn":
        raise keys.refuse(f"{kind} scaling of positions")
    scaling["original_max_position_embeddings"] = keys.integer("rope.scaling.original_context_length")
    for name in ("beta_fast", "beta_slow"):
        if f"rope.scaling.yarn_{name}" in keys:
            scaling[name] = keys.number(f"rope.scaling.yarn_{name}")
    if "rope.scaling.attn_factor" in keys:
        scaling["attention_factor"] = keys.number("rope.scaling.attn_factor") * (0.1 * math.log(factor) + 1)
    return scaling


def _llama3_scaling(keys: _Keys, head_dim: int) -> dict[str, Any] | None:
    """The llama3 parameters whose frequencies (Llama 3.1's apply_scaling) the stored divisors are; refuses other divisors."""
    tensor = keys.gguf.tensors[ROPE_FACTORS]
    if tensor.kind.dtype is None or tensor.shape != (head_dim // 2,):
        raise keys.refuse(f"a tensor {ROPE_FACTORS} of shape {list(tensor.shape)} and type {tensor.kind.name}")
    stored = read_dense(keys.gguf.file, tensor.offset, tensor.kind.dtype, tensor.shape, None, None, None).double().numpy()
    if np.allclose(stored, 1.0):
        return None
    factor = round(float(stored.max()), 3)
    if not np.allclose(stored, llama3_divisors(keys.number("rope.freq_base", 10000.0), head_dim, factor), rtol=1e-3):
        raise keys.refuse(f"frequencies in {ROPE_FACTORS} that are not those of Llama 3")
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


def llama3_divisors(theta: float, head_dim: int, factor: float) -> npt.NDArray[np.float64]:
    """Plain over scaled frequency, [head_dim / 2]: 1 for short wavelengths, `factor` for long ones, a ramp between."""
    turns = _LLAMA3["original_max_position_embeddings"] * theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    divisors: npt.NDArray[np.float64] = 1 / ((1 - smooth) / factor + smooth)
    return divisors


def _bloom(keys: _Keys) -> dict[str, Any]:
    return {
        "model_type": "bloom",
        "architectures": ["BloomForCausalLM"],
        "hidden_size": keys.integer("embedding_length"),
        "n_layer": keys.integer("block_count"),
        "n_head": keys.integer("attention.head_count"),
        "seq_length": keys.integer("context_length"),
        "layer_norm_epsilon": keys.number("attention.layer_norm_epsilon"),
        "apply_residual_connection_post_layernorm": False,
    }


def _falcon(keys: _Keys) -> dict[str, Any]:
    hidden, heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    groups = keys.integer("attention.head_count_kv", 1)
    two_norms = "blk.0.attn_norm_2.weight" in keys.gguf.tensors
    return {
        "model_type": "falcon",
        "architectures": ["FalconForCausalLM"],
        "hidden_size": hidden,
        "ffn_hidden_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count"),
        "num_attention_heads": heads,
        "num_kv_heads": groups,
        "multi_query": groups == 1,
        "new_decoder_architecture": two_norms or groups > 1,
        "num_ln_in_parallel_attn": 2 if two_norms else 1,
        "parallel_attn": True,
        "bias": "blk.0.attn_qkv.bias" in keys.gguf.tensors,
        "alibi": False,
        "max_position_embeddings": keys.integer("context_length"),
        "layer_norm_epsilon": keys.number("attention.layer_norm_epsilon"),
        "rope_theta": keys.number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(keys, hidden // max(1, heads)),
    }


def _mpt(keys: _Keys) -> dict[str, Any]:
    hidden, heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    if keys.integer("attention.head_count_kv", heads) != heads:
        raise keys.refuse("grouped heads in MPT")
    up = keys.gguf.tensors.get("blk.0.ffn_up.weight")
    clip = keys.number("attention.clamp_kqv", 0.0)
    alibi = keys.number("attention.max_alibi_bias", 0.0)
    return {
        "model_type": "mpt",
        "architectures": ["MptForCausalLM"],
        "d_model": hidden,
        "n_heads": heads,
        "n_layers": keys.integer("block_count"),
        "max_seq_len": keys.integer("context_length"),
        "expansion_ratio": up.shape[0] // max(1, hidden) if up else 4,
        "layer_norm_epsilon": keys.number("attention.layer_norm_epsilon"),
        "no_bias": "blk.0.attn_norm.bias" not in keys.gguf.tensors,
        "attn_config": {"clip_qkv": clip or None, "alibi": alibi > 0, "alibi_bias_max": alibi or 8},
    }
