"""One sequence's tokens while a round runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Path:
    """Committed tokens, and those drafted behind them so far. Rungs extend and cut it as a round goes on."""

    seq_id: int
    ids: list[int]
    """Prompt and output, then drafted tokens. The last committed one is pending: no view has its K/V yet."""
    committed: int
    """How many of `ids` are prompt and output."""
    blocks: list[int]
    """Block table, for all positions that the round may reach."""
    prompt_length: int

    def drafted(self, end: int | None = None) -> tuple[int, ...]:
        """Drafted tokens at positions before `end` (default: all)."""
        return tuple(self.ids[self.committed : end])
