"""The plan of a model that does not fit next to the compute: the planner's, for this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from rowcast.placement.constants import Constants
from rowcast.placement.executable import not_yet
from rowcast.placement.hardware import Card, Machine
from rowcast.placement.here import this_machine
from rowcast.placement.plan import DTYPE_BYTES, Plan
from rowcast.placement.planner import decide
from rowcast.placement.resident import BLOCK_SIZE
from rowcast.runtime.forecast import CONTEXT, spec_digest, workload
from rowcast.runtime.ladder.drafts import Draft
from rowcast.runtime.ladder.memory import ladder_needs
from rowcast.runtime.ladder.spec import Ladder
from rowcast.runtime.plan_for import split_plan, work_notes
from rowcast.runtime.sparse.artefact import Calibration
from rowcast.runtime.spec import ModelSpec

_GROUPS = 4096
"""That one rank's weights and KV are placed in, about."""

STAND_IN = Constants(context_bytes=0, graphs_bytes=0, host_margin_bytes=0)
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
    dtype: str
    device: str
    stand_in: bool
    """The CPU stands in for a GPU."""
    gpu_memory_bytes: int
    host_memory_bytes: int | None
    world: int
    max_context: int | None
    """None: the model's own, or `CONTEXT`."""
    max_num_seqs: int | None
    max_batch_tokens: int | None
    block_size: int | None


def offloading_plan(
    wish: OffloadWish,
    spec: ModelSpec,
    fingerprint: str,
    open_drafts: Callable[[Ladder], Mapping[str, Draft]],
    notes: tuple[str, ...],
) -> tuple[Plan, Ladder, Mapping[str, Draft]] | None:
    """The plan that commits a token soonest with parts in host memory, its ladder and drafts; None where no engine can execute it.

    Raises OutOfMemoryError with the nearest change that fits.
    """
    batch = wish.max_num_seqs or 1
    context = wish.max_context or min(CONTEXT, spec.max_context)
    work = workload(
        model=wish.model,
        ladder=wish.ladder,
        draft=wish.draft,
        kv_budget=wish.kv_budget,
        density=wish.density,
        mode=wish.mode,
        calibration=None if wish.calibration is None else wish.calibration.path,
        dtype=wish.dtype,
        context=context,
        batch=batch,
        fingerprint=fingerprint,
    )
    machine = _stand_in(wish) if wish.stand_in else _machine(wish)
    constants = STAND_IN if wish.stand_in else Constants()
    decision = decide(work, machine, tensor_parallel=wish.world, groups=_GROUPS, constants=constants, explain=False)
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
    )
    told = [*notes, "not all of it fits next to the compute: parts lie in host memory", *work_notes(work)]
    if wish.max_num_seqs is None:
        told.append("one sequence at a time: a batch shares what a pass streams, and needs KV of its own")
    plan = split_plan(work, decision.forecast, needs, wish.dtype, told, wish.device)
    if wish.block_size is not None:
        plan = replace(plan, block_size=wish.block_size, num_blocks=batch * -(-context // wish.block_size))
    if wish.max_batch_tokens is not None:
        plan = replace(plan, max_batch_tokens=max(batch, wish.max_batch_tokens))
    plan = replace(plan, fingerprint=fingerprint, spec=spec_digest(spec), machine=decision.forecast.machine)
    return None if not_yet(plan, wish.world) else (plan, ladder, drafts)


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
