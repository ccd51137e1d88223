"""Tiny random models of every family, made and saved by Transformers itself.

Every parameter is random, biases and norm weights included, and large enough that a wrong or missing one moves the logits.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB = 101  # odd, so that ranks hold unequal shares of it

_GATED = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 90,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}
_OPT = {
    "model_type": "opt",
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "word_embed_proj_dim": 48,
    "ffn_dim": 90,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_LLAMA = {"model_type": "llama", **_GATED}
_QWEN2 = {"model_type": "qwen2", **_GATED}
_QWEN3 = {"model_type": "qwen3", **_GATED, "head_dim": 16}
_BLOOM = {"model_type": "bloom", "vocab_size": VOCAB, "hidden_size": 64, "n_layer": 2, "n_head": 8}
_MPT = {"model_type": "mpt", "vocab_size": VOCAB, "d_model": 64, "n_layers": 2, "n_heads": 8, "max_seq_len": 64}
_FALCON = {
    "model_type": "falcon",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "ffn_hidden_size": 90,
    "max_position_embeddings": 64,
}


def _rope(**parameters: Any) -> dict[str, Any]:
    """A llama with head_dim 16 and scaled rope. The small theta spreads its 8 frequencies over all bands of the scaling."""
    return {**_LLAMA, "head_dim": 16, "rope_parameters": {"rope_theta": 100.0, **parameters}}


_CONFIGS: dict[str, dict[str, Any]] = {
    "opt": _OPT,
    "opt-350m": {**_OPT, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "opt-bare": {**_OPT, "enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
    "opt-no-final-norm": {**_OPT, "_remove_final_layer_norm": True},
    "opt-untied": {**_OPT, "tie_word_embeddings": False},
    "llama-mha": {**_LLAMA, "num_key_value_heads": 8},
    "llama-gqa": _LLAMA,
    "llama-mqa": {**_LLAMA, "num_key_value_heads": 1},
    "llama-bias": {**_LLAMA, "attention_bias": True, "mlp_bias": True},
    "llama-tied": {**_LLAMA, "tie_word_embeddings": True},
    "llama-head-dim": {**_LLAMA, "head_dim": 12},
    "llama-linear": _rope(rope_type="linear", factor=4.0),
    "llama-dynamic": {**_rope(rope_type="dynamic", factor=4.0), "max_position_embeddings": 16},
    "llama-dynamic-grows": {**_rope(rope_type="dynamic", factor=4.0), "max_position_embeddings": 30},
    "llama-yarn": _rope(rope_type="yarn", factor=8.0, original_max_position_embeddings=16),
    "llama-yarn-tuned": _rope(
        rope_type="yarn",
        factor=8.0,
        original_max_position_embeddings=16,
        beta_fast=1.0,
        beta_slow=0.25,
        mscale=1.5,
        mscale_all_dim=0.5,
        truncate=False,
    ),
    "llama-llama3": _rope(
        rope_type="llama3", factor=8.0, original_max_position_embeddings=16, low_freq_factor=1.0, high_freq_factor=4.0
    ),
    "mistral-window": {"model_type": "mistral", **_GATED, "sliding_window": 8},
    "mistral": {"model_type": "mistral", **_GATED, "sliding_window": None},
    "qwen2": _QWEN2,
    "qwen2-window": {
        **_QWEN2,
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
    },
    "qwen3": _QWEN3,
    "qwen3-window": {
        **_QWEN3,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "bloom": _BLOOM,
    "bloom-12-heads": {**_BLOOM, "hidden_size": 96, "n_head": 12},
    "bloom-residual": {**_BLOOM, "apply_residual_connection_post_layernorm": True},
    "mpt": _MPT,
    "mpt-12-heads": {**_MPT, "d_model": 96, "n_heads": 12, "attn_config": {"softmax_scale": 0.2}},
    "mpt-clip": {**_MPT, "attn_config": {"clip_qkv": 0.7}},
    "falcon-7b": _FALCON,
    "falcon-mha": {**_FALCON, "multi_query": False, "bias": True},
    "falcon-40b": {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 4},
    "falcon-11b": {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 4, "num_ln_in_parallel_attn": 1},
    "falcon-rw": {**_FALCON, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    "falcon-alibi-12-heads": {**_FALCON, "alibi": True, "hidden_size": 96, "num_attention_heads": 12},
    "falcon-untied": {**_FALCON, "tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
}

CASES = list(_CONFIGS)


def tiny_model(name: str, path: Path, **overrides: Any) -> Any:
    """Make the model called `name` (one of CASES), save it under `path` as safetensors and return it, in float32."""
    values = {**_CONFIGS[name], **overrides}
    config = AutoConfig.for_model(values["model_type"], **{key: value for key, value in values.items() if key != "model_type"})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomise(model)
    model.save_pretrained(path)
    return model


def model_with_words(path: Path, name: str, **overrides: Any) -> Path:
    """The folder `path` with the model called `name` and the tokenizer of `tiny_words`."""
    tiny_model(name, path, **overrides)
    return tiny_words(path)


def tiny_words(path: Path, *, bos: bool = False) -> Path:
    """Put a tokenizer beside the model in `path`, which has a word for each id: w0, w1, ... `bos`: prompts begin with w1."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if bos:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="w1 $A", special_tokens=[("w1", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(path)
    return path


def words_of(path: Path, ids: Iterable[int]) -> Path:
    """Write a text of these ids, by the tokenizer of `tiny_words`."""
    path.write_text(" ".join(f"w{i}" for i in ids))
    return path


def random_words(path: Path, count: int) -> Path:
    """Write a text of so many random ids."""
    return words_of(path, torch.randint(VOCAB, (count,), generator=torch.Generator().manual_seed(1)).tolist())


def randomise(model: torch.nn.Module) -> None:
    """Draw all parameters anew: matrices keep the size of what they multiply, norm weights lie around 1."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 2:
            embedding = "embed" in name or "wte" in name
            parameter.data = noise * (0.5 if embedding else 1.3 * parameter.shape[1] ** -0.5)
        else:
            parameter.data = noise * 0.3 + (0.0 if name.endswith("bias") else 1.0)
