"""The steps of a round on a GPU: one warp a sequence, one launch a step. `kernels/rounds.py` says what they do and defines it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rowcast.kernels.rounds import FAILED, HISTORY, LAGGING, Pass, Round

_HISTORY = tl.constexpr(HISTORY)
_FAILED = tl.constexpr(FAILED)
_LAGGING = tl.constexpr(LAGGING)


@triton.jit
def _count(
    active, room, gammas, have, drafted, asked, stopped, b, B, RUNG: tl.constexpr, RUNGS: tl.constexpr, TOKENS: tl.constexpr
):
    """Tokens that the rung runs of sequence b; 0: it sits out."""
    held, so_far = tl.load(have + RUNG * B + b), tl.load(drafted + b)
    used = (tl.load(active + b) != 0) & (held > -_HISTORY)
    if RUNG < RUNGS - 1:
        end = tl.load(room + b) + 1
        for above in tl.static_range(1, RUNGS - RUNG):
            gamma = tl.load(gammas + (RUNGS - 1 - above) * B + b)
            asked_for = tl.minimum(tl.load(asked + (RUNGS - above) * B + b) - 1 + gamma, end - 1)
            end = tl.where(gamma > 0, asked_for, end)
        used = used & (tl.load(gammas + RUNG * B + b) > 0) & (so_far < end) & (tl.load(stopped + b) <= RUNG)
    return tl.where(used, tl.minimum(so_far + 1 - held, TOKENS), 0), held, so_far


@triton.jit
def _prepare(
    path,
    columns,
    base,
    active,
    room,
    gammas,
    have,
    drafted,
    asked,
    stopped,
    tables,
    tables_stride,
    offsets,
    block_size,
    trash_slot,
    ids,
    positions,
    slots,
    starts,
    counts,
    wanted,
    b,
    B,
    RUNG: tl.constexpr,
    RUNGS: tl.constexpr,
    TOKENS: tl.constexpr,
    PADDED: tl.constexpr,
):
    count, held, so_far = _count(active, room, gammas, have, drafted, asked, stopped, b, B, RUNG, RUNGS, TOKENS)
    start = tl.load(base + b) + held
    offset = tl.load(offsets + b)
    tl.store(starts + b, tl.where(tl.load(active + b) != 0, start + offset, 0))
    tl.store(counts + b, count)
    t = tl.arange(0, PADDED)
    run, there = t < count, t < TOKENS
    row, position = b * TOKENS + t, start + t
    tl.store(ids + row, tl.load(path + b * columns + _HISTORY + held + t, mask=run, other=0), mask=there)
    tl.store(positions + row, tl.where(run, position, 0).to(tl.int64), mask=there)
    place = position + offset
    block = tl.load(tables + b * tables_stride + place // block_size, mask=run, other=0).to(tl.int64)
    tl.store(slots + row, tl.where(run, block * block_size + place % block_size, trash_slot), mask=there)
    decides = run & (held + count == so_far + 1) & (held + t >= tl.load(asked + RUNG * B + b) - 1)
    tl.store(wanted + row, decides.to(tl.int32), mask=there)


@triton.jit(do_not_specialize=["trash_slot"])
def _prepare_kernel(
    path,
    columns,
    base,
    active,
    room,
    gammas,
    have,
    drafted,
    asked,
    stopped,
    tables,
    tables_stride,
    offsets,
    block_size,
    trash_slot,
    ids,
    positions,
    slots,
    starts,
    counts,
    wanted,
    RUNG: tl.constexpr,
    RUNGS: tl.constexpr,
    TOKENS: tl.constexpr,
    PADDED: tl.constexpr,
):
    _prepare(
        path,
        columns,
        base,
        active,
        room,
        gammas,
        have,
        drafted,
        asked,
        stopped,
        tables,
        tables_stride,
        offsets,
        block_size,
        trash_slot,
        ids,
        positions,
        slots,
        starts,
        counts,
        wanted,
        tl.program_id(0),
        tl.num_programs(0),
        RUNG,
        RUNGS,
        TOKENS,
        PADDED,
    )


@triton.jit(do_not_specialize=["shared", "trash_slot"])
def _verdict_kernel(
    path,
    columns,
    base,
    active,
    room,
    gammas,
    have,
    drafted,
    asked,
    stopped,
    report,
    stats,
    drawn,
    shared,
    tables,
    tables_stride,
    offsets,
    block_size,
    trash_slot,
    ids,
    positions,
    slots,
    starts,
    counts,
    wanted,
    RUNG: tl.constexpr,
    RUNGS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LADDER: tl.constexpr,
    THEN_RUNG: tl.constexpr,
    THEN_TOKENS: tl.constexpr,
    THEN_PADDED: tl.constexpr,
):
    """COLUMNS and LADDER: powers of two that hold the path's columns and the rungs. THEN_RUNG: -1 for no next pass. `shared`: bits."""
    b, B = tl.program_id(0), tl.num_programs(0)
    count, held, so_far = _count(active, room, gammas, have, drafted, asked, stopped, b, B, RUNG, RUNGS, TOKENS)
    start = tl.load(asked + RUNG * B + b)
    stop = tl.load(stopped + b)
    position = tl.load(base + b)
    lane = tl.arange(0, COLUMNS)
    rung = tl.arange(0, LADDER)
    known = tl.load(have + rung * B + b, mask=rung < RUNGS, other=0)
    own_path = path + b * columns
    judges = (count > 0) & (held + count == so_far + 1)

    # lane: a token's index. The draw that judges it was made after the one before.
    proposed = judges & (lane >= start) & (lane <= so_far)
    token = tl.load(own_path + _HISTORY + lane, mask=proposed, other=0)
    own = tl.load(drawn + b * TOKENS + lane - 1 - held, mask=proposed, other=0)
    stands = tl.min(tl.where(proposed & (token != own), lane, so_far + 1), 0)
    new = tl.load(drawn + b * TOKENS + stands - 1 - held, mask=judges, other=0)
    sound = new >= 0
    grown = tl.where(sound, stands, stands - 1)
    tl.debug_barrier()  # all has been read that is written below

    tl.store(stats + b * 3, tl.where(judges, stands - start, 0))
    tl.store(stats + b * 3 + 1, tl.where(judges, so_far + 1 - start, 0))
    tl.store(stats + b * 3 + 2, count)
    tl.store(own_path + _HISTORY + stands, new, mask=judges & sound)
    if RUNG < RUNGS - 1:
        tl.store(drafted + b, grown, mask=judges)
        lower = tl.where(rung == RUNG, stands, tl.minimum(known, stands))
        updated = tl.where(judges, lower, known + tl.where(rung == RUNG, count, 0))
        tl.store(have + rung * B + b, updated, mask=rung <= RUNG)
        tl.store(asked + rung * B + b, grown + 1, mask=judges & (rung <= RUNG))
        tl.store(stopped + b, tl.where(sound, tl.where(stop <= RUNG, 0, stop), RUNG + 1), mask=judges)
    else:
        emitted = tl.where(judges, grown, 0)
        tl.debug_barrier()
        out = report + b * (2 + columns)
        answer = tl.load(own_path + _HISTORY + 1 + lane, mask=lane < emitted, other=-1)
        tl.store(out + 2 + lane, answer.to(tl.int32), mask=lane < columns)
        kept = tl.load(own_path + emitted + lane, mask=lane <= _HISTORY, other=0)
        left = tl.where(rung == RUNG, stands, tl.minimum(known, stands)) - emitted
        left = tl.where((shared >> rung) & 1 != 0, 0, tl.minimum(left, 0))
        asks = tl.load(gammas + rung * B + b, mask=rung < RUNGS - 1, other=0) > 0
        lagging = tl.max((asks & (left <= -_HISTORY)).to(tl.int32), 0)
        tl.store(out, emitted)
        tl.store(out + 1, tl.where(judges, tl.where(sound, 0, _FAILED) | (lagging * _LAGGING), 0))
        tl.debug_barrier()
        tl.store(own_path + lane, kept, mask=judges & (lane <= _HISTORY))
        tl.store(base + b, position + emitted, mask=judges)
        tl.store(have + rung * B + b, left, mask=judges & (rung < RUNGS))
        tl.store(drafted + b, 0, mask=judges)
        tl.store(asked + rung * B + b, 1, mask=judges & (rung < RUNGS))
        tl.store(stopped + b, 0, mask=judges)
    if THEN_RUNG >= 0:
        tl.debug_barrier()
        _prepare(
            path,
            columns,
            base,
            active,
            room,
            gammas,
            have,
            drafted,
            asked,
            stopped,
            tables,
            tables_stride,
            offsets,
            block_size,
            trash_slot,
            ids,
            positions,
            slots,
            starts,
            counts,
            wanted,
            b,
            B,
            THEN_RUNG,
            RUNGS,
            THEN_TOKENS,
            THEN_PADDED,
        )


def prepare(state: Round, step: Pass) -> None:
    """As `kernels.rounds.prepare`. One launch."""
    _prepare_kernel[(len(state.base),)](
        *_state(state),
        *_inputs(step),
        RUNG=step.rung,
        RUNGS=state.rungs,
        TOKENS=step.tokens,
        PADDED=triton.next_power_of_2(step.tokens),
        num_warps=1,
    )


def verdict(state: Round, step: Pass, drawn: Tensor, number: int, then: Pass | None = None) -> None:
    """As `kernels.rounds.verdict`. One launch."""
    assert step.rung < state.rungs - 1
    _judge(state, step, drawn, number, 0, then)


def commit(state: Round, step: Pass, drawn: Tensor, number: int, shared: Sequence[int] = ()) -> None:
    """As `kernels.rounds.commit`. One launch."""
    assert step.rung == state.rungs - 1
    _judge(state, step, drawn, number, sum(1 << rung for rung in set(shared)), None)


def _judge(state: Round, step: Pass, drawn: Tensor, number: int, shared: int, then: Pass | None) -> None:
    assert drawn.dtype == torch.int64 and drawn.is_contiguous() and drawn.shape == step.ids.shape
    _verdict_kernel[(len(state.base),)](
        *_state(state),
        state.report,
        state.stats[number],
        drawn,
        shared,
        *_inputs(step if then is None else then),
        RUNG=step.rung,
        RUNGS=state.rungs,
        TOKENS=step.tokens,
        COLUMNS=triton.next_power_of_2(state.path.shape[1]),
        LADDER=triton.next_power_of_2(state.rungs),
        THEN_RUNG=-1 if then is None else then.rung,
        THEN_TOKENS=1 if then is None else then.tokens,
        THEN_PADDED=1 if then is None else triton.next_power_of_2(then.tokens),
        num_warps=1,
    )


def _state(state: Round) -> tuple[Tensor | int, ...]:
    s = state
    return s.path, s.path.shape[1], s.base, s.active, s.room, s.gammas, s.have, s.drafted, s.asked, s.stopped


def _inputs(step: Pass) -> tuple[Tensor | int, ...]:
    outputs = step.ids, step.positions, step.slots, step.starts, step.counts, step.wanted
    return step.tables, step.tables.stride(0), step.offsets, step.block_size, step.trash_slot, *outputs
