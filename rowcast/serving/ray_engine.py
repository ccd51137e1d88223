"""An engine replica of a Ray Serve application: one model on its own gang, for any number of ingresses."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Mapping
from typing import Any

from rowcast.cluster.launcher import Launcher, LocalLauncher
from rowcast.cluster.metrics import choose_exporter
from rowcast.errors import UserError
from rowcast.runtime.metrics import REPLICA
from rowcast.runtime.tokenizer import Tokenizer
from rowcast.serving.ray_session import Batch, Command, Hello, Session
from rowcast.serving.service import ServiceSettings, engine_service

log = logging.getLogger("rowcast")

_UNBOUNDED = 1 << 30
"""The queue is the ingress's; what comes here is to run."""


class EngineReplica:
    """Ray Serve makes one for each deployment, and again whenever it dies. Its methods belong to the event loop that Serve runs."""

    async def __init__(  # type: ignore[misc]
        self, number: int, name: str, arguments: Mapping[str, Any], ranks: int, gpus: int, cpus: float
    ) -> None:
        """Load the model. `number`: among the replicas. `arguments`: `LLM`'s. `gpus` and `cpus` of a rank. Raises what `LLM` raises."""
        self._service = engine_service(
            settings=ServiceSettings(name=name, max_waiting=_UNBOUNDED),
            tensor_parallel_size=ranks,
            launcher=_launcher(number, ranks, gpus, cpus),
            also=_Numbered(number),
            progress=False,
            **arguments,
        )
        self._sessions: dict[str, Session] = {}
        await self._service.start()

    async def attach(self, name: str) -> AsyncIterator[Hello | Batch]:
        """Open a session: all that happens to its requests, until it is closed or nobody is heard of at the other end."""
        session = self._sessions[name] = Session(self._service)
        try:
            yield Hello(self._service.card, self._service.slots, os.getpid())
            while not session.lapsed:
                yield await session.next()
            log.warning("an ingress with %s requests is not heard of any more", session.running)
        finally:
            del self._sessions[name]
            await session.close()

    async def obey(self, name: str, commands: list[Command]) -> bool:
        """What a session's ingress wants; False if the session is not one of this replica."""
        session = self._sessions.get(name)
        if session is not None:
            session.obey(commands)
        return session is not None

    async def describe(self) -> Tokenizer | str:
        """The model's tokenizer, or why there is none."""
        try:
            return self._service.tokenizer.bare()
        except UserError as error:
            return str(error)

    async def live(self) -> dict[str, Any]:
        """As `Backend.live`."""
        return await self._service.live()

    async def check_health(self) -> None:
        """Ray Serve calls it; raises where only a new replica would help."""
        state, reason = self._service.state()
        if state == "stopped":
            raise RuntimeError(reason)

    async def __del__(self) -> None:
        """Ray Serve awaits it before it ends the process."""
        service = getattr(self, "_service", None)
        if service is not None and service.state()[0] not in ("stopped", "starting"):
            await service.drain(0.0)


class _Numbered:
    """An `Exporter` to Ray's metrics, under the replica's number."""

    def __init__(self, number: int) -> None:
        """Precondition: the process is connected to Ray."""
        self._ray = choose_exporter("ray")
        self._number = {REPLICA: f"{number}"}

    def add(self, name: str, amount: float, labels: Mapping[str, str]) -> None:
        self._ray.add(name, amount, {**labels, **self._number})

    def set(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        self._ray.set(name, value, {**labels, **self._number})

    def observe(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        self._ray.observe(name, value, {**labels, **self._number})


def _launcher(number: int, ranks: int, gpus: int, cpus: float) -> Launcher:
    """One rank is a process beside the replica, with its GPU; more have places of their own."""
    if ranks == 1:
        return LocalLauncher()
    from rowcast.cluster.ray_launcher import RayLauncher

    return RayLauncher(gpus=gpus, cpus=cpus, replica=number)
