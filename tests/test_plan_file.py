"""Plan files from strangers: whatever bytes they hold, there is one sentence or a plan that passed every check."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
from plan_samples import FORECAST, forecast_plan, resident

from rowcast.errors import UserError
from rowcast.placement import plan_file
from rowcast.placement.plan import FORMAT, Plan

CONTENT = asdict(forecast_plan())
DATA: bytes = msgpack.packb(CONTENT)


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """The sentence about a file with these bytes, or this content."""

    def refused(content: object) -> str:
        path = tmp_path / "some.plan"
        path.write_bytes(content if isinstance(content, bytes) else msgpack.packb(content))
        with pytest.raises(UserError) as caught:
            Plan.load(path)
        sentence = str(caught.value)
        assert "\n" not in sentence and "some.plan" in sentence and len(sentence) < 400
        return sentence

    return refused


def tries(data: bytes) -> Plan | None:
    """The plan in it, or None after one sentence; any other exception goes through."""
    try:
        return Plan.decode(data, "some.plan")
    except UserError as error:
        sentence = str(error)
    assert "\n" not in sentence and "some.plan" in sentence and len(sentence) < 400
    return None


def test_files_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "plan"
    for plan in (resident(), forecast_plan(), forecast_plan(greedy_seconds_per_token=None, what_if=[], gap=-1e-12)):
        plan.save(path)
        loaded = Plan.load(path)
        assert loaded == plan
        assert type(loaded.forecast) is type(plan.forecast)


def test_whole_numbers_are_taken_for_floating_ones(tmp_path: Path) -> None:
    forecast_plan(first_token_s=64).save(tmp_path / "plan")
    loaded = Plan.load(tmp_path / "plan").forecast
    assert loaded is not None and isinstance(loaded.first_token_s, float)


def test_the_reason_is_told(refused: Callable[..., str]) -> None:
    assert "is not a plan file" in refused(b"")
    assert "is not a plan file" in refused(b"PK\x03\x04 something else")
    assert "is not a plan file" in refused([1, 2])
    assert "is not a plan file" in refused({"version": 4})
    assert "is damaged, it was cut off" in refused(DATA[:-1])
    assert "is damaged, it was cut off" in refused(DATA + b"\0")
    newer = refused(CONTENT | {"format": FORMAT + 1})
    assert f"made by a newer version, it has plan format {FORMAT + 1}, this one reads {FORMAT}: update" in newer
    older = refused({"format": 3, "anything": None})
    assert "made by an older version, it has plan format 3" in older and "make the plan again" in older
    assert "its format is 'four'" in refused(CONTENT | {"format": "four"})
    assert "its format is True" in refused(CONTENT | {"format": True})


def with_forecast(**changes: object) -> dict[str, Any]:
    return CONTENT | {"forecast": CONTENT["forecast"] | changes}


def with_first(name: str, **changes: object) -> dict[str, Any]:
    """The first of one of the forecast's lists, changed."""
    first, *others = CONTENT["forecast"][name]
    return with_forecast(**{name: [first | changes, *others]})


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    (CONTENT | {"more": 1}, "adds the fields more"),
    ({key: value for key, value in CONTENT.items() if key != "dtype"}, "fields dtype"),
    (CONTENT | {"num_blocks": 0}, "num_blocks is 0, at least 1"),
    (CONTENT | {"num_blocks": 1 << 60}, "num_blocks is .*at most"),
    (CONTENT | {"num_blocks": 5.0}, "num_blocks is 5.0, not a whole number"),
    (CONTENT | {"num_blocks": True}, "num_blocks is True, not a whole number"),
    (CONTENT | {"adaptive": 1}, "adaptive is 1, not true or false"),
    (CONTENT | {"weight_bytes": -1}, "weight_bytes is -1"),
    (CONTENT | {"weight_bytes": 1 << 40}, "budget_bytes is .*less than the .*that it takes"),
    (CONTENT | {"ladder": []}, "ladder is empty"),
    (CONTENT | {"ladder": ["plain", 1]}, r"ladder\[1\] is 1, not a text"),
    (CONTENT | {"mode": "sloppy"}, "mode is 'sloppy', not one of exact, approximate"),
    (CONTENT | {"device": "cuda:0; rm"}, "device is"),
    (CONTENT | {"spec": ""}, "of no model"),
    (CONTENT | {"spec": None}, "spec is None, not a text"),
    (CONTENT | {"notes": "text"}, "notes is 'text', not a list"),
    (CONTENT | {"forecast": []}, "forecast is a list, not a map"),
    (with_forecast(gap=float("nan")), "forecast.gap is nan, not a finite number"),
    (with_forecast(seconds_per_token=float("inf")), "seconds_per_token is inf"),
    (with_forecast(seconds_per_token=-0.1), "seconds_per_token is -0.1, at least 0"),
    (with_forecast(bottleneck_share=1.5), "bottleneck_share is 1.5, at most 1"),
    (with_forecast(bottleneck="luck"), "bottleneck is 'luck', not one of GPU memory"),
    (with_forecast(tokens_per_s_range=[5.0, 4.0]), "tokens_per_s_range is not a least and a most"),
    (with_forecast(tokens_per_s_range=[5.0]), "tokens_per_s_range is not a least and a most"),
    (with_forecast(memory={}), "forecast.memory is a dict, not a list"),
    (with_forecast(more=1), "forecast lacks or adds the fields more"),
    (with_first("memory", budget_bytes=5), "'GPU 0' does not add up to its budget of 5 bytes"),
    (with_first("memory", classes={"wights": 1}), "a key of forecast.memory.0..classes is 'wights'"),
    (with_first("memory", classes={"KV": "1"}), r"classes\['KV'\] is '1', not a whole number"),
    (with_first("rungs", bound_by="CPUs"), r"rungs\[0\].bound_by is 'CPUs'"),
    (with_first("stages", bytes={"bus": -1}), r"bytes\['bus'\] is -1"),
    (with_first("shares", tier="cloud"), r"tier is 'cloud', not one of resident"),
    (with_first("shares", count=121), "groups 0 to 121 of 120"),
    (with_first("inputs", origin="felt"), "origin is 'felt', not one of datasheet"),
    (with_first("what_if", seconds_per_token="fast"), "seconds_per_token is 'fast', not a number"),
]


@pytest.mark.parametrize(("content", "told"), BAD_FIELDS, ids=[told for _, told in BAD_FIELDS])
def test_every_field_is_checked(refused: Callable[..., str], content: dict[str, Any], told: str) -> None:
    sentence = refused(content)
    assert "damaged" in sentence
    with pytest.raises(AssertionError, match=told):  # so that a failure shows both
        raise AssertionError(sentence)


def test_truncated_anywhere() -> None:
    for length in range(len(DATA)):
        assert tries(DATA[:length]) is None, length


def test_any_byte_changed(tmp_path: Path) -> None:
    """Where the bytes still make a plan, it is one that can be written and read again."""
    chance, plans = random.Random(0), 0
    for _ in range(3000):
        data = bytearray(DATA)
        for _ in range(chance.choice((1, 1, 1, 2, 8))):
            data[chance.randrange(len(data))] = chance.randrange(256)
        plan = tries(bytes(data))
        if plan is not None:
            plans += 1
            plan.save(tmp_path / "again")
            assert Plan.load(tmp_path / "again") == plan
            plan.to_json()
    assert 0 < plans < 3000


def test_noise_is_no_plan() -> None:
    chance = random.Random(1)
    for size in (1, 2, 3, 10, 100, 5000):
        for _ in range(50):
            assert tries(chance.randbytes(size)) is None


HEAD = b"\x81\xa6format"

BOMBS = {
    "nested lists": HEAD + b"\x91" * 200_000 + b"\xc0",
    "nested lists that fit": HEAD + b"\x04" + b"\x91" * 1000 + b"\xc0",
    "nested maps": HEAD + b"\x81\xa1a" * 100_000 + b"\xc0",
    "a list said to be long": HEAD + b"\xdd\xff\xff\xff\xff",
    "a map said to be large": b"\xdf\xff\xff\xff\xff\xa6format\x04",
    "a text said to be long": HEAD + b"\xdb\xff\xff\xff\xff" + b"a" * 100,
    "bytes said to be many": HEAD + b"\xc6\xff\xff\xff\xff",
    "an extension said to be long": HEAD + b"\xc9\xff\xff\xff\xff\x05",
    "a timestamp": HEAD + b"\xd6\xff" + struct.pack(">I", 5),
    "many lists": HEAD + b"\xdc\x40\x00" + (b"\xdc\x01\x00" + b"\xc0" * 256) * 16384,
    "a key that is a list": b"\x82\xa6format\x04\x91\x01\x02",
    "text that is none": HEAD + b"\xa4\xff\xfe\xfd\xfc",
    "format last": msgpack.packb({"x": [[[[]]]] * 9, "format": FORMAT}),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_quickly(refused: Callable[..., str], name: str) -> None:
    started = time.process_time()
    refused(BOMBS[name])
    assert time.process_time() - started < 1.0


def test_nesting_inside_of_a_field(refused: Callable[..., str]) -> None:
    """As deep as msgpack goes, which is deeper than what repr can show."""
    deep: Any = None
    for _ in range(500):
        deep = [deep]
    for content in (CONTENT | {"notes": deep}, with_forecast(layout=deep), with_first("stages", bytes=deep)):
        assert "damaged" in refused(content)


def test_large_files_are_refused(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(plan_file, "MAX_FILE_BYTES", 3000)
    assert "3000 bytes" in refused(b"\x81\xa6format" + b"\0" * 3000)
    with pytest.raises(UserError, match="fewer GPUs"):
        replace(resident(), notes=["x" * 3000]).save(tmp_path / "plan")


def test_files_that_are_none(tmp_path: Path) -> None:
    for path in (tmp_path / "no-such", tmp_path):
        with pytest.raises(UserError, match=f"cannot read the plan file {path}"):
            Plan.load(path)
    with pytest.raises(UserError, match="cannot write the plan file"):
        resident().save(tmp_path / "no" / "such")


def test_a_sample_that_is_whole() -> None:
    """The tests above change one thing of a plan that is sound."""
    assert all(sum(memory.classes.values()) == memory.budget_bytes for memory in FORECAST.memory)
