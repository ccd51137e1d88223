"""What crosses the wire comes out as it went in, and nothing else comes in."""

from __future__ import annotations

import random
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any

import msgpack
import pytest

from rowcast.cluster import wire
from rowcast.cluster.wire import (
    Answer,
    Ask,
    Asked,
    Command,
    Done,
    Failed,
    Hello,
    Message,
    Order,
    Progress,
    Proposed,
    Ready,
    Rendezvous,
    Stop,
    WireError,
    decode,
    encode,
)
from rowcast.errors import UserError
from rowcast.runtime.params import SamplingParams
from rowcast.runtime.step import Moved, RungCounts, SeqResult, SeqSetup, SeqStep, TokenLogprobs

EVERYTHING = SamplingParams(
    n=2,
    temperature=0.7,
    top_p=0.9,
    top_k=5,
    seed=2**63 - 1,
    stop=["a", "é"],
    stop_token_ids=[3],
    bad_words=["no"],
    logit_bias={7: -1.5, 8: 2.0},
    allowed_token_ids=[1, 2],
    max_tokens=None,
    logprobs=-1,
    prompt_logprobs=2,
    repetition_penalty=1.1,
)
SETUP = SeqSetup(
    4, EVERYTHING, 2**63 - 1, 1, [1, 2], [5], [[1], [2, 3]], output_ids=[9], group=2, drafters=["ngram"], last="self"
)
STEP = SeqStep(4, [1, 2], 0, [7, 8], 2, True, prompt_logprobs=None, room=3, left=12)
LOGPROBS = TokenLogprobs(5, -0.25, 1, [5, 6], [-0.25, float("-inf")])
COUNTS = RungCounts([1, 2], [1, 1], [0], tokens=3, seconds=0.5, bytes_read=1 << 40, neurons_by_layer=[7, 8])
MESSAGES: list[Message] = [
    Hello("token", 1, 2, "127.0.0.1"),
    Order(2, "/model", b"\x00plan", None, False, 1, 2.5),
    Order(2, "/model", b"", "/calibration", True, 1, 2.0),
    Rendezvous("host", 1234),
    Progress(10, 20),
    Ready(1.5),
    Stop(),
    Command(7, [[1], [2, 30]], [SETUP], [STEP, STEP], [1, 2]),
    Command(8),
    Done(
        7,
        2**32 - 1,
        [SeqResult(4, [1], [LOGPROBS], [LOGPROBS], {"plain": COUNTS}), SeqResult(5, [], moved=Moved(3, stalled_s=0.5))],
    ),
    Failed(7, "user", "A sentence."),
    Ask(1, [Asked(4, [5, 6], 3, [2, 3], 65535), Asked(5, [], 1, [0, 1], 0)]),
    Answer([Proposed([7, 8], [b"\x00\x00\x80?", None], 9, {"draft": COUNTS})], [[1.0, 2, 1, 0.5]], [[4, 0, 1, 3, 2]], None),
    Answer([], [], [], "A sentence."),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_round_trip(message: Message) -> None:
    assert decode(encode(message)) == message


def test_every_sampling_parameter_crosses() -> None:
    """One at a time, whatever is added to them."""
    changed = {f.name: getattr(EVERYTHING, f.name) for f in fields(SamplingParams)}
    for name, value in changed.items():
        given = SamplingParams(**{name: value})
        [found] = decode(encode(Command(1, setups=[SeqSetup(0, given, 0, 0, [], [], [])]))).setups  # type: ignore[union-attr]
        assert found.params == given


def packed(*content: Any) -> bytes:
    data: bytes = msgpack.packb(list(content))
    return data


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no msgpack"),
        (b"\xc1", "no msgpack"),
        (packed(1, "Stop")[:-1], "no msgpack"),
        (msgpack.packb({"a": 1}), "no message"),
        (packed(wire.VERSION + 1, "Stop"), "same Rowcast everywhere"),
        (packed(wire.VERSION, "Shell"), "'Shell' is no message"),
        (packed(wire.VERSION, 5), "5 is no message"),
        (packed(wire.VERSION, "Stop", 1), "Stop has 1 fields, not 0"),
        (packed(wire.VERSION, "Progress", 1), "not 2"),
        (packed(wire.VERSION, "Progress", 1, "2"), "Progress.total is '2', no int"),
        (packed(wire.VERSION, "Progress", 1, True), "Progress.total is True"),
        (packed(wire.VERSION, "Hello", "token", 1, 2, b"h"), "Hello.host"),
        (packed(wire.VERSION, "Command", 1, [[1.5]], [], [], None), "Command.freed is no list of numbers"),
        (
            packed(wire.VERSION, "Command", 1, [], [], [[1, [1], 0, [True], 1, True, None, 0, 1, False]], None),
            "SeqStep|steps.blocks",
        ),
        (
            packed(wire.VERSION, "Command", 1, [], [[0, {"n": 1}, 0, 0, [], [], [], [], 0, None, None]], [], None),
            "no list of pairs",
        ),
        (packed(wire.VERSION, "Done", 1, 2, [[1, [], None, None, [], None]]), "no map"),
        (packed(wire.VERSION, "Failed", 1, "user", msgpack.ExtType(5, b"x")), "no msgpack"),
        (packed(wire.VERSION, "Ask", 1, [[4, [5, "6"], 3, [2], 0]]), "Asked|wants.drafted is no list of numbers"),
        (packed(wire.VERSION, "Answer", [[[7], [1.5], 0, {}]], [], [], None), "laws is 1.5, no bytes"),
        (packed(wire.VERSION, "Answer", [[[7], [], 0, {"draft": []}]], [], [], None), "has 0 fields"),
        (packed(wire.VERSION, "Answer", [], [["1"]], [], None), "passes is no list of numbers"),
        (packed(wire.VERSION, "Answer", [], [], [[0.5]], None), "outcomes is no list of numbers"),
    ],
)
def test_what_is_no_message_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(WireError, match=words):
        decode(data)


def test_parameters_are_checked_again() -> None:
    data = packed(wire.VERSION, "Command", 1, [], [[0, [["top_p", 7.0]], 0, 0, [], [], [], [], 0, None, None]], [], None)
    with pytest.raises(UserError, match="top_p"):
        decode(data)


def test_any_bytes_are_a_message_or_refused() -> None:
    rng = random.Random(0)
    for message in MESSAGES:
        whole = encode(message)
        for _ in range(200):
            data = bytearray(whole)
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            with suppress(WireError, UserError):
                decode(bytes(data))


def test_what_is_too_large_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_MESSAGE_BYTES", 100)
    with pytest.raises(WireError, match="larger"):
        encode(Order(2, "m" * 200, b"", None, False, 1, 1.0))
    with pytest.raises(WireError, match="larger"):
        decode(bytes(101))


def test_only_what_is_known_crosses() -> None:
    @dataclass
    class Other:
        value: object

    with pytest.raises(TypeError, match="object does not cross"):
        encode(Other(object()))  # type: ignore[arg-type]
