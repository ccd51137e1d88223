"""Pieces that host memory has no room for, read from files ahead of their use, through pinned buffers.

Threads fill the buffers in the order of a pass, whose end is followed by its beginning; the ring (`streamer`) copies them on. Files are
read at chosen places and not mapped: one that shrinks under a reader is an error, and not the end of the process.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Hashable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rowcast.offload.host_store import HostStore

BUFFERS = 3
"""That are filled at the same time, by a thread each."""

_BLOCK_BYTES = 16 << 20
"""Read at once while a rate is measured."""


class Readable(Protocol):
    """A file."""

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the bytes from `offset`; safe from several threads. Raises UserError where that cannot be."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class DiskPiece:
    """Neighbouring bytes of a file. Implements `streamer.Piece`."""

    key: Hashable
    file: Readable
    offset: int
    nbytes: int
    reader: DiskReader = field(repr=False)

    def load(self, out: Tensor) -> int:
        """Raises UserError where the file cannot be read any more. Waits for the disk."""
        self.reader.load(self, out)
        return self.nbytes


@dataclass(slots=True)
class _Buffer:
    pages: Tensor
    copied: Any = None
    """Event after the copy out of it; None: there is none under way."""


class DiskReader:
    """Reads ahead. One thread calls it; its own threads read. Buffers are taken when it is made."""

    def __init__(self, store: HostStore, buffer_bytes: int, buffers: int = BUFFERS) -> None:
        """`buffer_bytes`: of the largest piece. Raises OutOfMemoryError where host memory is short."""
        self._cuda = store.device.type == "cuda"
        self._free = [_Buffer(store.bank((buffer_bytes,), torch.uint8).tensor) for _ in range(buffers)]
        self._leaving: list[_Buffer] = []
        """Being copied to the device, the oldest first."""
        self._reading: dict[Hashable, tuple[Future[None], _Buffer]] = {}
        """Read, or being read, the oldest first."""
        self._order: Sequence[DiskPiece] = ()
        self._at: dict[Hashable, int] = {}
        self._threads = ThreadPoolExecutor(buffers, thread_name_prefix="rowcast-disk")
        self.read_bytes = 0
        self.waited_s = 0.0
        """Seconds that `load` waited for the disk."""

    def begin(self, pieces: Iterable[DiskPiece]) -> None:
        """These are a pass's, in their order, which is taken to be repeated; the first ones are on their way."""
        self._order = tuple(pieces)
        self._at = {piece.key: place for place, piece in enumerate(self._order)}
        self._ahead(0)

    def load(self, piece: DiskPiece, out: Tensor) -> None:
        """Its bytes to `out` [nbytes] uint8, on the device's current stream."""
        if piece.key not in self._reading:
            self._start(piece, self._buffer())
        reading, buffer = self._reading[piece.key]
        started = time.perf_counter()
        try:
            reading.result()
        except Exception:
            del self._reading[piece.key]
            self._free.append(buffer)
            raise
        finally:
            self.waited_s += time.perf_counter() - started
        del self._reading[piece.key]
        self._leaving.append(buffer)
        out.copy_(buffer.pages[: piece.nbytes], non_blocking=True)
        if self._cuda:
            buffer.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            buffer.copied.record()
        self.read_bytes += piece.nbytes
        self._ahead(self._at.get(piece.key, -1) + 1)

    def close(self) -> None:
        """Wait for reads that are under way, and start no more. May be called again."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._reading.clear()
        self._order = ()

    def _ahead(self, place: int) -> None:
        """Start to read what comes from this place on, as far as there are buffers."""
        for distance in range(min(len(self._order), len(self._free) + len(self._leaving) + len(self._reading))):
            piece = self._order[(place + distance) % len(self._order)]
            if piece.key in self._reading:
                continue
            buffer = self._spare()
            if buffer is None:
                return
            self._start(piece, buffer)

    def _start(self, piece: DiskPiece, buffer: _Buffer) -> None:
        view = buffer.pages[: piece.nbytes].numpy().data
        self._reading[piece.key] = self._threads.submit(piece.file.read_into, view, piece.offset), buffer

    def _spare(self) -> _Buffer | None:
        """A buffer that nothing uses; None: there is none now."""
        if not self._free and self._leaving and (self._leaving[0].copied is None or self._leaving[0].copied.query()):
            self._free.append(self._leaving.pop(0))
        return self._free.pop() if self._free else None

    def _buffer(self) -> _Buffer:
        """One for a piece that comes out of turn: waits for a copy, or drops what was read ahead and is used last."""
        buffer = self._spare()
        if buffer is None and self._leaving:
            buffer = self._leaving.pop(0)
            buffer.copied.synchronize()
        if buffer is None:
            key = next(reversed(self._reading))
            reading, buffer = self._reading.pop(key)
            if not reading.cancel():
                with suppress(Exception):
                    reading.result()
        return buffer


def sequential_rate(path: Path, offset: int = 0, size: int = 1 << 40, seconds: float = 0.5) -> float:
    """Bytes/s at which the file's part is read by `BUFFERS` threads, without the system's cache where that can be left out.

    Raises OSError where it cannot be read at all.
    """
    direct = getattr(os, "O_DIRECT", 0)
    try:
        return _rate(path, direct, offset, size, seconds)
    except OSError:
        if not direct:
            raise
        return _rate(path, 0, offset, size, seconds)


def _rate(path: Path, flags: int, offset: int, size: int, seconds: float) -> float:
    file = os.open(path, os.O_RDONLY | flags)
    try:
        first = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        last = min(offset + size, os.fstat(file).st_size)
        blocks = range(first, max(first + 1, last), _BLOCK_BYTES)
        if not flags and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        end, started = time.perf_counter() + seconds, time.perf_counter()

        def read(thread: int) -> int:
            done = 0
            with mmap.mmap(-1, _BLOCK_BYTES) as pages:  # on a page's boundary, as reads past the cache need it
                for block in blocks[thread::BUFFERS]:
                    done += os.preadv(file, [pages], block)
                    if time.perf_counter() > end:
                        break
            return done

        with ThreadPoolExecutor(BUFFERS) as threads:
            read_bytes = sum(threads.map(read, range(BUFFERS)))
        return max(1, read_bytes) / (time.perf_counter() - started)
    finally:
        os.close(file)
