"""The command line. One file a verb; the verbs hold no logic of their own, and import what is heavy when they run."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from rowcast import __version__
from rowcast.cli import bench, chat, env, generate
from rowcast.errors import UserError
from rowcast.settings import settings

app = typer.Typer(name="rowcast", add_completion=False, pretty_exceptions_enable=False)
app.command()(generate.generate)
app.command()(chat.chat)
app.add_typer(bench.app, name="bench")
app.command()(env.env)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"rowcast {__version__}")
        raise typer.Exit


@app.callback()
def rowcast(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Run large language models by reading only what the next token needs."""
    logging.basicConfig(level=settings().log.upper(), format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (`sys.argv` if None) and return its exit code.

    0 for success, 2 and one sentence on standard error for bad input, 130 after Ctrl-C, 1 when nobody reads standard output.
    """
    args = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        code = app(args=args, prog_name="rowcast", standalone_mode=False)
        sys.stdout.flush()
    except (UserError, typer.TyperException) as error:
        message = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        print("rowcast:", " ".join(message.split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # What is still buffered has nowhere to go; without this the interpreter complains about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code if isinstance(code, int) else 0
