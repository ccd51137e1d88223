"""What a round on the device reads and changes, in one buffer that the host fills in one copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rowcast.kernels.rounds import HISTORY, Pass, Round, report_of, stats_of

_ALIGNMENT = 16
_NUMPY: dict[torch.dtype, Any] = {
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.float64: np.float64,
    torch.float32: np.float32,
}


class RoundState:
    """Up to B sequences on R rungs, the last one included; what is left of them is padding."""

    def __init__(self, batch: int, most: int, table_widths: Sequence[int], passes: int, device: torch.device) -> None:
        """`most`: tokens that a round can add. `table_widths`: blocks of a sequence, by rung; 0 for rungs without a KV view.
        `passes`: most passes of a round."""
        rungs, columns = len(table_widths), HISTORY + 1 + most
        self.batch = batch
        shapes = {
            "path": (torch.int64, (batch, columns)),
            "base": (torch.int32, (batch,)),
            "active": (torch.int32, (batch,)),
            "room": (torch.int32, (batch,)),
            "gammas": (torch.int32, (rungs, batch)),
            "have": (torch.int32, (rungs, batch)),
            "asked": (torch.int32, (rungs, batch)),
            "drafted": (torch.int32, (batch,)),
            "stopped": (torch.int32, (batch,)),
            "offsets": (torch.int32, (rungs, batch)),
            "recents": (torch.int32, (rungs, batch)),
            "refreshed": (torch.int32, (rungs, batch)),
            "prompt_lengths": (torch.int64, (batch,)),
            "seeds": (torch.int64, (batch,)),
            "sample_index": (torch.int64, (batch,)),
            "temperature": (torch.float32, (batch,)),
            "log_min_p": (torch.float32, (batch,)),
            "top_k": (torch.int64, (batch,)),
            "top_p": (torch.float64, (batch,)),
            **{f"tables{rung}": (torch.int32, (batch, max(1, width))) for rung, width in enumerate(table_widths)},
        }
        places, size = {}, 0
        for name, (dtype, shape) in shapes.items():
            places[name] = size
            size += -(-prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        pinned = device.type == "cuda"
        self._on_device = torch.zeros(size, dtype=torch.uint8, device=device)
        self._on_host = torch.zeros(size, dtype=torch.uint8, pin_memory=pinned)
        self._fields: dict[str, Tensor] = {}
        self._host: dict[str, Any] = {}
        for name, (dtype, shape) in shapes.items():
            span = slice(places[name], places[name] + prod(shape) * dtype.itemsize)
            self._fields[name] = self._on_device[span].view(dtype).view(shape)
            self._host[name] = self._on_host[span].numpy().view(_NUMPY[dtype]).reshape(shape)
        result = torch.zeros(batch * (2 + columns) + (passes + 1) * batch * 3, dtype=torch.int32, device=device)
        names = "path", "base", "active", "room", "gammas", "have", "drafted", "asked", "stopped"
        self.round = Round(**{name: self._fields[name] for name in names}, result=result)
        self.newest = passes
        """The pass whose statistics a captured graph writes; `keep_stats` puts them where the round's pass has its own."""
        self._stats = list(self.round.stats)
        self._result = torch.zeros_like(result, device="cpu", pin_memory=pinned)
        self._have = torch.zeros_like(self.round.have, device="cpu", pin_memory=pinned)
        self._sent = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]
        # Neighbours in the buffer, so that they come in one copy.
        self._drafting = self._on_device[places["drafted"] : places["stopped"] + batch * torch.int32.itemsize]
        self._drafting_sent = torch.zeros_like(self._drafting, device="cpu", pin_memory=pinned)
        self._drafting_event = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]
        self._columns = columns
        self._passes: dict[tuple[int, int], Pass] = {}
        self._tables: dict[tuple[int, int], list[int]] = {}
        """By rung and row: the blocks that the host's copy of the table holds."""

    def __getitem__(self, name: str) -> Tensor:
        """A field on the device."""
        return self._fields[name]

    @property
    def bytes(self) -> int:
        """On the device."""
        return self._on_device.nbytes + self.round.result.nbytes

    def inputs(self, rung: int, tokens: int, block_size: int) -> Pass:
        """The buffers of a rung's pass over so many tokens of each sequence."""
        found = self._passes.get((rung, tokens))
        if found is None:
            tables, offsets = self._fields[f"tables{rung}"], self._fields["offsets"][rung]
            found = self._passes[rung, tokens] = Pass.empty(self.round, rung, tokens, tables, block_size, -1, offsets)
        return found

    @contextmanager
    def filling(self) -> Iterator[dict[str, Any]]:
        """The fields on the host, to be written; then they go to the device. Precondition: the last `read` is over."""
        yield self._host
        self._on_device.copy_(self._on_host, non_blocking=True)

    def place(self, rung: int, row: int, blocks: list[int]) -> None:
        """A sequence's blocks, while filling. Those that stand there already are not written again."""
        known = self._tables.setdefault((rung, row), [])
        if blocks == known:
            return
        same = len(known) if blocks[: len(known)] == known else 0
        if same < len(blocks):
            self._host[f"tables{rung}"][row, same : len(blocks)] = blocks[same:]
            self._tables[rung, row] = list(blocks)

    def keep_stats(self, number: int) -> None:
        """The newest pass was the round's pass `number`."""
        self._stats[number].copy_(self._stats[self.newest], non_blocking=True)

    def send_drafted(self) -> None:
        """Copy how much is drafted so far to the host, for `drafted`. Precondition: a state of one sequence."""
        assert self.batch == 1
        self._drafting_sent.copy_(self._drafting, non_blocking=True)
        if self._drafting_event is not None:
            self._drafting_event.record()

    def drafted(self) -> tuple[int, int]:
        """`Round.drafted` and `Round.stopped` on the host, as they were at the last `send_drafted`. Waits for that."""
        if self._drafting_event is not None:
            self._drafting_event.synchronize()
        found = self._drafting_sent.numpy().view(np.int32)
        return int(found[0]), int(found[-1])

    def send(self) -> None:
        """Copy what the round leaves to the host, for `read`. Work that is launched from here on may change it on the device."""
        self._result.copy_(self.round.result, non_blocking=True)
        self._have.copy_(self.round.have, non_blocking=True)
        if self._sent is not None:
            self._sent.record()

    def read(self) -> tuple[Any, Any, Any]:
        """`Round.report`, `Round.stats` and `Round.have` on the host, as the round of the last `send` left them. Waits for that round,
        not for what was launched since."""
        if self._sent is not None:
            self._sent.synchronize()
        report, stats = (of(self._result, self.batch, self._columns) for of in (report_of, stats_of))
        return report.numpy(), stats.numpy(), self._have.numpy()
