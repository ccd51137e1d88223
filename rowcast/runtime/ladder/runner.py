"""What a ladder climbs: rungs that run a model, and rungs that look tokens up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from rowcast.runtime.ladder.path import Path
from rowcast.runtime.protocols import Reads
from rowcast.runtime.sharded_logits import Logits


@dataclass(frozen=True, slots=True)
class Ran:
    """What a pass gave and cost."""

    hidden: Tensor
    """Of the wanted tokens, [sum(wanted), D]."""
    wanted: list[int]
    """For each path: its rows of `hidden`."""
    tokens: list[int]
    """Tokens run for each path."""
    generated: list[int]
    """Those of them that lie behind their request's prompt."""
    kv_bytes: list[int]
    """Read for each path."""
    refreshes: list[int]
    """For each path: times that the view chose its entries anew."""


class Runner(Protocol):
    """A way to run a model: weights and a KV view. One rank's part; every rank makes the same calls."""

    name: str

    @property
    def seq_ids(self) -> set[int]:
        """Sequences that it remembers."""
        ...

    def admit(self, path: Path, room: int) -> bool:
        """Whether the path and `room` tokens more can be run: the view has a place for the sequence, which is then its own until it
        is freed, and the model has the positions."""
        ...

    def forward(self, paths: Sequence[Path], wanted: Sequence[int]) -> Ran:
        """Run each path's tokens that the view does not hold yet; their K/V become proposals.

        Precondition: there are some, and the last `wanted[i]` tokens of path i are among them. Returns those tokens' hidden states.
        """
        ...

    def logits(self, hidden: Tensor) -> Logits:
        """[N, D] -> [N, V]; of several ranks each has its own columns."""
        ...

    def reads(self) -> Reads:
        """What `forward` and `logits` read of the weights since the last call of this. May wait for the device."""
        ...

    def truncate(self, seq_id: int, length: int) -> None:
        """Tokens at `length` and later were rejected: drop what the view holds of them, if anything."""
        ...

    def commit(self, seq_id: int, length: int) -> None:
        """The first `length` tokens of the sequence are committed: keep what the view holds of them, drop all else."""
        ...

    def free(self, seq_id: int) -> None:
        """Forget the sequence. Unknown ids are ignored."""
        ...


@runtime_checkable
class Lookup(Protocol):
    """A rung without a model: its proposals are certain, so their law is the one-hot one."""

    name: str

    @property
    def seq_ids(self) -> set[int]:
        """As in `Runner`."""
        ...

    def admit(self, path: Path, room: int) -> bool:
        """As in `Runner`."""
        ...

    def propose(self, path: Path, count: int) -> list[int]:
        """At most `count` tokens that may follow `path.ids`; none where it knows nothing. A function of the path alone."""
        ...

    def truncate(self, seq_id: int, length: int) -> None:
        """As in `Runner`."""
        ...

    def commit(self, seq_id: int, length: int) -> None:
        """As in `Runner`."""
        ...

    def free(self, seq_id: int) -> None:
        """Forget the sequence. Unknown ids are ignored."""
        ...
