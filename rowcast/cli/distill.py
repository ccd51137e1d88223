"""`rowcast distill`: a target and text in, a small draft out."""

from __future__ import annotations

import shlex
from typing import Annotated, Any

import typer

from rowcast.cli import learning, options

_SHAPE = "The draft"


def distill(
    target: Annotated[str, typer.Argument(help="The model to draft for: a directory, a GGUF file or a hub id.")],
    text: learning.Texts,
    output: learning.Output,
    held_out: learning.HeldOut = None,
    size: Annotated[
        str, typer.Option("--size", help="Most bytes of the draft in 8 bits, which set its width.", rich_help_panel=_SHAPE)
    ] = "16MB",
    hidden: Annotated[int | None, typer.Option("--hidden", help="Its width, in place of --size.", rich_help_panel=_SHAPE)] = None,
    layers: Annotated[int, typer.Option("--layers", help="Its layers.", rich_help_panel=_SHAPE)] = 4,
    heads: Annotated[int, typer.Option("--heads", help="Its attention heads, of 64 each.", rich_help_panel=_SHAPE)] = 4,
    neurons: Annotated[
        int | None, typer.Option("--neurons", help="In each layer; left out: 4 times the width.", rich_help_panel=_SHAPE)
    ] = None,
    streaming: Annotated[
        int,
        typer.Option("--streaming", help="KV entries that it sees, as in draft:kv=256; 0: all.", rich_help_panel=_SHAPE),
    ] = 256,
    start: Annotated[
        str | None, typer.Option("--start", help="A draft to go on from, in place of a new one.", rich_help_panel=_SHAPE)
    ] = None,
    bits: Annotated[
        int, typer.Option("--bits", help="8: one GGUF file; 16: a directory as the target's.", rich_help_panel=_SHAPE)
    ] = 8,
    window: learning.Window = 1024,
    batch: learning.Batch = 64,
    steps: learning.Steps = 4000,
    learning_rate: learning.LearningRate = 5e-3,
    optimizer: learning.Optimizer = "muon",
    muon_rate: learning.MuonRate = 4e-3,
    warmup: learning.Warmup = 100,
    accumulate: learning.Accumulate = 1,
    variation: Annotated[
        float,
        typer.Option(
            "--variation", help="Weight of total variation beside KL, 0 to 1, at the end.", rich_help_panel=learning.TRAINING
        ),
    ] = 0.0,
    written: learning.Written = 20_000_000,
    prompt_tokens: learning.PromptTokens = 32,
    text_share: learning.TextShare = 0.15,
    seed: learning.Seed = 0,
    compiled: learning.Compiled = False,
    judged: learning.Judged = 32768,
    context: Annotated[
        list[int] | None,
        typer.Option("--context", help="To measure at, each on --judged tokens; repeatable; left out: 512 and 7936."),
    ] = None,
    part_minutes: learning.PartMinutes = None,
    save_seconds: learning.SaveSeconds = 60.0,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    restart: learning.Restart = False,
    as_json: learning.AsJson = False,
) -> None:
    """Train a small draft that speaks as the target does, on text that the target writes and text that is given.

    Killed and started again in the same way, it goes on where it was. On several GPUs: accelerate launch -m rowcast distill ...
    """
    from rowcast.calibration.distill import CONTEXTS, Settings
    from rowcast.calibration.distill import distill as run
    from rowcast.calibration.learning.job import How
    from rowcast.placement.units import parse_bytes

    settings = Settings(
        hidden=hidden, layers=layers, heads=heads, neurons=neurons, most_bytes=parse_bytes(size, "--size"), streaming=streaming,
        start=start, window=window, batch=batch, steps=steps, learning_rate=learning_rate, optimizer=optimizer,
        muon_rate=muon_rate, warmup=warmup, accumulate=accumulate, variation=variation, written_tokens=written,
        prompt_tokens=prompt_tokens, text_share=text_share, bits=bits, judged_tokens=judged, contexts=tuple(context or CONTEXTS),
        seed=seed,
    )  # fmt: skip
    how = How(dtype, device, part_minutes, save_seconds, restart)
    learning.report(
        lambda: run(target, text, output, settings, how, held_out=held_out or (), compiled=compiled), _lines, output,
        lambda draft: f"-m {shlex.quote(target)} --draft {draft}", as_json=as_json,
    )  # fmt: skip


def _lines(found: dict[str, Any]) -> list[str]:
    """The draft and its acceptance, for people."""
    sizes = found["config"]
    shape = f"{sizes['num_hidden_layers']} layers of {sizes['hidden_size']}, {sizes['intermediate_size']} neurons"
    lines = [
        f"{found['parameters'] / 1e6:.1f} M parameters, {found['bytes'] / 1e6:.1f} MB: {shape}",
        learning.trained(found["training"]),
    ]
    for context, figures in found["held_out"].items():
        told = []
        for temperature, rules in figures["acceptance"].items():
            both = isinstance(rules, dict)
            told.append(
                f"{rules['maximal']:.3f} ({rules['coupled']:.3f} coupled) at T = {temperature}"
                if both
                else f"{rules:.3f} at T = {temperature}"
            )
        lines.append(f"context {context}: acceptance {', '.join(told)}; KL {figures['kl']:.3f}")
    return lines
