"""What engines report of themselves, where that goes, and what each rank leaves behind of its time."""

from __future__ import annotations

import json
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import VOCAB, tiny_model
from warm_ranks import WarmLauncher

from rowcast import LLM, SamplingParams
from rowcast.cluster.gang import Limits
from rowcast.cluster.launcher import LocalLauncher
from rowcast.cluster.metrics import PrometheusExporter
from rowcast.cluster.replicas import Replicas
from rowcast.errors import UserError
from rowcast.runtime.densities import Densities
from rowcast.runtime.metrics import REPLICA, TABLE, EngineMetrics
from rowcast.runtime.scheduler import Scheduler
from rowcast.runtime.step import Moved, SeqResult

LIMITS = Limits(start_s=60, step_s=20, silence_s=1.0)
PARAMS = SamplingParams(temperature=0, max_tokens=12, detokenize=False, ignore_eos=True)
PROMPTS = [[(5 * i + j % 4) % VOCAB for j in range(6 + 5 * i)] for i in range(4)]
LADDER = "ngram / plain"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    tiny_model("llama-gqa", path)
    return path


@pytest.fixture(scope="module")
def launchers() -> Iterator[list[WarmLauncher]]:
    started = [WarmLauncher(), WarmLauncher()]
    yield started
    for launcher in started:
        launcher.close()


class Kept:
    """Implements `Exporter`: sums and last values by name and labels, and how often a histogram was fed."""

    def __init__(self) -> None:
        self.found: dict[str, dict[tuple[str, ...], float]] = defaultdict(lambda: defaultdict(float))

    def add(self, name: str, amount: float, labels: Mapping[str, str]) -> None:
        assert amount > 0
        self._of(name, "counter", labels)[tuple(labels.values())] += amount

    def set(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        self._of(name, "gauge", labels)[tuple(labels.values())] = value

    def observe(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        assert value > 0
        self._of(name, "histogram", labels)[tuple(labels.values())] += 1

    def _of(self, name: str, kind: str, labels: Mapping[str, str]) -> dict[tuple[str, ...], float]:
        [row] = [row for row in TABLE if row.name == name]
        assert row.kind == kind and tuple(labels) == (REPLICA, *row.labels)
        return self.found[name.removeprefix("rowcast_")]


def test_what_is_counted(model: Path) -> None:
    kept = Kept()
    llm = LLM(model, ladder="ngram:gamma=3 / plain", metrics=kept, max_num_seqs=2)
    outputs = llm.generate(PROMPTS, PARAMS)
    found = kept.found
    assert found["generated_tokens"] == {("0",): 48}
    assert found["prompt_tokens"] == {("0",): sum(map(len, PROMPTS))}
    assert found["requests"] == {("0", "length"): 4}
    for name in ("time_to_first_token_seconds", "time_per_output_token_seconds", "request_seconds"):
        assert found[name] == {("0",): 4}, name
    assert found["requests_running"] == found["requests_waiting"] == found["kv_usage"] == {("0",): 0}
    for name, field in (("drafts_proposed", "judged"), ("drafts_accepted", "accepted")):
        by_position: dict[tuple[str, ...], float] = defaultdict(float)
        for output in outputs:
            for position, count in enumerate(getattr(output.metrics.rungs["ngram"], field)):
                by_position["0", "ngram", str(position)] += count
        assert found[name] == {labels: count for labels, count in by_position.items() if count}
    assert found["drafts_accepted"]
    assert found["read_bytes"] == {("0", "host"): sum(sum(output.metrics.bytes_read.values()) for output in outputs)}
    assert found["dense_bytes"] == {("0", "host"): sum(output.metrics.dense_bytes for output in outputs)}
    assert not found["moved_bytes"] and not found["layer_density"]
    stream = llm.stream(PROMPTS[0], PARAMS)
    next(stream)
    assert found["requests_running"] == {("0",): 1}
    assert found["kv_usage"]["0",] > 0
    stream.close()
    assert found["requests"] == {("0", "length"): 4, ("0", "abort"): 1}


def test_density(model: Path) -> None:
    kept = Kept()
    llm = LLM(model, ladder="self:mlp=0.5,gamma=2 / plain", metrics=kept)
    [output] = llm.generate(PROMPTS[:1], replace(PARAMS, max_tokens=60))
    used, dense = kept.found["neurons_used"]["0", "self"], kept.found["neurons_dense"]["0", "self"]
    assert used / dense == pytest.approx(output.metrics.density["self"])
    assert used / dense == pytest.approx(0.5, abs=0.05)
    layers = kept.found["layer_density"]
    assert layers == {("0", "self", f"{layer}"): pytest.approx(0.5, abs=0.05) for layer in range(2)}


def test_what_came_over_a_link() -> None:
    kept = Kept()
    scheduler = Scheduler(num_blocks=1, block_size=4, max_num_seqs=1, max_batch_tokens=8)
    moved = Moved(weight_bytes=100, rows_moved=2, row_bytes=20, kv_bytes=3, kv_out_bytes=4, disk_bytes=50, stalled_s=0.25)
    results = [SeqResult(0, [1], moved=moved), SeqResult(1, [1], moved=moved), SeqResult(2, [1])]
    EngineMetrics(kept, memory="gpu").step(scheduler, results, 3, 0, 7, Densities(2))
    assert kept.found["moved_bytes"] == {("0", "bus"): 254, ("0", "disk"): 100}
    assert kept.found["stalled_seconds"] == {("0",): 0.5} and kept.found["dense_bytes"] == {("0", "gpu"): 7}


def test_off_by_default(model: Path) -> None:
    assert LLM(model).engine.metrics is None


def test_failures_are_counted(model: Path, launchers: list[WarmLauncher]) -> None:
    kept = Kept()
    launchers[0].faults = [{1: "die@3"}, {0: "raise@2"}]
    with LLM(model, ladder=LADDER, tensor_parallel_size=2, launcher=launchers[0], limits=LIMITS, metrics=kept) as llm:
        llm.generate(PROMPTS, PARAMS)
    assert kept.found["rank_failures"] == kept.found["lost_steps"] == {("0",): 2}
    assert kept.found["generated_tokens"] == {("0",): 48}


def test_replicas_are_told_from_each_other(model: Path, launchers: list[WarmLauncher]) -> None:
    kept = Kept()
    for launcher in launchers:
        launcher.faults = []
    with Replicas(
        model, data_parallel_size=2, launcher=launchers.__getitem__, limits=LIMITS, ladder=LADDER, metrics=kept, max_num_seqs=2
    ) as two:
        two.generate(PROMPTS, PARAMS)
    assert sum(kept.found["generated_tokens"].values()) == 48
    assert set(kept.found["generated_tokens"]) == {("0",), ("1",)}


def test_prometheus(model: Path) -> None:
    client: Any = pytest.importorskip("prometheus_client")
    registry = client.CollectorRegistry()
    LLM(model, ladder=LADDER, metrics=PrometheusExporter(registry)).generate(PROMPTS, PARAMS)
    lines = client.generate_latest(registry).decode().splitlines()
    assert 'rowcast_generated_tokens_total{replica="0"} 48.0' in lines
    assert 'rowcast_time_to_first_token_seconds_count{replica="0"} 4.0' in lines
    assert 'rowcast_requests_running{replica="0"} 0.0' in lines


def test_served_at_a_port(model: Path, unused_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("prometheus_client")
    monkeypatch.setenv("ROWCAST_METRICS", str(unused_port))
    LLM(model, ladder=LADDER).generate(PROMPTS, PARAMS)
    LLM(model, ladder=LADDER)  # a second one adds to the same
    with urllib.request.urlopen(f"http://127.0.0.1:{unused_port}/metrics", timeout=10) as answer:
        assert 'rowcast_generated_tokens_total{replica="0"} 48.0' in answer.read().decode()


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_refusals(model: Path) -> None:
    for wrong in ("nowhere", "0", "70000"):
        with pytest.raises(UserError, match=f"metrics='{wrong}' is not known: use auto, ray, prometheus or a port"):
            LLM(model, metrics=wrong)


def test_ray(model: Path) -> None:
    """Read back where Prometheus would ask the node."""
    ray: Any = pytest.importorskip("ray")
    with pytest.raises(UserError, match="connected to Ray"):
        LLM(model, metrics="ray")
    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=100 << 20,
        include_dashboard=False,
        log_to_driver=False,
        _system_config={"metrics_report_interval_ms": 500},
    )
    try:
        LLM(model, ladder=LADDER, metrics="auto").generate(PROMPTS, PARAMS)
        [node] = ray.nodes()
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        until = time.monotonic() + 30
        found: list[str] = []
        while not found and time.monotonic() < until:
            time.sleep(0.5)
            with urllib.request.urlopen(url, timeout=10) as answer:
                lines = answer.read().decode().splitlines()
            found = [line for line in lines if line.startswith("ray_rowcast_generated_tokens") and not line.endswith(" 0.0")]
        assert found and found[0].endswith(" 48.0") and 'replica="0"' in found[0]
    finally:
        ray.shutdown()


def events(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())
    return found


def test_a_trace_and_a_log_of_each_rank(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ROWCAST_TRACE", str(tmp_path / "traces"))
    monkeypatch.setenv("ROWCAST_LOG", "info")
    ladder = "self:mlp=0.5,gamma=2 / plain"
    with LLM(model, ladder=ladder, tensor_parallel_size=2, launcher=LocalLauncher(), limits=LIMITS) as llm:
        llm.generate(PROMPTS, PARAMS)
    err = capfd.readouterr().err
    assert "INFO rowcast: rank 0: process" in err and "INFO rowcast: rank 1: process" in err
    paths = sorted((tmp_path / "traces").iterdir())
    assert [path.name.rsplit("-", 1)[0] for path in paths] == ["rank-0", "rank-1"]
    for rank, path in enumerate(paths):
        told, *spans = events(path)
        assert told["args"] == {"name": f"rank {rank}"} and {span["pid"] for span in spans} == {rank}
        by_name: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for span in spans:
            by_name[span["name"]].append(span)
        assert set(by_name) == {"command", "self", "plain"}
        assert all(span["dur"] > 0 for span in spans)
        commands = [(span["ts"], span["ts"] + span["dur"]) for span in by_name["command"] if span["args"]["tokens"]]
        assert commands == sorted(commands)
        for ran in by_name["plain"]:  # each inside a command
            assert any(start - 50 <= ran["ts"] and ran["ts"] + ran["dur"] <= end + 50 for start, end in commands)


def test_a_trace_of_the_one_rank(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROWCAST_TRACE", str(tmp_path))
    llm = LLM(model, ladder=LADDER)
    llm.generate(PROMPTS[:1], PARAMS)
    llm.shutdown()
    llm.generate(PROMPTS[:1], PARAMS)  # goes on, and is not recorded
    [path] = tmp_path.iterdir()
    assert {event["name"] for event in events(path)} == {"process_name", "plain"}
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ROWCAST_TRACE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot be written"):
        LLM(model)
