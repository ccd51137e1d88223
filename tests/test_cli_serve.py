"""`rowcast serve`: what it refuses, how it says that it listens, and how it ends."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from warm_ranks import WarmLauncher

from rowcast import LLM, SamplingParams
from rowcast.cli import main, serve
from rowcast.serving import server, service
from rowcast.serving.service import EngineService

pytest_plugins = ["shared_engine"]

WAIT_S = 60.0
KEY = "sk-0123456789abcdef"

FAKE = """
import asyncio, sys
from fastapi import FastAPI
from rowcast.serving import server

class Fake:
    async def start(self):
        print("starting", flush=True)
        await asyncio.sleep(float(sys.argv[1]))
    async def drain(self, timeout_s):
        print("draining", timeout_s, flush=True)
        await asyncio.sleep(float(sys.argv[2]))
        return True

sys.exit(server.run(Fake(), FastAPI, server.bind("127.0.0.1", 0), drain_s=7))
"""
"""A server without a model: what `start` and `drain` take are its arguments."""


class Listening(io.StringIO):
    """Standard error that knows when the server listens."""

    def __init__(self) -> None:
        super().__init__()
        self.url = ""
        self.up = threading.Event()

    def write(self, text: str) -> int:
        if found := re.search(r"rowcast: listening at (http://\S+)", text):
            self.url = found[1]
            self.up.set()
        return super().write(text)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, warm_launcher: WarmLauncher) -> list[EngineService]:
    """The services that commands start, which take ranks that start quickly."""
    made: list[EngineService] = []
    original = service.engine_service

    def start(*arguments: Any, **more: Any) -> EngineService:
        made.append(original(*arguments, launcher=warm_launcher, progress=False, **more))
        return made[-1]

    monkeypatch.setattr(service, "engine_service", start)
    return made


def serving(monkeypatch: pytest.MonkeyPatch, arguments: list[str], do: Callable[[str], None]) -> tuple[int, str]:
    """Run the command in this thread and `do` in another, with its address; exit code and standard error."""
    told = Listening()
    monkeypatch.setattr(sys, "stderr", told)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            assert told.up.wait(WAIT_S)
            do(told.url)
        except BaseException as error:
            failures.append(error)
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=run)
    thread.start()
    code = main(["serve", *arguments])
    told.up.set()
    thread.join(WAIT_S)
    if failures:
        raise failures[0]
    return code, told.getvalue()


def get(url: str) -> tuple[int, dict[str, Any]]:
    return answer(urllib.request.Request(url))


def post(url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    return answer(urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"}))


def answer(request: urllib.request.Request) -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(request, timeout=WAIT_S) as found:
            return found.status, json.load(found)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_sigterm_lets_requests_finish(
    monkeypatch: pytest.MonkeyPatch, started: list[EngineService], characters: Path, offline_llm: LLM
) -> None:
    body = {"model": "mine", "prompt": "Once", "temperature": 0, "max_tokens": 20, "ignore_eos": True}
    found: list[tuple[int, dict[str, Any]]] = []

    def do(url: str) -> None:
        assert get(f"{url}/ready")[0] == 200
        held = threading.Event()
        engine = started[0]._driver._llm.engine  # type: ignore[union-attr]
        step = engine.step
        engine.step = lambda: step() if held.wait(0.005) else None  # type: ignore[method-assign]
        asking = threading.Thread(target=lambda: found.append(post(f"{url}/v1/completions", body)))
        asking.start()
        until(lambda: started[0]._desk.load[0] == 1)
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: get(f"{url}/ready")[0] == 503)
        status, refused = post(f"{url}/v1/completions", body)
        assert (status, refused["error"]["code"]) == (503, "unavailable")
        assert get(f"{url}/health")[0] == 200, "it lives"
        held.set()
        asking.join(WAIT_S)

    code, told = serving(monkeypatch, [str(characters), "--port", "0", "--served-model-name", "mine", "--ladder", "plain"], do)
    assert code == 0 and started[0].state()[0] == "stopped"
    [(status, answered)] = found
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    assert status == 200 and answered["choices"][0]["text"] == offline_llm.generate("Once", params)[0].outputs[0].text
    lines = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
    assert {line["status"] for line in lines} >= {200, 503} and "Once" not in told


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, started: list[EngineService], characters: Path) -> None:
    def do(url: str) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    code, told = serving(monkeypatch, [str(characters), "--port", "0", "--no-log-requests"], do)
    assert code == 130 and started[0].state()[0] == "stopped"
    assert [line for line in told.splitlines() if "Traceback" in line] == []


@pytest.fixture
def fake() -> Iterator[Callable[[float, float], subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []

    def start(start_s: float, drain_s: float) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", FAKE, str(start_s), str(drain_s)]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def line_of(stream: Any, words: str) -> str:
    for line in stream:
        if words in line:
            return str(line)
    raise AssertionError(f"nothing with {words!r} was said")


def test_a_second_signal_ends_it_at_once(fake: Callable[[float, float], subprocess.Popen[str]]) -> None:
    process = fake(0, 600)
    line_of(process.stderr, "listening at http://127.0.0.1:")
    process.send_signal(signal.SIGTERM)
    assert line_of(process.stdout, "draining") == "draining 7\n"
    line_of(process.stderr, "finishing what runs, within 7 s; another signal")
    process.send_signal(signal.SIGINT)
    assert process.wait(WAIT_S) == 130


def test_a_signal_while_loading_ends_it_at_once(fake: Callable[[float, float], subprocess.Popen[str]]) -> None:
    process = fake(600, 0)
    line_of(process.stderr, "rowcast: loading the model")
    line_of(process.stdout, "starting")
    process.send_signal(signal.SIGTERM)
    assert process.wait(WAIT_S) == 143


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.touch(0o600)
    path.write_text(f"me:{KEY}\n")
    return path


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines call the server: give API keys"),
        (["--port", "70000"], "--port 70000 is none"),
        (["--port", "0", "--drain-timeout", "-1"], "--drain-timeout -1 has to be at least 0"),
        (["--port", "0", "--max-waiting", "-1"], "--max-waiting -1 has to be at least 0"),
        (["--port", "0", "--deadline", "0"], "--deadline 0.0 has to be more than 0"),
        (["--port", "0", "--prefill-stall", "0"], "--prefill-stall 0.0 has to be"),
        (["--port", "0", "--api-key-file", "nowhere"], "nowhere cannot be read"),
        (["--port", "0", "--allowed-origin", "example.org"], "allowed origin"),
        (["--port", "0", "--draft-device", "cpu"], "--draft-device 'cpu' is for several ranks, and there is one"),
        (["no-such-model-here", "--port", "0"], "no-such-model-here"),
        (["--port", "zero"], "zero"),
    ],
)
def test_what_cannot_be(arguments: list[str], sentence: str, characters: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = [] if arguments[0].startswith("no-") else [str(characters)]
    assert main(["serve", *model, *arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith("rowcast: ") and told.count("\n") == 1 and sentence in told


def test_an_address_that_is_not_to_be_had(
    key_file: Path, characters: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", str(characters), "--port", port]) == 2
        assert f"port {port} of 127.0.0.1 is in use: choose another --port" in capsys.readouterr().err
    keys = ["--port", "0", "--api-key-file", str(key_file)]
    assert main(["serve", str(characters), "--host", "192.0.2.1", *keys]) == 2
    assert "--host '192.0.2.1' is no address of this machine" in capsys.readouterr().err

    def unknown(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert main(["serve", str(characters), "--host", "nowhere.invalid", *keys]) == 2
    told = capsys.readouterr().err
    assert "--host 'nowhere.invalid' cannot be resolved (Name or service not known)" in told and KEY not in told


def test_another_server_that_listens_meanwhile(
    monkeypatch: pytest.MonkeyPatch, started: list[EngineService], characters: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sockets that do not listen yet can share an address."""
    bind = server.bind
    others: list[socket.socket] = []

    def late(host: str, port: int) -> socket.socket:
        bound = bind(host, port)
        others.append(bind(host, bound.getsockname()[1]))
        others[0].listen()
        return bound

    monkeypatch.setattr(server, "bind", late)
    assert main(["serve", str(characters), "--port", "0"]) == 2
    others[0].close()
    assert "is in use" in capsys.readouterr().err and started[0].state()[0] == "stopped"


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "uvicorn" else object())
    assert main(["serve"]) == 2
    assert 'serving needs uvicorn, which is not installed: pip install "rowcast[serve]"' in capsys.readouterr().err


def test_addresses() -> None:
    for host, wanted in (("127.0.0.1", "http://127.0.0.1:"), ("localhost", "http://"), ("0.0.0.0", "http://127.0.0.1:")):
        with server.bind(host, 0) as bound:
            assert server.url_of(bound).startswith(wanted)
