"""The same over Ray: one local cluster for all tests, with GPUs that are none."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model

from rowcast import LLM, SamplingParams
from rowcast.cluster.executor import GangExecutor
from rowcast.cluster.gang import Limits
from rowcast.errors import UserError

ray: Any = pytest.importorskip("ray")

from rowcast.cluster import jobs  # noqa: E402
from rowcast.cluster.ray_launcher import RayLauncher, RayRanks, _device, connect  # noqa: E402

PARAMS = SamplingParams(temperature=0.8, seed=3, max_tokens=20, detokenize=False, ignore_eos=True)
PROMPT = [5, 9, 5, 9, 5, 9, 2, 7]
START_S = 150.0
"""For actors to start, on cores that other tests share."""


@pytest.fixture(scope="session", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, num_gpus=2, object_store_memory=100 << 20, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    tiny_model("llama-gqa", path)
    return path


def gone(pids: list[int], within_s: float) -> bool:
    until = time.monotonic() + within_s
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def free_cpus(count: int, within_s: float) -> bool:
    """Whether Ray has `count` CPUs to give: it learns of those that a dead actor held a while after the process is gone."""
    until = time.monotonic() + within_s
    while ray.available_resources().get("CPU", 0) != count:
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize(
    ("gpu", "visible", "number"), [("1", None, 1), ("1", "", 1), ("3", "2,3", 1), ("2", "2,3", 0), ("0", "0", 0)]
)
def test_a_rank_names_its_gpu_as_its_process_sees_it(gpu: str, visible: str | None, number: int) -> None:
    """Ray calls it as the machine does, in a cluster that was given some of the GPUs only, too."""
    assert _device(gpu, visible) == number


def test_actors_give_the_same_tokens_and_survive_a_death(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    [alone] = LLM(model, ladder="ngram / plain").generate([PROMPT], PARAMS)
    with LLM(
        model, ladder="ngram / plain", tensor_parallel_size=2, launcher=RayLauncher(gpus=1), limits=Limits(start_s=START_S)
    ) as llm:
        executor = llm.engine._executor
        assert isinstance(executor, GangExecutor)
        assert executor.gang is not None
        before = executor.gang.pids
        stream = llm.stream(PROMPT, PARAMS)
        gained = list(next(stream).token_ids)
        killed = time.monotonic()
        os.kill(before[1], signal.SIGKILL)
        gained += next(stream).token_ids
        assert time.monotonic() - killed < START_S
        gained += [token for chunk in stream for token in chunk.token_ids]
        assert gained == alone.outputs[0].token_ids
        assert executor.failures == 1
        after = executor.gang.pids
        assert set(after).isdisjoint(before)
    assert gone([*before, *after], 5)
    assert free_cpus(2, 30)


def test_a_place_that_there_is_not(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(
        UserError, match=r"no place within 1 s for 2 ranks of 1 CPU, 2 GPU each .* have 2 CPU, 2 GPU.* `ray status`"
    ):
        LLM(model, tensor_parallel_size=2, launcher=RayLauncher(gpus=2, place_s=1))
    with pytest.raises(UserError, match=r"have 2 CPU, 2 GPU.*, or start a node with `ray start --num-cpus 3`"):
        LLM(model, tensor_parallel_size=2, launcher=RayLauncher(cpus=1.5, place_s=1))
    assert "no node of the Ray cluster has room for 2 ranks of 1.5 CPU, 0 GPU each: waiting up to 1 s" in caplog.text
    assert free_cpus(2, 30)


@pytest.mark.parametrize("gone", ["none", "another"])
def test_a_ray_that_went_first_is_not_asked(gone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a process's end Ray may be shut down before its ranks are; any question would start it anew, or be refused by another one."""
    ranks = RayRanks([None], [None], None)  # type: ignore[arg-type]
    if gone == "none":
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
    else:
        ranks._node = "that of a cluster before"
    assert ranks.dead() == {0: "ended with the Ray that it was placed by"}
    assert ranks.wait(5)
    ranks.kill()


@pytest.mark.parametrize(
    ("named", "runs", "joined"),
    [
        (None, True, ["auto"]),
        (None, False, ["local"]),
        ("local", True, ["local"]),
        ("auto", True, ["auto"]),
        ("10.1.2.3:6379", True, ["auto"]),
        ("ray://10.1.2.3", True, ["auto"]),
    ],
)
def test_whose_cluster_is_used(
    named: str | None, runs: bool, joined: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One that nobody named is joined, and said to be."""
    asked: list[str] = []

    monkeypatch.setattr(ray, "is_initialized", lambda: bool(asked))
    monkeypatch.setattr(ray, "init", lambda address, **_: asked.append(address))
    monkeypatch.setattr(jobs, "found_here", lambda: "10.1.2.3:6379" if runs else None)
    monkeypatch.setattr(jobs, "answers", lambda address: address.removeprefix("ray://").startswith("10.1.2.3"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if named:
        monkeypatch.setenv("RAY_ADDRESS", named)
    connect(1)
    assert asked == joined
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any("RAY_ADDRESS=local starts" in line for line in warned) == (named is None and runs)


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a cluster that was killed, which Ray finds."""
    address = f"127.0.0.1:{jobs._free_port()}"
    monkeypatch.setattr(ray._private.services, "find_gcs_addresses", set)
    monkeypatch.setattr(ray._private.services, "find_bootstrap_address", lambda _: address)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return address.replace("127.0.0.1", ray.util.get_node_ip_address())


def test_a_killed_cluster_that_is_found(killed: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Ray would try for minutes to reach it."""
    asked: list[str] = []
    monkeypatch.setattr(ray, "init", lambda address, **_: asked.append(address))
    connect(1)
    assert asked == ["local"]
    assert f"the Ray cluster that was found at {killed} does not answer: ranks are placed by one of their own" in caplog.text


@pytest.mark.parametrize("named", ["HOST:PORT", "HOST", "ray://HOST:PORT", "auto"])
def test_a_named_cluster_that_does_not_answer(named: str, killed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks elsewhere were asked for: none of this machine's own take their place."""
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("it was not asked first whether one answers"))
    host, port = killed.split(":")
    monkeypatch.setenv("RAY_ADDRESS", named.replace("HOST", host).replace("PORT", port))
    where = f"auto, {killed}" if named == "auto" else os.environ["RAY_ADDRESS"]
    with pytest.raises(UserError, match=f"no Ray cluster answers at RAY_ADDRESS={where}: start one there, or set it to local"):
        connect(1)


def test_a_named_cluster_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Something answers there, which Ray cannot connect to."""

    def init(address: str, **_: object) -> None:
        assert address == "auto"
        raise ConnectionError

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(jobs, "answers", lambda _: True)
    monkeypatch.setenv("RAY_ADDRESS", "10.1.2.3:6379")
    with pytest.raises(UserError, match=r"no Ray cluster answers at RAY_ADDRESS=10\.1\.2\.3:6379: start"):
        connect(1)
