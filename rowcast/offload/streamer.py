"""Pieces of host memory, copied ahead into a static ring of device buffers.

Who uses the pieces says in which order (`Order`); the ring keeps those that are used next, so that copies run under the computing
before. An order is a cycle where a pass is like the one before: at its end the next one's first pieces are on their way, and where
all pieces have room nothing is copied twice. Another order may begin at any time, and a piece may be taken out of turn: that costs a
copy that nothing hides. On a GPU copies run on a stream of their own, ordered by events, and the host waits for nothing but pieces on
disk; on a CPU they are made where they are asked for.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

_ALIGNED = 256
"""Bytes that buffers begin at a multiple of."""

_NEVER = 1 << 62


class Piece(Protocol):
    """What is copied at once."""

    @property
    def key(self) -> Hashable:
        """Pieces of the same key have the same content."""
        ...

    @property
    def nbytes(self) -> int:
        """Of a buffer that holds it."""
        ...

    def load(self, out: Tensor) -> int:
        """Copy it to `out` [nbytes] uint8, on the device's current stream. Returns the bytes that move."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class HostPiece:
    """Neighbouring bytes of pinned memory."""

    key: Hashable
    data: Tensor
    """[nbytes] uint8."""

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def load(self, out: Tensor) -> int:
        out.copy_(self.data, non_blocking=True)
        return self.data.nbytes


class Order:
    """The pieces of a pass, in the order of their use. One may come again: between two uses it stays, where there is room."""

    def __init__(self, pieces: Iterable[Piece], *, cyclic: bool = True) -> None:
        """`cyclic`: a pass like this one follows, most likely."""
        self.pieces: Sequence[Piece] = tuple(pieces)
        self.cyclic = cyclic
        self._at: dict[Hashable, list[int]] = {}
        for place, piece in enumerate(self.pieces):
            self._at.setdefault(piece.key, []).append(place)

    def next(self, key: Hashable, place: int) -> int | None:
        """The first use of a piece at this place or later, counted on beyond the end where another such pass follows; None: there is
        none."""
        places = self._at.get(key)
        if places is None:
            return None
        at = bisect_left(places, place)
        if at < len(places):
            return places[at]
        return places[0] + len(self.pieces) if self.cyclic else None


@dataclass(slots=True)
class StreamCounts:
    """What a ring has done."""

    bytes: int = 0
    pieces: int = 0
    """Copied."""
    taken: int = 0
    stalled_s: float = 0.0
    """Seconds that computing waited for copies; on a CPU, all of theirs."""


@dataclass(slots=True)
class _Slot:
    buffer: Tensor
    key: Hashable | None = None
    taken: bool = False
    ready: Any = None
    """Event after its copy."""
    free: Any = None
    """Event after its last use; None: it had none."""


class Streamer:
    """The ring. All its memory is taken when it is made."""

    def __init__(self, device: torch.device, *, slots: int, slot_bytes: int) -> None:
        """`slots`: pieces that are held at once, those in use included."""
        assert slots >= 1
        self.device = device
        self.slot_bytes = -(-slot_bytes // _ALIGNED) * _ALIGNED
        self._ring = torch.empty(slots, self.slot_bytes, dtype=torch.uint8, device=device)
        self._slots = [_Slot(row) for row in self._ring]
        self._held: dict[Hashable, _Slot] = {}
        self._order = Order(())
        self._next = 0
        """Place in the order of the piece that is used next."""
        self._counts = StreamCounts()
        self._stream: Any = None
        self._waits: deque[tuple[Any, Any]] = deque()
        """Events before and after a wait for a copy."""
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            for slot in self._slots:
                slot.ready = torch.cuda.Event()  # type: ignore[no-untyped-call]

    @property
    def bytes(self) -> int:
        """Of its buffers."""
        return self._ring.nbytes

    def begin(self, order: Order, *, fresh: bool = False) -> None:
        """A pass in this order starts. `fresh`: what host memory holds has changed, so that nothing that was copied counts."""
        for slot in self._slots:
            if slot.taken:  # The last pass was broken off.
                self._free(slot)
        if fresh:
            self._held.clear()
            for slot in self._slots:
                slot.key = None
        self._order, self._next = order, 0
        self._ahead()

    def take(self, piece: Piece) -> Tensor:
        """Its bytes on the device, [nbytes] uint8, valid on the current stream until `release`.

        No more pieces may be taken at once than there are slots.
        """
        self._counts.taken += 1
        slot = self._held.get(piece.key)
        if slot is None:
            slot = self._victim(-1)
            assert slot is not None, "all buffers are taken"
            self._copy(slot, piece)
        assert not slot.taken, f"piece {piece.key} is taken twice"
        slot.taken = True
        place = self._order.next(piece.key, self._next)
        if place is not None:
            self._next = place % len(self._order.pieces) + 1
        self._ahead()
        if self._stream is not None:
            self._wait(slot)
        return slot.buffer[: piece.nbytes]

    def release(self, piece: Piece) -> None:
        """What was launched on the current stream so far is all that uses it."""
        slot = self._held[piece.key]
        assert slot.taken
        self._free(slot)
        self._ahead()

    def holds(self, piece: Piece) -> bool:
        """Whether it is copied, or being copied."""
        return piece.key in self._held

    def counts(self) -> StreamCounts:
        """Since the last call of this. Waits that the device has not come to yet are told the next time."""
        self._count_waits()
        counts, self._counts = self._counts, StreamCounts()
        return counts

    def close(self) -> None:
        """Wait for copies that are under way, which read host memory."""
        if self._stream is not None:
            self._stream.synchronize()

    def check(self) -> None:
        """No piece is taken, and every slot is known by its key. For tests and idle moments."""
        assert not any(slot.taken for slot in self._slots)
        assert {slot.key for slot in self._slots if slot.key is not None} == set(self._held)
        assert all(slot.key == key for key, slot in self._held.items())

    def _ahead(self) -> None:
        """Start the copies that there is room for."""
        pieces, seen = self._order.pieces, set[Hashable]()
        for distance in range(len(pieces)):
            place = self._next + distance
            if len(seen) == len(self._slots) or (place >= len(pieces) and not self._order.cyclic):
                return
            piece = pieces[place % len(pieces)]
            seen.add(piece.key)
            if piece.key in self._held:
                continue
            slot = self._victim(distance)
            if slot is None:
                return
            self._copy(slot, piece)

    def _victim(self, distance: int) -> _Slot | None:
        """A free buffer whose piece is used later than the one `distance` pieces from here, the latest of all; None: there is none."""
        best, furthest = None, distance
        for slot in self._slots:
            if slot.taken:
                continue
            away = self._distance(slot.key)
            if away > furthest:
                best, furthest = slot, away
        return best

    def _distance(self, key: Hashable | None) -> int:
        """Pieces until this one is used."""
        place = None if key is None else self._order.next(key, self._next)
        return _NEVER + (key is None) if place is None else place - self._next

    def _free(self, slot: _Slot) -> None:
        """What was launched on the current stream so far is all that uses it."""
        slot.taken = False
        if self._stream is not None:
            if slot.free is None:
                slot.free = torch.cuda.Event()  # type: ignore[no-untyped-call]
            slot.free.record(torch.cuda.current_stream(self.device))

    def _copy(self, slot: _Slot, piece: Piece) -> None:
        assert piece.nbytes <= self.slot_bytes, f"{piece.nbytes} bytes do not go into a buffer of {self.slot_bytes}"
        self._held.pop(slot.key, None)
        slot.key = None
        out = slot.buffer[: piece.nbytes]
        if self._stream is None:
            started = time.perf_counter()
            self._counts.bytes += piece.load(out)
            self._counts.stalled_s += time.perf_counter() - started
        else:
            if slot.free is not None:
                self._stream.wait_event(slot.free)
            with torch.cuda.stream(self._stream):
                self._counts.bytes += piece.load(out)
            slot.ready.record(self._stream)
        # Not before: what was broken off, or could not be read, is not held.
        slot.key = piece.key
        self._held[piece.key] = slot
        self._counts.pieces += 1

    def _wait(self, slot: _Slot) -> None:
        """The current stream waits for the copy."""
        self._count_waits()
        current = torch.cuda.current_stream(self.device)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        before.record(current)
        current.wait_event(slot.ready)
        after.record(current)
        self._waits.append((before, after))

    def _count_waits(self) -> None:
        while self._waits and self._waits[0][1].query():
            before, after = self._waits.popleft()
            self._counts.stalled_s += float(before.elapsed_time(after)) * 1e-3
