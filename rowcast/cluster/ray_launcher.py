"""Ranks as Ray actors, one bundle of one placement group each.

Ray places them, says when they die and ends them with their driver's job; no step goes through it.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray as untyped_ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rowcast.cluster import jobs
from rowcast.cluster.launcher import Ranks
from rowcast.errors import UserError
from rowcast.settings import PREFIX

log = logging.getLogger("rowcast")

ray: Any = untyped_ray

OBJECT_STORE_BYTES = 100 << 20
"""Of a cluster that is started here: no tensor goes through it."""

PLACE_S = 60.0
"""For the cluster to find a place for all ranks."""

_SOON_S = 2.0
"""Until it is said that no node has that place. One may still join, or come back."""
_POLL_S = 0.02
_GONE_S = 10.0

_ALL_GPUS_VISIBLE = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
"""Each rank names its own device: ranks that all see one GPU, as number 0, cannot share memory with each other."""


class RankActor:
    """Made by `ray.remote`; light until `run`."""

    def run(self, address: str, token: str, rank: int) -> None:
        """As `rank.run`, until the driver says stop. The process lives a little longer: what it held of a GPU is free before."""
        from rowcast.cluster.rank import free, run

        gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        gpu = _device(str(gpus[0]), os.environ.get("CUDA_VISIBLE_DEVICES")) if gpus else None
        run(address, token, rank, host=ray.util.get_node_ip_address(), gpu=gpu)
        free()


class RayLauncher:
    """Uses the cluster that the process is connected to or finds, else starts one on this machine."""

    def __init__(
        self,
        *,
        gpus: int = 0,
        cpus: float = 1,
        place_s: float = PLACE_S,
        replica: int | None = None,
        actor: type[RankActor] = RankActor,
    ) -> None:
        """`gpus` and `cpus` of each rank. `place_s`: how long to wait for a place. `replica`: its number among gangs that are to be on
        nodes of their own, as far as there are enough. `actor`: what each rank is, for who wants to look into it."""
        self._gpus, self._cpus, self._place_s, self._replica, self._actor = gpus, cpus, place_s, replica, actor

    def addresses(self, world: int) -> list[str]:
        connect(world)
        return [f"tcp://{ray.util.get_node_ip_address()}:*"] * world

    def start(self, addresses: Sequence[str], token: str) -> Ranks:
        bundle = {"CPU": self._cpus} | ({"GPU": float(self._gpus)} if self._gpus else {})
        near = None if self._replica is None else _node(self._replica, bundle, len(addresses))
        group = placement_group([bundle] * len(addresses), strategy="STRICT_PACK", _soft_target_node_id=near)
        try:
            self._wait(group, bundle, len(addresses))
            actor: Any = ray.remote(self._actor)
            actors, runs = [], []
            for rank, address in enumerate(addresses):
                strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
                made = actor.options(
                    num_cpus=self._cpus,
                    num_gpus=self._gpus,
                    max_restarts=0,
                    scheduling_strategy=strategy,
                    runtime_env={"env_vars": _ALL_GPUS_VISIBLE | _settings()},
                ).remote()
                actors.append(made)
                runs.append(made.run.remote(address, token, rank))
        except BaseException:
            remove_placement_group(group)
            raise
        return RayRanks(actors, runs, group)

    def _wait(self, group: PlacementGroup, bundle: dict[str, float], world: int) -> None:
        # Not `group.ready()`, which is a task: it would need a process started in the bundle first.
        soon = min(_SOON_S, self._place_s)
        if group.wait(soon):
            return
        fix = "see `ray status`"
        if not _fitting(bundle, world):
            if not self._gpus:
                fix = f"start a node with `ray start --num-cpus {math.ceil(world * self._cpus)}`"
            log.warning(
                "no node of the Ray cluster has room for %d ranks of %s each: waiting up to %g s for one to join",
                world, _resources(bundle), self._place_s,
            )  # fmt: skip
        if group.wait(self._place_s - soon):
            return
        nodes = [_resources(node["Resources"]) for node in ray.nodes() if node["Alive"]]
        raise UserError(
            f"Ray found no place within {self._place_s:g} s for {world} ranks of {_resources(bundle)} each on one node: its nodes have "
            f"{'; '.join(nodes) or 'nothing'}, free are {_resources(ray.available_resources())} in all: lower tensor_parallel_size, or "
            f"{fix}"
        )


class RayRanks:
    """Actors. Implements `Ranks`."""

    def __init__(self, actors: list[Any], runs: list[Any], group: PlacementGroup) -> None:
        self.actors, self._runs, self._group = actors, runs, group
        self._node = str(ray.get_runtime_context().get_node_id())
        self._killed = False

    def dead(self) -> dict[int, str]:
        if not self._reachable():
            return dict.fromkeys(range(len(self._runs)), "ended with the Ray that it was placed by")
        ended, _ = ray.wait(self._runs, num_returns=len(self._runs), timeout=0)
        return {self._runs.index(run): _how(run) for run in ended}

    def wait(self, timeout_s: float) -> bool:
        if not self._reachable():
            return True
        ended, _ = ray.wait(self._runs, num_returns=len(self._runs), timeout=timeout_s)
        return len(ended) == len(self._runs)

    def _reachable(self) -> bool:
        """Whether this process is still with the Ray that placed them. At its end Ray may go first, and asking would start another."""
        return bool(ray.is_initialized()) and str(ray.get_runtime_context().get_node_id()) == self._node

    def kill(self) -> None:
        if self._killed or not self._reachable():
            return
        self._killed = True
        for actor in self.actors:
            ray.kill(actor)
        _until(lambda: self.wait(0))
        remove_placement_group(self._group)


def connect(world: int) -> None:
    """To the cluster that RAY_ADDRESS names, else to one that runs here, else to one of this machine's own, started now.

    RAY_ADDRESS=local is the last of them whatever runs here.
    """
    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"log_to_driver": True, "logging_level": logging.WARNING}
    named = os.environ.get("RAY_ADDRESS") or None
    address = jobs.found_here() if named in (None, "auto") else named
    if named != "local" and address is not None and jobs.answers(address):
        try:
            ray.init(address="auto", **quiet)
        except ConnectionError:
            pass  # as one that does not answer
        else:
            address = ray.get_runtime_context().gcs_address
            if named:
                log.info("ranks are placed by the Ray cluster at %s", address)
            else:  # Nobody asked for it, and others may be at work there.
                log.warning(
                    "ranks are placed by the Ray cluster that runs at %s; RAY_ADDRESS=local starts one of their own", address
                )
            return
    if named not in (None, "local"):
        where = named if address in (None, named) else f"{named}, {address}"
        raise UserError(
            f"no Ray cluster answers at RAY_ADDRESS={where}: start one there, or set it to local, or HOST:PORT of another"
        )
    if named is None and address is not None:
        log.warning("the Ray cluster that was found at %s does not answer: ranks are placed by one of their own", address)
    cpus = max(world, os.cpu_count() or 1)
    ray.init(address="local", num_cpus=cpus, object_store_memory=OBJECT_STORE_BYTES, include_dashboard=False, **quiet)
    log.info("ranks are placed by a Ray cluster of this machine's own")


def _device(gpu: str, visible: str | None) -> int:
    """The number by which a process that sees the GPUs `visible` knows the one that Ray calls `gpu`."""
    seen = [each.strip() for each in visible.split(",")] if visible else []
    return seen.index(gpu) if gpu in seen else int(gpu)


def _settings() -> dict[str, str]:
    """The driver's variables of ours, but for the one that names a folder of its machine."""
    return {name: value for name, value in os.environ.items() if name.startswith(PREFIX) and name != f"{PREFIX}CACHE"}


def _node(replica: int, bundle: dict[str, float], world: int) -> str | None:
    """The node that a replica had best be on: replicas go round those that can hold one."""
    fits = _fitting(bundle, world)
    return sorted(fits)[replica % len(fits)] if fits else None


def _fitting(bundle: dict[str, float], world: int) -> list[str]:
    """Nodes that could hold the ranks if nothing else were on them."""
    return [
        str(node["NodeID"])
        for node in ray.nodes()
        if node["Alive"] and all(node["Resources"].get(kind, 0) >= world * amount for kind, amount in bundle.items())
    ]


def _how(run: Any) -> str:
    """How an actor's `run` has ended, as half a sentence."""
    try:
        ray.get(run)
    except ray.exceptions.RayError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"ended: {lines[0] if lines else type(error).__name__}"
    return "ended"


def _resources(found: dict[str, float]) -> str:
    kinds = {"CPU": "CPU", "GPU": "GPU"}
    return ", ".join(f"{found.get(kind, 0):g} {name}" for kind, name in kinds.items())


def _until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + _GONE_S
    while not done() and time.monotonic() < end:
        time.sleep(_POLL_S)
