"""`rowcast serve` as a Ray Serve application: an ingress with the same HTTP, and engine replicas.

By `serve run rowcast.serving.ray_app:build model=MODEL replicas=2`, by a Serve config file that has that name as its `import_path`, or
from Python by `serve.run(application(model="...", replicas=2))`.

Each engine replica is a deployment of its own with one replica: so the ingress chooses which one runs a request, knows at once when one
is lost, and has others run again what it ran, while Ray Serve starts it anew.
"""

from __future__ import annotations

import logging
from typing import Any

import ray as untyped_ray
from ray import serve as untyped_serve

from rowcast.placement import nvml
from rowcast.serving.ray_arguments import Arguments, app_settings
from rowcast.serving.ray_backend import IngressSettings, RayBackend
from rowcast.serving.security import AppSettings

log = logging.getLogger("rowcast")

ray: Any = untyped_ray
serve: Any = untyped_serve

_MANY = 1 << 20
"""Calls at a time: queues and limits are the ingress's own, not Ray Serve's."""
_HEALTH_S = 2.0
"""Between two looks of Ray Serve's at a replica: as long it may take to start a lost one again."""
_LOOP_S = 0.5
"""Between two looks at whether a replica that is to end has finished."""
_ANYWHERE = "0.0.0.0"
_ENGINE_SLACK_S = 10.0
"""Engines may end so much later than ingresses."""

_made: list[tuple[RayBackend, AppSettings]] = []
"""By this process's ingress, for the function that makes its HTTP application."""


def _http() -> Any:
    """The ASGI application of this process's ingress."""
    from rowcast.serving.app import make_app

    backend, settings = _made[-1]
    return make_app(backend, settings, backend.server_metrics.http)


@serve.ingress(_http)
class Ingress:
    """HTTP, the queue and the choice of a replica."""

    async def __init__(self, arguments: Arguments, *engines: Any) -> None:  # type: ignore[misc]
        """`engines`: handles of the engines' deployments. Returns when one of them is up. Raises UserError."""
        settings = app_settings(arguments, _proxy_host() or _ANYWHERE)
        self._backend = RayBackend(
            engines,
            IngressSettings(max_waiting=arguments.max_waiting, deadline_s=arguments.deadline_s, seed=arguments.seed),
        )
        await self._backend.start()
        _made.append((self._backend, settings))

    async def __del__(self) -> None:
        """Ray Serve awaits it when the last request has ended, or cannot be waited for any longer."""
        backend = getattr(self, "_backend", None)
        if backend is not None:
            await backend.drain(0.0)


def application(arguments: Arguments | None = None, **given: Any) -> Any:
    """The Ray Serve application with these `Arguments`, for `serve.run`; starts nothing. Raises UserError."""
    from rowcast.serving.ray_engine import EngineReplica  # torch comes with it, and is not for ingresses

    found = arguments or Arguments.parse(given)
    host = _proxy_host()
    if host is not None and found.api_keys is None:
        app_settings(found, host)
    gpus = found.gpus if found.gpus is not None else int(_any_gpu())
    alone = found.tensor_parallel_size == 1
    options = {"num_cpus": found.cpus, "num_gpus": gpus} if alone else {"num_cpus": 0}
    common = {
        "max_ongoing_requests": _MANY,
        "health_check_period_s": _HEALTH_S,
        "graceful_shutdown_wait_loop_s": _LOOP_S,
        "logging_config": {"enable_access_log": False},
    }
    engine = serve.deployment(EngineReplica).options(
        ray_actor_options=options, graceful_shutdown_timeout_s=found.drain_s + _ENGINE_SLACK_S, **common
    )
    engines = [
        engine.options(name=f"Engine-{number}").bind(
            number, found.name, found.for_llm(), found.tensor_parallel_size, gpus, found.cpus
        )
        for number in range(found.replicas)
    ]
    ingress = serve.deployment(Ingress).options(  # which has a place even where ranks have all CPUs
        name="Ingress", ray_actor_options={"num_cpus": 0}, graceful_shutdown_timeout_s=found.drain_s, **common
    )
    return ingress.bind(found, *engines)


def _any_gpu() -> bool:
    """Whether the cluster has any, or this machine, where the process is not connected to a cluster yet."""
    if ray.is_initialized():
        return bool(ray.cluster_resources().get("GPU", 0) > 0)
    driver = nvml.read()
    return driver is not None and bool(driver.gpus)


def _proxy_host() -> str | None:
    """The address that Ray Serve's proxies are bound to; None where it does not run, or does not say."""
    if not ray.is_initialized():
        return None
    try:
        from ray.serve.context import _get_global_client

        client: Any = _get_global_client(raise_if_no_controller_running=False)
        return None if client is None else str(client.http_config.host or _ANYWHERE)
    except (ImportError, AttributeError, TypeError):
        return None


def build(args: dict[str, Any]) -> Any:
    """What `serve run` and Serve's config files call, with the arguments as they were written. Raises UserError."""
    return application(Arguments.parse(args))
