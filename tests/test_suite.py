"""The suite of benchmarks: which job runs where and when, what stands in its commands, what is done, what ends at the deadline."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import suite
from suite import Suite, done, report_line
from suite_jobs import JOBS, Job

ROOT = Path(__file__).parents[1]


def job(name: str, command: str, **more: object) -> Job:
    return Job(**{"name": name, "command": command, "seconds": 0.1, "memory": 10.0, **more})  # type: ignore[arg-type]


def lives(pid: str) -> bool:
    try:
        return Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def run(folder: Path, *jobs: Job, gpus: tuple[float, ...] = (80.0,), limit_s: float = 20.0) -> Suite:
    places = {"python": shlex.quote(sys.executable), "work": str(folder)}
    made = Suite(folder, jobs, gpus, [str(at) for at in range(len(gpus))], places, limit_s)
    made.run()
    assert not made.running
    return made


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_commands_have_the_options_that_they_are_given(job: Job) -> None:
    words = shlex.split(job.shown)
    source = next((word for word in words if word.startswith("benchmarks/")), "")
    given = {word for word in words[words.index(source) + 1 if source else 0 :] if re.fullmatch(r"--[a-z][a-z-]*", word)}
    if source:
        told = (ROOT / source).read_text()
    elif words[0] == "rowcast":
        told = "".join(path.read_text() for path in (ROOT / "rowcast/cli").glob("*.py"))
        told += "".join(f'"--{name}"' for name in re.findall(r"\n    (\w+): Annotated", told))
    else:
        pytest.skip("not a command of ours")
    assert {name for name in given if f'"{name}"' not in told} == set()


def test_names_are_told_once_and_parts_have_what_they_take() -> None:
    names = [job.name for job in JOBS]
    assert len(set(names)) == len(names)
    for job in JOBS:
        assert ("{minutes}" in job.command) == job.in_parts == bool(job.makes)
        assert set(job.after) <= set(names[: names.index(job.name)]) and str(Path.home()) not in job.shown


def test_each_job_has_gpus_of_its_own(tmp_path: Path) -> None:
    tell = 'echo "{{\\"on\\": \\"$CUDA_VISIBLE_DEVICES\\", \\"at\\": $(date +%s%N)}}"; sleep 0.5'
    two, one, large = job("two", tell, gpus=2), job("one", tell), job("large", tell, memory=120.0)
    made = run(tmp_path, two, one, large, gpus=(80.0, 80.0, 141.0))
    found = {each.name: json.loads(report_line(tmp_path, each) or "") for each in (two, one, large)}
    assert {name: each["on"] for name, each in found.items()} == {"two": "0,1", "one": "2", "large": "2"}
    assert abs(found["one"]["at"] - found["two"]["at"]) < 0.4e9 < found["large"]["at"] - found["one"]["at"]
    assert not made.failed and all(done(tmp_path, each) for each in (two, one, large))


def test_what_is_done_is_not_run_again_and_what_failed_is(tmp_path: Path) -> None:
    good, bad = job("good", "echo x >>{work}/good.ran"), job("bad", "echo x >>{work}/bad.ran; exit 3")
    for _ in range(2):
        made = run(tmp_path, good, bad)
        assert made.failed == ["bad"]
    assert (tmp_path / "good.ran").read_text() == "x\n" and (tmp_path / "bad.ran").read_text() == "x\nx\n"


def test_parts_go_on_and_what_takes_them_waits(tmp_path: Path) -> None:
    part = "test -e {work}/half && touch {work}/copy || touch {work}/half; echo {minutes} >>{work}/minutes"
    train = job("train", part, in_parts=True, makes="copy", seconds=105)
    use = job("use", "test -e {work}/copy", after=("train",))
    assert not run(tmp_path, train, use, limit_s=120).failed and done(tmp_path, use)
    first, second = (float(minutes) for minutes in (tmp_path / "minutes").read_text().split())
    assert first == second == 1.0

    (tmp_path / "copy").unlink()
    stuck = job("stuck", "exit 1", in_parts=True, makes="other", seconds=105)
    made = run(tmp_path, stuck, train, use, limit_s=95)
    assert made.failed == ["stuck"] and done(tmp_path, use)
    assert 0.5 < float((tmp_path / "minutes").read_text().split()[-1]) < 0.84


def test_nothing_that_a_job_leaves_behind_lives_on(tmp_path: Path) -> None:
    child = "(trap '' INT TERM; while true; do sleep 0.05; done) & echo $!"
    ends, heeds = job("ends", child), job("heeds", f"{child}; trap 'exit 130' INT; while true; do sleep 0.05; done")
    run(tmp_path, ends, heeds, gpus=(80.0, 80.0), limit_s=1)
    time.sleep(0.1)
    assert not any(lives((tmp_path / f"{name}.out").read_text()) for name in ("ends", "heeds"))


def test_the_deadline_ends_what_runs_and_begins_nothing_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "GRACE_S", 4.0)
    heeds = job("heeds", "trap 'echo asked; exit 130' INT; while true; do sleep 0.05; done")
    deaf = job("deaf", "trap '' INT; echo $$; while true; do sleep 0.05; done")
    late = job("late", "true", seconds=60)
    began = time.monotonic()
    made = run(tmp_path, heeds, deaf, late, gpus=(80.0, 80.0), limit_s=5)
    assert (
        time.monotonic() - began < 15 and sorted(made.failed) == ["deaf", "heeds"] and made.told[-1].endswith("late: not begun")
    )
    assert (tmp_path / "heeds.out").read_text() == "asked\n"
    assert not lives((tmp_path / "deaf.out").read_text())


def test_a_suite_that_is_ended_ends_its_jobs(tmp_path: Path) -> None:
    code = (
        "import suite; from suite_jobs import Job; suite.gpus_here = lambda: {'0': 80.0}\n"
        "suite.JOBS = (Job(name='one', command='echo $$; exec sleep 60', seconds=1),); suite.GRACE_S = 0.5; suite.main()"
    )
    words = [sys.executable, "-c", code, "-o", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}
    running = subprocess.Popen(words, env=env, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not (tmp_path / "one.out").exists() or not (told := (tmp_path / "one.out").read_text()):
        assert time.monotonic() < end and running.poll() is None
        time.sleep(0.05)
    running.terminate()
    assert running.wait(30) == 143
    assert not lives(told)


def test_a_folder_holds_one_run(tmp_path: Path) -> None:
    suite.begin(tmp_path / "run", {"model": "a", "held_out": None, "text": ["x"]})
    suite.begin(tmp_path / "run", {"model": "a", "held_out": None, "text": ["x"]})
    with pytest.raises(SystemExit, match="was begun with another --held-out: give the same"):
        suite.begin(tmp_path / "run", {"model": "a", "held_out": "b", "text": ["x"]})


def test_gpus_are_those_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [SimpleNamespace(index=index, memory_bytes=size << 30) for index, size in enumerate((80, 141, 80))]
    monkeypatch.setattr("suite.nvml.read", lambda: SimpleNamespace(gpus=gpus))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert suite.gpus_here() == {"0": 80, "1": 141, "2": 80}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,1")
    assert suite.gpus_here() == {"2": 80, "1": 141} and list(suite.gpus_here()) == ["2", "1"]
    monkeypatch.setattr("suite.nvml.read", lambda: None)
    assert suite.gpus_here() == {}


def test_results_are_kept_with_their_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = job("told", "echo '{{\"figure\": 1}}'; echo [1]; echo ended", title="Told")
    silent = job("silent", "echo no JSON", title="Silent")
    run(tmp_path, told, silent)
    calls: list[list[str]] = []
    monkeypatch.setattr("suite.subprocess.run", lambda words, **_: calls.append(words))
    assert suite.keep(tmp_path, [told, silent, job("absent", "true", title="Absent")], "one GPU") == 1
    [words] = calls
    assert words[words.index("--as") + 1] == "told" and words[words.index("--where") + 1] == "one GPU"
    assert words[words.index("--command") + 1] == told.shown
    assert json.loads(Path(words[words.index("--keep") + 1]).read_text()) == {"figure": 1}
