"""`rowcast plan`: where every byte would lie, and how fast it would be."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from rowcast.cli import options
from rowcast.cli.output import print_json

_MACHINE, _LOAD = "Machine", "Load"


def plan(
    model: Annotated[str, typer.Argument(help="A directory, a config.json, a GGUF file or the hub id of a well-known model.")],
    gpus: Annotated[
        str | None, typer.Option("--gpus", help="Cards, as in 2xRTX4090; without it: this machine.", rich_help_panel=_MACHINE)
    ] = None,
    link: Annotated[
        str | None,
        typer.Option("--link", help="Peers (nvlink, pcie, host) and bus (pcie4x8, 25GB/s).", rich_help_panel=_MACHINE),
    ] = None,
    inter_node: Annotated[
        str | None, typer.Option("--inter-node", help="Between nodes, as in 25GB/s.", rich_help_panel=_MACHINE)
    ] = None,
    gpu_memory: Annotated[
        str | None, typer.Option("--gpu-memory", help="Most memory of each GPU, as in 24GiB.", rich_help_panel=_MACHINE)
    ] = None,
    host_memory: Annotated[
        str | None, typer.Option("--host-memory", help="Memory of each host, as in 128GiB.", rich_help_panel=_MACHINE)
    ] = None,
    tp: Annotated[
        int | None, typer.Option("--tp", help="Tensor-parallel ranks; without it: the best.", rich_help_panel=_MACHINE)
    ] = None,
    context: Annotated[int | None, typer.Option("--context", help="Tokens of a sequence.", rich_help_panel=_LOAD)] = None,
    prompt: Annotated[
        int | None, typer.Option("--prompt", help="Of those, the prompt's; for the first token.", rich_help_panel=_LOAD)
    ] = None,
    batch: Annotated[int, typer.Option("--batch", help="Sequences that run together.", rich_help_panel=_LOAD)] = 1,
    acceptance: Annotated[
        str | None,
        typer.Option("--acceptance", help="That a proposal stands, as in 0.9 or self=0.9,draft=0.5.", rich_help_panel=_LOAD),
    ] = None,
    hit_rate: Annotated[
        float | None, typer.Option("--hit-rate", help="Of fetched rows, found in the GPU's cache.", rich_help_panel=_LOAD)
    ] = None,
    ladder: options.Ladder = "auto",
    draft: options.Draft = None,
    kv_budget: options.KVBudget = None,
    density: options.Density = None,
    mode: options.Mode = "exact",
    calibration: options.Calibration = None,
    dtype: options.DType = "auto",
    weights: options.Weights = "auto",
    groups: Annotated[int, typer.Option("--groups", help="Of weights and KV that are placed, for each rank.")] = 10_000,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write the plan to this file.")] = None,
    picture: Annotated[
        Path | None, typer.Option("--picture", help="Draw it, .svg or .png: memory by device, time by stage.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Plan a model on a machine that need not be there: memory, speed, bottleneck, and what would help. Reads a config only."""
    from rowcast.cli.plan_table import print_plan
    from rowcast.placement.picture import check_picture, draw
    from rowcast.runtime.plan_for import MachineWish, plan_for

    if picture is not None:
        check_picture(picture)
    made = plan_for(
        model, MachineWish(gpus=gpus, link=link, inter_node=inter_node, gpu_memory=gpu_memory, host_memory=host_memory),
        ladder=ladder, draft=draft, kv_budget=kv_budget, density=density, mode=mode, calibration=calibration, dtype=dtype,
        weights=weights, context=context, prompt=prompt, batch=batch, acceptance=acceptance, hit_rate=hit_rate, tensor_parallel=tp,
        groups=groups,
    )  # fmt: skip
    assert made.forecast is not None
    if out is not None:
        made.save(out)
    if picture is not None:
        draw(made.forecast, picture)
    if as_json:
        print_json(asdict(made))
    else:
        print_plan(made, sys.stdout)
