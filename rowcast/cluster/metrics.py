"""Where an engine's metrics go: to Ray's own, or to Prometheus. Torch-free."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from rowcast.errors import UserError
from rowcast.runtime.metrics import REPLICA, TABLE, Exporter

log = logging.getLogger("rowcast")


class RayExporter:
    """Implements `Exporter` with ray.util.metrics: Ray's dashboard agent has them as ray_<name>, with the node and the job."""

    def __init__(self) -> None:
        """Precondition: the process is connected to Ray."""
        found: Any = import_module("ray.util.metrics")
        self._of: dict[str, Any] = {}
        for metric in TABLE:
            keys = (REPLICA, *metric.labels)
            if metric.kind == "counter":
                self._of[metric.name] = found.Counter(metric.name, metric.doc, tag_keys=keys)
            elif metric.kind == "gauge":
                self._of[metric.name] = found.Gauge(metric.name, metric.doc, tag_keys=keys)
            else:
                self._of[metric.name] = found.Histogram(metric.name, metric.doc, boundaries=list(metric.bounds), tag_keys=keys)

    def add(self, name: str, amount: float, labels: Mapping[str, str]) -> None:
        self._of[name].inc(amount, dict(labels))

    def set(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        self._of[name].set(value, dict(labels))

    def observe(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        self._of[name].observe(value, dict(labels))


class PrometheusExporter:
    """Implements `Exporter` with prometheus_client, which comes with ray[default]."""

    def __init__(self, registry: Any = None) -> None:
        """`registry`: prometheus_client's; None: its default one. Raises UserError where it is not installed."""
        if find_spec("prometheus_client") is None:
            raise UserError("metrics need prometheus_client, which is not installed: pip install prometheus_client")
        found: Any = import_module("prometheus_client")
        given = {} if registry is None else {"registry": registry}
        self._of: dict[str, Any] = {}
        for metric in TABLE:
            make = {"counter": found.Counter, "gauge": found.Gauge, "histogram": found.Histogram}[metric.kind]
            more = {"buckets": metric.bounds} if metric.bounds else {}
            self._of[metric.name] = make(metric.name, metric.doc, (REPLICA, *metric.labels), **given, **more)

    def add(self, name: str, amount: float, labels: Mapping[str, str]) -> None:
        self._of[name].labels(**labels).inc(amount)

    def set(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        self._of[name].labels(**labels).set(value)

    def observe(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        self._of[name].labels(**labels).observe(value)


def choose_exporter(asked: str | Exporter) -> Exporter:
    """`asked`: an exporter; "ray"; "prometheus", in its default registry; a port, where that is served over HTTP, too; or "auto": Ray's
    where the process is connected to Ray. Raises UserError."""
    if not isinstance(asked, str):
        return asked
    if asked == "auto":
        asked = "ray" if _in_ray() else "prometheus"
    if asked == "ray":
        if not _in_ray():
            raise UserError("metrics='ray' needs a process that is connected to Ray: use it in a job, or prometheus")
        return _ray()
    if asked == "prometheus":
        return _prometheus()
    if asked.isascii() and asked.isdigit() and 1 <= int(asked) <= 65535:
        exporter = _prometheus()
        _serve(int(asked))
        return exporter
    raise UserError(f"metrics={asked!r:.40} is not known: use auto, ray, prometheus or a port")


def _in_ray() -> bool:
    if find_spec("ray") is None:
        return False
    ray: Any = import_module("ray")
    return bool(ray.is_initialized())


# Both libraries want each metric once a process.
_ray = cache(RayExporter)
_prometheus = cache(PrometheusExporter)


@cache
def _serve(port: int) -> None:
    """On this machine's own address."""
    found: Any = import_module("prometheus_client")
    try:
        found.start_http_server(port, addr="127.0.0.1")
    except OSError as error:
        raise UserError(f"metrics cannot be served at port {port} ({error.strerror}): name another") from None
    log.info("metrics are served at http://127.0.0.1:%s/metrics", port)
