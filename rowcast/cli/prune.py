"""`rowcast prune`: a model and text in, a smaller model of the same family out."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from rowcast.cli import learning, options

_CUT = "The cut"


def prune(
    model: learning.Model,
    text: learning.Texts,
    output: learning.Output,
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
    window: learning.Window = 512,
    batch: Annotated[
        int | None,
        typer.Option("--batch", help="Windows of a step; left out: 48 on a GPU, 16 on a CPU.", rich_help_panel=learning.TRAINING),
    ] = None,
    steps: learning.Steps = 500,
    learning_rate: learning.LearningRate = 3e-4,
    optimizer: learning.Optimizer = "adamw",
    muon_rate: learning.MuonRate = 5e-4,
    warmup: learning.Warmup = 50,
    accumulate: learning.Accumulate = 1,
    written: learning.Written = 0,
    prompt_tokens: learning.PromptTokens = 32,
    text_share: learning.TextShare = 0.5,
    captured: learning.Captured = True,
    seed: learning.Seed = 0,
    judged: learning.Judged = 16384,
    part_minutes: learning.PartMinutes = None,
    save_seconds: learning.SaveSeconds = 60.0,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    restart: learning.Restart = False,
    as_json: learning.AsJson = False,
) -> None:
    """Cut the neurons and heads that matter least out of a model, fit what is left, and let it learn from the original.

    Killed and started again in the same way, it goes on where it was. On several GPUs: accelerate launch -m rowcast prune ...
    """
    from rowcast.calibration.learning.job import How
    from rowcast.calibration.pruning import Settings, default_batch
    from rowcast.calibration.pruning import prune as run

    settings = Settings(
        keep=keep, neurons=neurons, heads=heads, tp=tp, by=by, tokens=tokens, refit_tokens=refit_tokens, window=window,
        batch=default_batch(device) if batch is None else batch, steps=steps, learning_rate=learning_rate, optimizer=optimizer,
        muon_rate=muon_rate, warmup=warmup, accumulate=accumulate, written_tokens=written, prompt_tokens=prompt_tokens,
        text_share=text_share, judged_tokens=judged, seed=seed,
    )  # fmt: skip
    how = How(dtype, device, part_minutes, save_seconds, restart, captured=captured)
    learning.report(
        lambda: run(model, text, output, settings, how, held_out=held_out or ()), _lines, output, lambda smaller: f"-m {smaller}",
        as_json=as_json,
    )  # fmt: skip


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
