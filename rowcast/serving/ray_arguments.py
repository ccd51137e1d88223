"""What a Ray Serve application is built from: typed, from a config file, from `serve run`'s KEY=VALUE, or from Python. Torch-free."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from rowcast.errors import UserError
from rowcast.serving.security import AppSettings, read_api_keys

MAX_REPLICAS = 1024

_OWN = (
    *(
        "model",
        "replicas",
        "tensor_parallel_size",
        "served_model_name",
        "gpus",
        "cpus",
        "max_waiting",
        "deadline_s",
        "drain_s",
        "seed",
    ),
    *("api_keys", "allowed_hosts", "allowed_origins"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """Those below `allowed_origins` are `LLM`'s, and mean what they mean there."""

    model: str
    """A directory, a GGUF file or a hub id, which every node that runs a replica can open."""
    replicas: int = 2
    """Engines, each of them with all of the model."""
    tensor_parallel_size: int = 1
    """Ranks of each replica, on one node. One is a process beside the replica; several have a placement group of their own."""
    served_model_name: str | None = None
    """What clients call the model; None: the last part of `model`."""
    gpus: int | None = None
    """Of each rank: 1 or 0; None: 1 where the cluster has any, or this machine, where the process is not connected to one yet."""
    cpus: float = 1
    """Of each rank, as Ray counts them, and the threads of one that computes on a CPU."""
    max_waiting: int = 1024
    """Requests that wait for a replica at an ingress; more are refused."""
    deadline_s: float | None = None
    """For requests that name none; None: as long as it takes."""
    drain_s: float = 60
    """For running requests when the application is shut down."""
    seed: int | None = None
    """From which those of requests are derived that bring none; None: by chance."""
    api_keys: str | None = None
    """A file of keys, as `rowcast serve` reads it, on the nodes of ingresses. Needed where the proxies are bound to any but a loopback
    address."""
    allowed_hosts: str | None = None
    """As in `AppSettings`, separated by commas."""
    allowed_origins: str | None = None

    ladder: str | None = None
    draft: str | None = None
    kv_budget: int | None = None
    verification: str | None = None
    mode: str | None = None
    density: float | None = None
    calibration: str | None = None
    dtype: str | None = None
    weights: str | None = None
    device: str | None = None
    gpu_memory: str | int | None = None
    host_memory: str | int | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int | None = None
    prefix_cache: bool | None = None
    max_num_prefill_tokens: int | None = None
    prefill_stall_s: float | None = None
    plan: str | None = None
    eager: bool | None = None

    def __post_init__(self) -> None:
        for name, low, high in (("replicas", 1, MAX_REPLICAS), ("tensor_parallel_size", 1, MAX_REPLICAS), ("gpus", 0, 1)):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(f"{name}={value} has to be from {low} to {high}")
        for name in ("cpus", "drain_s"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name}={getattr(self, name)} has to be at least 0")

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Arguments:
        """Values of their types, or as text. Raises UserError for what is unknown, missing or of another type."""
        kinds = get_type_hints(cls)
        for name in given:
            if name not in kinds:
                near = get_close_matches(str(name), kinds, n=1, cutoff=0.0)[0]
                raise UserError(f"the argument {name!s:.60} is unknown, did you mean {near}? (all: {', '.join(kinds)})")
        if "model" not in given:
            raise UserError("the argument model is missing: name a directory, a GGUF file or a hub id")
        return cls(**{name: _value(name, value, kinds[name]) for name, value in given.items()})

    @property
    def name(self) -> str:
        """What clients call the model."""
        return self.served_model_name or self.model.rstrip("/").rpartition("/")[2]

    def for_llm(self) -> dict[str, Any]:
        """`LLM`'s arguments, `model` among them, of those that were given; ranks and seeds are the replica's business."""
        names = ("model", *(field.name for field in fields(self) if field.name not in _OWN))
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def app_settings(arguments: Arguments, host: str) -> AppSettings:
    """What HTTP allows. `host`: what proxies are bound to. Raises UserError."""
    hosts, origins = (
        tuple(filter(None, map(str.strip, (text or "").split(","))))
        for text in (arguments.allowed_hosts, arguments.allowed_origins)
    )
    keys = () if arguments.api_keys is None else read_api_keys(Path(arguments.api_keys))
    return AppSettings(host=host, api_keys=keys, allowed_hosts=hosts, allowed_origins=origins)


def _value(name: str, value: object, kind: Any) -> Any:
    """`value` as one of the types of `kind`."""
    allowed = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    if value is None and types.NoneType in allowed:
        return None
    for wanted in (int, float, bool, str):
        if wanted in allowed and (found := _as(value, wanted)) is not None:
            return found
    what = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    raise UserError(f"the argument {name}={value!r:.60} has to be {' or '.join(what[each] for each in allowed if each in what)}")


def _as(value: object, wanted: type) -> Any:
    """None where it is none."""
    if wanted is bool:
        return value if isinstance(value, bool) else {"true": True, "1": True, "false": False, "0": False}.get(str(value).lower())
    if wanted is str:
        return value if isinstance(value, str) and value else None
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return wanted(value) if wanted(value) == value else None
    try:
        return wanted(value) if isinstance(value, str) else None
    except ValueError:
        return None
