"""Predicted beside measured: what is compared, what is left out, and what the next plan learns of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from plan_samples import FORECAST, GIB, forecast_plan, resident

from rowcast.placement import corrections
from rowcast.placement.forecast import RungTime, Stage
from rowcast.placement.plan import Plan
from rowcast.placement.report import Compared, Measured, PlanReport, Round, compare
from rowcast.placement.workload import Input
from rowcast.runtime.plan_for import plan_for

ONE = {
    "rungs": [RungTime("plain", 1.0, 0.010, "GPU memory", "nothing")],
    "stages": [Stage("plain", "KV", {}, {"GPU memory": 0.004}), Stage("plain", "neurons", {}, {"GPU memory": 0.006})],
    "seconds_per_token": 0.010,
    "tokens_per_round": 1.0,
    "context": 1000,
    "prompt": 100,
    "first_token_s": 0.5,
    "gpus": ["H100"],
    "tensor_parallel": 1,
}


def one(**changes: object) -> Plan:
    """Of the ladder plain: 6 ms of weights, 4 ms of KV at 1,000 tokens."""
    return forecast_plan(**{**ONE, **changes})


def rounds(seconds: float, count: int = 10, *, context: float = 1000, sequences: int = 1, tokens: int = 1) -> tuple[Round, ...]:
    return (Round(seconds, sequences, tokens, context, tokens > sequences),) * count


def measured(*parts: tuple[Round, ...], first: tuple[tuple[int, float], ...] = ((100, 0.4),), **more: object) -> Measured:
    given: dict[str, object] = {"acceptance": {}} | more
    return Measured(rounds=sum(parts, ()), first_tokens=first, **given)  # type: ignore[arg-type]


def report(plan: Plan, seen: Measured) -> PlanReport:
    found = compare(plan, seen)
    assert found is not None
    return found


def line(found: PlanReport, what: str) -> Compared:
    return next(line for line in found.lines if line.what == what)


def test_nothing_to_compare() -> None:
    assert compare(resident(), measured(rounds(0.01))) is None
    assert compare(one(), measured(first=())) is None


def test_seconds_per_token_at_the_measured_context() -> None:
    found = line(report(one(), measured(rounds(0.0125))), "seconds per token")
    assert found.predicted == 0.010 and found.measured == pytest.approx(0.0125) and found.note == ""
    assert found.error == pytest.approx(-0.2)
    short = line(report(one(), measured(rounds(0.008, context=250))), "seconds per token")
    assert short.predicted == pytest.approx(0.007) and "250 tokens, the plan is for 1000" in short.note
    batch = line(report(one(), measured(rounds(0.02, sequences=3, tokens=3))), "seconds per token")
    assert batch.measured == pytest.approx(0.02) and batch.error is None and "a batch of 3" in batch.note


def test_rounds_that_compile_are_left_out() -> None:
    found = line(report(one(), measured(rounds(2.0, 2), rounds(0.010, 10))), "seconds per token")
    assert found.measured == pytest.approx(0.010)


def test_the_first_token_of_a_like_prompt() -> None:
    found = line(report(one(), measured(first=((500, 9.0), (110, 3.0), (110, 0.5), (5, 0.1)))), "seconds to the first token")
    assert (found.predicted, found.measured, found.error) == (0.5, 0.5, 0.0)
    other = line(report(one(), measured(first=((5, 0.1),))), "seconds to the first token")
    assert other.error is None and "a prompt of 5 tokens, the plan is for 100" in other.note


def test_memory_and_acceptance() -> None:
    inputs = [Input("acceptance of self:kv=4096", 0.9, "assumed")]
    plan = forecast_plan(inputs=inputs)
    seen = measured(
        rounds(1.0, tokens=5), allocated_bytes=GIB, reserved_bytes=2 * GIB, acceptance={"self:kv=4096": 0.8, "draft": 0.5}
    )
    found = report(plan, seen)
    assert line(found, "GPU memory held").predicted == plan.budget_bytes - plan.margin_bytes
    assert line(found, "GPU memory held").measured == GIB and line(found, "GPU memory reserved").measured == 2 * GIB
    assert (line(found, "tokens a round").predicted, line(found, "tokens a round").measured) == (5.8, 5)
    assert (line(found, "acceptance of self:kv=4096").predicted, line(found, "acceptance of self:kv=4096").measured) == (0.9, 0.8)
    assert line(found, "acceptance of draft").predicted is None
    told = found.to_json()
    assert told["acceptance of self:kv=4096"]["error"] == pytest.approx(0.125)


def test_ratios_by_rung() -> None:
    """Of the last rung where it ran alone; of all where the ladder is pinned; none of few rounds or another batch."""
    assert report(one(), measured(rounds(0.012))).ratios == {"plain": pytest.approx(1.2)}
    assert report(one(seconds_per_token=0.011), measured(rounds(0.012))).ratios == {"plain": pytest.approx(1.1)}  # 1 ms of rounds
    assert report(one(), measured(rounds(0.012, 7))).ratios == {}
    assert report(one(), measured(rounds(0.012, sequences=2, tokens=2))).ratios == {}
    plan = forecast_plan()
    seen = measured(rounds(2 * FORECAST.seconds_per_token * FORECAST.tokens_per_round, tokens=6, context=FORECAST.context))
    kinds = [corrections.kind_of(rung.rung, FORECAST.ladder) for rung in FORECAST.rungs]
    assert report(plan, seen).ratios == dict.fromkeys(kinds, pytest.approx(2.0)) and "plain" not in kinds
    assert report(replace(plan, adaptive=True), seen).ratios == {}


def test_a_correction_is_not_corrected_again() -> None:
    """A forecast that a ratio of 1.5 was applied to and that came true says 1.5 again."""
    applied = [Input("plain: measured over predicted", 1.5, "measured")]
    assert report(one(inputs=applied), measured(rounds(0.010))).ratios == {"plain": pytest.approx(1.5)}


def test_what_a_correction_is_of() -> None:
    """A rung among others, whatever the gammas; what a rung takes alone says something of it there, and not the other way round."""
    ladder = "ngram:gamma=5 / self:bits=8,kv=512,gamma=16 / plain"
    assert (
        corrections.kind_of("plain", "plain") == "plain" and corrections.kind_of("self:mlp=0.5", "self:mlp=0.5") == "self:mlp=0.5"
    )
    bare = "ngram / self:bits=8,kv=512 / plain"
    kinds = [corrections.kind_of(rung, ladder) for rung in ladder.split(" / ")]
    assert kinds == [f"ngram in {bare}", f"self:bits=8,kv=512 in {bare}", f"plain in {bare}"]
    assert kinds == [corrections.kind_of(rung, bare) for rung in bare.split(" / ")]
    assert corrections.kind_of("self:gamma=4,kv=512", ladder) == f"self:kv=512 in {bare}"
    learnt = {f"plain in {bare}": 2.5, f"self:bits=8,kv=512 in {bare}": 1.5}
    assert (
        corrections.factor(learnt, "plain", ladder.replace("16", "4")) == 2.5
        and corrections.factor(learnt, "plain", "plain") is None
    )
    assert corrections.factor({"plain": 1.2}, "plain", ladder) == 1.2 and corrections.factor(None, "plain", ladder) is None


def test_the_next_plan_learns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ROWCAST_CACHE", str(tmp_path))
    asked = {"ladder": "plain", "context": 64, "groups": 50}
    first = plan_for("SmolLM2-135M-Instruct", **asked)  # type: ignore[arg-type]
    for ratio in (1.9, 2.0, 2.3, 50.0):  # the last cannot be believed
        corrections.remember(first, {"plain": ratio})
    again = plan_for("SmolLM2-135M-Instruct", **asked)  # type: ignore[arg-type]
    assert first.forecast is not None and again.forecast is not None
    assert [each.value for each in again.forecast.inputs if each.name == "plain: measured over predicted"] == [2.0]
    assert next(each.origin for each in again.forecast.inputs if "measured over" in each.name) == "measured"
    assert again.forecast.seconds_per_token > 1.5 * first.forecast.seconds_per_token
    other = plan_for("SmolLM2-135M-Instruct", dtype="bfloat16", **asked)  # type: ignore[arg-type]
    assert other.forecast is not None and not any("measured over" in each.name for each in other.forecast.inputs)
