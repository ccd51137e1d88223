"""What a model is, without its weights: shapes, norms, positions. Torch-free.

Read by everything (`placement` included), so it imports the standard library only. It does not know where weights lie, how they
are named in a file (`weight_map`) or how they are computed with (`decoder`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "relu", "gelu", "gelu_tanh"]
"""`gelu` is the exact erf form, `gelu_tanh` the tanh approximation."""


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding (Su et al., arXiv 2104.09864), rotate-half convention, over the whole head."""

    theta: float
    scaling: Literal["none", "linear", "dynamic", "yarn", "llama3"] = "none"
    factor: float = 1.0
    original_context: int = 0
    """Context length before scaling; used by dynamic, yarn and llama3."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    """YaRN's correction range (arXiv 2309.00071, section 3.2)."""
    truncate: bool = True
    """YaRN: round the correction range to whole dimensions."""
    attention_factor: float = 1.0
    """YaRN: multiplies cos and sin; resolved when the spec is made (0.1 ln(factor) + 1 unless given)."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


@dataclass(frozen=True, slots=True)
class AlibiSpec:
    """Linear attention biases (Press et al., arXiv 2108.12409): score(i, j) += slope_head * (j - i)."""

    slopes: tuple[float, ...]
    """One for each query head, all heads of the model."""
    scaled: bool = False
    """Falcon multiplies the bias by the attention scale, as it adds it before scaling."""
    bfloat16_bias: bool = False
    """Falcon's bias is slope * absolute key position, computed in bfloat16: slope, position and product are each rounded."""


@dataclass(frozen=True, slots=True)
class AdaptedSpec:
    """What a checkpoint says of itself that `rowcast adapt` wrote."""

    density: float
    """Share of its neurons that its sparse rungs use where nothing else is said."""
    acceptance: tuple[tuple[float, float], ...] = ()
    """By density, ascending: how often what q4 finds is accepted by all of the model's own neurons, as measured."""
    cut: Literal["top", "threshold"] = "top"
    """Of the rungs that this was measured of."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One decoder-only model. All sizes are those of the whole model, not of a shard."""

    family: str
    """The Hugging Face `model_type`: opt, llama, mistral, qwen2, qwen3, bloom, mpt, falcon."""
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_context: int
    """Longest sequence in tokens, prompt and output together."""
    activation: Activation
    gated: bool
    """down(act(gate x) * (up x)) if true, down(act(up x)) otherwise."""
    norm: Literal["rms", "layer"]
    norm_eps: float
    norm_bias: bool = False
    norm_affine: bool = True
    """False: the norms have no weights at all (OPT with layer_norm_elementwise_affine = False)."""

    rope: RopeSpec | None = None
    alibi: AlibiSpec | None = None
    learned_positions: bool = False
    """A table of max_context + position_offset rows, added to the embedding."""
    position_offset: int = 0
    """OPT looks position i up in row i + 2."""

    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["none", "head"] = "none"
    """head (Qwen3): RMS norm over each head of q and k, before RoPE."""
    qkv_clip: float | None = None
    """MPT: clamp q, k and v to [-clip, clip]."""
    attention_scale: float = 0.0
    """Multiplies q . k; resolved when the spec is made (head_dim ** -0.5 unless given)."""
    windows: tuple[int | None, ...] = ()
    """For each layer, how many last positions (the own one included) a token attends to; None: all."""

    pre_norm: bool = True
    """False (OPT-350m): norm after each residual sum, none before the sub-layers."""
    residual_from_norm: bool = False
    """BLOOM apply_residual_connection_post_layernorm: the residual is the norm's output."""
    parallel_norms: Literal[0, 1, 2] = 0
    """0: attention, then MLP. 1: both read one norm, their sum joins the residual. 2: both in parallel, a norm each."""
    embed_norm: bool = False
    """BLOOM: a norm on the embeddings."""
    final_norm: bool = True
    embed_size: int = 0
    """Width of the embedding table; differs from hidden_size where project_in and project_out exist (OPT-350m)."""
    tied_embeddings: bool = True
    adapted: AdaptedSpec | None = None
    """None: the model was not trained to do with a part of its neurons. No part of what it computes."""

    @property
    def group_size(self) -> int:
        """Query heads to one KV head."""
        return self.num_heads // self.num_kv_heads


def parameter_count(spec: ModelSpec) -> int:
    """Stored parameters of the model; a tied output head counts once."""
    hidden = spec.hidden_size
    norm = hidden * (1 + spec.norm_bias) if spec.norm_affine else 0
    norms = 1 if spec.parallel_norms == 1 else 2

    embedding = spec.vocab_size * spec.embed_size * (1 if spec.tied_embeddings else 2)
    positions = (spec.max_context + spec.position_offset) * hidden if spec.learned_positions else 0
    projections = 2 * spec.embed_size * hidden if spec.embed_size != hidden else 0
    outer_norms = (spec.embed_norm + spec.final_norm) * norm
    return embedding + positions + projections + outer_norms + spec.num_layers * (layer_parameters(spec) + norms * norm)


def layer_parameters(spec: ModelSpec) -> int:
    """Of one layer's products: all but its norms of the residual stream."""
    hidden, neurons = spec.hidden_size, spec.intermediate_size
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    attention = hidden * (2 * queries + 2 * keys) + spec.qkv_bias * (queries + 2 * keys) + spec.out_bias * hidden
    if spec.qk_norm == "head":
        attention += 2 * spec.head_dim
    inner = 2 if spec.gated else 1
    return attention + (inner + 1) * hidden * neurons + spec.mlp_bias * (inner * neurons + hidden)


def kv_bytes_per_token(spec: ModelSpec, bytes_per_element: int) -> int:
    """Bytes of keys and values that one token leaves in the cache, all layers and KV heads."""
    return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * bytes_per_element
