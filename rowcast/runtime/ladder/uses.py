"""A ladder as the cost model sees it: passes, shares and bytes of its rungs, from its text and a config. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product

from rowcast.placement.resident import BLOCK_SIZE, MAX_BATCH_TOKENS, MAX_SPECULATING_SEQS, LadderNeeds, work_bytes
from rowcast.placement.workload import Input, LadderUse, RungUse
from rowcast.runtime.acceptances import NEVER, Acceptance, Acceptances
from rowcast.runtime.ladder.costs import expected_passes, expected_tokens
from rowcast.runtime.ladder.memory import kv_heads, ladder_needs, lookahead, streaming_bytes
from rowcast.runtime.ladder.options import GAMMAS, INNER_GAMMAS
from rowcast.runtime.ladder.spec import Ladder, Rung
from rowcast.runtime.lowbit_sizes import replaced_bytes, rounded_bytes
from rowcast.runtime.packed_sizes import PackedSizes
from rowcast.runtime.sparse.artefact import Calibration
from rowcast.runtime.sparse.checks import AHEAD
from rowcast.runtime.sparse.sizes import asking_layers, fetched_share, head_share, inner_share, layer_proxy_bytes, proxy_bytes
from rowcast.runtime.spec import ModelSpec, kv_bytes_per_token, parameter_count

_GAMMA, _INNER_GAMMA = 6, 2
"""Where nothing pins them: TriForce's on one card (arXiv 2404.11912, section 5.1)."""


@dataclass(frozen=True, slots=True)
class DraftConfig:
    """A draft of which only the config is known."""

    spec: ModelSpec
    fingerprint: str = ""


def with_gammas(ladder: Ladder, gammas: Sequence[int]) -> Ladder:
    """The ladder with what the rung above asks of each rung below the last; 0: nothing is pinned there."""
    pinned = (replace(rung, gamma=gamma or None) for rung, gamma in zip(ladder.lower, gammas, strict=True))
    return Ladder((*pinned, ladder.rungs[-1]))


def gamma_grid(ladder: Ladder) -> list[tuple[int, ...]]:
    """All gammas to choose from: what the user pinned stays, a lookup whose gamma is open has 0."""
    grids: list[tuple[int, ...]] = []
    for i, rung in enumerate(ladder.lower):
        if rung.gamma is not None or rung.kind == "ngram":
            grids.append((rung.gamma or 0,))
        else:
            grids.append(GAMMAS if i == len(ladder.lower) - 1 else INNER_GAMMAS)
    return list(product(*grids))


def ladder_use(
    ladder: Ladder,
    spec: ModelSpec,
    *,
    width: int,
    context: int,
    block_size: int = BLOCK_SIZE,
    calibration: Calibration | None,
    acceptance: Acceptances,
    drafts: Mapping[str, ModelSpec],
    batch: int = 1,
    packed: PackedSizes | None = None,
) -> LadderUse:
    """A resolved ladder as the cost model sees it; gammas that are open take TriForce's. `drafts`: by the names that rungs give them.

    `packed`: as which the target's weights are held, whole. A lookup is used where its acceptance is above 0 or its gamma is
    pinned; it takes no time. Raises UserError for a `chunk` that does not divide `block_size`.
    """
    last = ladder.rungs[-1]
    chances = [acceptance.find(rung, above, top=above == last) for rung, above in pairwise(ladder.rungs)]
    used = [i for i, rung in enumerate(ladder.lower) if rung.kind != "ngram" or rung.gamma is not None or chances[i].value]
    gammas = [ladder.rungs[i].gamma or (_GAMMA if i == used[-1] else _INNER_GAMMA) for i in used]
    asked = gammas[-1] if gammas else 0
    passes = expected_passes([chances[i].value for i in used], gammas, asked) if used else []
    if not any(rung.kind in ("self", "plain") and rung.weights is None for rung in ladder.rungs):
        packed = None
    needs = (_needs(ladder, spec, drafts, calibration, width, block_size, context, each, packed) for each in (True, False))
    listed, copied = needs
    part = 1.0 if listed.anyone or not used else min(batch, MAX_SPECULATING_SEQS) / batch
    rungs = [
        replace(
            _rung_use(rung, spec, count, tokens, width, calibration, drafts, packed),
            kv_heads=kv_heads(ladder, rung, spec, on_gpu=False),
            gpu_kv_heads=kv_heads(ladder, rung, spec, on_gpu=True),
            sequences=1.0 if rung is last else part,
            asked=0.0 if rung.at == "ranks" else above,
        )
        for rung, (count, tokens), above in zip(
            [*(ladder.rungs[i] for i in used), last],
            [*passes, (1.0, 1 + asked * part)],
            [*(count for count, _ in passes[1:]), *([1.0] if used else []), 0.0],
            strict=True,
        )
        if rung.kind != "ngram"
    ]
    outer = chances[used[-1]] if used else NEVER

    def committed(acceptance: float) -> float:
        """By all sequences on average, those without room for the lower rungs among them."""
        return part * expected_tokens(acceptance, asked) + 1 - part

    own = [
        _draft_bytes(rung, drafts, ladder, context, width)
        for rung in ladder.lower
        if rung.kind == "draft" and rung.at != "driver"
    ]
    streamed, kept = sum(each[0] for each in own), sum(each[1] for each in own)
    models = {rung.model: drafts[rung.model] for rung in ladder.lower if rung.model is not None}
    held = {rung.model for rung in ladder.lower if rung.at != "driver"}
    fixed = sum(parameter_count(model) for name, model in models.items() if name in held) * width
    without = replace(listed, list_work=())
    work, listing = (
        max(_work_bytes(spec, width, batch, context, needs) for needs in (each, copied)) for each in (without, listed)
    )
    plain = plain_work_bytes(spec, width, batch, context)
    alone = _alone_bits(ladder) if packed is None else packed.bits
    placed = rounded_bytes(spec, alone) if alone and packed is None else 0
    return LadderUse(
        name=str(ladder),
        family=str(with_gammas(ladder, [0] * len(ladder.lower))),
        rungs=tuple(rungs),
        tokens_per_round=committed(outer.value),
        tokens_per_round_range=(committed(outer.low), committed(outer.high)),
        fixed_bytes=fixed,
        shared_bytes=listed.weight_bytes - fixed - placed,
        speculating=part,
        draft_kv_bytes=streamed + kept,
        slot_bytes=copied.slot_bytes - streamed + copied.query_bytes,
        listed_slot_bytes=listed.slot_bytes - streamed + listed.row_bytes + listed.query_bytes,
        kv_share=(listed.block_bytes / block_size - kept / context) / kv_bytes_per_token(spec, width),
        work_bytes=max(0, work - plain),
        listed_work_bytes=max(0, listing - plain),
        alone_bits=alone,
        packed=packed is not None,
        own_head=packed is None or packed.head_bytes > 0 or not spec.tied_embeddings,
        inputs=tuple(_inputs(ladder, chances, spec, calibration, width)),
    )


def plain_work_bytes(spec: ModelSpec, width: int, batch: int, context: int) -> int:
    """Work space of a plain step of `batch` sequences."""
    return _work_bytes(spec, width, batch, context, _plain_needs(spec, width, context))


def _rung_use(
    rung: Rung,
    spec: ModelSpec,
    passes: float,
    tokens: float,
    width: int,
    calibration: Calibration | None,
    drafts: Mapping[str, ModelSpec],
    packed: PackedSizes | None,
) -> RungUse:
    renewed = rung.kv / rung.refresh if rung.kind == "self" and rung.kv and rung.refresh else 0.0
    use = RungUse(name=str(rung), passes=passes, tokens=tokens, kv_entries=rung.kv, renewed=renewed)
    if rung.kind == "draft":
        assert rung.model is not None
        return replace(use, model=drafts[rung.model], at=rung.at)
    if rung.bits is not None:
        own = rounded_bytes(spec, rung.bits)
        return replace(use, own_weights_bytes=own, own_bits=rung.bits, own_weights_share=own / replaced_bytes(spec, width))
    if packed is not None and not rung.sparse:
        own = packed.products_bytes
        return replace(use, own_weights_bytes=own, own_bits=packed.bits, own_weights_share=own / replaced_bytes(spec, width))
    if not rung.sparse:
        return use
    asking = asking_layers(spec, rung, calibration)
    return replace(
        use,
        neurons=1.0 if rung.mlp is None else rung.mlp,
        fetched=fetched_share(rung, spec, calibration),
        candidates=inner_share(spec, rung),
        heads=1.0 if rung.heads is None else rung.heads,
        head_share=head_share(spec, calibration, width) if rung.lm == "hire" else 1.0,
        proxy_bytes=proxy_bytes(spec, rung, calibration),
        whole_proxy_bytes=(spec.num_layers - asking) * layer_proxy_bytes(spec, rung, calibration),
        asking=asking / spec.num_layers,
        ahead=rung.by is not None and rung.by.endswith(AHEAD),
        heads_ahead=rung.heads_by == "ahead",
    )


def _draft_bytes(rung: Rung, drafts: Mapping[str, ModelSpec], ladder: Ladder, context: int, width: int) -> tuple[int, int]:
    """One sequence's KV of a draft: in a streaming cache, or beside the target's."""
    assert rung.model is not None
    model = drafts[rung.model]
    if rung.kv is None:
        return 0, kv_bytes_per_token(model, width) * context
    return streaming_bytes(model, rung.kv, rung.sinks, lookahead(ladder), width), 0


def _alone_bits(ladder: Ladder) -> int:
    """Of the weights that are held instead of the target's own, where no rung reads those; 0: some rung does."""
    reads_target = any(rung.kind in ("self", "plain") and rung.bits is None for rung in ladder.rungs)
    return 0 if reads_target else ladder.rungs[-1].bits or 0


def _needs(
    ladder: Ladder,
    spec: ModelSpec,
    drafts: Mapping[str, ModelSpec],
    calibration: Calibration | None,
    width: int,
    block_size: int,
    context: int,
    listed: bool,
    packed: PackedSizes | None = None,
) -> LadderNeeds:
    """What the engine takes on a GPU. `listed`: its rungs read their part of the KV where it lies."""
    return ladder_needs(
        ladder,
        spec,
        {rung.model: DraftConfig(drafts[rung.model]) for rung in ladder.lower if rung.model is not None},
        adaptive=False,
        verification="coupled",
        calibration=calibration,
        dense_copy=False,
        listed=listed,
        width=width,
        block_size=block_size,
        max_context=context,
        head_copy_bytes=lambda _: 0,
        packed=packed,
    )


def _plain_needs(spec: ModelSpec, width: int, context: int) -> LadderNeeds:
    return _needs(Ladder((Rung(kind="plain"),)), spec, {}, None, width, BLOCK_SIZE, context, True)


def _work_bytes(spec: ModelSpec, width: int, batch: int, context: int, needs: LadderNeeds) -> int:
    """As `resident_plan` counts it for `batch` sequences at most."""
    speculating = min(batch, MAX_SPECULATING_SEQS) if needs.lookahead else 0
    return work_bytes(spec, width, batch, max(MAX_BATCH_TOKENS, batch), context, needs, batch if needs.anyone else speculating)


def _inputs(
    ladder: Ladder, chances: Sequence[Acceptance], spec: ModelSpec, calibration: Calibration | None, width: int
) -> Iterator[Input]:
    for rung, chance in zip(ladder.lower, chances, strict=True):
        yield Input(f"acceptance of {replace(rung, gamma=None)}", chance.value, chance.origin, chance.source)
    if any(rung.lm == "hire" for rung in ladder.rungs):
        share = head_share(spec, calibration, width)
        if calibration is not None and calibration.description.get("lm_head_share") is not None:
            yield Input("share of the LM head's bytes", share, "measured", f"calibration {calibration.path}")
        else:
            yield Input("share of the LM head's bytes", share, "assumed", "its first proxy, and a quarter of the second")
