"""The price of a placement that is given: the planner's own for its own, and the bytes over the link for one by force."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rowcast.errors import UserError
from rowcast.placement.forecast import Share
from rowcast.placement.hardware import machine_from
from rowcast.placement.planner import decide
from rowcast.runtime.forecast import workload

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from offload_given import foretell_given

GIB = 1 << 30
TWO = machine_from("2xRTX4090", 256 * GIB)


@pytest.mark.parametrize("ladder", ["plain", "self:mlp=0.1,by=q4", "self:kv=1024,gamma=12 / plain"])
def test_the_planners_own_placement_has_the_planners_price(ladder: str) -> None:
    mode = "exact" if ladder.endswith("plain") else "approximate"
    work = workload(model="meta-llama/Llama-2-13b-hf", ladder=ladder, mode=mode, context=4096, batch=4, hit_rate=0.3)
    machine = TWO.with_changes(gpu_memory_bytes=-12 * GIB)
    planned = decide(work, machine, tensor_parallel=2, explain=False).forecast
    assert {share.tier for share in planned.shares} >= {"resident"} and any(share.tier != "resident" for share in planned.shares)
    given = foretell_given(work, machine, planned.shares, tensor_parallel=2)
    assert given.seconds_per_token == pytest.approx(planned.seconds_per_token, rel=1e-9)
    assert given.memory == planned.memory and given.shares == planned.shares


def test_a_placement_by_force_takes_the_time_of_its_bytes() -> None:
    """All KV of a long context over each card's bus: the planner would keep some of it."""
    work = workload(model="NousResearch/Yarn-Llama-2-7b-128k", ladder="plain", context=127_000)
    each = 2 * 16 * 128 * 2 * 127_000
    shares = [Share([0, 1], "KV", layer, "streamed", 0, 1, 1, each) for layer in range(32)]
    forced = foretell_given(work, TWO, shares, tensor_parallel=2)
    rate = 0.85 * TWO.cards[0].bus_rate.value
    assert forced.seconds_per_token == pytest.approx(32 * each / rate, rel=0.02) and forced.bottleneck == "bus"
    assert decide(work, TWO, tensor_parallel=2, explain=False).forecast.seconds_per_token < 0.9 * forced.seconds_per_token


def test_entries_that_a_view_copies_anew_take_their_time() -> None:
    """Once a round, whatever a round commits; none where the view keeps what it chose first."""

    def round_s(setting: str) -> tuple[float, float]:
        ladder = f"self:kv=4096{setting},gamma=16 / plain"
        work = workload(model="NousResearch/Yarn-Llama-2-7b-128k", ladder=ladder, context=127_000, acceptance=0.9)
        shares = [Share([0, 1], "KV", layer, "streamed", 0, 1, 1, 1) for layer in range(32)]
        found = foretell_given(work, TWO, shares, tensor_parallel=2)
        told = sum(stage.seconds["bus"] for stage in found.stages if stage.name == "entries copied anew")
        return found.seconds_per_token * found.tokens_per_round, told * found.tokens_per_round

    (anew, told), (seldom, _), (once, none) = (round_s(setting) for setting in ("", ",refresh=4", ",refresh=0"))
    copied = 4096 * 2 * 32 * 16 * 128 * 2 / (0.22 * 0.85 * TWO.cards[0].bus_rate.value)
    assert anew - once == pytest.approx(copied, rel=1e-6) and seldom - once == pytest.approx(copied / 4, rel=1e-6)
    assert told == pytest.approx(copied, rel=1e-6) and none == 0


def test_what_is_held_elsewhere_is_not_priced() -> None:
    work = workload(model="meta-llama/Llama-2-7b-hf", ladder="plain", context=128)
    with pytest.raises(UserError, match="tier=peer cannot be priced: use resident"):
        foretell_given(work, TWO, [Share([0], "neurons", 0, "peer", 0, 1, 2, 1)])
