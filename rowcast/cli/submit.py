"""`rowcast submit`: another command line, as a job of a Ray cluster."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from rowcast.cli.output import print_json
from rowcast.errors import UserError

HERE_ONLY = ("chat", "submit")
"""Verbs that are no jobs: one talks to a terminal, the other is this."""


def submit(
    context: typer.Context,
    args: Annotated[list[str] | None, typer.Argument(metavar="-- COMMAND ...", help="As in: -- generate --tp 2 PROMPT")] = None,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            help="http://HOST:PORT of a dashboard, or HOST:PORT of a cluster; local: start one here. Else RAY_ADDRESS, else a cluster "
            "that runs here, else one that is started.",
        ),
    ] = None,
    working_dir: Annotated[
        Path, typer.Option("--working-dir", help="The folder to ship, without what .gitignore and .rayignore name.")
    ] = Path("."),
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Print the job's id and do not wait for it.")] = False,
    python: Annotated[str | None, typer.Option("--python", help="The interpreter on the cluster.")] = None,
    env: Annotated[list[str] | None, typer.Option("--env", help="NAME=VALUE for the job; repeatable.")] = None,
    gpus: Annotated[float, typer.Option("--gpus", min=0, help="GPUs of the job's own process; ranks of --tp have theirs.")] = 0,
    status: Annotated[str | None, typer.Option("--status", metavar="ID", help="Print a job's state.")] = None,
    logs: Annotated[
        str | None, typer.Option("--logs", metavar="ID", help="Follow what a job prints, from the beginning.")
    ] = None,
    stop: Annotated[str | None, typer.Option("--stop", metavar="ID", help="Stop a job.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --status: one JSON object.")] = False,
) -> int:
    """Run a command as a job of a Ray cluster: follow what it prints and end with its exit code."""
    asked = [f"{name} {value}" for name, value in (("--status", status), ("--logs", logs), ("--stop", stop)) if value is not None]
    if len(asked) + bool(args) != 1:
        found = [*asked, *(["a command"] if args else [])]
        raise UserError(
            f"{' and '.join(found)} exclude each other: give one"
            if found
            else "no command was given: append one, as in `rowcast submit -- generate ...`, or ask for a job with --status ID"
        )
    if args:
        _check(context, args)
    variables = dict(_variable(text) for text in env or [])

    from rowcast.cluster import jobs

    jobs.quiet()
    if not args:
        job = jobs.job(status or logs or stop or "", address=address)
        if status is not None:
            state = {"id": job.id, "status": job.status(), "message": job.message()}
            if as_json:
                print_json(state)
            else:
                print(state["status"], state["message"])
            return 0
        if stop is not None:
            print(job.stop())
            return 0
        return _follow(job)

    cluster = jobs.find(address, start=not no_wait, cpus=jobs.ranks(args))
    if cluster.started:
        _tell(f"no Ray cluster was found, one was started here for this job: {cluster.address}")
    job = jobs.submit(args, address=cluster, working_dir=working_dir, python=python, env=variables, gpus=gpus)
    if no_wait:
        print(job.id)
        _tell(f"job {job.id} was handed to {cluster.address}; {_how_to_go_on(job)}")
        return 0
    _tell(f"job {job.id} runs at {cluster.address}")
    return _follow(job)


def _follow(job: object) -> int:
    from rowcast.cluster.jobs import Job

    assert isinstance(job, Job)
    try:
        code = job.follow(lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        if job.cluster.started:
            _tell(f"interrupted: job {job.id} ends with the cluster that was started for it")
        else:
            _tell(f"job {job.id} goes on; {_how_to_go_on(job)}")
        raise
    if code:
        _tell(f"job {job.id} ended with exit code {code}" if job.status() == "FAILED" else f"job {job.id} was stopped")
    return code


def _how_to_go_on(job: object) -> str:
    from rowcast.cluster.jobs import Job

    assert isinstance(job, Job)
    where = f"rowcast submit --address {job.cluster.address}"
    return f"follow it with `{where} --logs {job.id}`, end it with `{where} --stop {job.id}`"


def _check(context: typer.Context, args: Sequence[str]) -> None:
    """Refuse here what the job would refuse."""
    assert context.parent is not None
    verbs = getattr(context.parent.command, "commands", {})
    if args[0] not in verbs or args[0] in HERE_ONLY:
        known = ", ".join(name for name in verbs if name not in HERE_ONLY)
        raise UserError(f"{args[0]!r:.60} is no command that can be a job: use {known}")
    command = verbs[args[0]]
    rest = list(args[1:])
    while hasattr(command, "commands") and rest and rest[0] in command.commands:
        command = command.commands[rest.pop(0)]
    command.make_context(args[0], rest, parent=context.parent)


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise UserError(f"--env {text!r:.80} has to be NAME=VALUE")
    return name, value


def _tell(sentence: str) -> None:
    print(f"rowcast: {sentence}", file=sys.stderr, flush=True)
