"""The plan of a model that does not fit next to the compute: the planner's, for this machine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from rowcast.errors import OutOfMemoryError, UserError
from rowcast.placement.constants import Constants
from rowcast.placement.executable import not_yet
from rowcast.placement.hardware import Card, Machine
from rowcast.placement.here import this_machine
from rowcast.placement.plan import DTYPE_BYTES, Plan
from rowcast.placement.planner import Decision, decide
from rowcast.placement.resident import BLOCK_SIZE
from rowcast.placement.workload import Workload
from rowcast.runtime.forecast import CONTEXT, spec_digest, workload
from rowcast.runtime.ladder.drafts import Draft
from rowcast.runtime.ladder.memory import ladder_needs
from rowcast.runtime.ladder.spec import Ladder
from rowcast.runtime.offloaded.disk_plan import chooses_rows, to_disk, with_host_memory
from rowcast.runtime.packed_sizes import PackedForms
from rowcast.runtime.plan_for import split_plan, work_notes
from rowcast.runtime.sparse.artefact import Calibration
from rowcast.runtime.spec import ModelSpec, parameter_count

log = logging.getLogger("rowcast")

_GROUPS = 4096
"""That one rank's weights and KV are placed in, about."""

STAND_IN = Constants(context_bytes=0, collectives_bytes=0, nvlink_bytes=0, graphs_bytes=0, host_margin_bytes=0)
"""Of a CPU that stands in for a GPU: it has no context, and its host memory is what was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadWish:
    """What a caller asked for, as far as it decides a placement, with what was chosen already."""

    model: str
    """Where its config is read."""
    ladder: str | Ladder
    draft: str | None
    kv_budget: int | None
    density: float | None
    mode: str
    verification: str
    calibration: Calibration | None
    calibration_given: bool
    """Or it is the model's own."""
    dtype: str
    device: str
    stand_in: bool
    """The CPU stands in for a GPU."""
    gpu_memory_bytes: int
    context_bytes: int
    """Of that, what is no tensor's, collectives' buffers included."""
    host_memory_bytes: int | None
    world: int
    max_context: int | None
    """None: the model's own, or `CONTEXT`."""
    max_num_seqs: int | None
    max_batch_tokens: int | None
    block_size: int | None
    forms: PackedForms | None = None
    """As which weights are held packed."""


def offloading_plan(
    wish: OffloadWish,
    spec: ModelSpec,
    fingerprint: str,
    open_drafts: Callable[[Ladder], Mapping[str, Draft]],
    notes: tuple[str, ...],
    disk_rate: Callable[[], float],
) -> tuple[Plan, Ladder, Mapping[str, Draft]] | None:
    """The plan that commits a token soonest with parts in host memory, its ladder and drafts; None where no engine can execute it.

    What has no room there, either, is read from disk: `disk_rate` measures it, in bytes/s, or raises UserError where that cannot be.
    Raises OutOfMemoryError with the nearest change that fits.
    """
    batch = wish.max_num_seqs or 1
    context = wish.max_context or min(CONTEXT, spec.max_context)
    work = _work(wish, wish.ladder, context, batch, fingerprint)
    machine = _stand_in(wish) if wish.stand_in else _machine(wish)
    constants = STAND_IN if wish.stand_in else Constants(context_bytes=wish.context_bytes, collectives_bytes=0, nvlink_bytes=0)
    try:
        decision = decide(work, machine, tensor_parallel=wish.world, groups=_GROUPS, constants=constants, explain=False)
    except OutOfMemoryError as error:
        work, decision, on_disk = _with_disk(wish, work, spec, fingerprint, machine, constants, disk_rate, error)
        log.warning("%s", on_disk)
        notes = (*notes, on_disk)
    ladder = Ladder.parse(decision.ladder.name)
    drafts = open_drafts(ladder)
    needs = ladder_needs(
        ladder,
        spec,
        drafts,
        adaptive=False,
        verification=wish.verification,
        calibration=wish.calibration,
        dense_copy=False,
        listed=False,
        width=DTYPE_BYTES[wish.dtype],
        block_size=wish.block_size or BLOCK_SIZE,
        max_context=context,
        head_copy_bytes=lambda model: 0,
        packed=None if wish.forms is None else wish.forms.sizes(spec, DTYPE_BYTES[wish.dtype]),
    )
    told = [*notes, "not all of it fits next to the compute: parts lie in host memory", *work_notes(work)]
    if wish.max_num_seqs is None:
        told.append("one sequence at a time: a batch shares what a pass streams, and needs KV of its own")
    plan = split_plan(work, decision.forecast, needs, wish.dtype, told, wish.device, constants.context_bytes)
    if wish.block_size is not None:
        plan = replace(plan, block_size=wish.block_size, num_blocks=batch * -(-context // wish.block_size))
    if wish.max_batch_tokens is not None:
        plan = replace(plan, max_batch_tokens=max(batch, wish.max_batch_tokens))
    plan = replace(plan, fingerprint=fingerprint, spec=spec_digest(spec), machine=decision.forecast.machine)
    return None if not_yet(plan, wish.world) else (plan, ladder, drafts)


def _work(wish: OffloadWish, ladder: str | Ladder, context: int, batch: int, fingerprint: str) -> Workload:
    return workload(
        model=wish.model,
        ladder=ladder,
        draft=wish.draft,
        kv_budget=wish.kv_budget,
        density=wish.density,
        mode=wish.mode,
        calibration=wish.calibration.path if wish.calibration is not None and wish.calibration_given else None,
        dtype=wish.dtype,
        context=context,
        batch=batch,
        fingerprint=fingerprint,
        forms=wish.forms,
    )


def _with_disk(
    wish: OffloadWish,
    work: Workload,
    spec: ModelSpec,
    fingerprint: str,
    machine: Machine,
    constants: Constants,
    disk_rate: Callable[[], float],
    short: OutOfMemoryError,
) -> tuple[Workload, Decision, str]:
    """The decision with layers on disk, for what and a sentence about it. Raises `short` where host memory is not what is short,
    OutOfMemoryError where nothing can be read from disk."""
    why = f"{short}".removesuffix(".")
    larger = with_host_memory(machine, parameter_count(spec) * work.width)
    try:
        decision = decide(work, larger, tensor_parallel=wish.world, groups=_GROUPS, constants=constants, explain=False)
        rung = chooses_rows(decision.ladder.name)
        if rung is not None and wish.ladder == "auto":
            work = _work(wish, "plain", work.context, work.batch, fingerprint)
            decision = decide(work, larger, tensor_parallel=wish.world, groups=_GROUPS, constants=constants, explain=False)
            rung = None
    except OutOfMemoryError:
        raise short from None
    if rung is not None:
        raise OutOfMemoryError(f"{why}; rung {rung} chooses rows, which cannot be read from disk: use --ladder plain") from short
    try:
        if wish.world > 1:
            raise UserError("that is done by one rank only: leave --tp out")
        found = to_disk(decision.forecast, spec, work.width, machine, constants, disk_rate)
    except UserError as error:
        raise OutOfMemoryError(f"{why}; the rest cannot be read from disk: {error}") from error
    if found is None:
        raise short
    return work, replace(decision, forecast=found.forecast), found.told(spec.num_layers)


def _machine(wish: OffloadWish) -> Machine:
    """As many of this machine's GPUs as there are ranks, with so much memory each."""
    machine = this_machine(gpu_memory_bytes=wish.gpu_memory_bytes, host_memory_bytes=wish.host_memory_bytes).machine
    node = machine.nodes[0]
    return replace(machine, nodes=(replace(node, cards=node.cards[: wish.world]),))


def _stand_in(wish: OffloadWish) -> Machine:
    """One GPU that is this machine's CPU, behind a bus that is half as fast as its memory."""
    machine = this_machine(host_memory_bytes=wish.host_memory_bytes).machine
    node = machine.nodes[0]
    rate = node.host.memory_rate
    card = Card(
        name="CPU as a GPU",
        memory_bytes=wish.gpu_memory_bytes,
        nominal_gib=max(1, wish.gpu_memory_bytes >> 30),
        memory_rate=rate,
        bus_rate=replace(rate, value=rate.value / 2, origin="assumed"),
        peer_rate=replace(rate, value=0.0),
        flops=node.host.flops,
        peer_access=False,
    )
    return replace(machine, nodes=(replace(node, cards=(card,)),))
