"""The last pass's queries, by which views choose entries; retrieval views do so at the end of a round that the device runs.

How many tokens were gained, and so which chunks are complete and whose queries count, is in device tensors: summaries, scores and
choice are one captured graph for all sequences, layers and views, which runs while the host looks at the round's tokens. What it lists
is what a view would when it is next used. Sequences that a view did not propose for in the round are left to that, as is what other
views choose: for these the queries are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rowcast.runtime.device_round.graphs import Graphs
from rowcast.runtime.device_round.state import RoundState
from rowcast.runtime.kv.listed import ListedKV
from rowcast.runtime.kv.paged import PagedKV
from rowcast.runtime.kv.selected import SelectedKV
from rowcast.runtime.kv.sizes import rounded_chunks
from rowcast.runtime.ladder.path import Path


class Refresh:
    """Over the last rung's store and the rungs' views of it."""

    def __init__(self, parent: PagedKV, stores: Sequence[object], graphs: Graphs, *, tokens: int) -> None:
        """`stores`: of the rungs below, in their order; those that list chunks are refreshed. `tokens`: of all sequences in a last
        pass, at most."""
        self._parent = parent
        self._stores = {rung: store for rung, store in enumerate(stores) if isinstance(store, ListedKV)}
        self._alone = bool(self._stores) and not any(isinstance(store, SelectedKV) for store in stores)
        """No other view looks at queries."""
        self._graphs = graphs
        shape = parent.spec.num_layers, tokens, parent.num_heads, parent.spec.head_dim
        self._queries = torch.zeros(shape, dtype=parent.dtype, device=parent.device)
        """Of the newest last pass, whose tokens come first."""
        self._due: dict[int, list[int]] = {}
        """By rung: sequences whose chunks are chosen anew at the round's end."""

    def queries(self, batch: int, tokens: int) -> Tensor:
        """Where a last pass over so many tokens of each sequence leaves its queries, [layers, B * T, H, d]."""
        return self._queries[:, : batch * tokens]

    def begin(self) -> None:
        """A round's state is about to be filled."""
        self._due.clear()

    def ask(self, fields: dict[str, Any], rung: int, row: int, seq_id: int) -> None:
        """While the state is filled: the rung proposes for this sequence. Precondition: its view is up to date."""
        store = self._stores.get(rung)
        if store is None:
            return
        slot = fields["refreshed"][rung, row] = store.slot_if_due(seq_id)
        if slot >= 0:
            self._due.setdefault(rung, []).append(seq_id)

    def run(self, state: RoundState, last_rung: int, tokens: int, most: int, most_entries: int) -> None:
        """Launch it, behind the round's last pass, which had so many tokens of each sequence. `most`: of which the state is made;
        `most_entries`: what the longest sequence has at most when the round is over."""
        if not self._due:
            return
        rungs = tuple(sorted(self._due))
        # Its kernels' bounds are these, rounded up as the views do.
        chunks = tuple(rounded_chunks(most_entries // self._stores[rung].chunk) for rung in rungs)
        queries = self.queries(state.batch, tokens)

        def choose() -> None:
            gained = state.round.report[:, 0].contiguous()
            new, tables = state.round.base, state[f"tables{last_rung}"]
            self._parent.summarise(tables, new - gained, new)
            for rung, most_chunks in zip(rungs, chunks, strict=True):
                self._stores[rung].choose(
                    queries.view(len(queries), state.batch, tokens, *queries.shape[2:]),
                    tables,
                    new,
                    state["refreshed"][rung],
                    most_chunks=most_chunks,
                    counts=gained,
                )

        self._graphs.run(("chunks", state.batch, most, tokens, rungs, chunks), choose)

    def end(self, tokens: int, batch: int, paths: Sequence[Path]) -> None:
        """The round is over: paths have the tokens that they gained. Tell the views, and keep what queries they have yet to look at."""
        kept, view = self.queries(batch, tokens), self._parent
        for row, path in enumerate(paths):
            length, gained = len(path.ids) - 1, len(path.ids) - path.committed
            chosen = [rung for rung, ids in self._due.items() if path.seq_id in ids]
            for rung in chosen:
                self._stores[rung].note_choice(path.seq_id, length)
            if self._due:
                view.note_summaries(path.seq_id, length)
            if not (self._alone and len(chosen) == len(self._stores)):
                first = max(0, gained - view.keep_queries)
                own = kept[:, row * tokens + first : row * tokens + gained]
                view.keep(path.seq_id, path.committed - 1 + first, own.clone())
