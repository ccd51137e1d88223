"""Command lines as jobs of a Ray cluster: submitted with the code beside them, followed, stopped. Torch-free.

A job runs on the cluster's head node and is itself a driver: ranks that it asks for are placed by the cluster.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rowcast.errors import UserError

log = logging.getLogger("rowcast")

OBJECT_STORE_BYTES = 100 << 20
"""Of a cluster that is started here: no tensor goes through it."""

ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Where Ray itself looks, in this order."""

_REACH_S = 5.0
"""For a first connection; Ray's own attempts take most of a minute."""
_POLL_S = 0.2
_STOP_S = 30.0
_PORTS = {"http": 80, "https": 443, "ray": 10001}
_OWN = "local"


@dataclass(frozen=True, slots=True)
class Job:
    """One submitted job. Its methods raise UserError where the cluster does not know it, and where it cannot be reached."""

    id: str
    cluster: Cluster

    def status(self) -> str:
        """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
        return str(self._info().status.value)

    def message(self) -> str:
        """Ray's word on its state, one line."""
        return " ".join((self._info().message or "").split("\n", 1)[0].split())

    def logs(self) -> str:
        """All that it has printed so far, on standard output and standard error."""
        with self.cluster.asked(self.id):
            return str(self.cluster.client.get_job_logs(self.id))

    def follow(self, write: Callable[[str], object]) -> int:
        """Hand what it prints, from the beginning, to `write` until it ends; then as `wait`. A connection that breaks is made anew."""
        seen = 0

        def note(text: str) -> None:
            nonlocal seen
            seen += len(text)
            write(text)

        while not self._ended():
            try:
                asyncio.run(self._tail(seen, note))
            except UserError:
                raise
            except Exception as error:  # of many kinds: the connection was closed; `_ended` tells of a cluster that is gone
                log.info("%s", error)
            time.sleep(_POLL_S)
        if rest := self.logs()[seen:]:
            write(rest)
        return self.wait()

    def wait(self) -> int:
        """Its exit code, once it has ended: 128 + N where signal N killed it, 1 where it was stopped or never ran."""
        while not self._ended():
            time.sleep(_POLL_S)
        code: int | None = self._info().driver_exit_code
        if code is None:
            return 0 if self.status() == "SUCCEEDED" else 1
        return code if code >= 0 else 128 - code

    def stop(self) -> str:
        """Ask it to end and wait for that, some seconds; its status then. A job that has ended stays as it is."""
        with self.cluster.asked(self.id):
            self.cluster.client.stop_job(self.id)
        until = time.monotonic() + _STOP_S
        while not self._ended() and time.monotonic() < until:
            time.sleep(_POLL_S)
        return self.status()

    async def _tail(self, skip: int, write: Callable[[str], object]) -> None:
        """Until the job ends; the connection itself is closed seconds later."""
        tail = asyncio.create_task(_copy(self.cluster.client.tail_job_logs(self.id), skip, write))
        try:
            while not await asyncio.to_thread(self._ended):
                ended, _ = await asyncio.wait({tail}, timeout=_POLL_S)
                if ended:
                    return await tail  # raises what it raised
        finally:
            tail.cancel()

    def _ended(self) -> bool:
        return bool(self._info().status.is_terminal())

    def _info(self) -> Any:
        with self.cluster.asked(self.id):
            return self.cluster.client.get_job_info(self.id)


@dataclass(frozen=True, slots=True)
class Cluster:
    """A Ray cluster that takes jobs."""

    client: Any
    """Ray's JobSubmissionClient."""
    address: str
    """Of its dashboard."""
    started: bool
    """It was started here, and ends with this process."""
    here: bool
    """It runs on this machine."""

    @contextmanager
    def asked(self, job_id: str | None = None) -> Iterator[None]:
        """Ray's exceptions as UserError."""
        try:
            yield
        except (RuntimeError, ConnectionError) as error:
            if job_id is not None and "404" in str(error):
                raise UserError(
                    f"the Ray cluster at {self.address} knows no job {job_id!r:.80}: see `ray job list --address {self.address}`"
                ) from None
            raise UserError(f"the Ray cluster at {self.address} answered: {_line(error)}") from None
        except OSError as error:  # of requests
            raise UserError(f"the Ray cluster at {self.address} cannot be reached: {_line(error)}") from None


def quiet() -> None:
    """Have Ray say errors only: it tells of every file that it leaves out."""
    import_module("ray")  # which sets its own level
    logging.getLogger("ray").setLevel(logging.ERROR)


def submit(
    args: Sequence[str],
    *,
    address: str | Cluster | None = None,
    working_dir: str | Path = ".",
    python: str | None = None,
    env: Mapping[str, str] | None = None,
    gpus: float = 0,
) -> Job:
    """Run `rowcast ARGS` as a job; returns at once.

    `address`: as for `find`. `working_dir`: the folder that the job starts in, shipped without what .gitignore and .rayignore name;
    where it is no checkout of Rowcast, the package goes along. `python`: the interpreter there; None: this one on a cluster of this
    machine, else `python`. `env`: its environment variables. `gpus`: for the job's own process, which needs one only where it is the
    one rank.
    Raises UserError.
    """
    args = [str(arg) for arg in args]
    if not args:
        raise UserError("no command was given: append one, as in `rowcast submit -- generate ...`")
    folder = Path(working_dir)
    if not folder.is_dir():
        raise UserError(f"the working directory {str(working_dir)!r:.200} is no folder: name the one that the job is to start in")
    cluster = address if isinstance(address, Cluster) else find(address, cpus=ranks(args))
    runtime_env: dict[str, Any] = {"working_dir": str(folder.resolve()), "excludes": ["__pycache__/"]}
    if not (folder / "rowcast" / "__main__.py").is_file():
        runtime_env["py_modules"] = [str(Path(__file__).parents[1])]
    if env:
        runtime_env["env_vars"] = dict(env)
    interpreter = python or (sys.executable if cluster.here else "python")
    try:
        with cluster.asked():
            job_id = cluster.client.submit_job(
                entrypoint=shlex.join([interpreter, "-m", "rowcast", *args]),
                runtime_env=runtime_env,
                entrypoint_num_gpus=gpus or None,
            )
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"Ray does not take the working directory {str(working_dir)!r:.200}: {_line(error)}"
        ) from None  # too large
    return Job(str(job_id), cluster)


def job(job_id: str, *, address: str | Cluster | None = None) -> Job:
    """A job that was submitted before. Raises UserError where there is no such cluster or job."""
    found = Job(job_id, address if isinstance(address, Cluster) else find(address, start=False))
    found.status()
    return found


def find(address: str | None = None, *, start: bool = True, cpus: int = 1) -> Cluster:
    """The cluster at `address` (a dashboard's http://HOST:PORT, ray://HOST:PORT, or HOST:PORT of the cluster itself), at RAY_ADDRESS,
    or that of this machine; else, or for "local", one is started here with at least `cpus` CPUs, unless `start` is false.

    Raises UserError.
    """
    named = address or next((os.environ[name] for name in ADDRESS_VARIABLES if os.environ.get(name)), None)
    if named == _OWN:
        if not start:
            raise UserError("the cluster that --address local starts ends with its command: name one that runs")
        return _start(cpus)
    if named in (None, "auto"):
        return _running(start, cpus)
    assert named is not None
    return _connect(named)


def found_here() -> str | None:
    """HOST:PORT of the cluster that Ray finds on this machine. One that was killed leaves its address behind: see `answers`."""
    from ray._private import services

    try:
        with _unnamed():
            return str(services.canonicalize_bootstrap_address("auto"))
    except ConnectionError:
        return None


def answers(address: str) -> bool:
    """Whether a connection to HOST:PORT, or SCHEME://HOST:PORT, is taken within seconds: Ray itself tries for minutes.

    True for SCHEME:// without a port, where the scheme is Ray's to judge.
    """
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        port = parts.port or _PORTS.get(parts.scheme)
        if port is None and parts.scheme:
            return True
        socket.create_connection((parts.hostname or "", port or 0), _REACH_S).close()
    except (OSError, ValueError):
        return False
    return True


def _running(start: bool, cpus: int) -> Cluster:
    """That of this machine."""
    address = found_here()
    if address is None or not answers(address):
        if not start:
            raise UserError("no Ray cluster runs on this machine: name one with --address, or start one with `ray start --head`")
        if address is not None:
            log.warning("the Ray cluster that was found at %s does not answer: one is started here", address)
        return _start(cpus)
    try:
        return _client("auto")
    except Exception as error:  # Ray's own, where the cluster has no dashboard
        _check_token(error, "of this machine")
        raise UserError(
            f"the Ray cluster of this machine takes no jobs ({_line(error)}): start it with a dashboard, or name another with --address"
        ) from None


def _connect(address: str) -> Cluster:
    wrong = f"the Ray address {address!r:.120} cannot be used"
    form = "give http://HOST:PORT of the dashboard, or HOST:PORT of the cluster"
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UserError(f"{wrong} ({error}): {form}") from None
    if not host or parts.scheme not in ("", *_PORTS) or (port is None and not parts.scheme):
        raise UserError(f"{wrong}: {form}")
    try:
        socket.create_connection((host, port or _PORTS[parts.scheme]), _REACH_S).close()
    except OSError as error:
        raise UserError(
            f"no Ray cluster can be reached at {address} ({error.strerror or error}): check the address, and that the cluster runs"
        ) from None
    try:
        return _client(address)
    except Exception as error:  # of many kinds: no Ray there, another version, no dashboard
        _check_token(error, f"at {address}")
        raise UserError(f"{wrong}, there is no Ray dashboard ({_line(error)}): {form}") from None


def _check_token(error: Exception, where: str) -> None:
    if "AuthenticationError" in type(error).__name__ or "InvalidAuthToken" in str(error):
        raise UserError(
            f"the Ray cluster {where} wants its token: set RAY_AUTH_MODE=token, and see `ray get-auth-token --help`"
        ) from None


def _start(cpus: int) -> Cluster:
    import ray as untyped_ray

    ray: Any = untyped_ray
    context = ray.init(
        address=_OWN,
        num_cpus=max(cpus, os.cpu_count() or 1),
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=True,
        dashboard_port=_free_port(),
        log_to_driver=False,
        logging_level=logging.ERROR,
        ignore_reinit_error=True,
    )
    if not context.dashboard_url:
        raise UserError(
            "the Ray cluster of this process has no dashboard, so it takes no jobs: start it with include_dashboard=True"
        )
    own = _client(context.dashboard_url if "://" in context.dashboard_url else f"http://{context.dashboard_url}")
    return Cluster(own.client, own.address, started=True, here=True)


def _client(address: str) -> Cluster:
    """Raises what Ray raises."""
    from ray.job_submission import JobSubmissionClient

    with _unnamed():
        client: Any = JobSubmissionClient(address)
    dashboard = str(client.get_address())
    return Cluster(client, dashboard, started=False, here=_is_here(urlsplit(dashboard).hostname or ""))


@contextmanager
def _unnamed() -> Iterator[None]:
    """Without Ray's variables, which would override an address that is given."""
    kept = {name: os.environ.pop(name) for name in ADDRESS_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _is_here(host: str) -> bool:
    """Whether a socket can be bound to it."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.bind((host, 0))
    except OSError:
        return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ranks(args: Sequence[str]) -> int:
    """What the command line asks for with --tp."""
    for i, arg in enumerate(args):
        value = args[i + 1] if arg == "--tp" and i + 1 < len(args) else arg.removeprefix("--tp=") if "--tp=" in arg else ""
        if value.isascii() and value.isdigit():
            return int(value)
    return 1


async def _copy(texts: AsyncIterator[str], skip: int, write: Callable[[str], object]) -> None:
    """All but the first `skip` characters."""
    async for text in texts:
        if text[skip:]:
            write(text[skip:])
        skip = max(0, skip - len(text))


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300].rstrip(".")
