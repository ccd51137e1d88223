"""The form of a plan file: msgpack within limits, and dataclasses read back from it field by field. Torch-free.

It knows nothing of plans but the sentence's noun: which dataclass is read, and what its fields may hold, the caller says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgpack

from rowcast.errors import UserError

MAX_FILE_BYTES = 16 << 20
"""Of a plan file; the largest plans of a hundred GPUs take a few MiB."""

_LIMITS = {"max_str_len": 1 << 16, "max_bin_len": 0, "max_ext_len": 0, "max_array_len": 1 << 17, "max_map_len": 256}
"""msgpack's, for one text, list or map of the file."""

_FIRST_KEY = msgpack.packb("format")
"""Of the outermost map, so that what was once a plan file is known as one."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Rule:
    """What a field may hold beside its type. For lists and maps: each item; `among` of maps: each key."""

    least: float = 0
    most: float = math.inf
    among: tuple[str, ...] = ()
    """Texts; empty: any."""


Rules = Mapping[tuple[type, str], Rule]
"""By dataclass and field. Fields without a rule: any text, numbers of at least 0. Numbers are finite anyway."""


class WrongField(Exception):
    """What is wrong with a field, named as in forecast.memory[0].card; half a sentence."""


def write(path: str | Path, content: Mapping[str, object]) -> None:
    """Raises UserError where the file cannot be written or would be larger than what `read` takes."""
    data = msgpack.packb(content)
    if len(data) > MAX_FILE_BYTES:
        raise UserError(
            f"the plan takes {len(data)} bytes, a plan file at most {MAX_FILE_BYTES}: plan for fewer GPUs or with fewer --groups"
        )
    try:
        Path(path).write_bytes(data)
    except OSError as error:
        raise UserError(f"cannot write the plan file {path}: {error.strerror}") from error


def read(path: str | Path) -> bytes:
    """All of a file, or one byte more than `MAX_FILE_BYTES`. Raises UserError where it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot read the plan file {path}: {error.strerror}") from error


def decode(data: bytes, path: str | Path, version: int) -> dict[str, Any]:
    """The outermost map of a file of format `version`, not looked into otherwise. `path` is for sentences.

    Raises UserError for bytes that are foreign, damaged or too many, and for an older or a newer format.
    """
    foreign = UserError(f"{path} is not a plan file: make one with rowcast plan MODEL -o FILE, or with Plan.save")
    if len(data) > MAX_FILE_BYTES:
        raise UserError(
            f"{path} has more than the {MAX_FILE_BYTES} bytes of a plan file: make one with rowcast plan MODEL -o FILE"
        )
    try:
        content = msgpack.unpackb(data, strict_map_key=True, **_LIMITS)
    except Exception as error:  # msgpack's own exceptions, ValueError, UnicodeDecodeError, RecursionError
        if not _was_one(data):
            raise foreign from error
        raise damaged(path, "it was cut off, or bytes of it were changed") from error
    if not isinstance(content, dict) or "format" not in content:
        raise foreign
    found = content["format"]
    if not isinstance(found, int) or isinstance(found, bool):
        raise damaged(path, f"its format is {shown(found)}")
    if found != version:
        newer = found > version
        raise UserError(
            f"{path} was made by {'a newer' if newer else 'an older'} version, it has plan format {found}, this one reads {version}: "
            f"{'update Rowcast or ' if newer else ''}make the plan again"
        )
    return content


def _was_one(data: bytes) -> bool:
    """Whether it begins as plan files do: a map of any of msgpack's three sizes, and its first key."""
    start = {0xDE: 3, 0xDF: 5}.get(data[0], 1) if data else 0
    return data[start:].startswith(_FIRST_KEY)


def damaged(path: str | Path, how: str) -> UserError:
    """The error for a plan file that is none any more."""
    return UserError(f"the plan file {path} is damaged, {how}: make the plan again")


def shown(value: object) -> str:
    """A value of a file that one does not trust, for a sentence: short, and containers by their kind."""
    return f"{value!r:.60}" if isinstance(value, (str, int, float, type(None))) else f"a {type(value).__name__}"


def build(kind: type[T], content: object, rules: Rules, name: str = "") -> T:
    """The dataclass `kind` from the map that `dataclasses.asdict` made of one, and everything in it likewise.

    Raises WrongField for a missing or an unknown field, and for a value of another type or that `rules` do not allow. Whole numbers
    are taken for floating-point ones.
    """
    assert is_dataclass(kind)
    if not isinstance(content, dict):
        raise WrongField(f"{name or 'the content'} is {shown(content)}, not a map")
    wrong = sorted(set(content) ^ {field.name for field in fields(kind)}, key=str)
    if wrong:
        raise WrongField(f"{name or 'it'} lacks or adds the fields {', '.join(map(_bare, wrong[:5]))}")
    values = {}
    for field, hint in _hints(kind).items():
        where = f"{name}.{field}" if name else field
        values[field] = _value(hint, content[field], rules.get((kind, field), _ANY), rules, where)
    return kind(**values)


_ANY = Rule()


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _value(hint: Any, value: object, rule: Rule, rules: Rules, name: str) -> Any:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is UnionType:
        assert inner[1:] == (type(None),), f"{name}: {hint}"
        return None if value is None else _value(inner[0], value, rule, rules, name)
    if origin is Literal:
        return _text(value, inner, name)
    if origin is list:
        _expect(isinstance(value, list), value, "a list", name)
        assert isinstance(value, list)
        return [_value(inner[0], item, rule, rules, f"{name}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        _expect(isinstance(value, dict), value, "a map", name)
        assert isinstance(value, dict) and inner[0] is str
        keys = [_text(key, rule.among, f"a key of {name}") for key in value]
        return {key: _value(inner[1], value[key], rule, rules, f"{name}[{shown(key)}]") for key in keys}
    if is_dataclass(hint):
        return build(hint, value, rules, name)  # type: ignore[arg-type]
    return _PLAIN[hint](value, rule, name)


def _bare(name: object) -> str:
    """A field's name, in quotation marks only where it cannot be one."""
    return name if isinstance(name, str) and name.isidentifier() else shown(name)


def _expect(right: bool, value: object, what: str, name: str) -> None:
    if not right:
        raise WrongField(f"{name} is {shown(value)}, not {what}")


def _text(value: object, among: tuple[str, ...], name: str) -> str:
    _expect(isinstance(value, str), value, "a text", name)
    assert isinstance(value, str)
    if among and value not in among:
        raise WrongField(f"{name} is {shown(value)}, not one of {', '.join(among)}")
    return value


def _flag(value: object, _: Rule, name: str) -> bool:
    _expect(isinstance(value, bool), value, "true or false", name)
    return bool(value)


def _whole(value: object, rule: Rule, name: str) -> int:
    _expect(isinstance(value, int) and not isinstance(value, bool), value, "a whole number", name)
    assert isinstance(value, int)
    _bounded(value, rule, name)
    return value


def _number(value: object, rule: Rule, name: str) -> float:
    _expect(isinstance(value, (int, float)) and not isinstance(value, bool), value, "a number", name)
    assert isinstance(value, (int, float))
    _expect(math.isfinite(value), value, "a finite number", name)
    _bounded(value, rule, name)
    return float(value)


def _bounded(value: float, rule: Rule, name: str) -> None:
    if value < rule.least:
        raise WrongField(f"{name} is {shown(value)}, at least {rule.least:g} is needed")
    if value > rule.most:
        raise WrongField(f"{name} is {shown(value)}, at most {rule.most:g} is possible")


_PLAIN: dict[type, Callable[[object, Rule, str], Any]] = {
    str: lambda value, rule, name: _text(value, rule.among, name),
    bool: _flag,
    int: _whole,
    float: _number,
}
