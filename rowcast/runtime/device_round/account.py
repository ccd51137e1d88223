"""What a round's passes did, told to whoever counts, models costs or acceptance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, cast

import torch

from rowcast.runtime.device_round.program import Pass, Programs
from rowcast.runtime.ladder import climb
from rowcast.runtime.ladder.climb import Climber
from rowcast.runtime.ladder.model_runner import ModelRunner
from rowcast.runtime.ladder.runner import Lookup, Ran, Runner
from rowcast.runtime.protocols import ChoosesOnDevice, Reads
from rowcast.runtime.step import RungCounts

_NOTHING = torch.empty(0)


def tell(
    work: climb.Climb,
    programs: Programs,
    rungs: Sequence[Runner | Lookup],
    program: Sequence[Pass],
    reads: Sequence[Reads],
    climbers: Sequence[Climber],
    stats: Any,
    clocks: Sequence[Callable[[], float]],
) -> None:
    """Passes and outcomes to `work`, counts to the climbers, what stood to `programs`.

    `stats` [passes, B, 3]: as `kernels.rounds.Round.stats`. `reads`, `clocks`: of each pass, what it read of the weights, its seconds.
    """
    counted: list[list[list[int]]] = stats[: len(program)].tolist()
    kv_bytes: dict[tuple[int, int], int] = {}
    for p, mine, read, clock in zip(program, counted, reads, clocks, strict=True):
        runner = cast(ModelRunner, rungs[p.rung])
        took = []
        for climber, (accepted, proposed, ran) in zip(climbers, mine, strict=False):
            seq_id, below = climber.path.seq_id, climber.below(p.rung)
            if proposed and below is not None:
                climber.counts[rungs[below].name].note(proposed, accepted)
                work.outcomes.append(climb.Outcome(seq_id, below, p.rung, proposed, accepted))
                programs.note(below, p.rung, accepted, proposed)
            if ran:
                took.append((climber, ran))
                if (p.rung, seq_id) not in kv_bytes:
                    kv_bytes[p.rung, seq_id] = runner.view.bytes_read(seq_id)
        if took:
            tokens = [ran for _, ran in took]
            bytes_ = [kv_bytes[p.rung, climber.path.seq_id] for climber, _ in took]
            ran_so = Ran(_NOTHING, tokens, tokens, tokens, bytes_, [0] * len(took))
            work.note(p.rung, [climber.counts[runner.name] for climber, _ in took], ran_so, read, clock())
            continue
        # Nobody had tokens for it: it took its time and read its weights nevertheless.
        users, seconds = [climber for climber in climbers if climber.gammas[p.rung]], clock()
        for climber in users:
            climber.counts[runner.name].add(RungCounts(seconds=seconds / len(users), bytes_read=read.bytes // len(users)))


def reads_of(
    known: Mapping[tuple[int, Pass], Reads],
    choosing: Sequence[ChoosesOnDevice],
    rungs: Sequence[Runner | Lookup],
    program: Sequence[Pass],
    batch: int,
) -> list[Reads]:
    """What each pass read of the weights. `known`: by batch and pass, where it does not change. Of the views in `choosing` the device
    has counted; a view's passes share that as they had tokens."""
    found = [known[batch, p] for p in program]
    views: list[object] = [cast(ModelRunner, rungs[p.rung]).decoder.weights for p in program]
    for view in choosing:
        mine = [number for number, other in enumerate(views) if other is view]
        if mine:
            shares = _shared_out(view.device_reads(), [program[number].tokens for number in mine])
            for number, share in zip(mine, shares, strict=True):
                found[number] = share
    return found


def _shared_out(reads: Reads, parts: Sequence[int]) -> list[Reads]:
    """Them as the parts are to each other, in whole numbers; the sums stay."""
    ends, layers = list(accumulate(parts)), max(len(reads.neurons_by_layer), len(reads.heads_by_layer))
    return [
        Reads.of([n * end // ends[-1] - n * (end - part) // ends[-1] for n in reads.numbers(layers)], layers)
        for end, part in zip(ends, parts, strict=True)
    ]
