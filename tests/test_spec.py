"""`ModelSpec` from configs: what real models say, Transformers' defaults, and every way to be refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CASES, tiny_model
from transformers import AutoConfig
from transformers.models.bloom.modeling_bloom import _get_alibi_slopes
from transformers.models.falcon.modeling_falcon import build_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from rowcast.errors import UserError
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.spec import RopeSpec, kv_bytes_per_token, parameter_count

FAMILIES = ["bloom", "falcon", "llama", "mistral", "mpt", "opt", "qwen2", "qwen3"]

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
    "max_position_embeddings": 4096,
}
MPT = {"model_type": "mpt", "d_model": 64, "n_heads": 8, "n_layers": 2}
QWEN = {"model_type": "qwen2", "hidden_size": 256, "num_attention_heads": 32, "num_hidden_layers": 4}


# What configs mean


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_keys_take_transformers_defaults(family: str) -> None:
    written_out = AutoConfig.for_model(family).to_dict()
    assert spec_from_config({"model_type": family}) == spec_from_config(written_out)


def test_old_and_new_style_of_rope_agree() -> None:
    scaling = {"factor": 4.0, "original_max_position_embeddings": 1024}
    new = {**LLAMA, "rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, **scaling}}
    old = {**LLAMA, "rope_theta": 5e5, "rope_scaling": {"rope_type": "yarn", **scaling}}
    older = {**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": "yarn", "finetuned": True, **scaling}}
    assert spec_from_config(new) == spec_from_config(old) == spec_from_config(older)
    assert spec_from_config(new).rope is not None


@pytest.mark.parametrize(
    ("rope", "expected", "context"),
    [
        ({}, RopeSpec(10000.0), 4096),
        ({"type": "linear", "factor": 4}, RopeSpec(10000.0, "linear", 4.0), 16384),
        ({"type": "dynamic", "factor": 2.0}, RopeSpec(10000.0, "dynamic", 2.0, 4096), 8192),
        ({"type": "yarn", "factor": 32.0}, RopeSpec(10000.0, "yarn", 32.0, 4096, attention_factor=1.3465735902799727), 131072),
        (
            {"type": "yarn", "factor": 8, "original_max_position_embeddings": 256, "mscale": 2.0, "mscale_all_dim": 1.0},
            RopeSpec(10000.0, "yarn", 8.0, 256, attention_factor=1.4158883083359673 / 1.2079441541679836),
            4096,
        ),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512,
            },
            RopeSpec(10000.0, "llama3", 8.0, 512),
            4096,
        ),
    ],
)
def test_rope_scalings(rope: dict[str, Any], expected: RopeSpec, context: int) -> None:
    spec = spec_from_config({**LLAMA, "rope_scaling": rope})
    assert spec.rope == expected
    assert spec.max_context == context


def test_windows_follow_layers() -> None:
    assert spec_from_config(QWEN).windows == (None,) * 4
    sliding = {**QWEN, "use_sliding_window": True, "sliding_window": 8}
    assert spec_from_config({**sliding, "max_window_layers": 3}).windows == (None, None, None, 8)
    kinds = ["sliding_attention", "full_attention"] * 2
    assert spec_from_config({**sliding, "layer_types": kinds}).windows == (8, None, 8, None)
    mistral = {**LLAMA, "model_type": "mistral"}
    assert spec_from_config(mistral).windows == (4096, 4096)
    assert spec_from_config({**mistral, "sliding_window": None}).windows == (None, None)


def test_falcon_generations() -> None:
    def falcon(**keys: Any) -> tuple[int, int]:
        spec = spec_from_config({"model_type": "falcon", "hidden_size": 64, "num_attention_heads": 8, **keys})
        return spec.num_kv_heads, spec.parallel_norms

    assert falcon(num_kv_heads=8) == (1, 1)
    assert falcon(multi_query=False) == (8, 1)
    assert falcon(parallel_attn=False) == (1, 0)
    assert falcon(new_decoder_architecture=True, num_kv_heads=2) == (2, 2)
    assert falcon(new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1) == (2, 1)


# Numbers derived from a spec


@pytest.mark.parametrize("name", CASES)
def test_parameter_count_is_the_models(name: str, tmp_path: Path) -> None:
    model = tiny_model(name, tmp_path)
    spec = spec_from_config(json.loads((tmp_path / "config.json").read_text()))
    assert parameter_count(spec) == sum(parameter.numel() for parameter in model.parameters())


def test_kv_bytes_per_token() -> None:
    llama3_8b = {"model_type": "llama", "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256}
    spec = spec_from_config(llama3_8b)
    assert kv_bytes_per_token(spec, 2) == 128 * 1024
    assert parameter_count(spec) == 8_030_261_248


# ALiBi slopes against Transformers'

HEADS = [*range(1, 21), 71, 112]


@pytest.mark.parametrize("heads", HEADS)
def test_bloom_and_falcon_slopes(heads: int) -> None:
    bloom = spec_from_config({"model_type": "bloom", "hidden_size": 8 * heads, "n_head": heads})
    falcon = spec_from_config({"model_type": "falcon", "hidden_size": 8 * heads, "num_attention_heads": heads, "alibi": True})
    assert bloom.alibi is not None
    assert falcon.alibi is not None
    torch.testing.assert_close(torch.tensor(bloom.alibi.slopes), _get_alibi_slopes(heads, torch.device("cpu")))
    bias = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)  # the bias of key 1 is the slope itself
    assert falcon.alibi.slopes == tuple(bias[:, 0, 1].tolist())


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("bias_max", [8, 16])
def test_mpt_slopes(heads: int, bias_max: int) -> None:
    spec = spec_from_config({**MPT, "d_model": 8 * heads, "n_heads": heads, "attn_config": {"alibi_bias_max": bias_max}})
    assert spec.alibi is not None
    expected = -build_mpt_alibi_tensor(heads, 2, bias_max)[:, 0, 0]  # the bias of the key one position back
    torch.testing.assert_close(torch.tensor(spec.alibi.slopes), expected)


# What is refused


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "model_type None.*opt"),
        ({"model_type": "mixtral"}, "'mixtral'.*bloom, falcon, llama, mistral, mpt, opt, qwen2, qwen3"),
        ({"model_type": ["llama"]}, "model_type"),
        ({**LLAMA, "num_attention_heads": 0}, "num_attention_heads = 0.*from 1 to"),
        ({**LLAMA, "num_hidden_layers": -3}, "num_hidden_layers = -3"),
        ({**LLAMA, "num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000.*10000"),
        ({**LLAMA, "vocab_size": 1e5}, "vocab_size = 100000.0.*whole number"),
        ({**LLAMA, "hidden_size": True}, "hidden_size = True"),
        ({**LLAMA, "hidden_size": "64"}, "hidden_size = '64'"),
        ({**LLAMA, "hidden_size": 65}, "hidden size 65.*8 heads"),
        ({**LLAMA, "num_key_value_heads": 3}, "8 attention heads.*num_key_value_heads = 3"),
        ({**LLAMA, "num_key_value_heads": 16}, "num_key_value_heads = 16.*from 1 to 8"),
        ({**LLAMA, "head_dim": 7}, "head_dim = 7.*even"),
        ({**LLAMA, "hidden_act": "mish"}, "hidden_act = 'mish'.*silu"),
        ({**LLAMA, "hidden_act": ["silu"]}, "hidden_act"),
        ({**LLAMA, "rms_norm_eps": float("nan")}, "rms_norm_eps = nan"),
        ({**LLAMA, "attention_bias": "yes"}, "attention_bias = 'yes'.*true or false"),
        ({**LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({**LLAMA, "quantization_config": {"quant_method": "gptq"}}, "quantization_config.*unquantised"),
        ({**LLAMA, "num_local_experts": 8}, "num_local_experts = 8.*dense"),
        ({**LLAMA, "rope_scaling": "linear"}, "rope_scaling = 'linear'.*mapping"),
        ({**LLAMA, "rope_scaling": {"type": "longrope", "factor": 4}}, "'longrope'.*yarn"),
        ({**LLAMA, "rope_scaling": {"type": "su"}}, "'su'"),
        ({**LLAMA, "rope_scaling": {"type": "linear"}}, "rope_scaling.factor = missing"),
        ({**LLAMA, "rope_scaling": {"type": "linear", "factor": 0.5}}, "factor = 0.5.*at least 1"),
        ({**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 2}, "head_dim": 2}, "head_dim = 2.*4 or more"),
        ({**LLAMA, "rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]}}, "mrope_section"),
        ({**LLAMA, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "partial_rotary_factor = 0.25"),
        ({**LLAMA, "rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention.*same for all layers"),
        (
            {**LLAMA, "rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
            "high_freq_factor = 4.*above low_freq_factor",
        ),
        ({**QWEN, "layer_types": ["full_attention"]}, "layer_types.*4 entries"),
        ({**QWEN, "layer_types": ["chunked_attention"] * 4}, "layer_types"),
        ({**QWEN, "layer_types": ["sliding_attention"] * 4}, "no sliding window is set"),
        ({**QWEN, "use_sliding_window": True, "max_window_layers": -1}, "max_window_layers = -1"),
        ({**MPT, "attn_config": {"prefix_lm": True}}, "attn_config.prefix_lm = True"),
        ({**MPT, "attn_config": {"attn_uses_sequence_id": True}}, "attn_uses_sequence_id"),
        ({**MPT, "attn_config": {"qk_ln": True}}, "qk_ln"),
        ({**MPT, "attn_config": {"alibi": False}}, "alibi = False"),
        ({**MPT, "attn_config": {"rope": True}}, "rope = True"),
        ({**MPT, "attn_config": {"attn_type": "multiquery_attention"}}, "multiquery_attention"),
        ({**MPT, "no_bias": False}, "no_bias = False"),
        ({**MPT, "logit_scale": "inv_sqrt_d_model"}, "logit_scale"),
        ({"model_type": "falcon", "alibi": True, "rope_scaling": {"type": "linear", "factor": 2}}, "either ALiBi or rotary"),
        (
            {"model_type": "falcon", "new_decoder_architecture": True, "num_ln_in_parallel_attn": 3},
            "num_ln_in_parallel_attn = 3.*from 1 to 2",
        ),
    ],
)
def test_refused_in_one_sentence(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        spec_from_config(config)
    message = str(caught.value)
    assert re.search(words, message), message
    assert "\n" not in message
    assert ". " not in message


KEYS = sorted({key for family in FAMILIES for key in AutoConfig.for_model(family).to_dict()} | {"rope_scaling", "rope_theta"})
ROPE_KEYS = [
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "mscale",
    "mscale_all_dim",
]
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-9, 9), st.integers(), st.floats(), st.sampled_from(["", "gelu", "yarn"])
)
mappings = st.dictionaries(
    st.sampled_from([*ROPE_KEYS, "alibi_bias_max"]), st.one_of(scalars, st.sampled_from(["linear", "dynamic", "llama3"]))
)


@settings(max_examples=500, deadline=None)
@given(
    st.sampled_from(FAMILIES),
    st.dictionaries(st.sampled_from(KEYS), st.one_of(scalars, st.lists(scalars, max_size=3), mappings), max_size=5),
)
def test_any_config_gives_a_spec_or_a_user_error(family: str, values: dict[str, Any]) -> None:
    try:
        spec = spec_from_config({**values, "model_type": family})
    except UserError:
        return
    assert spec.num_heads % spec.num_kv_heads == 0
    assert parameter_count(spec) > 0
    assert spec.max_context > 0
