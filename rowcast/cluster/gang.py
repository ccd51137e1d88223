"""A gang: the ranks that together hold one model, from their start to their end. They live and die together."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TypeVar

import zmq

from rowcast.cluster.launcher import Launcher, Ranks
from rowcast.cluster.link import Link
from rowcast.cluster.wire import (
    Answer,
    Ask,
    Command,
    Done,
    Failed,
    Hello,
    Message,
    Order,
    Progress,
    Ready,
    Rendezvous,
    Stop,
    WireError,
    encode,
)
from rowcast.errors import OutOfMemoryError, UserError
from rowcast.runtime.progress import LoadProgress
from rowcast.runtime.step import SeqResult

log = logging.getLogger("rowcast")

_LOOK_S = 0.1
"""Between two looks at whether ranks have ended, while none says anything."""
_TOGETHER_S = 2.0
"""Within which all ranks refuse a command, where it is the command's fault."""
_DYING_S = 0.3
"""From the end of a rank's connection to that of its process, where it was killed."""
_STOP_S = 5.0
"""That ranks have to end in order."""

_NO_DRAFT = Answer([], [], [], "the round was broken off while its draft ran in the driver")

M = TypeVar("M", bound=Message)


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a gang's driver waits, and how often it begins anew."""

    start_s: float = 1800.0
    """For the slowest rank to load the model."""
    step_s: float = 300.0
    """For a round, compiling and capturing included; ranks wait as long for each other."""
    silence_s: float = 5.0
    """For a sign of life of a rank's process, which a busy one gives, too."""
    failures: int = 3
    """That are too many, if fewer than `calm_steps` steps lie between them."""
    calm_steps: int = 100

    def __post_init__(self) -> None:
        for name, least in (("start_s", 0.1), ("step_s", 0.1), ("silence_s", 0.1), ("failures", 1), ("calm_steps", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} has to be at least {least}")


class RankFailure(Exception):
    """A rank died, froze, raised, or disagrees with the others: the gang is of no use any more. One sentence, without full stop."""


class Gang:
    """Started ranks that have met and loaded. Used by one thread. After a RankFailure all that is left to do is `kill`."""

    def __init__(self, launcher: Launcher, order: Order, limits: Limits, bar: LoadProgress | None = None) -> None:
        """Start them. Raises RankFailure, and the UserError that a rank raised; nothing is left running then."""
        self.alive = True
        self._world = order.world
        self._limits = limits
        self._bar = bar
        self._serial = 0
        self._draft: Callable[[Ask], Answer] | None = None
        self._drafting_s = 0.0
        """Spent in it."""
        self._carried_out = 0
        """Serial number of the last command that rank 0 has answered: during the next one it asks for drafts."""
        self._torn = False
        """The sending of a message was broken off, so that only some ranks may have it."""
        self._driver = os.getpid()
        self._placed: dict[int, int] = {}
        self._ranks: Ranks | None = None
        self._links: list[Link] = []
        self.pids: list[int] = []
        """Of the ranks' processes."""
        token = secrets.token_hex(16)
        try:
            for address in launcher.addresses(order.world):
                self._links.append(Link.bind(address, limits.silence_s))
            self._poller = zmq.Poller()
            for link in self._links:
                self._poller.register(link.socket, zmq.POLLIN)
                self._poller.register(link.watch, zmq.POLLIN)
            self._ranks = launcher.start([link.address for link in self._links], token)
            self._start(order, token)
        except BaseException:
            self.kill()
            raise

    def _start(self, order: Order, token: str) -> None:
        hellos = self._gather(Hello, self._limits.start_s)
        for rank, hello in enumerate(hellos):
            if (hello.token, hello.rank) != (token, rank):
                raise RankFailure(f"rank {rank}'s socket was taken by another process")
        self.pids = [hello.pid for hello in hellos]
        self._send(order)
        [where] = self._gather(Rendezvous, self._limits.start_s, ranks=range(1))
        self._send(where, first=1)
        ready = self._gather(Ready, self._limits.start_s)
        log.info("%s ranks are ready, the slowest took %.1f s", self._world, max(each.seconds for each in ready))

    def call(self, command: Command, draft: Callable[[Ask], Answer] | None = None) -> list[SeqResult]:
        """Have all ranks carry it out; its serial number is given here. Returns rank 0's results. `draft`: answers what they ask
        meanwhile; its time is not the ranks'.

        Raises RankFailure. A UserError that all ranks raise is raised here, and the gang lives on; one that only some raise ends it.
        After any other exception, such as KeyboardInterrupt, the ranks may be at it still: the next call drops what they say of it.
        """
        assert self.alive
        if self._torn:
            raise RankFailure("a message to the ranks was broken off")
        if self._draft is not None and self._carried_out < self._serial:
            self._draft = lambda _: _NO_DRAFT
            with suppress(UserError):
                self._gather(Done, self._limits.step_s, ranks=range(1))
        data = encode(replace(command, serial=self._serial + 1))
        self._torn = True
        self._serial, self._draft = self._serial + 1, draft
        self._send_bytes(data)
        replies = self._gather(Done, self._limits.step_s)
        if len({reply.digest for reply in replies}) > 1:
            raise RankFailure("the ranks do not agree on a round's tokens")
        return replies[0].results

    def look(self) -> None:
        """Raise RankFailure if a rank has ended or fallen silent. For moments without a command; does not wait."""
        if lost := self._lost(dict(self._poller.poll(0))):
            raise RankFailure(lost)

    def stop(self) -> None:
        """End it in order; what does not end within some seconds is killed. May be called twice, and after `kill`."""
        if not self.alive or os.getpid() != self._driver:
            return
        if self._draft is not None and self._carried_out < self._serial:  # they may wait for drafts
            self.kill()
            return
        with suppress(RankFailure):
            self._send(Stop())
        assert self._ranks is not None
        self._ranks.wait(_STOP_S)
        self.kill()

    def kill(self) -> None:
        """End it now. May be called twice."""
        if not self.alive or os.getpid() != self._driver:
            return
        self.alive = False
        for link in self._links:
            link.close()
        if self._ranks is not None:
            self._ranks.kill()

    def _send(self, message: Message, first: int = 0) -> None:
        """To all ranks from `first` on."""
        self._send_bytes(encode(message), first)

    def _send_bytes(self, data: bytes, first: int = 0) -> None:
        self._torn = True
        for rank, link in enumerate(self._links[first:], start=first):
            try:
                link.send_bytes(data)
            except ConnectionError as error:
                assert self._ranks is not None
                raise RankFailure(f"rank {rank} {self._ranks.dead().get(rank, 'has closed its socket')}") from error
        self._torn = False

    def _gather(self, wanted: type[M], timeout_s: float, ranks: range | None = None) -> list[M]:
        """One such message of each rank, in rank order; what else they say is looked after meanwhile."""
        ranks = range(self._world) if ranks is None else ranks
        found: dict[int, M] = {}
        refused: dict[int, Failed] = {}
        until = time.monotonic() + timeout_s
        lost: str | None = None
        while len(found) + len(refused) < len(ranks):
            ready = dict(self._poller.poll(0 if lost else round(_LOOK_S * 1000)))
            for rank, link in enumerate(self._links):
                if link.socket not in ready:
                    continue
                drafting_s = self._drafting_s
                message = self._message(rank, link)
                until += self._drafting_s - drafting_s
                if isinstance(message, Failed) and message.kind == "error":
                    died = self._dead(wait=True)  # of which it may be the consequence
                    raise RankFailure(died or f"rank {rank} raised {_last_line(message.text)}\n{message.text}")
                if wanted is Done and rank not in ranks:
                    continue
                if isinstance(message, Failed):
                    if not refused:
                        until = min(until, time.monotonic() + _TOGETHER_S)
                    refused[rank] = message
                elif message is not None:
                    if not isinstance(message, wanted):
                        raise RankFailure(f"rank {rank} said {type(message).__name__} in place of {wanted.__name__}")
                    found[rank] = message
            if lost and not any(link.socket in ready for link in self._links):
                raise RankFailure(lost)  # it has no last word
            if not refused and lost is None:
                lost = self._lost(ready)
            if time.monotonic() > until:
                break
        if refused:
            if len(refused) < len(ranks) or wanted is not Done:
                self.kill()
            first = refused[min(refused)]
            raise (OutOfMemoryError if first.kind == "memory" else UserError)(first.text)
        missing = [rank for rank in ranks if rank not in found]
        if missing:
            raise RankFailure(f"rank {missing[0]} did not answer within {timeout_s:g} s")
        return [found[rank] for rank in ranks]

    def _message(self, rank: int, link: Link) -> Message | None:
        """The rank's next message, unless it is one on progress or the answer to an earlier command."""
        try:
            message = link.receive()
        except WireError as error:
            raise RankFailure(f"rank {rank} sent what is no message: {error}") from error
        if isinstance(message, Progress):
            self._note_progress(rank, message)
            return None
        if isinstance(message, Ask) and self._draft is not None:
            if rank:
                raise RankFailure(f"rank {rank} asked for a draft, as rank 0 does for all")
            self._answer(message)
            return None
        if isinstance(message, (Done, Failed)) and message.serial >= 0:
            if rank == 0:
                self._carried_out = message.serial
            if message.serial < self._serial:
                return None  # to a command whose caller was interrupted
        return message

    def _answer(self, ask: Ask) -> None:
        """Tell all ranks what the draft proposes; where it is interrupted, that nothing comes."""
        assert self._draft is not None
        started = time.monotonic()
        try:
            answer = self._draft(ask)
        except BaseException:
            with suppress(RankFailure):
                self._send(_NO_DRAFT)
            raise
        self._drafting_s += time.monotonic() - started
        self._send(answer)

    def _lost(self, ready: dict[object, int]) -> str | None:
        """A rank that has ended or fallen silent, and how, if there is one."""
        silent = [rank for rank, link in enumerate(self._links) if link.watch in ready and link.lost()]
        if ready and not silent:
            return None
        unheard = f"rank {silent[0]} gave no sign of life for {self._limits.silence_s:g} s" if silent else None
        return self._dead(wait=bool(silent)) or unheard

    def _dead(self, *, wait: bool) -> str | None:
        """A rank that has ended, and how, if there is one. `wait`: a moment, for one that is about to be known as such."""
        assert self._ranks is not None
        until = time.monotonic() + (_DYING_S if wait else 0.0)
        while not (dead := self._ranks.dead()) and time.monotonic() < until:
            time.sleep(_LOOK_S / 10)
        return next((f"rank {rank} {how}" for rank, how in dead.items()), None)

    def _note_progress(self, rank: int, progress: Progress) -> None:
        if self._bar is None:
            return
        if rank not in self._placed:
            self._placed[rank] = progress.total
            self._bar.expect(sum(self._placed.values()))
        self._bar.advance(progress.placed)


def _last_line(trace: str) -> str:
    return trace.strip().splitlines()[-1] if trace.strip() else "an exception"
