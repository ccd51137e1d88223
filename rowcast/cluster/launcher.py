"""How ranks are started and ended: one interface, and the launcher that makes them processes of this machine."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from rowcast.errors import UserError

_POLL_S = 0.01


class Ranks(Protocol):
    """Started ranks, which know each other and the driver by nothing but their addresses."""

    def dead(self) -> dict[int, str]:
        """Ranks that have ended, each with how. Does not wait."""
        ...

    def wait(self, timeout_s: float) -> bool:
        """Whether all have ended within that time."""
        ...

    def kill(self) -> None:
        """End them all, now, and give back what was taken for them. Returns when they are gone. May be called twice."""
        ...


class Launcher(Protocol):
    """Starts ranks, any number of gangs one after the other."""

    def addresses(self, world: int) -> list[str]:
        """Where the driver is to bind a socket for each rank: ipc://PATH, or tcp://HOST:* for a port that it finds."""
        ...

    def start(self, addresses: Sequence[str], token: str) -> Ranks:
        """One rank for each address of a bound socket, running `rank.run`. Raises UserError where there is no place for them."""
        ...


class LocalLauncher:
    """Each rank is a process of this machine, at a socket in a folder that only this user may enter."""

    def __init__(self, command: Sequence[str] = (sys.executable, "-m", "rowcast.cluster.rank")) -> None:
        """`command`: what runs a rank; takes `rank.main`'s arguments."""
        self._command = list(command)
        self._folder: str | None = None

    def addresses(self, world: int) -> list[str]:
        self._folder = tempfile.mkdtemp(prefix="rowcast-")
        return [f"ipc://{self._folder}/{rank}" for rank in range(world)]

    def start(self, addresses: Sequence[str], token: str) -> Ranks:
        assert self._folder is not None
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        ranks = LocalRanks(self._folder)
        try:
            for rank, address in enumerate(addresses):
                process = subprocess.Popen(
                    [*self._command, address, str(rank), str(os.getpid())],
                    stdin=subprocess.PIPE,
                    stdout=sys.stderr.fileno()
                    if _has_descriptor(sys.stderr)
                    else subprocess.DEVNULL,  # the driver's is for answers
                    env={**os.environ, "PYTHONPATH": path},
                )
                ranks.processes.append(process)
                assert process.stdin is not None
                with process.stdin:
                    process.stdin.write(f"{token}\n".encode())
        except BrokenPipeError:
            pass  # it has ended already, as `dead` will say
        except BaseException:
            ranks.kill()
            raise
        return ranks


class LocalRanks:
    """Processes of this machine. Implements `Ranks`."""

    def __init__(self, folder: str) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self._folder = folder

    def dead(self) -> dict[int, str]:
        ended = {rank: process.poll() for rank, process in enumerate(self.processes)}
        return {rank: how_ended(code) for rank, code in ended.items() if code is not None}

    def wait(self, timeout_s: float) -> bool:
        until = time.monotonic() + timeout_s
        while any(process.poll() is None for process in self.processes):
            if time.monotonic() > until:
                return False
            time.sleep(_POLL_S)
        return True

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def how_ended(code: int) -> str:
    """An exit code as half a sentence."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def choose_launcher(asked: str, *, on_gpu: bool) -> Launcher:
    """`asked` is auto, local or ray. auto: Ray where it is installed. `on_gpu`: each rank takes a GPU."""
    if asked not in ("auto", "local", "ray"):
        raise UserError(f"launcher={asked!r:.40} is not known: use auto, local or ray")
    if asked == "local" or (asked == "auto" and find_spec("ray") is None):
        return LocalLauncher()
    from rowcast.cluster.ray_launcher import RayLauncher

    return RayLauncher(gpus=int(on_gpu))


def _has_descriptor(stream: object) -> bool:
    try:
        stream.fileno()  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        return False
    return True
