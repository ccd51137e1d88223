"""`rowcast distill`: a target and text in, a small draft out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rowcast.cli import learning, options
from rowcast.cli.output import print_json

_SHAPE, _TRAINING = "The draft", "Training"


def distill(
    target: Annotated[str, typer.Argument(help="The model to draft for: a directory, a GGUF file or a hub id.")],
    text: learning.Texts,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
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
    window: Annotated[int, typer.Option("--window", help="Tokens of a window.", rich_help_panel=_TRAINING)] = 1024,
    batch: Annotated[int, typer.Option("--batch", help="Windows of a step.", rich_help_panel=_TRAINING)] = 64,
    steps: Annotated[int, typer.Option("--steps", help="Steps of the optimiser.", rich_help_panel=_TRAINING)] = 4000,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", help="After the warm-up; it falls to 0.", rich_help_panel=_TRAINING)
    ] = 2e-3,
    warmup: Annotated[int, typer.Option("--warmup", help="Steps of the warm-up.", rich_help_panel=_TRAINING)] = 100,
    accumulate: Annotated[
        int, typer.Option("--accumulate", help="Parts of a batch, where memory is short.", rich_help_panel=_TRAINING)
    ] = 1,
    variation: Annotated[
        float,
        typer.Option("--variation", help="Weight of total variation beside KL, 0 to 1, at the end.", rich_help_panel=_TRAINING),
    ] = 0.0,
    written: Annotated[
        int, typer.Option("--written", help="Tokens that the target writes to learn from.", rich_help_panel=_TRAINING)
    ] = 20_000_000,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", help="Of a text, that it writes on from.", rich_help_panel=_TRAINING)
    ] = 32,
    text_share: Annotated[
        float, typer.Option("--text-share", help="Of the windows, from texts as they are.", rich_help_panel=_TRAINING)
    ] = 0.15,
    seed: Annotated[int, typer.Option("--seed", help="Of weights, text and order.", rich_help_panel=_TRAINING)] = 0,
    compiled: Annotated[
        bool, typer.Option("--compile", help="The target with torch.compile: faster, after a minute.", rich_help_panel=_TRAINING)
    ] = False,
    judged: Annotated[int, typer.Option("--judged", help="Held-out tokens to measure acceptance on, at each context.")] = 32768,
    context: Annotated[
        list[int] | None, typer.Option("--context", help="To measure at; repeatable; left out: 512 and 7936.")
    ] = None,
    part_minutes: learning.PartMinutes = None,
    save_seconds: learning.SaveSeconds = 60.0,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew where another draft was left.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="No text, only the JSON line.")] = False,
) -> None:
    """Train a small draft that speaks as the target does, on text that the target writes and text that is given.

    Killed and started again in the same way, it goes on where it was. On several GPUs: accelerate launch -m rowcast distill ...
    """
    from rowcast.calibration.distill import CONTEXTS, Settings
    from rowcast.calibration.distill import distill as run
    from rowcast.placement.units import parse_bytes

    settings = Settings(
        hidden=hidden, layers=layers, heads=heads, neurons=neurons, most_bytes=parse_bytes(size, "--size"), streaming=streaming,
        start=start, window=window, batch=batch, steps=steps, learning_rate=learning_rate, warmup=warmup, accumulate=accumulate,
        variation=variation, written_tokens=written, prompt_tokens=prompt_tokens, text_share=text_share, bits=bits,
        judged_tokens=judged, contexts=tuple(context or CONTEXTS), seed=seed,
    )  # fmt: skip
    how: dict[str, Any] = {"dtype": dtype, "device": device, "compiled": compiled, "restart": restart}
    how |= {"part_minutes": part_minutes, "save_seconds": save_seconds}
    found = learning.run_part(lambda: run(target, text, output, settings, held_out=held_out or (), **how))
    if not as_json:
        for line in _lines(found):
            print(line)
    print_json({"finished": True, **{name: value for name, value in found.items() if name != "settings"}})


def _lines(found: dict[str, Any]) -> list[str]:
    """The draft and its acceptance, for people."""
    trained, sizes = found["training"], found["config"]
    shape = f"{sizes['num_hidden_layers']} layers of {sizes['hidden_size']}, {sizes['intermediate_size']} neurons"
    loss = "no steps" if trained["loss"] is None else f"loss {trained['loss']:.3f}"
    lines = [
        f"{found['parameters'] / 1e6:.1f} M parameters, {found['bytes'] / 1e6:.1f} MB: {shape}",
        f"{trained['tokens'] / 1e6:.1f} M tokens at {trained['tokens_per_s'] / 1e3:.1f} k tokens/s, {loss}",
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
