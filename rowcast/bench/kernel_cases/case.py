"""One kernel on one shape, and what else does the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Case:
    """A kernel at a size, ready to run. Every call can be captured in a CUDA graph."""

    name: str
    """The kernel, as `--only` finds it."""
    shape: str
    """Sizes, number format and number of tokens, for people."""
    bytes: int
    """What one call must read and write: the floor is the time in which a large copy moves as many."""
    calls: Sequence[Callable[[], object]]
    """The same call with inputs of their own each, which together exceed several times the L2: they are run in turn."""
    peers: Mapping[str, Sequence[Callable[[], object]]] = field(default_factory=dict)
    """What a library does for the same result, by name; its calls likewise."""
    note: str = ""
    """What the figures alone do not say."""
