"""`rowcast eval`: what sparsity and few bits cost on text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rowcast.cli import options
from rowcast.cli.output import print_json


def evaluate(
    model: Annotated[str, typer.Argument(help="A directory, a GGUF file or a hub id.")],
    text: Annotated[list[Path], typer.Option("--text", help="A text file to measure on; repeatable.")],
    ladder: Annotated[
        str | None,
        typer.Option("--ladder", help="Measure the sparse and low-bit rungs of a ladder, as in 'self:mlp=0.5,by=q4 / plain'."),
    ] = None,
    selector: Annotated[
        list[str] | None, typer.Option("--selector", help="What finds neurons: q4, lowrank, dejavu-ahead, ...; repeatable.")
    ] = None,
    density: Annotated[
        list[float] | None, typer.Option("--density", help="Share of the neurons that a token uses; repeatable.")
    ] = None,
    heads: Annotated[
        list[float] | None, typer.Option("--heads", help="Share of the query heads that a token uses; repeatable.")
    ] = None,
    over: Annotated[float, typer.Option("--over", help="So many times more candidates are ranked again exactly.")] = 1.0,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", help="A folder that rowcast calibrate wrote; left out: the model's own.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=16, help="Most tokens of each text, evenly spread over it.")] = 8192,
    window: Annotated[
        int | None, typer.Option("--window", min=16, help="Tokens that see each other; left out: 1024, or the model's context.")
    ] = None,
    tasks: Annotated[bool, typer.Option("--tasks", help="Also in-context tasks: cloze, copying, patterns.")] = False,
    items: Annotated[int, typer.Option("--items", min=1, help="Of each kind of task.")] = 50,
    sparse_prompt: Annotated[bool, typer.Option("--sparse-prompt", help="Also run the tasks with sparse prompts.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of the tasks.")] = 0,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output, layer by layer.")] = False,
) -> None:
    """Measure sparse and low-bit rungs beside the oracle and the dense model: perplexity, acceptance, recall, bytes.

    Text is teacher-forced; every token but a window's first is sparse. Acceptance is told by itself, and as a draft: in runs of four
    tokens, behind the dense model's K/V. Bytes are weights that a token reads when it is decoded alone.
    """
    from rowcast.calibration.quality import Wanted, measure_quality
    from rowcast.calibration.quality_report import lines

    wanted = Wanted(
        ladder=ladder, selectors=selector or (), densities=density or (), heads=heads or (), over=over, tokens=tokens, window=window,
        tasks=tasks or sparse_prompt, items=items, sparse_prompt=sparse_prompt, seed=seed, layers=as_json,
    )  # fmt: skip
    report = measure_quality(model, text, wanted, calibration=calibration, dtype=dtype, device=device)
    if as_json:
        print_json(report)
        return
    for line in lines(report):
        print(line)
