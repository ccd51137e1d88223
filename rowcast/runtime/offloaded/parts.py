"""Tables of a layer whose rows lie in several places: next to the compute, or in host memory, from where pieces are copied ahead."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rowcast.offload.host_store import HostBank, HostStore
from rowcast.offload.streamer import HostPiece, Streamer
from rowcast.runtime.loader import Loader
from rowcast.runtime.offloaded.tiers import RESIDENT, STREAMED, Spans


@dataclass(frozen=True, slots=True)
class Ring:
    """The buffers that a view's pieces go through, and the host memory that they come from."""

    streamer: Streamer
    store: HostStore
    dtype: torch.dtype

    def pieces(self, key: str, bank: HostBank, first: int) -> list[Piece]:
        """A bank cut into as few pieces, alike, as buffers hold. `first`: the place of its first row in the whole table."""
        each, total = max(1, self.streamer.slot_bytes // max(1, bank.row_bytes)), len(bank.tensor)
        count = -(-total // each)
        found = []
        for number in range(count):
            rows = slice(total * number // count, total * (number + 1) // count)
            held = HostPiece((key, first + rows.start), bank.piece(rows))
            found.append(Piece(held, slice(first + rows.start, first + rows.stop), tuple(bank.tensor.shape[1:])))
        return found

    @contextlib.contextmanager
    def taken(self, piece: Piece) -> Iterator[Tensor]:
        """Its rows on the device, [n, ...], within the block."""
        found = self.streamer.take(piece.held)
        yield found.view(self.dtype).view(-1, *piece.shape)
        self.streamer.release(piece.held)


@dataclass(frozen=True, slots=True)
class Piece:
    """Neighbouring rows in host memory."""

    held: HostPiece
    rows: slice
    """Of the whole table."""
    shape: tuple[int, ...]
    """Of a row."""


class Table:
    """A table [R, D] of which some spans of rows are resident and the others are pieces."""

    def __init__(self, key: str, spans: Spans, rows: int, width: int, ring: Ring, device: torch.device) -> None:
        """Empty; `held` says what is to be filled with which rows."""
        self.held: list[tuple[slice, Tensor | HostBank]] = []
        self.parts: list[tuple[slice, Tensor | Piece]] = []
        """In the order of rows."""
        for span in spans.rows(RESIDENT, rows):
            table = torch.empty((span.stop - span.start, width), dtype=ring.dtype, device=device)
            self.held.append((span, table))
            self.parts.append((span, table))
        for span in spans.rows(STREAMED, rows):
            bank = ring.store.bank((span.stop - span.start, width), ring.dtype)
            self.held.append((span, bank))
            self.parts += [(piece.rows, piece) for piece in ring.pieces(key, bank, span.start)]
        self.parts.sort(key=lambda part: part[0].start)
        assert sum(span.stop - span.start for span, _ in self.parts) == rows, f"{key}: rows lie nowhere"

    @property
    def outs(self) -> list[tuple[slice, Tensor]]:
        """What is to be filled with which rows."""
        return [(span, held.tensor if isinstance(held, HostBank) else held) for span, held in self.held]

    @property
    def pieces(self) -> list[HostPiece]:
        return [part.held for _, part in self.parts if isinstance(part, Piece)]

    @property
    def nbytes(self) -> int:
        return sum(part.held.nbytes if isinstance(part, Piece) else part.nbytes for _, part in self.parts)

    def visit(self, ring: Ring) -> Iterator[tuple[slice, Tensor]]:
        """Its parts in order, each on the device until the next is asked for."""
        for span, part in self.parts:
            if isinstance(part, Tensor):
                yield span, part
            else:
                with ring.taken(part) as rows:
                    yield span, rows


def order_of(span: slice, start: int) -> Tensor:
    """For `Loader.deal`: the rows of a span that counts from `start` of the checkpoint's."""
    return torch.arange(start + span.start, start + span.stop)


def fill_rows(
    load: Loader,
    stem: str,
    outs: Sequence[tuple[slice, Tensor]],
    whole: tuple[int, int],
    first: int,
    *,
    prefixed: bool = True,
) -> None:
    """Spans of the rows of a matrix that begin at its row `first`."""
    for span, out in outs:
        load.into(stem, out, slice(first + span.start, first + span.stop), whole, prefixed=prefixed)
