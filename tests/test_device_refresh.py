"""What a round on the device does beside its passes: retrieval views choose anew at its end, in one graph for all layers; each pass is
captured once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_device_rounds import GREEDY, SEEDED, SOME, make_llm, models  # noqa: F401
from test_speculation import SELF, ids
from triton_interpreting import take_arrays_as_bounds

from rowcast import LLM
from rowcast.kernels import gpu
from rowcast.placement import resident
from rowcast.runtime.device_round.graphs import Graphs
from rowcast.runtime.device_round.refresh import Refresh
from rowcast.runtime.kv.listed import ListedKV
from rowcast.runtime.kv.summaries import Summaries
from rowcast.runtime.trace import Trace

take_arrays_as_bounds()
TRIFORCE = f"draft:kv=48,sinks=4,gamma=1 / {SELF},gamma=2 / plain"

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")


class Replayed:
    """A graph of a CPU: it makes the calls again."""

    def __init__(self, calls: Callable[[], object]) -> None:
        self.replay = calls


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often what is dear is called, with graphs that capture as those of a GPU do."""
    counted: Counter[str] = Counter()

    def count(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def call(self: Any, *args: Any, **keywords: Any) -> Any:
            counted[f"{owner.__name__}.{name}"] += 1
            return function(self, *args, **keywords)

        monkeypatch.setattr(owner, name, call)

    monkeypatch.setattr(gpu, "interpreted", True)
    monkeypatch.setattr(Graphs, "_record", lambda self, calls: Replayed(calls))
    count(Graphs, "_record")
    count(ListedKV, "_choose")
    count(Summaries, "_summarise")
    return counted


def lists_seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, list[int]]]:
    """Of each round, as its sequences sit down: the sequence, the position from which it sees everything, and its chunks."""
    seen = []
    seat = ListedKV.seat

    def note(self: ListedKV, seq_id: int, row: int) -> int:
        recent = seat(self, seq_id, row)
        seen.append((seq_id, recent, self.lists(row + 1)[row].flatten().tolist()))
        return recent

    monkeypatch.setattr(ListedKV, "seat", note)
    return seen


def run(llm: LLM, tokens: int, sequences: int) -> tuple[list[list[int]], list[Any]]:
    llm.engine._executor._rounds._graphs._capture = True  # type: ignore[attr-defined]
    outputs = llm.generate(SOME[:sequences], [replace(params, max_tokens=tokens) for params in (GREEDY, SEEDED)[:sequences]])
    llm.engine.check()
    return ids(outputs), [{name: (c.accepted, c.judged) for name, c in output.metrics.rungs.items()} for output in outputs]


@pytest.mark.parametrize(("refresh", "tokens", "sequences"), [(1, 8, 2), (2, 11, 1)])
def test_views_see_the_chunks_that_they_would_have_chosen(
    models: dict[str, Any],  # noqa: F811
    calls: Counter[str],
    refresh: int,
    tokens: int,
    sequences: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ladder = TRIFORCE.replace(",gamma=2", f",refresh={refresh},gamma=2")
    seen = lists_seen(monkeypatch)
    with_graphs, by_graphs = run(make_llm(models, ladder), tokens, sequences), list(seen)
    by_host = calls["ListedKV._choose"]
    assert by_host == sequences  # of each sequence the first round's, by the prompt's queries
    assert any(chunk >= 0 for _, _, chunks in by_graphs for chunk in chunks)
    seen.clear()
    monkeypatch.setattr(Refresh, "ask", lambda *_: None)
    by_views = run(make_llm(models, ladder), tokens, sequences)
    assert seen == by_graphs
    assert by_views == with_graphs
    rounds = Counter(seq_id for seq_id, _, _ in seen)
    assert calls["ListedKV._choose"] - by_host == sum(-(-count // refresh) for count in rounds.values()) > by_host


def test_a_round_asks_for_few_calls_of_its_own(
    models: dict[str, Any],  # noqa: F811
    calls: Counter[str],
    tmp_path: Path,
) -> None:
    """After the first rounds nothing is captured, and views and summaries are brought up to date by graphs alone. A trace has what
    was captured."""
    llm = make_llm(models, TRIFORCE)
    rounds, trace = llm.engine._executor._rounds, Trace(tmp_path, 0)  # type: ignore[attr-defined]
    rounds._graphs._capture = True
    llm.engine._executor.record(trace)  # type: ignore[attr-defined]
    request = llm.engine.add(SOME[0], replace(SEEDED, max_tokens=14))
    while request.stats.rounds < 3:
        llm.engine.step()
    before, graphs = calls.copy(), (rounds._graphs.captured, rounds._graphs.first_calls)
    while request.stats.generated_tokens < 12:  # a last round without room for proposals has a pass of its own
        llm.engine.step()
    assert request.stats.rounds > 4
    assert (rounds._graphs.captured, rounds._graphs.first_calls) == graphs
    assert calls["ListedKV._choose"] == before["ListedKV._choose"] == 1
    assert calls["Summaries._summarise"] == before["Summaries._summarise"]
    trace.close()
    names = Counter(event["name"] for event in json.loads(trace.path.read_text()))
    assert names["capture"] == rounds._graphs.captured > 0


@pytest.mark.parametrize("sequences", [1, 4])
def test_what_rounds_hold_for_choices_is_planned(
    models: dict[str, Any],  # noqa: F811
    calls: Counter[str],
    sequences: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Lists, what they are chosen in and the last pass's queries: as many bytes as before the first round, and as planned within 5%."""
    seen = []
    counted = resident._round_bytes

    def note(spec: Any, seqs: int, context: int, needs: Any) -> int:
        without = replace(needs, row_bytes=0, list_work=(), query_bytes=0)
        seen.append(counted(spec, seqs, context, needs) - counted(spec, seqs, context, without))
        return counted(spec, seqs, context, needs)

    monkeypatch.setattr(resident, "_round_bytes", note)
    llm = make_llm(models, TRIFORCE, max_num_seqs=sequences)
    rounds: Any = llm.engine._executor._rounds  # type: ignore[attr-defined]
    [view] = rounds._refresh._stores.values()
    listed = view._ids.nbytes
    held = view.bytes - listed, rounds._refresh._queries.nbytes
    assert sum(held) <= seen[-1] <= 1.05 * sum(held)
    rounds._graphs._capture = True
    params = [replace(GREEDY, max_tokens=12)] * sequences
    llm.generate((SOME * 2)[:sequences], params)
    assert calls["Graphs._record"] > 0
    assert (view.bytes - listed, rounds._refresh._queries.nbytes) == held


@pytest.mark.usefixtures("calls")
def test_contexts_shorter_than_a_chunk(models: dict[str, Path]) -> None:  # noqa: F811
    """There are no chunks to choose from: all entries are seen."""
    short, params = [[5], [7, 9]], replace(GREEDY, max_tokens=6)
    expected = ids(make_llm(models, "plain").generate(short, params))
    ladder = "self:kv=64,sinks=4,recent=8,gamma=2 / plain"
    found = LLM(models["target"], dtype="float32", device="cpu", ladder=ladder, block_size=16).generate(short, params)
    assert ids(found) == expected
