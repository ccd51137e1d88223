"""Seconds a token, from a clock that was read whenever tokens had come. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rowcast.errors import UserError

Mark = tuple[float, int]
"""When, and how many tokens there were by then."""


class Pace(NamedTuple):
    s_per_token: float
    """From the first mark on."""
    later_s_per_token: float
    """Over the second half of the tokens."""


def pace(marks: Sequence[Mark]) -> Pace:
    """Raises UserError where no token came after the first mark."""
    (first, few), (last, many) = marks[0], marks[-1]
    if few == many:
        raise UserError("nothing is left to decode once the first tokens are there: raise --max-tokens")
    middle, half = next(mark for mark in reversed(marks[:-1]) if 2 * mark[1] <= few + many)
    return Pace((last - first) / (many - few), (last - middle) / (many - half))
