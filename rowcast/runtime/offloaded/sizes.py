"""Device memory that offloading takes beside what is resident, as the planner counts it. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from rowcast.placement.constants import STREAM_BYTES
from rowcast.placement.plan import DTYPE_BYTES, Plan
from rowcast.placement.resident import rank_share
from rowcast.runtime.ladder.spec import Ladder
from rowcast.runtime.offloaded.tiers import CPU, DISK, ROWS, STREAMED, Tiers
from rowcast.runtime.sparse.artefact import Calibration
from rowcast.runtime.sparse.sizes import fetched_share
from rowcast.runtime.spec import ModelSpec, layer_parameters

LEAST_RING = 64 << 20
"""Bytes: smaller pieces cross the bus slower."""


@dataclass(frozen=True, slots=True)
class Buffers:
    """In bytes."""

    ring_bytes: int
    """Of all buffers that pieces of weights go through; they are larger only where a single row is."""
    rows_bytes: int = 0
    """What one call's rows are fetched into."""
    cache_bytes: int = 0
    """Fetched rows that are kept, of all layers."""

    @classmethod
    def of(cls, plan: Plan, tiers: Tiers, spec: ModelSpec, calibration: Calibration | None = None) -> Buffers:
        """Of one rank. Rows are kept in as many bytes as the plan leaves free beside them. `calibration`: the plan's."""
        width, share = DTYPE_BYTES[plan.dtype], rank_share(spec, plan.world)
        tiers_used = set().union(*(part.tiers for part in (*tiers.attention.values(), *tiers.neurons.values(), tiers.head)))
        left = max(0, plan.margin_bytes)
        ring = 2 * min(layer_parameters(share) * width, STREAM_BYTES)
        if not {STREAMED, DISK} & tiers_used:
            # Passes over many tokens stream what others fetch or the CPU computes: through what the plan leaves free.
            ring = min(ring, max(LEAST_RING, left // 2)) if {ROWS, CPU} & tiers_used else 0
            left = max(0, left - ring)
        fetched = max(fetched_share(rung, spec, calibration) for rung in Ladder.parse(plan.ladder_text).rungs)
        if not fetched or not any(ROWS in part.tiers for part in tiers.neurons.values()):
            return cls(ring)
        layer = (3 if spec.gated else 2) * spec.hidden_size * share.intermediate_size * width
        return cls(ring, round(layer * fetched), left)
