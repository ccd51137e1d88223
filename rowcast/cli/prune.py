"""`rowcast prune`: a model and text in, a smaller model of the same family out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from rowcast.cli import learning, options
from rowcast.cli.output import print_json

_CUT, _TRAINING = "The cut", "Recovery"


def prune(
    model: Annotated[str, typer.Argument(help="A directory, a GGUF file or a hub id.")],
    text: learning.Texts,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    held_out: learning.HeldOut = None,
    keep: Annotated[
        float | None,
        typer.Option("--keep", help="Share of the parameters outside embeddings that stays.", rich_help_panel=_CUT),
    ] = None,
    neurons: Annotated[
        float | None, typer.Option("--neurons", help="In place of --keep: share of the neurons.", rich_help_panel=_CUT)
    ] = None,
    heads: Annotated[
        float | None,
        typer.Option("--heads", help="In place of --keep: share of the query heads, KV heads with them.", rich_help_panel=_CUT),
    ] = None,
    tp: Annotated[
        int, typer.Option("--tp", help="Ranks that KV heads and neurons have to divide among.", rich_help_panel=_CUT)
    ] = 1,
    by: Annotated[
        Literal["taylor", "activation"],
        typer.Option("--by", help="Importance: what the loss grows by, or what is added to the stream.", rich_help_panel=_CUT),
    ] = "taylor",
    tokens: Annotated[int, typer.Option("--tokens", help="Of the text, to weigh by.", rich_help_panel=_CUT)] = 16384,
    refit_tokens: Annotated[
        int,
        typer.Option("--refit-tokens", help="Of the text, to fit what is left to; 0: it stays.", rich_help_panel=_CUT),
    ] = 65536,
    window: Annotated[int, typer.Option("--window", help="Tokens of a window.")] = 512,
    batch: Annotated[int, typer.Option("--batch", help="Windows of a step.", rich_help_panel=_TRAINING)] = 16,
    steps: Annotated[int, typer.Option("--steps", help="Steps of the optimiser; 0: none.", rich_help_panel=_TRAINING)] = 500,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", help="After the warm-up; it falls to 0.", rich_help_panel=_TRAINING)
    ] = 3e-4,
    warmup: Annotated[int, typer.Option("--warmup", help="Steps of the warm-up.", rich_help_panel=_TRAINING)] = 50,
    accumulate: Annotated[
        int, typer.Option("--accumulate", help="Parts of a batch, where memory is short.", rich_help_panel=_TRAINING)
    ] = 1,
    written: Annotated[
        int, typer.Option("--written", help="Tokens that the model writes to learn from, too.", rich_help_panel=_TRAINING)
    ] = 0,
    text_share: Annotated[
        float,
        typer.Option("--text-share", help="Of the windows, from texts as they are, with --written.", rich_help_panel=_TRAINING),
    ] = 0.5,
    seed: Annotated[int, typer.Option("--seed", help="Of the order of texts.")] = 0,
    judged: Annotated[int, typer.Option("--judged", help="Held-out tokens to measure on.")] = 16384,
    part_minutes: learning.PartMinutes = None,
    save_seconds: learning.SaveSeconds = 60.0,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew where another model was left.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="No text, only the JSON line.")] = False,
) -> None:
    """Cut the neurons and heads that matter least out of a model, fit what is left, and let it learn from the original.

    Killed and started again in the same way, it goes on where it was. On several GPUs: accelerate launch -m rowcast prune ...
    """
    from rowcast.calibration.pruning import Settings
    from rowcast.calibration.pruning import prune as run

    settings = Settings(
        keep=keep, neurons=neurons, heads=heads, tp=tp, by=by, tokens=tokens, refit_tokens=refit_tokens, window=window,
        batch=batch, steps=steps, learning_rate=learning_rate, warmup=warmup, accumulate=accumulate, written_tokens=written,
        text_share=text_share, judged_tokens=judged, seed=seed,
    )  # fmt: skip
    how: dict[str, Any] = {"dtype": dtype, "device": device, "restart": restart}
    how |= {"part_minutes": part_minutes, "save_seconds": save_seconds}
    found = learning.run_part(lambda: run(model, text, output, settings, held_out=held_out or (), **how))
    if not as_json:
        for line in _lines(found):
            print(line)
    print_json({"finished": True, **{name: value for name, value in found.items() if name != "settings"}})


def _lines(found: dict[str, Any]) -> list[str]:
    """What is left and how good it is, for people."""
    before, after = found["parameters"]
    sizes = ", ".join(f"{name} {found[key][0]} -> {found[key][1]}" for name, key in _SIZES if found[key][0] != found[key][1])
    ranks = ", ".join(map(str, found["tensor_parallel"][1]))
    share = f"{found['kept']:.3f} of those outside embeddings"
    lines = [f"{before / 1e6:.1f} -> {after / 1e6:.1f} M parameters, {share}: {sizes}; KV heads divide among {ranks} ranks"]
    held = found["held_out"]
    lines.append(f"original: perplexity {held['cut']['original_perplexity']:.2f}")
    for name, figures in held.items():
        lines.append(
            f"{name}: perplexity {figures['perplexity']:.2f}, acceptance {figures['acceptance']['1']['maximal']:.3f}, "
            f"KL {figures['kl']:.3f}"
        )
    return lines


_SIZES = (("neurons", "neurons"), ("heads", "heads"), ("KV heads", "kv_heads"))
