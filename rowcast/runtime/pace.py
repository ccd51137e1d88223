"""What an engine's rounds and requests took, for comparison with a plan's forecast. Torch-free."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from rowcast.placement.process_memory import OwnBytes
from rowcast.placement.report import Measured, Round
from rowcast.runtime.request import Request
from rowcast.runtime.step import PREFILL, RungCounts, SeqResult, SeqStep

_KEPT_ROUNDS, _KEPT_REQUESTS = 4096, 256
"""The latest."""


class Pace:
    """Grows with every step; forgets the oldest."""

    def __init__(self, last: str) -> None:
        """`last`: the ladder's last rung."""
        self._alone = {PREFILL, last}
        self._rounds: deque[Round] = deque(maxlen=_KEPT_ROUNDS)
        self._first_tokens: deque[tuple[int, float]] = deque(maxlen=_KEPT_REQUESTS)
        self._rungs: dict[str, RungCounts] = {}

    def step(self, seconds: float, steps: Sequence[SeqStep], results: Sequence[SeqResult], emitted: int) -> None:
        """Note a step that gave `emitted` tokens; those with a part of a prefill in them are no rounds."""
        if not steps or not emitted or not all(step.decodes for step in steps):
            return
        drafted = any(
            counts.tokens or counts.proposed
            for result in results
            for name, counts in result.rungs.items()
            if name not in self._alone
        )
        context = sum(step.start + 1 for step in steps) / len(steps)
        self._rounds.append(Round(seconds, len(steps), emitted, context, drafted))

    def finished(self, request: Request) -> None:
        """Note a request that ran to its end."""
        stats = request.stats
        if stats.ttft_s is not None and not stats.cached_tokens:  # else it tells nothing of prompts of its length
            self._first_tokens.append((len(request.prompt_ids), stats.ttft_s))
        for name, counts in stats.rungs.items():
            self._rungs.setdefault(name, RungCounts()).add(counts)

    def measured(self, allocated_bytes: int | None, reserved_bytes: int | None, driver: OwnBytes | None = None) -> Measured:
        """All of it, with a GPU's most memory."""
        acceptance = {name: counts.acceptance for name, counts in self._rungs.items() if counts.acceptance is not None}
        return Measured(
            rounds=tuple(self._rounds),
            first_tokens=tuple(self._first_tokens),
            acceptance=acceptance,
            allocated_bytes=allocated_bytes,
            reserved_bytes=reserved_bytes,
            driver=driver,
        )
