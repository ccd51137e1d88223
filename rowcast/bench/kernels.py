"""What `rowcast bench kernels` measures: every kernel's time on a GPU beside its floor and beside its peers, in one run.

Cases come from the modules of `kernel_cases`. Times are those of `gpu_timing`: medians of graph replays over rotating inputs, without
what a launch from Python costs. The floor is the time in which the copy measured in this run moves the case's bytes.
"""

from __future__ import annotations

import gc
import logging
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from rowcast.bench import kernel_cases
from rowcast.bench.gpu_timing import REPLAYS, copy_bandwidth, graph_seconds
from rowcast.bench.kernel_cases.case import Case
from rowcast.errors import UserError

FAMILIES = ("products", "attention", "lowbit", "sparse", "head", "host")
"""Modules of `kernel_cases`, in the order of the report. One that is not there is left out."""

FILE_COLUMNS = 200
"""Width of the table where standard error is not a terminal."""

log = logging.getLogger("rowcast")


def run(only: str | None = None, repeat: int = REPLAYS) -> dict[str, Any]:
    """Measure the cases whose family, name and shape hold `only` and return the report.

    A case that fails is reported with its error, and the others go on. Raises UserError without a GPU and where no case fits.
    """
    if not torch.cuda.is_available():
        raise UserError("bench kernels measures a GPU and none is visible: run it on a machine with a GPU")
    device = torch.cuda.get_device_name()
    bandwidth = copy_bandwidth()
    names: list[str] = []
    measured: list[dict[str, Any]] = []
    for family in FAMILIES:
        for found in _cases(family, device):
            _free()
            if isinstance(found, Exception):
                measured.append({"family": family, "name": family, "shape": "", "error": _sentence(found)})
                continue
            names.append(f"{family} {found.name} {found.shape}")
            if only is None or only in names[-1]:
                log.info("measuring %s", names[-1])
                measured.append({"family": family, **measure(found, bandwidth, repeat)})
            del found
    _free()
    if not measured:
        raise UserError(f"no case has {only!r} in its name: there are {'; '.join(names) or 'none'}")
    return {
        "benchmark": "kernels",
        "device": device,
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
        "versions": versions(),
        "copy_bytes_per_s": bandwidth,
        "repeat": repeat,
        "cases": measured,
    }


def measure(case: Case, bandwidth: float, repeat: int) -> dict[str, Any]:
    """One case's figures: seconds, and ratios above 1 where the kernel is faster than the peer."""
    floor = case.bytes / bandwidth
    figures: dict[str, Any] = {"name": case.name, "shape": case.shape, "bytes": case.bytes, "floor_s": floor, "note": case.note}
    try:
        seconds = graph_seconds(case.calls, replays=repeat)
        figures |= {"time_s": seconds, "share_of_floor": floor / seconds, "peers": {}}
        for peer, calls in case.peers.items():
            theirs = graph_seconds(calls, replays=repeat)
            figures["peers"][peer] = {"time_s": theirs, "ratio": theirs / seconds}
    except Exception as error:
        figures["error"] = _sentence(error)
    return figures


def _cases(family: str, device: str) -> Iterator[Case | Exception]:
    """The family's cases, one at a time; an exception where one cannot be made, which ends the family."""
    try:
        module = _module(family)
        if module is not None:
            yield from module.cases(device)
    except Exception as error:
        yield error


def _module(family: str) -> Any:
    name = f"{kernel_cases.__name__}.{family}"
    return None if find_spec(name) is None else import_module(name)


def _free() -> None:
    """Give what the last case held back to the GPU."""
    gc.collect()
    torch.cuda.empty_cache()


def _sentence(error: Exception) -> str:
    """The first line says what went wrong; CUDA's and Triton's errors go on for many."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def versions() -> dict[str, str | None]:
    """Of what the figures depend on; None where it is not known."""
    driver = Path("/proc/driver/nvidia/version")
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", driver.read_text()) if driver.exists() else None
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    return {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton, "driver": found[0] if found else None}


def print_table(report: dict[str, Any]) -> None:
    """The report for people, on standard error."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    found = report["versions"]
    table = Table(
        title=f"{report['device']}, copies {report['copy_bytes_per_s'] / 1e12:.2f} TB/s; torch {found['torch']}, "
        f"Triton {found['triton']}, driver {found['driver']}"
    )
    for heading in ("kernel", "shape", "time, us", "floor, us", "of floor", "peers: us (ratio)"):
        table.add_column(heading, justify="left" if heading in ("kernel", "shape", "peers: us (ratio)") else "right")
    for case in report["cases"]:
        time, floor = case.get("time_s"), case.get("floor_s")
        told = [f"{name} {peer['time_s'] * 1e6:.1f} ({peer['ratio']:.2f}x)" for name, peer in case.get("peers", {}).items()]
        told += [case[key] for key in ("note", "error") if case.get(key)]
        table.add_row(
            escape(case["name"]),
            escape(case["shape"]),
            "failed" if time is None else f"{time * 1e6:.1f}",
            "" if floor is None else f"{floor * 1e6:.1f}",
            "" if time is None else f"{case['share_of_floor']:.0%}",
            escape("; ".join(told)),
        )
    Console(stderr=True, width=None if sys.stderr.isatty() else FILE_COLUMNS).print(table)
