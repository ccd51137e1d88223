"""`rowcast serve` as a process of its own, as a user starts it. Torch-free."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import IO

from rowcast.errors import UserError

_ADDRESS = re.compile(r"listening at (http://[\w.\[\]:-]+:\d+)")
_KEPT_LINES = 400
_POLL_S = 0.05
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Without the environment's proxies: the server is on this machine."""


class ServerProcess:
    """A server on a port that it finds, ready when the context is entered and ended when it is left."""

    def __init__(
        self,
        model: str,
        options: Sequence[str] = (),
        *,
        command: Sequence[str] = (sys.executable, "-m", "rowcast", "serve"),
        start_s: float = 600.0,
        stop_s: float = 60.0,
    ) -> None:
        """`options`: of `rowcast serve`. `start_s`, `stop_s`: how long to wait for it to be ready, and to end by itself."""
        self._command = [*command, model, "--port", "0", *options]
        self._start_s = start_s
        self._stop_s = stop_s
        self._said: deque[str] = deque(maxlen=_KEPT_LINES)
        self._address = threading.Event()
        self._readers: list[threading.Thread] = []
        self._process: subprocess.Popen[str] | None = None
        self.url = ""

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def said(self) -> list[str]:
        """The last lines that it wrote."""
        return list(self._said)

    def __enter__(self) -> ServerProcess:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        for stream in (self._process.stdout, self._process.stderr):
            self._readers.append(threading.Thread(target=self._read, args=(stream,), daemon=True))
            self._readers[-1].start()
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def ready(self) -> bool:
        """What its `/ready` says now."""
        try:
            with _OPENER.open(f"{self.url}/ready", timeout=10) as answer:
                return bool(answer.status == 200)
        except OSError:  # HTTPError and URLError among them
            return False

    def stop(self) -> int:
        """Ask it to end, and end it where it does not. Returns its exit code. May be called twice."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(self._stop_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        for reader in self._readers:
            reader.join(self._stop_s)  # the ranks hold the other ends of these pipes, too
        return code

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self._said.append(line.rstrip("\n"))
            if not self._address.is_set() and (found := _ADDRESS.search(line)):
                self.url = found[1]
                self._address.set()

    def _wait(self) -> None:
        until_s = time.monotonic() + self._start_s
        while not (self._address.is_set() and self.ready()):
            assert self._process is not None
            if (code := self._process.poll()) is not None:
                for reader in self._readers:
                    reader.join(self._stop_s)
                last = next((line for line in reversed(self._said) if line.strip()), "it said nothing")
                raise UserError(f"the server ended with exit code {code} before it was ready: {last.removeprefix('rowcast: ')}")
            if time.monotonic() > until_s:
                raise UserError(f"the server was not ready after {self._start_s:g} s: start it by hand and give its --url")
            time.sleep(_POLL_S)
