"""Where a family keeps its weights: Hugging Face tensor names, and how fused QKV rows are laid out. Torch-free.

The only place that knows the names. A name here is a stem: `.weight` and `.bias` are appended by the reader.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rowcast.errors import UserError
from rowcast.runtime.shard import Shard
from rowcast.runtime.spec import ModelSpec

QkvLayout = Literal["separate", "chunked", "grouped"]
"""separate: three tensors. chunked: rows [all q; all k; all v]. grouped: for each KV head its query heads, then k, then v."""


@dataclass(frozen=True, slots=True)
class Names:
    """Stems of one family's tensors. `{}` stands for the layer; an empty string: the family has no such tensor."""

    prefixes: tuple[str, ...]
    """Tried in order before every stem but `head`: checkpoints of the bare decoder leave the outer one off."""
    embed: str
    final_norm: str
    attn_norm: str
    mlp_norm: str
    qkv: tuple[str, ...]
    """One stem, or three for q, k and v."""
    layout: QkvLayout
    out: str
    up: str
    down: str
    gate: str = ""
    q_norm: str = ""
    k_norm: str = ""
    positions: str = ""
    embed_norm: str = ""
    project_in: str = ""
    project_out: str = ""
    head: str = "lm_head"


_LLAMA = Names(
    prefixes=("model.", ""),
    embed="embed_tokens",
    final_norm="norm",
    attn_norm="layers.{}.input_layernorm",
    mlp_norm="layers.{}.post_attention_layernorm",
    qkv=("layers.{}.self_attn.q_proj", "layers.{}.self_attn.k_proj", "layers.{}.self_attn.v_proj"),
    layout="separate",
    out="layers.{}.self_attn.o_proj",
    gate="layers.{}.mlp.gate_proj",
    up="layers.{}.mlp.up_proj",
    down="layers.{}.mlp.down_proj",
    q_norm="layers.{}.self_attn.q_norm",
    k_norm="layers.{}.self_attn.k_norm",
)

_OPT = Names(
    prefixes=("model.decoder.", "decoder.", ""),
    embed="embed_tokens",
    positions="embed_positions",
    project_in="project_in",
    project_out="project_out",
    final_norm="final_layer_norm",
    attn_norm="layers.{}.self_attn_layer_norm",
    mlp_norm="layers.{}.final_layer_norm",
    qkv=("layers.{}.self_attn.q_proj", "layers.{}.self_attn.k_proj", "layers.{}.self_attn.v_proj"),
    layout="separate",
    out="layers.{}.self_attn.out_proj",
    up="layers.{}.fc1",
    down="layers.{}.fc2",
)

_BLOOM = Names(
    prefixes=("transformer.", ""),
    embed="word_embeddings",
    embed_norm="word_embeddings_layernorm",
    final_norm="ln_f",
    attn_norm="h.{}.input_layernorm",
    mlp_norm="h.{}.post_attention_layernorm",
    qkv=("h.{}.self_attention.query_key_value",),
    layout="grouped",
    out="h.{}.self_attention.dense",
    up="h.{}.mlp.dense_h_to_4h",
    down="h.{}.mlp.dense_4h_to_h",
)

_MPT = Names(
    prefixes=("transformer.", ""),
    embed="wte",
    final_norm="norm_f",
    attn_norm="blocks.{}.norm_1",
    mlp_norm="blocks.{}.norm_2",
    qkv=("blocks.{}.attn.Wqkv",),
    layout="chunked",
    out="blocks.{}.attn.out_proj",
    up="blocks.{}.ffn.up_proj",
    down="blocks.{}.ffn.down_proj",
)

_FALCON = Names(
    prefixes=("transformer.", ""),
    embed="word_embeddings",
    final_norm="ln_f",
    attn_norm="h.{}.input_layernorm",
    mlp_norm="h.{}.post_attention_layernorm",
    qkv=("h.{}.self_attention.query_key_value",),
    layout="grouped",
    out="h.{}.self_attention.dense",
    up="h.{}.mlp.dense_h_to_4h",
    down="h.{}.mlp.dense_4h_to_h",
)

_FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "opt": _OPT,
    "bloom": _BLOOM,
    "mpt": _MPT,
    "falcon": _FALCON,
}


def names_for(spec: ModelSpec) -> Names:
    """The names of the spec's family, adapted to the variants that rename a tensor."""
    names = _FAMILIES[spec.family]
    if spec.family == "falcon" and spec.parallel_norms == 2:
        return replace(names, attn_norm="h.{}.ln_attn", mlp_norm="h.{}.ln_mlp")
    return names


def find_prefix(names: Names, tensors: Sequence[str]) -> str:
    """The prefix under which this checkpoint keeps the decoder. Raises UserError if its embedding is nowhere."""
    for prefix in names.prefixes:
        if f"{prefix}{names.embed}.weight" in tensors:
            return prefix
    wanted = f"{names.prefixes[0]}{names.embed}.weight"
    raise UserError(f"the checkpoint has no tensor {wanted}: its weights do not belong to the architecture that its config names")


@dataclass(frozen=True, slots=True)
class Piece:
    """`rows` of the tensor with stem `stem` are rows `target`, `target + 1`, ... of a rank's fused [q; k; v] matrix."""

    stem: str
    whole_rows: int
    """Rows of that tensor in the checkpoint."""
    rows: slice
    target: int


def qkv_pieces(spec: ModelSpec, names: Names, layer: int, shard: Shard) -> Iterator[Piece]:
    """The pieces that make a rank's fused matrix [(H + 2 K) d, D], H and K its own query and KV heads, q above k above v."""
    size, group = spec.head_dim, spec.group_size
    heads, kv_heads = shard.query_heads(spec), shard.kv_heads(spec)
    queries, keys = heads.stop - heads.start, kv_heads.stop - kv_heads.start
    targets = (0, queries * size, (queries + keys) * size)
    stems = [stem.format(layer) for stem in names.qkv]
    fused_rows = (spec.num_heads + 2 * spec.num_kv_heads) * size
    if names.layout == "grouped":
        for head in range(heads.start, heads.stop):
            row = (head // group * (group + 2) + head % group) * size
            yield Piece(stems[0], fused_rows, slice(row, row + size), targets[0] + (head - heads.start) * size)
        for kv_head in range(kv_heads.start, kv_heads.stop):
            row = (kv_head * (group + 2) + group) * size
            at = (kv_head - kv_heads.start) * size
            yield Piece(stems[0], fused_rows, slice(row, row + size), targets[1] + at)
            yield Piece(stems[0], fused_rows, slice(row + size, row + 2 * size), targets[2] + at)
        return
    counts = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
    base = 0
    for i, (count, span, target) in enumerate(zip(counts, (heads, kv_heads, kv_heads), targets, strict=True)):
        rows = slice(base + span.start * size, base + span.stop * size)
        if names.layout == "chunked":
            yield Piece(stems[0], fused_rows, rows, target)
            base += count * size
        else:
            yield Piece(stems[i], count * size, rows, target)
