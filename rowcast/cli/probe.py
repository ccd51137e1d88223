"""`rowcast probe`: what this machine's memories and links reach."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from rowcast.cli.output import print_json
from rowcast.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from rowcast.placement.measured import GpuProbe, Probe

Row = tuple[str, str, str]
"""What, how much, and where that comes from."""


def probe(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Do not keep the result for plans.")] = False,
) -> None:
    """Measure memories, links and processors of this machine, some seconds each, and keep the result for plans."""
    import torch
    from rich.console import Console

    from rowcast.offload.probe import probe as measure
    from rowcast.placement import cache
    from rowcast.settings import settings

    values = settings()
    if values.threads is not None:
        torch.set_num_threads(values.threads)
    with Console(file=sys.stderr).status("measuring") as status:
        found = measure(tell=lambda what: status.update(f"measuring: {what}"))
    path = None if no_cache else cache.store_probe(found)
    if as_json:
        print_json(
            {**found.to_json(), "machine": found.machine().describe() if found.gpus else None, "cache": path and str(path)}
        )
    else:
        _print(found, path)


def _print(found: Probe, path: Path | None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "figure", "origin", box=None)
    for row in [*_host(found), *_gpus(found), *_peers(found)]:
        table.add_row(*row)
    console = Console(file=sys.stdout, soft_wrap=True)
    console.print(table)
    for note in found.notes:
        console.print(f"note: {note}", markup=False)
    console.print(f"machine: {_machine(found) or 'no GPU; plans are for the CPU'}", markup=False)
    console.print(f"kept in {path}" if path else "not kept", markup=False)


def _machine(found: Probe) -> str | None:
    """In one line; None without GPUs, or with one of which too little is known."""
    try:
        return found.machine().describe()
    except UserError:
        return None


def _host(found: Probe) -> Iterator[Row]:
    from rowcast.placement.units import format_bytes

    host, threads = found.host, f"measured, {found.host.threads} threads"
    wsl = ", WSL" if host.wsl else ""
    yield "cpu", f"{host.cpu}, {host.cores} cores, NUMA nodes: {host.numa_nodes}{wsl}", "system"
    yield "host memory", f"{format_bytes(host.memory_bytes)}, {format_bytes(host.available_bytes)} free", "system"
    yield "pinnable", format_bytes(host.pin_bytes), host.pin_reason
    yield "host memory, copy", _rate(host.memory_rate), f"{threads}, read and written"
    yield "host memory, sum", _rate(host.read_rate), f"{threads}, read"
    for product in host.products:
        kind = {2: "bfloat16", 4: "float32"}[product.width]
        yield f"neurons by the CPU, {kind}", f"all: {_rate(product.whole)}, chosen: {_rate(product.chosen)}", threads


def _gpus(found: Probe) -> Iterator[Row]:
    from rowcast.placement.cards import known_card
    from rowcast.placement.units import format_bytes

    if found.driver:
        yield "driver", found.driver, "driver"
    for place, gpu in enumerate(found.gpus):
        card, what = known_card(gpu.name), f"GPU {place}"
        numa = "" if gpu.numa_node is None else f", NUMA node {gpu.numa_node}"
        links = f", {gpu.nvlinks} NVLinks" if gpu.nvlinks else ""
        yield what, f"{gpu.name}, {format_bytes(gpu.memory_bytes)}{links}{numa}", "driver"
        if gpu.pcie_generation_limit:
            now = f"PCIe {gpu.pcie_generation} x{gpu.pcie_lanes} under load, " if gpu.pcie_generation else ""
            yield f"{what}, link", f"{now}at most PCIe {gpu.pcie_generation_limit} x{gpu.pcie_lanes_limit}", "driver"
        nominal = (card.memory_rate.value, card.bus_rate.value, card.flops.value) if card else (None, None, None)
        yield f"{what}, copy within", _rate(gpu.memory_rate), _origin(gpu.memory_rate, nominal[0])
        yield f"{what}, from the host", _rate(gpu.to_device), _origin(gpu.to_device, nominal[1])
        yield f"{what}, to the host", _rate(gpu.to_host), _origin(gpu.to_host, nominal[1])
        if gpu.to_device_together is not None:
            yield f"{what}, from the host, all at once", _rate(gpu.to_device_together), "measured"
        flops = "not measured" if gpu.flops is None else f"{gpu.flops / 1e12:.0f} TFLOP/s"
        yield f"{what}, product in float16", flops, _origin(gpu.flops, nominal[2])
        yield from _rows(what, gpu)


def _rows(what: str, gpu: GpuProbe) -> Iterator[Row]:
    if not gpu.rows:
        return
    rates = ", ".join(f"{row.row_bytes >> 10} KiB: {row.rate / 1e9:.1f}" for row in gpu.rows)
    yield f"{what}, scattered rows, GB/s", rates, "measured, read by a kernel"
    least = gpu.kernel_row_bytes
    from_size = "no size" if least is None else f"{least >> 10} KiB"
    whole = gpu.whole_block_density(gpu.rows[len(gpu.rows) // 2].row_bytes)
    if whole is not None:
        size = gpu.rows[len(gpu.rows) // 2].row_bytes >> 10
        yield (
            f"{what}, crossover",
            f"85% of DMA from {from_size}; whole blocks above {whole:.0%} of rows of {size} KiB",
            "from these",
        )


def _peers(found: Probe) -> Iterator[Row]:
    for peer in found.peers:
        way = "direct" if peer.direct else "through the host"
        where = f", {peer.topology}" if peer.topology else ""
        yield f"GPU {peer.source} to {peer.target}", f"{_rate(peer.rate)}, {way}{where}", "measured, driver"


def _rate(rate: float | None) -> str:
    if rate is None:
        return "not measured"
    return f"{rate / 1e12:.2f} TB/s" if rate >= 1e12 else f"{rate / 1e9:.1f} GB/s"


def _origin(rate: float | None, nominal: float | None) -> str:
    if rate is None:
        return ""
    return "measured" if nominal is None else f"measured, {rate / nominal:.0%} of the datasheet's"
