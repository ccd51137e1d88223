"""Rows of a stored tensor on their way into other memory or another order: some megabytes at a time, read ahead by threads."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from rowcast.runtime.protocols import Source

BLOCK_BYTES = 4 << 20
"""Most that a block takes, unless one row is longer."""


@dataclass(slots=True)
class _Buffer:
    values: Tensor
    copied: list[torch.cuda.Event] = field(default_factory=list)
    """After the last copy out of it, on each GPU."""


def row_blocks(
    source: Source,
    name: str,
    rows: slice,
    cols: slice | None,
    row_shape: tuple[int, ...],
    *,
    dtype: torch.dtype,
    device: torch.device,
    readers: int = 0,
    gpus: Collection[torch.device] = (),
) -> Iterator[tuple[slice, Tensor]]:
    """`rows` of a tensor in their order: some of them, and their values [n, *row_shape] of `dtype` on `device`.

    A block holds until the next is asked for. To `gpus` it may be copied asynchronously, on their current streams: with any, `device`
    is the CPU, and the memory is pinned. `readers`: threads that read ahead, each a block; they end with the last one. 0: blocks are
    read when they are asked for. Raises UserError as `Source.read` does.
    """
    height = max(1, BLOCK_BYTES // max(1, math.prod(row_shape) * dtype.itemsize))
    spans = [slice(top, min(top + height, rows.stop)) for top in range(rows.start, rows.stop, height)]

    def new_buffer() -> _Buffer:
        shape = min(height, rows.stop - rows.start), *row_shape
        return _Buffer(torch.empty(shape, dtype=dtype, device=device, pin_memory=bool(gpus)))

    inference = torch.is_inference_mode_enabled()  # each thread has a mode of its own, and tensors that are made in it

    def read(span: slice, buffer: _Buffer) -> Tensor:
        with torch.inference_mode(inference):
            return source.read(name, span, cols, out=buffer.values[: span.stop - span.start])

    if not readers or len(spans) <= 1:
        buffer = new_buffer()
        for span in spans:
            yield span, read(span, buffer)
        return
    ahead = iter(spans)
    free = deque(new_buffer() for _ in range(min(len(spans), readers + 2)))
    reading: deque[tuple[slice, _Buffer, Future[Tensor]]] = deque()
    with ThreadPoolExecutor(readers, thread_name_prefix="rowcast-load") as pool:

        def start(count: int) -> None:
            for span in islice(ahead, count):
                buffer = free.popleft()
                for copied in buffer.copied:  # not in its thread, which would open a context on the first GPU
                    copied.synchronize()
                reading.append((span, buffer, pool.submit(read, span, buffer)))

        start(readers + 1)
        while reading:
            span, buffer, values = reading.popleft()
            yield span, values.result()
            buffer.copied = [torch.cuda.current_stream(gpu).record_event() for gpu in gpus]
            free.append(buffer)
            start(1)
