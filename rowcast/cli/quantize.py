"""`rowcast quantize`: a model and text in, a checkpoint of few bits out."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from rowcast.cli import learning, options
from rowcast.cli.output import print_json


def quantize(
    model: learning.Model,
    text: Annotated[list[Path], typer.Option("--text", help="A text file whose inputs matter; repeatable.")],
    output: learning.Output,
    held_out: learning.HeldOut = None,
    bits: Annotated[int, typer.Option("--bits", help="Of a weight: 3, 4 or 8.")] = 4,
    group: Annotated[int, typer.Option("--group", help="Inputs that share a scale and a zero point.")] = 64,
    method: Annotated[
        Literal["gptq", "nearest"],
        typer.Option("--method", help="gptq: errors are made good by the columns behind. nearest: rounded, to compare with."),
    ] = "gptq",
    tokens: Annotated[int, typer.Option("--tokens", help="Most tokens of the text to run.")] = 65536,
    window: Annotated[int, typer.Option("--window", help="Tokens that see each other.")] = 1024,
    judged: Annotated[int, typer.Option("--judged", help="Most held-out tokens to judge the copy on.")] = 8192,
    part_minutes: learning.PartMinutes = None,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    restart: learning.Restart = False,
    as_json: learning.AsJson = False,
) -> None:
    """Round a model's layers to few bits, calibrated on text, as a checkpoint that the engine and Transformers open.

    Killed and started again in the same way, it goes on at the layer where it was.
    """
    from rowcast.calibration.quantising.run import Settings, quantise

    settings = Settings(bits=bits, group=group, method=method, tokens=tokens, window=window, judged=judged)
    found = learning.run_part(
        lambda: quantise(
            model, text, output, settings, held_out=held_out or [], dtype=dtype, device=device, restart=restart,
            part_minutes=part_minutes,
        )
    )  # fmt: skip
    quality = found["quality"]
    if not as_json:
        print(
            f"{found['bits_per_weight']:.2f} bits a weight; on {quality['tokens']} held-out tokens perplexity "
            f"{quality['perplexity']:.2f}, the original's {quality['original_perplexity']:.2f}; acceptance as a draft "
            f"{quality['acceptance']['1']['maximal']:.3f} at temperature 1, {quality['acceptance']['0']:.3f} at 0"
        )
        print(f"wrote {output}; try: rowcast generate -m {shlex.quote(str(output))} --weights packed ...")
    print_json(
        {"finished": True, "output": str(output), **{name: found[name] for name in ("bits_per_weight", "tokens", "quality")}}
    )
