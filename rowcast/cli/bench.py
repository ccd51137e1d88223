"""`rowcast bench`: measurements that print ratios, against a floor or a peer in the same run."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from rowcast.cli import options
from rowcast.cli.output import print_json

app = typer.Typer()


@app.callback(invoke_without_command=True)
def bench(context: typer.Context) -> None:
    """Measure. The last line of standard output is JSON."""
    if context.invoked_subcommand is None:
        print(context.get_help(), end="")


@app.command()
def latency(
    model: options.Model = options.DEFAULT_MODEL,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    against: Annotated[Literal["transformers"] | None, typer.Option("--against", help="A peer to measure beside.")] = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Tokens of the prefill.")] = 1024,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=8, help="Tokens to decode after a prompt of 32.")] = 64,
    repeat: Annotated[int, typer.Option("--repeat", min=1, help="Loads of each side; medians are shown.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="No table, only the JSON line.")] = False,
) -> None:
    """Time to load, to read a prompt and to write a token, at batch 1."""
    from rowcast.bench import latency as measure

    report = measure.run(model, dtype, device, against is not None, prompt_tokens, max_tokens, repeat)
    if not as_json:
        measure.print_table(report)
    print_json(report)
