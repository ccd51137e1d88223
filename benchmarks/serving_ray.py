"""A Ray Serve application of some replicas on this machine, one of which is killed under load: nothing is lost, nothing comes twice.

    python benchmarks/serving_ray.py                      # 50 streams over 2 replicas, SIGKILL to one in mid-stream
    python benchmarks/serving_ray.py --kill none          # the same without: what the way through Ray costs
    python benchmarks/serving_ray.py --kill rank          # to a rank's process, which its replica starts again
    python benchmarks/serving_ray.py --freeze             # SIGSTOP instead: a process that says nothing

Starts a Ray cluster of its own. The last line is JSON; exit code 1 where a stream was lost or differs from its offline output.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import sys
import time
from typing import Any

import ray as untyped_ray
from ray import serve as untyped_serve
from serving_offline import Offline  # Beside this file.
from serving_processes import ranks

from rowcast.bench.serving_client import Load, Outcome, Planned, Server, ask
from rowcast.bench.serving_stats import summarise
from rowcast.serving.ray_app import application

ray: Any = untyped_ray
serve: Any = untyped_serve

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
BACK_S = 180.0
"""For a replica to be there again."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--streams", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=96, help="that each stream has at least")
    parser.add_argument("--kill", choices=("replica", "rank", "none"), default="replica")
    parser.add_argument("--freeze", action="store_true", help="SIGSTOP, not SIGKILL")
    given = parser.parse_args()
    offline = Offline(given.model)
    jobs = offline.jobs(given.streams, (8, 64), (given.tokens, given.tokens + 32), seed=9)
    expected = offline.answers(jobs)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = time.perf_counter()
    ray.init(
        address="local", num_cpus=given.replicas + 1, object_store_memory=100 << 20, include_dashboard=False, log_to_driver=False
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(
            application(model=str(offline.llm.checkpoint.path), replicas=given.replicas, dtype="float32", served_model_name="m")
        )
        up_s = time.perf_counter() - started
        at = Server("127.0.0.1", port)
        outcomes, found = asyncio.run(_case(at, [job.planned("m", 0.0) for job in jobs], given.kill, given.freeze))
    finally:
        serve.shutdown()
        ray.shutdown()
    compared = offline.compare(jobs, outcomes, expected)
    held = not compared["lost"] and not compared["different"]
    print(json.dumps({"case": given.kill, "replicas": given.replicas, "held": held, "up_s": up_s, **compared, **found}))
    sys.exit(not held)


async def _case(at: Server, planned: list[Planned], kill: str, freeze: bool) -> tuple[list[Outcome], dict[str, Any]]:
    """The streams' ends, and what happened meanwhile."""
    load = Load(at)
    running = asyncio.create_task(load.run(planned))
    await asyncio.sleep(0)
    found: dict[str, Any] = {}
    pid = None
    if kill != "none":
        while not all(outcome.chunks_s for outcome in load.outcomes) and not running.done():
            await asyncio.sleep(0.01)
        pid = (await _live(at))["replicas"][0]["pid"]
        target = pid if kill == "replica" else ranks(pid)[0]
        found["killed"] = {"at_s": load.now_s(), "running": load.in_flight}
        os.kill(target, signal.SIGSTOP if freeze else signal.SIGKILL)
    outcomes = await running
    found["seconds"] = load.now_s()
    after = await _live(at)
    found |= {"requests": after["requests"], "failures": after["failures"], "load": summarise(outcomes)}
    if kill == "replica":
        while not _back(after, pid) and load.now_s() - found["killed"]["at_s"] < BACK_S:
            await asyncio.sleep(0.1)
            after = await _live(at)
        found["back_after_s"] = load.now_s() - found["killed"]["at_s"] if _back(after, pid) else None
    return outcomes, found


def _back(live: dict[str, Any], pid: int | None) -> bool:
    """Whether another process has taken the place of that one."""
    return live["replicas"][0]["pid"] not in (None, pid)


async def _live(at: Server) -> dict[str, Any]:
    status, found = await ask(at, "GET", "/live")
    assert status == 200 and isinstance(found, dict), (status, found)
    return found


if __name__ == "__main__":
    main()
