"""The all-resident plan: every weight and all KV on one device. Torch-free."""

from __future__ import annotations

from rowcast.errors import OutOfMemoryError, UserError
from rowcast.placement.plan import DTYPE_BYTES, Plan
from rowcast.placement.units import format_bytes
from rowcast.runtime.spec import ModelSpec, kv_bytes_per_token, parameter_count

MAX_NUM_SEQS = 64
"""Sequences that run at the same time, unless the caller says otherwise."""

LOGIT_ELEMENTS = 1 << 22
"""Most logits held at once: a step with more rows samples them in parts."""

LOGIT_BYTES = 48
"""Taken for one such logit beside itself: its float32 form, integer words and float64 of the noise, sorted values and their mass."""

CPU_KV_BYTES = 4 << 30
"""KV memory taken on a CPU unless one full context needs more: host memory is shared with everything else."""

MASK_BYTES = 64 << 20
"""Attention masks and scores of one layer."""


def resident_plan(
    spec: ModelSpec,
    *,
    fingerprint: str,
    dtype: str,
    device: str,
    budget_bytes: int,
    head_copy_bytes: int = 0,
    max_model_len: int | None = None,
    max_num_seqs: int | None = None,
    max_num_batched_tokens: int = 2048,
    block_size: int = 16,
    notes: tuple[str, ...] = (),
) -> Plan:
    """Weights first, then work space, then as much KV as `max_num_seqs` full contexts can use or the budget allows.

    `head_copy_bytes`: what a second, re-ordered copy of a tied LM head takes. `max_model_len` None: the model's own, shortened by the
    KV memory if that is smaller. Raises OutOfMemoryError when the budget cannot hold the weights and `max_model_len` tokens (one block
    if None), and UserError for values out of range.
    """
    for name, value, low in (
        ("max_model_len", max_model_len, 2),
        ("max_num_seqs", max_num_seqs, 1),
        ("max_num_batched_tokens", max_num_batched_tokens, 1),
        ("block_size", block_size, 1),
    ):
        if value is not None and value < low:
            raise UserError(f"{name}={value} has to be at least {low}")
    if max_model_len is not None and max_model_len > spec.max_context:
        raise UserError(f"max_model_len={max_model_len} is more than the {spec.max_context} tokens that the model was made for")
    chosen = list(notes)
    if max_num_seqs is None:
        max_num_seqs = min(MAX_NUM_SEQS, max_num_batched_tokens)
    if max_num_batched_tokens < max_num_seqs:
        raise UserError(
            f"max_num_batched_tokens={max_num_batched_tokens} is less than max_num_seqs={max_num_seqs}, but a step has to hold one "
            "token of each sequence: raise the one or lower the other"
        )
    width = DTYPE_BYTES[dtype]
    weights = parameter_count(spec) * width + head_copy_bytes
    token_bytes = kv_bytes_per_token(spec, width)
    block_bytes = token_bytes * block_size
    context = max_model_len or spec.max_context
    context_blocks = -(-context // block_size)
    work = _work_bytes(spec, width, max_num_seqs, max_num_batched_tokens, context)
    needed = context_blocks if max_model_len is not None else 1
    rest = budget_bytes - weights - work
    if rest < needed * block_bytes:
        raise OutOfMemoryError(
            f"not enough memory: weights {format_bytes(weights)}, work space {format_bytes(work)} and KV for {needed * block_size} "
            f"tokens {format_bytes(needed * block_bytes)} need {format_bytes(weights + work + needed * block_bytes)}, the budget is "
            f"{format_bytes(budget_bytes)}: raise --{'host' if device == 'cpu' else 'gpu'}-memory, use a 16-bit --dtype, a smaller "
            "--max-model-len or a smaller model"
        )
    blocks = min(max_num_seqs * context_blocks, rest // block_bytes)
    if device == "cpu" and blocks * block_bytes > CPU_KV_BYTES:
        blocks = min(blocks, max(context_blocks, CPU_KV_BYTES // block_bytes))
    if blocks < context_blocks:
        chosen.append(f"context {blocks * block_size} instead of {context} tokens: the budget holds no more KV")
        context = blocks * block_size
    return Plan(
        fingerprint=fingerprint,
        ladder=["plain"],
        mode="exact",
        dtype=dtype,
        device=device,
        world=1,
        max_context=context,
        max_num_seqs=max_num_seqs,
        max_batch_tokens=max_num_batched_tokens,
        block_size=block_size,
        num_blocks=blocks,
        budget_bytes=budget_bytes,
        weight_bytes=weights,
        kv_bytes=blocks * block_bytes,
        work_bytes=work,
        pass_bytes=pass_bytes(spec, width),
        kv_token_bytes=token_bytes,
        notes=chosen,
    )


def pass_bytes(spec: ModelSpec, width: int) -> int:
    """Bytes of weights that one forward pass reads: everything but embedding rows that are only looked up."""
    looked_up = 0 if spec.tied_embeddings else spec.vocab_size * spec.embed_size
    if spec.learned_positions:
        looked_up += (spec.max_context + spec.position_offset) * spec.hidden_size
    return (parameter_count(spec) - looked_up) * width


def _work_bytes(spec: ModelSpec, width: int, max_num_seqs: int, max_batch_tokens: int, context: int) -> int:
    """Peak of what a step takes and gives back, and of the sampler's counts.

    Layers: residual stream and norms, fused QKV, MLP; one sequence's K/V of one layer, gathered; masks. Sampling: logits in parts.
    Penalties: prompt and output counts of every running sequence, with room to grow.
    """
    qkv = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    mlp = spec.intermediate_size * (4 if spec.gated else 2)
    activations = max_batch_tokens * (4 * spec.hidden_size + max(2 * qkv, mlp)) * width
    gathered = context * 2 * spec.num_kv_heads * spec.head_dim * width
    logits = min(max(LOGIT_ELEMENTS, spec.vocab_size), max_num_seqs * spec.vocab_size) * (width + LOGIT_BYTES)
    counts = 8 * max_num_seqs * spec.vocab_size
    return max(activations + gathered + MASK_BYTES, logits) + counts
