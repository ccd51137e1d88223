"""Replicas on several nodes, requests that are cancelled, and the end of everything."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import VOCAB, tiny_model
from warm_ranks import WarmLauncher

from rowcast import LLM, GangError, Replicas, SamplingParams
from rowcast.cluster.executor import GangExecutor
from rowcast.cluster.gang import Limits
from rowcast.errors import UserError

LIMITS = Limits(start_s=150, step_s=20, silence_s=1.0)
BASE: dict[str, Any] = {"detokenize": False, "ignore_eos": True, "max_tokens": 14}
PARAMS = [SamplingParams(temperature=0.9, n=1 + i % 2, **BASE) for i in range(6)]
PROMPTS = [[(5 * i + j * j) % VOCAB for j in range(6 + 5 * i)] for i in range(6)]
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


@pytest.fixture(scope="module")
def alone(model: Path) -> list[list[list[int]]]:
    """Of one rank; the requests' seeds derive from the model's."""
    return tokens(LLM(model, ladder=LADDER, seed=5))


def tokens(llm: LLM | Replicas, params: list[SamplingParams] | None = None) -> list[list[list[int]]]:
    outputs = llm.generate(PROMPTS, params or PARAMS)
    return [[sample.token_ids for sample in output.outputs] for output in outputs]


def replicas(model: Path, launchers: list[WarmLauncher], *faults: list[dict[int, str]], **arguments: Any) -> Replicas:
    """Two; `faults` by replica, then as in `WarmLauncher`."""
    for launcher, found in zip(launchers, faults or [[], []], strict=True):
        launcher.faults = list(found)
    given = {"limits": LIMITS, "retry_s": 0.5, "ladder": LADDER, "seed": 5, **arguments}
    return Replicas(model, data_parallel_size=2, launcher=launchers.__getitem__, **given)


def executor(llm: LLM) -> GangExecutor:
    found = llm.engine._executor
    assert isinstance(found, GangExecutor)
    return found


def both_up(two: Replicas, within_s: float) -> bool:
    until = time.monotonic() + within_s
    while two.up != [0, 1]:
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def gone(found: list[int], within_s: float) -> bool:
    until = time.monotonic() + within_s
    while any(Path(f"/proc/{pid}").exists() for pid in found):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def test_a_cancelled_request_leaves_a_gang(model: Path, launchers: list[WarmLauncher]) -> None:
    """In mid-stream: the others go on as if it had never been, all ranks forget it, and its memory comes back."""
    launchers[0].faults = []
    long = SamplingParams(temperature=0, **{**BASE, "max_tokens": 60})
    [undisturbed] = LLM(model, ladder=LADDER).generate(PROMPTS[1:2], long)
    with LLM(model, ladder=LADDER, tensor_parallel_size=2, launcher=launchers[0], limits=LIMITS) as llm:
        kept, closed, dropped = llm.stream(PROMPTS[1], long), llm.stream(PROMPTS[2], long), llm.stream(PROMPTS[3], long)
        gained = list(next(kept).token_ids)
        next(closed)
        closed.close()
        llm.engine.check()  # on every rank
        assert list(closed) == []
        del dropped
        gained += [token for chunk in kept for token in chunk.token_ids]
        assert gained == undisturbed.outputs[0].token_ids
        queued = llm.engine.add(PROMPTS[4], long)
        llm.engine.abort(queued)
        assert queued.output().outputs[0].finish_reason == "abort"
        next(iter(llm.iterate(PROMPTS, long)))  # and no more: the others are cancelled
        assert not llm.engine.has_work
        llm.engine.check()
        assert executor(llm).failures == 0


def test_replicas_give_one_ranks_tokens(model: Path, launchers: list[WarmLauncher], alone: list[list[list[int]]]) -> None:
    """Of two ranks each, and of one; then a second batch, one that is dropped, and the end."""
    with replicas(model, launchers, tensor_parallel_size=2) as two:
        outputs = two.generate(PROMPTS, PARAMS)
        assert [[sample.token_ids for sample in output.outputs] for output in outputs] == alone
        assert [output.request_id for output in outputs] == [str(i) for i in range(6)]
        next(iter(two.iterate(PROMPTS, PARAMS)))  # and no more: the others are cancelled
        greedy = [replace(params, temperature=0.0, n=1) for params in PARAMS]
        assert tokens(two, greedy) == tokens(LLM(model), greedy)
        with pytest.raises(UserError, match=r"prompt 2 of 2: .*outside the vocabulary"):
            two.generate([[1], [VOCAB]], PARAMS[0])
        assert two.up == [0, 1]
        lengths = [2, *[90] * 5]
        left = two.iterate(PROMPTS, [replace(PARAMS[0], max_tokens=length) for length in lengths])
        next(left)
    with pytest.raises(GangError, match="shut down"):
        list(left)
    with pytest.raises(GangError, match="shut down"):
        two.generate(PROMPTS, PARAMS)
    two.shutdown()
    with replicas(model, launchers) as single:
        assert tokens(single) == alone


@pytest.mark.parametrize("fault", ["die@4", "raise@3", "freeze@5"])
def test_a_failed_replicas_requests_go_to_the_other(
    model: Path, launchers: list[WarmLauncher], alone: list[list[list[int]]], fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    with replicas(model, launchers, [{1: fault}], [], tensor_parallel_size=2) as two:
        assert tokens(two) == alone
        assert both_up(two, 20)
    assert "replica 0 is lost" in caplog.text and "replica 0 is back" in caplog.text


def test_a_request_that_kills_every_replica(model: Path, launchers: list[WarmLauncher]) -> None:
    faults = [{0: "die@2"}] * 4
    with replicas(model, launchers, faults, faults) as two, pytest.raises(GangError, match="failed 3 times"):
        two.generate(PROMPTS[:1], PARAMS[0])


def test_replicas_that_cannot_be(model: Path, launchers: list[WarmLauncher]) -> None:
    for wrong in (0, True, 5000):
        with pytest.raises(UserError, match="data_parallel_size"):
            Replicas(model, data_parallel_size=wrong, launcher=launchers.__getitem__)
    with pytest.raises(UserError, match="tensor_parallel_size=3"):
        replicas(model, launchers, tensor_parallel_size=3)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """Two of 2 CPUs for ranks, and a head that has none to spare."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    ray: Any = pytest.importorskip("ray")
    quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
    small = {"object_store_memory": 100 << 20}
    cluster: Any = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": quick, **small}
    )
    try:
        cluster.workers = [cluster.add_node(num_cpus=2, **small) for _ in range(2)]
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def raylet(node: Any) -> int:
    """Its process id."""
    from ray._private.ray_constants import PROCESS_TYPE_RAYLET

    return int(node.all_processes[PROCESS_TYPE_RAYLET][0].process.pid)


def test_two_nodes_and_one_of_them_dies(
    model: Path, nodes: Any, alone: list[list[list[int]]], caplog: pytest.LogCaptureFixture
) -> None:
    ray: Any = pytest.importorskip("ray")
    limits = replace(
        LIMITS, silence_s=5.0
    )  # Ray tells of the dead; ranks that share two busy cores with two nodes may be slow to
    given: dict[str, Any] = {"tensor_parallel_size": 2, "limits": limits, "retry_s": 1.0, "ladder": LADDER, "seed": 5}
    with Replicas(model, data_parallel_size=2, launcher="ray", **given) as two:
        groups = [group for group in ray.util.placement_group_table().values() if group["state"] == "CREATED"]
        on = [frozenset(group["bundles_to_node_id"].values()) for group in groups]
        assert len(on) == 2 and all(len(each) == 1 for each in on) and on[0] != on[1]  # a gang a node
        assert tokens(two) == alone
        long = [SamplingParams(temperature=0, **{**BASE, "max_tokens": 60})] * 6
        expected = tokens(LLM(model, ladder=LADDER), long)
        iterator = two.iterate(PROMPTS, long)
        first = next(iterator)
        killed = time.monotonic()
        os.kill(raylet(nodes.workers[1]), signal.SIGKILL)
        rest = list(iterator)
        assert [[sample.token_ids for sample in output.outputs] for output in [first, *rest]] == expected
        assert time.monotonic() - killed < LIMITS.start_s
        while len(two.up) == 2:  # its ranks go on for a moment
            assert tokens(two, long) == expected
            assert time.monotonic() - killed < LIMITS.start_s
        assert tokens(two, long) == expected
        assert len(two.up) == 1
        nodes.workers[1] = nodes.add_node(num_cpus=2, object_store_memory=100 << 20)
        assert both_up(two, LIMITS.start_s)
        assert tokens(two, long) == expected
    assert "is lost, others take its" in caplog.text and "is back" in caplog.text
    assert gone_actors(ray)


def gone_actors(ray: Any) -> bool:
    """Whether all CPUs are free again."""
    until = time.monotonic() + 15
    while ray.available_resources().get("CPU") != ray.cluster_resources().get("CPU"):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True
