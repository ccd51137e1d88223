"""A view of all of the full store's entries, for a rung that runs the target's own weights, or some of them, over the whole KV.

It has no memory of its own: its proposals lie behind the committed entries, where the last rung's next pass writes anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rowcast.runtime.kv.paged import PagedKV, visible_bytes
from rowcast.runtime.protocols import Late
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.step import SeqStep


@dataclass(slots=True)
class _Proposals:
    """Of one sequence, behind the parent's entries as they were then."""

    length: int = 0
    rewinds: int = 0
    count: int = 0


class SharedKV:
    """Implements `KVView`; `length` is the parent's. What the parent says of itself does not change.

    Several such views may share a parent: where they propose for the same positions, the one that ran last has its entries there,
    which belong to the same tokens as long as rejected ones are dropped in all of them.
    """

    def __init__(self, parent: PagedKV, *, lazy: bool = False) -> None:
        """`lazy`: proposals may be completed by later passes; not where several such views share a parent, as one may write an entry
        anew that another has completed."""
        assert not parent.lazy, "the parent's entries are not complete"
        self.lazy = lazy
        self._parent = parent
        self._proposals: dict[int, _Proposals] = {}

    @property
    def seq_ids(self) -> set[int]:
        """Admitted sequences."""
        return set(self._proposals)

    def admit(self, seq_id: int) -> bool:
        """True: the places are the parent's."""
        self._proposals.setdefault(seq_id, _Proposals())
        return True

    def length(self, seq_id: int) -> int:
        """The parent's."""
        return self._parent.length(seq_id)

    def end(self, seq_id: int) -> int:
        """`length` and the proposals behind it; none behind one that has changed since they were made."""
        return self.length(seq_id) + self._current(seq_id).count

    def bind(self, steps: Sequence[SeqStep]) -> None:
        """As `KVView`. Precondition: the sequences are admitted, and the blocks cover what a round may draft."""
        for step in steps:
            self._note(step)
        self._parent.lend(steps)

    shares_entries = True

    @property
    def spec(self) -> ModelSpec:
        return self._parent.spec

    @property
    def slopes(self) -> Tensor | None:
        return self._parent.slopes

    @property
    def absolute_bias_scale(self) -> float | None:
        return self._parent.absolute_bias_scale

    @property
    def block_size(self) -> int:
        return self._parent.block_size

    @property
    def serves_device(self) -> bool:
        """As are `entries` and `reserve`, for rounds on the device (`kv.device`)."""
        return self._parent.serves_device

    def entries(self, layer: int) -> tuple[Tensor, Tensor]:
        """The parent's."""
        return self._parent.entries(layer)

    def reserve(self, step: SeqStep) -> tuple[list[int], int]:
        """The step's tokens are proposals now; their blocks, and 0."""
        self._note(step)
        return step.blocks, 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:  # [T, K, d] each
        self._parent.append(layer, k, v)

    def late_from(self, seq_id: int) -> int | None:
        """Behind the parent's entries, which its own passes completed, if entries may be late at all."""
        return self.length(seq_id) if self.lazy else None

    def fill(self, layer: int, late: Late) -> None:
        self._parent.fill(layer, late)

    def attend(self, layer: int, q: Tensor, heads: Tensor | None = None) -> Tensor:  # [T, H, d] -> [T, C, d]
        return self._parent.attend(layer, q, heads)

    def commit(self, seq_id: int, tokens: int) -> None:
        """Drops the sequence's proposals: the parent, which commits first, has those that stand."""
        self._proposals[seq_id] = _Proposals(self.length(seq_id), self._parent.rewinds(seq_id))

    def rollback(self, seq_id: int, length: int) -> None:
        """Drops proposals at `length` and later. Raises ValueError outside length..end: committed entries are the parent's."""
        found, committed = self._current(seq_id), self.length(seq_id)
        if not committed <= length <= committed + found.count:
            raise ValueError(f"cannot roll sequence {seq_id} back to {length}: it has {committed}..{committed + found.count}")
        found.count = length - committed

    def free(self, seq_id: int) -> None:
        self._proposals.pop(seq_id, None)

    def bytes_read(self, seq_id: int) -> int:
        """Bytes of K/V that attention reads in one pass for this sequence, up to `end`."""
        parent = self._parent
        return visible_bytes(parent.spec, parent.num_kv_heads, parent.dtype, self.end(seq_id))

    def refreshes(self, seq_id: int) -> int:
        """0: it shows everything."""
        return 0

    def _note(self, step: SeqStep) -> None:
        """Its tokens are proposals now."""
        found, length = self._current(step.seq_id), self.length(step.seq_id)
        assert length <= step.start <= length + found.count, f"sequence {step.seq_id}: {step.start} is outside {length}.."
        found.count = step.start + len(step.tokens) - length
        self._proposals[step.seq_id] = found

    def _current(self, seq_id: int) -> _Proposals:
        """The proposals behind the parent's entries as they are now."""
        found, length, rewinds = self._proposals.get(seq_id), self.length(seq_id), self._parent.rewinds(seq_id)
        if found is not None and (found.length, found.rewinds) == (length, rewinds):
            return found
        return _Proposals(length, rewinds)
