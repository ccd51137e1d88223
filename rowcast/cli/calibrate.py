"""`rowcast calibrate`: a model and text in, a calibration out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from rowcast.cli import options
from rowcast.cli.output import print_json

ScorerName = Literal[
    "q2", "q3", "q4", "q8", "lowrank", "dejavu", "gate", "oracle",
    "q2-ahead", "q3-ahead", "q4-ahead", "q8-ahead", "lowrank-ahead", "dejavu-ahead",
]  # fmt: skip
"""`runtime.ladder.spec.ScorerName`, which every help would wait for."""


def calibrate(
    model: Annotated[str, typer.Argument(help="A directory, a GGUF file or a hub id.")],
    text: Annotated[list[Path], typer.Option("--text", help="A text file to calibrate on; repeatable.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    tokens: Annotated[int, typer.Option("--tokens", help="Most tokens of the text to run.")] = 200_000,
    window: Annotated[int, typer.Option("--window", help="Tokens that see each other.")] = 1024,
    recall: Annotated[float, typer.Option("--recall", help="That hire's candidates reach for all but 1% of the tokens.")] = 0.99,
    accept: Annotated[
        float | None, typer.Option("--accept", help="Default density: the smallest with this acceptance as a draft.")
    ] = None,
    bytes_share: Annotated[
        float | None, typer.Option("--bytes", help="Default density: where a token reads this share of the dense bytes.")
    ] = None,
    by: Annotated[
        ScorerName | None, typer.Option("--by", help="The scorer that --accept and --bytes are about, q4 if left out.")
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="Of the low-rank predictors.")] = None,
    train_steps: Annotated[int, typer.Option("--train-steps", help="Gradient steps of each predictor; 0: closed form.")] = 32,
    sensitivity_tokens: Annotated[
        int, typer.Option("--sensitivity-tokens", help="Tokens to find on how much outputs depend on each neuron; 0: none.")
    ] = 8192,
    measured_tokens: Annotated[int, typer.Option("--measure", help="Held-out tokens that quality is measured on.")] = 2048,
    seed: Annotated[int, typer.Option("--seed", help="Of samples and training.")] = 0,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew where another calibration was left.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Only the JSON line, which ends the text where standard output is no terminal.")
    ] = False,
) -> None:
    """Learn from text which neurons and heads tokens need. Killed and started again in the same way, it goes on where it was."""
    from rowcast.calibration import Settings
    from rowcast.calibration import calibrate as run

    settings = Settings(
        tokens=tokens, window=window, recall=recall, accept=accept, bytes_share=bytes_share, by=by, rank=rank,
        train_steps=train_steps, sensitivity_tokens=sensitivity_tokens, measured_tokens=measured_tokens,
        seed=seed,
    )  # fmt: skip
    found = run(model, text, output, settings, dtype=dtype, device=device, restart=restart).description
    if not as_json:
        print(f"{found['tokens']} tokens; default density {found['density']:.2f}; {output / 'report.html'} shows the rest")
        for rung, figures in found["quality"].items():
            drafts = f"as a draft {figures['draft_acceptance']:.3f}, " if "draft_acceptance" in figures else ""
            print(
                f"{rung}: perplexity {figures['perplexity']:.2f}, acceptance {figures['acceptance']:.3f}, {drafts}"
                f"{figures['bytes']:.2f} of the bytes"
            )
    if as_json or not sys.stdout.isatty():
        print_json({name: found[name] for name in ("model", "fingerprint", "tokens", "density", "scorers", "quality")})
