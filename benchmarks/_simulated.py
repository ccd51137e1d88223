"""Shapes whose proposals stand at given rates, on one rank or, each with an engine of its own, on several; and long prompts not run."""

from __future__ import annotations

import faulthandler
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from rowcast.bench.shapes import open_shape
from rowcast.cluster.distributed_comm import DistributedComm, find_store, join, keep_store
from rowcast.runtime.assembly import assemble
from rowcast.runtime.checkpoint import Checkpoint
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.device import DTYPES
from rowcast.runtime.device_round.program import BATCHES
from rowcast.runtime.kv.paged import PagedKV
from rowcast.runtime.ladder.rule import Rule
from rowcast.runtime.ladder.simulated import Simulated
from rowcast.runtime.llm import LLM
from rowcast.runtime.planning import Planned
from rowcast.runtime.sampler import Sampler
from rowcast.runtime.step import Executor

LAST = 64
"""Tokens of a prompt that are run in any case: those whose queries choose what a retrieval view shows."""
_TIMEOUT_S, _DUMP_S = 240.0, 200.0
"""Ranks wait for one another; before they give up, stacks are told. Once: faulthandler reads the frames of threads that go on, and told
every 60 s a rank of Python 3.12 crashed as it dumped."""

Result = TypeVar("Result")
Task = Callable[[Any, torch.device, "DistributedComm | None"], Result]


class SimulatedLLM(LLM):
    """Proposals stand at given rates, all verification done."""

    rule: Simulated

    def __init__(self, checkpoint: Checkpoint, comm: DistributedComm | None = None, **options: Any) -> None:
        """`comm`: of several ranks, each of which runs an engine: all do the same."""
        self._comm = comm
        super().__init__(checkpoint, **options)

    def _check_ranks(self, tensor_parallel_size: int) -> None:
        pass

    def _executor(self, planned: Planned, progress: bool | None, eager: bool) -> Executor:
        how: dict[str, Any] = {"make_rule": self._rule, "progress": progress, "eager": eager}
        return assemble(planned, self.checkpoint, self.spec, comm=self._comm, decisions=self._comm, **how)

    def _rule(self, sampler: Sampler) -> Rule:
        self.rule = Simulated(super()._rule(sampler), {})
        return self.rule

    def rates(self, outer: float, inner: float) -> None:
        """By the last rung, and by each rung below it."""
        last = len(self.plan.ladder) - 1
        self.rule.rates = {**dict.fromkeys(range(last), inner), last: outer}
        rounds = self.engine._executor._rounds  # type: ignore[attr-defined]
        if rounds is not None:  # graphs have rates built in
            rounds._rates = self.rule.rates
            rounds._graphs.clear()


def on_ranks(ranks: int, task: Task[Result], wish: Any) -> Result:
    """What the task returns on rank 0, on GPUs 0, 1, ... or CPUs in their place. `task` and `wish` go to other processes."""
    if ranks == 1:
        return task(wish, device_of(0), None)
    store, port = keep_store("127.0.0.1", _TIMEOUT_S)
    with ProcessPoolExecutor(ranks, mp_context=get_context("spawn")) as pool:
        found = [pool.submit(_rank, task, wish, rank, ranks, port) for rank in range(ranks)]
        results = [each.result() for each in found]
    del store
    return results[0]


def device_of(rank: int) -> torch.device:
    return torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")


def _rank(task: Task[Result], wish: Any, rank: int, ranks: int, port: int) -> Result:
    faulthandler.dump_traceback_later(_DUMP_S)
    device = device_of(rank)
    join(find_store("127.0.0.1", port, _TIMEOUT_S), rank, ranks, timeout_s=_TIMEOUT_S, device=device)
    torch.manual_seed(1)  # what stands in a round on the device is drawn on each rank
    comm = DistributedComm()
    if device.type == "cuda":
        spec = spec_from_config(open_shape(wish.model).config)
        comm.sum_in_one_shot(BATCHES[-1] * max(spec.hidden_size, spec.embed_size), torch.bfloat16, device)
    else:
        torch.set_num_threads(1)
    return task(wish, device, comm)


def skip_prompts(llm: LLM) -> None:
    """Run the last tokens of prompts only; the entries of the others are normal numbers, and zeros in host memory."""
    view = llm.engine._executor._top.view  # type: ignore[attr-defined]
    if type(view) is PagedKV:
        for layer in (*view._keys, *view._values):  # a call has indices of 32 bits for each
            layer.normal_()
    decoder, dtype = llm.engine._executor._top.decoder, DTYPES[llm.plan.dtype]  # type: ignore[attr-defined]
    real = decoder.run

    def shortened(steps: Any, kv: Any) -> Tensor:
        if all(len(step.tokens) <= LAST for step in steps):
            return cast(Tensor, real(steps, kv))
        kv.bind(steps)
        hidden = torch.zeros(sum(len(step.tokens) for step in steps), llm.spec.hidden_size, dtype=dtype, device=decoder.device)
        end = 0
        for step in steps:
            end += len(step.tokens)
            if step.start + len(step.tokens) >= step.prompt_length:
                run = min(LAST, len(step.tokens))
                last = replace(step, tokens=step.tokens[-run:], start=step.start + len(step.tokens) - run)
                hidden[end - run : end] = real([last], kv)
        return hidden

    decoder.run = shortened
