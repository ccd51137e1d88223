"""A round of the ladder that the device runs by itself, under the coupled rule.

The host says beforehand which passes the round has (`program`), fills the round's state (`state`), and reads the result back once,
when all is over: but for a lone sequence, whose host may wait in between while rungs below run (`program.left_to_do`). How many
proposals stood, and so which tokens a pass runs and where their K/V go, is in device tensors (`kernels.rounds`). Each pass, from its
tokens' ids to the verdict, is captured in a CUDA graph when it is used for the second time (`graphs`). Without capture the same calls
are made one by one: the output is the same.

Several ranks run the same passes in the same order, each over its share of the model: what they are depends on tokens and on shared
decisions alone, never on a rank's clock. Sums and draws across ranks are part of a pass, and of its graph.

Where the last rung's KV or weights lie in host memory, the host drives its pass (`driven`), and the device those of the rungs below.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from rowcast.kernels import rounds
from rowcast.kernels.rounds import FAILED, HISTORY
from rowcast.placement.resident import LOGIT_ELEMENTS
from rowcast.runtime.device_round.account import reads_of, tell
from rowcast.runtime.device_round.driven import driven_pass, needs_host
from rowcast.runtime.device_round.graphs import Graphs
from rowcast.runtime.device_round.program import BATCHES, MOST_LAG, MOST_PASSES, Pass, Programs, lag, left_to_do
from rowcast.runtime.device_round.refresh import Refresh
from rowcast.runtime.device_round.sampling import Sampling, draw, fill, is_served, simulated
from rowcast.runtime.device_round.state import RoundState
from rowcast.runtime.kv.device import BoundStore, DeviceStore, Placement
from rowcast.runtime.kv.listed import ListedKV
from rowcast.runtime.kv.paged import PagedKV
from rowcast.runtime.kv.shared import SharedKV
from rowcast.runtime.ladder import climb
from rowcast.runtime.ladder.climb import Climber
from rowcast.runtime.ladder.model_runner import ModelRunner
from rowcast.runtime.ladder.runner import Lookup, Runner
from rowcast.runtime.protocols import ChoosesOnDevice, Reads, Tokens
from rowcast.runtime.sampler import Sampler
from rowcast.runtime.sparse.sizes import rounds_write_late
from rowcast.runtime.step import SeqStep

LEAST_ENTRIES = 1024
"""Longest context, rounded up to a power of two from here on: each has graphs of its own."""
assert MOST_LAG < HISTORY


@dataclass(frozen=True, slots=True)
class _Ahead:
    """A round that was launched before anybody asked for it."""

    rows: list[tuple[int, int]]
    """Of each sequence: its id, and how many tokens it has."""
    batch: int
    most: int
    clocks: list[Callable[[], float]]


class DeviceRounds:
    """Rounds on the device over the rungs of a ladder. Keeps nothing of a sequence from round to round."""

    def __init__(
        self,
        lower: Sequence[Runner | Lookup],
        top: ModelRunner,
        sampler: Sampler,
        *,
        lookahead: int,
        rows: int,
        capture: bool,
        rates: Mapping[int, float] | None = None,
        driven: bool | None = None,
    ) -> None:
        """`lookahead`: tokens that a round drafts at most for one sequence. `rows`: sequences of a round, at most.
        `rates`: simulated acceptance by verifying rung, for timing shapes without weights. `driven`: whether the host drives the last
        rung's pass; of several ranks either all do or none; None: as `is_driven` says. Precondition: `why_not` found nothing."""
        self._rungs = [*lower, top]
        self._top = top
        self._sampler = sampler
        self._lookahead = lookahead
        self._rates = rates or {}
        self.driven = self.is_driven(lower, top) if driven is None else driven
        """Whether the host drives the last rung's pass."""
        self._device = sampler.device
        self._lookup = bool(lower) and isinstance(lower[0], Lookup)
        self._stores = [cast(DeviceStore, rung.view) if isinstance(rung, ModelRunner) else None for rung in self._rungs]
        self._own_kv = [store is not None and not store.shares_entries for store in self._stores[:-1]]
        self._shared = [rung for rung, store in enumerate(self._stores[:-1]) if store is not None and store.shares_entries]
        weights = [rung.decoder.weights for rung in self._rungs if isinstance(rung, ModelRunner)]
        self._choosing = [*{id(each): each for each in weights if isinstance(each, ChoosesOnDevice)}.values()]
        self._reads_more_at_random = any(view.reads_more_at_random for view in self._choosing)
        self._states: dict[tuple[int, int], RoundState] = {}
        self._graphs = Graphs(capture)
        """By batch, bound of contexts, pass and sampling; and of what refreshes views."""
        self._reads: dict[tuple[int, Pass], Reads] = {}
        """What a pass reads of the weights."""
        self._programs = Programs(lookup=self._lookup, own_kv=self._own_kv, lookahead=lookahead)
        self._refresh: Refresh | None = None
        """None: no view chooses by the last pass's queries, or the host drives that pass, and keeps them itself."""
        if not self.driven and isinstance(top.view, PagedKV) and top.view.keep_queries:
            self._refresh = Refresh(top.view, self._stores[:-1], self._graphs, tokens=rows * (1 + lookahead))
        self._goes_ahead = self._device.type == "cuda" and capture and not self.driven
        self._drafted = False
        """Whether anything was proposed in the newest round."""
        self._ahead: _Ahead | None = None
        self._blocks: list[int] = []
        """Of each sequence, those of the last rung's that the state was filled with."""
        self._sampling = Sampling()
        """Of the newest round."""

    @staticmethod
    def why_not(lower: Sequence[Runner | Lookup], top: ModelRunner) -> str | None:
        """Why these rungs' rounds need the host; None if the device can run them."""
        runners = [rung for rung in lower if not isinstance(rung, Lookup)]
        for rung in runners:
            assert isinstance(rung, ModelRunner)
            if why := needs_host(rung):
                return why
        # The host may drive the last rung's pass, where that leaves passes to the device.
        why = needs_host(top)
        can = bool(runners) and isinstance(top.view, PagedKV) and not isinstance(top.decoder.weights, ChoosesOnDevice)
        return None if can else why

    @staticmethod
    def is_driven(lower: Sequence[Runner | Lookup], top: ModelRunner) -> bool:
        """Whether the host has to drive the last rung's pass, where the device runs the others'."""
        return bool(lower) and needs_host(top) is not None

    def serves(self, seq_id: int) -> bool:
        """Whether the sequence's sampling parameters are numbers in device tensors: no penalties, biases, log-probabilities."""
        return is_served(self._sampler.sequence(seq_id))

    def tell_captures(self, told: Callable[[float], None]) -> None:
        """`told`: as `Graphs.on_capture`."""
        self._graphs.on_capture = told

    def forget(self) -> None:
        """KV of some sequence is void: what was launched ahead does not count."""
        self._ahead = None

    def run(
        self, climbers: Sequence[Climber], steps: Sequence[SeqStep], work: climb.Climb, *, alone: bool = True
    ) -> list[list[int]]:
        """One round over decoding sequences: the tokens that each gains, -1 behind them where the last rung's logits are NaN.

        Paths have these tokens then, views hold none of what was rejected. Passes and outcomes are told to `work`, counts to the
        climbers. Precondition: at most `BATCHES[-1]` sequences, all of them served.

        Where the last rung alone runs, and did in the round before, the next round of the same sequences is launched before the host
        waits for this one's tokens: the device goes from one to the other. If they do not go on, if others join them, or if a rung
        below has something to propose, it is run in vain: what it wrote lies behind what anybody has committed.
        `alone`: the step has no other round, which would come in between.
        """
        gammas = tuple(max(c.gammas[r] for c in climbers) for r in range(len(self._rungs) - 1))
        rooms = [min(step.room, self._lookahead) if any(c.gammas) else 0 for c, step in zip(climbers, steps, strict=True)]
        most_asked = max((c.gammas[upper] for c in climbers if (upper := c.below(len(gammas))) is not None), default=0)
        program: Sequence[Pass] = self._programs.of(gammas if any(rooms) else (0,) * len(gammas), most_asked)
        batch = next(size for size in BATCHES if size >= len(climbers))
        most = self._bound([c.path.committed + self._lookahead + 1 for c in climbers])
        state = self._state(batch, most)
        used = sorted({p.rung for p in program} | ({0} if self._lookup and gammas[0] else set()))
        ahead, self._ahead = self._ahead, None
        drafts, drafted = any(any(climber.gammas) for climber in climbers), self._drafted
        self._drafted = drafts
        if ahead is not None and not drafts and ahead.rows == _rows(climbers) and (ahead.batch, ahead.most) == (batch, most):
            clocks = ahead.clocks
            for climber in climbers:
                self._reserve(len(self._rungs) - 1, climber, 0)
        else:
            rooms = [min(room, program[-1].tokens - 1) for room in rooms]
            self._sampling = self._fill(state, climbers, rooms, used)
            passes = left_to_do(program, climbers[0].gammas, rooms[0], state) if len(climbers) == 1 else iter(program)
            program, clocks = [], []
            for p in passes:
                clocks.append(self._run(state, p, most, self._sampling, len(program), climbers))
                program.append(p)
        for view in self._choosing:
            view.send_reads()
        state.send()  # what it waits for has the others' copies before it
        if self._refresh is not None:  # while the host looks at what was sent
            entries = max(c.path.committed for c in climbers) + program[-1].tokens
            self._refresh.run(state, len(self._rungs) - 1, program[-1].tokens, most, entries)
        if alone and not (drafts or drafted) and self._may_go_ahead(climbers, steps, most):
            lengths = [(c.path.seq_id, c.path.committed + 1) for c in climbers]
            self._ahead = _Ahead(lengths, batch, most, [self._run(state, program[0], most, self._sampling, 0, climbers)])
        report, stats, have = state.read()
        reads = reads_of(self._reads, self._choosing, self._rungs, program, batch)
        gained = []
        for row, climber in enumerate(climbers):
            tokens: list[int] = report[row, 2 : 2 + report[row, 0]].tolist()
            climber.path.ids[climber.path.committed :] = tokens
            gained.append([*tokens, -1] if report[row, 1] & FAILED else tokens)
        tell(work, self._programs, self._rungs, program, reads, climbers, stats, clocks)
        self._settle(climbers, used, have)
        if self._refresh is not None:
            self._refresh.end(program[-1].tokens, batch, [climber.path for climber in climbers])
        return gained

    # Before the passes.

    def _fill(self, state: RoundState, climbers: Sequence[Climber], rooms: Sequence[int], used: Sequence[int]) -> Sampling:
        """Put the sequences into the state. `rooms`: tokens that each may draft at most."""
        top = len(self._rungs) - 1
        sequences = (self._sampler.sequence(climber.path.seq_id) for climber in climbers)
        random = self._reads_more_at_random and not all(sequence.params.greedy for sequence in sequences)
        for rung in used:
            runner, mine = self._rungs[rung], [climber for climber in climbers if self._uses(climber, rung)]
            if not isinstance(runner, ModelRunner):
                continue
            # What a rung lacks beyond what its first pass takes it runs before the round. It is certain, so that older entries may go.
            lacks = lag(sum(rung < other < top for other in used)) if rung < top else 0
            for path in (climber.path for climber in mine):
                if runner.view.end(path.seq_id) < path.committed - 1 - lacks:
                    runner.catch_up(path, path.committed - 1)
                    runner.commit(path.seq_id, path.committed - 1)
            for view in self._choosing:
                if view is runner.decoder.weights:
                    late = isinstance(self._late(rung, state), int)
                    view.begin_round(runner.view, [climber.path.seq_id for climber in mine], late, random)
        sampling, self._blocks = Sampling(random=random), []
        if self._refresh is not None:
            self._refresh.begin()
        with state.filling() as fields:
            for name, value in (("active", 0), ("drafted", 0), ("asked", 1), ("stopped", 0), ("gammas", 0), ("refreshed", -1)):
                fields[name].fill(value)
            for row, (climber, room) in enumerate(zip(climbers, rooms, strict=True)):
                path, base = climber.path, climber.path.committed - 1
                known = path.ids[max(0, base - HISTORY) : path.committed]
                fields["path"][row, HISTORY + 1 - len(known) : HISTORY + 1] = known
                fields["active"][row], fields["base"][row], fields["room"][row] = 1, base, room
                fields["gammas"][:-1, row] = climber.gammas
                for rung in used:
                    if self._uses(climber, rung):
                        self._fill_rung(state, fields, row, rung, climber, room)
                fields["prompt_lengths"][row] = path.prompt_length
                sampling |= fill(fields, row, self._sampler.sequence(path.seq_id), self._sampler.vocab_size)
        return sampling

    def _uses(self, climber: Climber, rung: int) -> bool:
        """Whether the rung runs the sequence: it may have no place for others, or no positions."""
        return rung == len(self._rungs) - 1 or climber.gammas[rung] > 0

    def _fill_rung(self, state: RoundState, fields: dict[str, Any], row: int, rung: int, climber: Climber, room: int) -> None:
        """What a rung has of a sequence, and where the rest will go; of a lookup, what it proposes."""
        path, runner = climber.path, self._rungs[rung]
        if rung == 0 and self._lookup:
            assert isinstance(runner, Lookup)
            started = time.perf_counter()
            above = sum(gamma > 0 for gamma in climber.gammas[1:])  # each adds a token of its own
            found = runner.propose(path, min(climber.gammas[rung], room - above)) if room > above else []
            fields["path"][row, HISTORY + 1 : HISTORY + 1 + len(found)] = found
            fields["drafted"][row] = len(found)
            climber.counts[runner.name].seconds += time.perf_counter() - started
            return
        assert isinstance(runner, ModelRunner)
        fields["have"][rung, row] = runner.view.end(path.seq_id) - (path.committed - 1)
        blocks, fields["offsets"][rung, row] = self._reserve(rung, climber, room)
        state.place(rung, row, blocks)
        if runner is self._top:
            self._blocks.append(len(blocks))
        store = self._stores[rung]
        if isinstance(store, ListedKV):
            fields["recents"][rung, row] = store.seat(path.seq_id, row)
            if self._refresh is not None:
                self._refresh.ask(fields, rung, row, path.seq_id)

    def _reserve(self, rung: int, climber: Climber, room: int) -> tuple[list[int], int]:
        """Make room in the rung's view for what it lacks and for `room` tokens more."""
        path, store, view = climber.path, self._stores[rung], cast(ModelRunner, self._rungs[rung]).view
        assert store is not None
        start = view.end(path.seq_id)
        tokens = [0] * (path.committed + room - start)
        return store.reserve(SeqStep(path.seq_id, tokens, start, path.blocks, path.prompt_length, sample=True))

    def _may_go_ahead(self, climbers: Sequence[Climber], steps: Sequence[SeqStep], most: int) -> bool:
        """Whether the round after this one can be launched now: one pass, of sequences that are not at their end, each with one token
        more and with blocks for it that the state knows of."""
        view, store = self._top.view, self._stores[-1]
        if not self._goes_ahead or (isinstance(view, PagedKV) and view.keep_queries):
            return False
        assert store is not None
        lengths = [c.path.committed + 1 for c in climbers]
        return (
            all(step.left > 1 for step in steps)
            and all(blocks * store.block_size >= length for blocks, length in zip(self._blocks, lengths, strict=True))
            and self._bound([length + self._lookahead + 1 for length in lengths]) == most
        )

    # The passes.

    def _run(
        self, state: RoundState, p: Pass, most: int, sampling: Sampling, number: int, climbers: Sequence[Climber]
    ) -> Callable[[], float]:
        """Run the round's pass `number`; returns its seconds, to be asked for after the round."""
        key = (state.batch, most, p, sampling)
        runner = cast(ModelRunner, self._rungs[p.rung])
        if self.driven and runner is self._top:
            graph, who = None, climbers
        else:
            graph, who = self._graphs.find(key, lambda: self._recorded(state, p, most, sampling)), None
        start = self._clock()
        if graph is not None:
            graph.replay()
        else:
            runner.reads()
            self._pass(state, p, most, sampling, who)
            self._reads[state.batch, p] = runner.reads()
            self._graphs.made(key)
        state.keep_stats(number)
        end = self._clock()
        return lambda: _seconds(start, end)

    def _pass(self, state: RoundState, p: Pass, most: int, sampling: Sampling, driven: Sequence[Climber] | None = None) -> None:
        """From the tokens of a pass to its verdict. Asks the device nothing, but what a pass of `driven` sequences is to run."""
        runner, store = cast(ModelRunner, self._rungs[p.rung]), self._stores[p.rung]
        assert store is not None
        at = state.inputs(p.rung, p.tokens, store.block_size)
        rounds.prepare(state.round, at)
        hidden = self._forward(state, p, at, most) if driven is None else driven_pass(runner, at, state.batch, driven)
        rows = max(1, LOGIT_ELEMENTS // (self._sampler.vocab_size * p.tokens)) * p.tokens
        rate = self._rates.get(p.rung) if p.judges else None
        drawn = []
        for first in range(0, len(hidden), rows):
            own = draw(state, runner.logits(hidden[first : first + rows]), at, first, sampling)
            drawn.append(own if rate is None else simulated(state, own, at, first, rate))
        own = drawn[0] if len(drawn) == 1 else torch.cat(drawn)
        if runner is self._top:
            rounds.commit(state.round, at, own, state.newest, self._shared)
        else:
            rounds.verdict(state.round, at, own, state.newest)

    def _forward(self, state: RoundState, p: Pass, at: rounds.Pass, most: int) -> Tensor:
        """Hidden states of a pass over tokens that the device finds by itself, [B * T, D]."""
        runner, store = cast(ModelRunner, self._rungs[p.rung]), self._stores[p.rung]
        assert store is not None
        rope = runner.decoder.spec.rope
        dynamic = rope is not None and rope.scaling == "dynamic"
        lengths = state["prompt_lengths"].repeat_interleave(p.tokens, output_size=len(at.ids)) if dynamic else at.positions
        bound = BoundStore(
            store,
            Placement(at.tables, at.starts, at.counts, at.slots, most, state["recents"][p.rung]),
            self._refresh.queries(state.batch, p.tokens) if runner is self._top and self._refresh is not None else None,
            self._late(p.rung, state),
        )
        return runner.decoder.forward(Tokens(at.ids, at.positions, lengths, ()), cast(Any, bound))

    def _late(self, rung: int, state: RoundState) -> Tensor | int | None:
        """Whether a pass may leave entries of a lone sequence to later ones, as `BoundStore` takes it: to those of the round, as the
        last rung writes proposals anew, or to all that follow."""
        store, last = self._stores[rung], rung == len(self._rungs) - 1
        if state.batch > 1 or not rounds_write_late(self._lookahead, last=last):
            return None
        if isinstance(store, SharedKV) and store.lazy:
            return state.round.base
        return self._lookahead + 1 if isinstance(store, PagedKV) and store.lazy else None

    def _recorded(self, state: RoundState, p: Pass, most: int, sampling: Sampling) -> None:
        """`_pass`, while its calls are captured: what it counts has not been read."""
        self._pass(state, p, most, sampling)
        cast(ModelRunner, self._rungs[p.rung]).reads()

    # After the passes.

    def _settle(self, climbers: Sequence[Climber], used: Sequence[int], have: Any) -> None:
        """Views drop what was rejected or never run. `have` [R, B]: what each rung holds of a path, counted from its newest token."""
        for row, climber in enumerate(climbers):
            for rung in used:
                if self._uses(climber, rung):
                    self._rungs[rung].truncate(climber.path.seq_id, len(climber.path.ids) - 1 + int(have[rung, row]))

    def _state(self, batch: int, most: int) -> RoundState:
        found = self._states.get((batch, most))
        if found is None:
            widths = [0 if store is None else -(-most // store.block_size) for store in self._stores]
            found = self._states[batch, most] = RoundState(batch, self._lookahead + 1, widths, MOST_PASSES, self._device)
        return found

    def _bound(self, lengths: Sequence[int]) -> int:
        most = LEAST_ENTRIES
        while most < max(lengths):
            most *= 2
        return most

    def _clock(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def _rows(climbers: Sequence[Climber]) -> list[tuple[int, int]]:
    return [(climber.path.seq_id, climber.path.committed) for climber in climbers]


def _seconds(start: Any, end: Any) -> float:
    return float(end - start) if isinstance(start, float) else float(start.elapsed_time(end)) * 1e-3
