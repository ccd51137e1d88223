"""What crosses between the driver and the ranks: messages as msgpack, within limits, of one version. Torch-free.

A message is [version, kind, field, field, ...]; dataclasses in it are lists of their fields, in order. Nothing is unpickled, and
every value is checked against its field's type before it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeAlias, Union, get_args, get_origin, get_type_hints

import msgpack

from rowcast.runtime.params import SamplingParams
from rowcast.runtime.step import RungCounts, SeqResult, SeqSetup, SeqStep

VERSION = 4
"""Raised when a message changes; the driver and its ranks have to be of the same."""

MAX_MESSAGE_BYTES = 256 << 20

_LIMITS = {
    "max_str_len": 1 << 20,
    "max_bin_len": 16 << 20,
    "max_ext_len": 0,
    "max_array_len": 1 << 24,
    "max_map_len": 1 << 10,
}


class WireError(Exception):
    """Bytes that are no message of this version; one sentence."""


@dataclass(frozen=True, slots=True)
class Hello:
    """Rank to driver, first of all."""

    token: str
    """Which the launcher gave it: others that find the socket do not know it."""
    rank: int
    pid: int
    host: str
    """Its address, for ranks elsewhere."""


@dataclass(frozen=True, slots=True)
class Order:
    """Driver to rank: what to load."""

    world: int
    model: str
    """A path or a hub id."""
    plan: bytes
    """As `Plan.decode` takes it."""
    calibration: str | None
    eager: bool
    threads: int
    """Of torch, on a CPU."""
    timeout_s: float
    """After which a rank no longer waits for the others."""


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where rank 0 keeps the store by which the ranks find each other: from it to the driver, from there to the others."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Progress:
    """Rank to driver: bytes placed since the last time, and all that it will place."""

    placed: int
    total: int


@dataclass(frozen=True, slots=True)
class Ready:
    """Rank to driver: everything is loaded, and all ranks have met."""

    seconds: float
    """Of loading."""


@dataclass(frozen=True, slots=True)
class Command:
    """Driver to all ranks. Its parts are carried out in this order."""

    serial: int
    freed: list[list[int]] = field(default_factory=list)
    """[seq_id]: forget the sequence; [seq_id, length]: its KV is void, and it has so many tokens (`Executor.free_kv`)."""
    setups: list[SeqSetup] = field(default_factory=list)
    steps: list[SeqStep] = field(default_factory=list)
    """Of one round; none: no round."""
    check: list[int] | None = None
    """The sequences that it has to remember."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Of one sequence: see `Ask`."""

    seq_id: int
    drafted: list[int]
    """Tokens behind the committed ones so far."""
    count: int
    """Tokens wanted."""
    gammas: list[int]
    """Of the rungs, as in `Climber`."""
    rounds: int
    """Last number of `Sampler.next_round`."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Rank 0 to driver, while a command runs: have the draft there propose."""

    rung: int
    wants: list[Asked]


@dataclass(frozen=True, slots=True)
class Proposed:
    """Of one sequence: see `Answer`."""

    ids: list[int]
    laws: list[bytes | None]
    """As float32 by token of the vocabulary, where the rule needs laws; None: the token was certain."""
    rounds: int
    """Last number of `Sampler.next_round`."""
    counts: dict[str, RungCounts]
    """What the rungs there did, by name."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Driver to all ranks: what the draft proposes, in the order of the question."""

    wants: list[Proposed]
    passes: list[list[float]]
    """Rung, tokens, sequences and seconds of each pass."""
    outcomes: list[list[int]]
    """The fields of `Outcome`."""
    failure: str | None
    """In place of all that, where the draft failed: why."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Driver to rank: end in order."""


@dataclass(frozen=True, slots=True)
class Done:
    """Rank to driver: a command was carried out."""

    serial: int
    digest: int
    """CRC-32 of the round's tokens, which are to be the same on all ranks."""
    results: list[SeqResult]
    """Of rank 0; the others send none."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Rank to driver: an order (serial -1) or a command raised."""

    serial: int
    kind: str
    """user, memory: UserError and OutOfMemoryError, whose sentence `text` is. error: anything else, with its trace."""
    text: str


Message: TypeAlias = Hello | Order | Rendezvous | Progress | Ready | Command | Ask | Answer | Stop | Done | Failed
_KINDS: dict[str, type[Message]] = {kind.__name__: kind for kind in get_args(Message)}


def encode(message: Message) -> bytes:
    """Raises WireError for a message that is larger than what `decode` takes."""
    data: bytes = msgpack.packb([VERSION, type(message).__name__, *_values(message)], default=_values)
    if len(data) > MAX_MESSAGE_BYTES:
        raise WireError(f"a {type(message).__name__} of {len(data)} bytes is larger than {MAX_MESSAGE_BYTES}")
    return data


def decode(data: bytes) -> Message:
    """Raises WireError for bytes that are no message, and for values that are not of their field's type."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise WireError(f"a message of {len(data)} bytes is larger than {MAX_MESSAGE_BYTES}")
    try:
        content = msgpack.unpackb(data, strict_map_key=True, **_LIMITS)
    except Exception as error:  # msgpack's own exceptions, ValueError, UnicodeDecodeError, RecursionError
        raise WireError("the bytes are no msgpack within the limits") from error
    if not isinstance(content, list) or len(content) < 2:
        raise WireError("the bytes are no message")
    version, kind, *values = content
    if version != VERSION:
        raise WireError(f"the message is of version {version!r:.20}, this is {VERSION}: run the same Rowcast everywhere")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise WireError(f"{kind!r:.40} is no message")
    named: type = _KINDS[kind]
    message: Message = _dataclass(named, kind)(values)
    return message


def _values(value: object) -> list[object]:
    """What msgpack does not know: a dataclass as the list of its fields."""
    if isinstance(value, SamplingParams):
        return [[name, _items(getattr(value, name))] for name in _changed(value)]
    if not is_dataclass(value) or isinstance(value, type):
        raise TypeError(f"{type(value).__name__} does not cross the wire")
    return [getattr(value, name) for name in _names(type(value))]


def _items(value: object) -> object:
    """A map as pairs, since msgpack's keys are texts here."""
    return list(value.items()) if isinstance(value, dict) else value


def _changed(params: SamplingParams) -> list[str]:
    return [name for name in _names(SamplingParams) if getattr(params, name) != getattr(_DEFAULTS, name)]


@cache
def _names(kind: type) -> tuple[str, ...]:
    return tuple(f.name for f in fields(kind))


_DEFAULTS = SamplingParams()

_Reader: TypeAlias = Callable[[Any], Any]
"""From what msgpack gives to a field's value. Raises WireError."""


@cache
def _dataclass(kind: type, where: str) -> _Reader:
    hints = get_type_hints(kind)
    readers = [_reader(hints[name], f"{where}.{name}") for name in _names(kind)]

    def read(values: Any) -> Any:
        if not isinstance(values, list) or len(values) != len(readers):
            raise WireError(f"{where} has {len(values) if isinstance(values, list) else 'no'} fields, not {len(readers)}")
        return kind(*[reader(value) for reader, value in zip(readers, values, strict=True)])

    return read


def _reader(kind: Any, where: str) -> _Reader:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        (other,) = [each for each in inner if each is not NoneType]
        reader = _reader(other, where)
        return lambda value: None if value is None else reader(value)
    if origin is list:
        return _list(inner[0], where)
    if origin is dict:
        reader = _reader(inner[1], where)

        def read_map(value: Any) -> Any:
            if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
                raise WireError(f"{where} is no map of texts")
            return {key: reader(item) for key, item in value.items()}

        return read_map
    if kind is SamplingParams:
        return lambda value: _params(value, where)
    if is_dataclass(kind):
        assert isinstance(kind, type)
        return _dataclass(kind, where)
    allowed = (int, float) if kind is float else (kind,)

    def read(value: Any) -> Any:
        if type(value) not in allowed:
            raise WireError(f"{where} is {value!r:.40}, no {kind.__name__}")
        return value

    return read


def _list(item: Any, where: str) -> _Reader:
    if item in (int, float):
        allowed = {int, float} if item is float else {int}

        def read_numbers(value: Any) -> Any:
            if not isinstance(value, list) or not allowed.issuperset(map(type, value)):
                raise WireError(f"{where} is no list of numbers")
            return value

        return read_numbers
    reader = _reader(item, where)

    def read(value: Any) -> Any:
        if not isinstance(value, list):
            raise WireError(f"{where} is no list")
        return [reader(each) for each in value]

    return read


def _params(value: Any, where: str) -> SamplingParams:
    """Raises UserError for values out of bounds, which no SamplingParams has held."""
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise WireError(f"{where} is no list of pairs")
    try:
        given = dict(value)
        if given.get("logit_bias") is not None:
            given["logit_bias"] = dict(given["logit_bias"])
    except (TypeError, ValueError) as error:
        raise WireError(f"{where} is no list of pairs") from error
    return SamplingParams.from_dict(given)
