"""What the server says of itself beside its engine, in Prometheus's terms. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any, get_args

from rowcast.errors import UserError
from rowcast.runtime.metrics import Exporter, Metric
from rowcast.serving.backend import State

_FAST_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

TABLE = (
    Metric("rowcast_server_state", "gauge", "1 for the state that the server is in, 0 for the others.", ("state",)),
    Metric("rowcast_server_queue", "gauge", "Requests that wait for the engine."),
    Metric("rowcast_server_running", "gauge", "Requests that the engine has."),
    Metric("rowcast_server_clients", "gauge", "Clients that have requests here."),
    Metric("rowcast_server_finished", "counter", "Requests that ran to their end."),
    Metric("rowcast_server_rejected", "counter", "Requests that were not taken: invalid, queue_full or unavailable.", ("reason",)),
    Metric("rowcast_server_cancelled", "counter", "Requests whose client went."),
    Metric("rowcast_server_deadlines_missed", "counter", "Requests that were not finished in time."),
    Metric("rowcast_server_lost", "counter", "Requests that were taken and lost with the engine."),
    Metric("rowcast_server_model_starts", "counter", "Times that the model was made anew."),
    Metric("rowcast_server_queue_seconds", "histogram", "From a request's arrival until the engine has it.", (), _FAST_S),
    Metric("rowcast_server_first_token_seconds", "histogram", "From arrival, queue included, to the first token.", (), _FAST_S),
    Metric("rowcast_http_requests", "counter", "HTTP requests, by route and status.", ("route", "status")),
)  # fmt: skip


class ServerMetrics:
    """The table in a registry of prometheus_client. Thread-safe."""

    def __init__(self, registry: Any) -> None:
        """Raises UserError where prometheus_client is not installed."""
        if find_spec("prometheus_client") is None:
            raise UserError('serving needs prometheus_client, which is not installed: pip install "rowcast[serve]"')
        self._client: Any = import_module("prometheus_client")
        self._registry = registry
        self._of: dict[str, Any] = {}
        for metric in TABLE:
            make = {"counter": self._client.Counter, "gauge": self._client.Gauge, "histogram": self._client.Histogram}[
                metric.kind
            ]
            more = {"buckets": metric.bounds} if metric.bounds else {}
            self._of[metric.name] = make(metric.name, metric.doc, metric.labels, registry=registry, **more)

    def add(self, name: str, **labels: str) -> None:
        """1 to a counter, named without its `rowcast_`."""
        self._child(name, labels).inc()

    def set(self, name: str, value: float) -> None:
        """A gauge."""
        self._child(name, {}).set(value)

    def observe(self, name: str, value: float) -> None:
        """In a histogram."""
        self._child(name, {}).observe(value)

    def state(self, now: State) -> None:
        """What it is from now on."""
        for name in get_args(State):
            self._child("server_state", {"state": name}).set(float(name == now))

    def http(self, route: str, status: int) -> None:
        """One answer. `route`: the template, as in /v1/models/{model}, never what a client sent."""
        self._child("http_requests", {"route": route, "status": str(status)}).inc()

    def render(self) -> bytes:
        """All of the registry, in the text format."""
        return bytes(self._client.generate_latest(self._registry))

    def _child(self, name: str, labels: dict[str, str]) -> Any:
        found = self._of[f"rowcast_{name}"]
        return found.labels(**labels) if labels else found


class Tee:
    """An `Exporter` that passes on to two others."""

    def __init__(self, first: Exporter, second: Exporter) -> None:
        self._both = first, second

    def add(self, name: str, amount: float, labels: Mapping[str, str]) -> None:
        for each in self._both:
            each.add(name, amount, labels)

    def set(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        for each in self._both:
            each.set(name, value, labels)

    def observe(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        for each in self._both:
            each.observe(name, value, labels)


def new_registry() -> Any:
    """An empty one, beside the process's own. Raises UserError where prometheus_client is not installed."""
    if find_spec("prometheus_client") is None:
        raise UserError('serving needs prometheus_client, which is not installed: pip install "rowcast[serve]"')
    return import_module("prometheus_client").CollectorRegistry()
