"""`ModelSpec` from a Hugging Face config. Torch-free.

Missing keys take the defaults of Transformers' configuration classes (5.23). A key that changes the maths in a way the decoder
does not know is refused, never ignored. Where the config comes from (a file, a GGUF header, a table) is not known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from rowcast.errors import UserError
from rowcast.runtime.fields import Fields, short
from rowcast.runtime.positions import MOST_TOKENS, bloom_slopes, mpt_slopes, rope_spec, round_to_bfloat16
from rowcast.runtime.spec import AdaptedSpec, AlibiSpec, ModelSpec

_MOST_LAYERS = 10_000

ADAPTED = "rowcast_adapted"
"""In a config, what `rowcast adapt` says of the checkpoint: `density`, `acceptance` by density, and `cut`, of which rungs that is."""


def spec_from_config(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of the model that a Hugging Face `config.json` describes, old style (`rope_scaling`) or new (`rope_parameters`).

    Raises UserError for an unknown architecture, a value out of its bounds, or a variant that the decoder does not compute.
    """
    family = config.get("model_type")
    parse = _FAMILIES.get(family) if isinstance(family, str) else None
    if parse is None:
        raise UserError(f"model_type {short(family)} is not supported: use a model of type {', '.join(sorted(_FAMILIES))}")
    fields = Fields(config)
    fields.refuse("quantization_config", "use the checkpoint with unquantised weights, or a GGUF file")
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        fields.refuse(key, "use a dense model, mixture-of-experts layers are not supported")
    spec = parse(fields)
    return spec if fields.get(ADAPTED) is None else replace(spec, adapted=_adapted(fields.section(ADAPTED)))


def _adapted(fields: Fields) -> AdaptedSpec:
    def share(value: object) -> bool:
        return type(value) in (int, float) and 0 < value <= 1  # type: ignore[operator]

    density, measured = fields.get("density"), fields.get("acceptance", {})
    if not share(density):
        raise fields.wrong("density", "a share above 0 and up to 1")
    try:
        points = tuple(sorted((float(key), value) for key, value in measured.items()))
    except (AttributeError, TypeError, ValueError):
        points = ((0.0, 0.0),)
    if not all(share(each) for point in points for each in point):
        raise fields.wrong("acceptance", "shares by density, both above 0 and up to 1")
    if (cut := fields.get("cut", "top")) not in ("top", "threshold"):
        raise fields.wrong("cut", "top or threshold")
    return AdaptedSpec(float(density), points, cut)


def _head_dim(fields: Fields, hidden: int, heads: int, default: int | None = None) -> int:
    """The explicit `head_dim`, else `default`, else hidden / heads."""
    if hidden % heads and fields.get("head_dim", default) is None:
        raise UserError(f"the model's config has hidden size {hidden}, not a multiple of its {heads} heads: correct config.json")
    return fields.size("head_dim", default or hidden // heads)


def _kv_heads(fields: Fields, key: str, heads: int, default: int) -> int:
    kv_heads = fields.size(key, default, most=heads)
    if heads % kv_heads:
        raise UserError(
            f"the model's config has {heads} attention heads, not a multiple of {key} = {kv_heads}: correct config.json"
        )
    return kv_heads


def _opt(fields: Fields) -> ModelSpec:
    hidden = fields.size("hidden_size", 768)
    heads = fields.size("num_attention_heads", 12)
    layers = fields.size("num_hidden_layers", 12, most=_MOST_LAYERS)
    head_dim = _head_dim(fields, hidden, heads)
    bias = fields.flag("enable_bias", True)
    pre_norm = fields.flag("do_layer_norm_before", True)
    return ModelSpec(
        family="opt",
        vocab_size=fields.size("vocab_size", 50272),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        intermediate_size=fields.size("ffn_dim", 3072),
        max_context=fields.size("max_position_embeddings", 2048, most=MOST_TOKENS),
        activation=fields.activation("activation_function", "relu"),
        gated=False,
        norm="layer",
        norm_eps=1e-5,
        norm_bias=True,
        norm_affine=fields.flag("layer_norm_elementwise_affine", True),
        learned_positions=True,
        position_offset=2,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        attention_scale=head_dim**-0.5,
        windows=(None,) * layers,
        pre_norm=pre_norm,
        final_norm=pre_norm and not fields.flag("_remove_final_layer_norm", False),
        embed_size=fields.size("word_embed_proj_dim", hidden),
        tied_embeddings=fields.flag("tie_word_embeddings", True),
    )


def _llama(fields: Fields) -> ModelSpec:
    heads = fields.size("num_attention_heads", 32)
    bias = fields.flag("attention_bias", False)
    return _gated(
        fields,
        "llama",
        kv_heads=heads,
        intermediate=11008,
        vocab=32000,
        context=2048,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=fields.flag("mlp_bias", False),
    )


def _mistral(fields: Fields) -> ModelSpec:
    window = fields.size("sliding_window", 4096) if fields.values.get("sliding_window", 4096) is not None else None
    return _gated(fields, "mistral", kv_heads=8, intermediate=14336, vocab=32000, context=131072, window=window)


def _qwen2(fields: Fields) -> ModelSpec:
    return _gated(
        fields, "qwen2", kv_heads=32, intermediate=22016, vocab=151936, context=32768, window=_qwen_window(fields), qkv_bias=True
    )


def _qwen3(fields: Fields) -> ModelSpec:
    bias = fields.flag("attention_bias", False)
    return _gated(
        fields,
        "qwen3",
        kv_heads=32,
        head_dim=128,
        intermediate=22016,
        vocab=151936,
        context=32768,
        window=_qwen_window(fields),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
    )


def _qwen_window(fields: Fields) -> int | None:
    return fields.size("sliding_window", 4096) if fields.flag("use_sliding_window", False) else None


def _gated(
    fields: Fields,
    family: str,
    *,
    kv_heads: int,
    intermediate: int,
    vocab: int,
    context: int,
    head_dim: int | None = None,
    window: int | None = None,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
) -> ModelSpec:
    """Llama and its relatives: RMS norms, gated MLP, rotary embedding. Sizes passed in are the family's defaults."""
    hidden = fields.size("hidden_size", 4096)
    heads = fields.size("num_attention_heads", 32)
    layers = fields.size("num_hidden_layers", 32, most=_MOST_LAYERS)
    head_dim = _head_dim(fields, hidden, heads, head_dim)
    if fields.values.get("num_key_value_heads", kv_heads) is None:
        kv_heads = heads
    rope, max_context = rope_spec(fields, head_dim, context)
    return ModelSpec(
        family=family,
        vocab_size=fields.size("vocab_size", vocab),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_kv_heads(fields, "num_key_value_heads", heads, kv_heads),
        head_dim=head_dim,
        intermediate_size=fields.size("intermediate_size", intermediate),
        max_context=max_context,
        activation=fields.activation("hidden_act", "silu"),
        gated=True,
        norm="rms",
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=rope,
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        mlp_bias=mlp_bias,
        qk_norm="head" if qk_norm else "none",
        attention_scale=head_dim**-0.5,
        windows=_windows(fields, layers, window, first=fields.get("max_window_layers", 28) if family.startswith("qwen") else 0),
        embed_size=hidden,
        tied_embeddings=fields.flag("tie_word_embeddings", False),
    )


def _windows(fields: Fields, layers: int, window: int | None, first: int) -> tuple[int | None, ...]:
    """Window by layer: as `layer_types` says, else `window` from layer `first` on."""
    kinds = fields.get("layer_types")
    if kinds is None:
        if type(first) is not int or first < 0:
            raise fields.wrong("max_window_layers", "a whole number of at least 0")
        return tuple(window if layer >= first else None for layer in range(layers))
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list | tuple) or len(kinds) != layers or any(kind not in known for kind in kinds):
        raise fields.wrong("layer_types", f"a list of {layers} entries, full_attention or sliding_attention")
    if window is None and "sliding_attention" in kinds:
        raise fields.wrong("layer_types", "full_attention in every layer as no sliding window is set")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _bloom(fields: Fields) -> ModelSpec:
    hidden = fields.size("hidden_size", 64, alias="n_embed")
    heads = fields.size("n_head", 8, alias="num_attention_heads")
    layers = fields.size("n_layer", 2, alias="num_hidden_layers", most=_MOST_LAYERS)
    head_dim = _head_dim(fields, hidden, heads)
    return ModelSpec(
        family="bloom",
        vocab_size=fields.size("vocab_size", 250880),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        intermediate_size=4 * hidden,
        max_context=fields.size("seq_length", 2048, most=MOST_TOKENS),
        activation="gelu_tanh",
        gated=False,
        norm="layer",
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        norm_bias=True,
        alibi=AlibiSpec(bloom_slopes(heads)),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        attention_scale=head_dim**-0.5,
        windows=(None,) * layers,
        residual_from_norm=fields.flag("apply_residual_connection_post_layernorm", False),
        embed_norm=True,
        embed_size=hidden,
        tied_embeddings=fields.flag("tie_word_embeddings", True),
    )


def _mpt(fields: Fields) -> ModelSpec:
    hidden = fields.size("d_model", 2048, alias="hidden_size")
    heads = fields.size("n_heads", 16, alias="num_attention_heads")
    layers = fields.size("n_layers", 24, alias="num_hidden_layers", most=_MOST_LAYERS)
    head_dim = _head_dim(fields, hidden, heads)
    attention = fields.section("attn_config")
    fix = "use a checkpoint in the layout of mpt-7b"
    for key in ("prefix_lm", "attn_uses_sequence_id", "qk_ln", "qk_gn", "rope"):
        attention.refuse(key, fix)
    attention.refuse("alibi", fix, allowed=(True,))
    attention.refuse("attn_type", fix, allowed=("multihead_attention",))
    attention.refuse("sliding_window_size", fix, allowed=(-1,))
    fields.refuse("no_bias", fix, allowed=(True,))
    fields.refuse("logit_scale", fix, allowed=(1,))
    fields.refuse("norm_type", fix, allowed=("layernorm", "low_precision_layernorm"))
    bias_max = attention.number("alibi_bias_max", 8.0)
    return ModelSpec(
        family="mpt",
        vocab_size=fields.size("vocab_size", 50368),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        intermediate_size=fields.size("expansion_ratio", 4) * hidden,
        max_context=fields.size("max_seq_len", 2048, most=MOST_TOKENS),
        activation="gelu",
        gated=False,
        norm="layer",
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        alibi=AlibiSpec(mpt_slopes(heads, bias_max)),
        qkv_clip=attention.number("clip_qkv") if attention.get("clip_qkv") else None,
        attention_scale=attention.number("softmax_scale", head_dim**-0.5),
        windows=(None,) * layers,
        embed_size=hidden,
        tied_embeddings=fields.flag("tie_word_embeddings", True),
    )


def _falcon(fields: Fields) -> ModelSpec:
    hidden = fields.size("hidden_size", 4544, alias="n_embed")
    heads = fields.size("num_attention_heads", 71)
    layers = fields.size("num_hidden_layers", 32, most=_MOST_LAYERS)
    head_dim = _head_dim(fields, hidden, heads)
    bias = fields.flag("bias", False)
    if fields.flag("new_decoder_architecture", False):
        kv_heads = _kv_heads(fields, "num_kv_heads", heads, heads)
        norms: Literal[0, 1, 2] = 2 if fields.size("num_ln_in_parallel_attn", 2, most=2) == 2 else 1
    else:
        kv_heads = 1 if fields.flag("multi_query", True) else heads
        norms = 1 if fields.flag("parallel_attn", True) else 0
    if fields.flag("alibi", False):
        fields.refuse("rope_scaling", "use either ALiBi or rotary embeddings")
        alibi = AlibiSpec(tuple(map(round_to_bfloat16, bloom_slopes(heads))), scaled=True, bfloat16_bias=True)
        rope, max_context = None, fields.size("max_position_embeddings", 2048, most=MOST_TOKENS)
    else:
        alibi = None
        rope, max_context = rope_spec(fields, head_dim, 2048)
    return ModelSpec(
        family="falcon",
        vocab_size=fields.size("vocab_size", 65024),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=fields.size("ffn_hidden_size", 4 * hidden),
        max_context=max_context,
        activation=fields.activation("activation", "gelu"),
        gated=False,
        norm="layer",
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        norm_bias=True,
        rope=rope,
        alibi=alibi,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        attention_scale=head_dim**-0.5,
        windows=(None,) * layers,
        parallel_norms=norms,
        embed_size=hidden,
        tied_embeddings=fields.flag("tie_word_embeddings", True),
    )


_FAMILIES = {
    "bloom": _bloom,
    "falcon": _falcon,
    "llama": _llama,
    "mistral": _mistral,
    "mpt": _mpt,
    "opt": _opt,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}
