"""`rowcast env`: what a bug report needs to say about a machine."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rowcast import __version__
from rowcast.cli.output import print_json
from rowcast.settings import describe, settings

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "gguf", "numpy", "huggingface_hub")


def env(as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False) -> None:
    """Show versions, hardware, the products' backend and the environment variables."""
    import torch

    from rowcast.kernels import native
    from rowcast.kernels.linear import backend

    values = settings()
    if values.threads is not None:
        torch.set_num_threads(values.threads)
    facts: dict[str, Any] = {
        "rowcast": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [
            {"name": gpu.name, "memory_bytes": gpu.total_memory, "capability": f"{gpu.major}.{gpu.minor}"}
            for gpu in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ],
        "linear_backend": {
            str(dtype).removeprefix("torch."): backend(torch.device("cpu"), dtype)
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
        },
        "row_kernels": native.describe(),
        "settings": {variable.name: variable.value for variable in describe(values)},
    }
    if as_json:
        print_json(facts)
    else:
        _print_table(facts)


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _print_table(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    gib = 1 << 30
    table = Table(show_header=False, box=None)
    for name in ("rowcast", "python"):
        table.add_row(name, facts[name])
    for name, found in facts["packages"].items():
        table.add_row(name, found or "not installed")
    table.add_row("platform", facts["platform"])
    table.add_row("cpu", f"{facts['cpu']}, {facts['cpu_count']} cores, {facts['threads']} threads used")
    table.add_row("memory", f"{facts['memory_bytes'] / gib:.1f} GiB")
    for gpu in facts["gpus"]:
        table.add_row("gpu", f"{gpu['name']}, {gpu['memory_bytes'] / gib:.1f} GiB, compute capability {gpu['capability']}")
    if not facts["gpus"]:
        table.add_row("gpu", "none")
    table.add_row("cpu products", ", ".join(f"{dtype}: {name}" for dtype, name in facts["linear_backend"].items()))
    table.add_row("cpu row kernels", facts["row_kernels"])
    for variable in describe(settings()):
        shown = "unset" if variable.value is None else variable.value
        table.add_row(variable.name, f"{shown}  ({variable.doc})")
    Console(file=sys.stdout, soft_wrap=True).print(table)
