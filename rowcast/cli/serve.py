"""`rowcast serve`: an OpenAI-compatible server over one model."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from rowcast.cli import options
from rowcast.errors import UserError

_SERVER = "Server"
_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")


def serve(
    model: Annotated[str, typer.Argument(help="A directory, a GGUF file or a hub id.")] = options.DEFAULT_MODEL,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen at; any but a loopback one needs API keys.", rich_help_panel=_SERVER)
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="0: any that is free.", rich_help_panel=_SERVER)] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            "--api-key-file", help="API keys, one a line, as name:key; without any, no key is asked for.", rich_help_panel=_SERVER
        ),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option("--served-model-name", help="What clients call the model.", rich_help_panel=_SERVER)
    ] = None,
    max_waiting: Annotated[
        int, typer.Option("--max-waiting", help="Requests that may wait; more are refused with 429.", rich_help_panel=_SERVER)
    ] = 1024,
    deadline: Annotated[
        float | None,
        typer.Option("--deadline", help="Seconds that a request may take, waiting included.", rich_help_panel=_SERVER),
    ] = None,
    drain_timeout: Annotated[
        float, typer.Option("--drain-timeout", help="Seconds for running requests after SIGTERM.", rich_help_panel=_SERVER)
    ] = 30.0,
    allowed_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-origin",
            help="Another web page that may call the server, as https://example.org; repeatable.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-host", help="Another name of a loopback server, as behind a proxy; repeatable.", rich_help_panel=_SERVER
        ),
    ] = None,
    log_requests: Annotated[
        bool,
        typer.Option("--log-requests/--no-log-requests", help="A JSON line for each on standard error.", rich_help_panel=_SERVER),
    ] = True,
    dtype: options.DType = "auto",
    weights: options.Weights = "auto",
    device: options.Device = "auto",
    ladder: options.Ladder = "auto",
    draft: options.Draft = None,
    draft_device: options.DraftDevice = None,
    kv_budget: options.KVBudget = None,
    verification: options.Verification = "coupled",
    mode: options.Mode = "exact",
    density: options.Density = None,
    calibration: options.Calibration = None,
    tp: options.TensorParallel = 1,
    gpu_memory: options.GpuMemory = None,
    host_memory: options.HostMemory = None,
    max_model_len: options.MaxModelLen = None,
    max_num_seqs: Annotated[
        int | None, typer.Option("--max-num-seqs", help="Sequences that run at the same time.", rich_help_panel="Model")
    ] = None,
    prefill_stall: Annotated[
        float,
        typer.Option("--prefill-stall", help="Seconds by which prompts may prolong a step of others.", rich_help_panel="Model"),
    ] = 0.1,
    eager: options.Eager = False,
    plan: Annotated[Path | None, typer.Option("--plan", help="A plan file to execute.", rich_help_panel="Model")] = None,
) -> int:
    """Serve a model over HTTP, with OpenAI's API and a page to watch it at /. SIGTERM and Ctrl-C let running requests finish."""
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        raise UserError(f'serving needs {", ".join(missing)}, which is not installed: pip install "rowcast[serve]"')
    if not drain_timeout >= 0:
        raise UserError(f"--drain-timeout {drain_timeout:g} has to be at least 0 seconds")

    from rowcast.serving import server
    from rowcast.serving.security import AppSettings, read_api_keys

    name = served_model_name or model.rstrip("/").rpartition("/")[2] or model
    app_settings = AppSettings(
        host=host,
        api_keys=() if api_key_file is None else read_api_keys(api_key_file),
        allowed_hosts=tuple(allowed_host or ()),
        allowed_origins=tuple(allowed_origin or ()),
        log_requests=log_requests,
    )
    bound = server.bind(host, port)

    from rowcast import Plan
    from rowcast.serving.app import make_app
    from rowcast.serving.service import ServiceSettings, engine_service

    service = engine_service(
        model, ServiceSettings(name=name, max_waiting=max_waiting, deadline_s=deadline), tensor_parallel_size=tp, ladder=ladder,
        draft=draft, draft_device=draft_device, kv_budget=kv_budget, verification=verification, mode=mode, density=density,
        calibration=calibration, dtype=dtype, weights=weights, device=device, gpu_memory=gpu_memory, host_memory=host_memory,
        max_model_len=max_model_len, max_num_seqs=max_num_seqs, prefill_stall_s=prefill_stall, eager=eager,
        plan=None if plan is None else Plan.load(plan),
    )  # fmt: skip
    return server.run(service, lambda: make_app(service, app_settings, service.server_metrics.http), bound, drain_s=drain_timeout)
