"""Plans: memory accounted for, files that survive a round trip and refuse what they are not."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import msgpack
import pytest
from test_kv import SPEC

from rowcast.errors import OutOfMemoryError, UserError
from rowcast.placement.plan import Plan
from rowcast.placement.resident import CPU_KV_BYTES, MAX_SPECULATING_SEQS, LadderNeeds, resident_plan
from rowcast.placement.units import format_bytes, parse_bytes
from rowcast.runtime.spec import parameter_count

GIB = 1 << 30


def make(**changes: object) -> Plan:
    given = {"fingerprint": "f", "dtype": "bfloat16", "device": "cuda:0", "budget_bytes": GIB} | changes
    return resident_plan(SPEC, **given)  # type: ignore[arg-type]


def test_bytes_are_accounted_for() -> None:
    plan = make()
    assert plan.weight_bytes == 2 * parameter_count(SPEC)
    assert plan.kv_token_bytes == 2 * 2 * 2 * 8 * 2  # keys and values, layers, KV heads, head size, bytes
    assert plan.kv_bytes == plan.num_blocks * plan.block_size * plan.kv_token_bytes
    assert plan.margin_bytes >= 0
    assert plan.num_blocks == 64 * 4  # 64 sequences of 64 tokens: more would never be used


def test_kv_shrinks_to_the_budget() -> None:
    full = make()
    tight = make(budget_bytes=full.weight_bytes + full.work_bytes + 100 * 16 * full.kv_token_bytes + 7)
    assert tight.num_blocks == 100 and tight.margin_bytes == 7
    assert make(device="cpu", budget_bytes=64 * GIB).kv_bytes <= CPU_KV_BYTES


def test_what_does_not_fit_says_how_much_was_needed() -> None:
    full = make()
    with pytest.raises(OutOfMemoryError, match="--gpu-memory"):
        make(budget_bytes=full.weight_bytes)
    one_block = full.weight_bytes + full.work_bytes + 16 * full.kv_token_bytes
    shortened = make(budget_bytes=one_block)
    assert (shortened.max_context, shortened.num_blocks) == (16, 1)
    assert shortened.notes[-1].startswith("context 16 instead of 64 tokens")
    with pytest.raises(OutOfMemoryError, match=r"64 tokens.*need"):
        make(budget_bytes=one_block, max_model_len=64)


NEEDS = LadderNeeds(
    ladder=("draft:model=d", "self:kv=16", "plain"),
    lookahead=6,
    models=(SPEC,),
    weight_bytes=5000,
    block_bytes=300,
    slot_bytes=70_000,
    query_bytes=900,
)


def test_lower_rungs_are_accounted_for() -> None:
    plain, plan = make(), make(needs=NEEDS)
    assert plan.speculating_seqs == MAX_SPECULATING_SEQS
    assert plan.rung_weight_bytes == 5000
    assert plan.rung_kv_bytes == plan.num_blocks * 300 + 16 * 70_000 + 64 * 900
    assert (plan.num_blocks, plan.kv_bytes, plan.weight_bytes) == (plain.num_blocks, plain.kv_bytes, plain.weight_bytes)
    assert (
        plan.margin_bytes
        == GIB - plan.weight_bytes - plan.kv_bytes - plan.work_bytes - plan.rung_weight_bytes - plan.rung_kv_bytes
    )
    assert plan.ladder_text in plan.summary() and "rungs " in plan.summary() and "rungs " not in plain.summary()
    assert (plain.lookahead, plain.speculating_seqs, plain.rung_bytes) == (0, 0, 0)
    choosing = make(needs=replace(NEEDS, work_bytes=GIB // 4))
    assert choosing.work_bytes - GIB // 4 == 8 * 64 * SPEC.vocab_size  # the sampler's counts stay beside it
    laws = make(needs=replace(NEEDS, law_rows=14)).work_bytes - plan.work_bytes
    assert laws == 16 * 14 * SPEC.vocab_size * 4
    assert make(needs=NEEDS, max_num_seqs=3).speculating_seqs == 3
    scoring = make(needs=replace(NEEDS, token_bytes=1000, pass_bytes=77, mode="approximate", calibration="c"))
    assert scoring.work_bytes - plan.work_bytes == 2048 * 1000
    assert (scoring.pass_bytes, scoring.mode, scoring.calibration) == (77, "approximate", "c")


def test_fewer_sequences_speculate_where_memory_is_short() -> None:
    """Their caches take a quarter of what weights leave, or what one sequence needs."""
    for slot_bytes, seqs in ((GIB // 128, 16), (GIB // 64, 15), (GIB // 24, 5), (GIB // 2, 1)):
        plan = make(needs=replace(NEEDS, slot_bytes=slot_bytes))
        assert plan.speculating_seqs == seqs
        assert plan.margin_bytes >= 0
    with pytest.raises(OutOfMemoryError, match=r"rungs of draft:model=d / self:kv=16 / plain 1.0 GiB .*--ladder plain"):
        make(needs=replace(NEEDS, slot_bytes=GIB))


@pytest.mark.parametrize("name", ["max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size"])
@pytest.mark.parametrize("value", [0, -3])
def test_absurd_numbers_are_refused(name: str, value: int) -> None:
    with pytest.raises(UserError, match=f"{value} has to be at least [12]"):
        make(**{name: value})


def test_a_longer_context_than_the_models_is_refused() -> None:
    with pytest.raises(UserError, match="64 tokens"):
        make(max_model_len=65)


def test_a_step_holds_a_token_of_every_sequence() -> None:
    assert make(max_num_batched_tokens=7).max_num_seqs == 7
    with pytest.raises(UserError, match=r"max_num_batched_tokens=7 .* max_num_seqs=8"):
        make(max_num_batched_tokens=7, max_num_seqs=8)


def test_plans_name_parts_as_the_planner_does() -> None:
    from rowcast.placement import groups, plan

    assert plan.PARTS == groups.PARTS


def test_files_round_trip(tmp_path: Path) -> None:
    for plan in (make(), make(needs=replace(NEEDS, adaptive=True, verification="maximal", draft_fingerprints=("d",)))):
        plan.save(tmp_path / "plan")
        assert Plan.load(tmp_path / "plan") == plan


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    plan, path = make(), tmp_path / "plan"
    content = asdict(plan)
    damaged = [
        b"",
        b"{}",
        msgpack.packb([1]),
        msgpack.packb(content)[:-9],
        msgpack.packb(content | {"format": 99}),
        msgpack.packb(content | {"more": 1}),
        msgpack.packb({k: v for k, v in content.items() if k != "dtype"}),
        msgpack.packb(content | {"num_blocks": "many"}),
        msgpack.packb(content | {"num_blocks": True}),
        msgpack.packb(content | {"num_blocks": -1}),
        msgpack.packb(content | {"dtype": "int8"}),
        msgpack.packb(content | {"format": 1}),
        msgpack.packb(content | {"adaptive": 1}),
        msgpack.packb(content | {"verification": "sloppy"}),
        msgpack.packb(content | {"mode": "sloppy"}),
        msgpack.packb(content | {"format": 2}),
        msgpack.packb(content | {"format": 3}),
        msgpack.packb(content | {"spec": 5}),
        msgpack.packb(content | {"fingerprint": ""}),
        msgpack.packb(content | {"forecast": {}}),
        msgpack.packb(content | {"calibration": 5}),
        msgpack.packb(content | {"ladder": [1]}),
        msgpack.packb(content | {"lookahead": -1}),
    ]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(UserError, match="plan") as caught:
            Plan.load(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no-such"):
        Plan.load(tmp_path / "no-such")
    assert replace(plan, num_blocks=3).kv_tokens == 48


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("24GiB", 24 * GIB),
        ("512 MiB", 512 << 20),
        ("1.5g", 3 << 29),
        ("10GB", 10**10),
        (4096, 4096),
        ("77000000", 77000000),
        ("2kb", 2000),
    ],
)
def test_amounts_of_memory(text: str | int, count: int) -> None:
    assert parse_bytes(text, "x") == count


def test_numbers_without_a_unit_are_bytes_where_they_can_be() -> None:
    with pytest.raises(UserError, match="'24' has no unit, and 24 bytes hold nothing: write a unit, such as 24GiB"):
        parse_bytes("24", "gpu_memory")


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "24XB", "1e9", "nan", 0, -5, True, "9" * 400, "9" * 400 + "GiB", 1 << 60])
def test_amounts_that_are_none(text: str | int) -> None:
    with pytest.raises(UserError, match="gpu_memory") as caught:
        parse_bytes(text, "gpu_memory")
    assert len(str(caught.value)) < 200


def test_amounts_to_read() -> None:
    assert [format_bytes(n) for n in (5, 2048, 3 << 29, 5 << 40)] == ["5 B", "2.0 KiB", "1.5 GiB", "5.0 TiB"]
