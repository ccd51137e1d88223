"""Ranks for tests, forked from one process that has imported everything: a gang starts in a fraction of a second.

`python warm_ranks.py` reads lines "address rank token fault" and answers each with a process id.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any


class WarmLauncher:
    """Implements `Launcher`. `faults`: for each of the gangs that are started next, what goes wrong by rank; see `misbehave`."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(os.getpid())], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.faults: list[dict[int, str]] = []
        self.started = 0
        """Gangs."""

    def addresses(self, world: int) -> list[str]:
        self._folder = tempfile.mkdtemp(prefix="rowcast-test-")
        return [f"ipc://{self._folder}/{rank}" for rank in range(world)]

    def start(self, addresses: Sequence[str], token: str) -> WarmRanks:
        assert self._server.stdin is not None and self._server.stdout is not None
        self.started += 1
        faults = self.faults.pop(0) if self.faults else {}
        pids = []
        for rank, address in enumerate(addresses):
            print(address, rank, token, faults.get(rank, "none"), file=self._server.stdin, flush=True)
            pids.append(int(self._server.stdout.readline()))
        return WarmRanks(pids, self._folder)

    def close(self) -> None:
        self._server.kill()
        self._server.communicate()


class WarmRanks:
    """Implements `Ranks`; the server reaps them."""

    def __init__(self, pids: list[int], folder: str) -> None:
        self.pids, self._folder = pids, folder

    def dead(self) -> dict[int, str]:
        return {rank: "has ended" for rank, pid in enumerate(self.pids) if not Path(f"/proc/{pid}").exists()}

    def wait(self, timeout_s: float) -> bool:
        until = time.monotonic() + timeout_s
        while len(self.dead()) < len(self.pids):
            if time.monotonic() > until:
                return False
            time.sleep(0.01)
        return True

    def kill(self) -> None:
        for rank, pid in enumerate(self.pids):
            if rank not in self.dead():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        assert self.wait(20)
        shutil.rmtree(self._folder, ignore_errors=True)


def misbehave(fault: str) -> None:
    """`fault`: "none"; "interpret": none, but rounds run on the device, by Triton's interpreter; interpret@FILE: each pass adds
    its rung to FILE, the last a new line; WHAT@N: die or freeze when the N-th
    round of a ladder begins, raise in it, starve (out of memory), or lie about its tokens; die@load; whim: gammas by chance."""
    from rowcast.cluster import rank
    from rowcast.errors import OutOfMemoryError
    from rowcast.runtime.assembly import _Assembly
    from rowcast.runtime.device_round.rounds import DeviceRounds
    from rowcast.runtime.executor import LocalExecutor
    from rowcast.runtime.ladder.control import Controller
    from rowcast.runtime.step import SeqResult, SeqStep

    what, _, at = fault.partition("@")
    if what == "none":
        return
    if what == "interpret":
        from triton_interpreting import remember_what_does_not_change, take_arrays_as_bounds

        from rowcast.kernels import gpu
        from rowcast.placement import workload

        remember_what_does_not_change()
        take_arrays_as_bounds()
        gpu.interpreted = True
        workload.LATE_BYTES = 0
        rounds_of = _Assembly._rounds

        def by_itself(self: _Assembly, *arguments: Any) -> Any:
            rounds = rounds_of(self, *arguments)
            assert rounds is not None, "rounds are driven by the host"
            return rounds

        _Assembly._rounds = by_itself  # type: ignore[method-assign, assignment]
        if at:
            run = DeviceRounds._run

            def told(self: DeviceRounds, state: Any, p: Any, *arguments: Any) -> Any:
                with open(at, "a") as file:
                    file.write(f"{p.rung}\n" if p.rung == len(self._rungs) - 1 else f"{p.rung} ")
                return run(self, state, p, *arguments)

            DeviceRounds._run = told  # type: ignore[method-assign, assignment]
        return
    if what == "whim":

        def choose(
            self: Controller, group: int, *, path: Path, room: int, allowed: Sequence[bool], **_: object
        ) -> tuple[int, ...]:
            return tuple(ok and int.from_bytes(os.urandom(1), "big") % (min(room, 3) + 1) for ok in allowed)

        Controller.choose = choose  # type: ignore[method-assign, assignment]
        return
    if at == "load":

        def die(*_: object) -> None:
            os._exit(7)

        rank.load = die  # type: ignore[assignment]
        return
    rounds = 0
    step = LocalExecutor.step

    def faulty(self: LocalExecutor, steps: Sequence[SeqStep]) -> list[SeqResult]:
        nonlocal rounds
        rounds += 1
        if rounds == int(at):
            if what in ("die", "freeze"):
                os.kill(os.getpid(), signal.SIGKILL if what == "die" else signal.SIGSTOP)
            elif what == "raise":
                raise RuntimeError("a fault was asked for")
            elif what == "starve":
                raise OutOfMemoryError("the device ran out of memory, as was asked for")
        results = step(self, steps)
        if what == "lie" and rounds == int(at):
            results[0].tokens[:] = [0]
        return results

    LocalExecutor.step = faulty  # type: ignore[method-assign]


def serve(driver: int) -> None:
    import torch

    import rowcast.cluster.rank as rank_module
    import rowcast.runtime.assembly  # noqa: F401

    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    server = os.getpid()
    for line in sys.stdin:
        address, rank, token, fault = line.split()
        pid = os.fork()
        if pid:
            print(pid, flush=True)
            continue
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        code = 1
        try:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            misbehave(fault)
            rank_module.run(address, token, int(rank), parent=server)
            code = 0
        finally:
            os._exit(code)


if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system reaps them
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve(int(sys.argv[1]))
