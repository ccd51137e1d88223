"""`rowcast adapt`: a model and text in, the same model for a part of its neurons out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from rowcast.cli import learning, options
from rowcast.cli.output import print_json

_TRAINING = "Training"


def adapt(
    model: Annotated[str, typer.Argument(help="A directory, a GGUF file or a hub id.")],
    text: learning.Texts,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    held_out: learning.HeldOut = None,
    density: Annotated[
        float, typer.Option("--density", help="Share of the neurons to hold up at; the default of its sparse rungs.")
    ] = 0.15,
    choice: Annotated[
        Literal["top", "threshold", "relu"],
        typer.Option(
            "--choice",
            help="top: as many neurons for every token. threshold: above the token's mean and so many deviations, as many on average. "
            "relu: as top, with ReLU as activation.",
        ),
    ] = "top",
    bits: Annotated[
        int | None, typer.Option("--bits", help="Also train for the rung self:bits=, 4 or 8: weights rounded as it rounds them.")
    ] = None,
    window: Annotated[int, typer.Option("--window", help="Tokens of a window.", rich_help_panel=_TRAINING)] = 512,
    batch: Annotated[int, typer.Option("--batch", help="Windows of a step.", rich_help_panel=_TRAINING)] = 48,
    steps: Annotated[int, typer.Option("--steps", help="Steps of the optimiser.", rich_help_panel=_TRAINING)] = 4000,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", help="After the warm-up; it falls to 0.", rich_help_panel=_TRAINING)
    ] = 4e-4,
    warmup: Annotated[int, typer.Option("--warmup", help="Steps of the warm-up.", rich_help_panel=_TRAINING)] = 100,
    accumulate: Annotated[
        int,
        typer.Option(
            "--accumulate",
            help="Parts of a batch, where memory is short. Each has a loss of its own: other parts or processes, another result.",
            rich_help_panel=_TRAINING,
        ),
    ] = 1,
    dense_weight: Annotated[
        float,
        typer.Option(
            "--dense-weight", help="Of windows with all neurons, beside others: more holds them.", rich_help_panel=_TRAINING
        ),
    ] = 1.0,
    written: Annotated[
        int, typer.Option("--written", help="Tokens that the model writes to learn from.", rich_help_panel=_TRAINING)
    ] = 16_000_000,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", help="Of a text, that it writes on from.", rich_help_panel=_TRAINING)
    ] = 32,
    text_share: Annotated[
        float, typer.Option("--text-share", help="Of the windows, from texts as they are.", rich_help_panel=_TRAINING)
    ] = 0.05,
    looks: Annotated[
        int, typer.Option("--looks", help="Times that held-out text judges on the way.", rich_help_panel=_TRAINING)
    ] = 20,
    compiled: Annotated[
        bool, typer.Option("--compile", help="With torch.compile: faster, after a minute.", rich_help_panel=_TRAINING)
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of text and order.", rich_help_panel=_TRAINING)] = 0,
    judged: Annotated[int, typer.Option("--judged", help="Held-out tokens to measure the result on.")] = 8192,
    part_minutes: learning.PartMinutes = None,
    save_seconds: learning.SaveSeconds = 60.0,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew where another model was left.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="No text, only the JSON line.")] = False,
) -> None:
    """Train a model to hold up at a part of its neurons, taught by itself as it is, and to stay what it is with all of them.

    Killed and started again in the same way, it goes on where it was. On several GPUs: accelerate launch -m rowcast adapt ...
    """
    from rowcast.calibration.adapting.adapt import adapt as run
    from rowcast.calibration.adapting.settings import Settings
    from rowcast.calibration.adapting.table import from_json, lines

    settings = Settings(
        density=density, choice=choice, bits=bits, window=window, batch=batch, steps=steps, learning_rate=learning_rate, warmup=warmup,
        accumulate=accumulate, dense_weight=dense_weight, written_tokens=written, prompt_tokens=prompt_tokens, text_share=text_share,
        judged_tokens=judged, looks=looks, seed=seed,
    )  # fmt: skip
    how: dict[str, Any] = {"dtype": dtype, "device": device, "compiled": compiled, "restart": restart}
    how |= {"part_minutes": part_minutes, "save_seconds": save_seconds}
    found = learning.run_part(lambda: run(model, text, output, settings, held_out=held_out or (), **how))
    if not as_json:
        trained = found["training"]
        print(
            f"{trained['tokens'] / 1e6:.1f} M tokens at {trained['tokens_per_s'] / 1e3:.1f} k tokens/s, loss {trained['loss']:.3f}; "
            f"default density {found['density']:g}"
        )
        for line in lines(from_json(found["table"])):
            print(line)
    print_json({"finished": True, **{name: value for name, value in found.items() if name not in ("settings", "looks")}})
