"""What the planner's cost model foretells of `offload.py`'s placements: here, and on cards as consumers have them. Torch-free."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from offload_given import foretell_given

from rowcast.errors import UserError
from rowcast.placement.constants import Constants
from rowcast.placement.forecast import Share
from rowcast.placement.hardware import Machine, Quantity
from rowcast.placement.plan import Plan
from rowcast.runtime.forecast import workload
from rowcast.runtime.plan_for import MachineWish, choose_machine

GROUPS = 50_000
"""Parts of a rank's weights and KV, about."""
CONSUMER_CARD, CONSUMER_HOST = "RTX4090", "256GiB"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A placement and what is run there."""

    model: str
    plan: Plan
    context: int
    """Tokens, at which the time of a token is foretold."""
    cap_bytes: int
    """Of each GPU."""
    bus_rate: float
    """Bytes/s of the slowest rank's, while all copy."""
    calibration: str | None = None
    hit_rate: float | None = None
    """Of the row cache, as it was in the run."""

    def foretold(self, ladder: str, *, acceptance: str | float | None = None) -> float | None:
        """Seconds a token on this machine, whose bus is as fast as it was measured; None where it has no GPU."""
        return self._seconds(ladder, acceptance, MachineWish(gpu_memory=self.cap_bytes), self.bus_rate)

    def projected(self, ladder: str, *, acceptance: str | float | None = None) -> float | None:
        """The same on as many RTX 4090, for which there is nothing but their datasheet; None where another GPU's memory is read, which
        those cannot."""
        if any(share.tier == "peer" for share in self._shares):
            return None
        wish = MachineWish(gpus=f"{self.plan.world}x{CONSUMER_CARD}", host_memory=CONSUMER_HOST)
        return self._seconds(ladder, acceptance, wish, None)

    @property
    def _shares(self) -> list[Share]:
        assert self.plan.forecast is not None
        return self.plan.forecast.shares

    def _seconds(self, ladder: str, acceptance: str | float | None, wish: MachineWish, bus_rate: float | None) -> float | None:
        try:
            work = workload(
                model=f"random:{self.model}",
                ladder=ladder,
                mode="exact" if ladder.endswith("plain") else "approximate",
                calibration=None if ladder == "plain" else self.calibration,
                context=self.context,
                acceptance=acceptance,
                hit_rate=self.hit_rate,
            )
            machine = self._machine(choose_machine(wish).machine, bus_rate)
            shares = [replace(share, tier="rows") if share.tier == "peer" else share for share in self._shares]
            return foretell_given(work, machine, shares, tensor_parallel=self.plan.world, groups=GROUPS).seconds_per_token
        except UserError as error:
            print(f"nothing is foretold of {ladder}: {error}", file=sys.stderr, flush=True)
            return None

    def _machine(self, machine: Machine, bus_rate: float | None) -> Machine:
        """As many of its GPUs as there are ranks. Rows of another GPU come over the link between them, in place of the bus and of host
        memory."""
        node = machine.nodes[0]
        cards, side = node.cards[: self.plan.world], node.host
        if bus_rate is not None:
            rate = Quantity(bus_rate, "measured", "one large copy, by all ranks at the same time")
            if any(share.tier == "peer" for share in self._shares):
                link = node.peer_rate
                rate = Quantity(link.value * Constants().peer_share, link.origin, link.source)
                rate = replace(rate, origin="measured")
                side = replace(side, memory_rate=rate)
            cards = tuple(replace(card, bus_rate=rate) for card in cards)
        return replace(machine, nodes=(replace(node, cards=cards, host=side, shared_bus_rate=None),))
