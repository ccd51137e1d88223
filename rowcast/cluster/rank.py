"""One rank of a gang, from its first word to its last: meet the others, load a share of the model, carry out commands.

It knows the driver by a socket and the other ranks by a process group; what started it, a process or a Ray actor, it does not know.
A rank that has lost its driver ends itself, whatever it is doing.
"""

from __future__ import annotations

import gc
import logging
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import torch
import torch.distributed as dist

from rowcast.cluster.distributed_comm import DistributedComm, Store, find_store, join, keep_store, synchronise
from rowcast.cluster.drafting import DriverRelay
from rowcast.cluster.link import Link
from rowcast.cluster.wire import Command, Done, Failed, Hello, Message, Order, Progress, Ready, Rendezvous, Stop
from rowcast.errors import OutOfMemoryError, UserError
from rowcast.placement.plan import Plan
from rowcast.runtime import device as devices
from rowcast.runtime.assembly import assemble
from rowcast.runtime.checkpoint import open_checkpoint
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.device_round.program import BATCHES
from rowcast.runtime.executor import LocalExecutor
from rowcast.runtime.ladder.coupled import Coupled
from rowcast.runtime.ladder.maximal import Maximal
from rowcast.runtime.ladder.rule import Rule
from rowcast.runtime.planning import Target, Wish, check_plan
from rowcast.runtime.sampler import Sampler
from rowcast.runtime.step import Executor, SeqResult
from rowcast.runtime.trace import Trace
from rowcast.settings import configure_logging, settings

log = logging.getLogger("rowcast")

ORPHANED = 3
"""Exit code of a rank whose driver has gone."""

_WATCH_S = 0.5
"""Between two looks at the driver."""
_MEETING_S = 600.0
"""After which a rank no longer waits for its order, or where to meet the others."""
_PROGRESS_S = 0.1
"""Between two words on loading."""


def run(
    address: str, token: str, rank: int, *, host: str = "127.0.0.1", gpu: int | None = None, parent: int | None = None
) -> None:
    """Serve the driver at `address` until it says stop. Returns then; ends the process where the driver has gone.

    `host`: this machine, as the other ranks find it. `gpu`: index of the device, where the plan is for GPUs (None: the rank). `parent`:
    the process without which this one has no use, beside the driver.
    """
    configure_logging()
    tag_logs(rank)
    if host.startswith("127."):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with Link.connect(address) as link:
        stopping = threading.Event()
        watcher = threading.Thread(target=_watch, args=(link, address, parent, stopping), daemon=True)
        watcher.start()
        try:
            link.send(Hello(token, rank, os.getpid(), host))
            order = link.receive(_MEETING_S)
            assert isinstance(order, Order)
            _run(link, order, rank, host, rank if gpu is None else gpu)
        finally:
            stopping.set()
            watcher.join()


def _run(link: Link, order: Order, rank: int, host: str, gpu: int) -> None:
    try:
        started = time.perf_counter()
        store = _meet(link, order, rank, host)
        executor = load(order, store, rank, gpu, link)
        trace = _trace(executor, rank)
        synchronise()
        seconds = time.perf_counter() - started
        log.info("process %s is ready after %.1f s", os.getpid(), seconds)
        link.send(Ready(seconds))
    except Exception as error:
        link.send(_failed(-1, error))
        link.receive(_MEETING_S)  # the driver ends all ranks
        return
    try:
        serve(executor, link, rank, trace)
    finally:
        if trace is not None:
            trace.close()
    del executor
    dist.destroy_process_group()
    del store  # which rank 0 keeps for all, last


def free() -> None:
    """Give back what this process held of a GPU. For the end of a rank that is not the end of its process."""
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def serve(executor: Executor, link: Link, rank: int, trace: Trace | None = None) -> None:
    """Carry out commands until `Stop`."""
    while not isinstance(command := link.receive(), Stop):
        assert isinstance(command, Command)
        try:
            started = time.perf_counter()
            results = carry_out(executor, command)
            if trace is not None:
                tokens = sum(len(step.tokens) for step in command.steps)
                seconds = time.perf_counter() - started
                trace.span("command", started, seconds, serial=command.serial, sequences=len(command.steps), tokens=tokens)
        except Exception as error:
            link.send(_failed(command.serial, error))
            continue
        link.send(Done(command.serial, _digest(results), results if rank == 0 else []))


def carry_out(executor: Executor, command: Command) -> list[SeqResult]:
    """What of `Command`'s parts there is, in their order."""
    for seq_id, *length in command.freed:
        if length:
            executor.free_kv(seq_id, *length)
        else:
            executor.remove(seq_id)
    for setup in command.setups:
        executor.add(setup)
    results = executor.step(command.steps) if command.steps else []
    if command.check is not None:
        executor.check(command.check)
    return results


def tag_logs(rank: int) -> None:
    """Have this process's messages begin with the rank."""

    def tag(record: logging.LogRecord) -> bool:
        if not hasattr(record, "rank"):
            record.rank = rank
            record.msg = f"rank {rank}: {record.msg}"
        return True

    log.addFilter(tag)


def _trace(executor: Executor, rank: int) -> Trace | None:
    """Where ROWCAST_TRACE asks for one."""
    folder = settings().trace
    if folder is None or not isinstance(executor, LocalExecutor):
        return None
    trace = Trace(folder, rank)
    executor.record(trace)
    return trace


def load(order: Order, store: Store, rank: int, gpu: int, link: Link) -> Executor:
    """This rank's share of the model. Meets the others first. Raises UserError."""
    torch.set_num_threads(order.threads)
    plan = Plan.decode(order.plan, "the driver's plan")
    if plan.device != "cpu":
        plan = replace(plan, device=f"cuda:{gpu}")
    checkpoint = open_checkpoint(order.model)
    spec = spec_from_config(checkpoint.config)
    target = Target(checkpoint, spec, checkpoint.source.fingerprint(), None)  # the driver has compared vocabularies
    planned = check_plan(plan, target, Wish(calibration=order.calibration, tensor_parallel_size=order.world), {})
    join(store, rank, order.world, timeout_s=order.timeout_s, device=torch.device(plan.device))
    comm = DistributedComm() if order.world > 1 else None  # alone, nothing is sent, not even to itself
    if comm is not None and plan.device != "cpu":
        most = BATCHES[-1] * max(spec.hidden_size, spec.embed_size)
        comm.sum_in_one_shot(most, devices.DTYPES[plan.dtype], torch.device(plan.device))

    def make_rule(sampler: Sampler) -> Rule:
        return Maximal(sampler) if plan.verification == "maximal" else Coupled(sampler)

    def driver_relay(sampler: Sampler) -> DriverRelay:
        laws = plan.verification == "maximal"
        return DriverRelay(link, leads=rank == 0, sampler=sampler, device=torch.device(plan.device), laws=laws)

    reporter = _Reporter(link.send)
    executor = assemble(
        planned,
        checkpoint,
        spec,
        make_rule=make_rule,
        progress=False,
        eager=order.eager,
        comm=comm,
        decisions=comm,
        report=reporter.advance,
        driver_relay=driver_relay,
    )
    reporter.flush()
    return executor


class _Reporter:
    """Tells the driver of bytes placed, now and then."""

    def __init__(self, tell: Callable[[Message], None]) -> None:
        self._tell = tell
        self._placed = self._total = 0
        self._told_at = 0.0

    def advance(self, count: int, total: int) -> None:
        """As `progress.Report`."""
        self._placed, self._total = self._placed + count, total
        if time.perf_counter() - self._told_at >= _PROGRESS_S:
            self.flush()

    def flush(self) -> None:
        """Tell of what was not told of yet."""
        self._tell(Progress(self._placed, self._total))
        self._placed, self._told_at = 0, time.perf_counter()


def _meet(link: Link, order: Order, rank: int, host: str) -> Store:
    """The ranks' store, which rank 0 keeps."""
    if rank == 0:
        store, port = keep_store(host, order.timeout_s)
        link.send(Rendezvous(host, port))
        return store
    where = link.receive(_MEETING_S)
    assert isinstance(where, Rendezvous)
    return find_store(where.host, where.port, order.timeout_s)


def _watch(link: Link, address: str, parent: int | None, stopping: threading.Event) -> None:
    """End the process once nobody needs it. A thread's own work: the main one may be waiting for the other ranks."""
    while not stopping.is_set():
        gone = link.watch.poll(round(_WATCH_S * 1000)) and link.lost()
        if (gone or (parent is not None and os.getppid() != parent)) and not stopping.is_set():
            if address.startswith("ipc://"):  # the driver's folder of sockets, which it did not live to remove
                shutil.rmtree(Path(address.removeprefix("ipc://")).parent, ignore_errors=True)
            os._exit(ORPHANED)


def _digest(results: Sequence[SeqResult]) -> int:
    return crc32(repr([(result.seq_id, result.tokens) for result in results]).encode())


def _failed(serial: int, error: BaseException) -> Failed:
    if isinstance(error, UserError):
        return Failed(serial, "memory" if isinstance(error, OutOfMemoryError) else "user", str(error))
    return Failed(serial, "error", "".join(traceback.format_exception(error))[-(1 << 16) :])


def main(argv: Sequence[str]) -> None:
    """ADDRESS RANK PARENT; the token comes on standard input. For `launcher.LocalLauncher`."""
    address, rank, parent = argv
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C and a service manager's stop are the driver's, which then says stop
        signal.signal(number, signal.SIG_IGN)
    run(address, sys.stdin.readline().strip(), int(rank), parent=int(parent))
    os._exit(0)  # nothing is left to do, and the interpreter takes its time


if __name__ == "__main__":
    main(sys.argv[1:])
