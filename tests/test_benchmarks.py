"""What benchmarks work out by themselves: placements by force, claims, expected tokens, prompts that are not run."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import _simulated
import cluster_requests
import hire
import offload_places
import opt_175b_floors
import real_text
import report
import triforce
from _figures import Figure, Session, variant
from _simulated import SimulatedLLM, skip_prompts

from rowcast.bench.shapes import open_shape
from rowcast.kernels.lowbit import BLOCK
from rowcast.placement.models import known_config
from rowcast.placement.plan import Plan
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.sparse.artefact import Calibration
from rowcast.runtime.sparse.lm_head import CertifiedHead
from rowcast.runtime.trace import Trace

GIB = 1 << 30


def test_late_keys_and_values_of_opt_175b() -> None:
    """A rank's rows for all heads' keys and values are 14.5 GB, and all of them are read within 16 tokens: those of a quarter of the
    heads by each token, those of the others by one of 16 tokens."""
    config = known_config("facebook/opt-175b")
    assert config is not None
    spec = spec_from_config(config)
    rows = 2 * 96 * 12_288**2 * 2 / 4
    assert rows / 16 == pytest.approx(0.906e9, rel=1e-3)
    quarter, every = (opt_175b_floors.Bytes(spec, 4, 0, opt_175b_floors.kept(96), heads) for heads in (0.25, 1.0))
    assert quarter.parts["attention"] == pytest.approx(rows * (0.25 + 0.25 + 0.75 / 16))
    assert every.parts["attention"] == 2 * rows
    assert {name for name in quarter.parts if quarter.parts[name] != every.parts[name]} == {"attention"}


def test_what_is_too_small_is_not_late() -> None:
    """Of OPT-6.7B's layers the rows of all keys and values are 67 MB: worth it on one rank, as 17 MB on each of four are not."""
    config = known_config("facebook/opt-6.7b")
    assert config is not None
    rows = 2 * 32 * 4096**2 * 2
    for ranks, written in ((1, 0.25 + 0.75 / 16), (4, 1.0)):
        floor = opt_175b_floors.Bytes(spec_from_config(config), ranks, 0, opt_175b_floors.kept(32), 0.25)
        assert floor.parts["attention"] == pytest.approx(rows / ranks * (0.25 + written))


CONFIG = {
    "model_type": "llama",
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}


@pytest.fixture
def shape(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


def held(plan: Plan, tier: str, part: str) -> int:
    assert plan.forecast is not None
    return sum(share.bytes for share in plan.forecast.shares if (share.tier, share.part) == (tier, part))


def test_two_ranks_place_half_of_the_model_each() -> None:
    spec = spec_from_config(open_shape("opt-66b").config)
    one, two = (offload_places.Budget(48 * GIB // world, 0.5, 128, "cuda", 256, world) for world in (1, 2))
    whole, half = (offload_places.streamed(spec, budget) for budget in (one, two))
    assert half.world == 2 and half.forecast is not None and half.forecast.shares[0].ranks == [0, 1]
    assert held(half, "streamed", "neurons") * 2 == pytest.approx(held(whole, "streamed", "neurons"), rel=0.01)
    kept = offload_places.filled(spec, two)
    assert 0 <= kept.margin_bytes < 0.02 * two.cap_bytes
    assert held(kept, "streamed", "neurons") < held(half, "streamed", "neurons")
    assert kept.weight_bytes + kept.kv_bytes + kept.rung_bytes + kept.work_bytes <= two.cap_bytes


def test_all_weights_in_four_bits_of_a_70b_shape_fit_beside_what_is_streamed() -> None:
    spec = spec_from_config(open_shape("llama-2-70b").config)
    plan = offload_places.low_bits(spec, offload_places.Budget(24 * GIB, 0, 600, "cuda", 256, 2), "self:bits=4,gamma=16 / plain")
    assert plan.margin_bytes > 0 and plan.rung_weight_bytes > 17e9


def test_claims_and_figures_are_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    session = Session("tried", "a shape", torch.device("cpu"))
    session.add(Figure(name="plain", s_per_token=0.02, floor_s=0.01, bytes=1e9, planned_s=0.03, peers={"other": 0.1}))
    session.claim("large", 3.0, 2.6)
    session.claim("small", 0.2, 0.05, at_most=True)
    assert session.end() == 0
    session.fail("more", "no room\nat all")
    assert session.end() == 1
    out, err = capsys.readouterr()
    told = json.loads(out.splitlines()[-1])
    assert [claim["met"] for claim in told["claims"]] == [True, False]
    assert told["failed"] == ["more: no room"] and told["figures"][0]["peers"] == {"other": 0.1}
    assert "planned 30.000 ms (+50%), other 100.00 ms (5.00x)" in err


CUT_OFF = """
import os, signal, sys, time
from _figures import Figure, Session
session = Session("tried", "a shape", "a device")
session.add(Figure(name="plain", s_per_token=0.02))
if sys.argv[1] == "forked" and not os.fork():
    signal.raise_signal(signal.SIGINT)
if sys.argv[1] == "ended":
    session.end()
try:
    print("ready", file=sys.stderr, flush=True)
    time.sleep(60)
finally:
    time.sleep(0.2)
    print("cleaned", file=sys.stderr, flush=True)
"""


@pytest.mark.parametrize(
    ("how", "number", "code"),
    [
        ("alone", signal.SIGINT, 130),
        ("alone", signal.SIGTERM, 143),
        ("forked", signal.SIGINT, 130),
        ("ended", signal.SIGTERM, -signal.SIGTERM),
    ],
)
def test_a_benchmark_that_is_cut_off_tells_what_it_has(how: str, number: signal.Signals, code: int) -> None:
    """Once, whoever else is sent the signal and however often, as `timeout` does; what it holds is given back."""
    folder = Path(__file__).parents[1] / "benchmarks"
    process = subprocess.Popen(
        [sys.executable, "-c", CUT_OFF, how], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    assert any(line == "ready\n" for line in process.stderr)
    process.send_signal(number)
    time.sleep(0.1)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    [line] = out.splitlines()
    assert process.returncode == code
    assert json.loads(line)["figures"][0]["name"] == "plain" and json.loads(line).get("cut_off") is (
        None if how == "ended" else True
    )
    assert ("cleaned" in err) is (code > 0) and "Traceback" not in err


BUSY_CHILD = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from _figures import Session
session = Session("tried", "a shape", "a device")
with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
    pool.submit(exec, "import sys; print('ready', file=sys.stderr, flush=True)\\nwhile True: pass").result()
"""


def test_a_benchmark_that_is_cut_off_does_not_wait_for_its_ranks() -> None:
    """Nor do they go on: they would hold its output."""
    folder = Path(__file__).parents[1] / "benchmarks"
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY_CHILD],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    try:
        assert any(line == "ready\n" for line in process.stderr)
        process.terminate()
        out, err = process.communicate(timeout=15)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 143 and json.loads(out)["cut_off"] and "Traceback" not in err


def test_a_rank_tells_stacks_once_while_others_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[float, dict[str, Any]]] = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda after_s, **how: asked.append((after_s, how)))
    monkeypatch.setattr(_simulated, "find_store", lambda *_: None)
    monkeypatch.setattr(_simulated, "join", lambda *_, **how: asked.append((how["timeout_s"], {})))
    monkeypatch.setattr(_simulated, "DistributedComm", lambda: None)
    monkeypatch.setattr(_simulated, "device_of", lambda _: torch.device("cpu"))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    assert _simulated._rank(lambda wish, *_: wish, "done", 0, 2, 1) == "done"
    (dumped_s, how), (waited_s, _) = asked
    assert dumped_s < waited_s and not how.get("repeat")


def test_the_page_says_what_was_simulated(capsys: pytest.CaptureFixture[str]) -> None:
    session = Session("tried", "a shape", torch.device("cpu"), note="Acceptance is simulated", bandwidth=2e12)
    session.add(Figure(name="plain", s_per_token=0.02, floor_s=0.01, bytes=1e9))
    session.end()
    kept = {"title": "Tried", "date": "2026-11-27", "command": "tried", "name": "tried-cpu"}
    lines = report.page([{**kept, "report": json.loads(capsys.readouterr().out)}]).splitlines()
    assert lines.index("**Acceptance is simulated.**") < next(i for i, line in enumerate(lines) if line.startswith("| plain"))
    assert "Floors are bytes at 2000 GB/s, which was measured in the same run." in lines


def test_a_text_that_was_learnt_from_is_noticed(tmp_path: Path) -> None:
    text, other, excerpt = (tmp_path / name for name in ("novel.txt", "wiki.txt", "elsewhere/novel.txt"))
    excerpt.parent.mkdir()
    for path in (text, other, excerpt):
        path.write_text(str(path))
    told = [{"name": path.name, "tokens": 100, "sha256": sha256(path.read_bytes()).hexdigest()} for path in (text, other)]
    (tmp_path / "rowcast.json").write_text(json.dumps({"texts": [told[0] | {"held_out": 5}, told[1] | {"held_out": 100}]}))
    (tmp_path / "model.gguf").touch()
    for model in (tmp_path, tmp_path / "model.gguf"):
        assert [real_text.learnt(str(model), path) for path in (text, excerpt, other)] == [True, True, False]
    assert not real_text.learnt("SmolLM2-135M-Instruct", text)


def test_tokens_of_a_round_are_those_that_its_proposals_give(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, and one more, where each stands."""
    monkeypatch.setattr(triforce, "WARM_ROUNDS", 1)
    llm = simulated(shape, "ngram:gamma=2 / self:kv=160,gamma=3 / plain", outer=1.0, inner=1.0)
    counted = triforce.run(llm, [[7] * 300], 40, 3)
    proposals = counted.rungs["self"].proposed
    assert counted.rounds == 3
    assert 1 + sum(proposals) / counted.rounds == counted.tokens / counted.rounds > 2
    assert (counted.warm_rounds, counted.new_graphs) == (1, 0)


def test_rounds_are_timed_once_none_has_needed_a_new_graph_for_a_while(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rounds that have one in the first, third and fourth, and again while they are timed."""
    llm = simulated(shape, "ngram:gamma=2 / plain", outer=1.0, inner=1.0)
    steps: list[Any] = []
    real = llm.engine.step

    def step() -> Any:
        steps.append(real())
        return steps[-1]

    monkeypatch.setattr(triforce, "WARM_ROUNDS", 2)
    monkeypatch.setattr(triforce, "new_graphs", lambda _: sum(len(steps) > round_ for round_ in (1, 3, 4, 8)))
    monkeypatch.setattr(llm.engine, "step", step)
    counted = triforce.run(llm, [[7] * 300], 60, 3)
    assert (counted.warm_rounds, counted.new_graphs) == (6, 1)


def test_a_prompt_that_is_not_run_has_all_its_entries(shape: str) -> None:
    llm = simulated(shape, "self:kv=160,gamma=2 / plain", outer=0.9, inner=0.5)
    ran: list[int] = []
    real = llm.engine._executor._top.decoder.run  # type: ignore[attr-defined]

    def counting(steps: Any, kv: Any) -> torch.Tensor:
        ran.append(sum(len(step.tokens) for step in steps))
        return real(steps, kv)  # type: ignore[no-any-return]

    llm.engine._executor._top.decoder.run = counting  # type: ignore[attr-defined]
    skip_prompts(llm)
    requests = [llm.engine.add([i] * 200, triforce_params()) for i in (5, 6)]
    while not all(request.stats.generated_tokens > 3 for request in requests):
        llm.engine.step()
    assert ran[:2] == [64, 64]
    view = llm.engine._executor._top.view  # type: ignore[attr-defined]
    assert sorted(view.length(seq.seq_id) >= 200 for request in requests for seq in request.sequences) == [True, True]


def triforce_params() -> Any:
    from rowcast import SamplingParams

    return SamplingParams(temperature=0.8, seed=1, max_tokens=30, ignore_eos=True, detokenize=False)


def simulated(shape: str, ladder: str, *, outer: float, inner: float) -> SimulatedLLM:
    llm = SimulatedLLM(
        open_shape(shape), ladder=ladder, dtype="float32", device="cpu", max_model_len=512, progress=False, prefix_cache=False
    )
    llm.rates(outer, inner)
    return llm


def test_the_structured_head_needs_few_rows(tmp_path: Path) -> None:
    """And the calibration beside it is one that opens."""
    config = variant(
        "llama-68m",
        tmp_path,
        "wide",
        hidden_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=4096,
        tie_word_embeddings=False,
    )
    opened = open_shape(config)
    spec = spec_from_config(opened.config)
    source = hire.Structured(spec, torch.device("cpu"))
    assert source.basis.shape[0] % BLOCK == 0
    (tmp_path / "calibration").mkdir()
    hire.write_directions(tmp_path / "calibration", opened, source.basis, 0.05)
    Calibration.open(tmp_path / "calibration", opened.source.fingerprint())
    embed = next(name for name in source.names() if "embed" in name)
    hidden = torch.nn.functional.normalize(source.read(embed, slice(0, 32)), dim=1) * 16
    head = CertifiedHead(source.read("lm_head.weight"), bits=(4, 3), directions=source.basis)
    top = head.top(hidden, 1)
    assert not top.fallback.any() and top.rescored.float().mean() < 0.05 * 4096
    dense = hidden @ source.read("lm_head.weight").T
    assert torch.equal(top.ids[:, 0], dense.argmax(1))


def test_graphs_are_counted_by_the_part_that_captured_them(tmp_path: Path) -> None:
    assert cluster_requests._graphs(tmp_path, [1.0, 2.0]) is None
    traces = [Trace(tmp_path, rank) for rank in (0, 1)]
    for trace in traces:
        for at in (5.0, 15.0, 16.0, 25.0):
            trace.span("plain", at - trace._epoch_s, 0.5)
            trace.span("capture", at - trace._epoch_s, 0.5)
        trace.close()
    assert cluster_requests._graphs(tmp_path, [10.0, 20.0, 22.0, 30.0]) == [1, 2, 0, 1]
