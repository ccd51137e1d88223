"""A coupled round of the ladder on the device: which tokens each pass runs, what its draws decide, what is committed.

The arithmetic of `runtime/ladder/climb.py` under the coupled rule, for up to B sequences, as tensors: the host plays a fixed list of
passes, reads one copy at the end, and asks nothing in between, but for a lone sequence, whose host may wait while rungs below run and
leave passes out. A sequence that a pass has nothing to do for sits it out. On a GPU each
function is one small launch (`kernels/gpu/rounds.py`); the plain Python here defines what it does.

A round: for each pass `prepare`, run the rung over its tokens, draw where `Pass.wanted` says, `verdict`; the last rung's pass ends in
`commit` in place of `verdict`. `verdict` can do the next pass's `prepare` in its launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

HISTORY: Final = 4
"""Committed tokens kept in front of the pending one, for rungs that have yet to run them."""
FAILED: Final = 1
"""Flag: the last rung's logits were not numbers. The sequence cannot go on; what was emitted before that is sound."""
LAGGING: Final = 2
"""Flag: a rung lacks K/V of more tokens than the path remembers. It sits out until its KV is filled and `have` set."""


@dataclass(frozen=True, slots=True)
class Round:
    """Up to B sequences in a round of R rungs, the last of which decides. int32 but for the path.

    A token's *index* counts from the pending token, which is 0 and lies at position `base`; drafted ones are 1..drafted.
    """

    path: Tensor
    """int64 [B, P]: column HISTORY + i holds the token of index i. P > HISTORY + the most tokens that a round can add."""
    base: Tensor
    """[B]: position of the pending token."""
    active: Tensor
    """[B]: 0 for a padding row, which nothing is done for."""
    room: Tensor
    """[B]: most drafted tokens that the last rung may be asked to judge."""
    gammas: Tensor
    """[R, B]: how many tokens the next rung in use asks of each at a time; 0: not used. The last one's mean nothing."""
    have: Tensor
    """[R, B]: how many of the path's tokens from index 0 on each rung's KV holds; negative: it lacks so many before index 0."""
    drafted: Tensor
    """[B]: drafted tokens so far; 0 between rounds."""
    asked: Tensor
    """[R, B]: index at which the proposals that each rung is next to judge begin; 1 between rounds."""
    stopped: Tensor
    """[B]: rungs below this one propose nothing more until a rung above them has judged; 0 between rounds."""
    result: Tensor
    """What the host reads, in one copy: `report`, then `stats`."""

    @staticmethod
    def empty(sequences: int, rungs: int, most: int, passes: int, device: torch.device | str = "cpu") -> Round:
        """All rows padding. `most`: tokens that a round can add, the last rung's included; `passes`: of a round, all rungs'."""
        assert rungs > 0 and most > 0 and passes > 0

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        columns = HISTORY + 1 + most
        path = torch.zeros(sequences, columns, dtype=torch.int64, device=device)
        b, r = zeros(sequences), zeros(rungs, sequences)
        result = zeros(sequences * (2 + columns) + passes * sequences * 3)
        return Round(path, b, b.clone(), b.clone(), r, r.clone(), b.clone(), torch.ones_like(r), b.clone(), result)

    @property
    def rungs(self) -> int:
        return self.have.shape[0]

    @property
    def report(self) -> Tensor:
        """[B, 2 + P], by `commit`: how many tokens were emitted, flags, the tokens; -1 behind them."""
        return report_of(self.result, *self.path.shape)

    @property
    def stats(self) -> Tensor:
        """[passes, B, 3], by `verdict` and `commit`: proposals accepted, how many there were, and tokens run."""
        return stats_of(self.result, *self.path.shape)


def report_of(result: Tensor, sequences: int, columns: int) -> Tensor:
    """`Round.report` of a copy of `Round.result`."""
    return result[: sequences * (2 + columns)].view(sequences, 2 + columns)


def stats_of(result: Tensor, sequences: int, columns: int) -> Tensor:
    """`Round.stats` of a copy of `Round.result`."""
    return result[sequences * (2 + columns) :].view(-1, sequences, 3)


@dataclass(frozen=True, slots=True)
class Pass:
    """The inputs of a rung's pass over up to T tokens of each sequence; row t of sequence b is row b * T + t. `prepare` writes all."""

    rung: int
    tables: Tensor
    """int32 [B, n]: blocks of the rung's KV."""
    offsets: Tensor
    """int32 [B]: what is added to a position to find a token's place in the rung's KV."""
    block_size: int
    trash_slot: int
    """Where rows that are not run write their K/V."""
    ids: Tensor
    """int64 [B * T], as are positions and slots; 0 in rows that are not run."""
    positions: Tensor
    slots: Tensor
    """block * block_size + offset in it, by the places."""
    starts: Tensor
    """int32 [B]: place of row 0."""
    counts: Tensor
    """int32 [B]: tokens that are run; 0 where the rung sits out."""
    wanted: Tensor
    """int32 [B * T]: 1 for rows whose draw decides something. The token drawn lies one position behind the row's."""

    @staticmethod
    def empty(
        state: Round,
        rung: int,
        tokens: int,
        tables: Tensor,
        block_size: int,
        trash_slot: int,
        offsets: Tensor | None = None,
    ) -> Pass:
        """Buffers for `tokens` a sequence. `tables` and `offsets` (None: places are positions) are kept, not copied."""
        rows = len(state.base) * tokens
        assert 0 <= rung < state.rungs and tables.dtype == torch.int32 and len(tables) == len(state.base)
        ids = torch.zeros(rows, dtype=torch.int64, device=tables.device)
        wanted = torch.zeros(rows, dtype=torch.int32, device=tables.device)
        return Pass(
            rung,
            tables,
            torch.zeros_like(state.base) if offsets is None else offsets,
            block_size,
            trash_slot,
            ids,
            ids.clone(),
            torch.full_like(ids, trash_slot),
            torch.zeros_like(state.base),
            torch.zeros_like(state.base),
            wanted,
        )

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.ids) // len(self.counts)


def prepare(state: Round, step: Pass) -> None:
    """Fill in the pass's inputs.

    The rung runs what its KV lacks of the path, at most T tokens: where it lacks more, these only fill the KV and nothing is wanted.
    It sits out where it has proposed what was asked of it, was stopped, or lags too far behind. The last rung never does.
    """
    if state.path.is_cuda:
        from rowcast.kernels.gpu import rounds as kernels

        return kernels.prepare(state, step)
    for b in range(len(state.base)):
        count = _count(state, step, b)
        have, base = int(state.have[step.rung, b]), int(state.base[b])
        complete = have + count == int(state.drafted[b]) + 1
        offset = int(step.offsets[b])
        step.starts[b] = base + have + offset if state.active[b] else 0
        step.counts[b] = count
        for t in range(step.tokens):
            row, position = b * step.tokens + t, base + have + t
            run = t < count
            step.ids[row] = state.path[b, HISTORY + have + t] if run else 0
            step.positions[row] = position if run else 0
            step.slots[row] = step.trash_slot
            if run:
                place = position + offset
                block = int(step.tables[b, place // step.block_size])
                step.slots[row] = block * step.block_size + place % step.block_size
            step.wanted[row] = run and complete and have + t >= int(state.asked[step.rung, b]) - 1
    return None


def verdict(state: Round, step: Pass, drawn: Tensor, number: int, then: Pass | None = None) -> None:
    """What a rung below the last makes of the proposals, by its own draws after each of the pass's tokens, `drawn` [B * T] int64.

    Proposals stand as far as they equal the draws; the first draw that differs, or the one after the last, is appended. K/V of what
    does not stand is dropped, here and in the rungs below. A draw of -1 is not appended, and stops the rung and those below it until
    a rung above has judged. Writes `stats[number]`, 0 where the rung sat out. Precondition: `prepare(state, step)` and no change since.

    then: also do `prepare(state, then)`.
    """
    if state.path.is_cuda:
        from rowcast.kernels.gpu import rounds as kernels

        return kernels.verdict(state, step, drawn, number, then)
    assert step.rung < state.rungs - 1
    for b in range(len(state.base)):
        _judge(state, step, drawn, number, b)
    return None if then is None else prepare(state, then)


def commit(state: Round, step: Pass, drawn: Tensor, number: int, shared: Sequence[int] = ()) -> None:
    """The last rung's verdict, which ends the round: what stands is emitted and the newest token becomes the pending one.

    Otherwise as `verdict`; a draw of -1 sets FAILED. Writes `report`. `shared`: rungs whose views show the last rung's store, and so
    hold neither more nor less than it when a round begins.
    """
    if state.path.is_cuda:
        from rowcast.kernels.gpu import rounds as kernels

        return kernels.commit(state, step, drawn, number, shared)
    assert step.rung == state.rungs - 1
    for b in range(len(state.base)):
        report = state.report[b]
        report.fill_(-1)
        report[:2] = 0
        failed = _judge(state, step, drawn, number, b)
        if not state.active[b]:
            continue
        emitted = int(state.drafted[b])
        report[2 : 2 + emitted] = state.path[b, HISTORY + 1 : HISTORY + 1 + emitted].int()
        state.path[b, : HISTORY + 1] = state.path[b, emitted : HISTORY + 1 + emitted].clone()
        state.base[b] += emitted
        for r in range(state.rungs):
            state.have[r, b] = 0 if r in shared else min(0, int(state.have[r, b]) - emitted)
        lagging = any(state.have[r, b] <= -HISTORY and state.gammas[r, b] > 0 for r in range(state.rungs - 1))
        report[0], report[1] = emitted, (FAILED if failed else 0) | (LAGGING if lagging else 0)
        state.drafted[b], state.asked[:, b], state.stopped[b] = 0, 1, 0
    return None


def _count(state: Round, step: Pass, b: int) -> int:
    """Tokens that the rung runs of sequence b; 0: it sits out."""
    rung, last = step.rung, state.rungs - 1
    end = int(state.room[b]) + 1
    for r in reversed(range(rung, last)):
        gamma = int(state.gammas[r, b])
        if gamma > 0:  # the rung above adds a token of its own: one fewer is asked for
            end = min(int(state.asked[r + 1, b]) - 1 + gamma, end - 1)
    used = rung == last or (state.gammas[rung, b] > 0 and int(state.drafted[b]) < end and rung >= int(state.stopped[b]))
    have = int(state.have[rung, b])
    if not (state.active[b] and used and have > -HISTORY):
        return 0
    return min(int(state.drafted[b]) + 1 - have, step.tokens)


def _judge(state: Round, step: Pass, drawn: Tensor, number: int, b: int) -> bool:
    """Whether the rung's own token was not a number."""
    rung, drafted, have = step.rung, int(state.drafted[b]), int(state.have[step.rung, b])
    count = _count(state, step, b)
    state.stats[number, b] = torch.tensor([0, 0, count], dtype=torch.int32)
    if count == 0:
        return False
    if have + count < drafted + 1:
        state.have[rung, b] += count
        return False
    own = drawn[b * step.tokens :].tolist()
    asked = int(state.asked[rung, b])
    stands = asked  # tokens of the path that stand, the pending one included
    while stands <= drafted and int(state.path[b, HISTORY + stands]) == own[stands - 1 - have]:
        stands += 1
    state.stats[number, b] = torch.tensor([stands - asked, drafted + 1 - asked, count], dtype=torch.int32)
    token = own[stands - 1 - have]
    if token >= 0:
        state.path[b, HISTORY + stands] = token
    state.drafted[b] = stands if token >= 0 else stands - 1
    state.have[rung, b] = stands
    state.have[:rung, b].clamp_(max=stands)
    state.asked[: rung + 1, b] = state.drafted[b] + 1
    if token < 0:
        state.stopped[b] = rung + 1
    elif int(state.stopped[b]) <= rung:
        state.stopped[b] = 0
    return bool(token < 0)
