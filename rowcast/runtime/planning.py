"""From what a caller asked for to a plan: made here, or given and checked. Reads no weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from rowcast.errors import OutOfMemoryError, UserError
from rowcast.kernels import gpu
from rowcast.kernels.linear import packed_copy_bytes
from rowcast.placement.executable import instead, not_yet
from rowcast.placement.plan import DTYPE_BYTES, MODES, VERIFICATIONS, Plan
from rowcast.placement.resident import BLOCK_SIZE, rank_share, resident_plan
from rowcast.placement.units import format_bytes, parse_bytes
from rowcast.runtime import device as devices
from rowcast.runtime import gpu_ceiling
from rowcast.runtime.checkpoint import Checkpoint
from rowcast.runtime.forecast import check_packed, spec_digest
from rowcast.runtime.ladder.drafts import Draft, open_drafts
from rowcast.runtime.ladder.feasible import check_density, check_kv_budget, check_sparse, check_views, offered, possible
from rowcast.runtime.ladder.memory import ladder_needs, lookahead
from rowcast.runtime.ladder.presets import Circumstances, check_mode, resolve
from rowcast.runtime.ladder.spec import Ladder
from rowcast.runtime.offloaded.disk import disk_rate
from rowcast.runtime.offloaded.plan import OffloadWish, offloading_plan
from rowcast.runtime.packed_choice import planned_forms, with_weights
from rowcast.runtime.packed_sizes import PackedForms, packed_forms
from rowcast.runtime.plan_notes import quality, reached_shares, rounded, with_own
from rowcast.runtime.shard import Shard
from rowcast.runtime.sparse.artefact import Calibration, beside
from rowcast.runtime.sparse.sizes import expected_bytes
from rowcast.runtime.spec import ModelSpec, kv_bytes_per_token
from rowcast.runtime.tokenizer import Tokenizer
from rowcast.settings import settings

KV_SHARE = 0.75
"""Of the KV tokens that the last rung alone could have, what `auto` leaves it at least."""


@dataclass(frozen=True, slots=True)
class Target:
    """The model that decides, opened."""

    checkpoint: Checkpoint
    spec: ModelSpec
    fingerprint: str
    tokenizer: Tokenizer | None
    name: str | None = None
    """What the caller calls it by; None: its path."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What a caller asked for, under `LLM`'s names and with its defaults."""

    ladder: str | Ladder = "auto"
    draft: str | None = None
    kv_budget: int | None = None
    verification: str = "coupled"
    mode: str = "exact"
    density: float | None = None
    calibration: str | None = None
    dtype: str = "auto"
    weights: str = "auto"
    device: str = "auto"
    gpu_memory: str | int | None = None
    host_memory: str | int | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int | None = None
    tensor_parallel_size: int = 1


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan with what it speaks of."""

    plan: Plan
    ladder: Ladder
    drafts: Mapping[str, Draft]
    """By the names that rungs give them."""
    calibration: Calibration | None = None
    """What sparse rungs read."""
    quality: str | None = None
    """What is known of an approximate ladder's output."""
    forms: PackedForms | None = None
    """As which the model's weights are held packed; None: they are not."""


def make_plan(target: Target, wish: Wish, opened: Mapping[str, Checkpoint]) -> Planned:
    """The all-resident plan for what was asked; its notes give the reasons. `opened`: checkpoints of drafts by name.

    Under the ladder `auto`, rungs that memory is too short for are left out. Raises UserError.
    """
    forms = packed_forms(target.checkpoint.source, target.spec)
    on_gpu = forms is not None and wish.weights == "auto" and _on_gpu(wish)

    def make(forms: PackedForms | None, why: str) -> Planned:
        found = _make_plan(target, wish, opened, forms, why)
        return found if wish.calibration is not None else replace(found, plan=with_own(found.plan, found.calibration))

    return with_weights(wish.weights, forms, on_gpu, make, lambda planned: planned.plan)


def _on_gpu(wish: Wish) -> bool:
    """Whether passes read weights at a GPU's rate, or as if they did."""
    device, _ = devices.choose_device(wish.device)
    return device.type != "cpu" or (wish.gpu_memory is not None and settings().cpu_as_gpu)


def _make_plan(target: Target, wish: Wish, opened: Mapping[str, Checkpoint], forms: PackedForms | None, why: str) -> Planned:
    """With weights that are held packed, or not; `why` is a note about that."""
    if wish.verification not in VERIFICATIONS:
        raise UserError(f"verification={wish.verification!r:.60} is not known: use {' or '.join(VERIFICATIONS)}")
    if wish.mode not in MODES:
        raise UserError(f"mode={wish.mode!r:.60} is not known: use {' or '.join(MODES)}")
    spec = target.spec
    if wish.gpu_memory is not None and wish.device != "cpu":
        gpu_ceiling.first_look()
    device, device_reason = devices.choose_device(wish.device)
    dtype, dtype_reason = devices.choose_dtype(wish.dtype, target.checkpoint.stored_dtype, device)
    asked = {
        what: None if amount is None else parse_bytes(amount, what)
        for what, amount in (("gpu_memory", wish.gpu_memory), ("host_memory", wish.host_memory))
    }
    stand_in = device.type == "cpu" and wish.gpu_memory is not None and settings().cpu_as_gpu
    if device.type == "cpu" and wish.gpu_memory is not None and not stand_in:
        raise UserError(
            f"gpu_memory={wish.gpu_memory} was given, but the model runs on the CPU: give host_memory={wish.gpu_memory} instead, or "
            "set ROWCAST_CPU_AS_GPU=1 to let the CPU stand in for a card of that size"
        )
    limit = "gpu_memory" if device.type == "cuda" or stand_in else "host_memory"
    world = wish.tensor_parallel_size
    budget, budget_reason = devices.budget_bytes(device, asked[limit], limit, world)
    ceiling = (asked["gpu_memory"] or 0) if device.type == "cuda" else 0
    Shard(0, world).check(spec)
    share = rank_share(spec, world)
    if world > 1 and device.type == "cpu":
        budget, budget_reason = budget // world, f"{budget_reason}, a part for each of {world} ranks"
    width = DTYPE_BYTES[dtype]
    check_kv_budget(wish.kv_budget)
    check_density(wish.density)
    packed = None if forms is None else forms.sizes(spec, width, world)
    calibration = Calibration.find(wish.calibration, target.checkpoint.path, target.fingerprint)
    if forms is not None and wish.calibration is None and wish.ladder == "auto":
        calibration = None  # no rows are chosen of packed weights: the model's own asks for no other
    max_context = min(wish.max_model_len or spec.max_context, spec.max_context)
    here = Circumstances(
        max_context=max_context,
        kv_bytes_per_token=kv_bytes_per_token(share, width),
        pass_bytes=lambda rung: expected_bytes(share, rung, width, calibration, packed),
        calibrated=None if calibration is None else offered(calibration),
        adapted=None if spec.adapted is None else spec.adapted.density,
    )
    ladder, adaptive, ladder_reasons = resolve(
        wish.ladder, here, mode=wish.mode, draft=wish.draft, kv_budget=wish.kv_budget, density=wish.density
    )
    check_views(ladder, max_context)
    check_sparse(ladder, spec, calibration, adaptive or wish.calibration is None)
    if forms is not None:
        check_packed(ladder)
    drafts = open_drafts(ladder, spec, target.tokenizer, opened)
    first = [device_reason, dtype_reason, budget_reason, *([why] if why else [])]
    notes = [*first, *ladder_reasons, *reached_shares(ladder, spec), *rounded(ladder, here)]
    sizes = {"block_size": BLOCK_SIZE} | {
        name: value
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size")
        if (value := getattr(wish, name)) is not None
    }
    block_size = max(1, sizes["block_size"])
    ladder = Ladder(tuple(possible(rung, drafts, block_size, adaptive, notes) for rung in ladder.rungs))
    if world == 1 and any(rung.at != "ranks" for rung in ladder.rungs):
        ladder = Ladder(tuple(replace(rung, at="ranks") for rung in ladder.rungs))
        notes.append("the draft runs beside the model: there is one rank")

    def head_copy_bytes(model: ModelSpec) -> int:
        head = model.vocab_size * model.embed_size if model.tied_embeddings else 0
        return packed_copy_bytes(device, devices.DTYPES[dtype], head)

    def plan_for(ladder: Ladder) -> Planned:
        used = {rung.model: drafts[rung.model] for rung in ladder.lower if rung.model is not None}
        needs = ladder_needs(
            ladder,
            share,
            used,
            adaptive=adaptive,
            verification=wish.verification,
            calibration=calibration,
            dense_copy=device.type == "cpu",
            listed=gpu.serves(device),
            width=width,
            block_size=block_size,
            max_context=max_context,
            head_copy_bytes=head_copy_bytes,
            packed=packed,
        )
        plan = resident_plan(
            spec,
            fingerprint=target.fingerprint,
            dtype=dtype,
            device=str(device) if world == 1 else device.type,  # each rank has its own
            budget_bytes=budget,
            head_copy_bytes=head_copy_bytes(share),
            needs=needs,
            notes=tuple(notes),
            world=world,
            **sizes,
        )
        idle = [rung for rung in ladder.lower if rung.gamma is None and rung.pays_from >= plan.max_context]
        told = [f"rung {rung} never runs: {rung.pays_from} tokens are not reached, unless its gamma is pinned" for rung in idle]
        plan = replace(plan, notes=plan.notes + told, spec=spec_digest(spec), ceiling_bytes=ceiling)
        return _planned(plan, ladder, used, calibration, target, forms)

    try:
        if adaptive:
            return _what_fits(ladder, plan_for, notes)
        planned = plan_for(ladder)
    except OutOfMemoryError:
        if device.type == "cpu" and not stand_in:
            raise
        limits = ceiling or budget, asked["host_memory"]
        elsewhere = _offloaded(target, wish, opened, calibration, device, stand_in, dtype, limits, tuple(first), forms)
        if elsewhere is None:
            raise
        return elsewhere
    check_views(ladder, planned.plan.max_context)
    return planned


def _offloaded(
    target: Target,
    wish: Wish,
    opened: Mapping[str, Checkpoint],
    calibration: Calibration | None,
    device: torch.device,
    stand_in: bool,
    dtype: str,
    limits: tuple[int, int | None],
    notes: tuple[str, ...],
    forms: PackedForms | None,
) -> Planned | None:
    """The plan with parts in host memory; None where no engine can execute it. `limits`: bytes of the GPU and of the host."""
    if forms is not None:
        forms = replace(forms, head=None) if forms.all else None
    asked = OffloadWish(
        model=str(target.checkpoint.path),
        ladder=wish.ladder,
        draft=wish.draft,
        kv_budget=wish.kv_budget,
        density=wish.density,
        mode=wish.mode,
        verification=wish.verification,
        calibration=calibration,
        calibration_given=wish.calibration is not None,
        dtype=dtype,
        device=str(device) if wish.tensor_parallel_size == 1 else device.type,
        stand_in=stand_in,
        gpu_memory_bytes=limits[0],
        context_bytes=gpu_ceiling.outside_bytes(device, wish.tensor_parallel_size) if device.type == "cuda" else 0,
        host_memory_bytes=limits[1],
        world=wish.tensor_parallel_size,
        max_context=wish.max_model_len,
        max_num_seqs=wish.max_num_seqs,
        max_batch_tokens=wish.max_num_batched_tokens,
        block_size=wish.block_size,
        forms=forms,
    )

    def drafts_of(ladder: Ladder) -> Mapping[str, Draft]:
        return open_drafts(ladder, target.spec, target.tokenizer, opened)

    def rate() -> float:
        return disk_rate(target.checkpoint.source, target.spec, devices.DTYPES[dtype])

    found = offloading_plan(asked, target.spec, target.fingerprint, drafts_of, notes, rate)
    return None if found is None else _planned(*found, calibration, target, forms)


def check_plan(plan: object, target: Target, wish: Wish, opened: Mapping[str, Checkpoint]) -> Planned:
    """The caller's plan or plan file, if it fits the model and nothing else was asked for beside it. Raises UserError."""
    for field in fields(Wish):
        value = getattr(wish, field.name)
        if value != field.default and field.name not in ("calibration", "tensor_parallel_size"):
            raise UserError(
                f"{field.name}={value} was given together with a plan, which decides that itself: leave one of them out"
            )
    if not isinstance(plan, (Plan, str, Path)):
        raise UserError(f"plan={plan!r:.60} has to be a Plan or the path of a plan file")
    chosen = plan if isinstance(plan, Plan) else Plan.load(plan)
    if chosen.fingerprint not in ("", target.fingerprint):
        raise UserError("the plan was made for other weights than this model's: make a plan for this model")
    if not chosen.fingerprint and chosen.spec != spec_digest(target.spec):
        made_for = f" ({chosen.forecast.model})" if chosen.forecast is not None else ""
        raise UserError(f"the plan was made for a model of another shape{made_for}: make a plan for this model with rowcast plan")
    if chosen.max_context > target.spec.max_context:
        context = f"the plan's context of {chosen.max_context} tokens is more than the model's {target.spec.max_context}"
        raise UserError(f"{context}: make the plan again")
    ladder = Ladder.parse(chosen.ladder_text)
    _check_executable(chosen, ladder, target.spec, wish.tensor_parallel_size)
    if gpu_ceiling.ceiling_bytes(chosen) is not None:
        gpu_ceiling.first_look()
    _check_device(chosen)
    calibration = _planned_calibration(chosen, ladder, target, wish.calibration)
    drafts = open_drafts(ladder, target.spec, target.tokenizer, opened)
    found = [draft.fingerprint if chosen.fingerprint else spec_digest(draft.spec) for draft in drafts.values()]
    if chosen.draft_fingerprints != found:
        raise UserError(
            f"the plan was made for other draft weights than those of {', '.join(drafts) or 'no draft'}: make the plan again"
        )
    return _planned(chosen, ladder, drafts, calibration, target, planned_forms(chosen, target.checkpoint.source, target.spec))


def _planned(
    plan: Plan,
    ladder: Ladder,
    drafts: Mapping[str, Draft],
    calibration: Calibration | None,
    target: Target,
    forms: PackedForms | None,
) -> Planned:
    """A plan with what it reads, and what is known of its output's quality."""
    calibration = calibration if plan.calibration else None
    name = target.name or str(target.checkpoint.path)
    told = quality(ladder.rungs[-1], calibration, name) if ladder.approximate else None
    return Planned(plan, ladder, drafts, calibration, told, forms if plan.weights == "packed" else None)


def _planned_calibration(plan: Plan, ladder: Ladder, target: Target, path: str | None) -> Calibration | None:
    """What the plan was made with: given, or the model's own. Raises UserError where it is missing or another one was given."""
    calibration = Calibration.find(path, target.checkpoint.path, target.fingerprint) if path or plan.calibration else None
    if plan.calibration and calibration is None:
        raise UserError(f"the plan was made with a calibration{_own_fault(target)}: give calibration=DIR, or make the plan again")
    if calibration is not None and calibration.identity != plan.calibration:
        made = "another calibration" if plan.calibration else "no calibration"
        found = "the model has a calibration of its own" if path is None else f"calibration={path} was given"
        raise UserError(f"{found}, but the plan was made with {made}: make the plan again")
    check_sparse(ladder, target.spec, calibration, plan.adaptive or path is None)
    return calibration


def _own_fault(target: Target) -> str:
    """Why the model's own calibration, if it has one, was left out."""
    if (own := beside(target.checkpoint.path)) is None:
        return ""
    try:
        Calibration.open(own, target.fingerprint)
    except UserError as error:
        return f", and the model's own cannot be used ({str(error).removesuffix('.')})"
    return ""


def _check_executable(plan: Plan, ladder: Ladder, spec: ModelSpec, world: int) -> None:
    """Raises UserError for what a plan file may say and no engine does."""
    check_views(ladder, plan.max_context)
    check_mode(ladder, plan.mode, str(ladder))
    if missing := not_yet(plan, plan.world):
        raise UserError(
            f"the plan has {', '.join(missing)}, which this version cannot do yet: {instead(plan, spec)}, or run without a plan"
        )
    if plan.world != world:
        raise UserError(
            f"the plan is for {plan.world} rank{'s' * (plan.world > 1)} and tensor_parallel_size={world} is not: run it with "
            f"tensor_parallel_size={plan.world}, or make the plan again"
        )
    if plan.lookahead < lookahead(ladder):
        raise UserError(
            f"the plan's lookahead of {plan.lookahead} tokens is less than the {lookahead(ladder)} that its ladder {ladder} may draft: "
            "make the plan again"
        )
    slots = [rung for rung in ladder.lower if rung.kv is not None]
    if slots and plan.speculating_seqs < 1:
        raise UserError(f"the plan has room for speculating_seqs=0 sequences in the cache of {slots[0]}: make the plan again")


def _check_device(plan: Plan) -> None:
    """Raises UserError where this machine is not what the plan counts on."""
    if plan.device == "cpu":
        return
    again = "make a plan for this machine with rowcast plan"
    try:
        device, _ = devices.choose_device(plan.device)
    except UserError as error:
        raise UserError(f"the plan is for a GPU ({plan.device}), which is not there: {again}") from error
    total, free = devices.total_bytes(device), devices.available_bytes(device)
    taken = plan.budget_bytes - plan.margin_bytes
    if plan.budget_bytes > total or taken > free:
        raise UserError(
            f"the plan takes {format_bytes(taken)} of a budget of {format_bytes(plan.budget_bytes)}, but {device} has "
            f"{format_bytes(total)}, of which {format_bytes(free)} are free: {again}"
        )


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
