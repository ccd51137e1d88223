"""`rowcast adapt`: a model and text in, the same model for a part of its neurons out."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from rowcast.cli import learning, options


def adapt(
    model: learning.Model,
    text: learning.Texts,
    output: learning.Output,
    held_out: learning.HeldOut = None,
    density: Annotated[
        float, typer.Option("--density", help="Share of the neurons to hold up at; the default of its sparse rungs.")
    ] = 0.15,
    choice: Annotated[
        Literal["top", "threshold", "relu"],
        typer.Option(
            "--choice",
            help="threshold: those that matter more than one level for all layers and tokens, as many on average. top: as many "
            "for every token and layer. relu: as top, with ReLU as activation.",
        ),
    ] = "threshold",
    bits: Annotated[
        int | None, typer.Option("--bits", help="Also train for the rung self:bits=, 4 or 8: weights rounded as it rounds them.")
    ] = None,
    window: learning.Window = 512,
    batch: learning.Batch = 48,
    steps: learning.Steps = 4000,
    learning_rate: learning.LearningRate = 2e-4,
    optimizer: learning.Optimizer = "adamw",
    muon_rate: learning.MuonRate = 5e-4,
    warmup: learning.Warmup = 100,
    accumulate: Annotated[
        int,
        typer.Option(
            "--accumulate",
            help="Parts of a batch, where memory is short. Each has a loss of its own: other parts or processes, another result.",
            rich_help_panel=learning.TRAINING,
        ),
    ] = 1,
    dense_weight: Annotated[
        float,
        typer.Option(
            "--dense-weight",
            help="Of windows with all neurons, beside others: more holds them.",
            rich_help_panel=learning.TRAINING,
        ),
    ] = 2.0,
    stream_weight: Annotated[
        float,
        typer.Option(
            "--stream-weight",
            help="Of the residual streams' distance from the original's, beside that of its laws; 0: they are free.",
            rich_help_panel=learning.TRAINING,
        ),
    ] = 0.5,
    written: learning.Written = 16_000_000,
    prompt_tokens: learning.PromptTokens = 32,
    text_share: learning.TextShare = 0.05,
    looks: Annotated[
        int, typer.Option("--looks", help="Times that held-out text judges on the way.", rich_help_panel=learning.TRAINING)
    ] = 20,
    compiled: learning.Compiled = False,
    captured: learning.Captured = True,
    seed: learning.Seed = 0,
    judged: learning.Judged = 8192,
    part_minutes: learning.PartMinutes = None,
    save_seconds: learning.SaveSeconds = 60.0,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    restart: learning.Restart = False,
    as_json: learning.AsJson = False,
) -> None:
    """Train a model to hold up at a part of its neurons, taught by itself as it is, and to stay what it is with all of them.

    Killed and started again in the same way, it goes on where it was. On several GPUs: accelerate launch -m rowcast adapt ...
    """
    from rowcast.calibration.adapting.adapt import adapt as run
    from rowcast.calibration.adapting.settings import Settings
    from rowcast.calibration.learning.job import How

    settings = Settings(
        density=density, choice=choice, bits=bits, window=window, batch=batch, steps=steps, learning_rate=learning_rate,
        optimizer=optimizer, muon_rate=muon_rate, warmup=warmup, accumulate=accumulate, dense_weight=dense_weight,
        stream_weight=stream_weight, written_tokens=written, prompt_tokens=prompt_tokens, text_share=text_share, judged_tokens=judged,
        looks=looks, seed=seed,
    )  # fmt: skip
    cut = ",cut=threshold" if choice == "threshold" else ""
    how = How(dtype, device, part_minutes, save_seconds, restart, captured=captured)
    learning.report(
        lambda: run(model, text, output, settings, how, held_out=held_out or (), compiled=compiled), _lines, output,
        lambda adapted: f'-m {adapted} --ladder "self:mlp={density:g}{cut} / plain"', as_json=as_json, left_out=("settings", "looks"),
    )  # fmt: skip


def _lines(found: dict[str, Any]) -> list[str]:
    """What it came to by density, for people."""
    from rowcast.calibration.adapting.table import from_json, lines

    return [f"{learning.trained(found['training'])}; default density {found['density']:g}", *lines(from_json(found["table"]))]
