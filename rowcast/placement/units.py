"""Bytes and figures as people write them."""

from __future__ import annotations

import re
from fractions import Fraction

from rowcast.errors import UserError

MAX_BYTES = 1 << 50

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS |= {_letter: 1024**_power, f"{_letter}B": 1000**_power, f"{_letter}iB": 1024**_power}


_LEAST_WITHOUT_UNIT = 1 << 20
"""Bytes: smaller numbers without a unit are meant in one."""


def parse_bytes(text: str | int, what: str) -> int:
    """Such as "24GiB" -> 25769803776. `what` names the argument in the error. KB, MB, ... are powers of 1000; K, KiB, ... of 1024."""
    if isinstance(text, int) and not isinstance(text, bool):
        value = text
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
        unit = {u.lower(): u for u in _UNITS}.get(match[2].lower()) if match else None
        if match is None or unit is None:
            raise UserError(f"{what}={text!r:.60} is not an amount of memory: write a number and a unit, such as 24GiB or 512MiB")
        value = int(Fraction(match[1]) * _UNITS[unit])
        if not match[2] and 0 < value < _LEAST_WITHOUT_UNIT:
            raise UserError(
                f"{what}={text!r:.60} has no unit, and {value} bytes hold nothing: write a unit, such as {match[1]}GiB"
            )
    if value <= 0:
        raise UserError(f"{what}={text!r} has to be more than 0 bytes, such as 24GiB")
    if value > MAX_BYTES:
        raise UserError(f"{what}={text!s:.40} is more than any machine has: use at most {format_bytes(MAX_BYTES)}")
    return value


def format_bytes(count: int) -> str:
    """Such as 25769803776 -> "24.0 GiB"."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def format_figure(value: float) -> str:
    """Three digits, or all before the point, never a power of ten: 0.0208, 54.5, 1613."""
    if 0 < value < 0.001:
        return "<0.001"
    return f"{value:.0f}" if value >= 999.5 else f"{value:.3g}"
