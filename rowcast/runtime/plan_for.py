"""From a model, a machine and wishes to a plan with its forecast. Torch-free: neither the model's weights nor the machine are needed.

What the planner leaves open, the engine's fields, comes from the same functions that `planning` uses, so that a plan with everything on
one device allocates what it says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rowcast.errors import OutOfMemoryError, UserError
from rowcast.placement import corrections
from rowcast.placement.constants import Constants
from rowcast.placement.executable import NOT_YET, instead, not_yet
from rowcast.placement.forecast import MEMORY_CLASSES, DeviceMemory, Forecast
from rowcast.placement.hardware import Machine, machine_from
from rowcast.placement.here import this_machine
from rowcast.placement.plan import DTYPE_BYTES, Plan
from rowcast.placement.planner import Decision, decide
from rowcast.placement.resident import (
    BLOCK_SIZE,
    MAX_BATCH_TOKENS,
    MAX_SPECULATING_SEQS,
    LadderNeeds,
    layered_tokens,
    pass_bytes,
    resident_plan,
)
from rowcast.placement.units import parse_bytes
from rowcast.placement.workload import Workload
from rowcast.runtime.forecast import calibration_of, open_model, open_spec, spec_digest, workload
from rowcast.runtime.ladder.memory import ladder_needs
from rowcast.runtime.ladder.spec import Ladder
from rowcast.runtime.packed_choice import with_weights
from rowcast.runtime.packed_sizes import PackedForms
from rowcast.runtime.plan_notes import with_own
from rowcast.runtime.sparse.artefact import Calibration
from rowcast.runtime.spec import ModelSpec, kv_bytes_per_token
from rowcast.settings import settings

_HELD_BACK = (0, *(64 << 20 << power for power in range(6)))
"""GPU memory that the planner is not told of, one after another, until the engine, too, finds that its plan fits."""


@dataclass(frozen=True, kw_only=True)
class MachineWish:
    """Which machine, under the command line's names; nothing: this one."""

    gpus: str | None = None
    link: str | None = None
    inter_node: str | None = None
    gpu_memory: str | int | None = None
    host_memory: str | int | None = None


@dataclass(frozen=True, slots=True)
class Chosen:
    """A machine and how it is known."""

    machine: Machine
    told: str
    here: bool
    """It is this one: what was learnt of it counts."""


def choose_machine(wish: MachineWish) -> Chosen:
    """Raises UserError for what cannot be read or had."""
    gpu_memory = None if wish.gpu_memory is None else parse_bytes(wish.gpu_memory, "gpu_memory")
    host_memory = None if wish.host_memory is None else parse_bytes(wish.host_memory, "host_memory")
    if wish.gpus is None:
        for name, value in (("link", wish.link), ("inter_node", wish.inter_node)):
            if value is not None:
                raise UserError(
                    f"{name}={value} is of a machine that is named by its cards: add --gpus, such as --gpus 2xRTX4090"
                )
        here = this_machine(gpu_memory_bytes=gpu_memory, host_memory_bytes=host_memory)
        return Chosen(here.machine, here.told, True)
    machine = machine_from(wish.gpus, host_memory, link=wish.link, inter_node=wish.inter_node, gpu_memory_bytes=gpu_memory)
    told = "machine: by its cards' datasheets"
    if host_memory is None:
        total = machine.nodes[0].host.memory_bytes
        told += f"; {total >> 30} GiB of host memory are assumed, give --host-memory"
    return Chosen(machine, told, False)


def plan_for(
    model: str,
    wish: MachineWish | None = None,
    *,
    ladder: str | Ladder = "auto",
    draft: str | None = None,
    kv_budget: int | None = None,
    density: float | None = None,
    mode: str = "exact",
    calibration: str | Path | None = None,
    dtype: str = "auto",
    weights: str = "auto",
    context: int | None = None,
    prompt: int | None = None,
    batch: int = 1,
    acceptance: str | float | None = None,
    hit_rate: float | None = None,
    tensor_parallel: int | None = None,
    groups: int = 10_000,
) -> Plan:
    """The plan that commits a token soonest, for any weights of the model's shape. `weights`: as `LLM`'s.

    Names and meanings as in `workload` and `decide`. Raises UserError, and OutOfMemoryError with the nearest change that fits.
    """
    if not 1 <= groups <= 1_000_000:
        raise UserError(f"groups={groups} has to be from 1 to 1000000")
    chosen = choose_machine(wish or MachineWish())
    on_gpu = bool(chosen.machine.cards)
    _, stored, forms = open_model(model)
    number, number_reason = _dtype(dtype, stored, on_gpu)

    def planned(forms: PackedForms | None, why: str) -> Plan:
        work = workload(
            model=model,
            ladder=ladder,
            draft=draft,
            kv_budget=kv_budget,
            density=density,
            mode=mode,
            calibration=calibration,
            dtype=number,
            context=context,
            prompt=prompt,
            batch=batch,
            acceptance=acceptance,
            hit_rate=hit_rate,
            forms=forms,
        )
        notes = [chosen.told, number_reason, *([why] if why else [])]
        known = calibration_of(model, calibration)
        plan = _plan(work, chosen, number, known, tensor_parallel, groups, forms, notes)
        return plan if calibration is not None else with_own(plan, known)

    return with_weights(weights, forms, on_gpu, planned, lambda plan: plan)


def _plan(
    work: Workload,
    chosen: Chosen,
    number: str,
    known: Calibration | None,
    tensor_parallel: int | None,
    groups: int,
    forms: PackedForms | None,
    notes: list[str],
) -> Plan:
    on_gpu, spec = bool(chosen.machine.cards), work.spec
    digest = spec_digest(spec)
    learnt = {}
    if chosen.here:
        rate = chosen.machine.cards[0].memory_rate if on_gpu else chosen.machine.nodes[0].host.memory_rate
        learnt = corrections.remembered(digest, number, "cuda" if on_gpu else "cpu", rate.origin)
    notes = [*notes, *work_notes(work)]
    for held_back in _HELD_BACK:
        machine = chosen.machine.with_changes(gpu_memory_bytes=-held_back)
        decision = decide(work, machine, tensor_parallel=tensor_parallel, groups=groups, corrections=learnt or None)
        needs = _needs(decision.ladder.name, work, known, on_gpu, forms)
        forecast = replace(decision.forecast, memory=[_with_more(each, held_back) for each in decision.forecast.memory])
        if not _may_be_resident(forecast):
            break
        plan = _resident_plan(work, replace(decision, forecast=forecast), needs, number, on_gpu, notes)
        if plan is not None:
            return replace(plan, spec=digest, machine=chosen.machine.describe())
        if any(share.tier != "resident" for share in forecast.shares):
            break
        # The engine counts its work space to the byte and is short of some: less has to be next to the compute.
    machine = chosen.machine
    outside = Constants().outside_bytes(machine.num_gpus, nvlink_peers=machine.nodes[0].nvlink_peers) if on_gpu else 0
    plan = split_plan(work, forecast, needs, number, notes, "cuda" if on_gpu else "cpu", outside)
    lacking = not_yet(plan, plan.world)
    told = [f"{NOT_YET}: {'; '.join(lacking)}; {instead(plan, spec)}"] if lacking else []
    return replace(plan, notes=[*plan.notes, *told], spec=digest, machine=chosen.machine.describe())


def _with_more(device: DeviceMemory, held_back: int) -> DeviceMemory:
    """A GPU's memory with what was held back in its margin."""
    if device.card == "host":
        return device
    classes = device.classes | {"margin": device.classes["margin"] + held_back}
    return replace(device, budget_bytes=device.budget_bytes + held_back, classes=classes)


def _needs(ladder: str, work: Workload, calibration: Calibration | None, on_gpu: bool, forms: PackedForms | None) -> LadderNeeds:
    """What the engine takes for a ladder beside a plain model."""
    found = Ladder.parse(ladder)
    return ladder_needs(
        found,
        work.spec,
        {rung.model: _DraftModel(open_spec(rung.model)[0]) for rung in found.lower if rung.model is not None},
        adaptive=False,
        verification="coupled",
        calibration=calibration,
        dense_copy=not on_gpu,
        listed=on_gpu and settings().gpu_kernels,
        width=work.width,
        block_size=BLOCK_SIZE,
        max_context=work.context,
        head_copy_bytes=lambda model: _head_copy_bytes(model, work.width, on_gpu),
        packed=None if forms is None else forms.sizes(work.spec, work.width),
    )


def work_notes(work: Workload) -> list[str]:
    """What was assumed of the load."""
    return [
        f"{each.name} {each.value:g}: {each.source or each.origin}"
        for each in work.inputs
        if each.name == "context" and each.origin == "assumed"
    ]


@dataclass(frozen=True, slots=True)
class _DraftModel:
    """A draft of which only the config is known: its fingerprint is its shape's."""

    spec: ModelSpec

    @property
    def fingerprint(self) -> str:
        return spec_digest(self.spec)


def _dtype(asked: str, stored: str, on_gpu: bool) -> tuple[str, str]:
    """As `device.choose_dtype`; a config that does not say how its weights are stored means bfloat16 on a GPU."""
    if asked != "auto":
        if asked not in DTYPE_BYTES:
            raise UserError(f"dtype={asked!r:.60} is not known: use auto, {', '.join(DTYPE_BYTES)}")
        return asked, f"dtype {asked}: asked for"
    if not on_gpu:
        return "float32", "dtype float32: every CPU computes in it at full speed"
    if stored in ("bfloat16", "float16"):
        return stored, f"dtype {stored}: the config's own"
    return "bfloat16", "dtype bfloat16: half the bytes of float32"


def _head_copy_bytes(model: ModelSpec, width: int, on_gpu: bool) -> int:
    """Of a tied LM head in 16 bits a CPU packs a second copy, where it multiplies them natively: counted in any case."""
    return model.vocab_size * model.embed_size * width if model.tied_embeddings and not on_gpu and width < 4 else 0


def _may_be_resident(forecast: Forecast) -> bool:
    """One device, and next to it nothing but tables that are only looked up, which may as well lie in it."""
    looked_up = all(share.tier == "resident" or (share.tier, share.part) == ("host", "embeddings") for share in forecast.shares)
    return len(forecast.gpus) <= 1 and looked_up


def _resident_plan(
    work: Workload, decision: Decision, needs: LadderNeeds, number: str, on_gpu: bool, notes: list[str]
) -> Plan | None:
    """The plan that the engine would make for this much memory, with the forecast; None where tables do not fit beside the rest.

    The forecast's memory is then the engine's count in place of the planner's, and all of its shares are resident.
    """
    forecast, constants = decision.forecast, Constants()
    device, *hosts = forecast.memory
    outside = constants.context_bytes if on_gpu else 0
    free = round(constants.margin_share * device.budget_bytes) if on_gpu else constants.host_margin_bytes
    try:
        plan = resident_plan(
            work.spec,
            fingerprint="",
            dtype=number,
            device="cuda" if on_gpu else "cpu",
            budget_bytes=device.budget_bytes - outside - free,
            head_copy_bytes=_head_copy_bytes(work.spec, work.width, on_gpu),
            max_model_len=work.context,
            max_num_seqs=work.batch,
            max_num_batched_tokens=max(MAX_BATCH_TOKENS, work.batch),
            needs=needs,
            notes=tuple(notes),
        )
    except OutOfMemoryError:
        return None
    drafts = decision.ladder.fixed_bytes
    classes = {
        "weights": plan.weight_bytes,
        "draft": drafts,
        "rung weights": plan.rung_weight_bytes - drafts,
        "KV": plan.kv_bytes,
        "rung KV": plan.rung_kv_bytes,
        "work": plan.work_bytes,
        "graphs": outside,
    }
    told = replace(
        forecast,
        memory=[_held(device, classes), *(_held(host, {**host.classes, "weights": 0, "margin": 0}) for host in hosts)],
        shares=[replace(share, tier="resident") for share in forecast.shares],
    )
    return replace(plan, forecast=told)


def _held(device: DeviceMemory, classes: Mapping[str, int]) -> DeviceMemory:
    """The device with these classes, the rest of its budget as margin."""
    ordered = {name: classes.get(name, 0) for name in MEMORY_CLASSES}
    ordered["margin"] = device.budget_bytes - sum(classes.values())
    return replace(device, classes=ordered)


def _with_row_cache(device: DeviceMemory) -> DeviceMemory:
    """A GPU's memory with half of its margin among the buffers."""
    if device.card == "host":
        return device
    kept = device.classes["margin"] // 2
    classes = {"buffers": device.classes["buffers"] + kept, "margin": device.classes["margin"] - kept}
    return replace(device, classes=device.classes | classes)


def split_plan(
    work: Workload,
    forecast: Forecast,
    needs: LadderNeeds,
    number: str,
    notes: Sequence[str],
    device: str,
    outside: int,
) -> Plan:
    """Of several ranks, or with parts elsewhere: the fields of the fullest rank, from the forecast.

    The budget is what the engine's allocator may take: a GPU's context and collectives are not (`outside`, in bytes). Half of what is
    left keeps fetched rows.
    """
    if any(share.tier in ("rows", "peer") for share in forecast.shares):
        forecast = replace(forecast, memory=[_with_row_cache(each) for each in forecast.memory])
    ranks = [device for device in forecast.memory if device.card != "host"]
    fullest = max(ranks, key=lambda device: sum(device.classes.values()) - device.classes["margin"])
    held = fullest.classes
    kv_away = any(share.part == "KV" and share.tier != "resident" for share in forecast.shares)
    layered = layered_tokens(work.spec, work.width, work.prompt, fullest.budget_bytes) if kv_away else 0
    blocks = work.batch * -(-work.context // BLOCK_SIZE)
    return Plan(
        fingerprint="",
        draft_fingerprints=list(needs.draft_fingerprints),
        ladder=list(needs.ladder),
        calibration=needs.calibration,
        adaptive=False,
        verification=needs.verification,
        mode=needs.mode,
        dtype=number,
        device=device,
        world=max(1, len(forecast.gpus)),
        max_context=work.context,
        max_num_seqs=work.batch,
        max_batch_tokens=max(MAX_BATCH_TOKENS, work.batch, layered),
        block_size=BLOCK_SIZE,
        num_blocks=blocks,
        lookahead=needs.lookahead,
        speculating_seqs=min(work.batch, MAX_SPECULATING_SEQS) if needs.lookahead else 0,
        budget_bytes=fullest.budget_bytes - outside,
        weight_bytes=held["weights"],
        rung_weight_bytes=held["draft"] + held["rung weights"],
        kv_bytes=held["KV"],
        rung_kv_bytes=held["rung KV"],
        work_bytes=held["work"] + held["buffers"] + held["graphs"] - outside,
        pass_bytes=pass_bytes(work.spec, work.width) if needs.pass_bytes is None else needs.pass_bytes,
        kv_token_bytes=kv_bytes_per_token(work.spec, work.width),
        notes=list(notes),
        weights="packed" if needs.packed else "unpacked",
        forecast=forecast,
    )
