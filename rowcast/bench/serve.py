"""What `rowcast bench serve` does: load on a server at its own pace, and what its clients saw of it. Torch-free.

An open loop: requests arrive when they arrive, however slow the server is, and a latency counts from the planned arrival, so that a
client that waits with its next request hides nothing (Schroeder, Wierman, Harchol-Balter, NSDI 2006). With `rate` inf and a
`concurrency` it is a closed loop, and latencies count from sending.
"""

from __future__ import annotations

import asyncio
import os
import random
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rowcast.bench.server_process import ServerProcess
from rowcast.bench.serving_client import Load, Outcome, Planned, Server, ask, served_model
from rowcast.bench.serving_load import INFINITE, SAFE_IDS, WORDS, Lengths, arrivals, plan
from rowcast.bench.serving_stats import LATENCIES, parse_objectives, summarise
from rowcast.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

KEY_VARIABLE = "OPENAI_API_KEY"
"""The same as that of OpenAI's client."""

_TEXT_CHARACTERS = 200_000
"""Of a prompt file, which the server is asked to tokenize in one request."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Of one run; texts as the command line takes them."""

    url: str | None = None
    """None: start a server for `model`."""
    model: str | None = None
    """With a `url` the name that requests ask for; None: the first that the server lists."""
    serve_options: tuple[str, ...] = ()
    """For the server that is started."""
    api_key_file: str | None = None
    requests: int = 100
    rate: float = INFINITE
    arrivals: Literal["poisson", "fixed"] = "poisson"
    concurrency: int | None = None
    prompt_tokens: str = "64"
    max_tokens: str = "32"
    prompt_file: str | None = None
    long_share: float = 0.0
    long_tokens: int = 1024
    temperature: float = 0.0
    seed: int = 0
    stop_at_eos: bool = False
    slo: str | None = None
    retries: int = 0
    warm_up: int = 1
    timeout_s: float = 600.0
    progress: bool = field(default=False, compare=False)


def run(settings: Settings) -> dict[str, Any]:
    """Send the load and return the report. Raises UserError for settings that make no sense and a server that cannot be reached."""
    objectives = parse_objectives(settings.slo) if settings.slo is not None else None
    lengths = Lengths.parse(settings.prompt_tokens, "--prompt-tokens"), Lengths.parse(settings.max_tokens, "--max-tokens")
    _check(settings)
    text = None if settings.prompt_file is None else _text(settings.prompt_file)
    key = _api_key(settings.api_key_file)
    with ExitStack() as stack:
        if settings.url is None:
            assert settings.model is not None
            server = Server.at(stack.enter_context(ServerProcess(settings.model, settings.serve_options)).url, key)
        else:
            server = Server.at(settings.url, key)
        return asyncio.run(_run(settings, server, text, *lengths, objectives))


async def _run(
    settings: Settings,
    server: Server,
    text: str | None,
    prompt_tokens: Lengths,
    max_tokens: Lengths,
    objectives: dict[str, float] | None,
) -> dict[str, Any]:
    listed = await served_model(server)
    model = settings.model if settings.url is not None and settings.model is not None else listed
    source = await _tokenize(server, model, text or WORDS)
    if source is None and text is not None:
        raise UserError(
            f"{server.url} does not tokenize, so no prompts can be cut from {settings.prompt_file}: leave --prompt-file out"
        )
    rng = random.Random(settings.seed)
    times = arrivals(settings.requests, settings.rate, settings.arrivals, rng)
    if settings.rate == INFINITE and settings.concurrency is not None:
        times = [INFINITE] * settings.requests

    def planned(times: list[float], long_share: float, seed: int) -> list[Planned]:
        return plan(
            times,
            source or range(SAFE_IDS),
            model=model,
            running_text=text is not None,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            long_share=long_share,
            long_tokens=settings.long_tokens,
            sampling={"temperature": settings.temperature, "ignore_eos": not settings.stop_at_eos},
            seed=seed,
        )

    load = planned(times, settings.long_share, settings.seed)
    await _warm_up(server, planned([0.0] * settings.warm_up, 0.0, settings.seed + settings.requests), settings)
    outcomes, most = await _measure(server, load, settings)
    return {
        "benchmark": "serve",
        "backend": "rowcast" if settings.url is None else "openai",
        "version": version("rowcast") if settings.url is None else None,
        "model": model,
        "num_prompts": settings.requests,
        "request_rate": "inf" if settings.rate == INFINITE else settings.rate,
        "arrivals": settings.arrivals,
        "max_concurrency": settings.concurrency,
        "max_concurrent_requests": most,
        "prompt_tokens": settings.prompt_tokens,
        "max_tokens": settings.max_tokens,
        "long_share": settings.long_share,
        "temperature": settings.temperature,
        "seed": settings.seed,
        "slo_ms": None if objectives is None else {name: 1e3 * value for name, value in objectives.items()},
        **summarise(outcomes, objectives),
        "messages": sorted({each.message for each in outcomes if each.message})[:5],
    }


def _check(settings: Settings) -> None:
    if settings.url is None and settings.model is None:
        raise UserError("neither --url nor --model is given: say where the server is, or for which model to start one")
    if settings.url is not None and settings.serve_options:
        raise UserError(
            f"options for a server are given ({' '.join(settings.serve_options)}), but --url names one that runs already"
        )
    if not settings.rate > 0:
        raise UserError(f"--rate is {settings.rate:g} but has to be above 0 requests a second, or inf")
    if not 0 <= settings.long_share <= 1:
        raise UserError(f"--long-share is {settings.long_share:g} but has to be from 0 to 1")


def _text(path: str) -> str:
    try:
        with Path(path).open(encoding="utf-8") as file:
            return file.read(_TEXT_CHARACTERS)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt-file {path} cannot be read ({error})") from error


def _api_key(path: str | None) -> str | None:
    """The first key of a file as `rowcast serve` reads it (KEY or NAME:KEY a line, lines that begin with # are comments), else that of
    the environment."""
    if path is None:
        return os.environ.get(KEY_VARIABLE) or None
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--api-key-file {path} cannot be read ({error})") from error
    first = next((line for line in lines if line and not line.startswith("#")), None)
    if first is None:
        raise UserError(f"--api-key-file {path} is empty but has to hold a key")
    name, colon, key = first.partition(":")
    return key.strip() if colon else name


async def _tokenize(server: Server, model: str, text: str) -> list[int] | None:
    """None where the server has no such route, or its model no tokenizer."""
    status, found = await ask(server, "POST", "/tokenize", {"model": model, "prompt": text, "add_special_tokens": False})
    if status != 200 or not isinstance(found, dict) or not found.get("tokens"):
        return None
    return list(found["tokens"])


async def _warm_up(server: Server, planned: list[Planned], settings: Settings) -> None:
    """Requests that are not counted. Raises UserError if one fails: then the others would, too."""
    load = Load(server, retries=settings.retries, timeout_s=settings.timeout_s)
    for outcome in await load.run(planned):
        if outcome.error is not None:
            told = f"{outcome.error}: {outcome.message}" if outcome.message else outcome.error
            raise UserError(f"a first request to {server.url} failed ({told})")


async def _measure(server: Server, planned: list[Planned], settings: Settings) -> tuple[list[Outcome], int]:
    """What came of each, and how many were in flight at the same time."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not settings.progress) as progress:
        task = progress.add_task("requests", total=len(planned))
        load = Load(
            server,
            concurrency=settings.concurrency,
            retries=settings.retries,
            timeout_s=settings.timeout_s,
            seed=settings.seed,
            on_end=lambda _: progress.advance(task),
        )
        return await load.run(planned), load.most_in_flight


def print_table(report: dict[str, Any], console: Console | None = None) -> None:
    """The report for people, on standard error."""
    from rich.console import Console
    from rich.table import Table

    console = console or Console(stderr=True)
    groups = [name for name in ("short", "long") if name in report]
    rate = "all at once" if report["request_rate"] == "inf" else f"{report['request_rate']:g} a second, {report['arrivals']}"
    if report["request_rate"] == "inf" and report["max_concurrency"] is not None:
        rate = f"{report['max_concurrency']} at a time"
    table = Table(title=f"{report['model']}: {report['num_prompts']} requests, {rate}")
    for heading in ("latency, ms", "mean", "median", "p99", *(f"{group} p99" for group in groups)):
        table.add_column(heading, justify="left" if heading.startswith("latency") else "right")
    for name in LATENCIES:
        values = [report[f"{kind}_{name}_ms"] for kind in ("mean", "median", "p99")]
        values += [report[group][f"p99_{name}_ms"] for group in groups]
        table.add_row(name.upper(), *("none" if value is None else f"{value:.1f}" for value in values))
    console.print(table)
    told = [
        f"{report['completed']} completed in {report['duration']:.1f} s, {report['failed']} failed",
        f"{report['request_throughput']:.2f} requests/s",
        f"{report['output_throughput']:.1f} output tokens/s, {report['total_token_throughput']:.1f} with the prompts'",
        f"{report['max_concurrent_requests']} at most in flight",
    ]
    if report["request_goodput"] is not None:
        limits = ", ".join(f"{name.upper()} {value:g} ms" for name, value in report["slo_ms"].items())
        told.append(f"goodput {report['request_goodput']:.2f} requests/s within {limits}")
    if report["errors"]:
        told.append("errors: " + ", ".join(f"{count} x {name}" for name, count in report["errors"].items()))
    if report["retries"]:
        told.append(f"{report['retries']} retries")
    console.print("; ".join(told))
    for message in report["messages"]:
        console.print(f"  {message}", markup=False)
