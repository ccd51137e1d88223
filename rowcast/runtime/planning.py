"""From what a caller asked for to a plan: made here, or given and checked. Reads no weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from math import gcd
from pathlib import Path

from rowcast.errors import OutOfMemoryError, UserError
from rowcast.kernels.linear import packed_copy_bytes
from rowcast.placement.plan import DTYPE_BYTES, VERIFICATIONS, Plan
from rowcast.placement.resident import pass_bytes, resident_plan
from rowcast.placement.units import parse_bytes
from rowcast.runtime import device as devices
from rowcast.runtime.checkpoint import Checkpoint
from rowcast.runtime.kv import why_not_streaming
from rowcast.runtime.ladder.drafts import Draft, open_drafts
from rowcast.runtime.ladder.memory import ladder_needs, lookahead
from rowcast.runtime.ladder.spec import Ladder, Rung, resolve
from rowcast.runtime.spec import ModelSpec, kv_bytes_per_token
from rowcast.runtime.tokenizer import Tokenizer

BLOCK_SIZE = 16
"""KV entries in a block, unless the caller says otherwise."""

KV_SHARE = 0.75
"""Of the KV tokens that the last rung alone could have, what `auto` leaves it at least."""


@dataclass(frozen=True, slots=True)
class Target:
    """The model that decides, opened."""

    checkpoint: Checkpoint
    spec: ModelSpec
    fingerprint: str
    tokenizer: Tokenizer | None


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What a caller asked for, under `LLM`'s names and with its defaults."""

    ladder: str | Ladder = "auto"
    draft: str | None = None
    kv_budget: int | None = None
    verification: str = "coupled"
    dtype: str = "auto"
    device: str = "auto"
    gpu_memory: str | int | None = None
    host_memory: str | int | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int | None = None


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan with what it speaks of."""

    plan: Plan
    ladder: Ladder
    drafts: Mapping[str, Draft]
    """By the names that rungs give them."""


def make_plan(target: Target, wish: Wish, opened: Mapping[str, Checkpoint]) -> Planned:
    """The all-resident plan for what was asked; its notes give the reasons. `opened`: checkpoints of drafts by name.

    Under the ladder `auto`, rungs that memory is too short for are left out. Raises UserError.
    """
    if wish.verification not in VERIFICATIONS:
        raise UserError(f"verification={wish.verification!r:.60} is not known: use {' or '.join(VERIFICATIONS)}")
    spec = target.spec
    device, device_reason = devices.choose_device(wish.device)
    dtype, dtype_reason = devices.choose_dtype(wish.dtype, target.checkpoint.stored_dtype, device)
    asked = {
        what: None if amount is None else parse_bytes(amount, what)
        for what, amount in (("gpu_memory", wish.gpu_memory), ("host_memory", wish.host_memory))
    }
    if device.type == "cpu" and wish.gpu_memory is not None:
        raise UserError(
            f"gpu_memory={wish.gpu_memory} was given, but the model runs on the CPU: give host_memory, or device='cuda'"
        )
    budget, budget_reason = devices.budget_bytes(device, asked["gpu_memory" if device.type == "cuda" else "host_memory"])
    width = DTYPE_BYTES[dtype]
    _check_kv_budget(wish.kv_budget)
    max_context = min(wish.max_model_len or spec.max_context, spec.max_context)
    ladder, adaptive, ladder_reasons = resolve(
        wish.ladder,
        draft=wish.draft,
        kv_budget=wish.kv_budget,
        max_context=max_context,
        kv_bytes_per_token=kv_bytes_per_token(spec, width),
        pass_bytes=pass_bytes(spec, width),
    )
    _check_views(ladder, max_context)
    drafts = open_drafts(ladder, spec, target.tokenizer, opened)
    notes = [device_reason, dtype_reason, budget_reason, *ladder_reasons]
    sizes = {"block_size": BLOCK_SIZE} | {
        name: value
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size")
        if (value := getattr(wish, name)) is not None
    }
    block_size = max(1, sizes["block_size"])
    ladder = Ladder(tuple(_possible(rung, drafts, block_size, adaptive, notes) for rung in ladder.rungs))

    def head_copy_bytes(model: ModelSpec) -> int:
        head = model.vocab_size * model.embed_size if model.tied_embeddings else 0
        return packed_copy_bytes(device, devices.DTYPES[dtype], head)

    def plan_for(ladder: Ladder) -> Planned:
        used = {rung.model: drafts[rung.model] for rung in ladder.lower if rung.model is not None}
        needs = ladder_needs(
            ladder,
            spec,
            used,
            adaptive=adaptive,
            verification=wish.verification,
            width=width,
            block_size=block_size,
            max_context=max_context,
            head_copy_bytes=head_copy_bytes,
        )
        plan = resident_plan(
            spec,
            fingerprint=target.fingerprint,
            dtype=dtype,
            device=str(device),
            budget_bytes=budget,
            head_copy_bytes=head_copy_bytes(spec),
            needs=needs,
            notes=tuple(notes),
            **sizes,
        )
        idle = [rung for rung in ladder.lower if rung.gamma is None and rung.pays_from >= plan.max_context]
        told = [f"rung {rung} never runs: {rung.pays_from} tokens are not reached, unless its gamma is pinned" for rung in idle]
        return Planned(replace(plan, notes=plan.notes + told), ladder, used)

    if adaptive:
        return _what_fits(ladder, plan_for, notes)
    planned = plan_for(ladder)
    _check_views(ladder, planned.plan.max_context)
    return planned


def check_plan(plan: object, target: Target, wish: Wish, opened: Mapping[str, Checkpoint]) -> Planned:
    """The caller's plan or plan file, if it fits the model and nothing else was asked for beside it. Raises UserError."""
    for field in fields(Wish):
        value = getattr(wish, field.name)
        if value != field.default:
            raise UserError(
                f"{field.name}={value} was given together with a plan, which decides that itself: leave one of them out"
            )
    if not isinstance(plan, (Plan, str, Path)):
        raise UserError(f"plan={plan!r:.60} has to be a Plan or the path of a plan file")
    chosen = plan if isinstance(plan, Plan) else Plan.load(plan)
    if chosen.fingerprint != target.fingerprint:
        raise UserError("the plan was made for other weights than this model's: make a plan for this model")
    if chosen.max_context > target.spec.max_context:
        context = f"the plan's context of {chosen.max_context} tokens is more than the model's {target.spec.max_context}"
        raise UserError(f"{context}: make the plan again")
    ladder = Ladder.parse(chosen.ladder_text)
    _check_executable(chosen, ladder)
    drafts = open_drafts(ladder, target.spec, target.tokenizer, opened)
    if chosen.draft_fingerprints != [draft.fingerprint for draft in drafts.values()]:
        raise UserError(
            f"the plan was made for other draft weights than those of {', '.join(drafts) or 'no draft'}: make the plan again"
        )
    return Planned(chosen, ladder, drafts)


def _check_kv_budget(kv_budget: int | None) -> None:
    if kv_budget is None:
        return
    if kv_budget < 1:
        raise UserError(f"kv_budget={kv_budget} is not a number of KV entries: give one from 95 to less than the context")
    try:
        Rung(kind="self", kv=kv_budget)
    except UserError as error:
        raise UserError(f"kv_budget={kv_budget}: {error}") from error


def _check_views(ladder: Ladder, max_context: int) -> None:
    """Raises UserError for a rung self that sees whatever plain sees."""
    for rung in ladder.lower:
        if rung.kind == "self" and rung.kv is not None and rung.kv >= max_context:
            raise UserError(
                f"kv={rung.kv} of the rung self is not less than the context of {max_context} tokens: use a smaller kv in the ladder, "
                "or a smaller kv_budget=, or a longer context"
            )


def _check_executable(plan: Plan, ladder: Ladder) -> None:
    """Raises UserError for what a plan file may say and no engine does."""
    _check_views(ladder, plan.max_context)
    for name, only in (("mode", "exact"), ("world", 1)):
        if getattr(plan, name) != only:
            raise UserError(f"the plan's {name} is {getattr(plan, name)!r:.60}, only {only!r} can be run: make the plan again")
    if plan.lookahead < lookahead(ladder):
        raise UserError(
            f"the plan's lookahead of {plan.lookahead} tokens is less than the {lookahead(ladder)} that its ladder {ladder} may draft: "
            "make the plan again"
        )
    slots = [rung for rung in ladder.lower if rung.kv is not None]
    if slots and plan.speculating_seqs < 1:
        raise UserError(f"the plan has room for speculating_seqs=0 sequences in the cache of {slots[0]}: make the plan again")


def _possible(rung: Rung, drafts: Mapping[str, Draft], block_size: int, adaptive: bool, notes: list[str]) -> Rung:
    """The rung; under `auto`, as its model and the KV blocks allow it. Raises UserError for a draft that cannot be streamed."""
    if adaptive and rung.retrieves:
        return replace(rung, chunk=gcd(rung.chunk, block_size))
    if rung.model is None or rung.kv is None or (reason := why_not_streaming(drafts[rung.model].spec)) is None:
        return rung
    if not adaptive:
        raise UserError(f"the draft {rung.model} cannot have a streaming cache of kv={rung.kv} entries ({reason}): use kv=full")
    notes.append(f"rung draft with all of its KV: {reason}")
    return Rung(kind="draft", model=rung.model, kv=None)


def _what_fits(ladder: Ladder, plan_for: Callable[[Ladder], Planned], notes: list[str]) -> Planned:
    """The ladder without the rungs that memory, or the KV that the last rung alone could have, leaves no room for."""
    bare = Ladder(tuple(rung for rung in ladder.rungs if rung.kind in ("ngram", "plain")))
    alone = plan_for(bare).plan
    while ladder != bare:
        *cheaper, left_out, last = ladder.rungs
        try:
            planned = plan_for(ladder)
        except OutOfMemoryError:
            why = ""
        else:
            plan = planned.plan
            enough = plan.max_context == alone.max_context and plan.kv_tokens >= KV_SHARE * alone.kv_tokens
            if enough and not any(rung.kind == "self" and (rung.kv or 0) >= plan.max_context for rung in ladder.lower):
                return planned
            why = f", with it there are {plan.kv_tokens} KV tokens, without lower rungs {alone.kv_tokens}"
        ladder = Ladder((*cheaper, last))
        notes.append(f"no rung {left_out}: memory is too short for it{why}")
    return plan_for(bare)
