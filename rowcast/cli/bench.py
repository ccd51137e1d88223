"""`rowcast bench`: measurements that print ratios, against a floor or a peer in the same run."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

import typer

from rowcast.cli import options
from rowcast.cli.output import print_json

app = typer.Typer()

Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help=f"A directory, a GGUF file or a hub id. [default: {options.DEFAULT_MODEL}]"),
]
Shape = Annotated[str | None, typer.Option("--shape", help="A model's shape with random weights: a known name or a config.json.")]


@app.callback(invoke_without_command=True)
def bench(context: typer.Context) -> None:
    """Measure. The last line of standard output is JSON."""
    if context.invoked_subcommand is None:
        print(context.get_help(), end="")


@app.command()
def latency(
    model: Model = None,
    shape: Shape = None,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    eager: options.Eager = False,
    against: Annotated[Literal["transformers"] | None, typer.Option("--against", help="A peer to measure beside.")] = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Tokens of the prefill.")] = 1024,
    context: Annotated[
        int | None, typer.Option("--context", min=1, help="Tokens of the prompt before decoding, at random; a short text.")
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=8, help="Tokens to decode.")] = 64,
    repeat: Annotated[int, typer.Option("--repeat", min=1, help="Loads of each side; medians are shown.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="No table, only the JSON line.")] = False,
) -> None:
    """Time to load, to read a prompt and to write a token, at batch 1."""
    from rowcast.bench import latency as measure

    report = measure.run(
        measure.Settings(
            model=model if model is not None or shape is not None else options.DEFAULT_MODEL,
            shape=shape,
            dtype=dtype,
            device=device,
            eager=eager,
            against_transformers=against is not None,
            prompt_tokens=prompt_tokens,
            context=context,
            max_tokens=max_tokens,
            repeat=repeat,
        )
    )
    if not as_json:
        measure.print_table(report)
    print_json(report)


@app.command()
def kernels(
    only: Annotated[str | None, typer.Option("--only", help="Cases with this in their family, name or shape.")] = None,
    repeat: Annotated[int, typer.Option("--repeat", min=1, help="Timed replays of each; medians are shown.")] = 30,
    as_json: Annotated[bool, typer.Option("--json", help="No table, only the JSON line.")] = False,
) -> None:
    """Every kernel on this GPU: time, share of the floor, and what libraries take for the same. Exit code 1 if one failed."""
    from rowcast.bench import kernels as measure

    report = measure.run(only, repeat)
    if not as_json:
        measure.print_table(report)
    print_json(report)
    if any("error" in case for case in report["cases"]):
        raise typer.Exit(1)


@app.command()
def speculation(
    model: Model = None,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    prompt_file: Annotated[str | None, typer.Option("--prompt-file", help="Text that the prompts are cut from.")] = None,
    prompt_tokens: Annotated[int | None, typer.Option("--prompt-tokens", min=1, help="Tokens of a prompt; all of them.")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, max=2048, help="Prompts that run together.")] = 1,
    ladder: Annotated[
        list[str] | None, typer.Option("--ladder", help="A ladder to measure beside plain; repeatable. All that there are.")
    ] = None,
    draft: options.Draft = None,
    kv_budget: options.KVBudget = None,
    density: options.Density = None,
    calibration: options.Calibration = None,
    verification: options.Verification = "coupled",
    temperature: options.Temperature = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the first prompt; the others count on.")] = 0,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=8, help="Tokens to generate for each prompt.")] = 256,
    repeat: Annotated[int, typer.Option("--repeat", min=1, help="Visits of each ladder, in turn; medians are shown.")] = 3,
    against: Annotated[
        Literal["transformers"] | None, typer.Option("--against", help="Its assisted generation with the same draft.")
    ] = None,
    shape: Shape = None,
    simulate: Annotated[
        str | None, typer.Option("--simulate", help="Acceptance rates for --shape: OUTER or OUTER,INNER, as in 0.92,0.6.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="No table, only the JSON line.")] = False,
) -> None:
    """Ladders beside plain decoding: time a token, acceptance, where the time goes, and whether the output is the same."""
    from rowcast.bench import speculation as measure
    from rowcast.bench.speculation_report import print_report

    report = measure.run(
        measure.Settings(
            model=model if model is not None or shape is not None else options.DEFAULT_MODEL,
            dtype=dtype,
            device=device,
            prompt_file=prompt_file,
            prompt_tokens=prompt_tokens,
            ladder=tuple(ladder or ()),
            draft=draft,
            kv_budget=kv_budget,
            density=density,
            calibration=None if calibration is None else str(calibration),
            temperature=temperature,
            seed=seed,
            max_tokens=max_tokens,
            verification=verification,
            batch=batch,
            repeat=repeat,
            against_transformers=against is not None,
            shape=shape,
            simulate=simulate,
        )
    )
    if not as_json:
        print_report(report)
    print_json(report)


@app.command()
def serve(
    serve_options: Annotated[
        list[str] | None, typer.Argument(help="After --: options of rowcast serve, for the server that is started.")
    ] = None,
    url: Annotated[str | None, typer.Option("--url", help="A server that runs, as in http://127.0.0.1:8000.")] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Without --url: start a server for it. With: what requests ask for. [its first]"),
    ] = None,
    api_key_file: Annotated[
        str | None, typer.Option("--api-key-file", help="A file with the key to send. [OPENAI_API_KEY's]")
    ] = None,
    requests: Annotated[int, typer.Option("--requests", "-n", min=1, help="Requests to send.")] = 100,
    rate: Annotated[
        float, typer.Option("--rate", help="Arrivals a second; inf: all at once, or --concurrency at a time.")
    ] = float("inf"),
    arrivals: Annotated[Literal["poisson", "fixed"], typer.Option("--arrivals", help="How they are spread.")] = "poisson",
    concurrency: Annotated[int | None, typer.Option("--concurrency", min=1, help="Most requests in flight; others wait.")] = None,
    prompt_tokens: Annotated[str, typer.Option("--prompt-tokens", help="A number, or a range as in 8-64.")] = "64",
    max_tokens: Annotated[str, typer.Option("--max-tokens", help="Tokens to generate: a number, or a range.")] = "32",
    prompt_file: Annotated[
        str | None, typer.Option("--prompt-file", help="Text that the prompts are cut from. [words at random]")
    ] = None,
    long_share: Annotated[float, typer.Option("--long-share", help="Share of the requests that have a long prompt.")] = 0.0,
    long_tokens: Annotated[int, typer.Option("--long-tokens", min=1, help="Tokens of a long prompt.")] = 1024,
    temperature: options.Temperature = 0.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of arrivals and prompts; the requests' own count on from it.")] = 0,
    stop_at_eos: Annotated[bool, typer.Option("--stop-at-eos", help="Let an output end before its --max-tokens.")] = False,
    slo: Annotated[
        str | None, typer.Option("--slo", help="What a good request keeps to, as in ttft=500ms,tpot=50ms; also itl, e2el.")
    ] = None,
    retries: Annotated[int, typer.Option("--retries", min=0, help="How often to come again after a Retry-After.")] = 0,
    warm_up: Annotated[int, typer.Option("--warm-up", min=0, help="Requests before the clock starts.")] = 1,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds for one request.")] = 600.0,
    as_json: Annotated[bool, typer.Option("--json", help="No table, only the JSON line.")] = False,
) -> None:
    """Load on a server: TTFT, TPOT, ITL and end-to-end latency, throughput, goodput. Exit code 1 if no request was finished."""
    from rowcast.bench import serve as measure

    report = measure.run(
        measure.Settings(
            url=url,
            model=model,
            serve_options=tuple(serve_options or ()),
            api_key_file=api_key_file,
            requests=requests,
            rate=rate,
            arrivals=arrivals,
            concurrency=concurrency,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            prompt_file=prompt_file,
            long_share=long_share,
            long_tokens=long_tokens,
            temperature=temperature,
            seed=seed,
            stop_at_eos=stop_at_eos,
            slo=slo,
            retries=retries,
            warm_up=warm_up,
            timeout_s=timeout,
            progress=not as_json and sys.stderr.isatty(),
        )
    )
    if not as_json:
        measure.print_table(report)
    print_json(report)
    if not report["completed"]:
        raise typer.Exit(1)
