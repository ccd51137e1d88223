"""What the server claims, shown: each case starts `rowcast serve` as a user does and loads it from this process.

    python benchmarks/serving.py --case load         # 200 streams, 2,000 requests: each equals its offline output, memory is flat
    python benchmarks/serving.py --case saturation   # three times what it can serve: 429 with Retry-After, no collapse
    python benchmarks/serving.py --case long         # p99 of short requests, with and without long prompts mixed in
    python benchmarks/serving.py --case prefix       # a shared prefix of 1,024 tokens: TTFT, and the same output
    python benchmarks/serving.py --case kill         # kill -9 to the rank under 50 streams: all go on as if nothing had been

`--scale 0.1` runs a tenth of the requests. Options for the server stand after `--`. The last line is JSON; exit code 1 where a claim
does not hold. The server and this client share the machine, whose processors the rates are of.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import time
from itertools import pairwise
from statistics import median
from typing import Any
from urllib.request import urlopen

from serving_offline import Job, Offline  # Beside this file.
from serving_processes import Watch, cpu_s, ranks, resident_mib

from rowcast.bench.server_process import ServerProcess
from rowcast.bench.serving_client import Load, Outcome, Planned, Server, served_model
from rowcast.bench.serving_load import arrivals
from rowcast.bench.serving_stats import percentile, summarise

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
LEAK_MIB = 64.0
"""That a process may grow between the first third of the requests and the last, beside what is kept of prompts for others to come: that
memory is planned, and the system gives it as it is first written to."""
SUMMARIES = 1.125
"""Blocks with the summaries of their chunks, for the default ladder, per byte of their K/V."""


class Case:
    """What all cases have: a model, options for the server, a scale."""

    def __init__(self, model: str, options: list[str], scale: float) -> None:
        self.model, self.options, self.scale = model, options, scale

    def server(self, *options: str) -> ServerProcess:
        return ServerProcess(self.model, ["--dtype", "float32", *options, *self.options])

    def at(self, server: ServerProcess) -> tuple[Server, str]:
        """Where it is, and what it calls its model."""
        found = Server.at(server.url)
        return found, asyncio.run(served_model(found))

    def count(self, whole: int) -> int:
        return max(round(whole * self.scale), 2)


KV = "kept KV"


def kept_kv_mib(url: str) -> float:
    """Blocks that can be found by their content."""
    with urlopen(f"{url}/live", timeout=60) as answer:
        kv = json.load(answer)["kv"]
    return float(round(kv["cached_blocks"] * kv["block_tokens"] * kv["token_bytes"] * SUMMARIES / (1 << 20), 1))


def load(case: Case) -> tuple[bool, dict[str, Any]]:
    """200 streams at a time, 2,000 in all."""
    offline = Offline(case.model)
    streams, count = 200, case.count(2000)
    jobs = offline.jobs(count, (8, 64), (8, 24))
    started = time.perf_counter()
    expected = offline.answers(jobs)
    offline_s = time.perf_counter() - started
    _tell(f"offline: {count} requests in {offline_s:.1f} s")
    with case.server() as server:
        seen: list[dict[str, float]] = []

        def ended(_: Outcome) -> None:
            wanted = len(seen) % 50 == 0 or len(seen) == count - 1
            seen.append(resident_mib(server.pid) | {KV: kept_kv_mib(server.url)} if wanted else {})
            if seen[-1]:
                _tell(f"{len(seen)} of {count} requests, {seen[-1]} MiB")

        before_s = cpu_s(server.pid)
        client_s = time.process_time()
        at, name = case.at(server)
        outcomes = asyncio.run(Load(at, concurrency=streams, on_end=ended).run([job.planned(name) for job in jobs]))
        client_s = time.process_time() - client_s
        server_s = {name: round(seconds - before_s.get(name, 0.0), 2) for name, seconds in cpu_s(server.pid).items()}
        code = server.stop()
    samples = [sample for sample in seen if sample]
    third = samples[len(samples) // 3]
    grown = {name: round(size - third[name], 1) for name, size in samples[-1].items() if name in third}
    kept = grown.pop(KV)
    grown = {name: round(size - kept * name.startswith("rank"), 1) for name, size in grown.items()}
    found = offline.compare(jobs, outcomes, expected)
    found |= summarise(outcomes)
    found |= {
        "streams": streams,
        "offline_s": offline_s,
        "share_of_offline": offline_s / found["duration"],
        "cpu_s": {"client": round(client_s, 2), **server_s},
        "resident_mib": {"after a third": third, "at the end": samples[-1]},
        "grown_mib": grown,
        "exit_code": code,
    }
    flat = case.scale < 0.25 or all(size <= LEAK_MIB for size in grown.values())  # few requests only warm it up
    return not found["lost"] and not found["different"] and flat and code == 0, found


def saturation(case: Case) -> tuple[bool, dict[str, Any]]:
    """What it can serve in a closed loop, then three times that in an open one, with a short queue."""
    offline = Offline(case.model)
    shape = (8, 64), (8, 24)
    with case.server("--max-waiting", "64") as server:
        at, name = case.at(server)
        asyncio.run(Load(at, concurrency=64).run([job.planned(name) for job in offline.jobs(64, *shape, seed=10)]))
        closed = [job.planned(name) for job in offline.jobs(case.count(400), *shape, seed=1)]
        capacity = summarise(asyncio.run(Load(at, concurrency=64).run(closed)))
        rate = 3 * capacity["request_throughput"]
        _tell(f"capacity {capacity['request_throughput']:.1f} requests/s; offering {rate:.1f}")
        jobs = offline.jobs(case.count(2400), *shape, seed=2)
        times = arrivals(len(jobs), rate, "poisson", random.Random(2))
        outcomes = asyncio.run(Load(at).run([job.planned(name, t) for job, t in zip(jobs, times, strict=True)]))
        code = server.stop()
    accepted = [i for i, outcome in enumerate(outcomes) if outcome.status == 200]
    expected = offline.answers([jobs[i] for i in accepted])
    compared = offline.compare([jobs[i] for i in accepted], [outcomes[i] for i in accepted], expected)
    refused = [outcome for outcome in outcomes if outcome.status == 429]
    saturated = summarise(outcomes)
    ratio = saturated["output_throughput"] / capacity["output_throughput"]
    found = {
        "capacity": capacity,
        "offered_rate": rate,
        "saturated": saturated,
        "accepted": compared,
        "refused": len(refused),
        "with_retry_after": sum(outcome.retry_after_s is not None for outcome in refused),
        "retry_after_s": sorted({outcome.retry_after_s for outcome in refused if outcome.retry_after_s is not None}),
        "p99_refusal_ms": 1e3 * percentile([outcome.e2el_s for outcome in refused], 99) if refused else None,
        "throughput_ratio": ratio,
        "exit_code": code,
    }
    only = set(saturated["errors"]) <= {"429"}
    told = bool(refused) and found["with_retry_after"] == len(refused)
    return only and told and not compared["different"] and ratio > 0.8 and code == 0, found


def long(case: Case) -> tuple[bool, dict[str, Any]]:
    """Short requests at a third of what it can serve; then with prompts of 1,500 tokens among them, in bounded chunks and not."""
    offline = Offline(case.model)
    count = case.count(300)
    short = offline.jobs(count, (8, 64), (16, 24), seed=3)
    prompts = offline.jobs(max(count // 15, 2), (1500, 1500), (4, 8), seed=4)
    found: dict[str, Any] = {}
    for kind, options in {"bound": [], "no bound": ["--prefill-stall", "3600"]}.items():
        with case.server(*options) as server:
            at, name = case.at(server)
            warm = [job.planned(name) for job in offline.jobs(64, (8, 64), (16, 24), seed=5)]
            capacity = summarise(asyncio.run(Load(at, concurrency=32).run(warm)))
            rate = found.setdefault("rate", capacity["request_throughput"] / 3)
            times = arrivals(count, rate, "poisson", random.Random(6))
            planned = [job.planned(name, t) for job, t in zip(short, times, strict=True)]
            if "alone" not in found:
                found["alone"] = _short(asyncio.run(Load(at).run(planned)))
            every_s = times[-1] / len(prompts)
            mixed = [job.planned(name, (i + 0.5) * every_s, long=True) for i, job in enumerate(prompts)]
            found[kind] = _short(asyncio.run(Load(at).run(planned + mixed)))
            server.stop()
        _tell(f"{kind}: {found[kind]}")
    whole = all(not found[kind]["failed"] for kind in ("alone", "bound", "no bound"))
    return whole and found["bound"]["p99_itl_ms"] < found["no bound"]["p99_itl_ms"], found


def _short(outcomes: list[Outcome]) -> dict[str, Any]:
    """Of the short requests: the latencies; of all: how many failed."""
    report = summarise(outcomes)
    return {"failed": report["failed"], **{k: v for k, v in (report.get("short") or report).items() if k.endswith("_ms")}}


def prefix(case: Case) -> tuple[bool, dict[str, Any]]:
    """One request after the other: prompts of 1,024 + 16 tokens that share nothing, then prompts that share the 1,024."""
    offline = Offline(case.model)
    count = max(case.count(12), 4)
    suffixes = offline.jobs(2 * count, (16, 16), (16, 16), seed=7)
    starts = offline.jobs(count + 1, (1024, 1024), (1, 1), seed=8)

    def behind(start: Job, job: Job) -> Job:
        return Job([*start.prompt, *job.prompt], job.temperature, job.seed, job.max_tokens)

    cold = [behind(start, job) for start, job in zip(starts[1:], suffixes, strict=False)]
    warm = [behind(starts[0], job) for job in suffixes[count:]]
    first = behind(starts[0], suffixes[0])
    jobs = [*cold, first, *warm]
    with case.server() as server:
        at, name = case.at(server)
        asyncio.run(Load(at, concurrency=1).run([suffixes[0].planned(name)]))
        outcomes = asyncio.run(Load(at, concurrency=1).run([job.planned(name) for job in jobs]))
        code = server.stop()
    compared = offline.compare(jobs, outcomes, offline.answers(jobs))
    ttft = [1e3 * (outcome.ttft_s or float("nan")) for outcome in outcomes]
    cached = [((each.usage or {}).get("prompt_tokens_details") or {}).get("cached_tokens", 0) for each in outcomes]
    found = {
        **compared,
        "cold_ttft_ms": median(ttft[:count]),
        "warm_ttft_ms": median(ttft[count + 1 :]),
        "times_lower": median(ttft[:count]) / median(ttft[count + 1 :]),
        "cached_tokens": {"cold": median(cached[:count]), "warm": median(cached[count + 1 :])},
        "exit_code": code,
    }
    return not compared["lost"] and not compared["different"] and found["times_lower"] >= 3 and code == 0, found


def kill(case: Case) -> tuple[bool, dict[str, Any]]:
    """50 streams; SIGKILL to a rank once each of them has got something."""
    offline = Offline(case.model)
    jobs = offline.jobs(50, (8, 64), (96, 128), seed=9)
    expected = offline.answers(jobs)
    with case.server() as server:
        at, name = case.at(server)
        load = Load(at)
        with Watch(server.ready, every_s=0.02) as watch:
            planned = [job.planned(name, 0.0) for job in jobs]
            outcomes, killed = asyncio.run(_run_and_kill(load, planned, server.pid))
            killed_s = killed["at_s"]
            until_s = time.monotonic() + 60
            while not watch.seen[-1][1] and time.monotonic() < until_s:
                time.sleep(0.1)
        code = server.stop()
    seen = [(at_s - load.start_s, ready) for at_s, ready in watch.seen]
    chunks = sorted(at_s for outcome in outcomes for at_s in outcome.chunks_s)
    after = [at_s for at_s in chunks if at_s > killed_s]
    gaps = [later - at_s for at_s, later in pairwise(chunks) if later > killed_s]
    not_ready = [at_s for at_s, ready in seen if not ready and at_s >= killed_s]
    again = [at_s for at_s, ready in seen if ready and not_ready and at_s > not_ready[0]]
    compared = offline.compare(jobs, outcomes, expected)
    found = {
        **compared,
        "killed": killed,
        "chunks_before": len(chunks) - len(after),
        "chunks_after": len(after),
        "tokens_flow_again_after_s": max(gaps) if gaps else None,
        "not_ready_after_s": not_ready[0] - killed_s if not_ready else None,
        "ready_again_after_s": again[0] - killed_s if again else None,
        "exit_code": code,
    }
    held = not compared["lost"] and not compared["different"] and bool(not_ready) and bool(again)
    return held and len(after) > 0 and code == 0, found


async def _run_and_kill(load: Load, planned: list[Planned], pid: int) -> tuple[list[Outcome], dict[str, Any]]:
    """The streams' ends, and which rank was killed when."""
    running = asyncio.create_task(load.run(planned))
    await asyncio.sleep(0)
    while not all(outcome.chunks_s for outcome in load.outcomes) and not running.done():
        await asyncio.sleep(0.01)
    found = ranks(pid)
    if not found or running.done():
        await running
        raise SystemExit(f"nothing to kill: the server has the ranks {found}, {len(load.outcomes)} requests are over")
    killed = {"pid": found[0], "at_s": load.now_s(), "running": load.in_flight}
    os.kill(found[0], signal.SIGKILL)
    return await running, killed


CASES = {"load": load, "saturation": saturation, "long": long, "prefix": prefix, "kill": kill}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of requests")
    parser.add_argument("options", nargs="*", help="after --: options of rowcast serve")
    given = parser.parse_args()
    started = time.perf_counter()
    held, found = CASES[given.case](Case(given.model, given.options, given.scale))
    seconds = round(time.perf_counter() - started, 1)
    print(json.dumps({"case": given.case, "model": given.model, "held": held, "seconds": seconds, **found}))
    sys.exit(not held)


def _tell(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
