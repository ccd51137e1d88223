"""Files that are read at chosen places, and what tells their tensors apart. Torch-free.

Nothing is mapped: pages of a mapped file count as resident memory, which would break the promise that loading a shard needs
the shard's memory and some megabytes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from rowcast.errors import UserError

SAMPLE_BYTES = 64


class RangedFile:
    """A file open for positioned reads; safe to read from several threads. Closed when forgotten."""

    def __init__(self, path: Path) -> None:
        """Raises OSError when the file cannot be opened."""
        self.path = path
        self._file = path.open("rb", buffering=0)
        self.size = os.fstat(self.fileno()).st_size

    def fileno(self) -> int:
        return self._file.fileno()

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the bytes from `offset`. Raises UserError when the file ends before."""
        while buffer:
            got = os.preadv(self.fileno(), [buffer], offset)
            if got == 0:
                raise UserError(f"{self.path} is truncated: it ends before byte {offset + len(buffer)}; fetch the file again.")
            buffer, offset = buffer[got:], offset + got

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`. Raises UserError when the file ends before."""
        data = bytearray(length)
        self.read_into(memoryview(data), offset)
        return bytes(data)


def fingerprint(tensors: Iterable[tuple[str, tuple[int, ...], str, RangedFile, int, int]]) -> str:
    """16 hex digits over (name, shape, type, file, offset, bytes) and four samples of each tensor's bytes, whatever the order."""
    digest = hashlib.sha256()
    for name, shape, kind, file, offset, length in sorted(tensors, key=lambda tensor: tensor[0]):
        digest.update(f"{name} {shape} {kind}\n".encode())
        sample = min(SAMPLE_BYTES, length)
        for i in range(4):
            digest.update(file.read(offset + (length - sample) * i // 3, sample))
    return digest.hexdigest()[:16]
