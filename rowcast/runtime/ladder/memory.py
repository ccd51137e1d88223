"""What a ladder takes beside the weights and the KV of a plain model: drafts, sparse and low-bit rungs, caches, work space. Torch-free.

The views allocate what is counted here, each once, when it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from rowcast.placement.resident import LadderNeeds
from rowcast.runtime import lowbit_sizes
from rowcast.runtime.kv.sizes import ListWork, PolicySizes, Summary, choice_bytes, listed_bytes, most_chunks, policy_sizes
from rowcast.runtime.ladder.options import GAMMAS
from rowcast.runtime.ladder.spec import STREAMING_STRIDE, Ladder, Rung
from rowcast.runtime.packed_sizes import PackedSizes
from rowcast.runtime.sparse.artefact import Calibration
from rowcast.runtime.sparse.sizes import (
    bank_bytes,
    copied_bytes,
    expected_bytes,
    late_bytes,
    late_share,
    making_bytes,
    predictor_bytes,
    rounds_write_late,
    score_bytes,
)
from rowcast.runtime.spec import ModelSpec, kv_bytes_per_token, parameter_count

KEPT_QUERIES = 16
"""Last queries of a pass by which views choose their entries, or as many as a proposal may reject and one more."""


def lookahead(ladder: Ladder) -> int:
    """Tokens that a round drafts for one sequence at most: rungs may be left out, so any may be the last rung's proposer."""
    return max((rung.gamma or GAMMAS[-1] for rung in ladder.lower), default=0)


def kept_queries(ladder: Ladder) -> int:
    """Queries that the full view has to keep for the rungs that choose entries by them."""
    chooses = any(rung.view in ("retrieval", "eviction") for rung in ladder.lower)
    return max(KEPT_QUERIES, lookahead(ladder) + 1) if chooses else 0


def summaries(ladder: Ladder) -> set[Summary]:
    """The chunk summaries that the full view has to keep for the rungs that rank chunks by them."""
    return {Summary(rung.score, rung.chunk) for rung in ladder.lower if rung.retrieves}


def lazy(ladder: Ladder, spec: ModelSpec) -> bool:
    """Whether the full view's entries may be completed by later passes: its own rung skips heads, and no other rung reads them."""
    return ladder.rungs[-1].heads is not None and spec.group_size == 1 and not any(rung.kind == "self" for rung in ladder.lower)


def kv_heads(ladder: Ladder, rung: Rung, spec: ModelSpec, *, on_gpu: bool) -> float:
    """Share of the heads whose keys and values a pass of the rung over one token writes, where entries may be late: the last rung fills
    in all of them from time to time; what a lower one skips in its rounds, the last rung writes. `on_gpu`: in a GPU's rounds."""
    last = rung == ladder.rungs[-1]
    if rung.heads is None or spec.group_size > 1 or (on_gpu and not rounds_write_late(lookahead(ladder), last=last)):
        return 1.0
    if last:
        return late_share(rung.heads) if lazy(ladder, spec) else 1.0
    alone = sum(lower.kind == "self" and lower.kv is None for lower in ladder.lower) == 1
    return rung.heads if alone and rung.kv is None else 1.0


class DraftModel(Protocol):
    """What is asked of a draft here."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def fingerprint(self) -> str: ...


def ladder_needs(
    ladder: Ladder,
    spec: ModelSpec,
    drafts: Mapping[str, DraftModel],
    *,
    adaptive: bool,
    verification: str,
    calibration: Calibration | None,
    dense_copy: bool,
    listed: bool,
    width: int,
    block_size: int,
    max_context: int,
    head_copy_bytes: Callable[[ModelSpec], int],
    packed: PackedSizes | None = None,
) -> LadderNeeds:
    """The bytes that a ladder takes beside a plain model, `spec`.

    `drafts`: the draft models of its rungs, by the names that these give them; one with at=driver takes
    nothing of a rank. `calibration`: what its sparse rungs read.
    `dense_copy`: passes over all weights take layers in a layout of their own, beside the one that sparse passes take, of which
    long passes copy a table at a time. `listed`: rounds run on the device, where a retrieval view lists chunks and copies none.
    `width`: bytes of an element of weights and KV. `max_context`: tokens of the longest sequence. `head_copy_bytes`: what a
    re-ordered copy of a model's tied LM head takes. `packed`: as which the model's weights are held. Raises UserError for a `chunk`
    that does not divide `block_size`.
    """
    ahead = lookahead(ladder)
    held = {rung.model for rung in ladder.lower if rung.at != "driver"}
    models = [draft.spec for name, draft in drafts.items() if name in held]
    block_bytes = slot_bytes = work_bytes = row_bytes = 0
    tokens, list_work = kept_queries(ladder), []
    for rung in ladder.lower:
        if rung.kind == "self" and rung.kv is not None and rung.retrieves and listed:
            slot_bytes += listed_bytes(spec, rung.kv, rung.chunk)
            row_bytes += listed_bytes(spec, rung.kv, rung.chunk)
            list_work.append(ListWork.of(spec, tokens, width).bytes(most_chunks(max_context, tokens, rung.chunk)))
        elif rung.kind == "self" and rung.kv is not None:
            slot_bytes += selected_bytes(spec, policy_sizes(rung), rung.kv, ahead, width)
            work_bytes = max(work_bytes, choice_bytes(policy_sizes(rung), spec, rung.kv, max_context, tokens, width))
        elif rung.kind == "draft" and rung.at != "driver":
            assert rung.model is not None
            model = drafts[rung.model].spec
            if rung.kv is None:
                block_bytes += block_size * kv_bytes_per_token(model, width)
            else:
                slot_bytes += streaming_bytes(model, rung.kv, rung.sinks, ahead, width)
    for summary in summaries(ladder):
        block_bytes += summary.per_block(block_size) * summary.parts * kv_bytes_per_token(spec, width) // 2
    last, light = ladder.rungs[-1], {rung.weights for rung in ladder.rungs if rung.weights is not None}
    sparse, few_bits = [rung for rung in light if rung.sparse], [rung.bits for rung in light if rung.bits is not None]
    dense = any(rung.kind in ("self", "plain") and rung.weights is None for rung in ladder.rungs)
    packed = packed if dense else None
    banks = bool(sparse) or (dense and not dense_copy and packed is None)
    alone = not (dense or sparse)
    own_head = packed is not None and packed.head_bytes > 0
    work_bytes = max(work_bytes, *(making_bytes(spec, rung, width, calibration) for rung in sparse), 0)
    if few_bits:
        work_bytes = max(work_bytes, lowbit_sizes.making_bytes(spec, width))
    lowbit = bool(few_bits) or packed is not None
    running = sum(rung.kind != "ngram" for rung in ladder.lower)
    return LadderNeeds(
        ladder=tuple(map(str, ladder.rungs)),
        mode="approximate" if ladder.approximate else "exact",
        calibration=calibration.identity if sparse and calibration is not None else "",
        adaptive=adaptive,
        verification=verification,
        draft_fingerprints=tuple(draft.fingerprint for draft in drafts.values()),
        lookahead=ahead,
        models=tuple(models),
        weight_bytes=sum(parameter_count(model) * width + head_copy_bytes(model) for model in models)
        + (bank_bytes(spec, width if dense_copy and dense else 0) if banks else 0)
        + sum(predictor_bytes(spec, rung, calibration) for rung in sparse)
        + sum(lowbit_sizes.rounded_bytes(spec, bits) for bits in few_bits)
        + max(0, len(few_bits) - alone) * lowbit_sizes.bias_bytes(spec, width, banks=banks),
        spared_bytes=(lowbit_sizes.spared_bytes(spec, width) if alone else 0 if packed is None else packed.spared_bytes)
        + (head_copy_bytes(spec) if alone or own_head else 0),
        pass_bytes=expected_bytes(spec, last, width, calibration, packed),
        packed=packed is not None,
        token_bytes=max(score_bytes(spec) if sparse else 0, lowbit_sizes.token_bytes(spec) if lowbit else 0),
        block_bytes=block_bytes,
        slot_bytes=slot_bytes,
        work_bytes=work_bytes,
        row_bytes=row_bytes,
        list_work=tuple(list_work),
        on_device=listed,
        copied_bytes=max(
            copied_bytes(spec, width) if sparse and dense_copy else 0, lowbit_sizes.product_bytes(spec) if lowbit else 0
        ),
        query_bytes=tokens * spec.num_layers * spec.num_heads * spec.head_dim * width
        + sum(rung.heads is not None for rung in sparse) * late_bytes(spec, width),
        anyone=any(rung.kind in ("draft", "self") and rung.kv is None for rung in ladder.lower),
        law_rows=running * (ahead + 1) if verification == "maximal" else 0,
    )


def selected_bytes(spec: ModelSpec, policy: PolicySizes, kv: int, ahead: int, width: int) -> int:
    """One sequence's cache of selected entries: `kv` of them, `ahead` proposals and the pending token; what the policy remembers."""
    heads = spec.num_layers * spec.num_kv_heads
    positions = 8 * heads if spec.alibi is not None or any(spec.windows) else 0
    return (kv + ahead + 1) * (kv_bytes_per_token(spec, width) + positions) + kv * heads * policy.held_bytes


def streaming_bytes(spec: ModelSpec, kv: int, sinks: int, ahead: int, width: int) -> int:
    """One sequence's streaming cache: `kv` entries, a stride of those on their way out, proposals; the sinks' keys once more."""
    entry = kv_bytes_per_token(spec, width)
    return (kv + STREAMING_STRIDE + ahead + 1) * entry + sinks * entry // 2
