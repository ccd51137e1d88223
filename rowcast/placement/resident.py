"""The all-resident plan: every weight and all KV on one device. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rowcast.errors import OutOfMemoryError, UserError
from rowcast.placement.plan import DTYPE_BYTES, Plan
from rowcast.placement.units import format_bytes
from rowcast.runtime.spec import ModelSpec, kv_bytes_per_token, parameter_count

BLOCK_SIZE = 16
"""KV entries in a block, unless the caller says otherwise."""

MAX_BATCH_TOKENS = 2048
"""Tokens of a step, likewise."""

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

MAX_SPECULATING_SEQS = 16
"""Sequences that have room in the lower rungs' caches. More gain little: a batch shares each pass over the weights as it is."""

SPECULATION_SHARE = 4
"""These caches take at most one part in so many of what weights leave, unless one sequence needs more."""


ROUND_SEQS = 64
"""Sequences of one round on the device."""

_SUM_ROWS = 4
"""Of a step's hidden states, those that a sum over ranks holds at once: all ranks' parts, or pieces of them, and the sum in float32."""

_SPLIT, _MOST_SPLITS = 256, 128
"""Entries of a context that one part of an attention's sum is of at least, and most such parts."""

_STATES_PART = 32
"""Hidden states of a long prompt take at most one part in so many of a device's memory."""

_GRAPHS_BYTES = 64 << 20
"""Captured graphs and the states of rounds."""


def round_rows(max_num_seqs: int) -> int:
    """Rows of a round on the device for so many sequences: rounded up to a power of two."""
    return 1 << (min(max_num_seqs, ROUND_SEQS) - 1).bit_length()


def rank_share(spec: ModelSpec, world: int) -> ModelSpec:
    """What the fullest of `world` tensor-parallel ranks holds, as a model of its own to be counted: its heads, neurons and rows of the
    vocabulary. KV heads that are fewer than ranks are held by several."""
    if world == 1:
        return spec
    return replace(
        spec,
        vocab_size=-(-spec.vocab_size // world),
        num_heads=spec.num_heads // world,
        num_kv_heads=max(1, spec.num_kv_heads // world),
        intermediate_size=-(-spec.intermediate_size // world),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LadderNeeds:
    """A ladder, and what it takes beside the weights and the KV of a plain model. Bytes are those of one rank."""

    ladder: tuple[str, ...]
    """Rungs, cheapest first; the last decides."""
    mode: str = "exact"
    calibration: str = ""
    """Fingerprint of what sparse rungs read."""
    adaptive: bool = False
    verification: str = "coupled"
    draft_fingerprints: tuple[str, ...] = ()
    lookahead: int = 0
    """Tokens that a round drafts for one sequence at most."""
    models: tuple[ModelSpec, ...] = ()
    """Of the drafts."""
    weight_bytes: int = 0
    """Weights of the drafts, and what sparse and low-bit rungs add."""
    spared_bytes: int = 0
    """Weights of the model in its own format that no rung needs, less those that it is held as in their place (`packed`)."""
    pass_bytes: int | None = None
    """Weights that a pass of the last rung reads; None: those of a plain model."""
    token_bytes: int = 0
    """For each token of a step: scores and choices of neurons, products of low-bit weights."""
    block_bytes: int = 0
    """For each KV block: chunk summaries, a draft's own KV."""
    slot_bytes: int = 0
    """For each sequence that speculates: caches of a few entries."""
    work_bytes: int = 0
    """While a view chooses its entries anew, of one sequence at a time; while weights are rounded."""
    copied_bytes: int = 0
    """Of a table that a long pass copies or dequantises while a layer runs."""
    query_bytes: int = 0
    """For each running sequence: queries kept from its last pass, inputs kept for heads that were skipped."""
    row_bytes: int = 0
    """For each sequence of a round on the device: lists of chunks."""
    list_work: tuple[tuple[int, int], ...] = ()
    """Held for good by each view that lists chunks, for its choices: for each sequence of a round, and at most."""
    on_device: bool = False
    """Rounds run on the device: what their graphs hold is counted."""
    law_rows: int = 0
    """Float32 rows of logits that a round keeps for each sequence that speculates."""
    packed: bool = False
    """The model's weights are held as its checkpoint packs them: `spared_bytes` is by how much they are less."""
    anyone: bool = False
    """Sequences without room in those caches speculate, too: a draft keeps its whole KV."""


PLAIN = LadderNeeds(ladder=("plain",))


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
    max_num_batched_tokens: int = MAX_BATCH_TOKENS,
    block_size: int = BLOCK_SIZE,
    needs: LadderNeeds = PLAIN,
    notes: tuple[str, ...] = (),
    world: int = 1,
) -> Plan:
    """Weights first, then work space, then the lower rungs' caches, then as much KV as `max_num_seqs` full contexts can use or the
    budget allows.

    Of one of `world` ranks, which the budget, `head_copy_bytes` and `needs` are of, too; `spec` is the whole model.
    `head_copy_bytes`: what a second, re-ordered copy of a tied LM head takes. `max_model_len` None: the model's own, shortened by the
    KV memory if that is smaller. Raises OutOfMemoryError when the budget cannot hold weights, lower rungs for one sequence and
    `max_model_len` tokens (one block if None), and UserError for values out of range.
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
    share = rank_share(spec, world)
    weights = parameter_count(share) * width + head_copy_bytes - needs.spared_bytes
    token_bytes = kv_bytes_per_token(share, width)
    block_bytes = token_bytes * block_size
    paged_bytes = block_bytes + needs.block_bytes
    context = max_model_len or spec.max_context
    context_blocks = -(-context // block_size)
    needed = context_blocks if max_model_len is not None else 1
    after_weights = budget_bytes - weights - needs.weight_bytes
    seqs = min(max_num_seqs, MAX_SPECULATING_SEQS) if needs.lookahead else 0
    while True:
        caches = seqs * needs.slot_bytes + max_num_seqs * needs.query_bytes
        work = work_bytes(
            share,
            width,
            max_num_seqs,
            max_num_batched_tokens,
            context,
            needs,
            max_num_seqs if needs.anyone else seqs,
            spec.vocab_size,
        )
        if world > 1:
            work += _SUM_ROWS * max_num_batched_tokens * spec.hidden_size * width
        rest = after_weights - work - caches
        if seqs <= 1 or (rest >= needed * paged_bytes and caches <= after_weights // SPECULATION_SHARE):
            break
        seqs -= 1
    if rest < needed * paged_bytes:
        kv = {f"KV for {needed * block_size} tokens": needed * paged_bytes}
        lower = {f"the rungs of {' / '.join(needs.ladder)}": needs.weight_bytes + caches}
        raise _too_little(budget_bytes, device, {"weights": weights, "work space": work, **lower, **kv})
    blocks = min(max_num_seqs * context_blocks, rest // paged_bytes)
    if device == "cpu" and blocks * block_bytes > CPU_KV_BYTES // world:
        blocks = min(blocks, max(context_blocks, CPU_KV_BYTES // world // block_bytes))
    if blocks < context_blocks:
        chosen.append(f"context {blocks * block_size} instead of {context} tokens: the budget holds no more KV")
        context = blocks * block_size
    return Plan(
        fingerprint=fingerprint,
        draft_fingerprints=list(needs.draft_fingerprints),
        ladder=list(needs.ladder),
        calibration=needs.calibration,
        adaptive=needs.adaptive,
        verification=needs.verification,
        mode=needs.mode,
        dtype=dtype,
        device=device,
        world=world,
        max_context=context,
        max_num_seqs=max_num_seqs,
        max_batch_tokens=max_num_batched_tokens,
        block_size=block_size,
        num_blocks=blocks,
        lookahead=needs.lookahead,
        speculating_seqs=seqs,
        budget_bytes=budget_bytes,
        weight_bytes=weights,
        rung_weight_bytes=needs.weight_bytes,
        kv_bytes=blocks * block_bytes,
        rung_kv_bytes=blocks * needs.block_bytes + caches,
        work_bytes=work,
        pass_bytes=pass_bytes(share, width) if needs.pass_bytes is None else needs.pass_bytes,
        kv_token_bytes=token_bytes,
        notes=chosen,
        weights="packed" if needs.packed else "unpacked",
    )


def states_bytes(spec: ModelSpec, width: int, tokens: int) -> int:
    """Hidden states of so many tokens of a prompt that is run layer by layer: theirs and one layer's."""
    return 2 * tokens * spec.hidden_size * width


def layered_tokens(spec: ModelSpec, width: int, prompt: int, memory_bytes: int) -> int:
    """Tokens of a prompt that are run layer by layer at once, where KV lies elsewhere: as many as a part of the memory has hidden
    states of; 0: no more than a step has anyway."""
    tokens = min(prompt, memory_bytes // _STATES_PART // states_bytes(spec, width, 1))
    return tokens if tokens > MAX_BATCH_TOKENS else 0


def pass_bytes(spec: ModelSpec, width: int) -> int:
    """Bytes of weights that one forward pass reads: everything but embedding rows that are only looked up."""
    looked_up = 0 if spec.tied_embeddings else spec.vocab_size * spec.embed_size
    if spec.learned_positions:
        looked_up += (spec.max_context + spec.position_offset) * spec.hidden_size
    return (parameter_count(spec) - looked_up) * width


def _too_little(budget: int, device: str, parts: dict[str, int]) -> OutOfMemoryError:
    """What takes how much, and what would help."""
    told = [f"{name} {format_bytes(count)}" for name, count in parts.items() if count]
    return OutOfMemoryError(
        f"not enough memory: {', '.join(told[:-1])} and {told[-1]} need {format_bytes(sum(parts.values()))}, the budget is "
        f"{format_bytes(budget)}: raise --{'host' if device == 'cpu' else 'gpu'}-memory, use a 16-bit --dtype, a smaller "
        f"--max-model-len{', --ladder plain' if len(told) > 3 else ''} or a smaller model"
    )


def work_bytes(
    spec: ModelSpec,
    width: int,
    max_num_seqs: int,
    max_batch_tokens: int,
    context: int,
    needs: LadderNeeds,
    speculating: int,
    vocab_size: int | None = None,
) -> int:
    """Peak of what a step takes and gives back, and of the sampler's counts.

    Layers, of the largest model: residual stream and norms, fused QKV, MLP; one sequence's K/V of one layer, gathered; masks.
    Before them a view may choose its entries. In them a sparse rung scores neurons, and a table may be copied.
    Sampling: logits in parts, at least of one verification; laws of drafted tokens. Penalties: prompt and output counts of every
    running sequence, with room to grow. `vocab_size`: of whole rows of logits, where `spec` is a rank's share.
    """

    def layers(model: ModelSpec) -> int:
        qkv = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
        mlp = model.intermediate_size * (4 if model.gated else 2)
        gathered = context * 2 * model.num_kv_heads * model.head_dim
        return (max_batch_tokens * (4 * model.hidden_size + max(2 * qkv, mlp)) + gathered) * width + MASK_BYTES

    vocabulary = vocab_size or spec.vocab_size
    rows = max_num_seqs + speculating * needs.lookahead
    logits = min(max(LOGIT_ELEMENTS, (1 + needs.lookahead) * vocabulary), rows * vocabulary) * (width + LOGIT_BYTES)
    laws = 4 * speculating * needs.law_rows * vocabulary
    counts = 8 * max_num_seqs * vocabulary
    scores = max_batch_tokens * needs.token_bytes
    largest = max(*(layers(model) for model in (spec, *needs.models)), logits, needs.work_bytes)
    return largest + needs.copied_bytes + scores + laws + counts + _round_bytes(spec, max_num_seqs, context, needs)


def _round_bytes(spec: ModelSpec, max_num_seqs: int, context: int, needs: LadderNeeds) -> int:
    """What rounds on the device hold: lists of chunks and what they are chosen in, the last pass's queries, an attention's partial sums
    in float32, graphs."""
    if not needs.on_device:
        return 0
    rows = round_rows(max_num_seqs)
    tokens = rows * (1 + needs.lookahead)
    head = spec.num_heads * spec.head_dim
    queries = needs.query_bytes // 16 * tokens if needs.query_bytes else 0  # which counts at least 16 tokens of a sequence
    partials = 4 * tokens * head * min(_MOST_SPLITS, -(-context // _SPLIT))
    choices = sum(min(rows * each, most) for each, most in needs.list_work)
    return rows * needs.row_bytes + choices + queries + partials + _GRAPHS_BYTES
