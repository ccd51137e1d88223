"""`rowcast bench serve`: its sums on made-up times, its client against a scripted server, and a run against the real one."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from http_serving import NAME, Served, character_model, engine
from warm_ranks import WarmLauncher

import rowcast.cli
from rowcast.bench.serve import _api_key
from rowcast.bench.server_process import ServerProcess
from rowcast.bench.serving_client import Load, Outcome, Planned, Server, events
from rowcast.bench.serving_load import INFINITE, Lengths, arrivals, plan, prompts
from rowcast.bench.serving_stats import meets, parse_objectives, percentile, summarise
from rowcast.errors import UserError
from rowcast.serving.security import AppSettings


def outcome(arrived_s: float, *chunks_s: float, tokens: int | None = None, long: bool = False, **given: Any) -> Outcome:
    """A finished request, unless `given` says otherwise."""
    usage = {"prompt_tokens": 10, "completion_tokens": len(chunks_s) if tokens is None else tokens}
    end_s = chunks_s[-1] if chunks_s else arrived_s
    values = {"sent_s": arrived_s, "end_s": end_s, "tries": 1, "status": 200, "usage": usage, **given}
    return Outcome(Planned({}, arrived_s, 10, long), arrived_s, chunks_s=list(chunks_s), **values)


def test_percentiles_are_numpys() -> None:
    values = [random.Random(0).expovariate(1) for _ in range(57)]
    for percent in (0, 1, 50, 99, 100):
        assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))
    assert percentile([3.0], 99) == 3.0


def test_a_report_of_made_up_times() -> None:
    report = summarise(
        [
            outcome(1.0, 1.5, 1.6, 1.8),  # TTFT 500, TPOT 150, ITL 100 and 200, E2EL 800 ms
            outcome(2.0, 2.1, 2.4, tokens=4),  # TTFT 100, two chunks of four tokens: TPOT 100, ITL 300, E2EL 400 ms
            outcome(2.0, 2.2, tokens=1),  # TTFT and E2EL 200 ms, a lone token
            outcome(3.0, error="429", status=429, usage=None, end_s=3.1, tries=3),
            outcome(3.0, 3.5, error="engine_failed", end_s=5.0),
        ],
        {"ttft": 0.3, "tpot": 0.1001},
    )
    assert (report["completed"], report["failed"], report["retries"]) == (3, 2, 2)
    assert report["errors"] == {"429": 1, "engine_failed": 1}
    assert report["duration"] == pytest.approx(4.0)
    assert (report["total_input_tokens"], report["total_output_tokens"]) == (30, 8)
    assert report["request_throughput"] == pytest.approx(3 / 4)
    assert report["output_throughput"] == pytest.approx(8 / 4)
    assert report["total_token_throughput"] == pytest.approx(38 / 4)
    assert report["request_goodput"] == pytest.approx(2 / 4)  # the second and the third
    assert report["mean_ttft_ms"] == pytest.approx(800 / 3)
    assert report["median_ttft_ms"] == pytest.approx(200)
    assert report["p99_ttft_ms"] == pytest.approx(np.percentile([500, 100, 200], 99))
    assert report["mean_tpot_ms"] == pytest.approx(125)
    assert report["mean_itl_ms"] == pytest.approx(200)
    assert report["mean_e2el_ms"] == pytest.approx(1400 / 3)
    assert "short" not in report


def test_groups_and_nothing_finished() -> None:
    report = summarise([outcome(0.0, 0.5), outcome(0.0, 3.0, long=True), outcome(0.0, error="connection", status=0)])
    assert report["short"]["p99_ttft_ms"] == pytest.approx(500)
    assert report["long"]["p99_ttft_ms"] == pytest.approx(3000)
    assert report["short"]["mean_tpot_ms"] is None and report["request_goodput"] is None
    empty = summarise([outcome(0.0, error="503", status=503)])
    assert empty["completed"] == 0 and empty["mean_ttft_ms"] is None


def test_objectives() -> None:
    assert parse_objectives("ttft=500, tpot:0.05s,e2el=.5s") == pytest.approx({"ttft": 0.5, "tpot": 0.05, "e2el": 0.5})
    assert meets(outcome(0.0, 0.4, 0.5, 0.8), {"itl": 0.2})
    assert not meets(outcome(0.0, 0.4, 0.5, 0.9), {"itl": 0.2})
    assert not meets(outcome(0.0, 0.1, error="timeout"), {"ttft": 1.0})
    for text in ("ttft", "speed=3", "ttft=fast", "ttft=1h", ""):
        with pytest.raises(UserError, match="--slo has"):
            parse_objectives(text)


def test_arrivals_and_prompts() -> None:
    rng = random.Random(0)
    assert arrivals(3, INFINITE, "poisson", rng) == [0, 0, 0]
    assert arrivals(3, 4.0, "fixed", rng) == [0, 0.25, 0.5]
    times = arrivals(2000, 50.0, "poisson", rng)
    gaps = np.diff(times)
    assert times[0] == 0 and gaps.min() >= 0
    assert gaps.mean() == pytest.approx(0.02, rel=0.1) and gaps.std() == pytest.approx(0.02, rel=0.1)
    text = list(range(1000))
    for ids in prompts([5, 1000], text, running_text=True, rng=rng):
        assert ids == list(range(ids[0], ids[0] + len(ids)))
    with pytest.raises(UserError, match="1000 tokens, a prompt has 1001"):
        prompts([1001], text, running_text=True, rng=rng)
    assert Lengths.parse("8-64", "") == Lengths(8, 64) and Lengths.parse("7", "") == Lengths(7, 7)

    def planned() -> list[Planned]:
        return plan(
            times[:40], text, model="m", running_text=False, prompt_tokens=Lengths(2, 4), max_tokens=Lengths(1, 3), long_share=0.25,
            long_tokens=50, sampling={"temperature": 0.0}, seed=7,
        )  # fmt: skip

    found = planned()
    assert found == planned()
    assert sum(each.long for each in found) == 10
    for i, each in enumerate(found):
        assert each.prompt_tokens == len(each.body["prompt"]) and (
            each.prompt_tokens == 50 if each.long else each.prompt_tokens <= 4
        )
        assert each.body["seed"] == 7 + i and 1 <= each.body["max_tokens"] <= 3 and each.body["stream"] is True


def test_events_of_any_cut() -> None:
    text = b'data: {"a": 1}\r\n\r\n: a comment\nevent: x\ndata: one\ndata:two\n\ndata: [DONE]\n\ndata: half'

    async def parts(size: int) -> list[str]:
        async def body() -> Any:
            for at in range(0, len(text), size):
                yield text[at : at + size]

        return [event async for event in events(body())]

    for size in (1, 3, 1000):
        assert asyncio.run(parts(size)) == ['{"a": 1}', "one\ntwo", "[DONE]"]


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://h", "http://", "http://h:port", "http://h/?q=1", "http://u:p@h"])
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(UserError, match="has to be http://HOST:PORT"):
        Server.at(url)


def test_addresses() -> None:
    assert Server.at("http://localhost:8000/v1/") == Server("localhost", 8000)
    assert Server.at("https://h/proxy") == Server("h", 443, True, "/proxy")
    assert Server.at("http://[::1]:80").url == "http://[::1]:80"
    assert "secret" not in repr(Server.at("http://h", "secret"))


UNTIL_IT_GOES = b"(not a part: wait until the client closes the connection)"

Script = Callable[[dict[str, Any], int], list[bytes]]
"""(a request's body, how often it has come before) -> what the server writes, part by part, before it closes the connection."""


@contextmanager
def scripted(script: Script) -> Iterator[Server]:
    """A server that says what the script says."""
    loop = asyncio.new_event_loop()
    tries: dict[int, int] = {}

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        (length,) = (int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
        body = json.loads(await reader.readexactly(length))
        tries[body["seed"]] = tries.get(body["seed"], -1) + 1
        for part in script(body, tries[body["seed"]]):
            if part is UNTIL_IT_GOES:
                await reader.read()
                continue
            writer.write(part)
            await writer.drain()
        writer.close()

    server = loop.run_until_complete(asyncio.start_server(answer, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield Server("127.0.0.1", server.sockets[0].getsockname()[1])
    finally:
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def chunked(*data: object) -> bytes:
    """Events in HTTP's chunked form."""
    lines = [b"data: " + (each if isinstance(each, bytes) else json.dumps(each).encode()) + b"\n\n" for each in data]
    return b"".join(b"%x\r\n%s\r\n" % (len(line), line) for line in lines)


STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"
TEXT = {"choices": [{"text": "a", "token_ids": [1, 2]}]}
LAST = {"choices": [{"text": "", "finish_reason": "length"}], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}


def refusal(status: bytes, *headers: bytes) -> bytes:
    body = b'{"error": {"message": "too many wait"}}'
    return b"\r\n".join([b"HTTP/1.1 " + status, b"content-length: %d" % len(body), *headers, b"", body])


def script(body: dict[str, Any], tries: int) -> list[bytes]:
    whole = [STREAM, chunked(TEXT), chunked(LAST), chunked(b"[DONE]"), END]
    ways: dict[int, list[bytes]] = {
        0: whole,
        1: [refusal(b"429 Too Many Requests", b"retry-after: 0")] if tries == 0 else whole,
        2: [refusal(b"429 Too Many Requests", b"retry-after: 0")],
        3: [refusal(b"500 Internal Server Error", b"retry-after: 0")],
        4: [STREAM, chunked(TEXT), chunked({"error": {"message": "gone", "code": "engine_failed"}}), chunked(b"[DONE]"), END],
        5: [STREAM, chunked(TEXT)],  # the connection ends
        6: [STREAM, chunked(TEXT), END],  # the stream ends, without its [DONE]
        7: [STREAM, chunked(b"{not json"), END],
        8: [b"what?\r\n\r\n"],
        9: [],
    }
    return ways[body["seed"]]


def test_what_a_client_sees() -> None:
    ended: list[Outcome] = []
    with scripted(script) as server:
        load = Load(server, retries=1, on_end=ended.append)
        found = asyncio.run(load.run([Planned({"seed": seed}, 0.01 * seed, 3) for seed in range(10)]))
    assert [each.error for each in found] == [
        *(None, None, "429", "500", "engine_failed", "truncated", "truncated", "malformed", "truncated", "truncated"),
    ]
    assert [each.tries for each in found] == [1, 2, 2, *[1] * 7]
    assert [each.message for each in found[2:5]] == ["too many wait", "too many wait", "gone"]
    good = found[0]
    assert (good.text, good.token_ids, good.finish_reason, good.output_tokens) == ("a", [1, 2], "length", 2)
    assert len(good.chunks_s) == 1 and len(found[4].chunks_s) == 1
    assert {id(each) for each in ended} == {id(each) for each in found} and load.in_flight == 0
    for each in found:
        assert each.sent_s is not None and each.planned.at_s == each.arrived_s <= each.sent_s <= each.end_s


def test_a_latency_counts_from_the_planned_arrival() -> None:
    """With room for one at a time, the others wait, and their waiting counts: an open loop. In a closed loop it does not."""
    planned = [Planned({"seed": 0}, 0.0, 3)] * 20
    with scripted(script) as server:
        load = Load(server, concurrency=1)
        found = asyncio.run(load.run(planned))
        assert load.most_in_flight == 1
        ttft = [each.ttft_s or 0.0 for each in found]
        assert ttft == sorted(ttft) and all(each.arrived_s == 0.0 for each in found)
        closed = asyncio.run(load.run([Planned({"seed": 0}, INFINITE, 3)] * 20))
    assert load.most_in_flight == 1
    for before, after in pairwise(closed):
        assert after.arrived_s >= before.end_s


def test_a_request_that_takes_too_long() -> None:
    with scripted(lambda body, tries: [STREAM, chunked(TEXT), UNTIL_IT_GOES]) as server:
        [found] = asyncio.run(Load(server, timeout_s=0.5).run([Planned({"seed": 0}, 0.0, 3)]))
    assert (found.error, found.status, len(found.chunks_s)) == ("timeout", 200, 1)
    assert found.e2el_s >= 0.5


def test_nobody_answers() -> None:
    with scripted(script) as server:
        pass
    [found] = asyncio.run(Load(server).run([Planned({"seed": 0}, 0.0, 3)]))
    assert (found.error, found.status) == ("connection", 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "neither --url nor --model is given"),
        (["--url", "here"], "the server's address is 'here'"),
        (["--url", "http://127.0.0.1:9", "--slo", "speed=1"], "--slo has 'speed=1'"),
        (["--url", "http://127.0.0.1:9", "--rate", "0"], "--rate is 0"),
        (["--url", "http://127.0.0.1:9", "--rate", "nan"], "--rate is nan"),
        (["--url", "http://127.0.0.1:9", "--prompt-tokens", "9-3"], "--prompt-tokens is '9-3'"),
        (["--url", "http://127.0.0.1:9", "--long-share", "2"], "--long-share is 2"),
        (["--url", "http://127.0.0.1:9", "--prompt-file", "/nowhere/x"], "--prompt-file /nowhere/x cannot be read"),
        (["--url", "http://127.0.0.1:9", "--api-key-file", "/nowhere/x"], "--api-key-file /nowhere/x cannot be read"),
        (["--url", "http://127.0.0.1:9", "--", "--port", "1"], "options for a server are given (--port 1)"),
        (["--url", "http://127.0.0.1:9", "--requests", "0"], "--requests"),
    ],
)
def test_what_is_refused(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert rowcast.cli.main(["bench", "serve", *arguments]) == 2
    out, err = capsys.readouterr()
    assert not out and words in err and err.count("\n") == 1


def test_nobody_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted(script) as server:
        pass
    assert rowcast.cli.main(["bench", "serve", "--url", server.url]) == 2
    assert "nobody answers at" in capsys.readouterr().err


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    launcher = WarmLauncher()
    model = character_model(tmp_path_factory.mktemp("characters"))
    with engine(model, launcher) as found, found.at(AppSettings(log_requests=False)) as server:
        yield server
    launcher.close()


def test_a_run(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--requests", "12", "--rate", "50", "--concurrency", "4", "--max-tokens", "3-6", "--prompt-tokens", "4-8"]
    arguments += ["--long-share", "0.25", "--long-tokens", "60", "--slo", "ttft=60s"]
    assert rowcast.cli.main(["bench", "serve", "--url", served.url, *arguments]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out.splitlines()[-1])
    assert (report["completed"], report["failed"], report["errors"], report["model"]) == (12, 0, {}, NAME)
    assert 1 <= report["max_concurrent_requests"] <= 4
    assert 12 * 3 <= report["total_output_tokens"] <= 12 * 6
    assert 3 * 60 + 9 * 4 <= report["total_input_tokens"] <= 3 * 60 + 9 * 8
    assert report["request_throughput"] == report["request_goodput"] == pytest.approx(12 / report["duration"])
    assert report["total_token_throughput"] == pytest.approx(
        (report["total_input_tokens"] + report["total_output_tokens"]) / report["duration"]
    )
    for name in ("ttft", "tpot", "itl"):
        assert 0 <= report[f"median_{name}_ms"] <= report[f"p99_{name}_ms"] <= report["p99_e2el_ms"]
    assert report["short"]["mean_ttft_ms"] > 0 and report["long"]["mean_ttft_ms"] > 0
    assert "TTFT" in err and "12 completed" in err and "goodput" in err


def test_prompts_of_a_file_in_a_closed_loop(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "text"
    file.write_text("It was the best of times, it was the worst of times. " * 4)
    command = [
        "bench",
        "serve",
        "--url",
        f"{served.url}/v1",
        "--requests",
        "6",
        "--concurrency",
        "2",
        "--max-tokens",
        "4",
        "--json",
    ]
    assert rowcast.cli.main([*command, "--prompt-tokens", "10", "--prompt-file", f"{file}"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["completed"], report["total_input_tokens"], report["total_output_tokens"]) == (6, 60, 24)
    assert report["max_concurrent_requests"] == 2
    assert rowcast.cli.main([*command, "--prompt-tokens", "900", "--prompt-file", f"{file}"]) == 2
    assert "tokens, a prompt has 900: give a longer text" in capsys.readouterr().err
    assert rowcast.cli.main([*command, "--prompt-tokens", "1100"]) == 2
    assert "a first request to" in capsys.readouterr().err


SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    asked = 0
    def do_GET(self):
        Handler.asked += 1
        self.send_response(200 if self.path == "/ready" and Handler.asked > 2 else 503)
        self.end_headers()
server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
print("listening at http://127.0.0.1:%d (%s)" % (server.server_port, sys.argv[1:]), file=sys.stderr, flush=True)
server.serve_forever()
"""


def test_a_server_of_its_own() -> None:
    """Found by what it says, waited for until it is ready, ended with the context."""
    process = ServerProcess("m", ["--dtype", "float32"], command=(sys.executable, "-c", SERVER))
    with process as server:
        assert server.ready()
        assert server.said[0] == (f"listening at {server.url} (['m', '--port', '0', '--dtype', 'float32'])")
    assert not server.ready()
    assert server.stop() == -signal.SIGTERM


def test_a_server_that_does_not_start() -> None:
    script = "import sys; print('rowcast: no such model'); sys.exit(2)"
    with pytest.raises(UserError, match=r"ended with exit code 2 before it was ready: no such model"):
        ServerProcess("m", command=(sys.executable, "-c", script)).__enter__()
    with pytest.raises(UserError, match=r"was not ready after 0.2 s"):
        ServerProcess("m", command=(sys.executable, "-c", "import signal; signal.pause()"), start_s=0.2, stop_s=30).__enter__()


@pytest.mark.parametrize(("text", "key"), [
    ("# ours\n\nalice:alice-key-0123456789\n", "alice-key-0123456789"),
    ("plain-key-0123456789\n", "plain-key-0123456789"),
    ("bob:with:colons#and-more\n", "with:colons#and-more"),
])  # fmt: skip
def test_a_servers_file_of_keys(text: str, key: str, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    assert _api_key(str(path)) == key
