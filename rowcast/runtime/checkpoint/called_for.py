"""The tensors that a model's maths reads: a file that holds others holds another model."""

from __future__ import annotations

from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.weight_map import names_for


def called_for(spec: ModelSpec) -> set[str]:
    """Hugging Face names of all tensors of the model, those that the checkpoint of a whole language model has."""
    names = names_for(spec)
    norm = ("weight", "bias")[: spec.norm_affine * (1 + spec.norm_bias)]
    found = {f"{names.embed}.weight"}
    if spec.learned_positions:
        found.add(f"{names.positions}.weight")
    if spec.embed_size != spec.hidden_size:
        found |= {f"{names.project_in}.weight", f"{names.project_out}.weight"}
    if spec.embed_norm:
        found |= {f"{names.embed_norm}.{part}" for part in norm}
    if spec.final_norm:
        found |= {f"{names.final_norm}.{part}" for part in norm}

    norms = [names.attn_norm] if spec.parallel_norms == 1 else [names.attn_norm, names.mlp_norm]
    products = [(stem, spec.qkv_bias) for stem in names.qkv] + [(names.out, spec.out_bias)]
    products += [(stem, spec.mlp_bias) for stem in ([names.gate] if spec.gated else []) + [names.up, names.down]]
    stems = [f"{stem}.{part}" for stem in norms for part in norm]
    stems += [f"{stem}.{part}" for stem, bias in products for part in ("weight", "bias")[: 1 + bias]]
    if spec.qk_norm == "head":
        stems += [f"{names.q_norm}.weight", f"{names.k_norm}.weight"]
    found |= {stem.format(layer) for stem in stems for layer in range(spec.num_layers)}

    head = set() if spec.tied_embeddings else {f"{names.head}.weight"}
    return head | {names.prefixes[0] + name for name in found}
