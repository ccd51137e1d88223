"""What the verbs that train share: options, a part that is over, and what they print."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from rowcast.cli.output import print_json

TRAINING = "Training"

Model = Annotated[str, typer.Argument(help="A directory, a GGUF file or a hub id.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")]
Texts = Annotated[list[Path], typer.Option("--text", help="A text file to learn from; repeatable.")]
HeldOut = Annotated[
    list[Path] | None,
    typer.Option("--held-out", help="A text file to judge by only; left out: the end of each text. Repeatable."),
]
Window = Annotated[int, typer.Option("--window", help="Tokens of a window.", rich_help_panel=TRAINING)]
Batch = Annotated[int, typer.Option("--batch", help="Windows of a step.", rich_help_panel=TRAINING)]
Steps = Annotated[int, typer.Option("--steps", help="Steps of the optimiser; 0: none.", rich_help_panel=TRAINING)]
LearningRate = Annotated[
    float,
    typer.Option(
        "--learning-rate", help="After the warm-up; it falls to 0. With Muon that of the rest.", rich_help_panel=TRAINING
    ),
]
Optimizer = Annotated[
    Literal["adamw", "muon"],
    typer.Option("--optimizer", help="muon: of hidden layers' matrices, AdamW moves the rest.", rich_help_panel=TRAINING),
]
MuonRate = Annotated[
    float, typer.Option("--muon-rate", help="With --optimizer muon, of hidden layers' matrices.", rich_help_panel=TRAINING)
]
Warmup = Annotated[int, typer.Option("--warmup", help="Steps of the warm-up.", rich_help_panel=TRAINING)]
Accumulate = Annotated[
    int, typer.Option("--accumulate", help="Parts of a batch, where memory is short.", rich_help_panel=TRAINING)
]
Written = Annotated[
    int, typer.Option("--written", help="Tokens that the model writes to learn from; 0: none.", rich_help_panel=TRAINING)
]
PromptTokens = Annotated[
    int, typer.Option("--prompt-tokens", help="Of a text, that it writes on from.", rich_help_panel=TRAINING)
]
TextShare = Annotated[
    float,
    typer.Option("--text-share", help="Of the windows, from texts as they are; others are written.", rich_help_panel=TRAINING),
]
Seed = Annotated[
    int, typer.Option("--seed", help="Of all that is drawn: the order of texts, new weights.", rich_help_panel=TRAINING)
]
Compiled = Annotated[
    bool, typer.Option("--compile", help="With torch.compile: faster, after a minute.", rich_help_panel=TRAINING)
]
Captured = Annotated[
    bool,
    typer.Option("--capture/--no-capture", help="On a GPU replay steps as a CUDA graph.", rich_help_panel=TRAINING),
]
Judged = Annotated[int, typer.Option("--judged", help="Held-out tokens, at most, to measure the result on.")]
PartMinutes = Annotated[
    float | None,
    typer.Option("--part-minutes", help="Save and stop after so many minutes; the same command goes on."),
]
SaveSeconds = Annotated[float, typer.Option("--save-seconds", help="Between savings of the training's state.")]
Restart = Annotated[bool, typer.Option("--restart", help="Begin anew where something of other settings was left.")]
AsJson = Annotated[bool, typer.Option("--json", help="No text, only the JSON line.")]


def report(
    run: Callable[[], dict[str, Any]],
    lines: Callable[[dict[str, Any]], list[str]],
    output: Path,
    use: Callable[[str], str],
    *,
    as_json: bool,
    left_out: tuple[str, ...] = ("settings",),
) -> None:
    """Run, as `run_part`, and print what came of it: lines for people, unless `as_json`, and all but `left_out` as JSON.

    `use`: of the path that was written, `output`, options of `rowcast generate` that run it.
    """
    found = run_part(run)
    if not as_json:
        for line in lines(found):
            print(line)
        print(f"wrote {output}; try: rowcast generate {use(shlex.quote(str(output)))} ...")
    print_json({"finished": True, **{name: value for name, value in found.items() if name not in left_out}})


def trained(found: dict[str, Any]) -> str:
    """A training's description, for people."""
    from rowcast.calibration.learning.progress import amount, rate
    from rowcast.calibration.learning.trainer import READ_EVERY

    loss, steps = "no steps", min(READ_EVERY, found["steps"])
    if found["loss"] is not None:
        loss = f"loss {found['loss']:.3f}" + (f" (mean of the last {steps} steps)" if steps > 1 else "")
    return f"{amount(found['tokens'])} tokens at {rate(found['tokens_per_s'])} tokens/s, {loss}"


def run_part(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `run` returns, in the process that leads; others end here.

    Where it is unfinished, say so, print `{"finished": false}` and end: with code 0 where the part is over, 130 after Ctrl-C,
    143 after SIGTERM.
    """
    from rowcast.calibration.learning.part import Unfinished

    try:
        found = run()
    except Unfinished as stopped:
        if _leads():
            saved, begun = (
                "saved; go on with the same command, without --restart",
                "nothing is saved yet; the same command begins anew",
            )
            print("rowcast:", saved if stopped.saved else begun, file=sys.stderr)
            print_json({"finished": False})
        raise typer.Exit(0 if stopped.by_signal is None else 128 + stopped.by_signal) from None
    if not _leads():
        raise typer.Exit
    return found


def _leads() -> bool:
    """Whether this is the only process, or the first of those that train together."""
    return os.environ.get("RANK", "0") == "0"
