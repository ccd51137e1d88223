"""Ranks that die, freeze, raise or lie: seen within seconds, the gang built anew, the output that of an undisturbed run."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import VOCAB, tiny_model
from warm_ranks import WarmLauncher

from rowcast import LLM, GangError, OutOfMemoryError, SamplingParams
from rowcast.cluster.executor import GangExecutor
from rowcast.cluster.gang import Gang, Limits
from rowcast.cluster.launcher import LocalLauncher
from rowcast.cluster.wire import Done
from rowcast.errors import UserError
from rowcast.runtime.stream import Stream

LIMITS = Limits(start_s=60, step_s=20, silence_s=1.0)
BASE: dict[str, Any] = {"detokenize": False, "ignore_eos": True, "max_tokens": 14}
PARAMS = [
    SamplingParams(temperature=0, **BASE),
    SamplingParams(temperature=0.9, seed=7, n=2, **BASE),
    SamplingParams(temperature=0.8, seed=8, repetition_penalty=1.2, logprobs=2, **BASE),
]
PROMPTS = [[(5 * i + j * j) % VOCAB for j in range(6 + 9 * i)] for i in range(3)]
LADDER = "ngram / plain"


@pytest.fixture(scope="module")
def launcher() -> Iterator[WarmLauncher]:
    started = WarmLauncher()
    yield started
    started.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    tiny_model("llama-gqa", path)
    return path


@pytest.fixture(scope="module")
def undisturbed(model: Path) -> list[list[list[int]]]:
    return tokens(LLM(model, ladder=LADDER))


def gang(model: Path, launcher: Any, *faults: dict[int, str], **arguments: Any) -> LLM:
    """Two ranks; `faults` of the first gangs."""
    if faults:
        launcher.faults = list(faults)
    return LLM(model, **{"tensor_parallel_size": 2, "launcher": launcher, "limits": LIMITS, "ladder": LADDER, **arguments})


def executor(llm: LLM) -> GangExecutor:
    found = llm.engine._executor
    assert isinstance(found, GangExecutor)
    return found


def pids(llm: LLM) -> list[int]:
    found = executor(llm).gang
    assert found is not None
    return found.pids


def tokens(llm: LLM) -> list[list[list[int]]]:
    return [[sample.token_ids for sample in output.outputs] for output in llm.generate(PROMPTS, PARAMS)]


def gone(found: list[int], within_s: float) -> bool:
    until = time.monotonic() + within_s
    while any(Path(f"/proc/{pid}").exists() for pid in found):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize(
    ("rank", "fault", "told"),
    [
        (0, "die@5", "rank 0 has ended"),
        (1, "die@5", "rank 1 has ended"),
        (1, "die@1", "rank 1 has ended"),
        (0, "freeze@4", "rank 0 gave no sign of life for 1 s"),
        (1, "freeze@6", "rank 1 gave no sign of life for 1 s"),
        (0, "raise@3", "rank 0 raised RuntimeError: a fault was asked for"),
        (1, "raise@11", "rank 1 raised RuntimeError: a fault was asked for"),
        (1, "lie@4", "the ranks do not agree"),
        (1, "die@load", "rank 1 has ended"),
    ],
)
def test_a_fault_changes_nothing(
    launcher: WarmLauncher,
    model: Path,
    undisturbed: list[list[list[int]]],
    rank: int,
    fault: str,
    told: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    started = time.monotonic()
    with gang(model, launcher, {rank: fault}) as llm:
        assert tokens(llm) == undisturbed
        assert time.monotonic() - started < 15
        assert executor(llm).failures == 1
        llm.engine.check()
        assert tokens(llm) == undisturbed
    [warning] = [record.message for record in caplog.records if "starting all ranks again" in record.message]
    assert told in warning


@pytest.mark.parametrize("fault", ["die@6", "raise@5"])
def test_a_stream_gets_each_token_once(
    launcher: WarmLauncher, model: Path, undisturbed: list[list[list[int]]], fault: str
) -> None:
    with gang(model, launcher, {1: fault}, {0: fault}) as llm:
        gained = [token for chunk in llm.stream(PROMPTS[0], PARAMS[0]) for token in chunk.token_ids]
        assert gained == undisturbed[0][0]
        assert executor(llm).failures == 2


def test_a_rank_that_dies_between_requests(launcher: WarmLauncher, model: Path, undisturbed: list[list[list[int]]]) -> None:
    with gang(model, launcher) as llm:
        before = pids(llm)
        os.kill(before[1], signal.SIGKILL)
        assert gone(before[1:], 5)
        assert tokens(llm) == undisturbed
        assert gone(before, 0) and set(pids(llm)).isdisjoint(before)


@pytest.mark.parametrize("fault", ["raise@3", "die@6", "die@load"])
def test_too_many_failures_end_all_requests(launcher: WarmLauncher, model: Path, fault: str) -> None:
    """Good steps in between do not count, if they are few."""
    faults: list[dict[int, str]] = [{}, {1: fault}, {1: fault}] if fault == "die@load" else [{1: fault}] * 3
    with gang(model, launcher, *faults) as llm:
        if fault == "die@load":
            os.kill(pids(llm)[0], signal.SIGKILL)
        streams: list[Stream] = []

        def all_at_once() -> None:
            streams.extend(llm.stream(prompt, replace(PARAMS[0], max_tokens=80)) for prompt in PROMPTS)
            while True:
                for stream in streams:
                    next(stream)

        with pytest.raises(GangError, match="failed 3 times"):
            all_at_once()
        for stream in streams:
            with pytest.raises(GangError, match="failed 3 times"):
                list(stream)
        with pytest.raises(GangError, match="make a new LLM"):
            llm.generate(PROMPTS, PARAMS)
        for stream in streams:
            stream.close()
        llm.engine.check()
        if fault != "die@load":
            assert gone(pids(llm), 0)


def test_one_rank_out_of_memory_is_no_failure(launcher: WarmLauncher, model: Path, undisturbed: list[list[list[int]]]) -> None:
    """The others wait for it: the gang is built anew, but the request is to blame."""
    with gang(model, launcher, {1: "starve@3"}) as llm:
        with pytest.raises(OutOfMemoryError, match="as was asked for"):
            llm.generate(PROMPTS, PARAMS)
        started = launcher.started
        assert tokens(llm) == undisturbed
        assert launcher.started == started + 1
        assert executor(llm).failures == 0


def test_a_rank_that_cannot_load_is_told_in_one_sentence(launcher: WarmLauncher, tmp_path: Path) -> None:
    started = launcher.started
    tiny_model("llama-gqa", tmp_path)
    with gang(tmp_path, launcher, ladder="plain") as two:
        (tmp_path / "model.safetensors").unlink()
        os.kill(pids(two)[0], signal.SIGKILL)
        with pytest.raises(UserError, match="safetensors"):
            two.generate(PROMPTS[:1], PARAMS[0])
    assert launcher.started == started + 2


def test_an_interrupted_step_is_made_up_for(
    launcher: WarmLauncher, model: Path, undisturbed: list[list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gather, calls = Gang._gather, 0

    def interrupted(self: Gang, wanted: Any, *arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += wanted is Done
        if calls == 9:
            calls += 1
            raise KeyboardInterrupt
        return gather(self, wanted, *arguments, **named)

    with gang(model, launcher) as llm:
        monkeypatch.setattr(Gang, "_gather", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, PARAMS)
        assert tokens(llm) == undisturbed
        llm.engine.check()
        assert executor(llm).failures == 0


def test_shutdown(launcher: WarmLauncher, model: Path) -> None:
    llm = gang(model, launcher)
    found = pids(llm)
    llm.shutdown()
    assert gone(found, 0)
    llm.shutdown()
    with pytest.raises(GangError, match="shut down"):
        llm.generate(PROMPTS[:1], PARAMS[0])
    dropped = gang(model, launcher)
    found = pids(dropped)
    del dropped
    gc.collect()
    assert gone(found, 0)


def test_limits_are_checked() -> None:
    with pytest.raises(UserError, match="failures=0"):
        Limits(failures=0)


DRIVER = """
import sys
from rowcast import LLM, SamplingParams
from rowcast.cluster.launcher import LocalLauncher
if __name__ == "__main__":
    llm = LLM(sys.argv[1], tensor_parallel_size=2, launcher="local", ladder="plain")
    print(*llm.engine._executor.gang.pids, flush=True)
    while True:
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=100, detokenize=False, ignore_eos=True))
"""


def test_ranks_of_a_killed_driver_end_themselves(model: Path) -> None:
    """In the middle of generating."""
    folder = model / "temporary"
    folder.mkdir()
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(model)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(folder)},
    )
    try:
        assert driver.stdout is not None
        found = [int(pid) for pid in driver.stdout.readline().split()]
        assert len(found) == 2
        assert all(Path(f"/proc/{pid}").exists() for pid in found)
        assert list(folder.glob("rowcast-*"))
    finally:
        driver.kill()
        driver.communicate()
    assert gone(found, 5)
    assert not list(folder.glob("rowcast-*"))


def test_processes_of_this_machine(model: Path, undisturbed: list[list[list[int]]], caplog: pytest.LogCaptureFixture) -> None:
    """The launcher that users have: a rank is killed by hand in mid-stream."""
    with gang(model, LocalLauncher()) as llm:
        before = pids(llm)
        stream = llm.stream(PROMPTS[0], PARAMS[0])
        gained = list(next(stream).token_ids)
        os.kill(before[0], signal.SIGKILL)
        gained += [token for chunk in stream for token in chunk.token_ids]
        assert gained == undisturbed[0][0]
        assert gone(before, 0)
        after = pids(llm)
    assert gone(after, 0)
    assert "rank 0 was killed by SIGKILL" in caplog.text
