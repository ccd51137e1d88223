"""Jobs: shipped to a cluster of this machine, followed, stopped, and refused in one sentence."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers

import rowcast
from rowcast import LLM, SamplingParams
from rowcast.cli import main
from rowcast.errors import UserError

ray: Any = pytest.importorskip("ray")

from rowcast.cluster import jobs  # noqa: E402

ROOT = Path(rowcast.__file__).parents[1]
PROMPT = "w5 w9 w5 w9 w5 w9"
FAILS = ["generate", "--prompt-file", "nothing"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[jobs.Cluster]:
    started = jobs.find("local", cpus=4)
    assert started.started and started.here
    yield started
    ray.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tokenizer of 101 words."""
    path = tmp_path_factory.mktemp("llama")
    tiny_model("llama-gqa", path)
    words = {f"w{i}": i for i in range(101)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return path


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a clone has, and what gathers beside it."""
    path = tmp_path_factory.mktemp("checkout") / "rowcast"
    shutil.copytree(ROOT / "rowcast", path / "rowcast", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in (".gitignore", ".rayignore"):
        shutil.copy(ROOT / name, path)
    for name in (".git/objects/pack", ".venv/lib/torch.so", ".mypy_cache/cache", "model.safetensors", "weights/model.gguf"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"0" * 1000)
    return path


def generate(model: Path, *more: str) -> list[str]:
    return ["generate", PROMPT, "--model", str(model), "--max-tokens", "9", "--ignore-eos", "--json", *more]


def answer(out: str) -> dict[str, Any]:
    [line] = [line for line in out.splitlines() if line.startswith("{")]
    found: dict[str, Any] = json.loads(line)
    return found


def test_a_job_over_two_ranks_is_followed(
    cluster: jobs.Cluster, model: Path, checkout: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    [alone] = LLM(model).generate([PROMPT], SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))
    command = ["submit", "--address", cluster.address, "--working-dir", str(checkout), "--env", "ROWCAST_LOG=info"]
    assert main([*command, "--", *generate(model, "--tp", "2")]) == 0
    out, err = capfd.readouterr()
    assert answer(out)["token_ids"] == alone.outputs[0].token_ids
    assert "2 ranks are ready" in out
    assert "ranks are placed by the Ray cluster at" in out
    [told] = err.splitlines()
    assert told.startswith("rowcast: job") and cluster.address in told


def test_what_is_shipped(cluster: jobs.Cluster, checkout: Path) -> None:
    """From the checkout, nothing but the package with its draft, although it is installed here, too."""
    listing = (
        "import os, rowcast; print('{' + rowcast.__file__); [print('+', os.path.relpath(os.path.join(d, f)))"
        " for d, _, fs in os.walk('.') for f in fs if '__pycache__' not in d]"
    )
    client = cluster.client
    job = jobs.Job(
        client.submit_job(
            entrypoint=f'{sys.executable} -c "{listing}"',
            runtime_env={"working_dir": str(checkout), "excludes": ["__pycache__/"]},
        ),
        cluster,
    )
    assert job.wait() == 0
    files = [line[2:] for line in job.logs().splitlines() if line.startswith("+ ")]
    assert {"rowcast/cluster/jobs.py", "rowcast/assets/smollm2-draft/model.gguf"} <= set(files)
    assert [name for name in files if not name.startswith("rowcast/") and "ignore" not in name] == []
    [where] = [line for line in job.logs().splitlines() if line.startswith("{")]
    assert "runtime_resources" in where


def test_a_failing_job_passes_its_exit_code_on(cluster: jobs.Cluster, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """From a folder that is no checkout: the package goes along."""
    command = ["submit", "--address", cluster.address, "--working-dir", str(tmp_path)]
    assert main([*command, "--", *FAILS]) == 2
    out, err = capfd.readouterr()
    assert "rowcast: the prompt file nothing cannot be read" in out
    assert "ended with exit code 2" in err


def test_no_wait_then_status_logs_and_stop(cluster: jobs.Cluster, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    where = ["submit", "--address", cluster.address]
    assert main([*where, "--working-dir", str(tmp_path), "--no-wait", *FAILS]) == 0
    out, err = capfd.readouterr()
    job_id = out.strip()
    assert f"--logs {job_id}" in err and f"--stop {job_id}" in err
    assert main([*where, "--logs", job_id]) == 2
    assert "cannot be read" in capfd.readouterr().out
    assert main([*where, "--status", job_id, "--json"]) == 0
    found = answer(capfd.readouterr().out)
    assert found["status"] == "FAILED" and "exit code 2" in found["message"]
    assert main([*where, "--stop", job_id]) == 0
    assert capfd.readouterr().out.strip() == "FAILED"


def test_ctrl_c_stops_following_and_stop_stops(cluster: jobs.Cluster, tmp_path: Path) -> None:
    """The job waits for its standard input, so to say: it sleeps in an interpreter of its own."""
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\necho asleep\nexec sleep 100\n")
    sleeper.chmod(0o755)
    command = [sys.executable, "-m", "rowcast", "submit", "--address", cluster.address, "--working-dir", str(tmp_path)]
    follower = subprocess.Popen(
        [*command, "--python", str(sleeper), "--", "env"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert follower.stdout is not None
        while "asleep" not in (line := follower.stdout.readline()):
            assert line, "it ended"
        follower.send_signal(signal.SIGINT)
        _, err = follower.communicate(timeout=20)
    finally:
        follower.kill()
        follower.wait()
    assert follower.returncode == 130
    told = err.splitlines()[-1]
    assert "goes on" in told and "Traceback" not in err
    job = jobs.job(told.split()[2], address=cluster)
    assert job.status() == "RUNNING"
    started = time.monotonic()
    assert job.stop() == "STOPPED"
    assert time.monotonic() - started < 20
    assert job.wait() == 1


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--address", "http://127.0.0.1:1", "--", "env"], "no Ray cluster can be reached at http://127.0.0.1:1"),
        (["--address", "127.0.0.1:1", "--status", "x"], "no Ray cluster can be reached at 127.0.0.1:1"),
        (["--address", "nonsense://x:1", "--", "env"], "'nonsense://x:1' cannot be used"),
        (["--address", "somewhere", "--", "env"], "'somewhere' cannot be used"),
        (["--address", "host:port", "--", "env"], "cannot be used"),
        (["--address", "local", "--status", "x"], "name one that runs"),
        (["--address", "local", "--no-wait", "--", "env"], "name one that runs"),
        (["--", "generat", "x"], "'generat' is no command that can be a job: use generate"),
        (["--", "chat"], "'chat' is no command"),
        (["--", "generate", "--tp", "two", "x"], "'two'"),
        (["--", "generate", "--nonsense"], "--nonsense"),
        (["--env", "A", "--", "env"], "--env 'A' has to be NAME=VALUE"),
        (["--status", "x", "--", "env"], "--status x and a command exclude each other"),
        ([], "no command was given"),
    ],
)
def test_refusals(args: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    assert main(["submit", *args]) == 2
    assert time.monotonic() - started < 10
    out, err = capsys.readouterr()
    assert told in err
    assert err.startswith("rowcast: ") and err.count("\n") == 1 and not out


def test_what_the_cluster_does_not_know(cluster: jobs.Cluster, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for option in ("--status", "--logs", "--stop"):
        assert main(["submit", "--address", cluster.address, option, "raysubmit_x"]) == 2
        assert "knows no job 'raysubmit_x'" in capsys.readouterr().err
    assert main(["submit", "--address", cluster.address, "--working-dir", str(tmp_path / "gone"), "--", "env"]) == 2
    assert "is no folder" in capsys.readouterr().err
    with pytest.raises(UserError, match="no command was given"):
        jobs.submit([], address=cluster)


def test_the_address_given_has_the_last_word(cluster: jobs.Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    assert jobs.find(cluster.address).address == cluster.address
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:1"
    with pytest.raises(UserError, match="no Ray cluster can be reached"):
        jobs.find()
    gcs = ray.get_runtime_context().gcs_address
    assert jobs.find(gcs).address == cluster.address


def test_a_killed_cluster_that_is_found(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Ray would try for minutes to reach it."""
    address = f"127.0.0.1:{jobs._free_port()}"
    for name in jobs.ADDRESS_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jobs, "found_here", lambda: address)
    monkeypatch.setattr(jobs, "_client", lambda _: pytest.fail("it was not asked first whether one answers"))
    own = jobs.Cluster(None, "http://127.0.0.1:1", started=True, here=True)
    monkeypatch.setattr(jobs, "_start", lambda cpus: own if cpus == 3 else None)
    assert jobs.find(cpus=3) is own
    assert f"the Ray cluster that was found at {address} does not answer: one is started here" in caplog.text
    with pytest.raises(UserError, match="no Ray cluster runs on this machine"):
        jobs.find(start=False)


def test_a_token_that_is_not_shown(cluster: jobs.Cluster) -> None:
    """Another process, which Ray has not told of its cluster's."""
    if os.environ.get("RAY_AUTH_MODE") != "token":
        pytest.skip("this version of Ray starts clusters without one")
    bare = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    command = [sys.executable, "-m", "rowcast", "submit", "--address", cluster.address, "--status", "x"]
    found = subprocess.run(command, capture_output=True, text=True, env={**bare, "PYTHONPATH": str(ROOT)}, timeout=60)
    assert found.returncode == 2
    assert found.stderr.startswith(f"rowcast: the Ray cluster at {cluster.address} wants its token: set RAY_AUTH_MODE=token")
    assert found.stderr.count("\n") == 1


def test_ranks_asked_for() -> None:
    assert [jobs.ranks(args) for args in (["generate", "--tp", "4"], ["generate", "--tp=2"], ["generate", "x"])] == [4, 2, 1]
