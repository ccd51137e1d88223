"""The command line. One file a verb; the verbs hold no logic of their own, and import what is heavy when they run."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Annotated

import typer

from rowcast import __version__
from rowcast.cli import (
    adapt,
    bench,
    calibrate,
    chat,
    distill,
    env,
    eval,
    generate,
    options,
    plan,
    probe,
    prune,
    quantize,
    serve,
    submit,
)
from rowcast.errors import GangError, UserError
from rowcast.settings import configure_logging

BROKEN_PIPE = 141
"""128 and SIGPIPE's number."""
SETTINGS = {"submit": {"allow_interspersed_args": False}}
"""What typer is told of a verb's arguments."""

VERBS: Mapping[str, Callable[..., int | None] | typer.Typer] = {
    "generate": generate.generate,
    "chat": chat.chat,
    "serve": serve.serve,
    "plan": plan.plan,
    "bench": bench.app,
    "calibrate": calibrate.calibrate,
    "distill": distill.distill,
    "adapt": adapt.adapt,
    "prune": prune.prune,
    "quantize": quantize.quantize,
    "eval": eval.evaluate,
    "submit": submit.submit,
    "probe": probe.probe,
    "env": env.env,
}


def command_line(called: Container[str] = VERBS) -> typer.Typer:
    """All verbs, of which only those that are `called` have their options: typer takes a while to read those of all."""
    app = typer.Typer(name="rowcast", add_completion=False, pretty_exceptions_enable=False)
    app.callback()(rowcast)
    for name, verb in VERBS.items():
        group = verb.registered_callback if isinstance(verb, typer.Typer) else None
        if name not in called:
            app.command(name, help=(group.callback if group else verb).__doc__)(_without_options)
        elif isinstance(verb, typer.Typer):
            app.add_typer(verb, name=name)
        else:
            app.command(name, context_settings=SETTINGS.get(name))(verb)
    return app


def _without_options() -> None:
    raise AssertionError("only a verb that is called runs")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"rowcast {__version__}")
        raise typer.Exit


def rowcast(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Run large language models by reading only what the next token needs."""
    configure_logging()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (`sys.argv` if None) and return its exit code.

    0 for success, 2 and one sentence on standard error for bad input, 130 after Ctrl-C, 141 when nobody reads standard output any more,
    as a shell tells of a program that SIGPIPE ended, and 1 with a sentence when that cannot be written or a model's ranks are gone.
    """
    args = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    _accept_any_text()
    called: Container[str] = [arg for arg in args if not arg.startswith("-")][:1]  # no option before it takes a value
    if "submit" in called:  # which looks at the command that is to be the job
        called = VERBS
    try:
        code = command_line(called)(args=args, prog_name="rowcast", standalone_mode=False)
        sys.stdout.flush()
    except (UserError, typer.TyperException) as error:
        message = _message(error) if isinstance(error, typer.TyperException) else options.as_typed(str(error))
        print("rowcast:", " ".join(message.split()), file=sys.stderr)
        return 2
    except GangError as error:
        print("rowcast:", error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _drop_output()
        return BROKEN_PIPE
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # rich's consoles end the process themselves
            return BROKEN_PIPE
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO) or error.filename is not None:
            raise
        _drop_output()
        print(f"rowcast: standard output cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    return code if isinstance(code, int) else 0


def _drop_output() -> None:
    """What is still buffered has nowhere to go; without this the interpreter complains about it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _accept_any_text() -> None:
    """Input that cannot be decoded becomes lone surrogates, which a prompt may not hold; output that cannot be encoded becomes `?`."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if isinstance(stream, io.TextIOWrapper) and stream.errors != errors:
            stream.reconfigure(errors=errors)


def _message(error: typer.TyperException) -> str:
    """typer's own message and, where it leaves them out, the value that was refused and the commands that there are."""
    message = error.format_message()
    context = getattr(error, "ctx", None)
    if message.startswith("No such command") and context is not None:
        message = f"{message} There are {', '.join(context.command.list_commands(context))}."
    problems: list[dict[str, object]] = getattr(error.__cause__, "errors", list)()  # pydantic's, which converts values for typer.
    values = [repr(str(problem["input"])) for problem in problems]
    return ", not ".join([message, *(value for value in values if value not in message)])
