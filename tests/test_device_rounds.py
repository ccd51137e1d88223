"""Rounds that the device runs by itself give what rounds give that the host drives. Here through Triton's interpreter; on a GPU the
tests of ladders and of the engine run on them, captured in graphs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from test_speculation import SELF, disturbed_copy, ids, prompts
from tiny import tiny_model
from triton_interpreting import take_arrays_as_bounds

from rowcast import LLM, RequestOutput, SamplingParams
from rowcast.kernels import gpu
from rowcast.placement import resident
from rowcast.runtime.device_round.sampling import simulated
from rowcast.runtime.device_round.state import RoundState
from rowcast.runtime.step import SeqStep

take_arrays_as_bounds()
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False)
SEEDED = replace(GREEDY, temperature=0.8, seed=11)
LADDERS = {
    "ngram": "ngram:gamma=4 / plain",
    "draft": "draft:kv=full,gamma=2 / plain",
    "triforce": f"draft:kv=48,sinks=4,gamma=2 / {SELF},gamma=4 / plain",
}

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    target, good = (tmp_path_factory.mktemp(name) for name in ("target", "good"))
    tiny_model("llama-gqa", target, num_hidden_layers=1)
    disturbed_copy(target, good)
    return {"target": target, "good": good}


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "interpreted", True)


def make_llm(models: dict[str, Path], ladder: str, **keywords: Any) -> LLM:
    if "draft" in ladder:
        keywords["draft"] = models["good"]
    return LLM(models["target"], dtype="float32", device="cpu", ladder=ladder, block_size=4, **keywords)


# The greedy continuation of the first repeats itself: 98, 55, 98, 55, ...; that of the second does not.
SOME = [[*prompts(12, shortest=28)[9][-30:], 14, 55, 98, 55], prompts(4, shortest=28)[1][-34:]]


@pytest.fixture(scope="module")
def plain(models: dict[str, Path]) -> dict[str, list[list[int]]]:
    llm = make_llm(models, "plain")
    return {name: ids(llm.generate(SOME, params)) for name, params in (("greedy", GREEDY), ("seeded", SEEDED))}


def acceptance(outputs: list[RequestOutput], rung: str) -> tuple[int, int]:
    """Proposals of a rung that were judged, and those that stood."""
    found = [output.metrics.rungs[rung] for output in outputs if rung in output.metrics.rungs]
    return sum(sum(counts.judged) for counts in found), sum(sum(counts.accepted) for counts in found)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("ladder", [None, *LADDERS])
def test_output_is_plain_output(models: dict[str, Path], plain: dict[str, list[list[int]]], ladder: str | None) -> None:
    llm = make_llm(models, "plain" if ladder is None else LADDERS[ladder])
    assert llm.engine._executor._rounds is not None  # type: ignore[attr-defined]
    outputs = llm.generate(SOME, [GREEDY, SEEDED])
    assert ids(outputs) == [plain["greedy"][0], plain["seeded"][1]]
    llm.engine.check()
    if ladder is not None:
        for rung in llm.plan.ladder[:-1]:
            assert acceptance(outputs, rung.partition(":")[0])[0], rung


@pytest.mark.usefixtures("interpreted")
def test_a_round_launched_ahead_is_the_next_one(models: dict[str, Path], plain: dict[str, list[list[int]]]) -> None:
    """It runs before the host has looked at the one before it: whatever joins, leaves or needs a block that the state knows nothing of
    has the round done again."""
    llm = make_llm(models, "plain")
    rounds: Any = llm.engine._executor._rounds  # type: ignore[attr-defined]
    rounds._goes_ahead = True
    events: list[str] = []
    with (
        patch.object(rounds, "_fill", side_effect=wrapped(rounds._fill, events, "fill")),
        patch.object(rounds, "_run", side_effect=wrapped(rounds._run, events, "run")),
        patch("rowcast.runtime.device_round.state.RoundState.read", autospec=True, side_effect=read_as(events)),
    ):
        alone = llm.generate([SOME[0]], replace(GREEDY, max_tokens=7))
        requests = [llm.engine.add(SOME[0], GREEDY)]
        while len(requests[0].sequences[0].output_ids) < 2:
            llm.engine.step()
        requests.append(llm.engine.add(SOME[1], SEEDED))
        while llm.engine.has_work:
            llm.engine.step()
    assert ids(alone)[0][:4] == plain["greedy"][0]
    assert [request.sequences[0].output_ids for request in requests] == [plain["greedy"][0], plain["seeded"][1]]
    # Rounds with 35 to 40 tokens in blocks of 4: the state is filled for the first, and where a block is new.
    each = ["fill run run read", "read", "fill run run read", "run read", "run read", "read"]
    assert events[: len(" ".join(each).split())] == " ".join(each).split()
    llm.engine.check()


@pytest.mark.usefixtures("interpreted")
def test_rounds_in_which_no_rung_drafts_are_launched_ahead(models: dict[str, Path]) -> None:
    """From the second in a row; one that drafts after all finds the one that was launched, and has its own."""
    wish = replace(GREEDY, max_tokens=9)
    wanted = ids(make_llm(models, "plain").generate([SOME[1]], wish))
    llm = make_llm(models, "draft:kv=full,gamma=2 / plain")
    rounds: Any = llm.engine._executor._rounds  # type: ignore[attr-defined]
    rounds._goes_ahead = True
    asks, events, real = iter([0, 0, 0, 2, 0, 0, 0, 0, 0]), [], rounds.run

    def run(climbers: Any, *args: Any, **options: Any) -> Any:
        for climber in climbers:
            climber.gammas = (next(asks),)
        events.append("round")
        return real(climbers, *args, **options)

    with (
        patch.object(rounds, "run", run),
        patch.object(rounds, "_fill", side_effect=wrapped(rounds._fill, events, "fill")),
        patch("rowcast.runtime.device_round.state.RoundState.read", autospec=True, side_effect=read_as(events)),
        patch.object(rounds, "_may_go_ahead", side_effect=wrapped(rounds._may_go_ahead, events, "may")),
    ):
        assert ids(llm.generate([SOME[1]], wish)) == wanted
    told = " ".join(events).split("round ")[1:]
    # The third round needs a block of which the state knows nothing, and what it launches is in vain.
    wanted_events = ["fill may read", "may read", "fill may read", "fill read", "fill read", "fill may read"]
    assert [each.strip() for each in told[:6]] == wanted_events
    llm.engine.check()


def wrapped(function: Callable[..., Any], events: list[str], name: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        events.append(name)
        return function(*args)

    return call


def read_as(events: list[str]) -> Callable[..., Any]:
    return wrapped(RoundState.read, events, "read")


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    "ladder",
    ["draft:kv=full,gamma=2 / plain", "draft:kv=48,sinks=4,gamma=2 / self:kv=40,chunk=4,sinks=4,recent=8,gamma=3 / plain"],
)
def test_a_draft_that_is_the_target_is_always_right(models: dict[str, Path], ladder: str) -> None:
    """So it is only if its K/V have no holes where all proposals stood and none where some were never run."""
    llm = LLM(models["target"], draft=models["target"], dtype="float32", device="cpu", ladder=ladder, block_size=4)
    draft = llm.engine._executor._lower[0].view  # type: ignore[attr-defined]
    for store in (draft._keys, draft._values):
        store.fill_(77.0)
    outputs = llm.generate([SOME[1][:24]], replace(GREEDY, max_tokens=12))
    judged, accepted = acceptance(outputs, "draft")
    assert judged == accepted >= 5


ALL_STAND = "draft:kv=full,gamma=2 / self:kv=64,chunk=4,sinks=4,recent=8,gamma=6 / plain"
"""With the target as the draft, in contexts of at most 64 tokens."""


def played(rounds: Any, events: list[str]) -> Any:
    """While this lasts, passes go to `events` by their rung, and so do questions to the device."""

    def run(state: Any, p: Any, *args: Any) -> Any:
        events.append(str(p.rung))
        return real(state, p, *args)

    real, stack = rounds._run, ExitStack()
    stack.enter_context(patch.object(rounds, "_run", run))
    for name, event in (("send_drafted", "ask"), ("drafted", "wait")):
        told = wrapped(getattr(RoundState, name), events, event)
        stack.enter_context(patch.object(RoundState, name, autospec=True, side_effect=told))
    return stack


@pytest.mark.usefixtures("interpreted")
def test_passes_that_have_nothing_to_do_are_left_out(models: dict[str, Path]) -> None:
    """Where all proposals stand, two passes of the middle rung have drafted what three usually do."""
    llm = LLM(models["target"], draft=models["target"], dtype="float32", device="cpu", ladder=ALL_STAND, block_size=4)
    rounds: Any = llm.engine._executor._rounds  # type: ignore[attr-defined]
    events: list[str] = []
    request = llm.engine.add(SOME[1][:24], replace(GREEDY, max_tokens=15))
    while not request.stats.generated_tokens:
        llm.engine.step()
    with played(rounds, events):
        while request.stats.rounds < 2:
            llm.engine.step()
    assert [p.rung for p in rounds._programs.of((2, 6), 6)] == [0, 0, 1] * 3 + [2]
    # The third run's drafts run beside the host's question.
    assert " ".join(events) == " ".join(["0 0 1 0 0 1 ask 0 0 wait 2"] * 2)
    assert request.stats.round_tokens == 14
    while llm.engine.has_work:
        llm.engine.step()
    assert (
        request.sequences[0].output_ids
        == ids(make_llm(models, "plain").generate([SOME[1][:24]], replace(GREEDY, max_tokens=15)))[0]
    )


STANDS, FALLS, NOTHING = 5, 6, -1
"""What the middle rung draws where all others draw 5: the draft's two proposals stand, or none does, or it has no number."""


@pytest.mark.usefixtures("interpreted")
def test_what_is_left_out_follows_what_is_drafted(models: dict[str, Path]) -> None:
    """By draws that are given: which passes run, and how many tokens the draft and the middle rung have proposed."""
    llm = make_llm(models, ALL_STAND)
    rounds: Any = llm.engine._executor._rounds  # type: ignore[attr-defined]
    cases = [
        ([STANDS, STANDS], "0 0 1 0 0 1 ask 0 0 wait 2", 4, 6),
        ([STANDS, FALLS, STANDS], "0 0 1 0 0 1 ask 0 0 wait 1 2", 5, 6),
        ([FALLS, FALLS, FALLS], "0 0 1 0 0 1 ask 0 0 wait 1 2", 6, 3),
        ([STANDS, NOTHING], "0 0 1 0 0 1 ask 0 0 wait 2", 4, 3),
    ]
    request = llm.engine.add(SOME[1][:24], replace(GREEDY, max_tokens=40))
    while not request.stats.generated_tokens:
        llm.engine.step()
    for middle, passes, by_draft, by_middle in cases:
        before = [acceptance_so_far(request, rung) for rung in ("draft", "self")]
        events: list[str] = []
        draws = iter(middle)

        def draw(state: RoundState, logits: Any, at: Any, *_: Any, draws: Any = draws) -> torch.Tensor:
            return torch.full((len(logits),), next(draws) if at.rung == 1 else STANDS)

        with played(rounds, events), patch("rowcast.runtime.device_round.rounds.draw", draw):
            llm.engine.step()
        now = [acceptance_so_far(request, rung) for rung in ("draft", "self")]
        proposed = [after - then for then, after in zip(before, now, strict=True)]
        assert (" ".join(events), *proposed, list(draws)) == (passes, by_draft, by_middle, []), middle


def acceptance_so_far(request: Any, rung: str) -> int:
    """Proposals of a rung that were verified."""
    return sum(request.stats.rungs[rung].proposed) if rung in request.stats.rungs else 0


@pytest.mark.usefixtures("interpreted")
def test_passes_that_have_nothing_to_do_are_counted(models: dict[str, Path]) -> None:
    """What they read, and their time, is their rung's: here of two sequences, for which the device goes on to the end, unasked."""
    llm = LLM(models["target"], draft=models["target"], dtype="float32", device="cpu", ladder=ALL_STAND, block_size=4)
    executor: Any = llm.engine._executor
    rungs = [*executor._lower, executor._top]
    for rung in rungs:
        rung.view.bytes_read = lambda seq_id: 0
    requests = [llm.engine.add(SOME[1][:24], replace(GREEDY, max_tokens=30)) for _ in range(2)]

    def counted() -> list[list[tuple[int, float]]]:
        counts = [[request.stats.rungs[rung.name] for rung in rungs] for request in requests]
        return [[(each.bytes_read, each.seconds) for each in mine] for mine in counts]

    while not all(request.stats.rounds for request in requests):
        llm.engine.step()
    before = counted()
    events: list[str] = []
    with played(executor._rounds, events), patch("rowcast.runtime.device_round.rounds._seconds", lambda start, end: 64.0):
        llm.engine.step()
    assert " ".join(events) == "0 0 1 0 0 1 0 0 1 2"
    gained = [
        [(now[0] - then[0], now[1] - then[1]) for now, then in zip(*pair, strict=True)]
        for pair in zip(counted(), before, strict=True)
    ]
    for mine in gained:
        for number, rung, (bytes_read, seconds) in zip((6, 3, 1), rungs, mine, strict=True):
            assert bytes_read == number * rung.decoder.weights.bytes // 2
            assert seconds == pytest.approx(number * 32)


@pytest.mark.usefixtures("interpreted")
def test_simulated_proposals_stand_whatever_they_are(models: dict[str, Path]) -> None:
    llm = make_llm(models, "draft:kv=full,gamma=1 / self:kv=64,chunk=4,sinks=4,recent=8,gamma=3 / plain")
    llm.engine._executor._rounds._rates = {1: 1.0, 2: 0.0}  # type: ignore[attr-defined]
    outputs = llm.generate([SOME[1][:24]], replace(SEEDED, max_tokens=7))
    (by_draft, stood), (by_self, none) = acceptance(outputs, "draft"), acceptance(outputs, "self")
    assert by_draft == stood >= 3 and by_self >= 3 and none == 0


def test_simulated_acceptance_is_drawn_as_tokens_are() -> None:
    """From seeds, positions and the rung, not from a generator, of which each rank has its own; of sequences in parts as in one."""
    sequences, tokens, rate, generator = 16, 8, 0.3, torch.get_rng_state()
    state = RoundState(sequences, tokens, [1, 1, 1], 3, torch.device("cpu"))
    state["seeds"].copy_(torch.arange(sequences) * 7919)
    state["path"].fill_(3)

    def stands(rung: int, base: int, first: int = 0) -> torch.Tensor:
        at = state.inputs(rung, tokens, 4)
        at.positions.copy_((base + torch.arange(tokens)).repeat(sequences))
        drawn = torch.full(((sequences - first) * tokens,), 8)
        found = simulated(state, drawn, at, first * tokens, rate)
        assert set(found.tolist()) == {3, 8}
        return (found == 3).view(-1, tokens)

    coins, later, other = stands(1, 50), stands(1, 51, 8), stands(2, 50)
    assert torch.equal(coins[8:, 1:], later[:, :-1])
    assert len({tuple(row.tolist()) for row in coins}) >= 10
    assert 0.2 < coins.float().mean() < 0.4
    assert 0.3 < (coins != other).float().mean() < 0.55  # .42 where they are independent
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.usefixtures("interpreted")
def test_sequences_without_a_place_in_a_draft_s_cache_are_not_drafted_for(
    models: dict[str, Path], plain: dict[str, list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident, "MAX_SPECULATING_SEQS", 1)
    llm = make_llm(models, "draft:kv=48,sinks=4,gamma=2 / plain")
    outputs = llm.generate(SOME, [GREEDY, SEEDED])
    assert ids(outputs) == [plain["greedy"][0], plain["seeded"][1]]
    assert acceptance(outputs, "draft")[0]


@pytest.mark.usefixtures("interpreted")
def test_a_draft_s_cache_evicts_what_it_caught_up_with(models: dict[str, Path]) -> None:
    """It holds 83 entries, 48 of which a token sees: after a prompt that leaves no room for proposals, after one that was run in
    pieces, and after a pause. A round's first token sees what the definition in `kv.streaming` says."""
    llm = make_llm(models, "draft:kv=48,sinks=4,gamma=2 / plain", max_num_batched_tokens=90)
    store: Any = llm.engine._executor._lower[0].view  # type: ignore[attr-defined]
    assert store.block_size == 83
    begun: list[tuple[int, int]] = []
    real = store.reserve

    def reserve(step: SeqStep) -> tuple[list[int], int]:
        blocks, offset = real(step)
        begun.append((step.start, offset))
        return blocks, offset

    with patch.object(store, "reserve", side_effect=reserve):
        for tokens, more, pause in ((82, 3, range(0)), (120, 3, range(0)), (44, 8, range(46, 50))):
            [sequence] = llm.engine.add((SOME[1] * 4)[:tokens], replace(GREEDY, max_tokens=more)).sequences
            while llm.engine.has_work:
                llm.engine.scheduler.lookahead = 0 if sequence.length in pause else 2
                llm.engine.step()
    starts = [start for start, _ in begun]
    assert {82, 120, 44, 49} <= set(starts) and not set(starts) & {45, 46, 47, 48}
    assert begun == [(start, -32 * -(-max(0, start - 47) // 32)) for start in starts]
    llm.engine.check()


@pytest.mark.usefixtures("interpreted")
def test_a_prompt_of_one_token_is_no_decoding(models: dict[str, Path]) -> None:
    """Sparse rungs run prompts with all rows, so the device's rounds, whose tokens are all generated ones, leave it to the host."""
    llm = make_llm(models, "plain")
    rounds = llm.engine._executor._rounds  # type: ignore[attr-defined]
    with patch.object(rounds, "run", wraps=rounds.run) as run:
        llm.generate([[7]], replace(GREEDY, max_tokens=3))
    assert run.call_count == 2
