"""What to expect of a placement that somebody else has decided on, by the planner's cost model. Torch-free."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rowcast.errors import UserError
from rowcast.placement.constants import Constants
from rowcast.placement.costs import CostModel, Mode
from rowcast.placement.forecast import Forecast, Share
from rowcast.placement.foretell import TIER_NAMES, Found, foretell
from rowcast.placement.groups import PARTS, Groups
from rowcast.placement.hardware import Machine
from rowcast.placement.layout import Layout, layouts
from rowcast.placement.solver import Solution
from rowcast.placement.workload import Workload

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_TIERS = {name: tier for tier, name in TIER_NAMES.items()}


def foretell_given(
    work: Workload,
    machine: Machine,
    shares: Sequence[Share],
    *,
    tensor_parallel: int | None = None,
    groups: int = 10_000,
    constants: Constants | None = None,
) -> Forecast:
    """The first of the work's ladders on all of the machine's GPUs, parts where `shares` have them and all others resident.

    Whether that fits is not asked: where it does not, a device's margin is negative. How good it is, neither: its gap is all of its
    time. Groups are placed whole, by their middle. Raises UserError for a tier that the planner does not place parts in.
    """
    started = time.perf_counter()
    unknown = sorted({share.tier for share in shares} - set(_TIERS))
    if unknown:
        raise UserError(f"tier={unknown[0]} cannot be priced: use {', '.join(_TIERS)}")
    ladder, layout = work.ladders[0], layouts(machine, work.spec, tensor_parallel)[0]
    model = CostModel(work, ladder, layout, constants or Constants(), groups)
    weights = {share.tier for share in shares if share.part != "KV" and share.count}
    kv_away = any(share.part == "KV" and share.tier == "streamed" and share.count for share in shares)
    mode = Mode("streamed" in weights, "rows" in weights, "cpu" in weights, kv_away)
    priced = model.price(mode)
    tiers = _tiers(priced.groups, layout, shares)
    return foretell(
        Found(
            work=work,
            ladder=ladder,
            model=model,
            mode=mode,
            priced=priced,
            solution=Solution(tiers, priced.problem.cost(tiers), 0.0, None),
            greedy=None,
            solver_s=time.perf_counter() - started,
        ),
        None,
        [],
        [],
    )


def _tiers(groups: Groups, layout: Layout, shares: Sequence[Share]) -> NDArray[np.int64]:
    import numpy as np

    found = np.full(len(groups), _TIERS["resident"])
    middles = (groups.index + 0.5) / groups.of
    places: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    for row, key in enumerate(zip(groups.site.tolist(), groups.part.tolist(), groups.layer.tolist(), strict=True)):
        places[key].append(row)
    for share in shares:
        for i, site in enumerate(layout.sites):
            if site.ranks[0] in share.ranks:
                rows = np.array(places[i, PARTS.index(share.part), share.layer], dtype=np.int64)
                inside = (middles[rows] >= share.first / share.of) & (middles[rows] < (share.first + share.count) / share.of)
                found[rows[inside]] = _TIERS[share.tier]
    return found
