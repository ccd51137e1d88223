"""What the rungs below the last take: weights, caches, work space.

The views allocate what is counted here, each once, when it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rowcast.errors import UserError
from rowcast.placement.resident import LadderNeeds
from rowcast.runtime.kv import Summary
from rowcast.runtime.ladder.control import GAMMAS
from rowcast.runtime.ladder.drafts import Draft
from rowcast.runtime.ladder.spec import STREAMING_STRIDE, Ladder
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


def ladder_needs(
    ladder: Ladder,
    spec: ModelSpec,
    drafts: Mapping[str, Draft],
    *,
    adaptive: bool,
    verification: str,
    width: int,
    block_size: int,
    head_copy_bytes: Callable[[ModelSpec], int],
) -> LadderNeeds:
    """The bytes that a ladder takes beside its last rung, whose model is `spec`.

    `drafts`: the draft models of its rungs, by the names that these give them. `width`: bytes of an element of weights and KV.
    `head_copy_bytes`: what a re-ordered copy of a model's tied LM head takes. Raises UserError for a `chunk` that does not divide
    `block_size`.
    """
    ahead = lookahead(ladder)
    models = [draft.spec for draft in drafts.values()]
    block_bytes = slot_bytes = 0
    for rung in ladder.lower:
        if rung.kind == "self":
            slot_bytes += selected_bytes(spec, rung.kv or 0, ahead, width)
        elif rung.kind == "draft":
            assert rung.model is not None
            model = drafts[rung.model].spec
            if rung.kv is None:
                block_bytes += block_size * kv_bytes_per_token(model, width)
            else:
                slot_bytes += streaming_bytes(model, rung.kv, rung.sinks, ahead, width)
    for summary in summaries(ladder):
        if block_size % summary.chunk:
            raise UserError(
                f"chunk={summary.chunk} does not divide a KV block of {block_size} tokens: use a divisor of {block_size}, or a "
                f"block_size that is a multiple of {summary.chunk}"
            )
        keys = kv_bytes_per_token(spec, width) // 2
        block_bytes += block_size // summary.chunk * keys * (2 if summary.score == "bounds" else 1)
    running = sum(rung.kind != "ngram" for rung in ladder.lower)
    return LadderNeeds(
        ladder=tuple(map(str, ladder.rungs)),
        adaptive=adaptive,
        verification=verification,
        draft_fingerprints=tuple(draft.fingerprint for draft in drafts.values()),
        lookahead=ahead,
        models=tuple(models),
        weight_bytes=sum(parameter_count(model) * width + head_copy_bytes(model) for model in models),
        block_bytes=block_bytes,
        slot_bytes=slot_bytes,
        query_bytes=kept_queries(ladder) * spec.num_layers * spec.num_heads * spec.head_dim * width,
        anyone=any(rung.kind == "draft" and rung.kv is None for rung in ladder.lower),
        law_rows=running * (ahead + 1) if verification == "maximal" else 0,
    )


def selected_bytes(spec: ModelSpec, kv: int, ahead: int, width: int) -> int:
    """One sequence's cache of selected entries: `kv` of them, `ahead` proposals and the pending token."""
    entries = kv + ahead + 1
    positions = 8 * spec.num_layers * spec.num_kv_heads if spec.alibi is not None or any(spec.windows) else 0
    return entries * (kv_bytes_per_token(spec, width) + positions)


def streaming_bytes(spec: ModelSpec, kv: int, sinks: int, ahead: int, width: int) -> int:
    """One sequence's streaming cache: `kv` entries, a stride of those on their way out, proposals; the sinks' keys once more."""
    entry = kv_bytes_per_token(spec, width)
    return (kv + STREAMING_STRIDE + ahead + 1) * entry + sinks * entry // 2
